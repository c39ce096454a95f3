"""What a record keeps so that a result can be questioned later: versions, commit, machine, memory. In no key."""

from __future__ import annotations

import getpass
import os
import platform
import resource
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("orch-experiments", "torch", "transformers", "peft", "inspect-ai", "ray", "numpy", "scipy", "safetensors")


@cache
def packages() -> dict[str, str | None]:
    """Distribution -> version, None for what is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def code() -> dict[str, Any]:
    """Git commit of this package's own checkout, and whether files differ from it; None outside a checkout."""
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return {"commit": None, "changed": None}
    changed = _git(here.parent.parent, "status", "--porcelain", "--untracked-files=no")
    return {"commit": _git(here.parent, "rev-parse", "HEAD"), "changed": bool(changed)}


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@cache
def host() -> dict[str, Any]:
    """Name, system, processor cores and user of this machine."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = str(os.getuid())
    return {"name": platform.node(), "system": platform.platform(), "cores": os.cpu_count(), "user": user}


def device() -> str:
    """`cuda: NAME` when this process used one, else `cpu`; asks torch only if somebody imported it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return "cpu"
    return f"cuda: {torch.cuda.get_device_name()}"


def peak_gpu_mib() -> float | None:
    """Most memory this process has held so far on its GPU, MiB; None where it used none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return round(torch.cuda.max_memory_allocated() / 2**20, 1)


def peak_rss_mib() -> float:
    """Most memory this process has held so far, MiB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)
