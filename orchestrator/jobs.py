"""Ray's Jobs API: the work of `orch submit --detach` runs as a job on the cluster, whoever hangs up."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence

from ray.exceptions import RayError
from ray.job_submission import JobSubmissionClient

from orchestrator.access import secure_token
from orchestrator.cluster import first_line, passed_on
from orchestrator.resources import ClusterError


def submit_job(address: str, arguments: Sequence[str], name: str) -> str:
    """Run `orch <arguments>` as a job on the cluster at `address`; gives the job's id at once. Raises ClusterError."""
    secure_token()
    try:
        client = JobSubmissionClient(address)
        return client.submit_job(
            entrypoint=shlex.join([sys.executable, "-m", "orchestrator", *arguments]),
            submission_id=f"orch-{name}-{time.strftime('%Y%m%d-%H%M%S')}",
            runtime_env={"env_vars": passed_on()},
            metadata={"orch": name},
        )
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise ClusterError(
            f"cannot submit a job to the cluster at {address!r}: {first_line(error)}; it must run with its dashboard "
            "(`ray start --head` does) and accept the token in ~/.ray/auth_token"
        ) from error


def dashboard_url(address: str) -> str:
    """URL of the dashboard of the cluster at `address`."""
    return str(JobSubmissionClient(address).get_address())
