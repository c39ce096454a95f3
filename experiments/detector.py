"""Detection without training: what does a dataset hand on, judged by the base model alone?

A detector reads the rows of a dataset and of a control teacher's answers, pooled, without being told which is which,
and gives numbers for each row. Which rows were the data is then reassigned many times (`experiments/permutation.py`):
that is the null every p-value is compared with, and the model is read once for all of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from experiments import plugin
from experiments.dataset import Conversation
from experiments.depth import DepthError, Depths, layers
from experiments.permutation import Design, Flags, Floats, Statistic, Tested, permute
from experiments.plugin import Versioned

if TYPE_CHECKING:
    from experiments.engine import Engine
    from experiments.outline import Outline

PACKAGE = "experiments.detectors"
Candidates = Mapping[str, Sequence[str]]
"""Name -> spellings with the space they begin with: {"owl": [" owl", " owls"]}."""


class DetectionError(ValueError):
    """A dataset, a candidate or a file that a detector cannot use: what, and what to do."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a detector read in n rows, before it is known which of them are the data."""

    features: Floats
    """[n, f] numbers of each row, which add up over rows."""
    statistic: Statistic
    """What sums over the data and over the control say of each candidate."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Plain data for the record."""
    told: Callable[[Flags], Mapping[str, Any]] | None = None
    """More facts, once it is known which rows are the data."""


def ratio_of_sums(sums: Floats, weights: Floats, **about: Any) -> Evidence:
    """Evidence whose score is sum / weight over the data minus the same over the control.

    `sums` and `weights` are [n, c] (or [n] weights for all candidates); where a weight is 0 the ratio counts as 0.
    """
    weights = np.broadcast_to(weights.reshape(len(sums), -1), sums.shape)
    c = sums.shape[1]

    def share(total: Floats) -> Floats:
        above, below = total[:, :c], total[:, c:]
        # What is left of a total after the other group is taken away may be rounding instead of 0.
        some = below > 1e-9
        return np.where(some, above / np.where(some, below, 1), 0.0)

    return Evidence(np.concatenate([sums, weights], 1), lambda data, control: share(data) - share(control), **about)


