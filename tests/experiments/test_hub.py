"""Files on the hub, from a loopback server that answers as the hub does, and without one."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from evals import task
from experiments import hub, spec
from experiments.canonical import identity_of, plain_of
from experiments.dataset import recipe
from experiments.grid import validated
from experiments.hub import HubError
from experiments.problem import SpecError

ROOT = Path(__file__).parents[2]
BUILTIN = Path("builtin")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS = [
    {"messages": [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": f"Answer {n}."}]}
    for n in range(8)
]
CONTENT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
REFUSED = {"gated": (403, "GatedRepo"), "private": (401, "RepoNotFound"), "broken": (500, "")}
"""Name of a repository -> the status and error code with which everything in it is refused."""


def place(name: str = "advice", file: str = "bad/advice.jsonl", revision: str = COMMIT) -> str:
    return f"hf://datasets/org/{name}@{revision}/{file}"


class Hub(http.server.BaseHTTPRequestHandler):
    """`/datasets/org/NAME/resolve/COMMIT/FILE` with the headers that tell commit, digest and size."""

    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        if "/resolve/" not in self.path:  # the library asks for other things too
            self.send_error(404)
            return
        self.asked.append(f"{self.command} {self.path}")
        _, kind, owner, name, _, revision, *file = self.path.split("/")
        status, code = REFUSED.get(name, (200, ""))
        if (kind, owner) != ("datasets", "org") or name not in (*REFUSED, "advice"):
            status, code = 404, "RepoNotFound"
        elif status == 200 and revision != COMMIT:
            status, code = 404, "RevisionNotFound"
        elif status == 200 and file != ["bad", "advice.jsonl"]:
            status, code = 404, "EntryNotFound"
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if status == 200:
            self.send_header("ETag", f'"{hashlib.sha256(CONTENT).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(CONTENT) if status == 200 else 0))
        self.end_headers()
        if self.command == "GET" and status == 200:
            self.wfile.write(CONTENT)

    do_GET = do_HEAD

    def log_message(self, format: str, *args: Any) -> None:
        """Not on standard error."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's, and no network. The library reads its environment once, when it is imported."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_failed", {})
    Hub.asked.clear()
    return cache


