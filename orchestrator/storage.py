"""Where nodes' folders lie: a local folder here, what fsspec reaches in `remote.py`. Publication is one step in both.

Local:   ROOT/STAGE/LABEL-KEY12/{record.json, files}; made in ROOT/STAGE/.tmp-..., then renamed.
Remote:  ROOT/STAGE/LABEL-KEY12/record.json and ROOT/STAGE/.data/LABEL-KEY12-NONCE/files; the record is uploaded
         last and names the nonce, so that two writers never mix their files.
Both:    ROOT/STAGE/LABEL-KEY12.failed/failed.json.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol

RECORD, FAILED, TEMPORARY = "record.json", "failed.json", ".tmp-"
_NAME = re.compile(r"(?:.*-)?([0-9a-f]{12})(\.failed)?$")
_TEMPORARY = re.compile(re.escape(TEMPORARY) + r"[0-9a-f]+-(\d+)-(\d+)-[0-9a-f]+-(.*)$")
RACY_NS = 50_000_000
"""A folder changed this shortly before it was listed may have changed again within the clock's tick: list it again."""


class StoreError(ValueError):
    """A store that cannot be used, or a result in it that cannot be trusted: what, where, and what to do."""


class Entry(NamedTuple):
    """A node's folder: its stage and its name there."""

    stage: str
    name: str


class Storage(Protocol):
    """What a store needs of the place it lies in. `short` is a key's first 12 hex digits."""

    locks: Path

    def entries(self) -> tuple[dict[str, Entry], dict[str, Entry]]: ...
    def find(self, short: str) -> Entry | None: ...
    def find_failure(self, short: str) -> Entry | None: ...
    def read(self, entry: Entry, file: str) -> bytes | None: ...
    def modified(self, entry: Entry) -> datetime | None: ...
    def folder(self, entry: Entry, record: dict[str, Any]) -> Path: ...
    def workspace(self, stage: str, short: str) -> Path: ...
    def commit(self, work: Path, entry: Entry, record: bytes, place: str) -> bool: ...
    def write_failure(self, entry: Entry, content: bytes) -> None: ...
    def remove(self, entry: Entry) -> None: ...


def short_of(name: str) -> tuple[str, bool] | None:
    """(short key, is it a failure) of a folder's name; None for other names."""
    match = _NAME.fullmatch(name)
    return (match[1], bool(match[2])) if match and not name.startswith(".") else None


def temporary_name(short: str) -> str:
    """Name of a folder being filled: tells whose it is, so that it can be removed when its process is gone."""
    return f"{TEMPORARY}{short}-{os.getpid()}-{_started(os.getpid())}-{uuid.uuid4().hex[:8]}-{socket.gethostname()}"


