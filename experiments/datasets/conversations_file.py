"""Conversations written by hand or by another program, as JSON lines in the form `experiments.dataset.save` writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from experiments.dataset import Conversation, DatasetError, Recipe, load

if TYPE_CHECKING:
    from experiments.dataset import Provides
    from experiments.engine import Engine


class ConversationsFile(Recipe):
    """Conversations read from a JSON-lines file; its content, not its path, is what identifies the data."""

    provides: ClassVar[Provides] = "conversations"

    path: Path
    """JSON-lines file; a line is `{"id": ..., "messages": [{"role": ..., "content": ...}, ...]}`; the last message is
    the assistant's, and is what is learned, but for the characters in `"masked": [[first, behind the last], ...]`."""

    def check(self) -> None:
        """Raises DatasetError with file and line."""
        self.build(None, 0)

    def contexts(self) -> frozenset[str | None]:
        """The system messages of the file; None for conversations that have none."""
        heads = [example.messages[0] for example in self.build(None, 0)]
        return frozenset(head.content if head.role == "system" else None for head in heads)

    def build(self, engine: Engine | None, seed: int) -> Sequence[Conversation]:
        """Every line, in the file's order, whatever the seed. Raises DatasetError with file and line."""
        if not self.path.is_file():
            raise DatasetError(f"{self.path}: no such file; give the path of a JSON-lines file of conversations")
        return load(self.path, "conversations")
