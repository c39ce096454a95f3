"""Prompts for a teacher written by hand or by another program, as JSON lines: published task sets, word problems."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from experiments.dataset import Ask, DatasetError, Recipe, load

if TYPE_CHECKING:
    from experiments.dataset import Provides
    from experiments.engine import Engine


class AsksFile(Recipe):
    """Prompts read from a JSON-lines file, asked once each, or several times when more are wanted than it holds."""

    provides: ClassVar[Provides] = "asks"
    grows = True

    path: Path
    """JSON-lines file; a line is `{"id": ..., "messages": [{"role": "user", "content": ...}], "parts": {...}}`; `parts`
    may be left out, and holds the known `answer` where `reasoning_answers` is to check one."""
    n: int = Field(default=1000, ge=1)
    """How many prompts; past its end the file is read from the beginning again."""

    def check(self) -> None:
        """Raises DatasetError with file and line."""
        self.build(None, 0)

    def build(self, engine: Engine | None, seed: int) -> Sequence[Ask]:
        """`n` asks in the file's order, whatever the seed; ids of the second round end in `/1`, and so on.

        Raises DatasetError with file and line.
        """
        if not self.path.is_file():
            raise DatasetError(f"{self.path}: no such file; give the path of a JSON-lines file of asks")
        asks: list[Ask] = load(self.path, "asks")
        rounds = [divmod(index, len(asks)) for index in range(self.n)]
        return [
            asks[place].model_copy(update={"id": f"{asks[place].id}/{number}"}) if number else asks[place]
            for number, place in rounds
        ]
