"""A Ray head on this machine that outlives the command which started it, and stopping exactly that one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.access import secure_token, token_path
from orchestrator.resources import ClusterError

SECONDS_TO_START = 60.0
SECONDS_TO_STOP = 30.0


@dataclass(frozen=True)
class Head:
    """The process that holds the cluster, and the address to reach it."""

    pid: int
    address: str


def folder() -> Path:
    """Where the head keeps its sessions; short, because sockets live below it."""
    return Path(f"/tmp/orch-head-{os.getuid()}")


def _note() -> Path:
    """What `start` remembers: beside the token, where no other user can write."""
    return token_path().parent / "orch-head.json"


def running() -> Head | None:
    """The head that `start` left running, if it still does."""
    try:
        head = Head(**json.loads(_note().read_text()))
    except FileNotFoundError:
        return None
    return head if _alive(head.pid) else None


def start() -> Head:
    """The running head, or a new one: dashboard on the loopback interface, token required. Raises ClusterError."""
    if head := running():
        return head
    secure_token()
    folder().mkdir(mode=0o700, exist_ok=True)
    written = folder() / "ray_current_cluster"
    written.unlink(missing_ok=True)
    log = folder() / "head.log"
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += ["--port=0", f"--temp-dir={folder()}", "--dashboard-host=127.0.0.1", "--include-dashboard=true"]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    address = _address(process, written, log)
    head = Head(process.pid, address)
    _note().write_text(json.dumps(asdict(head)))
    return head


def stop() -> Head | None:
    """End the head that `start` left running, with its workers and jobs. None when there is none."""
    head = running()
    if head is None:
        return None
    os.kill(head.pid, signal.SIGTERM)
    deadline = time.monotonic() + SECONDS_TO_STOP
    while _alive(head.pid):
        if time.monotonic() > deadline:
            raise ClusterError(f"process {head.pid} does not stop; end it with: kill -9 {head.pid}")
        time.sleep(0.2)
    _note().unlink(missing_ok=True)
    return head


def _address(process: subprocess.Popen[bytes], written: Path, log: Path) -> str:
    """Wait until Ray has written the address of the new cluster."""
    deadline = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        if written.exists() and (address := written.read_text().strip()):
            return address
        time.sleep(0.2)
    else:
        process.terminate()
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
    raise ClusterError(f"`ray start --head` did not come up; the end of {log}:\n{tail}")


def _alive(pid: int) -> bool:
    """Whether `pid` runs and is a Ray head: after a restart of the machine the number may be anyone's."""
    with contextlib.suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        return state != "Z" and b"--head" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False
