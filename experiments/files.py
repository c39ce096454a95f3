"""Files a subject is made of: the cache folder, content digests that are cheap the second time, atomic publication."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""What PEFT writes: a folder with the first is a PEFT adapter, and these two are its content."""


class SubjectError(ValueError):
    """A subject that cannot be used as asked: what is wrong, the value, what is allowed, what to do."""


def cache_folder() -> Path:
    """Folder for things that can be made again: ORCH_CACHE, else ~/.cache/orch. Not created here."""
    return Path(os.environ.get("ORCH_CACHE") or "~/.cache/orch").expanduser()


def publish(target: Path, fill: Callable[[Path], None]) -> Path:
    """Make the folder `target` with `fill(temporary folder)` and a rename, and return it.

    Safe when processes race: whoever renames second finds the folder taken and drops its work; both hold the same.
    """
    if target.exists():
        return target
    with _temporary(target) as work:
        made = work / "made"
        made.mkdir()
        fill(made)
        try:
            made.rename(target)
        except OSError:
            if not target.exists():
                raise
    return target


def publish_text(target: Path, text: str) -> None:
    """Write `text` to the file `target` by a rename, so that no reader sees half of it."""
    with _temporary(target) as work:
        made = work / "made"
        made.write_text(text, encoding="utf-8")
        made.replace(target)


@contextlib.contextmanager
def _temporary(target: Path):  # type: ignore[no-untyped-def]
    """A temporary folder beside `target`, removed at the end. Raises SubjectError when it cannot be made."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise SubjectError(
            f"cannot write to the cache folder {target.parent} ({error.strerror}); set ORCH_CACHE to a writable folder"
        ) from error
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def digest(path: Path) -> str:
    """Hex sha256 of a file's content, remembered in the cache folder under its path, size and modification time."""
    stat = path.stat()
    seen = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "inode": stat.st_ino}
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24]
    note = cache_folder() / "digests" / f"{name}.json"
    with contextlib.suppress(OSError, json.JSONDecodeError):  # no note, or half a disk: hash again, never wrong
        known = json.loads(note.read_text(encoding="utf-8"))
        if isinstance(known, dict) and {key: known.get(key) for key in seen} == seen:
            return str(known["sha256"])
    with path.open("rb") as file:
        value = hashlib.file_digest(file, "sha256").hexdigest()
    publish_text(note, json.dumps({**seen, "sha256": value}))
    return value


def digest_all(paths: Iterable[Path]) -> str:
    """Hex sha256 over the names and contents of several files, whatever their order."""
    lines = sorted(f"{path.name} {digest(path)}\n" for path in paths)
    return digest_text("".join(lines))


def is_adapter(path: Path) -> bool:
    """Whether `path` is a PEFT adapter's folder, the one kind of folder that a setting may name."""
    return os.path.isfile(path / ADAPTER_FILES[0])


def digest_text(text: str) -> str:
    """Hex sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()
