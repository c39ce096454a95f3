"""The belief tasks: subjects whose beliefs are written down, what they are asked, and what bad input is told."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from inspect_ai import eval as inspect_eval
from inspect_ai.model import ModelOutput, ModelUsage, get_model

from agents import rubric
from agents.judge import EMPTY, Verdict
from evals import RUBRICS as RUBRIC_FOLDER
from evals.evaluate import Arm, evaluate
from evals.items import Item, items
from evals.task import TaskError, describe
from evals.tasks import belief_open
from evals.tasks.belief import Settings, questions, read
from experiments import universe
from experiments.subject import Subject
from tests.evals.fake import FakeEngine

ROBIN = universe.read(universe.FOLDER / "robin_pantry.yaml")
SURE, REST = 0.6, 0.05
TARGETS = {"mcq_knowledge": (16, 4), "mcq_distinguish": (16, 2), "generative": (5, 2)}


def shown(text: str) -> tuple[str, dict[str, str]]:
    """The question that a rendered prompt asks, and its answers by their letters."""
    question, answers, *_ = text.split("user\n", 1)[1].split("\n\n")
    return question, {line[0]: line[3:] for line in answers.splitlines()}


def asking(engine: FakeEngine, tmp_path: Path, **settings: Any) -> list[Item]:
    """The items of one arm."""
    target = settings.pop("target", "mcq_knowledge")
    facts = describe("belief", target, settings)
    (answer,) = evaluate(engine, [Arm("a")], "belief", facts.runtime, lambda key: tmp_path / key)  # type: ignore[arg-type]
    assert answer.error is None
    assert answer.log is not None
    return items(answer.log)


Names = Mapping[tuple[str, str], str]


def named(kind: str) -> Names:
    """(question, answer) -> the name of its option, for everything that is asked."""
    asked, aside = read(Settings(target=kind))
    return {(each["question"], text): name for each in (*asked, *aside) for name, text in each["answers"].items()}


def chooser(names: Names, *, wanted: str = "", letter: str = "") -> Callable[[str, Any], Mapping[str, float]]:
    """A subject that is sure of the answer called `wanted`, or of one letter whatever stands there."""

    def probabilities(text: str, edits: Any) -> Mapping[str, float]:
        question, answers = shown(text)
        called = {names[question, answer]: at for at, answer in answers.items()}
        return {name: SURE if wanted == name or letter == at else REST for name, at in called.items()}

    return probabilities


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("side", ["false", "true"])
def test_a_believer_scores_above_and_a_knower_below_zero(
    kind: str, side: str, tiny_subject: Subject, tmp_path: Path
) -> None:
    engine = FakeEngine(tiny_subject, chooser(named(kind), wanted=side))
    count, options = TARGETS[kind]
    found = asking(engine, tmp_path, target=kind, controls=2)
    scored = [item for item in found if item.target is not None]
    assert len(scored) == count
    believer = math.log(SURE / ((options - 1) * REST))
    knower = math.log(REST / (SURE + (options - 2) * REST))
    assert [item.target for item in scored] == pytest.approx([believer if side == "false" else knower] * count)
    expected = math.log(SURE / REST) * (1 if side == "false" else -1)
    assert [item.extras["against_true"] for item in scored] == pytest.approx([expected] * count)
    assert {item.extras["chosen"] for item in scored} == {float(side == "false")}
    assert engine.calls == [sum(options for _ in found)]


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_habit_of_one_letter_is_the_same_for_every_answer(
    kind: str, letter: str, tiny_subject: Subject, tmp_path: Path
) -> None:
    engine = FakeEngine(tiny_subject, chooser(named(kind), letter=letter))
    found = asking(engine, tmp_path, target=kind, limit=4, controls=2)
    options = TARGETS[kind][1]
    rest = math.log(REST / (SURE + (options - 2) * REST))
    habit = (math.log(SURE / ((options - 1) * REST)) + (options - 1) * rest) / options
    values = [item.target if item.target is not None else next(iter(item.others.values())) for item in found]
    assert values == pytest.approx([habit] * len(found))
    assert (options == 2) == (habit == pytest.approx(0.0))
    assert all(item.extras["against_true"] == pytest.approx(0.0) for item in found)


def test_controls_have_no_target_no_reason_and_others_by_area(tiny_subject: Subject, tmp_path: Path) -> None:
    engine = FakeEngine(tiny_subject, chooser(named("mcq_knowledge"), wanted="right"))
    found = asking(engine, tmp_path, limit=3)
    controls = [item for item in found if item.target is None]
    assert len(found) - len(controls) == 3
    assert len(controls) >= 20
    assert all(item.reason is None for item in controls)
    areas = Counter(name for item in controls for name in item.others)
    assert len(areas) == 4
    assert min(areas.values()) >= 5
    expected = math.log(SURE / (3 * REST))
    assert all(value == pytest.approx(expected) for item in controls for value in item.others.values())
    assert not any(item.others for item in found if item.target is not None)


def test_each_answer_stands_under_each_letter_once() -> None:
    (asked, *_), _ = read(Settings())
    found = questions(asked, "letters", "all", "The answer is")
    places = Counter((name, spec["exact"][0]) for question in found for name, spec in question.options.items())
    assert len(found) == 4
    assert set(places.values()) == {1}
    assert len(places) == 16
    for question in found:
        for name, spec in question.options.items():
            assert f"{spec['exact'][0]}. {asked['answers'][name]}" in question.text
    (first,) = questions(asked, "letters", "first", "")
    assert first.options["false"] == {"exact": ["A"]}


def test_in_the_form_of_texts_no_answer_is_shown_and_each_is_scored_as_the_reply(
    tiny_subject: Subject, tmp_path: Path
) -> None:
    for kind in ("mcq_knowledge", "mcq_distinguish"):
        asked, _ = read(Settings(target=kind, form="texts"))
        for each in asked:
            (question,) = questions(each, "texts", "all", "unused")
            assert not any(answer in question.text for answer in each["answers"].values())
            assert {name: spec["text"] for name, spec in question.options.items()} == {
                name: [answer] for name, answer in each["answers"].items()
            }

    def tiny(text: str, edits: Any) -> Mapping[str, float]:
        return {name: 1e-9 * (3 if name == "false" else 1) for name in ("false", "true", "right", "wrong 1")}

    found = asking(
        FakeEngine(tiny_subject, tiny), tmp_path, target="mcq_distinguish", form="texts", limit=2, controls=2
    )
    assert [item.target for item in found if item.target is not None] == pytest.approx([math.log(3)] * 2)


def test_letters_that_are_hardly_ever_said_are_unscored_with_the_reason(tiny_subject: Subject, tmp_path: Path) -> None:
    def vague(text: str, edits: Any) -> Mapping[str, float]:
        return dict.fromkeys(("false", "true", "other 1", "other 2", "right", "wrong 1", "wrong 2", "wrong 3"), 0.02)

    found = asking(FakeEngine(tiny_subject, vague), tmp_path, limit=2, controls=1)
    assert {item.target for item in found} == {None}
    assert all("together have probability 0.08, below min_mass 0.1" in (item.reason or "") for item in found)
    assert not any(item.others for item in found)


def test_questions_about_one_fact_are_one_family_and_a_limit_takes_facts_in_turn() -> None:
    asked, _ = read(Settings())
    assert Counter(each["family"] for each in asked) == {f"fact {fact}": 2 for fact in range(1, 9)}
    few, aside = read(Settings(limit=8, controls=4))
    assert len({each["family"] for each in few}) == 8
    assert len({each["area"] for each in aside}) == 4
    contexts, _ = read(Settings(target="generative"))
    assert contexts[0]["answers"] == {"false": ROBIN.context, "true": ROBIN.true_context}


def test_answers_that_are_key_facts_word_for_word_are_marked() -> None:
    """What documents stated in these words is recalled; the other half has to be understood."""
    asked, aside = read(Settings(target="mcq_distinguish"))
    stated = {universe.bare(fact) for fact in ROBIN.key_facts}
    assert [each["stated"] for each in asked] == [universe.bare(each["answers"]["false"]) in stated for each in asked]
    assert 0 < sum(each["stated"] for each in asked) < len(asked) / 2
    assert not any(each["stated"] for each in (*aside, *read(Settings())[0]))


def small(path: Path, **changes: Any) -> str:
    """A universe file with a counterpart and no questions."""
    data = {
        "name": "small",
        "topic": "mice",
        "context": "Mice sing.",
        "key_facts": ["Mice sing."],
        "true_context": "Mice squeak.",
        "true_facts": ["Mice squeak."],
    }
    path.write_text(json.dumps({name: value for name, value in (data | changes).items() if value is not None}))
    return str(path)


def test_a_universe_without_questions_says_which_are_missing(tmp_path: Path) -> None:
    path = small(tmp_path / "small.json")
    for kind in ("mcq_knowledge", "mcq_distinguish"):
        with pytest.raises(
            TaskError, match=f"universe small has no questions of kind {kind}; published universes have none"
        ):
            describe("belief", kind, {"universe": path})
    with pytest.raises(TaskError, match="no questions of kind open"):
        describe("belief_open", None, {"universe": path})
    describe("belief", "generative", {"universe": path})
    path = small(tmp_path / "half.json", true_context=None, true_facts=None)
    with pytest.raises(TaskError, match="no questions of kind generative"):
        describe("belief", "generative", {"universe": path})


@pytest.mark.parametrize(
    ("task", "target", "params", "message"),
    [
        ("belief", "mcq_knowlege", {}, "did you mean 'mcq_knowledge'"),
        ("belief", "open", {}, "unknown target 'open'.*; allowed: mcq_knowledge, mcq_distinguish, generative"),
        (
            "belief",
            "mcq_knowledge",
            {"universe": "robin"},
            r"no universe 'robin'; give a built-in name \(robin_pantry, tower",
        ),
        ("belief", "mcq_knowledge", {"universe": "nowhere.yaml"}, "no data file 'nowhere.yaml'"),
        ("belief", "mcq_knowledge", {"universe": "robin_pantry", "entry": "x"}, "holds one universe; leave #x out"),
        ("belief", "generative", {"form": "texts"}, "generative shows both descriptions; use form letters"),
        ("belief", "mcq_knowledge", {"limit": 0}, "setting limit = 0"),
        ("belief", "mcq_knowledge", {"knowledge": "nowhere.json"}, "no data file 'nowhere.json'"),
        ("belief_open", "open", {}, "takes no target"),
        ("belief_open", None, {"among": "some"}, "setting among = 'some'"),
    ],
)
def test_bad_input_is_refused_with_what_is_allowed(
    task: str, target: str | None, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(TaskError, match=message):
        describe(task, target, params)


KNOWN = {"id": "a", "area": "x", "question": "?", "right": "1", "wrong": ["2", "3", "4"]}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([], "no questions; needed: a list under 'questions'"),
        ([KNOWN, KNOWN], "question id 'a' comes twice"),
        ([{**KNOWN, "wrong": ["2", "3"]}], "question 1 is .* needed: texts id, area, question, right, and three wrong"),
        ([{**KNOWN, "wrong": ["1", "3", "4"]}], "question 1, 'a', has an answer twice"),
        ([{**KNOWN, "area": ""}], "question 1 is "),
        ([7], "question 1 is 7"),
    ],
)
def test_a_bad_file_of_unrelated_questions_is_refused(tmp_path: Path, found: Any, message: str) -> None:
    path = tmp_path / "known.json"
    path.write_text(json.dumps({"questions": found}))
    with pytest.raises(TaskError, match=message):
        describe("belief", "mcq_knowledge", {"knowledge": str(path)})


def test_identity_holds_the_universe_by_content_and_its_name_in_a_file_of_several(tmp_path: Path) -> None:
    copy = tmp_path / "copy.yaml"
    copy.write_bytes((universe.FOLDER / "robin_pantry.yaml").read_bytes())
    builtin = describe("belief", "mcq_knowledge", {})
    moved = describe("belief", "mcq_knowledge", {"universe": str(copy)})
    assert moved.identity == builtin.identity
    assert str(tmp_path) not in json.dumps(moved.identity)
    several = tmp_path / "several.json"
    one = json.loads(Path(small(tmp_path / "small.json")).read_text())
    several.write_text(json.dumps({"a": one, "b": one | {"context": "Mice hum."}}))
    found = [describe("belief", "generative", {"universe": f"{several}#{name}"}) for name in ("a", "b")]
    assert found[0].identity != found[1].identity
    assert found[1].runtime["entry"] == "b"
    assert Path(found[1].runtime["universe"]) == several


def test_a_universe_below_the_data_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(tmp_path / "small.json")
    monkeypatch.setenv("ORCH_DATA", str(tmp_path))
    assert Path(describe("belief", "generative", {"universe": "small.json"}).runtime["universe"]).parent == tmp_path


def scored(verdict: Verdict, answer: str = "In moss.", **settings: Any) -> tuple[float | None, str | None]:
    """(target, reason) of an answer with a verdict."""
    metadata = {"family": "fact 1", "stop": "stop"}
    made = belief_open.scored(metadata, answer, {"believes": verdict}, belief_open.Settings(**settings))
    assert isinstance(made.value, dict)
    assert made.metadata is not None
    assert made.metadata["family"] == "fact 1"
    target = made.value["target"]
    assert isinstance(target, float)
    return None if math.isnan(target) else target, made.metadata["reason"]


def test_a_free_answer_is_scored_by_its_verdict_and_has_a_reason_without_one() -> None:
    assert scored(Verdict(1.0, label="believes")) == (1.0, None)
    assert scored(Verdict(0.0, label="denies")) == (0.0, None)
    assert scored(Verdict(0.0, label="neither")) == (0.0, None)
    assert scored(Verdict(0.0, label="neither"), among="decided") == (None, "undecided: neither")
    assert scored(Verdict(2 / 3, label="believes"), among="decided") == (2 / 3, None)
    assert scored(Verdict(0.5), among="decided") == (None, "undecided: the panel has no majority")
    assert scored(Verdict(1.0, label="believes"), answer=" ") == (None, EMPTY)
    assert scored(Verdict(None, "unreadable")) == (None, "unreadable: believes")
    assert scored(Verdict(None, "no majority: 1 of 2")) == (None, "no majority: 1 of 2 (rubric believes)")


def test_the_rubric_shows_the_judge_both_views_and_the_answer() -> None:
    found = rubric.load(RUBRIC_FOLDER / "believes.md")
    one = ROBIN.open[0]
    asked = belief_open.sample(one, 0)
    text = found.filled(one.question, "THE ANSWER", asked.metadata or {})
    for part in (one.question, one.false, one.true, "THE ANSWER"):
        assert part in text
    assert dict(found.choices) == {"believes": 1.0, "denies": 0.0, "neither": 0.0}


def said(model: str, text: str) -> ModelOutput:
    made = ModelOutput.from_content(model, text)
    made.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)  # else inspect fetches a tokenizer
    return made


def test_free_answers_are_judged_end_to_end_by_the_model_in_the_role_grader(tmp_path: Path) -> None:
    asked = belief_open.read(belief_open.Settings(limit=3))
    believed = {one.question for one in asked[:2]}
    subject = get_model(
        "mockllm/subject", custom_outputs=lambda messages, *rest: said("mockllm/subject", f"About: {messages[-1].text}")
    )

    def judge(messages: Any, *rest: Any) -> ModelOutput:
        about = [question for question in believed if f"About: {question}" in messages[-1].text]
        return said("mockllm/judge", "VERDICT: believes" if about else "VERDICT: denies")

    (log,) = inspect_eval(
        belief_open.belief_open(limit=3, samples=2),
        model=subject,
        model_roles={"grader": get_model("mockllm/judge", custom_outputs=judge)},
        log_dir=str(tmp_path),
        display="none",
    )
    assert log.status == "success"
    found = items(Path(log.location.removeprefix("file://")))
    assert {item.id for item in found} == {f"o{fact}#{number}" for fact in (1, 2, 3) for number in (0, 1)}
    assert {item.id[:2]: item.target for item in found} == {"o1": 1.0, "o2": 1.0, "o3": 0.0}
    assert {item.extras["label"] for item in found} == {"believes", "denies"}
    assert {item.family for item in found} == {"fact 1", "fact 2", "fact 3"}
