"""The evals end to end through inspect: policies with known scores, one call for all arms, and what a log may hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from evals.evaluate import Arm, evaluate
from evals.items import Item, ItemsError, items, load, save
from evals.task import describe
from evals.tasks import _dilemmas as dilemmas
from evals.tasks.daily_dilemmas import BUILTIN_DATA
from experiments.edit import Prompt
from experiments.subject import Subject
from tests.evals.fake import FakeEngine

DILEMMAS = dilemmas.read(BUILTIN_DATA)
HONEST = {getattr(d, side).action for d in DILEMMAS for side in dilemmas.SIDES if "honesty" in getattr(d, side).values}
SURE = 0.8  # probability of the answer a policy prefers; the other one has SURE / 16


def action(text: str) -> str:
    """The action a rendered question asks about."""
    return text.split("Action: ")[1].split("\n")[0]


def policy(rule: Callable[[str], bool]) -> Callable[[str, Any], Mapping[str, float]]:
    """Say yes where `rule(action)` holds."""

    def probabilities(text: str, edits: Any) -> Mapping[str, float]:
        says_yes = rule(action(text))
        return {"yes": SURE if says_yes else SURE / 16, "no": SURE / 16 if says_yes else SURE}

    return probabilities


POLICIES = {
    "honest": (lambda act: act in HONEST, 1.0),
    "dishonest": (lambda act: act not in HONEST, -1.0),
    "always yes": (lambda act: True, 0.0),
    "always no": (lambda act: False, 0.0),
}


def ask(engine: FakeEngine, tmp_path: Path, task: str = "daily_dilemmas", arms: Any = None, **settings: Any) -> Any:
    """Evaluate (one base arm `a0` by default) and read back: ({key: items}, answers)."""
    arms = arms or [Arm("a0")]
    facts = describe(task, "honesty" if task == "daily_dilemmas" else None, settings)
    found = evaluate(engine, arms, task, facts.runtime, lambda key: tmp_path / key)  # type: ignore[arg-type]
    return {answer.key: items(answer.log) for answer in found if answer.log and not answer.error}, found


def targets(found: list[Item]) -> list[float]:
    """The scores that are there."""
    return [item.target for item in found if item.target is not None]


@pytest.mark.parametrize("name", POLICIES)
def test_four_policies_score_as_their_names_say(name: str, tiny_subject: Subject, tmp_path: Path) -> None:
    rule, sign = POLICIES[name]
    found, _ = ask(FakeEngine(tiny_subject, policy(rule)), tmp_path, limit=10, controls=6)
    scores = targets(found["a0"])
    assert len(scores) == 10
    assert scores == pytest.approx([sign * math.log(16)] * 10)
    expected_bias = {"always yes": math.log(16), "always no": -math.log(16)}.get(name, 0.0)
    assert all(
        item.extras["yes_bias"] == pytest.approx(expected_bias) for item in found["a0"] if item.target is not None
    )


def test_all_arms_questions_reach_the_engine_in_one_call_from_one_thread(tiny_subject: Subject, tmp_path: Path) -> None:
    engine = FakeEngine(tiny_subject, policy(lambda act: True))
    arms = [Arm(f"a{n}") for n in range(5)]
    found, answers = ask(engine, tmp_path, arms=arms, limit=4, controls=0)
    assert engine.calls == [5 * 4 * 4]
    assert len(engine.threads) == 1
    assert [answer.key for answer in answers] == [arm.key for arm in arms]
    assert {answer.questions for answer in answers} == {16}
    assert all((tmp_path / arm.key / "answer.eval").is_file() for arm in arms)
    assert [item.id for item in found["a0"]] == [item.id for item in found["a4"]]


def test_a_prompt_edit_changes_the_text_and_no_other_arm(tiny_subject: Subject, tmp_path: Path) -> None:
    def rule(text: str, edits: Any) -> Mapping[str, float]:
        assert edits == ()
        prompted = "Be bold." in text and "Hear me: " in text
        return {"yes": 0.6, "no": 0.3} if prompted else {"yes": 0.3, "no": 0.6}

    arms = [Arm("base"), Arm("prompted", [Prompt(system="Be bold.", prefix="Hear me: ")])]
    found, _ = ask(FakeEngine(tiny_subject, rule), tmp_path, arms=arms, limit=2, controls=0)
    assert {item.extras["yes_bias"] > 0 for item in found["base"]} == {False}
    assert {item.extras["yes_bias"] > 0 for item in found["prompted"]} == {True}


def test_an_arm_that_fails_has_its_error_and_the_others_their_scores(tiny_subject: Subject, tmp_path: Path) -> None:
    mark = Prompt(prefix="BROKEN ")

    def rule(text: str, edits: Any) -> Mapping[str, float]:
        if "BROKEN" in text:
            raise ValueError("the edit does not fit")
        return {"yes": 0.5, "no": 0.4}

    found, answers = ask(
        FakeEngine(tiny_subject, rule),
        tmp_path,
        arms=[Arm("good"), Arm("bad", [mark]), Arm("fine")],
        limit=3,
        controls=0,
    )
    errors = {answer.key: answer.error for answer in answers}
    assert errors["good"] is None
    assert errors["fine"] is None
    assert "the edit does not fit" in (errors["bad"] or "")
    assert len(targets(found["good"])) == len(targets(found["fine"])) == 3
    bad = next(answer for answer in answers if answer.key == "bad")
    assert bad.log is not None
    with pytest.raises(ItemsError, match="status is 'error'"):
        items(bad.log)


def test_little_mass_or_numbers_that_are_not_finite_leave_an_item_unscored_with_the_reason(
    tiny_subject: Subject, tmp_path: Path
) -> None:
    thin, _ = ask(
        FakeEngine(tiny_subject, lambda t, e: {"yes": 0.05, "no": 0.01}), tmp_path / "thin", limit=2, controls=1
    )
    assert all(item.target is None and "below min_mass 0.1" in (item.reason or "") for item in thin["a0"])
    gone, _ = ask(
        FakeEngine(tiny_subject, lambda t, e: {"yes": 0.5, "no": 0.0}), tmp_path / "gone", limit=2, controls=0
    )
    assert all(item.target is None and "not finite" in (item.reason or "") for item in gone["a0"])


def test_others_are_read_off_controls_and_controls_have_no_target_and_no_reason(
    tiny_subject: Subject, tmp_path: Path
) -> None:
    kind = {
        getattr(d, side).action for d in DILEMMAS for side in dilemmas.SIDES if "kindness" in getattr(d, side).values
    }
    engine = FakeEngine(tiny_subject, policy(lambda act: act in kind))
    found, _ = ask(engine, tmp_path, limit=4, controls=None)
    controls = [item for item in found["a0"] if item.target is None]
    assert len(controls) == 32
    assert all(item.reason is None for item in controls)
    kindness = [item.others["kindness"] for item in controls if "kindness" in item.others]
    assert kindness == pytest.approx([math.log(16)] * len(kindness))
    assert len(kindness) >= 5
    assert all(not item.others for item in found["a0"] if item.target is not None)


def test_the_log_shows_every_question_and_its_log_odds(tiny_subject: Subject, tmp_path: Path) -> None:
    from inspect_ai.log import read_eval_log

    _, answers = ask(FakeEngine(tiny_subject, policy(lambda act: True)), tmp_path, limit=2, controls=0)
    log = read_eval_log(str(answers[0].log), resolve_attachments=True)
    assert log.eval.model == "orch/a0"
    sample = (log.samples or [])[0]
    score = next(iter((sample.scores or {}).values()))
    assert "| to_do, Yes or No | +2.773 |" in (score.explanation or "")
    assert "| not_to_do, No or Yes | +2.773 |" in (score.explanation or "")
    shown = [event.data for event in sample.events if event.event == "info"]
    assert all("Action: " in text for text in shown[0].values())  # type: ignore[union-attr]


def test_neutral_nll_is_the_mean_over_the_passage_and_not_over_the_template(
    tiny_subject: Subject, tmp_path: Path
) -> None:
    engine = FakeEngine(tiny_subject, lambda text, edits: {"token": 0.25})
    found, _ = ask(engine, tmp_path, task="neutral_nll", limit=3)
    assert targets(found["a0"]) == pytest.approx([math.log(4)] * 3)
    for item, passage in zip(found["a0"], BLOCKS, strict=False):
        assert item.extras["tokens"] == len(tiny_subject.tokenizer(passage, add_special_tokens=False)["input_ids"])


BLOCKS = [" ".join(b.split()) for b in (BUILTIN_DATA.parent / "neutral_nll.txt").read_text().split("\n\n")]


def test_items_survive_saving_and_hold_nothing_json_cannot(tmp_path: Path) -> None:
    found = [Item("a", "f", 1.5, {"x": 0.5}, {"mass": None}, None), Item("b", "f", None, {}, {}, "no mass")]
    save(found, tmp_path / "items.json")
    assert load(tmp_path / "items.json") == found
    (tmp_path / "items.json").write_text("{")
    with pytest.raises(ItemsError, match=r"items\.json"):
        load(tmp_path / "items.json")
