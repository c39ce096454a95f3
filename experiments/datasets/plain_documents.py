"""Ordinary text, to be mixed with documents that teach something: what a method learns from text as such."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from experiments.dataset import DatasetError, Document, Recipe, load

if TYPE_CHECKING:
    from experiments.dataset import Provides
    from experiments.engine import Engine

BUILTIN = Path(__file__).with_suffix(".txt")


class PlainDocuments(Recipe):
    """Passages of ordinary prose, drawn without replacement."""

    provides: ClassVar[Provides] = "documents"

    n: int | None = Field(default=None, ge=1)
    """How many; null takes all."""
    path: Path | None = None
    """Text file with passages between blank lines, or JSON lines `{"id": ..., "text": ...}` (.jsonl). Null takes the
    built-in passages, none of which is part of an eval."""

    def check(self) -> None:
        """Raises DatasetError for a file that cannot be read, or is too short."""
        self.build(None, 0)

    def build(self, engine: Engine | None, seed: int) -> Sequence[Document]:
        """`n` passages in an order drawn by the seed. Raises DatasetError."""
        found = self._read()
        n = len(found) if self.n is None else self.n
        if n > len(found):
            where, fix = (self.path, "add some") if self.path else ("the built-in set", "give a longer file as `path`")
            raise DatasetError(f"n={n}, but {where} has {len(found)} passages; set n to at most {len(found)}, or {fix}")
        return random.Random(seed).sample(found, n)

    def _read(self) -> list[Document]:
        path = self.path or BUILTIN
        if not path.is_file():
            raise DatasetError(f"{path}: no such file; give the path of a text file, or of JSON lines (.jsonl)")
        if path.suffix == ".jsonl":
            return load(path, "documents")
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DatasetError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
        passages = list(dict.fromkeys(" ".join(block.split()) for block in text.split("\n\n") if block.strip()))
        if not passages:
            raise DatasetError(f"{path}: no passages; write some, with a blank line between them")
        return [Document(id=f"{index:04d}", text=passage) for index, passage in enumerate(passages)]
