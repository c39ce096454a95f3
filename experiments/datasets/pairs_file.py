"""Contrast pairs written by hand or by another program, as JSON lines in the form `experiments.dataset.save` writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from experiments.dataset import DatasetError, Pair, Recipe, load

if TYPE_CHECKING:
    from experiments.dataset import Provides
    from experiments.engine import Engine


class PairsFile(Recipe):
    """Pairs read from a JSON-lines file; its content, not its path, is what identifies the data."""

    provides: ClassVar[Provides] = "pairs"

    path: Path
    """JSON-lines file; a line is `{"id": ..., "messages": [{"role": "user", "content": ...}], "positive":
    {"system": ..., "response": ...}, "negative": {...}}`; `messages` holds no persona and ends with a user message."""

    def check(self) -> None:
        """Raises DatasetError with file and line."""
        self.build(None, 0)

    def build(self, engine: Engine | None, seed: int) -> Sequence[Pair]:
        """Every line, in the file's order, whatever the seed. Raises DatasetError with file and line."""
        if not self.path.is_file():
            raise DatasetError(f"{self.path}: no such file; give the path of a JSON-lines file of pairs")
        return load(self.path, "pairs")
