"""The eval of small images: its score against a closed form, through inspect, and what it holds out."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from evals import items
from evals.evaluate import Arm, evaluate
from evals.forced_choice import Reply
from evals.task import TaskError, describe
from evals.tasks import digits as task
from experiments import digits as source
from experiments.subject import Subject
from tests.evals.fake import FakeEngine

BY_TEXT = {each.text: each.label for each in source.images(held_out=True)[:30]}
SURE = 0.3


def reader(right: bool) -> Any:
    """Gives SURE to the label that is right (or the one after it) and 0.05 to each of the others."""

    def probabilities(text: str, edits: Any) -> Mapping[str, float]:
        label = next(BY_TEXT[image] for image in BY_TEXT if image in text)
        said = label if right else str((int(label) + 1) % 10)
        return {each: SURE if each == said else 0.05 for each in source.LABELS}

    return probabilities


@pytest.mark.parametrize(("right", "odds"), [(True, math.log(0.3 / 0.45)), (False, math.log(0.05 / 0.7))])
def test_the_score_is_the_log_odds_of_the_right_label(
    tiny_subject: Subject, tmp_path: Path, right: bool, odds: float
) -> None:
    facts = describe("digits", None, {"limit": 30})
    engine: Any = FakeEngine(tiny_subject, reader(right))
    (answer,) = evaluate(engine, [Arm("a0")], "digits", facts.runtime, lambda key: tmp_path / key)
    assert answer.log is not None
    found = items.items(answer.log)
    assert len(found) == len({each.family for each in found}) == 30
    assert [each.target for each in found] == pytest.approx([odds] * 30)
    assert [each.extras["accuracy"] for each in found] == [float(right)] * 30
    assert [each.extras["mass"] for each in found] == pytest.approx([0.75] * 30)
    assert all((each.extras["read"] == each.extras["label"]) == right for each in found)


def test_an_even_guess_scores_minus_log_nine() -> None:
    score = task.judge("x", "3", Reply("digit", dict.fromkeys(source.LABELS, -7.0)))
    assert isinstance(score.value, dict)
    assert score.value["target"] == pytest.approx(-math.log(9))


def test_a_label_without_a_number_leaves_the_image_unscored_with_the_reason() -> None:
    reply = Reply("digit", {**dict.fromkeys(source.LABELS, -2.0), "4": None}, problem="4 is not finite")
    score = task.judge("x", "3", reply)
    assert isinstance(score.value, dict)
    assert isinstance(score.metadata, dict)
    assert math.isnan(float(score.value["target"]))
    assert score.metadata["reason"] == "digit: 4 is not finite"


def test_more_images_than_are_held_out_are_refused() -> None:
    with pytest.raises(TaskError, match="setting limit = 361"):
        describe("digits", None, {"limit": source.HELD_OUT + 1})


def test_without_scikit_learn_the_eval_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(TaskError, match=r"digits: .*scikit-learn, which is not installed.*pip install"):
        describe("digits", None, {})
