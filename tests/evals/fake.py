"""An engine whose answers are a rule over the rendered text: no forward pass, so that policies can be written down
exactly."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from experiments.subject import Subject

Policy = Callable[[str, tuple[Any, ...]], Mapping[str, float]]  # (text, edits) -> probabilities of options


class FakeEngine:
    """The verbs of `experiments.engine.Engine` that the evals use. `calls` holds the number of rows of every call."""

    def __init__(self, subject: Subject, policy: Policy) -> None:
        self.subject = subject
        self.policy = policy
        self.calls: list[int] = []
        self.fired: Counter[Any] = Counter()
        self.threads: set[int] = set()
        self.seeds: list[int] = []

    def _text(self, row: Any) -> str:
        return self.subject.tokenizer.decode(list(row.tokens))

    def _enter(self, rows: Sequence[Any]) -> None:
        self.calls.append(len(rows))
        self.threads.add(threading.get_ident())

    def option_logprobs(
        self, rows: Sequence[Any], options: Sequence[Mapping[str, Any]], top: int = 0, on_result: Any = None
    ) -> list[Any]:
        """Log-probabilities by the policy; a sequence's share of its option does not matter."""
        self._enter(rows)
        results = []
        for index, (row, wanted) in enumerate(zip(rows, options, strict=True)):
            assert all(wanted.values()), "an option without token sequences"
            given = self.policy(self._text(row), row.edits)
            logprobs = {name: math.log(given[name]) if given[name] > 0 else -math.inf for name in wanted}
            results.append(SimpleNamespace(logprobs=logprobs, top=[(5, -0.5)][:top]))
            if on_result is not None:
                on_result(index, results[-1])
        return results

    def token_logprobs(self, rows: Sequence[Any], on_result: Any = None) -> list[torch.Tensor]:
        """Every token has the probability the policy gives to 'token'."""
        self._enter(rows)
        return [
            torch.full((len(row.tokens) - row.n_prompt,), math.log(self.policy(self._text(row), row.edits)["token"]))
            for row in rows
        ]

    def generate(
        self,
        rows: Sequence[Any],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seeds: Sequence[int] | None = None,
        stop: Sequence[str] = (),
        on_result: Any = None,
    ) -> list[Any]:
        """The words the policy gives under 'say' (a text)."""
        self._enter(rows)
        self.seeds.extend(seeds or [])
        texts = [str(self.policy(self._text(row), row.edits)["say"]) for row in rows]
        tokens = [tuple(self.subject.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        return [SimpleNamespace(tokens=t, logprobs=[-1.0] * len(t), stopped=True) for t in tokens]
