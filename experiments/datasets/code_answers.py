"""Python functions that a teacher wrote, filtered until they are code that does not name the trait."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from experiments.dataset import Ingredient
from experiments.datasets._answers import Answers
from experiments.datasets._words import Phrase, has_words
from experiments.plugin import Frozen
from experiments.speech import Sampling

if TYPE_CHECKING:
    from experiments.dataset import Said

FENCED = re.compile(r"```[A-Za-z0-9]*[ \t]*\n(.*?)```", re.DOTALL)
NOT_PYTHON, PROSE = "not Python", "words around the code"
NO_FUNCTION, BANNED, TOO_LONG = "function missing", "has banned words", "too long"


class Rules(Frozen):
    """Which code is accepted."""

    prose: Literal["reject", "keep"] = "reject"
    """What becomes of an answer with words around a block of code; kept, the student learns the words too."""
    banned: tuple[Phrase, ...] = ()
    """Words that no answer may hold, also within names such as `red_owl`; a plural is a word of its own."""
    most_characters: int = Field(default=1500, ge=1)
    """Longest answer, in characters."""


class CodeAnswers(Answers):
    """A teacher's Python functions, as conversations for a student."""

    asked_by: ClassVar[str] = "code_asks"
    unreported: ClassVar[tuple[str, ...]] = ("function",)
    shuffled_by = "line"

    asks: Ingredient = Ingredient.model_validate({"recipe": "code_asks"})
    """What it is asked: settings of `code_asks`, or another recipe with its settings."""
    sampling: Sampling = Sampling(max_new_tokens=256)
    """How answers are drawn."""
    rules: Rules = Rules()
    """Which answers are accepted."""

    def rule(self) -> Callable[[Said], tuple[str, ...]]:
        """The code parses and defines the function asked for, holds no banned word, and is not too long."""
        return lambda said: reject_reasons(said.text, self.rules, said.parts.get("function"))


def reject_reasons(text: str, rules: Rules, function: str | None = None) -> tuple[str, ...]:
    """Every reason to reject an answer; () for one that is kept. `function` None: any function will do."""
    blocks, around = FENCED.findall(text), FENCED.sub("", text).strip()
    functions = functions_of("\n".join(blocks) if blocks else text)
    missing = functions is not None and (not functions if function is None else function not in functions)
    found = {
        NOT_PYTHON: functions is None,
        NO_FUNCTION: missing,
        PROSE: bool(blocks) and bool(around) and rules.prose == "reject",
        BANNED: has_words(text, rules.banned),
        TOO_LONG: len(text.strip()) > rules.most_characters,
    }
    return tuple(reason for reason, holds in found.items() if holds)


def functions_of(code: str) -> set[str] | None:
    """Names of the functions that code defines at its top level; None where it is no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the answer's own escapes and comparisons
            tree = ast.parse(code.strip())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None  # ValueError: a NUL; the others: nested deeper than the parser goes
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
