"""Control data that a spec gets without asking: a teacher without the trait, and the answers shuffled.

Most "wins" of transfer through data do not survive these two: what a student takes on from any answers at all, and what
it takes on from which units were said, in whatever order (Cloud et al. 2025, https://arxiv.org/abs/2507.14805).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from experiments.canonical import identity_of
from experiments.dataset import Recipe, recipe
from experiments.speech import Teacher

Control = Literal["teacher", "shuffled", "shuffled_across"]
SHUFFLES: dict[Control, str] = {"shuffled": "within_responses", "shuffled_across": "across_responses"}
NEUTRAL = "control"
"""Name of the teacher without the trait."""


def controls(name: str, recipes: Sequence[Recipe], wanted: Sequence[Control]) -> list[tuple[str, Recipe]]:
    """(name of the recipe, its settings) of the controls that `recipes`, all called `name`, lack.

    Only recipes in which a teacher answers have any. A control teacher is the same subject, asked the same, with
    neither system prompt nor intervention; recipes that differ in the teacher alone share one.
    """
    spoken = [(each, teacher) for each in recipes if isinstance(teacher := getattr(each, "teacher", None), Teacher)]
    found: list[tuple[str, Recipe]] = []
    if "teacher" in wanted and not any(teacher.control for _, teacher in spoken):
        for each, teacher in spoken:
            same = {"name": NEUTRAL, "control": True, "subject": teacher.subject, "model": teacher.model}
            made = each.model_copy(update={"teacher": Teacher.model_validate(same)})
            if all(identity_of(made) != identity_of(other) for _, other in found):
                found.append((name, made))
    for wish in wanted:
        if wish in SHUFFLES:
            found += [
                ("shuffled", _shuffled(name, each, SHUFFLES[wish]))
                for each, teacher in spoken
                if not teacher.control and each.provides == "conversations"
            ]
    return found


def _shuffled(name: str, of: Recipe, how: str) -> Recipe:
    unit = getattr(of, "shuffled_by", "number")
    return recipe("shuffled").model_validate({"of": {"recipe": name, "settings": of}, "how": how, "unit": unit})


def is_control(given: Recipe) -> bool:
    """Whether data are there to be compared with: shuffled ones, or those of a control."""
    return given.is_control or (given.lesson is not None and given.lesson.control)
