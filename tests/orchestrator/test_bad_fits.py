"""A trial that cannot be made is told in one message that names it, and the trials beside it are made and ranked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.interventions.mean_diff import MeanDiff
from tests.bad_cases import CASES, HONEST, Case, beside, spec, write_vector
from tests.bad_input import FAILED, copied, orch, run

FITS = [case for case in CASES if case.kind == "Fit"]


@pytest.mark.parametrize("case", FITS, ids=lambda case: case.name)
def test_a_trial_that_cannot_be_made_is_named_with_the_reason_and_the_others_go_on(
    case: Case, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = copied(tiny_folder, tmp_path)
    result = run(case, folder, "submit")
    assert result.exit_code == case.code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    told = {f"{name}: {reason}" for name, reason in FAILED.findall(result.stderr)}
    assert told
    where, *says = case.says
    for text in told:
        assert "experiments." not in text.partition(": ")[0]
    assert any(where in text and all(words in text for words in says) for text in told), told
    assert len({text.partition("]: ")[2].rpartition(" dose ")[2] for text in told}) == 1, "one reason, in all evals"
    rows = json.loads(orch(folder, "board", "--json").stdout)
    status = {row["trial"]: row["status"] for row in rows}
    bad = where.partition("[")[2].removesuffix("]").removeprefix("animal_preference/owl ")
    assert status.pop(bad) == "failed" or where.startswith("answer")  # an answer that fails costs its dose alone
    assert set(status.values()) <= {"ok", "over budget"}, status
    assert status
    (note,) = [row["notes"] for row in rows if row["trial"] == bad]
    assert note.count(says[0]) == 1, "the reason stands on the leaderboard once, not once a dose"


def test_a_failure_can_be_asked_for_with_all_about_it(tiny_folder: Path, tmp_path: Path) -> None:
    folder = copied(tiny_folder, tmp_path)
    beside({"method": "fisher", "damping": 0})(folder)
    result = orch(folder, "submit", "spec.yaml", "--local", "--quiet")
    key = result.stderr.rpartition("(orch why ")[2].partition(")")[0]
    failure = json.loads(orch(folder, "why", key).stdout)
    assert failure["label"] == "fisher Lmid"
    assert failure["params"]["settings"]["damping"] == 0
    assert "set damping above 0" in failure["reason"]
    assert "Traceback" in failure["traceback"]


def test_a_method_of_positive_doses_runs_at_those_and_is_refused_where_there_are_none(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MeanDiff, "dose_kind", "one_sided")
    folder = copied(tiny_folder, tmp_path)
    spec(folder, {"doses": [-2, -1]})
    refused = orch(folder, "plan", "spec.yaml")
    assert refused.exit_code == 2
    assert (
        "doses: no dose is left for mean_diff L1, which takes positive doses only; got [-2.0, -1.0]" in refused.stderr
    )
    spec(folder)
    planned = orch(folder, "plan", "spec.yaml", "--json")
    assert planned.exit_code == 0
    document = json.loads(planned.stdout)
    assert "mean_diff L1 takes positive doses only: it runs at 1" in document["warnings"]
    answers = [node for node in document["nodes"] if node["stage"] == "answer"]
    assert len(answers) == 2 * len(HONEST["evals"])


@pytest.mark.parametrize(
    ("width", "site", "says"),
    [
        (48, "resid@1", "has width 48, the subject has 32 there"),
        (32, "resid@4", "number 4 is layer 4 by layer_map blocks; the subject has layers 0 to 3"),
    ],
)
def test_adopt_says_that_a_file_does_not_fit_the_subject(
    width: int, site: str, says: str, tiny_folder: Path, tmp_path: Path
) -> None:
    write_vector(tmp_path / "v.safetensors", width, site)
    result = orch(tmp_path, "adopt", "v.safetensors", "--subject", str(tiny_folder))
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("orch: ")]
    assert says in line
    write_vector(tmp_path / "v.safetensors", 32, "resid@3")
    assert orch(tmp_path, "adopt", "v.safetensors", "--subject", str(tiny_folder)).exit_code == 0
