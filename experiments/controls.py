"""Control data of what teachers answer. A teacher without the trait and shuffled answers come without asking.

Most "wins" of transfer through data do not survive these two: what a student takes on from any answers at all, and what
it takes on from which units were said, in whatever order (Cloud et al. 2025, https://arxiv.org/abs/2507.14805).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from experiments.canonical import canonical, identity_of
from experiments.dataset import Ingredient, Recipe, recipe
from experiments.problem import Problem, SpecError
from experiments.speech import Sampling, Teacher

Control = Literal["teacher", "shuffled", "shuffled_across", "divergence", "divergence_only"]
SHUFFLES: dict[Control, str] = {"shuffled": "within_responses", "shuffled_across": "across_responses"}
MASKS: dict[Control, str] = {"divergence": "others", "divergence_only": "divergent"}
"""What is learned of answers whose divergence tokens are known."""
NEUTRAL = "control"
"""Name of the teacher without the trait."""


@dataclass(frozen=True)
class Given:
    """Data of a spec with all their settings given."""

    name: str
    """The recipe's name."""
    recipe: Recipe
    seed: int | None = None
    """Seed of the data, whatever the trial's."""
    axes: Mapping[str, Any] = field(default_factory=dict)
    """The values of its grid axes, which tell it from others of the same label."""

    @cached_property
    def identity(self) -> dict[str, Any]:
        """recipe, version, settings, and the seed where there is one."""
        found = {"recipe": self.name, "version": self.recipe.version, "settings": identity_of(self.recipe)}
        return found if self.seed is None else {**found, "seed": self.seed}

    @cached_property
    def leaves(self) -> dict[tuple[str, ...], str]:
        """Every setting that holds no others, by its place."""
        return dict(_leaves(self.identity))

    @cached_property
    def intact(self) -> Given:
        """What it was before anything was destroyed on purpose."""
        of = getattr(self.recipe, "of", None)
        if not self.recipe.is_control or not isinstance(of, Ingredient):
            return self
        return Given(of.recipe, of.settings, self.seed).intact


def controls(given: Sequence[Given], wanted: Sequence[Control]) -> list[Given]:
    """The controls that the data of one role lack.

    Only recipes in which a teacher answers have any. A control teacher is the same subject, asked the same, with
    neither system prompt nor intervention; recipes that differ in the teacher alone share one. Only conversations can
    be shuffled, or masked. Raises SpecError for divergence tokens of a teacher that more than a system prompt made.
    """
    spoken = [
        (each, teacher) for each in given if isinstance(teacher := getattr(each.recipe, "teacher", None), Teacher)
    ]
    found: list[Given] = []
    if "teacher" in wanted:
        there = {canonical(_neutral(each, teacher).identity) for each, teacher in spoken if teacher.control}
        for each, teacher in spoken:
            made = _neutral(each, teacher)
            if (text := canonical(made.identity)) not in there:
                there.add(text)
                found.append(made)
    known = [canonical(each.identity) for each in given]
    meant = [
        (each, teacher) for each, teacher in spoken if not teacher.control and each.recipe.provides == "conversations"
    ]
    for place, wish in enumerate(wanted):
        more: list[Given] = []
        if wish in SHUFFLES:
            more = [_shuffled(each, SHUFFLES[wish]) for each, _ in meant]
        elif wish in MASKS:
            for _, teacher in meant:
                _need_prompted(teacher, wish, place)
            others = [teacher for _, teacher in spoken if _is_prompted(teacher)]
            more = [_masked(each, teacher, MASKS[wish], others) for each, teacher in meant]
        found += [each for each in more if canonical(each.identity) not in known]
    return found


def _neutral(given: Given, teacher: Teacher) -> Given:
    same = {"name": NEUTRAL, "control": True, "subject": teacher.subject, "model": teacher.model}
    made = given.recipe.model_copy(update={"teacher": Teacher.model_validate(same)})
    axes = {name: value for name, value in given.axes.items() if name != "teacher"}
    return Given(given.name, made, given.seed, axes)


def _shuffled(given: Given, how: str) -> Given:
    unit = getattr(given.recipe, "shuffled_by", "number")
    of = {"recipe": given.name, "settings": given.recipe}
    made = recipe("shuffled").model_validate({"of": of, "how": how, "unit": unit})
    return Given("shuffled", made, given.seed, given.axes)


def _masked(given: Given, teacher: Teacher, keep: str, others: Sequence[Teacher]) -> Given:
    """Told from the control teacher, and from those of other traits."""
    prompts: dict[str, str | None] = {NEUTRAL: None}
    for other in others:
        apart = other.control or other.trait != teacher.trait
        if apart and other.system != teacher.system and other.system not in prompts.values():
            name = other.name if other.name not in prompts else f"{other.name} #{len(prompts) + 1}"
            prompts[name] = other.system
    settings = {
        "of": {"recipe": given.name, "settings": given.recipe},
        "factual": teacher.system,
        "counterfactual": prompts,
        "keep": keep,
        "only": getattr(given.recipe, "sampling", Sampling()).only,
    }
    name = "masked_conversations"
    return Given(name, recipe(name).model_validate(settings), given.seed, given.axes)


def _is_prompted(teacher: Teacher) -> bool:
    """Whether it is the experiment's own subject, with a system prompt or nothing at all."""
    return teacher.intervention is None and teacher.subject is None and teacher.model is None


def _need_prompted(teacher: Teacher, wish: Control, place: int) -> None:
    """Raises SpecError for a teacher that no other system prompt would have made another one."""
    if _is_prompted(teacher) and teacher.system is not None:
        return
    made = "an intervention" if teacher.intervention else "a subject of its own" if teacher.subject else teacher.model
    raise SpecError(
        Problem(
            ("controls", place),
            f"{wish} tells teachers apart by their system prompts, and {teacher.name} has {made or 'none'}; leave "
            f"{wish} out, and mask the data of the other teachers by the recipe masked_conversations",
        )
    )


def is_control(given: Recipe) -> bool:
    """Whether data are there to be compared with: shuffled ones, or those of a control."""
    return given.is_control or is_reference(given)


def is_reference(given: Recipe) -> bool:
    """Whether others are compared with who learned these data: a control's, as they are."""
    return not given.is_control and given.lesson is not None and given.lesson.control


def reference_of(data: Sequence[Given], among: Sequence[Sequence[Given]]) -> int | None:
    """Which of `among`, the references' data, `data` are compared with: those of the same recipes that differ least.

    A shuffle is compared with what its unshuffled data are compared with. None for a reference, and where no reference
    is made by the same recipes.
    """
    if any(is_reference(each.recipe) for each in data):
        return None
    own = [each.intact.leaves for each in data]
    apart: dict[int, int] = {}
    for number, other in enumerate(among):
        theirs = [each.leaves for each in other]
        if [each[("recipe",)] for each in own] == [each[("recipe",)] for each in theirs]:
            apart[number] = sum(len(a.items() ^ b.items()) for a, b in zip(own, theirs, strict=True))
    return min(apart, key=lambda number: apart[number], default=None)


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _leaves(item, (*path, name))
    else:
        yield path, value if isinstance(value, str) else canonical(value)
