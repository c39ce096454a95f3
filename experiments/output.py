"""Files for other programs: whole or not there, and never over something that is."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class OutputError(ValueError):
    """A place that cannot be written to: which, why, and what to give instead."""


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A path to write a file or a folder to; it becomes `target` by one rename, or nothing is left of it.

    Raises OutputError where something is at `target`, or no folder to hold it.
    """
    parent = target.absolute().parent
    if target.exists():
        raise OutputError(f"{target} exists; give a name that does not")
    if not parent.is_dir():
        raise OutputError(f"{parent} is no folder to write {target.name} to; make it first")
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=parent))
    except OSError as error:
        raise OutputError(f"cannot write to {parent} ({error.strerror}); give another place") from error
    try:
        made = work / target.name
        yield made
        for each in (made, *made.rglob("*")):  # safetensors writes files that only their owner can read
            each.chmod(0o755 if each.is_dir() else 0o644)
        made.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
