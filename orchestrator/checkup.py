"""Is this machine fit to run experiments? One finding a line, each with what to do when it is not."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from orchestrator.access import token_path

NEEDED = {
    "torch": "2.13",
    "transformers": "5.",
    "peft": "0.21",
    "inspect-ai": "0.3.",
    "ray": "2.60",
    "sqlite-utils": "4.",
    "pydantic": "2.",
}
"""Distribution -> how a version that the project was tested with begins."""
ENTRY_POINT = "evals._registry"


class Finding(NamedTuple):
    """One thing that was looked at."""

    name: str
    ok: bool
    text: str


def findings(store: str, registry: os.PathLike[str]) -> list[Finding]:
    """Everything that was looked at, in the order in which it matters."""
    return [*_versions(), *_packages(), _provider(), *_machine(), _token(), _store(store), _registry(Path(registry))]


def _versions() -> Iterator[Finding]:
    for name, begins in NEEDED.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Finding(name, False, f"not installed; needed: {begins}*; pip install -e .")
            continue
        yield Finding(
            name, found.startswith(begins), found if found.startswith(begins) else f"{found}; needed: {begins}*"
        )


def _packages() -> Iterator[Finding]:
    from orchestrator.cli import PACKAGES, ROOT, shadowed

    wrong = shadowed()
    yield Finding("packages", not wrong, "; ".join(wrong) or f"{', '.join(PACKAGES)} come from {ROOT}")


def _provider() -> Finding:
    from importlib.metadata import entry_points

    found = [point.value for point in entry_points(group="inspect_ai")]
    ok = ENTRY_POINT in found
    text = (
        "inspect finds orch/..." if ok else "the entry point inspect_ai = evals._registry is missing; pip install -e ."
    )
    return Finding("inspect provider", ok, text)


def _machine() -> Iterator[Finding]:
    import torch

    from experiments.spec import EMBEDDED, SubjectSpec
    from experiments.subject import resolve_dtype

    gpu = torch.cuda.is_available()
    yield Finding("cores", True, str(len(os.sched_getaffinity(0))))
    yield Finding("gpu", True, torch.cuda.get_device_name() if gpu else "none: the CPU does the work")
    yield Finding("dtype", True, f"auto means {resolve_dtype(SubjectSpec(model=EMBEDDED), gpu)} here")


def _token() -> Finding:
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode != "token":
        return Finding(
            "ray token", False, f"RAY_AUTH_MODE={mode}: anyone who reaches the cluster can run code; unset it"
        )
    if os.environ.get("RAY_AUTH_TOKEN"):
        return Finding("ray token", True, "from RAY_AUTH_TOKEN")
    path = token_path()
    if not path.exists():
        return Finding("ray token", True, f"none yet; the first submit writes {path}")
    open_to_others = bool(stat.S_IMODE(path.stat().st_mode) & 0o077)
    return Finding(
        "ray token", not open_to_others, f"{path} is readable by others: chmod 600 it" if open_to_others else str(path)
    )


def _store(store: str) -> Finding:
    from orchestrator.artifact import Store, StoreError

    try:
        count = len(Store(store).keys())
    except StoreError as error:
        return Finding("store", False, str(error))
    if "://" in store:
        return Finding("store", True, f"{store}: {count} results")
    place = next(folder for folder in (Path(store), *Path(store).absolute().parents) if folder.exists())
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        return Finding("store", False, f"cannot write to {place}: {error.strerror}; choose another --store")
    return Finding("store", True, f"{store}: {count} results")


def _registry(path: Path) -> Finding:
    if not path.exists():
        return Finding("registry", True, f"{path}: none yet")
    import sqlite3

    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as connection:
            verdict = connection.execute("pragma quick_check").fetchone()[0]
    except sqlite3.Error as error:
        verdict = str(error)
    text = (
        str(path)
        if verdict == "ok"
        else f"{path}: {verdict}; delete it and run `orch registry rebuild`: it is only an index"
    )
    return Finding("registry", verdict == "ok", text)