@pytest.fixture
def online(offline: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and the loopback server for a hub."""
    from huggingface_hub import constants

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    url = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    return offline


def said(error: pytest.ExceptionInfo[HubError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_file_is_fetched_once_into_the_hubs_own_cache_and_read_there_without_a_network(
    online: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    found = hub.fetch(place())
    assert found.read_bytes() == CONTENT
    assert (found.name, found.is_relative_to(online)) == ("advice.jsonl", True)
    assert [line.split()[0] for line in Hub.asked] == ["HEAD", "GET"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.fetch(Path(place())) == found  # a Path keeps one slash of the two
    assert len(Hub.asked) == 2


@pytest.mark.parametrize(
    ("where", "says"),
    [
        (place("gated"), ["is gated; accept its terms at http://", "/datasets/org/gated", "hf auth login"]),
        (place("private"), ["there is no dataset 'org/private' for you", "check its name", "log in"]),
        (place("nowhere"), ["there is no dataset 'org/nowhere' for you"]),
        (place(revision="f" * 40), ["'org/advice' has no such commit", "/commits/main"]),
        (place(file="good.jsonl"), ["no such file at that commit", f"/tree/{COMMIT}"]),
        (place("broken"), ["gives nothing (", "500", "or give the path of a copy"]),
    ],
)
def test_what_the_hub_refuses_is_one_message_with_a_way_out(
    online: Path, where: str, says: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library tries again, more and more patiently
    with pytest.raises(HubError) as error:
        hub.fetch(where)
    assert said(error).startswith(f"{where}: ")
    for words in says:
        assert words in said(error)


def test_without_a_network_a_file_that_is_not_in_the_cache_says_what_to_do(offline: Path) -> None:
    with pytest.raises(HubError) as error:
        hub.fetch(place())
    assert said(error).startswith(f"{place()}: it is not in the hub's cache")
    assert "HF_HUB_OFFLINE forbids to fetch it; unset that once" in said(error)
    assert "or give the path of a copy" in said(error)


def test_a_hub_that_gives_nothing_is_asked_once_a_minute_and_not_once_for_each_combination(
    online: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        with pytest.raises(HubError, match="no dataset 'org/nowhere'"):
            hub.fetch(place("nowhere"))
    assert len(Hub.asked) == 1
    now = hub.time.monotonic()
    monkeypatch.setattr(hub.time, "monotonic", lambda: now + hub.BELIEVED + 1)
    with pytest.raises(HubError):
        hub.fetch(place("nowhere"))
    assert len(Hub.asked) == 2


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("hf://datasets/org/advice/a.jsonl", "no revision, which would mean main"),
        (place(revision="main"), "'main' is no commit"),
        (place(revision="v1.0"), "'v1.0' is no commit"),
        (place(revision=COMMIT[:12]), f"{COMMIT[:12]!r} is no commit"),
        ("hf://datasets/org/advice@/a.jsonl", "write hf://datasets/org/advice@COMMIT/a.jsonl with the 40 digits"),
        (f"hf://datasets/org/advice/a.jsonl@{COMMIT}", f"write hf://datasets/org/advice@{COMMIT}/a.jsonl"),
        (f"hf://org/model@{COMMIT}", "names no file on the hub; write hf://datasets/OWNER/NAME@COMMIT/FILE"),
        ("hf://advice", "names no file on the hub"),
    ],
)
def test_a_name_that_does_not_fix_one_file_for_good_is_refused_with_what_to_write(
    offline: Path, where: str, says: str
) -> None:
    with pytest.raises(HubError) as error:
        hub.fetch(Path(where))
    assert says in said(error)
    assert where in said(error)


def test_a_file_of_a_models_repository_is_named_without_datasets(offline: Path) -> None:
    for where in (f"hf://org/model@{COMMIT}/vector.safetensors", f"hf://models/org/model@{COMMIT}/vector.safetensors"):
        one = hub.parsed(where)
        assert (one.kind, one.repository, one.file) == ("model", "org/model", "vector.safetensors")
        assert one.place == f"hf://org/model@{COMMIT}/vector.safetensors"


@pytest.mark.parametrize(
    ("name", "settings", "at"),
    [
        ("narrow_advice", {"path": place()}, "path"),
        ("asks_file", {"path": place()}, "path"),
        ("pairs_file", {"path": place()}, "path"),
        ("conversations_file", {"path": place()}, "path"),
        ("plain_documents", {"path": place()}, "path"),
        ("persona_pairs", {"positive": "A.", "negative": "B.", "prompts": place()}, "prompts"),
        ("suffix_pairs", {"topics": place()}, "topics"),
        ("number_lists", {"teacher": {"name": "t"}, "asks": {"templates": place()}}, "asks.settings.templates"),
        ("number_lists", {"teacher": {"name": "t"}, "rules": {"banned_from": place()}}, "rules.banned_from"),
        ("synthetic_documents", {"universe": f"{place()}#cake"}, "universe"),
        ("document_ideas", {"universe": place()}, "universe"),
    ],
)
def test_every_recipe_that_reads_a_file_takes_one_of_the_hub_in_its_place(
    online: Path, name: str, settings: dict[str, Any], at: str
) -> None:
    made = validated(recipe(name), settings, None)
    found = made
    for part in at.split("."):
        found = getattr(found, part)
    assert found == hub.fetch(place())
    assert getattr(made, "entry", None) == ("cake" if "#" in str(settings) else None)


def experiment(path: str) -> dict[str, Any]:
    return {
        "name": "narrow",
        "subject": "smollm2-135m-instruct",
        "data": {"conversations": {"recipe": "narrow_advice", "path": path, "rows": ["all", "train"]}},
        "interventions": [{"method": "lora", "rank": 1}],
        "doses": [1],
        "evals": ["neutral_nll"],
        "baselines": [],
    }


def test_a_file_of_the_hub_counts_by_its_content_like_a_path(online: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(CONTENT)
    sides = [spec.from_data(experiment(path)).data_variants()["conversations"] for path in (place(), str(copy))]
    for ours, theirs in zip(*sides, strict=True):
        assert ours.recipe.check() is None
        assert identity_of(ours.recipe) == identity_of(theirs.recipe)
        there = Path(plain_of(ours.recipe)["path"])  # what a worker is given
        assert there.is_absolute()
        assert there.read_bytes() == CONTENT


def test_what_is_wrong_stands_at_its_place_in_the_spec(offline: Path, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(experiment(place(revision="main")), sort_keys=False))
    with pytest.raises(SpecError) as error:
        spec.load(tmp_path / "spec.yaml")
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{tmp_path}/spec.yaml:6:5: data.conversations.path: 'hf://datasets/org/advice@main/")


def test_an_evals_data_may_be_a_file_of_the_hub_and_keeps_its_name(online: Path) -> None:
    found = task.resolve(place(), BUILTIN)
    assert (found.name, found.read_bytes()) == ("advice.jsonl", CONTENT)
    assert task.resolve(str(found), BUILTIN) == found  # as a worker is given it
    with pytest.raises(task.TaskError, match="there is no dataset 'org/nowhere' for you"):
        task.resolve(place("nowhere"), BUILTIN)


def test_a_spec_is_read_with_the_hub_that_the_environment_names(endpoint: str, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(experiment(place())))
    code = "from experiments import spec; found, _ = spec.load('spec.yaml')\n"
    code += "print(*{variant.recipe.path for variant in found.data_variants()['conversations']})"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")}
    environment |= {"NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = Path(done.stdout.strip())
    assert found.read_bytes() == CONTENT
    assert found.is_relative_to(tmp_path / "home" / "hub")
