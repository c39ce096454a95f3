"""A store on anything fsspec reaches: object storage, SSH, memory."""

from __future__ import annotations

import hashlib
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

from experiments.files import cache_folder
from orchestrator.storage import (
    FAILED,
    RECORD,
    TEMPORARY,
    Entry,
    StoreError,
    files_in,
    remove_if_dead,
    short_in,
    short_of,
    temporary_name,
)


class RemoteStorage:
    """Anything fsspec reaches. Reading a folder downloads it once into the cache folder, checked by digest."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise StoreError(
                f"store {url!r}: {error}; allowed: a folder, or a URL of a file system fsspec knows"
            ) from error
        self.cache = cache_folder() / "store" / hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self.locks = self.cache / ".locks"
        self._results: dict[str, Entry] = {}
        self._failures: dict[str, Entry] = {}

    def _path(self, *parts: str) -> str:
        return "/".join((self.root.rstrip("/"), *parts))

    def _names(self, *parts: str) -> list[str]:
        try:
            found = self.fs.ls(self._path(*parts), detail=False, refresh=True)
        except FileNotFoundError:
            return []
        return [path.rstrip("/").rpartition("/")[2] for path in found]

    def entries(self) -> tuple[dict[str, Entry], dict[str, Entry]]:
        self._refresh()
        return dict(self._results), dict(self._failures)

    def _refresh(self) -> None:
        self.fs.invalidate_cache()
        self._results, self._failures = {}, {}
        for stage in self._names():
            for name in self._names(stage) if not stage.startswith(".") else ():
                if found := short_of(name):
                    (self._failures if found[1] else self._results)[found[0]] = Entry(stage, name)

    def find(self, short: str) -> Entry | None:
        if short not in self._results:
            self._refresh()
        return self._results.get(short)

    def find_failure(self, short: str) -> Entry | None:
        if short not in self._failures:
            self._refresh()
        return self._failures.get(short)

    def read(self, entry: Entry, file: str) -> bytes | None:
        try:
            return bytes(self.fs.cat_file(self._path(*entry, file)))
        except FileNotFoundError:
            return None

    def modified(self, entry: Entry) -> datetime | None:
        return None  # a question for each record, over a network

    def folder(self, entry: Entry, record: dict[str, Any]) -> Path:
        target = self.cache / entry.stage / f"{entry.name}-{record['place']}"
        if target.exists():
            return target
        work = self.workspace(entry.stage, short_in(entry))
        try:
            for name, file in record["files"].items():
                local = work / name
                local.parent.mkdir(parents=True, exist_ok=True)
                remote = self._path(entry.stage, ".data", f"{entry.name}-{record['place']}", name)
                self._download(remote, local, file["sha256"])
            if not target.exists():
                work.rename(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return target

    def _download(self, remote: str, local: Path, digest: str) -> None:
        try:
            self.fs.get_file(remote, str(local))
        except FileNotFoundError as error:
            raise StoreError(
                f"{remote} is missing in {self.url}; delete its node's folder to compute it again"
            ) from error
        with local.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise StoreError(f"{remote} in {self.url} is not what its record says; delete its node's folder")

    def workspace(self, stage: str, short: str) -> Path:
        folder = self.cache / stage
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"{TEMPORARY}*"):
            remove_if_dead(path)
        work = folder / temporary_name(short)
        work.mkdir()
        return work

    def commit(self, work: Path, entry: Entry, record: bytes, place: str) -> bool:
        data = self._path(entry.stage, ".data", f"{entry.name}-{place}")
        try:
            for path in files_in(work):
                remote = f"{data}/{path.relative_to(work).as_posix()}"
                self.fs.makedirs(remote.rpartition("/")[0], exist_ok=True)
                self.fs.put_file(str(path), remote)
            if self.fs.exists(self._path(*entry, RECORD)):
                self._remove(data)
                return False
            self.fs.makedirs(self._path(*entry), exist_ok=True)
            self.fs.pipe_file(self._path(*entry, RECORD), record)
        except BaseException:
            self._remove(data)
            raise
        self._results[short_in(entry)] = entry
        return True

    def _remove(self, path: str) -> None:
        if self.fs.exists(path):
            self.fs.rm(path, recursive=True)

    def write_failure(self, entry: Entry, content: bytes) -> None:
        self.fs.makedirs(self._path(*entry), exist_ok=True)
        self.fs.pipe_file(self._path(*entry, FAILED), content)
        self._failures[short_in(entry)] = entry

    def remove(self, entry: Entry) -> None:
        failure = entry.name.endswith(".failed")
        (self._failures if failure else self._results).pop(short_in(entry), None)
        self._remove(self._path(*entry))  # what readers look for; the data it named go next
        for name in () if failure else self._names(entry.stage, ".data"):
            if name.startswith(f"{entry.name}-"):
                self._remove(self._path(entry.stage, ".data", name))