def _started(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 where the system does not say."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0


def remove_if_dead(path: Path) -> None:
    """Remove a temporary folder whose process, on this machine, is gone."""
    match = _TEMPORARY.fullmatch(path.name)
    if not match or match[3] != socket.gethostname():
        return
    pid, started = int(match[1]), int(match[2])
    try:
        os.kill(pid, 0)
        dead = started != _started(pid)
    except ProcessLookupError:
        dead = True
    except PermissionError:
        dead = False
    if dead:
        shutil.rmtree(path, ignore_errors=True)


def full_disk(error: BaseException) -> bool:
    """True when `error` says that a disk or a quota is full; native libraries only say it in words."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left on device" in str(error) or "Disk quota exceeded" in str(error)


def sync(path: Path) -> None:
    """Make a file's content survive a power cut."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def files_in(folder: Path) -> Iterator[Path]:
    """Every file below `folder`, in one order. Raises StoreError for links, which would point outside the store."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise StoreError(f"{path} is a link; a result holds its own files: copy what it points to")
        if path.is_file():
            yield path


class _Listing:
    """The names in one folder, read again only when the folder has changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: set[str] = set()
        self._seen: int | None = None

    def fresh(self) -> bool:
        """Read the folder if it may have changed; False when nothing did."""
        try:
            changed = self.path.stat().st_mtime_ns
        except FileNotFoundError:
            self.names, self._seen = set(), None
            return True
        if changed == self._seen:
            return False
        now = time.time_ns()
        try:
            self.names = set(os.listdir(self.path))
        except NotADirectoryError:
            self.names = set()
        self._seen = changed if now - changed > RACY_NS else None
        return True


class LocalStorage:
    """A folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.locks = root / ".locks"
        self._root = _Listing(root)
        self._stages: dict[str, _Listing] = {}
        self._results: dict[str, Entry] = {}
        self._failures: dict[str, Entry] = {}
        self._listed: dict[str, set[str]] = {}

    def entries(self) -> tuple[dict[str, Entry], dict[str, Entry]]:
        self._refresh()
        return dict(self._results), dict(self._failures)

    def find(self, short: str) -> Entry | None:
        return self._find(self._results, short, RECORD)

    def find_failure(self, short: str) -> Entry | None:
        return self._find(self._failures, short, FAILED)

    def _find(self, index: dict[str, Entry], short: str, file: str) -> Entry | None:
        for attempt in range(2):
            entry = index.get(short)
            if entry and (self.root / entry.stage / entry.name / file).exists():
                return entry
            if attempt == 0:
                self._refresh()
        return None

    def _refresh(self) -> None:
        if self._root.fresh():
            stages = {name for name in self._root.names if not name.startswith(".")}
            self._stages = {name: self._stages.get(name, _Listing(self.root / name)) for name in sorted(stages)}
        for stage, listing in self._stages.items():
            if listing.fresh():
                self._note(stage, listing.names)

    def _note(self, stage: str, names: set[str]) -> None:
        """Take the names that came and went into the indexes."""
        before = self._listed.get(stage, set())
        if gone := {_end(name) for name in before - names}:
            for index in (self._results, self._failures):
                for short in gone:
                    index.pop(short, None)
            before = {name for name in before if _end(name) not in gone}  # the same key under another label: look again
        kept = set()
        for name in names - before:
            if name.startswith(TEMPORARY):
                remove_if_dead(self.root / stage / name)
            elif found := short_of(name):
                short, failed = found
                file = FAILED if failed else RECORD
                if (self.root / stage / name / file).exists():
                    (self._failures if failed else self._results)[short] = Entry(stage, name)
                    kept.add(name)
        self._listed[stage] = (before & names) | kept

    def read(self, entry: Entry, file: str) -> bytes | None:
        try:
            return (self.root / entry.stage / entry.name / file).read_bytes()
        except FileNotFoundError:
            return None

    def modified(self, entry: Entry) -> datetime | None:
        try:
            return datetime.fromtimestamp((self.root / entry.stage / entry.name / RECORD).stat().st_mtime)
        except FileNotFoundError:
            return None

    def folder(self, entry: Entry, record: dict[str, Any]) -> Path:
        folder = self.root / entry.stage / entry.name
        for name, file in record["files"].items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != file["bytes"]:
                found = "is missing" if size is None else f"has {size:,} bytes"
                raise StoreError(f"{path} {found}; its record says {file['bytes']:,}; delete {folder}")
        return folder

    def workspace(self, stage: str, short: str) -> Path:
        work = self.root / stage / temporary_name(short)
        try:
            work.mkdir(parents=True)
        except OSError as error:
            raise StoreError(
                f"cannot write to the store {self.root}: {error.strerror}; choose another --store"
            ) from error
        return work

    def commit(self, work: Path, entry: Entry, record: bytes, place: str) -> bool:
        for path in files_in(work):
            sync(path)
        with (work / RECORD).open("wb") as file:
            file.write(record)
            file.flush()
            os.fsync(file.fileno())
        target = self.root / entry.stage / entry.name
        if target.exists() and not (target / RECORD).exists():
            rubbish = target.with_name(temporary_name("0"))
            target.rename(rubbish)
            shutil.rmtree(rubbish)
        try:
            work.rename(target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and (target / RECORD).exists():
                return False
            raise
        self._results[short_in(entry)] = entry
        self._listed.setdefault(entry.stage, set()).add(entry.name)
        return True

    def write_failure(self, entry: Entry, content: bytes) -> None:
        target = self.root / entry.stage / entry.name
        target.mkdir(parents=True, exist_ok=True)
        draft = target / f"{TEMPORARY}{uuid.uuid4().hex[:8]}"
        try:
            draft.write_bytes(content)
            draft.replace(target / FAILED)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        self._failures[short_in(entry)] = entry
        self._listed.setdefault(entry.stage, set()).add(entry.name)

    def remove(self, entry: Entry) -> None:
        folder = self.root / entry.stage / entry.name
        rubbish = folder.with_name(temporary_name(short_in(entry)))
        try:
            folder.rename(rubbish)  # in one step, so that no reader meets half a result
        except FileNotFoundError:
            return
        shutil.rmtree(rubbish)
        (self._failures if entry.name.endswith(".failed") else self._results).pop(short_in(entry), None)


def _end(name: str) -> str:
    return name.removesuffix(".failed")[-12:]


def short_in(entry: Entry) -> str:
    found = short_of(entry.name)
    if found is None:
        raise StoreError(f"{entry.name!r} is no name of a node's folder")
    return found[0]
