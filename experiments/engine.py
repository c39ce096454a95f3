"""The engine: rows with edits in, log-probabilities, activations and text out.

Rows with different edits share every pass; what they have in common is computed once (see `experiments/packing.py`).
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from experiments import decoding
from experiments.acting import EngineError, Station, alone, is_exclusive, station
from experiments.edit import Edit, Pool, Prompt, Site
from experiments.forward import run
from experiments.pack import Carried, Pack, Read
from experiments.packing import Chunk, Coder, Limits, Row, chunks, reach
from experiments.pooling import Span, mean_into, need_prompt, pooled, split_into
from experiments.scoring import Options, OptionScores, Scored, Tally, ask, response_logprobs

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.decoding import Completion
    from experiments.subject import Subject

__all__ = ["Engine", "EngineError", "OptionScores", "Row"]

OnResult = Callable[[int, Any], None]
Observed = tuple[dict[Site, "Tensor"], list["Tensor"]]
"""[n, d] by site, and the log-probabilities of every row's response."""
CELLS = 4
"""Tokens of a pass that generates, those to come included, as a multiple of other passes': it keeps no logits of the
prompt, and each step costs about the same for few rows as for many."""


class Engine:
    """Computes over one subject. Safe to call from several threads: calls wait for each other.

    `max_tokens` bounds the packed tokens of a pass (four times that of one that generates), and so its memory. `fired`
    counts for every edit (the object) the tokens it acted on, as if each row had been computed alone: tokens that rows
    share count for each of them.
    """

    def __init__(self, subject: Subject, max_tokens: int = 8192) -> None:
        if max_tokens < 1:
            raise EngineError(f"max_tokens is {max_tokens}, must be at least 1")
        self.subject = subject
        self.max_tokens = max_tokens
        self.fired: Counter[Edit] = Counter()
        self._lock = threading.RLock()

    def option_logprobs(
        self,
        rows: Sequence[Row],
        options: Sequence[Options],
        top: int = 0,
        on_result: OnResult | None = None,
    ) -> list[OptionScores]:
        """Log-probability that each row goes on with one of the token sequences of each of its options.

        `options[i]` are the options of `rows[i]`. An option's value is the logsumexp over its sequences (-inf for
        none), in float32 over the whole vocabulary. `top` adds the likeliest next tokens. Raises EngineError.
        """
        if len(options) != len(rows):
            raise EngineError(f"{len(rows)} rows but {len(options)} option sets; one for each row is needed")
        asked = ask(rows, options)
        tally = Tally(asked)
        found: list[OptionScores | None] = [None] * len(rows)
        with torch.no_grad(), closing(self._passes(asked.rows, asked.spans)) as passes:
            for chunk in passes:
                for index, result in tally.add(self.subject, chunk, top):
                    found[index] = result
                    if on_result:
                        on_result(index, result)
        return [each for each in found if each is not None]

    def next_logits(self, rows: Sequence[Row]) -> Tensor:
        """Logits of the token behind each row, [n, vocabulary] float32 on the CPU. Raises EngineError."""
        found: list[Tensor | None] = [None] * len(rows)
        spans = [(len(row.tokens) - 1, len(row.tokens)) for row in rows]
        with torch.no_grad(), closing(self._passes(rows, spans)) as passes:
            for chunk in passes:
                logits = self.subject.head(chunk.states)
                for index, where in zip(chunk.rows, chunk.where, strict=True):
                    found[index] = logits[where[0]].cpu()
        return torch.stack([each for each in found if each is not None]) if rows else torch.empty(0, 0)

    def token_logprobs(self, rows: Sequence[Row], on_result: OnResult | None = None) -> list[Tensor]:
        """Log-probability of every token behind the prompt: [len(tokens) - n_prompt] float32 on the CPU, for each row.

        Raises EngineError, also for rows without a prompt token, whose first token nothing predicts.
        """
        need_prompt(rows)
        spans = [(row.n_prompt - 1, len(row.tokens) - 1) for row in rows]
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        with torch.no_grad(), closing(self._passes(rows, spans)) as passes:
            for chunk in passes:
                for index, value in zip(chunk.rows, response_logprobs(self.subject, rows, chunk), strict=True):
                    found[index] = value
                    if on_result:
                        on_result(index, value)
        return found

    def generate(
        self,
        rows: Sequence[Row],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seeds: Sequence[int] | None = None,
        stop: Sequence[str] = (),
        on_result: OnResult | None = None,
        allowed: Tensor | None = None,
    ) -> list[Completion]:
        """Continue each row by at most `max_new_tokens` tokens, until an end-of-turn token or one of the texts `stop`.

        Temperature 0 takes the likeliest token. Otherwise `seeds[i]` decides the tokens of `rows[i]`, whatever other
        rows there are. Only tokens `allowed` [vocabulary, bool] are drawn; log-probabilities stay those over all
        tokens. Raises EngineError, also for rows that would outgrow the subject's positions.
        """
        wish = decoding.Wish(max_new_tokens, temperature, top_p, tuple(stop), allowed)
        wish.check(rows, seeds)
        found: list[Completion | None] = [None] * len(rows)
        limits = Limits(CELLS * self.max_tokens, CELLS * self.max_tokens, max_new_tokens)
        with torch.no_grad(), self._packs(rows, [len(row.tokens) - 1 for row in rows], limits) as packs:
            for indices, pack in packs:
                chosen = [seeds[index] for index in indices] if seeds is not None else [0] * len(indices)
                for place, result in decoding.decode(pack, wish, chosen, self.fired):
                    found[indices[place]] = result
                    if on_result:
                        on_result(indices[place], result)
                self._count(pack)
        return [each for each in found if each is not None]

    def activations(self, rows: Sequence[Row], sites: Sequence[Site], pool: Pool) -> dict[Site, Tensor]:
        """What each row has at each site, [n, d] float32 on the CPU, edits included; layers above are not computed.

        `pool`: "last" token, "prompt_last" token, or "response_mean" over the tokens behind the prompt. Raises
        EngineError, also for rows that lack such tokens.
        """
        last = max((site.layer for site in sites), default=None)
        return self._observe(rows, sites, pool, last)[0] if rows and sites else self._nothing(rows, sites)

    def observe(self, rows: Sequence[Row], sites: Sequence[Site], pool: Pool) -> Observed:
        """`activations` and `token_logprobs` of the same rows, from the same pass. Raises EngineError."""
        need_prompt(rows)
        return self._observe(rows, sites, pool, None)

    def _nothing(self, rows: Sequence[Row], sites: Sequence[Site]) -> dict[Site, Tensor]:
        return {site: torch.zeros(len(rows), self.subject.point(site).width) for site in sites}

    def _observe(self, rows: Sequence[Row], sites: Sequence[Site], pool: Pool, last: int | None) -> Observed:
        """Pooled activations, and where `last` is None, so that all layers run, log-probabilities of the responses."""
        spans = [pooled(row, pool) for row in rows]
        out = self._nothing(rows, sites)
        logprobs: list[Tensor] = [torch.empty(0)] * len(rows)
        answers = [(row.n_prompt - 1, len(row.tokens) - 1) for row in rows]
        firsts = [start if last is not None else min(start, answers[i][0]) for i, (start, _) in enumerate(spans)]
        with torch.no_grad(), self._packs(rows, firsts) as packs:
            for indices, pack in packs:
                pack.last_layer = last
                read = [spans[index] for index in indices]
                for site in sites:
                    self._read(pack, site, read, partial(mean_into, out[site], indices, read))
                if last is not None:
                    run(pack)
                else:
                    chunk = self._run_at(pack, indices, [answers[index] for index in indices])
                    for index, value in zip(indices, response_logprobs(self.subject, rows, chunk), strict=True):
                        logprobs[index] = value
                self._count(pack)
        return out, logprobs

    def _read(self, pack: Pack, site: Site, spans: Sequence[Span], keep: Callable[[Tensor], None]) -> None:
        """Have `keep` receive what the rows of `pack` have at `site` at their spans, one row after the other."""
        point = self.subject.point(site)
        whole = point.module is self.subject.blocks[site.layer] and point.side == "output"
        place = Station(point.module, point.side, point.part, site.layer + whole)
        index = torch.from_numpy(pack.ranges(place.fork, spans)).to(self.subject.device)
        pack.reads.append(Read(place, index, keep))

    def forward(self, rows: Sequence[Row], positions: Sequence[range]) -> Tensor:
        """Last hidden states (what `subject.head` reads) of each `rows[i]` at `positions[i]`, concatenated: [k, d].

        One pass, whatever its size. Differentiable with respect to the tensors of the edits. Raises EngineError.
        """
        return self.trace(rows, positions, ())[0]

    def trace(
        self, rows: Sequence[Row], positions: Sequence[range], sites: Sequence[Site], *, above: bool = True
    ) -> tuple[Tensor, dict[Site, Tensor]]:
        """As `forward`, and what the rows have at `sites` at the same positions, [k, width] each, in the same pass.

        Differentiable as well. Without `above` the pass ends behind the highest site, and the first part is empty.
        """
        spans = [(where.start, where.stop) for where in positions]
        if any(not 0 <= start <= stop <= len(row.tokens) for row, (start, stop) in zip(rows, spans, strict=True)):
            raise EngineError(f"positions {spans} reach outside the rows")
        last = None if above else max(site.layer for site in sites)
        parts: list[Tensor] = [torch.empty(0)] * len(rows)
        at: dict[Site, list[Tensor]] = {site: [torch.empty(0)] * len(rows) for site in sites}
        with self._packs(rows, [start for start, _ in spans], Limits(inf)) as packs:
            for indices, pack in packs:
                pack.last_layer = last
                wanted = [spans[index] for index in indices]
                for site in sites:
                    self._read(pack, site, wanted, partial(split_into, at[site], indices, wanted))
                if above:
                    chunk = self._run_at(pack, indices, wanted)
                    for index, where in zip(indices, chunk.where, strict=True):
                        parts[index] = chunk.states.index_select(0, where)
                else:
                    run(pack)
                self._count(pack)
        return torch.cat(parts) if above else torch.empty(0), {site: torch.cat(found) for site, found in at.items()}

    def _run_at(self, pack: Pack, indices: list[int], spans: Sequence[Span]) -> Scored:
        """Run `pack`; last hidden states of its rows, whose numbers are `indices`, at `spans`."""
        flat, where = np.unique(pack.ranges(self.subject.n_layers, spans), return_inverse=True)
        states = run(pack, flat)
        places = torch.from_numpy(where).to(self.subject.device).split([stop - at for at, stop in spans])
        return Scored(indices, states, list(places))

    def _passes(
        self, rows: Sequence[Row], spans: Sequence[Span], limits: Limits | None = None
    ) -> Generator[Scored, None, None]:
        """Last hidden states of `rows[i]` at positions `spans[i]`, chunk by chunk. Close it: it holds the engine."""
        with self._packs(rows, [start for start, _ in spans], limits) as packs:
            for indices, pack in packs:
                chunk = self._run_at(pack, indices, [spans[index] for index in indices])
                self._count(pack)
                yield chunk

    @contextmanager
    def _packs(
        self, rows: Sequence[Row], firsts: Sequence[int], limits: Limits | None = None
    ) -> Iterator[Iterator[tuple[list[int], Pack]]]:
        """Packs to run one after the other, with the indices of their rows. The engine is the caller's meanwhile.

        What is wanted of `rows[i]` is at position `firsts[i]` and behind.
        """
        limits = limits or Limits(self.max_tokens)
        with self._lock:
            self._check(rows, limits.extra)
            with closing(self._one_by_one(rows, firsts, limits)) as packs:
                yield packs

    def _one_by_one(
        self, rows: Sequence[Row], firsts: Sequence[int], limits: Limits
    ) -> Generator[tuple[list[int], Pack], None, None]:
        groups: dict[tuple[Edit, ...], list[int]] = defaultdict(list)
        edits = dict.fromkeys(edit for row in rows for edit in row.edits if not isinstance(edit, Prompt))
        exclusive = {edit for edit in edits if is_exclusive(self.subject, edit)}
        stations = {edit: station(self.subject, edit) for edit in edits if edit not in exclusive}
        for index, row in enumerate(rows):
            groups[tuple(edit for edit in row.edits if edit in exclusive)].append(index)
        for own, members in groups.items():
            held = {edit for index in members for edit in rows[index].edits}
            coder = Coder({edit: place.fork for edit, place in stations.items() if edit in held})
            ordered = [rows[index] for index in members], [firsts[index] for index in members]
            todo = chunks(*ordered, coder, limits)
            carried = Carried(0)
            with alone(self.subject, own):
                for chunk, following in zip(todo, [*todo[1:], Chunk([], 0)], strict=True):
                    indices = [members[place] for place in chunk.rows]
                    here = {edit for index in indices for edit in rows[index].edits}
                    used: dict[Edit, Station] = {edit: place for edit, place in stations.items() if edit in here}
                    leaves = Carried(following.lead)
                    yield indices, Pack(self.subject, [rows[i] for i in indices], used, coder, carried, leaves)
                    carried = leaves

    def _check(self, rows: Sequence[Row], room: int) -> None:
        limit = self.subject.model.config.max_position_embeddings
        for index, row in enumerate(rows):
            if not row.tokens:
                raise EngineError(f"row {index} is empty; at least one token is needed")
            if not 0 <= row.n_prompt <= len(row.tokens):
                raise EngineError(f"row {index}: n_prompt is {row.n_prompt}, must be 0 to {len(row.tokens)}")
            if len(row.tokens) + room > limit:
                size = f"{len(row.tokens)} tokens" + (f" and {room} new ones" if room else "")
                raise EngineError(f"row {index} has {size}; the subject has {limit} positions: shorten the text")

    def _count(self, pack: Pack) -> None:
        last = self.subject.n_layers if pack.last_layer is None else pack.last_layer + 1
        for row in pack.rows:
            for edit in row.edits:
                if not isinstance(edit, Prompt) and (edit not in pack.stations or pack.stations[edit].fork <= last):
                    start, stop = reach(edit, row)
                    self.fired[edit] += max(0, stop - start)
