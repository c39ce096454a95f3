"""What a layer writes lies in the singular directions that sspace keeps, whatever stands between matrix and stream."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.contrast import contrast
from experiments.edit import Site, SiteName
from experiments.engine import Engine
from experiments.interventions.sspace import weight
from experiments.spec import SubjectSpec
from experiments.subject import load
from tests.experiments.methods import PAIRS
from tests.tiny import ARCHITECTURES, make_tiny_model

RANK = 5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("site", "matrix"), [("mlp_out", "down"), ("attn_out", "o")])
def test_a_matrix_of_low_rank_writes_only_along_the_directions_of_the_weight(
    architecture: str, site: SiteName, matrix: SiteName, tmp_path: Path
) -> None:
    subject = load(SubjectSpec(model=str(make_tiny_model(tmp_path, architecture)), dtype="float32"))
    module = subject.point(Site(matrix, 1)).module
    with torch.no_grad():
        u, s, v = torch.linalg.svd(module.weight, full_matrices=False)  # type: ignore[arg-type]
        module.weight.copy_(u[:, :RANK] * s[:RANK] @ v[:RANK])  # type: ignore[operator]
        if module.bias is not None:
            module.bias.zero_()  # type: ignore[operator]
    engine = Engine(subject)
    evidence = contrast(engine, PAIRS, "last").at(Site(site, 1))
    basis = torch.linalg.svd(weight(evidence), full_matrices=False).U[:, :RANK]
    written = evidence.positive.double()
    assert (written - written @ basis @ basis.T).norm() <= 1e-5 * written.norm()
