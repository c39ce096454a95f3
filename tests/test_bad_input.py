"""Bad input is told in one message, before anything is written, and a run that met a fault is finished by the next.

The faults of a run, and the tests that show each, are listed in docs/errors.md.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import bad_cases
from tests.bad_cases import CASES, HONEST, MODEL, Case, spec
from tests.bad_input import COMMANDS, PAGE, ROOT, cell, copied, orch, run

RUNS = [case for case in CASES if case.kind == "Run"]
PLANS = [case for case in CASES if case.kind not in COMMANDS]
REJUDGED = [case for case in CASES if case.kind == "Rejudge"]


def named(case: Case) -> str:
    return f"{case.kind}: {case.name}"


def beside(folder: Path) -> set[str]:
    """What lies in `folder` that no case put there."""
    return {path.name for path in folder.iterdir()} & {"store", "registry.sqlite", "logs"}


def refuse(case: Case, folder: Path, command: str, before: set[str]) -> None:
    result = run(case, folder, command)
    assert result.exit_code == case.code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    for words in case.says:
        assert words in result.stderr, result.stderr
    if case.code:
        assert result.stdout == ""
        assert beside(folder) == before


@pytest.mark.parametrize("case", PLANS, ids=named)
def test_what_is_wrong_is_said_in_full_and_nothing_is_written(case: Case, tiny_folder: Path, tmp_path: Path) -> None:
    refuse(case, copied(tiny_folder, tmp_path), "plan", set())


@pytest.mark.parametrize("case", [case for case in PLANS[::6] if case.code], ids=named)
def test_a_submit_refuses_what_a_plan_refuses(case: Case, tiny_folder: Path, tmp_path: Path) -> None:
    refuse(case, copied(tiny_folder, tmp_path), "submit", set())


@pytest.mark.parametrize("case", RUNS, ids=named)
def test_a_run_that_cannot_start_says_why_and_computes_nothing(case: Case, tiny_folder: Path, tmp_path: Path) -> None:
    folder = copied(tiny_folder, tmp_path)
    case.make(folder)
    registry = folder / "registry.sqlite"
    before = registry.read_bytes() if registry.exists() else None
    refuse(case, folder, "submit", beside(folder) | ({"registry.sqlite"} if "--store" in case.options else set()))
    assert before is None or registry.read_bytes() == before


@pytest.mark.parametrize("case", REJUDGED, ids=named)
def test_answers_that_cannot_be_judged_again_are_refused_and_nothing_is_written(
    case: Case, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = copied(tiny_folder, tmp_path)
    case.make(folder)
    before = {path: path.stat().st_mtime_ns for path in (folder / "store").rglob("*")}
    refuse(replace(case, make=lambda folder: None), folder, "rejudge", beside(folder))
    assert {path: path.stat().st_mtime_ns for path in (folder / "store").rglob("*")} == before


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every path that leads to a value in a document, the whole of it first."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for name, item in inner for place in places(item, (*path, name)))]


def replaced(value: Any, path: tuple[Any, ...], other: Any) -> Any:
    if not path:
        return other
    new = value.copy()
    new[path[0]] = replaced(value[path[0]], path[1:], other)
    return new


ODD = (None, [], {}, "", "a\x00b", "..", -1, 2.5, float("inf"), True, 10**400, [[]], [{"a": None}], {"": ""})


def test_no_odd_value_anywhere_in_a_spec_ends_in_a_traceback(tiny_folder: Path, tmp_path: Path) -> None:
    folder = copied(tiny_folder, tmp_path)
    for number, place in enumerate(places(HONEST)):
        for odd in (ODD[number % len(ODD)], ODD[(5 * number + 3) % len(ODD)], ODD[(9 * number + 7) % len(ODD)]):
            (folder / "spec.yaml").write_text(yaml.safe_dump(replaced(HONEST, place, odd)))
            result = orch(folder, "plan", "spec.yaml")
            assert result.exit_code in (0, 2), (place, odd, result.exception)
            assert isinstance(result.exception, SystemExit | None), (place, odd)


def test_the_page_of_errors_has_every_case_and_what_it_says() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for case in CASES:
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {case.name} |")]
        for words in case.says:
            assert cell(words) in row, f"{named(case)}: run `python -m tests.bad_input --write`"


def test_every_test_that_the_page_names_is_there() -> None:
    named_tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE.read_text(encoding="utf-8"))
    assert len(named_tests) > 10
    for file, name in named_tests:
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), name


def submit(folder: Path) -> Any:
    return orch(folder, "submit", "spec.yaml", "--local")


def to_run(result: Any) -> int:
    found = re.search(r"(\d+) to run", result.stderr)
    assert found, result.output
    return int(found[1])


def records(folder: Path) -> dict[str, str]:
    """Folder of each result -> its record, in which time and process are written."""
    found = (folder / "store").glob("*/[!.]*/record.json")
    return {path.parent.name: path.read_text() for path in found}


def finish(folder: Path, nodes: int = 15) -> None:
    """Submit to the end: only what had no record is run, and no record is written again."""
    had = records(folder)
    result = submit(folder)
    assert result.exit_code == 0, result.output
    assert to_run(result) == nodes - len(had)
    now = records(folder)
    assert len(now) == nodes
    assert {name: now[name] for name in had} == had
    assert "mean_diff L1" in result.stdout
    assert to_run(submit(folder)) == 0


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a submit of the good spec was killed, and then finished."""
    folder = copied(tiny_folder, tmp_path_factory.mktemp("finished") / "here")
    spec(folder)
    code = "from orchestrator.cli import main; main(['submit', 'spec.yaml', '--local'])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 200  # a machine may be busy with other things
    while len(records(folder)) < 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 2 <= len(records(folder)) < 15
    finish(folder)
    return folder


