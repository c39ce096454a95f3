from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with room for a judge's prompts."""
    from tests.tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("roomy") / "llama", max_position_embeddings=4096)


@pytest.fixture(scope="module")  # no longer: Ray prints about dead nodes for as long as anybody is connected
def ray_cluster() -> Iterator[Any]:
    """A Ray cluster of two raylets with one processor each, without a dashboard; this process is connected to it."""
    import orchestrator.cluster  # sets RAY_AUTH_MODE before ray is imported
    from orchestrator.access import secure_token

    secure_token()
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    cluster.wait_for_nodes()
    with orchestrator.cluster.connected(cluster.address):
        yield cluster
    cluster.shutdown()
