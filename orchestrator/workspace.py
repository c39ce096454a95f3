"""What one process keeps between batches: the engine of the subject it met last."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from experiments.heap import give_back

if TYPE_CHECKING:
    from experiments.engine import Engine
    from experiments.spec import SubjectSpec


def _nobody(done: int, total: int) -> None:
    """Nobody wants to know."""


class Workspace:
    """One resident engine; another subject puts it out. `threads` is what torch may use, None leaves its own choice.

    `tell` is called with the items answered so far in the work at hand, and with how many there are; from any thread.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads
        self.tell: Callable[[int, int], None] = _nobody
        self._held: str | None = None
        self._engine: Engine | None = None

    def engine(self, subject: SubjectSpec) -> Engine:
        """The engine around `subject`, loaded when it is not the one already here. Raises SubjectError."""
        name = json.dumps(subject.model_dump(mode="json"), sort_keys=True)
        if self._engine is None or self._held != name:
            self.drop()
            import torch

            if self.threads:
                torch.set_num_threads(self.threads)
            from experiments.engine import Engine
            from experiments.subject import load

            self._engine, self._held = Engine(load(subject)), name
        return self._engine

    def drop(self) -> None:
        """Forget the engine, and give its memory back."""
        if self._engine is None:
            return
        self._engine = self._held = None
        gc.collect()
        give_back()
        import sys

        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()
