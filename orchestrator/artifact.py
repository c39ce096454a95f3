"""The store: a node's folder, its record written last, its failure when there was one."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.identity import SHORT
from orchestrator.record import Clock, checked, compose, now, parsed
from orchestrator.storage import (
    FAILED,
    RECORD,
    Entry,
    LocalStorage,
    Storage,
    StoreError,
    full_disk,
)

if TYPE_CHECKING:
    from orchestrator.plan import Node

__all__ = ["Publication", "Store", "StoreError"]

LABEL_CHARACTERS = 60


@dataclass
class Publication:
    """What a node's work fills in: files below `folder`, and JSON facts in `outputs`."""

    folder: Path
    outputs: dict[str, Any] = field(default_factory=dict)


def slug(label: str) -> str:
    """A label as it stands in a folder's name: `mean_diff-L14`."""
    return re.sub(r"[^A-Za-z0-9._=+-]+", "-", label).strip("-.")[:LABEL_CHARACTERS].rstrip("-.")


def folder_name(label: str, key: str) -> str:
    """`mean_diff-L14-3fa9c1d2b7e4`: readable, and found by its end."""
    return f"{slug(label)}-{key[:SHORT]}".lstrip("-")


class Store:
    """Results by key, in a folder or at any fsspec URL. Any number of processes may write to one store at once."""

    def __init__(self, url: str | Path) -> None:
        self.url = str(url)
        self._storage = _storage(self.url)

    def has(self, key: str) -> bool:
        """True when a record of `key` is there now, whoever wrote it. For many keys at once use `keys`."""
        return self._storage.find(key[:SHORT]) is not None

    def keys(self) -> set[str]:
        """First 12 hex digits of every key that has a record; one listing a stage."""
        return set(self._storage.entries()[0])

    def failed(self) -> set[str]:
        """First 12 hex digits of every key whose last attempt failed."""
        results, failures = self._storage.entries()
        return set(failures) - set(results)

    def record(self, key: str) -> dict[str, Any]:
        """The record of `key`. Raises StoreError: there is none, or it was changed after it was written."""
        entry = self._entry(key)
        record = self._read(entry)
        if not record["key"].startswith(key):
            raise StoreError(
                f"{entry.stage}/{entry.name} holds {record['key']}, not {key}: 12 digits met; use another store"
            )
        return record

    def records(self, stage: str | None = None) -> Iterator[dict[str, Any]]:
        """Every record, of one stage or of all. Raises StoreError at one that was changed."""
        for entry in sorted(self._storage.entries()[0].values()):
            if stage is None or entry.stage == stage:
                yield self._read(entry)

    def by_label(self) -> dict[tuple[str, str], list[str]]:
        """(stage, label as in folder names) -> first 12 hex digits of the keys that have a record."""
        found: dict[tuple[str, str], list[str]] = {}
        for short, entry in sorted(self._storage.entries()[0].items()):
            found.setdefault((entry.stage, entry.name.removesuffix(short).rstrip("-")), []).append(short)
        return found

    def modified(self, key: str) -> datetime | None:
        """When the record of `key` was written, where the place it lies in says so cheaply."""
        entry = self._storage.find(key[:SHORT])
        return self._storage.modified(entry) if entry else None

    def failure(self, key: str) -> dict[str, Any] | None:
        """Traceback, attempts and time of the last failure of `key`; None when it has a record or never failed."""
        if self.has(key):
            return None
        entry = self._storage.find_failure(key[:SHORT])
        content = self._storage.read(entry, FAILED) if entry else None
        return parsed(content, f"{self.url}/{entry.stage}/{entry.name}/{FAILED}") if entry and content else None

    def folder(self, key: str) -> Path:
        """A local folder with the files of `key`, not to be changed. Raises StoreError when one is missing or short."""
        return self._storage.folder(self._entry(key), self.record(key))

    @contextmanager
    def publishing(self, node: Node) -> Iterator[Publication]:
        """A temporary folder to fill; at the end it becomes the result of `node`, record last, in one step.

        When another process was first, its result is kept and this one dropped. An exception leaves `failed.json` and
        goes on up; KeyboardInterrupt leaves nothing. Raises StoreError: a full disk, or outputs that are not plain.
        """
        entry = Entry(node.stage, folder_name(node.label, node.key))
        clock = Clock()
        work = self._storage.workspace(node.stage, node.short)
        try:
            publication = Publication(work)
            yield publication
            place = uuid.uuid4().hex[:12]
            content = compose(node, work, publication.outputs, clock, place)
            self._storage.commit(work, entry, content, place)
            self._storage.remove(_failed(entry))
        except Exception as error:
            shutil.rmtree(work, ignore_errors=True)
            if full_disk(error):
                raise StoreError(
                    f"{node.name}: no space left for the store {self.url} ({_free(work)}); nothing was kept; "
                    "free some space and submit again"
                ) from error
            self.fail(node, "".join(traceback.format_exception(error)), _first_line(error))
            raise
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def fail(self, node: Node, text: str, reason: str | None = None) -> None:
        """Write that `node` failed: `text` is the traceback or the reason, one more attempt is counted."""
        entry = _failed(Entry(node.stage, folder_name(node.label, node.key)))
        before = self._storage.read(entry, FAILED)
        attempts = parsed(before, entry.name)["attempts"] if before else 0
        content = {
            "key": node.key,
            "stage": node.stage,
            "label": node.label,
            "params": node.params,
            "inputs": node.inputs,
            "reason": reason or (text.strip().splitlines() or ["no reason given"])[-1],
            "traceback": text,
            "attempts": attempts + 1,
            "at": now(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        try:
            self._storage.write_failure(entry, json.dumps(content, indent=1, default=repr).encode())
        except OSError as error:
            raise StoreError(
                f"{node.name} failed ({content['reason']}), and that could not be written: {error}"
            ) from error

    def discard(self, key: str) -> None:
        """Remove the result of `key`, and its failure, if there are any: it will be computed again."""
        for find in (self._storage.find, self._storage.find_failure):
            while entry := find(key[:SHORT]):  # more than one when it was also published under another label
                self._storage.remove(entry)

    @contextmanager
    def lock(self, name: str, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
        """Be alone among this machine's processes under `name`, waiting if need be; `on_wait` is told for whom, once.

        Advisory: results are safe without it. On a remote store it holds among processes of one machine and user.
        """
        folder = self._storage.locks
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = self._lock_file(name).open("a+", encoding="utf-8")
        except OSError as error:
            raise StoreError(
                f"cannot write to the store {self.url}: {error.strerror}; choose another --store"
            ) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if on_wait:
                    file.seek(0)
                    on_wait(f"{name}: waiting for {file.read().strip() or 'another process'}")
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            file.truncate()
            file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now()}\n")
            file.flush()
            yield

    def holder(self, name: str) -> str | None:
        """Who holds the lock `name`, as `process 123 on host, since ...`; None while nobody does."""
        file = self._lock_file(name)
        if not file.exists():
            return None
        with file.open(encoding="utf-8") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return held.read().strip() or "another process"
        return None

    def _lock_file(self, name: str) -> Path:
        return self._storage.locks / (re.sub(r"[^A-Za-z0-9._-]", "_", name) + ".lock")

    def _entry(self, key: str) -> Entry:
        entry = self._storage.find(key[:SHORT])
        if entry is None:
            raise StoreError(f"no record of {key[:SHORT]} in the store {self.url}")
        return entry

    def _read(self, entry: Entry) -> dict[str, Any]:
        where = f"{self.url}/{entry.stage}/{entry.name}"
        content = self._storage.read(entry, RECORD)
        if content is None:
            raise StoreError(f"{where}/{RECORD} is gone; delete {where} to compute it again")
        return checked(content, f"{where}/{RECORD}", where)


def _storage(url: str) -> Storage:
    if url.startswith("file://"):
        url = url.removeprefix("file://")
    if "://" not in url and "::" not in url:
        root = Path(url).expanduser().absolute()
        if root.exists() and not root.is_dir():
            raise StoreError(f"the store {root} is a file; give a folder")
        return LocalStorage(root)
    from orchestrator.remote import RemoteStorage

    return RemoteStorage(url)


def _failed(entry: Entry) -> Entry:
    return Entry(entry.stage, f"{entry.name}.failed")


def _first_line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _free(work: Path) -> str:
    try:
        return f"{shutil.disk_usage(work.parent).free / 2**20:,.0f} MiB free"
    except OSError:
        return "free space unknown"
