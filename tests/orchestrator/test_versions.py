"""Versions of one experiment that differ in the judge alone: side by side, and never in one ranking."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from evals.compare import compare
from evals.findings import Findings, Row
from evals.items import Item
from orchestrator import report
from orchestrator.gather import ITSELF, comparison
from orchestrator.registry import Registry
from orchestrator.versions import answers_digest, judges_digest
from tests.orchestrator.test_registry import row

INPUTS = {"base/0": "s0", "base/1": "s1", "0/0/1.0": "s2", "0/1/1.0": "s3", "detect/0": "d"}
ANSWERS = {role: f"answer of {key}" for role, key in INPUTS.items() if not role.startswith("detect")}


def params(judge: str | None, below: float = 30.0, itself: bool = False) -> dict[str, Any]:
    """What a compare node says of an eval that `judge` reads, and of one that scores itself."""
    evals: list[dict[str, Any]] = [
        {"task": "ill", "target": None, "version": 1, "higher_is": "more target"},
        {"task": "owls", "target": "owl", "version": 1, "higher_is": "more target"},
    ]
    if judge is not None:
        evals[0] |= {
            "judge": {"digest": f"{judge}-digest", "models": [judge, "embedded"], "itself": itself},
            "rubrics": {"aligned": "0123456789abcdef"},
            "scoring": {"aligned_below": below},
        }
    shared = {"method": "lora", "label": "lora", "seed": 0, "baseline": False, "group": "g", "dose_kind": "signed"}
    return {"budget": {"delta_nll": 0.2}, "split": {"dev": 0.5}, "evals": evals, "trials": [{**shared, "doses": [1.0]}]}


def found(judge: str, transfer: float) -> Findings:
    by = {"judge": f"{judge}-digest", "judged_by": judge, "rubrics": '{"aligned": "01234567"}', "scoring": "{}"}
    return Findings([row("lora", transfer, 0.01, eval="ill", **by), row("lora", 9.0, 0.01, eval="owls")], [])


def publish(registry: Registry, key: str, judge: str, transfer: float, month: int, **changes: Any) -> None:
    about = {"submitted_at": f"2025-{month:02d}-01T00:00:00+00:00", "answers": ANSWERS} | changes
    registry.publish(key, "e", params(judge), INPUTS, found(judge, transfer), **about)


def shown(registry: Registry) -> set[tuple[str, str, float, int]]:
    rows = registry.leaderboard("e")
    return {(one["eval"], one["judged_by"] or "", one["transfer"], one["rank"]) for one in rows}


def test_two_judges_of_the_same_answers_are_both_shown_each_with_its_own_ranking(tmp_path: Path) -> None:
    with Registry(tmp_path / "r.sqlite") as registry:
        publish(registry, "k1", "mild", 0.1, 1)
        publish(registry, "k2", "strict", 0.7, 2)
        assert shown(registry) == {("ill", "mild", 0.1, 1), ("ill", "strict", 0.7, 1), ("owls", "", 9.0, 1)}
        text = report.plain(registry.leaderboard("e"))
        assert text.count("e: ill (version 2), judged by mild") == 1
        assert text.count("e: ill (version 2), judged by strict") == 1
        assert text.count("e: owls (version 2)\n") == 1


def test_another_spec_replaces_all_versions_and_the_same_judge_again_its_own(tmp_path: Path) -> None:
    with Registry(tmp_path / "r.sqlite") as registry:
        publish(registry, "k1", "mild", 0.1, 1)
        publish(registry, "k2", "strict", 0.7, 2)
        publish(registry, "k3", "mild", 0.2, 3)
        assert shown(registry) == {("ill", "mild", 0.2, 1), ("ill", "strict", 0.7, 1), ("owls", "", 9.0, 1)}
        publish(registry, "k4", "mild", 0.3, 4, answers={**ANSWERS, "0/0/1.0": "another answer"})
        assert shown(registry) == {("ill", "mild", 0.3, 1), ("owls", "", 9.0, 1)}


def test_an_experiment_of_which_no_score_is_known_stands_alone(tmp_path: Path) -> None:
    with Registry(tmp_path / "r.sqlite") as registry:
        publish(registry, "k1", "mild", 0.1, 1)
        publish(registry, "k2", "strict", 0.7, 2, answers=None)
        assert shown(registry) == {("ill", "strict", 0.7, 1), ("owls", "", 9.0, 1)}


def test_digests_tell_judges_from_answers_and_thresholds() -> None:
    mild, strict = params("mild"), params("strict")
    assert answers_digest(mild, ANSWERS) == answers_digest(strict, ANSWERS)
    assert answers_digest(mild, ANSWERS) != answers_digest(params("mild", below=40.0), ANSWERS)
    assert answers_digest(mild, ANSWERS) == answers_digest(json.loads(json.dumps(mild)), ANSWERS)
    assert judges_digest(mild) != judges_digest(strict)
    assert judges_digest(params(None)) is None


@pytest.mark.parametrize("itself", [False, True])
def test_rows_say_who_judged_by_what_and_with_which_thresholds(itself: bool) -> None:
    def items(key: str) -> Sequence[Item]:
        moved = 0.1 * (key in ("s2", "s3"))
        return [Item(f"i{n}", f"f{n}", 0.01 * n * n + moved * (n % 3), {}, {}, None) for n in range(12)]

    question = comparison(params("mild", itself=itself), INPUTS, items)
    rows: dict[str, Row] = {one.eval: one for one in compare(question).rows}
    ill, owls = rows["ill"], rows["owls/owl"]
    assert (ill.judge, ill.judged_by) == ("mild-digest", "mild + embedded")
    assert json.loads(ill.rubrics or "") == {"aligned": "0123456789abcdef"}
    assert json.loads(ill.scoring or "") == {"aligned_below": 30.0}
    assert (ITSELF in ill.notes) is itself
    assert (owls.judge, owls.judged_by, owls.rubrics, owls.scoring) == (None, None, None, None)
    assert ITSELF not in owls.notes


def test_the_page_shows_thresholds_and_rubrics_under_a_judged_table() -> None:
    by = {"judge": "a" * 64, "rubrics": '{"aligned": "0123456789abcdef"}', "scoring": '{"aligned_below": 30.001}'}
    said = f"judge {'a' * 8}, rubrics aligned 01234567; scored with aligned_below 30.001"
    assert report.judging(by) == said
    assert report.judging({"judge": None}) == ""
