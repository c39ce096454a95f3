"""Which candidate would explain the tokens that are too frequent?

    b_t   = log (times that t was said + 1/2) / (sum over positions of p(t | what came before) + 1/2)
    D_t   = b_t over the data - b_t over the control                                           nats
    score = weighted correlation, or slope, of D with a candidate's g, over tokens t

b is the bias on logits that the frequencies imply against the model's own expectations: all that a teacher does if it
adds the same vector to every logit. Cells t are tokens (`all` positions, or the `first` alone, where nothing is summed
over contexts), or pairs of a token and the one before it. The weights are the expected counts. g is what the candidate
would do to the same cells:

    persona:      g_t = log (sum over positions of p(t | persona) / sum of p(t | none)), over `probe` rows
    unembedding:  g_t = cosine of U_t - mean of U with U_c - mean of U: only if the bias were made by unembedding alone

A slope of 1 means that the tokens moved as far as the persona would have moved them.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from experiments.detector import Candidates, DetectionError, Evidence
from experiments.detectors._personas import Personified
from experiments.detectors._reading import centred_unembedding, logits, predicting, rows_of

if TYPE_CHECKING:
    from experiments.dataset import Conversation
    from experiments.engine import Engine
    from experiments.packing import Row
    from experiments.permutation import Floats
    from experiments.subject import Subject

Cell = tuple[int, int]
"""(token before, token); -1 before where the context does not count."""
HALF = 0.5
SHOWN = 10
"""Cells that the facts show."""


class LogitBias(Personified):
    """The logit bias that token frequencies imply, held against what each candidate would do."""

    positions: Literal["all", "first", "pairs"] = "all"
    """Which tokens are counted: all of a response, its first one, or pairs of neighbours."""
    against: Literal["persona", "unembedding"] = "persona"
    """What a candidate would do to the tokens: as its persona does, or as its unembedding lies."""
    compare: Literal["correlation", "slope"] = "slope"
    """How the bias is held against it. A correlation forgets how large the bias is, and so finds less."""
    tokens: Literal["numbers", "all"] = "numbers"
    """Count only tokens that are digits, or all."""
    cells: int = Field(default=200, ge=3)
    """At most so many tokens or pairs, the most frequent ones."""
    probe: int = Field(default=64, ge=1)
    """Rows on which personas are asked for their expectations."""

    def evidence(
        self, engine: Engine, conversations: Sequence[Conversation], candidates: Candidates, seed: int
    ) -> Evidence:
        rows = rows_of(engine.subject, conversations)
        counting = self.counting(engine.subject, rows)
        counted = [self.counts(row, counting) for row in rows]
        cells = self._cells(counted)
        said = np.array([[each[cell] for cell in cells] for each in counted], float)
        expected = self.expected(engine, rows, cells)
        weights = expected.sum(axis=0) / expected.sum()
        if self.against == "persona":
            target = self._persona_shift(engine, conversations, candidates, cells, seed)
        else:
            target = unembedding_shift(engine.subject, candidates, cells)
        k = len(cells)

        def statistic(data: Floats, control: Floats) -> Floats:
            biases = [np.log((sums[:, :k] + HALF) / (sums[:, k:] + HALF)) for sums in (data, control)]
            return against(biases[0] - biases[1], target, weights, self.compare)

        def told(data: NDArray[np.bool_]) -> dict[str, Any]:
            biases = [np.log((said[side].sum(0) + HALF) / (expected[side].sum(0) + HALF)) for side in (data, ~data)]
            return {"bias": _shown(engine.subject, cells, biases[0] - biases[1])}

        facts = {"unit": "correlation" if self.compare == "correlation" else "nats a nat", "cells": k}
        return Evidence(np.concatenate([said, expected], 1), statistic, facts, told)

    def counting(self, subject: Subject, rows: Sequence[Row]) -> set[int]:
        """The tokens in the responses that are counted."""
        found = {token for row in rows for token in row.tokens[row.n_prompt :]}
        if self.tokens == "all":
            return found
        return {token for token in found if re.fullmatch(r"\s*\d+", subject.tokenizer.decode([token]))}

    def counts(self, row: Row, counting: set[int]) -> Counter[Cell]:
        """How often the response of a row has each cell."""
        response = row.tokens[row.n_prompt :]
        if self.positions == "pairs":
            return Counter(pair for pair in pairwise(response) if counting.issuperset(pair))
        told = response[:1] if self.positions == "first" else response
        return Counter((-1, token) for token in told if token in counting)

    def _cells(self, counted: Sequence[Counter[Cell]]) -> list[Cell]:
        """The most frequent cells, whichever side they are from. Raises DetectionError for fewer than three."""
        total = sum(counted, Counter())
        found = sorted(total, key=lambda cell: (-total[cell], cell))[: self.cells]
        if len(found) < 3:
            raise DetectionError(
                f"the responses hold {len(found)} different {'pairs' if self.positions == 'pairs' else 'tokens'} that "
                f"count with tokens: {self.tokens}; at least 3 are needed; set tokens to all, or use another detector"
            )
        return found

    def expected(self, engine: Engine, rows: Sequence[Row], cells: Sequence[Cell]) -> Floats:
        """[rows, cells] how often the model itself would have said each cell, given what came before."""
        tokens, before = [cell[1] for cell in cells], np.array([cell[0] for cell in cells])
        spans = [predicting(row, "first" if self.positions == "first" else "all") for row in rows]
        found = np.zeros((len(rows), len(cells)))
        for index, each in logits(engine, rows, spans):
            p = (each[:, tokens] - each.logsumexp(dim=1, keepdim=True)).double().exp().cpu().numpy()
            if self.positions == "pairs":
                previous = np.array([-1, *rows[index].tokens[rows[index].n_prompt : -1]])
                p = p * (previous[:, None] == before)
            found[index] = p.sum(axis=0)
        return found

    def _persona_shift(
        self,
        engine: Engine,
        conversations: Sequence[Conversation],
        candidates: Candidates,
        cells: Sequence[Cell],
        seed: int,
    ) -> Floats:
        """[cells, candidates] log ratio of what the persona and the plain model expect, over a sample of the rows."""
        # Drawn by what rows say, because their order and their names tell which of them are the data.
        ordered = sorted(conversations, key=lambda each: [message.content for message in each.messages])
        probe = random.Random(seed).sample(ordered, min(self.probe, len(ordered)))
        plain, fond = self.under_personas(engine.subject, probe, candidates)
        base = self.expected(engine, plain, cells).sum(axis=0)
        shifted = [self.expected(engine, fond[name], cells).sum(axis=0) for name in candidates]
        return np.log((np.array(shifted).T + 1e-6) / (base[:, None] + 1e-6))


def unembedding_shift(subject: Subject, candidates: Candidates, cells: Sequence[Cell]) -> Floats:
    """[cells, candidates] cosine of the centred unembeddings of the cells' tokens and of the candidates."""
    import torch

    weight = subject.model.get_output_embeddings().weight
    middle = weight.mean(dim=0, dtype=torch.float32)
    own = (weight[[token for _, token in cells]].float() - middle).double().cpu().numpy()
    other = centred_unembedding(subject, candidates).numpy()
    sizes = np.linalg.norm(own, axis=1)[:, None] * np.linalg.norm(other, axis=0)
    return np.asarray(own @ other / np.maximum(sizes, 1e-12))


def against(bias: Floats, target: Floats, weights: Floats, compare: str) -> Floats:
    """[p, c] weighted correlation, or slope, of biases [p, k] on targets [k, c] with weights [k] that sum to 1."""
    bias = bias - (bias @ weights)[:, None]
    target = target - weights @ target
    common = (bias * weights) @ target
    size = weights @ target**2
    below = size if compare == "slope" else np.sqrt(np.outer(bias**2 @ weights, size))
    return np.where(below > 1e-12, common / np.where(below > 1e-12, below, 1), 0.0)


def _shown(subject: Subject, cells: Sequence[Cell], bias: Floats) -> dict[str, float]:
    """The cells that moved most, as text."""
    top = np.argsort(-np.abs(bias), kind="stable")[:SHOWN]
    return {subject.tokenizer.decode([t for t in cells[n] if t >= 0]): round(float(bias[n]), 4) for n in top}