@pytest.fixture
def done(finished: Path, tmp_path: Path) -> Path:
    """A copy of `finished`, to be damaged."""
    return shutil.copytree(finished, tmp_path / "here")


def test_a_fit_that_fails_is_tried_again_and_nothing_else_is(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experiments.interventions.mean_diff import MeanDiff

    def fit(self: Any, engine: Any, data: Any, seed: int) -> Any:
        raise ArithmeticError("no direction in it")

    folder = copied(tiny_folder, tmp_path)
    spec(folder)
    with monkeypatch.context() as patch:
        patch.setattr(MeanDiff, "fit", fit)
        assert submit(folder).exit_code == 1
    assert len(records(folder)) == 5
    finish(folder)


def test_a_process_killed_while_a_subject_is_at_work_is_resumed(finished: Path) -> None:
    assert len(records(finished)) == 15
    assert not list((finished / "store").glob("*/.tmp-*"))
    assert orch(finished, "registry", "check").exit_code == 0


def test_a_record_edited_by_hand_is_refused_and_what_was_deleted_is_made_again(done: Path) -> None:
    before = records(done)
    path = next((done / "store").glob("score/*/record.json"))
    path.write_text(path.read_text().replace('"unscored": 0', '"unscored": 1'))
    (done / "registry.sqlite").unlink()
    result = submit(done)
    assert result.exit_code == 2
    assert "was changed after it was written" in result.stderr
    assert f"delete {'store'}/score/{path.parent.name}" in result.stderr
    assert "Traceback" not in result.output
    shutil.rmtree(path.parent)
    finish(done)
    now = records(done)
    assert {name for name in before if now[name] != before[name]} == {path.parent.name}


def test_a_result_whose_file_was_cut_is_refused_with_what_to_delete(done: Path) -> None:
    path = next((done / "store").glob("fit/*/state.safetensors"))
    path.write_bytes(path.read_bytes()[:-7])
    for answer in (done / "store" / "answer").glob("*L1*"):
        shutil.rmtree(answer)
    result = submit(done)
    assert result.exit_code == 1
    assert re.search(r"state\.safetensors has [\d,]+ bytes; its record says [\d,]+; delete", result.stderr)
    shutil.rmtree(path.parent)
    finish(done)


@pytest.mark.parametrize("wrong", ["corrupt", "foreign"])
def test_a_registry_that_was_replaced_is_made_again_from_the_records(done: Path, wrong: str) -> None:
    rows = json.loads(orch(done, "board", "--json").stdout)
    (done / "registry.sqlite").unlink()
    getattr(bad_cases, wrong)(done)
    before = records(done)
    assert submit(done).exit_code == 2
    (done / "registry.sqlite").unlink()
    assert orch(done, "registry", "rebuild").exit_code == 0
    again = json.loads(orch(done, "board", "--json").stdout)
    assert [{**row, "submitted_at": None} for row in again] == [{**row, "submitted_at": None} for row in rows]
    assert to_run(submit(done)) == 0
    assert records(done) == before


def test_a_model_whose_files_change_is_another_subject(done: Path) -> None:
    before = records(done)
    config = done / MODEL / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"temperature": 0.5}))
    result = orch(done, "plan", "spec.yaml")
    assert re.search(r"run +answer.*changed since \w+: subject\.config_sha256", result.stdout), result.stdout
    assert records(done) == before
