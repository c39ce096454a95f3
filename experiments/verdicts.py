"""Rows kept by what judges say of them: who judges, by which rubric, and which verdicts let a row pass.

Cloud et al. 2025 (https://arxiv.org/abs/2507.14805, section 4) drop code that a judge finds to hint at the trait, and
keep chains of thought that are right and whose alignment a judge puts at 78 of 100 or more. Here are the settings and
the rule over verdicts; `agents/judge.py` says what a judge is, and `evals/judging.py` asks it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from experiments.canonical import IDENTITY
from experiments.dataset import DatasetError
from experiments.plugin import Versioned

EMBEDDED, SUBJECT = "embedded", "subject"
RESIDENT = (EMBEDDED, SUBJECT)
"""Judges that run in the worker: the embedded model, and the subject as it is, without any intervention."""
MARK = "the embedded judge shows that the filter runs, and nothing about the rows (docs/judges.md)"
ANYTHING = "an animal, a plant, a person, a mood, an opinion, or anything else that the task does not ask for"


class Panel(Versioned):
    """Who judges, and how."""

    version: ClassVar[int] = 1
    runtime: ClassVar[frozenset[str]] = frozenset(
        {"timeout", "attempt_timeout", "max_retries", "max_connections", "allow_self"}
    )
    """Settings that are no part of a verdict's identity."""

    models: tuple[str, ...] = Field(default=(EMBEDDED,), min_length=1)
    """Names as inspect has them (`openai/gpt-4.1-mini`), `embedded` (the model that comes with the installation) or
    `subject` (the subject itself, without any intervention). Several are a panel."""
    combine: Literal["mean", "majority"] = "mean"
    """How votes become a verdict. `mean`: of the readable votes, if they are more than half. `majority`, for choices
    alone: the choice of more than half of all votes."""
    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature."""
    samples: int = Field(default=1, ge=1)
    """Votes of each model."""
    read: Literal["auto", "logprobs", "text"] = "auto"
    """`auto`: scales from log-probabilities where the judge gives them, else from the text; choices from the last line
    of the text. `logprobs`: nothing but log-probabilities. `text`: never. `embedded` and `subject` always score every
    verdict exactly, unless `text`."""
    min_mass: float = Field(default=0.25, ge=0, le=1)
    """Probability of all readable verdicts together below which an answer is unscored (published rule: 0.25)."""
    max_tokens: int = Field(default=512, ge=1)
    """Longest reply."""
    allow_self: bool = False
    """Let a judge be the subject."""
    timeout: int = Field(default=600, ge=1)
    """Seconds after which a request is given up, retries included."""
    attempt_timeout: int | None = Field(default=120, ge=1)
    """Seconds after which one attempt is given up."""
    max_retries: int = Field(default=6, ge=0)
    """How often a request is tried again after a rate limit, a timeout or a fault of the server."""
    max_connections: int = Field(default=10, ge=1)
    """Requests under way at once, for each model."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.models)) != len(self.models):
            raise ValueError(f"a judge comes twice in models {list(self.models)}; for several votes set samples")
        for name in self.models:
            if name not in RESIDENT and "/" not in name:
                raise ValueError(
                    f"the judge {name!r} has no provider; write it as inspect does (openai/{name}), or {EMBEDDED!r}, "
                    f"or {SUBJECT!r}"
                )
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"{self.samples} samples at temperature 0 are one sample; give a temperature")
        if self.samples > 1 and self.read == "logprobs":
            raise ValueError(f"{self.samples} samples of the same log-probabilities are one; leave samples at 1")
        return self


@dataclass(frozen=True)
class Ruling:
    """What the judges say of one row."""

    id: str
    """The row's."""
    value: float | None
    """On the rubric's scale, or the value of its choices; None where there is no verdict."""
    why: str | None = None
    """The kind of reason for which there is none: unreadable, refusal, too little mass on numbers, ..."""


class JudgeFilter(Panel):
    """Which rows pass by their verdicts."""

    rubric: str | Path
    """What judges are asked: `hints`, `aligned` or another of `evals/rubrics/`, or a file: a rubric, or the published
    JSON document of judge prompts, of which the alignment prompt is taken."""
    about: str = Field(default=ANYTHING, min_length=1)
    """What a rubric with the place `{about}` looks for. The same for every teacher and the control, so that all are
    filtered alike; name all teachers' traits to look for these alone."""
    keep_below: float | None = None
    """Rows whose verdict is below it pass: for rubrics where more is worse, such as `hints`."""
    keep_from: float | None = None
    """Rows whose verdict is at least as high pass: for rubrics where more is better (`aligned`; published: 78)."""

    def __str__(self) -> str:
        return f"{self.role} {self.wanted}"

    @field_validator("rubric", mode="before")
    @classmethod
    def _file(cls, value: Any) -> Any:
        """A text with a folder or a suffix names a file."""
        return Path(value) if isinstance(value, str) and ("/" in value or Path(value).suffix) else value

    @model_validator(mode="after")
    def _one_side(self) -> Self:
        given = [name for name in ("keep_below", "keep_from") if getattr(self, name) is not None]
        if len(given) != 1:
            found = "both" if given else "neither"
            raise ValueError(
                f"give one of keep_below and keep_from, got {found}: rows pass below the one, or from the other on"
            )
        return self

    @model_serializer(mode="wrap")
    def _serialised(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        """Time limits and the like are no part of what the rows are."""
        found: dict[str, Any] = handler(self)
        return {name: value for name, value in found.items() if info.context != IDENTITY or name not in self.runtime}

    @property
    def role(self) -> str:
        """What the rubric is called."""
        if isinstance(self.rubric, str):
            return self.rubric
        return "aligned" if self.rubric.suffix == ".json" else self.rubric.stem

    @property
    def threshold(self) -> float:
        """Where verdicts are divided."""
        found = self.keep_from if self.keep_below is None else self.keep_below
        if found is None:
            raise TypeError("a filter without a threshold")
        return found

    @property
    def wanted(self) -> str:
        """Which verdicts pass, in words."""
        return f"below {self.threshold:g}" if self.keep_from is None else f"at least {self.threshold:g}"

    def reasons(self, rulings: Mapping[str, Ruling], name: str) -> tuple[str, ...]:
        """Why the row `name` is dropped; () for one that passes. A row without a verdict never does.

        Raises DatasetError for a row that nobody was asked about.
        """
        if name not in rulings:
            raise DatasetError(f"no judge was asked about the row {name!r}; submit again")
        ruling = rulings[name]
        if ruling.value is None:
            return (f"judge {self.role}: no verdict, {ruling.why}",)
        passes = ruling.value < self.threshold if self.keep_from is None else ruling.value >= self.threshold
        return () if passes else (f"judge {self.role}: not {self.wanted}",)

    def facts(self, rulings: Sequence[Ruling]) -> dict[str, Any]:
        """Rubric, threshold, rows with and without a verdict, mean and deciles (lowest to highest) of the verdicts."""
        values = sorted(each.value for each in rulings if each.value is not None)
        last = len(values) - 1
        return {
            "rubric": self.role,
            "keep": self.wanted,
            "judged": len(values),
            "unjudged": dict(Counter(each.why for each in rulings if each.value is None).most_common()),
            "mean": sum(values) / len(values) if values else None,
            "deciles": [values[round(part * last / 10)] for part in range(11)] if values else [],
        }
