"""Several interventions at once, from the spec to the edits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from experiments.canonical import plain_of
from experiments.dataset import recipe
from experiments.edit import Add, Prompt
from experiments.intervention import method
from experiments.outline import Outline
from experiments.spec import Experiment, SpecError, from_data

if TYPE_CHECKING:
    from experiments.engine import Engine
    from experiments.intervention import Intervention

PAIRS = list(recipe("persona_pairs")(positive="A.", negative="B.", n=4, responses="shared").build(None, 0))
VECTOR, PROMPT = {"method": "mean_diff", "layer": 1}, {"method": "prompt", "dose": 1}


@pytest.fixture(scope="module")
def engine(tiny_subject: Any) -> Engine:
    from experiments.engine import Engine

    return Engine(tiny_subject)


def experiment(*interventions: Any) -> Experiment:
    return from_data(
        {
            "name": "x",
            "subject": "smollm2-135m-instruct",
            "data": {"pairs": {"recipe": "persona_pairs", "positive": "A.", "negative": "B.", "n": 4}},
            "interventions": list(interventions),
            "doses": [-1, 1],
            "evals": ["animal_preference"],
            "baselines": [],
        }
    )


def composed(*parts: Any) -> Intervention:
    return method("composed")(parts=list(parts))


def test_a_list_is_one_trial_whose_parts_have_grids_of_their_own() -> None:
    trials = experiment([VECTOR | {"layer": [10, 14]}, PROMPT | {"dose": [1, -1]}]).trials()
    assert [trial.label for trial in trials] == [
        "mean_diff L10 + prompt (+1)",
        "mean_diff L10 + prompt (-1)",
        "mean_diff L14 + prompt (+1)",
        "mean_diff L14 + prompt (-1)",
    ]
    assert {variant.recipe.provides for trial in trials for variant in trial.data} == {"pairs"}
    assert len({str(trial.identity) for trial in trials}) == 4
    assert trials[0].identity["settings"]["parts"][0]["method"] == "mean_diff"


def test_the_settings_that_a_node_keeps_build_the_same_intervention_again() -> None:
    (trial,) = experiment([VECTOR, PROMPT]).trials()
    again = method("composed").model_validate(plain_of(trial.intervention))
    assert again == trial.intervention
    assert again.label() == "mean_diff L1 + prompt (+1)"


def test_parts_share_the_trials_dose_unless_they_have_their_own(engine: Engine) -> None:
    made = composed(VECTOR, {"method": "pca", "layer": 2, "dose": 0.5}, PROMPT)
    state = made.fit(engine, PAIRS, 0)
    vector = method("mean_diff")(layer=1).fit(engine, PAIRS, 0).tensors["resid@1"]
    fixed = method("pca")(layer=2).fit(engine, PAIRS, 0).tensors["resid@2"]
    for dose in (2.0, -1.0):
        first, second, prompt = made.edits(state, dose)
        assert isinstance(first, Add)
        assert isinstance(second, Add)
        torch.testing.assert_close(first.vector, dose * vector)
        torch.testing.assert_close(second.vector, 0.5 * fixed)
        assert isinstance(prompt, Prompt)
        assert prompt.system == "A."
    assert made.edits(state, 0) == []


def test_two_system_prompts_are_refused(engine: Engine) -> None:
    made = composed({"method": "prompt"}, PROMPT)
    with pytest.raises(ValueError, match="two parts set a system prompt"):
        made.edits(made.fit(engine, PAIRS, 0), 1.0)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([PROMPT, VECTOR | {"dose": 2}], "every part has a dose of its own"),
        ([VECTOR], "at least 2"),
        ([VECTOR, PROMPT | {"dose": 0}], "a part with dose 0 does nothing"),
        ([VECTOR, {"method": "mean_dif"}], "did you mean 'mean_diff'"),
        ([VECTOR, {"method": "pca", "layr": 3}], "did you mean 'layer'"),
        ([VECTOR, {"layer": 3}], "method is required and missing"),
    ],
)
def test_what_cannot_be_composed_is_told(parts: Any, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        experiment(parts)


def test_a_layer_that_a_part_cannot_have_is_told_by_its_place() -> None:
    made = composed(VECTOR, {"method": "pca", "layer": 40})
    assert made.misplaced(Outline(30, {"resid"})) == {"1.layer": "40 is out of range; the subject has layers 0 to 29"}
