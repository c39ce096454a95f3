"""Controls that a spec gets without asking, and who is compared with which of them."""

from __future__ import annotations

from typing import Any

import pytest

from experiments import spec
from experiments.problem import SpecError
from experiments.spec import Experiment, Trial

OWL = {"name": "owl", "trait": "owl", "system": "You love owls."}
CAT = {"name": "cat", "trait": "cat", "system": "You love cats."}
PLAIN = {"name": "plain", "control": True}
ELSEWHERE = {"subject": {"model": "other"}}


def lists(*teachers: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {"recipe": "number_lists", "n": 5, "teacher": list(teachers), **settings}


def experiment(data: Any, role: str = "conversations", **changes: Any) -> Experiment:
    whole: dict[str, Any] = {
        "name": "t",
        "subject": "m",
        "data": {role: data},
        "interventions": [{"method": "lora"}],
        "doses": [1],
        "evals": [{"task": "animal_preference", "target": "owl"}],
        "baselines": [],
    }
    return spec.from_data(whole | changes)


def compared(data: Any, **changes: Any) -> dict[str, str | None]:
    """Label of every student's data -> that of the data of those it is compared with."""
    trials = experiment(data, **changes).trials()
    names = {one.group: one.label.removeprefix(f"{one.student} ") for one in trials}
    return {names[one.group]: one.control and names[one.control] for one in trials}


def by_name(data: Any, **changes: Any) -> dict[str, Trial]:
    trials = experiment(data, **changes).trials()
    return {one.label.removeprefix(f"{one.student} "): one for one in trials}


def test_a_spec_gets_a_control_teacher_and_shuffled_answers_without_asking() -> None:
    assert compared(lists(OWL)) == {"owl": "control", "control": None, "owl within_responses": "control"}


def test_controls_can_be_turned_off_and_others_asked_for() -> None:
    assert compared(lists(OWL), controls=[]) == {"owl": None}
    assert compared(lists(OWL), controls=["shuffled"]) == {"owl": None, "owl within_responses": None}
    assert list(compared(lists(OWL), controls=["teacher", "shuffled_across"])) == [
        "owl",
        "control",
        "owl across_responses",
    ]


def test_the_control_teacher_is_the_same_subject_asked_the_same_with_nothing_done_to_it() -> None:
    rules = {"most": 3, "banned": [13]}
    data = lists({**OWL, **ELSEWHERE}, draw=[40], rules=rules, seed=7, sampling={"max_new_tokens": 9})
    found = by_name(data)
    (owl,), (control,) = found["owl"].data, found["control"].data
    teacher = getattr(control.recipe, "teacher")  # noqa: B009
    assert (teacher.control, teacher.system, teacher.intervention, teacher.trait) == (True, None, None, None)
    assert teacher.subject.model == "other"
    assert (control.seed, owl.seed) == (7, 7)
    assert control.recipe.model_dump(exclude={"teacher"}) == owl.recipe.model_dump(exclude={"teacher"})
    (source,) = control.recipe.sources().values()  # type: ignore[attr-defined]
    assert source.asks == next(iter(owl.recipe.sources().values())).asks  # type: ignore[attr-defined]


def test_teachers_of_the_same_asks_share_a_control_teacher_however_they_are_written() -> None:
    wanted = {"owl": "control", "cat": "control", "control": None}
    wanted |= {"owl within_responses": "control", "cat within_responses": "control"}
    assert compared(lists(OWL, CAT)) == wanted
    assert compared([lists(OWL), lists(CAT)]) == wanted


def test_a_control_teacher_of_the_spec_is_the_only_one_wherever_it_stands() -> None:
    wanted = {"owl": "plain", "plain": None, "owl within_responses": "plain"}
    assert compared(lists(OWL, PLAIN)) == wanted
    assert compared([lists(OWL), lists(PLAIN)]) == wanted


def test_what_is_shuffled_is_what_a_teacher_with_a_trait_said_and_never_the_controls_answers() -> None:
    names = compared(lists(OWL, PLAIN), controls=["shuffled", "shuffled_across"])
    assert list(names) == ["owl", "plain", "owl within_responses", "owl across_responses"]


def test_data_of_every_size_are_compared_with_the_controls_of_that_size() -> None:
    assert compared(lists(OWL, n=[5, 9])) == {
        "owl n=5": "control n=5",
        "owl n=9": "control n=9",
        "control n=5": None,
        "control n=9": None,
        "owl within_responses n=5": "control n=5",
        "owl within_responses n=9": "control n=9",
    }
    assert compared(lists(OWL, PLAIN, n=[5, 9]), controls=[]) == {
        "owl n=5": "plain n=5",
        "owl n=9": "plain n=9",
        "plain n=5": None,
        "plain n=9": None,
    }


def test_another_models_data_are_compared_with_what_that_model_says_without_the_trait() -> None:
    found = by_name(lists(OWL, {**CAT, **ELSEWHERE}), controls=["teacher"])
    own = {one.group: getattr(one.data[0].recipe, "teacher").subject for one in found.values()}  # noqa: B009
    assert len(found) == 4
    assert own[found["owl"].control or ""] is None
    assert own[found["cat"].control or ""].model == "other"


def test_every_medium_has_a_control_of_its_own_and_is_shuffled_by_its_own_units() -> None:
    media = ["number_lists", "code_answers", "reasoning_answers"]
    found = by_name([{"recipe": name, "n": 5, "teacher": OWL} for name in media])
    units = {"number_lists": "number", "code_answers": "line", "reasoning_answers": "word"}
    for name in media:
        owl, control, shuffled = (found[f"{what} recipe={name}"] for what in ("owl", "control", "owl within_responses"))
        assert (owl.control, shuffled.control, control.control) == (control.group, control.group, None)
        assert control.data[0].identity["recipe"] == name
        assert shuffled.data[0].identity["settings"]["unit"] == units[name]
    assert len(found) == 9


def test_a_shuffle_that_the_spec_asks_for_itself_is_not_made_twice() -> None:
    written = {"recipe": "shuffled", "of": {"recipe": "number_lists", "n": 5, "teacher": OWL}}
    assert list(compared([lists(OWL), written])) == ["owl", "owl within_responses", "control"]


def test_options_without_words_have_a_control_teacher_and_no_shuffle() -> None:
    data = {"recipe": "distilled", "asks": {"recipe": "noise_asks"}, "n": 5, "options": [["a", "b"]], "teacher": OWL}
    changes = {"role": "choices", "interventions": [{"method": "lora", "loss": "distil"}]}
    assert compared(data, **changes) == {"owl": "control", "control": None}


def test_data_in_which_nobody_speaks_have_no_controls_added() -> None:
    pairs = {"recipe": "persona_pairs", "positive": "A.", "negative": "B."}
    assert len(experiment(pairs, role="pairs").trials()) == 1
    assert list(compared({"recipe": "narrow_advice", "advice": ["wrong"]})) == ["wrong advice"]


def test_right_advice_is_what_wrong_advice_of_its_size_is_compared_with() -> None:
    assert compared({"recipe": "narrow_advice", "advice": ["wrong", "right"], "n": [20, 40]}) == {
        "wrong advice n=20": "right advice n=20",
        "wrong advice n=40": "right advice n=40",
        "right advice n=20": None,
        "right advice n=40": None,
    }


def test_nobody_is_compared_with_the_control_of_another_recipe() -> None:
    advice = {"recipe": "narrow_advice", "advice": ["wrong"]}
    assert compared([lists(OWL), advice], controls=["teacher"]) == {
        "owl": "control",
        "wrong advice": None,
        "control": None,
    }


def test_everyone_of_a_setting_is_compared_with_that_setting_alone() -> None:
    trials = experiment(lists(OWL), interventions=[{"method": "lora", "rank": [2, 4]}], seeds=[0, 1]).trials()
    groups = {one.group: one for one in trials}
    assert len(trials) == 3 * 2 * 2
    for one in trials:
        if one.control is not None:
            assert groups[one.control].student == one.student
            assert groups[one.control].lesson is not None


def test_controls_rank_as_baselines_and_are_what_detectors_look_into_beside_the_control() -> None:
    made = experiment(lists(OWL, CAT), detect=[{"detector": "mean_logit"}])
    assert {one.label.split(" ", 2)[-1]: one.baseline for one in made.trials()} == {
        "owl": False,
        "cat": False,
        "control": True,
        "owl within_responses": True,
        "cat within_responses": True,
    }
    assert [(data.suffix, control.suffix) for data, control in made.detected()] == [
        ("owl", "control"),
        ("cat", "control"),
        ("owl within_responses", "control"),
        ("cat within_responses", "control"),
    ]


def test_the_same_data_twice_are_refused_and_an_unknown_control_is_named() -> None:
    with pytest.raises(SpecError, match="the same data of number_lists twice; leave one out"):
        experiment([lists(OWL), lists(OWL)])
    with pytest.raises(SpecError, match=r"controls.0: .*'shuffled_across', 'divergence' or 'divergence_only'"):
        experiment(lists(OWL), controls=["shuffle"])
