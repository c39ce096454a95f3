"""Files on the Hugging Face hub, named where a path may stand: `hf://datasets/OWNER/NAME@COMMIT/FILE`.

That is how the hub's own library names them. A file is fetched once, into that library's cache, when a spec is read;
from then on it is a path like any other and counts by its content. Published sets keep their own terms: nothing of them
comes with this project, and gated ones are fetched with the login of whoever runs the spec.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORM = "hf://datasets/OWNER/NAME@COMMIT/FILE"
PLACE = re.compile(
    r"hf:/+(?P<kind>datasets/|models/)?(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[^/]*))?(/(?P<file>.*))?"
)
COMMIT = re.compile(r"[0-9a-f]{40}")
BELIEVED = 60.0
"""Seconds for which a failure is told again without asking again, since a grid names one file many times."""
OR_A_PATH = "or give the path of a copy"
_failed: dict[str, tuple[float, str]] = {}


class HubError(ValueError):
    """A file on the hub that cannot be had: its name, why, and what to do."""


@dataclass(frozen=True)
class HubFile:
    """One file of a repository, at one commit."""

    kind: str
    """dataset or model."""
    repository: str
    revision: str
    file: str

    @property
    def place(self) -> str:
        """The name under which a spec knows it."""
        return f"{self.page}@{self.revision}/{self.file}"

    @property
    def page(self) -> str:
        """The name of its repository."""
        return f"hf://{'datasets/' if self.kind == 'dataset' else ''}{self.repository}"


def named(place: str | Path) -> bool:
    """Whether `place` names a file on the hub. A `Path` counts too, though it keeps one slash of two."""
    return str(place).startswith("hf:/")


def parsed(place: str | Path) -> HubFile:
    """What `hf://datasets/OWNER/NAME@COMMIT/FILE` means; without `datasets/`, a file of a model's repository.

    Raises HubError for another form, and for anything but a whole commit: a branch, and a tag too, can move.
    """
    text = re.sub("^hf:/+", "hf://", str(place))
    found = PLACE.fullmatch(text)
    if found is None or not found["file"]:
        raise HubError(f"{text!r} names no file on the hub; write {FORM}")
    kind = "dataset" if found["kind"] == "datasets/" else "model"
    one = HubFile(kind, found["repository"], found["revision"] or "COMMIT", found["file"])
    if found["revision"] is None and "@" in one.file:  # written behind the file
        file, _, revision = one.file.rpartition("@")
        one = HubFile(kind, one.repository, revision, file)
        raise HubError(f"{text!r}: the revision stands behind the repository; write {one.place}")
    if not COMMIT.fullmatch(one.revision):
        said = f"{one.revision!r} is no commit" if found["revision"] else "no revision, which would mean main"
        fixed = HubFile(kind, one.repository, "COMMIT", one.file).place
        raise HubError(
            f"{text!r}: {said}; what a branch or tag means can change, and the result with it: write {fixed} with the "
            "40 digits of a commit (on the repository's page: Files and versions, History)"
        )
    return one


def fetch(place: str | Path) -> Path:
    """The file in the hub's local cache, fetched into it unless it is there. Without a network, what is there is used.

    Raises HubError as `parsed` does, and for a file that is not there, not for everyone, or out of reach.
    """
    one = parsed(place)
    since, why = _failed.get(one.place, (0.0, ""))
    if why and time.monotonic() - since < BELIEVED:
        raise HubError(why)
    from huggingface_hub import hf_hub_download

    options: dict[str, Any] = {"repo_type": one.kind, "revision": one.revision}
    try:
        return Path(hf_hub_download(one.repository, one.file, **options))
    except Exception as error:  # of several libraries; each of them is one message to whoever wrote the spec
        why = f"{one.place}: {_reason(one, error)}"
        _failed[one.place] = time.monotonic(), why
        raise HubError(why) from error


def _reason(one: HubFile, error: Exception) -> str:
    """What is in the way, and what to do."""
    from huggingface_hub import constants, errors

    login = "log in (`hf auth login`, or HF_TOKEN)"
    page = one.page.replace("hf:/", constants.ENDPOINT)
    if isinstance(error, errors.GatedRepoError):
        return f"is gated; accept its terms at {page} and {login}, {OR_A_PATH}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no {one.kind} {one.repository!r} for you; check its name, or {login} if it is private"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{one.repository!r} has no such commit; take one from {page}/commits/main"
    if isinstance(error, errors.LocalEntryNotFoundError):
        if isinstance(error.__cause__, errors.OfflineModeIsEnabled):
            where = "it is not in the hub's cache (below HF_HOME)"
            return f"{where}, and HF_HUB_OFFLINE forbids to fetch it; unset that once, {OR_A_PATH}"
        return f"{constants.ENDPOINT} gives nothing ({_first(error.__cause__ or error)}); try again, {OR_A_PATH}"
    if isinstance(error, errors.EntryNotFoundError):
        return f"no such file at that commit; see {page}/tree/{one.revision}"
    return f"cannot be fetched ({_first(error)}); try again, {OR_A_PATH}"


def _first(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
