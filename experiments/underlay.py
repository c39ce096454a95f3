"""An engine whose every row holds further edits: for training on top of something that is taken away afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from experiments.engine import Engine, Row

if TYPE_CHECKING:
    from experiments.edit import Edit
    from experiments.pack import Pack
    from experiments.packing import Limits


class Underlaid(Engine):
    """Computes over the subject of `engine` with `under` behind every row's own edits."""

    def __init__(self, engine: Engine, under: Sequence[Edit]) -> None:
        super().__init__(engine.subject, engine.max_tokens)
        self.under = tuple(under)

    @contextmanager
    def _packs(
        self, rows: Sequence[Row], firsts: Sequence[int], limits: Limits | None = None
    ) -> Iterator[Iterator[tuple[list[int], Pack]]]:
        held = [Row(row.tokens, row.n_prompt, (*row.edits, *self.under)) for row in rows]
        with super()._packs(held, firsts, limits) as packs:
            yield packs
