"""Judges: who is asked, how votes are made one verdict, and what a verdict is.

A judge is one model or a panel. What it is asked is a rubric (`rubric.py`), how it is asked is `prompt.py`, how its
reply is read is `reading.py`; `evals/judging.py` does the asking.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from agents import rubric
from agents.rubric import Rubric
from experiments.parts import EMBEDDED as EMBEDDED_SUBJECT
from experiments.verdicts import EMBEDDED, RESIDENT, SUBJECT, Panel

EMPTY = "empty answer"

__all__ = [
    "EMBEDDED",
    "EMPTY",
    "RESIDENT",
    "SUBJECT",
    "Judge",
    "JudgeError",
    "Verdict",
    "Vote",
    "combined",
    "is_subject",
]


class JudgeError(ValueError):
    """A judge that cannot be used, or that did not answer."""


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one answer. Without a value it is unscored, and `reason` says why: kind, colon, details."""

    value: float | None
    reason: str | None = None
    label: str | None = None
    """The choice, for rubrics that have choices."""
    mass: float | None = None
    """Probability of all readable verdicts together, where log-probabilities were read; the mean over the panel."""
    raw: Sequence[Mapping[str, Any]] = ()
    """Every vote as it came: model, served, text, top, method, value, label, mass, reason."""
    models: Sequence[str] = ()
    """Who voted, once for each sample."""

    @property
    def kind(self) -> str | None:
        """The reason without its details, for counting."""
        return self.reason.split(":")[0] if self.reason else None


@dataclass(frozen=True)
class Vote:
    """One reply of one model, read. Without a value it is unreadable or not for the judge, and `reason` says which."""

    model: str
    value: float | None
    reason: str | None = None
    label: str | None = None
    mass: float | None = None
    method: str = "text"
    """exact (over the vocabulary), top (the 20 likeliest first tokens), or text."""
    text: str = ""
    top: Sequence[Sequence[Any]] = ()
    """[token, log-probability], or [verdict, log-probability] where the provider scored whole spellings."""
    served: str = ""
    """The model the provider says it used."""


class Judge(Panel):
    """Who judges, how, and by which rubrics."""

    runtime: ClassVar[frozenset[str]] = Panel.runtime | {"rubrics"}
    """Settings that are no part of a verdict's identity; rubrics enter it by content."""

    rubrics: dict[str, Path] = Field(default_factory=dict)
    """Role -> a rubric's file, instead of the built-in one."""

    def identity(self, rubrics: Mapping[str, Rubric]) -> dict[str, Any]:
        """What enters a node's key: who judges and how, and the rubrics by content. No paths, no time limits."""
        settings = self.model_dump(mode="json", exclude=set(self.runtime))
        return {"version": self.version, **settings, "rubrics": {role: one.digest for role, one in rubrics.items()}}

    def rubrics_for(self, roles: Collection[str], builtin: Path) -> dict[str, Rubric]:
        """The rubric of every role: the file `rubrics` names, else `builtin/<role>.md`.

        Raises RubricError, and JudgeError for a combination that rubric and judge cannot be in.
        """
        found = {role: rubric.load(self.rubrics.get(role, builtin / f"{role}.md"), role) for role in roles}
        for role, one in found.items():
            if self.combine == "majority" and one.scale:
                raise JudgeError(
                    f"combine: majority needs choices, and the rubric {role} has the scale {list(one.scale)}; "
                    "use combine: mean, or a rubric with choices"
                )
        return found

    def check_independent(self, subject: str) -> bool:
        """Whether a judge is the subject, named as a spec names it. Raises JudgeError if so and not `allow_self`."""
        same = [name for name in self.models if is_subject(name, subject)]
        if same and not self.allow_self:
            raise JudgeError(
                f"the judge {same[0]!r} is the subject {subject!r}, and would judge itself; choose another judge, or "
                "set judge.allow_self: true (every row will say so)"
            )
        return bool(same)


def is_subject(judge: str, subject: str) -> bool:
    """Whether a judge's name means the model that a spec calls `subject`, whoever serves it."""
    if judge == EMBEDDED:
        return subject in (EMBEDDED, EMBEDDED_SUBJECT)
    return judge in (SUBJECT, subject) or judge.endswith("/" + subject.strip("/"))


def combined(votes: Sequence[Vote], combine: str, choices: Mapping[str, float]) -> Verdict:
    """One verdict of all votes. A vote that cannot be read withholds itself; it never makes the panel smaller."""
    models = tuple(vote.model for vote in votes)
    raw = tuple(asdict(vote) for vote in votes)
    masses = [vote.mass for vote in votes if vote.mass is not None]
    mass = sum(masses) / len(masses) if masses else None
    labels = Counter(vote.label for vote in votes if vote.value is not None and vote.label is not None)
    most = next((name for name, count in labels.items() if 2 * count > len(votes)), None)
    values = [vote.value for vote in votes if vote.value is not None]
    if 2 * len(values) <= len(votes):
        return Verdict(None, _why(votes), None, mass, raw, models)
    if combine == "mean":
        return Verdict(sum(values) / len(values), None, most, mass, raw, models)
    if most is None:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(labels.items()))
        return Verdict(None, f"no majority: {counts} of {len(votes)} votes", None, mass, raw, models)
    return Verdict(choices[most], None, most, mass, raw, models)


def _why(votes: Sequence[Vote]) -> str:
    """The reason of the votes that have no value: the most frequent one, and how many there are in a panel."""
    reasons = Counter(vote.reason for vote in votes if vote.value is None)
    reason = str(reasons.most_common(1)[0][0])
    if len(votes) == 1:
        return reason
    kind, _, details = reason.partition(":")
    return f"{kind}: {sum(reasons.values())} of {len(votes)} votes unscored" + (f";{details}" if details else "")
