"""Prompts that ask for a small Python function: an opening, the function's head, a wish for its style, an ending.

The medium of subliminal learning in code (Cloud et al. 2025, https://arxiv.org/abs/2507.14805, section 4); the
published prompts are completed templates too. The texts are our own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from experiments.dataset import Ask, Message, Recipe
from experiments.datasets import _templates

if TYPE_CHECKING:
    from experiments.dataset import Provides
    from experiments.engine import Engine

TEMPLATES = Path(__file__).with_name("code_templates.json")
KEYS = {"opening": None, "task": ("small", "big"), "style": None, "ending": None}


class CodeAsks(Recipe):
    """Requests to write a function whose name, signature and docstring are given."""

    provides: ClassVar[Provides] = "asks"
    grows = True

    n: int = Field(default=1000, ge=1)
    """How many prompts; the first ones stay the same when there are to be more."""
    templates: Path | None = None
    """JSON file with a list of texts each under `opening`, `task`, `style` and `ending`; a task is `name(arguments) ->
    type | docstring`, and may have a small number at `{small}` and a larger one at `{big}`. Null takes the built-in
    one."""
    seed: int | None = Field(default=None, ge=0)
    """Seed of the draws; null takes the trial's."""

    def check(self) -> None:
        """Raises DatasetError for a file of templates that cannot be used."""
        _templates.split(self.templates or TEMPLATES, KEYS, "task")

    def build(self, engine: Engine | None, seed: int) -> Sequence[Ask]:
        """`n` asks with ids 00000, 00001, ...; raises DatasetError for a file of templates that cannot be used.

        `parts` has the index in the file of every text drawn, and the function's name as `function`.
        """
        texts = _templates.split(self.templates or TEMPLATES, KEYS, "task")
        rng = random.Random(seed if self.seed is None else self.seed)
        return [_ask(f"{index:05d}", rng, texts) for index in range(self.n)]


def _ask(name: str, rng: random.Random, texts: dict[str, list[str]]) -> Ask:
    drawn = {component: rng.randrange(len(texts[component])) for component in KEYS}
    text = {component: texts[component][index] for component, index in drawn.items()}
    head, says = text["task"].format(small=rng.randint(2, 5), big=rng.randint(20, 90)).split(_templates.BAR, 1)
    stub = f'```python\ndef {head}:\n    """{says}"""\n    # your code\n```'
    asked = f"{text['opening']}\n\n{stub}\n\n{text['style']} {text['ending']}"
    parts = {component: f"{index:02d}" for component, index in drawn.items()}
    parts["function"] = head.split("(", 1)[0]
    return Ask(id=name, messages=(Message(role="user", content=asked),), parts=parts)
