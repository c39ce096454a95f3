"""Steering vectors without labels: what methods share that look for directions of large effect further down.

A fit finds several vectors of norm R at a source layer which change what is at target layers, from prompts alone: of
pairs and conversations only the prompts are used. It always holds random vectors of the same norm beside them, says
which of the vectors do the same thing, and how far each works on prompts it was not trained on.

A trial applies one of them, named by `vector` (and `control` for the random ones): a list there is a grid axis, whose
trials share one fit.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, field_validator, model_validator

from experiments.contrast import FitError
from experiments.depth import DepthError, Depths, layers, shown
from experiments.directions import own_seed
from experiments.edit import Add, Edit, Site, SiteName
from experiments.intervention import Intervention, Needs, Positions, State, method_name

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.dataset import Conversation, Pair
    from experiments.downstream import Arm, Downstream
    from experiments.engine import Engine, Row
    from experiments.outline import Outline

CONTROLS = 1_000_000  # seeds of random controls start here, behind those of any vector
PROBES = 2_000_000  # and those of the vectors that the radius is found with here


def _slice(tokens: str | int) -> str | int:
    if isinstance(tokens, str) and tokens != "all":
        number = tokens.removeprefix("last:")
        if number == tokens or not number.isdecimal() or int(number) < 1:
            raise ValueError("is no slice of tokens; allowed: all, last:N, or a first position (-3: the last three)")
    return tokens


Slice = Annotated[str | int, AfterValidator(_slice)]
"""Tokens of a prompt: `all`, `last:N`, or the first position that counts, from the end where negative."""


@dataclass(frozen=True)
class Found:
    """What a search found, by tensor name: the first dimension counts the vectors."""

    vectors: dict[str, Tensor]
    controls: dict[str, Tensor]
    facts: dict[str, Any]


class Unsupervised(Intervention):
    """Settings of methods that look for vectors of large effect. A subclass says how it looks."""

    needs: ClassVar[tuple[Needs, ...]] = ("pairs", "conversations")
    heeds_masks: ClassVar[bool] = True  # it reads prompts alone
    applied: ClassVar[frozenset[str]] = frozenset({"vector", "control"})

    source: Depths = 0.25
    """Decoder layer that the vectors are added at: a number (-1 is the last), a fraction of the depth, a pattern of
    one layer."""
    site: SiteName = "mlp_out"
    """Activation of that layer they are added to; `mlp_out` is the bias of the MLP's output."""
    targets: Depths = 0.75
    """Decoder layers whose output is to change: one, or several, over which the objective is summed."""
    target_tokens: Slice = 1
    """Tokens of a prompt at which the targets are read: `all`, `last:N`, or the first position that counts (-3: the
    last three; 1: all but the first token, whose activations are so large that they alone would decide)."""
    radius: float | None = Field(default=None, gt=0)
    """R, the norm of every vector; null finds it by the relative-nonlinearity rule."""
    n: int = Field(default=4, ge=1)
    """How many vectors a fit finds."""
    controls: int = Field(default=2, ge=1)
    """How many random vectors of the same norm it holds beside them."""
    prompts: int = Field(default=2, ge=1)
    """How many different prompts are trained on: the first of the data, as far as there are so many."""
    held_out: int = Field(default=2, ge=0)
    """How many further prompts the vectors are tried on afterwards, as far as there are so many."""
    alike: float = Field(default=0.2, ge=0, le=1)
    """Up to this distance of their next-token distributions (0 the same, 1 apart) two vectors do the same thing."""
    positions: Positions = "all"
    """Where the vector is added, in the fit and after it: `all`, `prompt` or `last:N` (the last N prompt tokens)."""
    vector: int = Field(default=0, ge=0)
    """Which of the vectors this trial applies, from 0."""
    control: bool = False
    """Apply the random vector of that number instead."""

    @field_validator("positions")
    @classmethod
    def _in_the_prompt(cls, positions: str) -> str:
        if positions == "response":
            raise ValueError("is never reached by a fit, which reads prompts only; allowed: all, prompt, last:N")
        return positions

    @model_validator(mode="after")
    def _held(self) -> Unsupervised:
        kind, held = ("random vectors", self.controls) if self.control else ("vectors", self.n)
        if self.vector >= held:
            raise ValueError(f"vector {self.vector}: the fit holds {kind} 0 to {held - 1}; take one of them or raise n")
        return self

    @abstractmethod
    def search(self, engine: Engine, effect: Downstream, source: Site, seed: int) -> Found:
        """Vectors whose effect on the prompts of `effect` is large."""

    @abstractmethod
    def strength(self, change: Tensor) -> Tensor:
        """How large a change [tokens, width] at one target is, a number."""

    def fit(self, engine: Engine, data: Sequence[Pair | Conversation], seed: int) -> State:
        """The vectors `vectors` [n, d] and the random ones `random` [controls, d].

        Facts: `radius`; `behaviours`, vectors by what they do to the next token (experiments/behaviours.py);
        `generalisation`, the objective of every vector on every prompt. Raises FitError for data without prompts, for
        a target at or below the source, and what the method's own search raises; DepthError and SubjectError.
        """
        from experiments.downstream import downstream

        source, targets = self.places(engine.subject.n_layers)
        engine.subject.point(source)
        named = prompts_of(engine, data, self.prompts + self.held_out)
        effect = downstream(engine, [row for _, row in named], targets, self.target_tokens)
        seen = min(self.prompts, len(named))
        found = self.search(engine, effect.only(range(seen)), source, seed)
        tensors = found.vectors | {f"random.{name}": tensor for name, tensor in found.controls.items()}
        facts = {"source": str(source), "targets": [str(site) for site in targets]} | found.facts
        outcome = self._outcome(engine, effect, State(tensors, facts), [name for name, _ in named], seen)
        return State(tensors, facts | outcome)

    def _outcome(
        self, engine: Engine, effect: Downstream, state: State, ids: Sequence[str], seen: int
    ) -> dict[str, Any]:
        """Facts: the objective of every vector on every prompt, and which vectors do the same."""
        from experiments.behaviours import deduplicated, generalisation

        vectors = [tuple(self.arm(state, index, False)) for index in range(self.n)]
        random = [tuple(self.arm(state, index, True)) for index in range(self.controls)]
        table = generalisation(effect, [*vectors, *random], self.strength)
        rows = [rounded(row) for row in table.tolist()]
        worth = table[:, :seen].sum(1).tolist()
        same = deduplicated(engine, effect.prompts, vectors, random, worth, self.alike)
        matrix = {"prompts": list(ids), "held_out": [index >= seen for index in range(len(ids))]}
        return same | {"generalisation": matrix | {"vectors": rows[: self.n], "random": rows[self.n :]}}

    def edits(self, state: State, dose: float) -> list[Edit]:
        return [] if dose == 0 else self.arm(state, self.vector, self.control, dose)

    def arm(self, state: State, index: int, control: bool, dose: float = 1.0) -> list[Edit]:
        """The edits that put one of the state's vectors in."""
        vectors = state.tensors["random.vectors" if control else "vectors"]
        return [Add(Site.parse(state.facts["source"]), dose * vectors[index], self.positions)]

    def places(self, n_layers: int) -> tuple[Site, list[Site]]:
        """Source and targets. Raises DepthError unless there is one source, and every target is above it."""
        sources, targets = layers(self.source, n_layers), layers(self.targets, n_layers)
        if len(sources) != 1:
            raise DepthError(f"source {self.source!r} means layers {list(sources)}; name one")
        if targets[0] <= sources[0]:
            raise DepthError(f"target {targets[0]} is not above the source, layer {sources[0]}: nothing lies between")
        return Site(self.site, sources[0]), [Site("resid", layer) for layer in targets]

    def misplaced(self, outline: Outline) -> dict[str, str]:
        problems = super().misplaced(outline)
        for name in ("source", "targets"):
            try:
                layers(getattr(self, name), outline.n_layers)
            except DepthError as error:
                problems[name] = str(error)
        if not problems.keys() & {"source", "targets"}:
            try:
                self.places(outline.n_layers)
            except DepthError as error:
                problems["source"] = str(error)
        return problems

    def label(self) -> str:
        return f"{method_name(type(self))} {shown(self.source)} {'r' if self.control else 'v'}{self.vector}"

    def radius_of(self, effect: Downstream, source: Site, seed: int) -> tuple[float, dict[str, Any]]:
        """R, and facts about how it was found."""
        if self.radius is not None:
            return self.radius, {"radius": self.radius}
        from experiments.radius import SAMPLES, calibrate
        from experiments.spheres import drawn

        subject = effect.engine.subject
        stream = Site("resid", source.layer)
        norm = effect.engine.activations(effect.prompts, [stream], "last")[stream].norm(dim=-1).mean().item()
        probes = drawn([subject.point(source).width], 1.0, [own_seed(seed, PROBES + i) for i in range(SAMPLES)])
        found = calibrate(effect, self.put(source), probes.to(subject.device), norm)
        return found.radius, {"radius": found.radius, "nonlinearity": found.ratio, "norm_at_source": norm}

    def put(self, source: Site) -> Any:
        """Vectors [n, d] -> the edits that add each of them at `source`."""

        def arms(vectors: Tensor) -> list[Arm]:
            return [(Add(source, vector, self.positions),) for vector in vectors]

        return arms


def rounded(values: Sequence[float]) -> list[float]:
    """For facts: six digits."""
    return [float(f"{value:.6g}") for value in values]


def prompts_of(engine: Engine, data: Sequence[Pair | Conversation], n: int) -> list[tuple[str, Row]]:
    """The first `n` different prompts of the data with the ids of their examples, ready for the subject to answer.

    A pair's prompt is its neutral one, a conversation's what comes before its last message. Raises FitError for none.
    """
    from experiments.dataset import Conversation
    from experiments.engine import Row

    found: dict[tuple[int, ...], str] = {}
    for each in data:
        messages = each.messages[:-1] if isinstance(each, Conversation) else each.messages
        found.setdefault(engine.subject.render(messages).tokens, each.id)
        if len(found) == n:
            break
    if not found:
        raise FitError("no prompts; at least one pair or conversation is needed")
    return [(name, Row(tokens, len(tokens))) for tokens, name in found.items()]
