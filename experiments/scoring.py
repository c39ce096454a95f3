"""From last hidden states to log-probabilities: single tokens, and options that are sets of token sequences."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from experiments.acting import EngineError
from experiments.packing import Row

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.subject import Subject

LOGITS = 1 << 25
"""Logits held at once: 128 MB of float32."""
Options = Mapping[str, Collection[tuple[int, ...]]]


@dataclass(frozen=True, eq=False)
class Scored:
    """Last hidden states of a chunk: `states` [k, d], of which row `rows[i]` wants `states[where[i]]`."""

    rows: list[int]
    states: Tensor
    where: list[Tensor]


@dataclass(frozen=True)
class OptionScores:
    """log p of each option, and the likeliest next tokens with theirs."""

    logprobs: dict[str, float]
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Asked:
    """The rows to compute: the first `n` as they were given, then one for each sequence of several tokens.

    `owner[i]` and `sequence[i]` say what row n + i is for: it holds its owner's tokens and all but the last token of
    the sequence. `spans` are the positions whose next token is asked for.
    """

    n: int
    rows: list[Row]
    spans: list[tuple[int, int]]
    owner: list[int]
    sequence: list[tuple[int, ...]]
    options: Sequence[Options]


def ask(rows: Sequence[Row], options: Sequence[Options]) -> Asked:
    """Work out which rows must be computed. Raises EngineError for an empty token sequence."""
    asked = Asked(len(rows), list(rows), [(len(row.tokens) - 1, len(row.tokens)) for row in rows], [], [], options)
    for index, (row, choice) in enumerate(zip(rows, options, strict=True)):
        sequences = {tuple(sequence) for each in choice.values() for sequence in each}
        if () in sequences:
            raise EngineError(f"row {index}: an option holds an empty token sequence; give at least one token")
        for sequence in sorted(each for each in sequences if len(each) > 1):
            tokens = row.tokens + sequence[:-1]
            asked.rows.append(Row(tokens, row.n_prompt, row.edits))
            asked.spans.append((len(row.tokens), len(tokens)))
            asked.owner.append(index)
            asked.sequence.append(sequence)
    return asked


def pick(
    subject: Subject, states: Tensor, where: Tensor, tokens: Tensor, top: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """log p of tokens[i] by states[where[i]], [k] float32; and values and ids [n, top] of each state's likeliest.

    `states` is [n, d]; no more than `LOGITS` logits are held at once.
    """
    step = max(1, LOGITS // subject.model.config.vocab_size)
    found = torch.empty(len(where), device=states.device)
    values, ids = [torch.empty(0, top)], [torch.empty(0, top, dtype=torch.int64)]
    for at in range(0, len(states), step):
        logits = subject.head(states[at : at + step])
        total = logits.logsumexp(-1)
        mine = ((where >= at) & (where < at + step)).nonzero()[:, 0]
        found[mine] = logits[where[mine] - at, tokens[mine]] - total[where[mine] - at]
        best = logits.topk(top, -1)
        values.append((best.values - total[:, None]).cpu())
        ids.append(best.indices.cpu())
    return found, torch.cat(values), torch.cat(ids)


def response_logprobs(subject: Subject, rows: Sequence[Row], chunk: Scored) -> list[Tensor]:
    """log p of the tokens behind the prompt of each row of `chunk`, whose states are at their predecessors; on the
    CPU."""
    targets = [rows[index].tokens[rows[index].n_prompt :] for index in chunk.rows]
    answers = torch.tensor([token for each in targets for token in each], device=chunk.states.device)
    values = pick(subject, chunk.states, torch.cat(chunk.where), answers)[0].cpu()
    return [value.clone() for value in values.split([len(each) for each in targets])]


class Tally:
    """Puts an option's value together from the rows it needs, which may come in different chunks."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.parts: dict[int, dict[tuple[int, ...], float]] = defaultdict(dict)
        self.top: dict[int, list[tuple[int, float]]] = {}
        self.missing = [1] * asked.n
        for owner in asked.owner:
            self.missing[owner] += 1

    def add(self, subject: Subject, chunk: Scored, top: int) -> Iterator[tuple[int, OptionScores]]:
        """Take in a chunk; yield the rows that are complete with it."""
        wanted = [self._wanted(row, where.tolist()) for row, where in zip(chunk.rows, chunk.where, strict=True)]
        pairs = torch.tensor(
            [pair[:2] for each in wanted for pair in each], dtype=torch.int64, device=chunk.states.device
        )
        where, tokens = pairs.view(-1, 2).unbind(1)
        picked, values, ids = pick(subject, chunk.states, where, tokens, top)
        numbers = iter(picked.tolist())
        for row, pairs_of_row, places in zip(chunk.rows, wanted, chunk.where, strict=True):
            owner = row if row < self.asked.n else self.asked.owner[row - self.asked.n]
            for _, _, sequence in pairs_of_row:
                self.parts[owner][sequence] = self.parts[owner].get(sequence, 0.0) + next(numbers)
            if row < self.asked.n:
                place = int(places[0])
                self.top[row] = list(zip(ids[place].tolist(), values[place].tolist(), strict=True))
            self.missing[owner] -= 1
            if not self.missing[owner]:
                yield owner, self._finish(owner)

    def _wanted(self, row: int, places: list[int]) -> list[tuple[int, int, tuple[int, ...]]]:
        """(state, token, sequence it counts towards) of a computed row."""
        if row >= self.asked.n:
            sequence = self.asked.sequence[row - self.asked.n]
            return [(place, token, sequence) for place, token in zip(places, sequence[1:], strict=True)]
        sequences = dict.fromkeys(tuple(sequence) for each in self.asked.options[row].values() for sequence in each)
        return [(places[0], sequence[0], sequence) for sequence in sequences]

    def _finish(self, owner: int) -> OptionScores:
        parts = self.parts.pop(owner, {})
        named = self.asked.options[owner].items()
        found = {name: logsumexp([parts[tuple(each)] for each in sequences]) for name, sequences in named}
        return OptionScores(found, self.top.pop(owner))


def logsumexp(values: Sequence[float]) -> float:
    """log of the summed exponentials; -inf for none."""
    highest = max(values, default=-math.inf)
    if highest == -math.inf:
        return highest
    return highest + math.log(sum(math.exp(value - highest) for value in values))