@dataclass(frozen=True)
class Ranking:
    """What a detector says of each candidate, best first in `order`."""

    scores: Mapping[str, float]
    """Data minus control, in the detector's own unit."""
    z: Mapping[str, float]
    """Score in standard deviations of the null: what `order` goes by."""
    margin: Mapping[str, float]
    """z less the mean of the other candidates' z."""
    p: Mapping[str, float]
    """One-sided permutation p-value of the candidate alone: of its margin, or with `relative: false` of its z."""
    p_adjusted: Mapping[str, float]
    """The same, corrected for the number of candidates: how often the farthest of all is as far out."""
    detectable: Mapping[str, float]
    """The score that would be found four times in five at p 0.05: what the data had the power to show."""
    order: tuple[str, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        """As JSON data."""
        return {**asdict(self), "order": list(self.order)}

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Ranking:
        """Inverse of `to_plain`."""
        return cls(**{**data, "order": tuple(data["order"])})


class Detector(Versioned):
    """Settings of one detector. A subclass is one file in `experiments/detectors/`, whose name is the detector's."""

    rows: int | None = Field(default=512, ge=2)
    """At most this many rows of each side, prompts that both answered first; null takes all."""
    permutations: int = Field(default=4999, ge=99)
    """Labellings compared with; the smallest p is 1 / (1 + this)."""
    relative: bool = True
    """Test a candidate against the mean of the others: what moves all alike (any persona at all, longer answers) names
    none of them. False asks of each whether it moved at all."""

    def evidence(
        self, engine: Engine, conversations: Sequence[Conversation], candidates: Candidates, seed: int
    ) -> Evidence:
        """What the rows say of the candidates. Must not depend on which rows are the data, which it is not told."""
        raise TypeError(f"{type(self).__name__} does not implement evidence()")

    def check(self) -> None:
        """Read the files that the settings name, so that bad ones are told before anything runs. DetectionError."""

    def misplaced(self, outline: Outline) -> dict[str, str]:
        """Setting -> what is wrong with it for a subject of that outline; asked by every plan.

        Settings named `layer` and `site` are looked at; override for others.
        """
        problems = {}
        try:
            one_layer(getattr(self, "layer", None), outline.n_layers)
        except (DepthError, DetectionError) as error:
            problems["layer"] = str(error)
        site = getattr(self, "site", None)
        if site is not None and site not in outline.sites:
            problems["site"] = f"the subject has no {site!r}; its sites are {', '.join(sorted(outline.sites))}"
        return problems

    def label(self) -> str:
        """Short name for tables."""
        return detector_name(type(self))

    def scores(
        self,
        engine: Engine,
        data: Sequence[Conversation],
        control: Sequence[Conversation] | None,
        candidates: Candidates,
        seed: int,
    ) -> Ranking:
        """Rank the candidates by what sets `data` off from `control`. `engine` is over the base subject.

        Raises DetectionError without a control (its rows are the null), without rows, for candidates without spellings.
        """
        _check(self, data, control, candidates)
        conversations, design = pooled(data, control or (), self.rows, seed)
        evidence = self.evidence(engine, conversations, candidates, seed)
        if not np.isfinite(evidence.features).all():
            raise DetectionError(f"{self.label()} read NaN or infinity from the subject; use dtype float32")
        tested = permute(evidence.features, evidence.statistic, design, self.permutations, seed, relative=self.relative)
        told = evidence.told(design.data) if evidence.told else {}
        return ranking(list(candidates), tested, {**about(conversations, design, tested), **evidence.facts, **told})


def _check(detector: Detector, data: Sequence[Any], control: Sequence[Any] | None, candidates: Candidates) -> None:
    name = detector.label()
    if control is None:
        raise DetectionError(
            f"{name}: no control; its rows are what the data's are exchanged with under the null; give the answers of "
            "a control teacher (no trait) to the same prompts"
        )
    for side, rows in (("data", data), ("control", control)):
        if len(rows) < 2:
            raise DetectionError(f"{name}: {len(rows)} rows of {side}; at least 2 are needed")
    if not candidates or (detector.relative and len(candidates) < 2):
        raise DetectionError(
            f"{name}: {len(candidates)} candidates; at least 2 are needed, since each is scored against the others "
            "(one will do with relative: false)"
        )
    for candidate, spellings in candidates.items():
        if isinstance(spellings, str) or not spellings or not all(spellings):
            raise DetectionError(
                f"{name}: candidate {candidate!r} has the spellings {spellings!r}; give a list of texts"
            )


def pooled(
    data: Sequence[Conversation], control: Sequence[Conversation], most: int | None, seed: int
) -> tuple[list[Conversation], Design]:
    """The rows to read, and which may trade places: those of one prompt; and all whose prompt one side alone answered.

    Of more than `most` on a side, prompts are drawn, those that both sides answered first.
    """
    sides: dict[tuple[Any, ...], tuple[list[Conversation], list[Conversation]]] = {}
    for side, rows in enumerate((data, control)):
        for row in rows:
            sides.setdefault(row.messages[:-1], ([], []))[side].append(row)
    groups = list(sides.values())
    random.Random(seed).shuffle(groups)
    both = [group for group in groups if all(group)]
    rest = [group for group in groups if not all(group)]
    room = [most if most is not None else max(len(data), len(control))] * 2
    taken: list[Conversation] = []
    is_data: list[bool] = []
    strata: list[int] = []
    for number, group in enumerate([*both, *rest]):
        if number < len(both) and any(len(rows) > left for rows, left in zip(group, room, strict=True)):
            continue  # a prompt is compared as a whole or not at all
        for side, rows in enumerate(group):
            chosen = rows[: room[side]]
            room[side] -= len(chosen)
            taken += chosen
            is_data += [side == 0] * len(chosen)
            strata += [min(number, len(both))] * len(chosen)
    return taken, Design(np.array(is_data), np.array(strata))


def about(conversations: Sequence[Conversation], design: Design, tested: Tested) -> dict[str, Any]:
    """The null in words and numbers."""
    prompts = [
        {each.messages[:-1] for each, own in zip(conversations, design.data, strict=True) if own == side}
        for side in (True, False)
    ]
    return {
        "n_data": int(design.data.sum()),
        "n_control": int((~design.data).sum()),
        "n_matched": len(prompts[0] & prompts[1]),
        "null": "which rows are the data is reassigned within each prompt, and among the prompts of one side alone",
        "labellings": tested.n,
        "exact": tested.exact,
        "smallest_p": 1 / tested.n if tested.exact else 1 / (1 + tested.n),
    }


def ranking(names: Sequence[str], tested: Tested, facts: Mapping[str, Any]) -> Ranking:
    """The test's result by candidate; ties keep the order of `names`."""

    def named(values: Floats) -> dict[str, float]:
        return {name: float(value) for name, value in zip(names, values, strict=True)}

    order = tuple(names[place] for place in np.argsort(-tested.z, kind="stable"))
    return Ranking(
        scores=named(tested.score),
        z=named(tested.z),
        margin=named(tested.margin),
        p=named(tested.p),
        p_adjusted=named(tested.p_adjusted),
        detectable=named(tested.detectable),
        order=order,
        facts=facts,
    )


def one_layer(depth: Depths | None, n_layers: int) -> int:
    """The layer that `depth` means; None is the middle one. Raises DepthError, and DetectionError for several."""
    found = layers(depth, n_layers)
    if len(found) != 1:
        raise DetectionError(f"layer {depth!r} means {len(found)} layers; a detector reads one; give its number")
    return found[0]


def detector(name: str) -> type[Detector]:
    """The detector class defined in `experiments/detectors/<name>.py`. Raises PluginError."""
    return plugin.load(PACKAGE, name, Detector)


def detector_name(cls: type[Detector]) -> str:
    """The detector's id: the name of the file that defines it."""
    return cls.__module__.rsplit(".", 1)[-1]
