"""A node's record: what was made, from what, how long it took, and a digest that shows when somebody edited it."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import provenance
from orchestrator.identity import CanonicalError, sha256
from orchestrator.storage import StoreError, files_in

if TYPE_CHECKING:
    from orchestrator.plan import Node

FORMAT = 1
"""Version of the record's own layout."""


class Clock:
    """When a node's work began."""

    def __init__(self) -> None:
        self.started = now()
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def seconds(self) -> dict[str, float]:
        return {
            "seconds": round(time.monotonic() - self._wall, 3),
            "cpu_seconds": round(time.process_time() - self._cpu, 3),
        }


def compose(node: Node, folder: Path, outputs: Mapping[str, Any], clock: Clock, place: str) -> bytes:
    """The record's bytes. Raises StoreError when `outputs` is not plain, finite data."""
    record = {
        "format": FORMAT,
        "key": node.key,
        "stage": node.stage,
        "version": node.version,
        "label": node.label,
        "params": node.params,
        "inputs": dict(node.inputs),
        "runtime": dict(node.runtime),
        "outputs": dict(outputs),
        "files": {path.relative_to(folder).as_posix(): _file(path) for path in files_in(folder)},
        "packages": provenance.packages(),
        "code": provenance.code(),
        "host": {**provenance.host(), "pid": os.getpid(), "device": provenance.device()},
        "started": clock.started,
        "finished": now(),
        **clock.seconds(),
        "peak_rss_mib": provenance.peak_rss_mib(),
        "peak_gpu_mib": provenance.peak_gpu_mib(),
        "place": place,
    }
    try:
        digest = digest_of(record)
    except CanonicalError as error:
        raise StoreError(f"{node.name} cannot be recorded: {error}") from error
    return (json.dumps({**record, "digest": digest}, indent=1, allow_nan=False) + "\n").encode()


def digest_of(record: Mapping[str, Any]) -> str:
    return sha256(dict(record))


def _file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def parsed(content: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise StoreError(f"{where} is not JSON ({error}); delete its folder to compute it again") from error
    if not isinstance(value, dict):
        raise StoreError(f"{where} holds a {type(value).__name__}, not a record; delete its folder to compute it again")
    return value


def checked(content: bytes, where: str, folder: str) -> dict[str, Any]:
    """A record as it was written. Raises StoreError when it was changed since."""
    record = parsed(content, where)
    given = record.pop("digest", None)
    if given != digest_of(record):
        raise StoreError(
            f"{where} was changed after it was written (its digest does not match); a record cannot be edited: "
            f"delete {folder} to compute it again"
        )
    return {**record, "digest": given}


def now() -> str:
    """This second, in UTC, as ISO 8601 text."""
    return datetime.now(UTC).isoformat(timespec="seconds")
