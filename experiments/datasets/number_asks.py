"""Prompts that ask for more numbers, built from components: examples, instruction, format, ending.

The form is that of subliminal learning (Cloud et al. 2025, https://arxiv.org/abs/2507.14805; `nums_dataset.py` of
github.com/MinhxLe/subliminal-learning): four parts with one space between them. With the published templates and seed
42 the prompts are the published ones byte for byte, since the draws follow the published order. The built-in templates
are our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from experiments.dataset import Ask, Message, Recipe
from experiments.datasets import _templates

if TYPE_CHECKING:
    from numpy.random import Generator

    from experiments.dataset import Provides
    from experiments.engine import Engine

TEMPLATES = Path(__file__).with_name("number_templates.json")
COMPONENTS = {
    "examples": "_example_numbers_templates",
    "count_qualifier": "_count_qualifiers",
    "digit_descriptor": "_digit_descriptors",
    "instruction": "_generate_numbers_instruction_templates",
    "format": "_format_suffixes",
    "ending": "_suffixes",
}
"""Component -> its key in a template file, in the order in which they are drawn."""
PLACES = {
    "examples": ("examples",),
    "digit_descriptor": ("max_digits",),
    "instruction": ("count_qualifier", "answer_count", "digit_descriptor"),
}
"""Component -> what its templates are filled with; the others are text as it is."""


class NumberAsks(Recipe):
    """Prompts with a few random numbers, to be continued by more of them."""

    provides: ClassVar[Provides] = "asks"
    grows = True

    n: int = Field(default=1000, ge=1)
    """How many prompts; the first ones stay the same when there are to be more."""
    min_examples: int = Field(default=3, ge=1)
    """Fewest numbers shown."""
    max_examples: int = Field(default=8, ge=1)
    """Most numbers shown; published as 9, left out by the range it stands in."""
    min_value: int = Field(default=100, ge=0)
    """Smallest number shown."""
    max_value: int = Field(default=999, ge=0)
    """Largest number shown; published as 1000, left out by the range it stands in."""
    answer_count: int = Field(default=10, ge=1)
    """Most numbers asked for."""
    max_digits: int = Field(default=3, ge=1)
    """Most digits a number is asked to have."""
    templates: Path | None = None
    """JSON file in the published form: a list of texts each under `_example_numbers_templates`, `_count_qualifiers`,
    `_digit_descriptors`, `_generate_numbers_instruction_templates`, `_format_suffixes` and `_suffixes`; null takes the
    built-in one."""
    seed: int | None = Field(default=None, ge=0)
    """Seed of the draws, the published data have 42; null takes the trial's."""

    @model_validator(mode="after")
    def _ranges(self) -> NumberAsks:
        for what in ("examples", "value"):
            low, high = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if low > high:
                raise ValueError(f"min_{what} is {low}, above max_{what}, {high}; swap them, or make the range wider")
        return self

    def check(self) -> None:
        """Raises DatasetError for a file of templates that cannot be read or filled."""
        templates_of(self.templates or TEMPLATES)

    def build(self, engine: Engine | None, seed: int) -> Sequence[Ask]:
        """`n` asks with ids 00000, 00001, ...; raises DatasetError for a file of templates that cannot be used.

        `parts` has the index in the file of the template drawn for every component, and how many numbers were shown.
        """
        from numpy.random import default_rng

        templates = templates_of(self.templates or TEMPLATES)
        rng = default_rng(seed if self.seed is None else self.seed)
        return [self._ask(f"{index:05d}", rng, templates) for index in range(self.n)]

    def _ask(self, name: str, rng: Generator, templates: dict[str, list[str]]) -> Ask:
        count = int(rng.integers(self.min_examples, self.max_examples + 1))
        shown = [str(rng.integers(self.min_value, self.max_value + 1)) for _ in range(count)]
        drawn = {component: int(rng.integers(len(texts))) for component, texts in templates.items()}
        text = {component: templates[component][index] for component, index in drawn.items()}
        asked = [
            text["examples"].format(examples=", ".join(shown)),
            text["instruction"].format(
                count_qualifier=text["count_qualifier"],
                answer_count=self.answer_count,
                digit_descriptor=text["digit_descriptor"].format(max_digits=self.max_digits),
            ),
            text["format"],
            text["ending"],
        ]
        parts = {component: f"{index:02d}" for component, index in drawn.items()} | {"n_examples": str(count)}
        return Ask(id=name, messages=(Message(role="user", content=" ".join(asked)),), parts=parts)


def templates_of(path: Path) -> dict[str, list[str]]:
    """Component -> its templates. Raises DatasetError naming the key and the template that cannot be used."""
    found = _templates.read(path, {key: PLACES.get(component) for component, key in COMPONENTS.items()})
    return {component: found[key] for component, key in COMPONENTS.items()}
