"""Token by token: a packed prefill, then all rows of a chunk together, one token each a step, over their own cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from experiments.acting import EngineError, Station
from experiments.attention import Rule, attend, padded, visible
from experiments.edit import Edit, Prompt
from experiments.forward import execute, run
from experiments.pack import Actions, Level, Pack, as_tokens, place_edits
from experiments.packing import Row

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.subject import Subject

GROWTH = 64
"""Tokens by which the cache grows when it is full."""
CROWDED = 0.75
"""Finished rows leave the batch when fewer than this share of its rows are still going."""
ABREAST = 64
"""Rows whose next tokens are drawn at once on a CPU, so that their logits stay in its cache."""
LIKELIEST = 256
"""Tokens among which a draw is looked for before the whole vocabulary is sorted."""


@dataclass(frozen=True)
class Completion:
    """What was said: tokens with the subject's own log p of each (temperature 1, whole vocabulary).

    An end-of-turn token is the last of `tokens`; a stop text is not part of them. `stopped` is False where the limit
    of new tokens came first.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    stopped: bool


@dataclass(frozen=True)
class Wish:
    """How to go on."""

    max_new_tokens: int
    temperature: float
    top_p: float
    stop: tuple[str, ...]
    allowed: Tensor | None = None
    """[vocabulary] of booleans: tokens that may be drawn; None is all of them."""

    def check(self, rows: Sequence[Row], seeds: Sequence[int] | None) -> None:
        """Raise EngineError for settings out of range and for sampling without seeds."""
        if self.max_new_tokens < 1:
            raise EngineError(f"max_new_tokens is {self.max_new_tokens}, must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise EngineError(f"temperature is {self.temperature}, must be a number from 0 on")
        if not 0 < self.top_p <= 1:
            raise EngineError(f"top_p is {self.top_p}, must be above 0 and at most 1")
        if self.allowed is not None and not self.allowed.any():
            raise EngineError("no token may be drawn; allow at least one")
        if "" in self.stop:
            raise EngineError("a stop text is empty; give at least one character")
        if self.temperature > 0 and seeds is None:
            raise EngineError(f"temperature is {self.temperature} but there are no seeds; give one for each row")
        if seeds is not None and len(seeds) != len(rows):
            raise EngineError(f"{len(rows)} rows but {len(seeds)} seeds; one for each row is needed")


class Cache:
    """Keys and values of every row, padded to the longest: attends one new token of each row at position `at` [n].

    Rows are never moved while a step runs; `keep` drops some between steps. The keys of a head lie side by side, so
    that its queries run over them in one go.
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        """[n, key-value heads, places, d] twice."""
        self.at = torch.empty(0, dtype=torch.int64)
        self._masks: dict[int | None, Tensor] = {}

    def step(self, at: Tensor, n_keys: int) -> None:
        """Begin a step: new tokens at positions `at`, the highest of which is n_keys - 1."""
        self.at, self.n_keys, self._masks = at, n_keys, {}
        for layer, pair in self.layers.items():
            if pair[0].shape[2] < n_keys:
                self.layers[layer] = _grown(pair[0]), _grown(pair[1])

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        keys, values = self.layers[layer]
        rows = torch.arange(len(self.at), device=self.at.device)
        keys[rows, :, self.at], values[rows, :, self.at] = key, value
        if rule.window not in self._masks:
            self._masks[rule.window] = visible(self.at[:, None], self.n_keys, rule.window, query.dtype)
        k, v = (part[:, :, : self.n_keys] for part in (keys, values))
        return attend(query.unsqueeze(2), k, v, self._masks[rule.window], rule).squeeze(2)

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but `rows`."""
        self.layers = {
            layer: (keys.index_select(0, rows), values.index_select(0, rows))
            for layer, (keys, values) in self.layers.items()
        }


def _grown(part: Tensor) -> Tensor:
    return torch.cat([part, part.new_zeros(*part.shape[:2], GROWTH, part.shape[3])], 2)


@dataclass(frozen=True, eq=False)
class Fill:
    """A tap that gives every row its own copy of the keys and values."""

    index: Tensor
    """[n, longest] indices of the rows' tokens in a level."""
    cache: Cache

    def __call__(self, layer: int, key: Tensor, value: Tensor) -> None:
        n, longest = self.index.shape
        keys, values = (
            _grown(part.index_select(0, self.index.view(-1)).view(n, longest, *part.shape[1:]).transpose(1, 2))
            for part in (key, value)
        )
        self.cache.layers[layer] = keys, values


@dataclass(eq=False)
class Going:
    """A row being continued."""

    place: int
    row: Row
    draws: Tensor
    """Uniform numbers, one for each new token: the row's seed decides them, and nothing else does."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


def decode(pack: Pack, wish: Wish, seeds: Sequence[int], fired: Counter[Edit]) -> Iterator[tuple[int, Completion]]:
    """Continue the rows of `pack` together; yield (row, completion) as each ends. Counts new tokens in `fired`."""
    subject, stations = pack.subject, pack.stations
    going = [Going(at, row, _draws(seed, wish)) for at, (row, seed) in enumerate(zip(pack.rows, seeds, strict=True))]
    arms: dict[tuple[Edit, ...], int] = {}
    going.sort(key=lambda each: arms.setdefault(each.row.edits, len(arms)))  # so that edits act on slices
    cache = Cache()
    states = _prefill(pack, [each.place for each in going], cache)
    alive = list(range(len(going)))
    actions = _actions(subject, going, stations)
    while True:
        _choose(subject, states, [going[index] for index in alive], alive, wish)
        endings = {index: _ending(subject, going[index], wish) for index in alive}
        for index, ending in endings.items():
            if ending is not None:
                yield going[index].place, ending
        alive = [index for index in alive if endings[index] is None]
        if not alive:
            return
        if len(alive) < CROWDED * len(going):
            cache.keep(torch.tensor(alive, device=subject.device))
            going, alive = [going[index] for index in alive], list(range(len(alive)))
            actions = _actions(subject, going, stations)
        states = _step(subject, going, actions, cache)
        fired.update(edit for index in alive for edit in going[index].row.edits if _on_response(edit))


def _draws(seed: int, wish: Wish) -> Tensor:
    if wish.temperature == 0:
        return torch.empty(0)
    return torch.rand(wish.max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _on_response(edit: Edit) -> bool:
    return not isinstance(edit, Prompt) and getattr(edit, "positions", "all") in ("all", "response")


def _prefill(pack: Pack, order: Sequence[int], cache: Cache) -> Tensor:
    """Fill `cache` and return the last hidden state of every row, [n, d], both in this order of the pack's rows."""
    device = pack.subject.device
    taps = {trie.fork: Fill(padded([trie.paths[place] for place in order]).to(device), cache) for trie in pack.tries}
    last = pack.ranges(pack.subject.n_layers, [(len(row.tokens) - 1, len(row.tokens)) for row in pack.rows])
    return run(pack, last[list(order)], pack.levels(taps))


def _actions(subject: Subject, going: Sequence[Going], stations: Mapping[Edit, Station]) -> Actions:
    """What the edits do to a step, in which every row has one response token."""
    here = {edit: place for edit, place in stations.items() if _on_response(edit)}
    rows = [each.row for each in going]
    return place_edits(subject, rows, here, lambda _, holders: as_tokens(np.array(holders), subject.device))


def _step(subject: Subject, going: Sequence[Going], actions: Actions, cache: Cache) -> Tensor:
    """Last hidden states [n, d] of every row's newest token. Rows that have ended repeat theirs."""
    at = [len(each.row.tokens) + len(each.tokens) - 1 for each in going]
    depth = torch.tensor(at, device=subject.device)
    cache.step(depth, max(at) + 1)
    ids = torch.tensor([[each.tokens[-1] for each in going]], device=subject.device)
    return execute(subject, [Level(0, len(going), None, None, cache)], actions, ids, depth[None])


def _choose(subject: Subject, states: Tensor, going: Sequence[Going], alive: Sequence[int], wish: Wish) -> None:
    """Give every row that is `alive` its next token, and the token's log p."""
    n = len(going) if states.device.type == "cuda" else ABREAST
    for start in range(0, len(going), n):
        some = going[start : start + n]
        logits = subject.head(states[torch.tensor(alive[start : start + n], device=states.device)])
        chosen, logprobs = _chosen(logits, some, wish)
        for each, token, logprob in zip(some, chosen.tolist(), logprobs.tolist(), strict=True):
            each.tokens.append(token)
            each.logprobs.append(logprob)


def _chosen(logits: Tensor, rows: Sequence[Going], wish: Wish) -> tuple[Tensor, Tensor]:
    """The token [n] of each row, and its log p at temperature 1 over the whole vocabulary."""
    open_to = logits if wish.allowed is None else logits.masked_fill(~wish.allowed.to(logits.device), -torch.inf)
    if wish.temperature == 0:
        chosen = open_to.argmax(-1)
    else:
        draws = torch.stack([each.draws[len(each.tokens)] for each in rows]).to(logits.device)
        chosen = draw(open_to if wish.temperature == 1 else open_to / wish.temperature, wish.top_p, draws)
    return chosen, logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(-1)


def draw(logits: Tensor, top_p: float, draws: Tensor) -> Tensor:
    """What `sample` gives for the softmax of `logits` [n, vocabulary], mostly without sorting the vocabulary.

    A draw nearly always falls among the few likeliest tokens; only the rows in which it does not are sorted whole.
    """
    highest, tokens = logits.topk(min(LIKELIEST, logits.shape[1]))
    tokens, order = tokens.sort(-1)  # topk leaves the order of equals open: the lower number comes first
    highest, back = highest.gather(1, order).sort(stable=True, dim=-1, descending=True)
    tokens = tokens.gather(1, back)
    total = (logits - highest[:, :1]).exp_().sum(-1).double()
    likeliest = (highest - highest[:, :1]).double().exp() / total[:, None]
    likeliest = likeliest.masked_fill(highest <= highest[:, -1:], 0)  # their equals may be beyond
    summed = likeliest.cumsum(-1)
    kept = (summed - likeliest < top_p).sum(-1, keepdim=True).clamp(max=likeliest.shape[1])
    mass = summed.gather(1, kept - 1)[:, 0] if top_p < 1 else torch.ones_like(draws)
    place = torch.searchsorted(summed, (draws * mass)[:, None], right=True)[:, 0]
    known = (summed[:, -1] > draws * mass) & ((summed[:, -1] >= top_p) | (top_p == 1))
    chosen = tokens.gather(1, place.clamp(max=tokens.shape[1] - 1)[:, None])[:, 0]
    if not known.all():
        chosen[~known] = sample(logits[~known].double().softmax(-1), top_p, draws[~known])
    return chosen


def sample(probabilities: Tensor, top_p: float, draws: Tensor) -> Tensor:
    """Token [n] at quantile `draws` [n] of `probabilities` [n, vocabulary], likeliest tokens first.

    With `top_p` below 1 only the smallest set of likeliest tokens that reaches it takes part.
    """
    ordered, tokens = probabilities.sort(stable=True, dim=-1, descending=True)
    summed = ordered.cumsum(-1)
    kept = (summed - ordered < top_p).sum(-1, keepdim=True)
    mass = summed.gather(1, kept - 1)
    place = torch.searchsorted(summed, draws[:, None] * mass, right=True).minimum(kept - 1)
    return tokens.gather(1, place)[:, 0]


def _ending(subject: Subject, each: Going, wish: Wish) -> Completion | None:
    """The completion, if the newest token ends it."""
    n, stopped = len(each.tokens), each.tokens[-1] in subject.eos_ids
    if wish.stop and not stopped:
        text = _text(subject, each.tokens)
        found = [text.index(stop) for stop in wish.stop if stop in text]
        if found:
            stopped = True
            n = max(k for k in range(n + 1) if len(_text(subject, each.tokens[:k])) <= min(found))
    if stopped or n == wish.max_new_tokens:
        return Completion(tuple(each.tokens[:n]), tuple(each.logprobs[:n]), stopped)
    return None


def _text(subject: Subject, tokens: Sequence[int]) -> str:
    text: str = subject.tokenizer.decode(list(tokens), skip_special_tokens=True)
    return text
