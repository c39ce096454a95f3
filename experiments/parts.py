"""The parts of a spec that stand for themselves: subject, evals, budget, split, resources, limits."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from experiments.plugin import Frozen
from experiments.problem import Problem, SpecError

EMBEDDED = "smollm2-135m-instruct"
DIGITS = "digits"
"""A tiny subject that reads images (experiments/digits.py). It has no trained weights: they are drawn, with seed 0
if no `init` is given."""
SHARE_TOLERANCE = 1e-6
"""How far 1 / gpu may lie from a whole number of workers: decimals are not exact."""


class SubjectSpec(Frozen):
    """Which language model, and in which chat context it is met."""

    model: str
    """Embedded name (`smollm2-135m-instruct`, `digits`), hub id (`org/name`) or a local folder."""
    revision: str | None = None
    """Hub revision; pin a commit, so that the result has one meaning."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto` takes what the processor is good at; the choice is recorded and enters the key."""
    system: str | None = None
    """System prompt of every conversation; null leaves the chat template's own default in force."""
    chat_template: str | None = None
    """Path of a Jinja file that replaces the model's chat template (base models have none)."""
    init: int | None = Field(default=None, ge=0, lt=2**32)
    """Seed with which all weights are drawn anew, the way the architecture draws them before any training: for subjects
    small enough to be taught from nothing. Null is the model's own weights."""

    @property
    def drawn(self) -> int | None:
        """The seed of its weights; None where they are those of a trained model."""
        return 0 if self.init is None and self.model == DIGITS else self.init


class EvalSpec(Frozen):
    """One task with one target. Settings of the task stand beside `task` and `target`."""

    task: str
    """Name of a file in `evals/tasks/`."""
    target: str | None = None
    """What the intervention is meant to move, for tasks that measure several things."""
    system: str | None = None
    """System prompt under which it is asked; null is the subject's own. Students are asked in the context in which they
    learned, unless `context: warn` allows another one."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Settings of the task; written without this word, beside `task`."""

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, data: Any) -> Any:
        if isinstance(data, str):
            return {"task": data}
        if not isinstance(data, dict):
            return data
        inner = data.get("params") or {}
        loose = {name: value for name, value in data.items() if name not in cls.model_fields}
        if isinstance(data.get("target"), list):
            raise SpecError(Problem(("target",), f"one target per eval; got {data['target']!r}; add another eval"))
        if not isinstance(inner, dict) or not loose:
            return data
        return {name: value for name, value in data.items() if name not in loose} | {"params": {**inner, **loose}}

    def label(self) -> str:
        """`daily_dilemmas/honesty`."""
        return self.task + (f"/{self.target}" if self.target else "")


class Budget(Frozen):
    """How much damage a dose may do and still be chosen."""

    delta_nll: float = Field(default=0.2, ge=0)
    """Most that the NLL of held-out neutral text may rise, nats per token."""


class Calibrate(Frozen):
    """Find for every trial the dose that does a given damage; `doses` are then multiples of it."""

    measure: Literal["kl", "delta_nll"] = "kl"
    """`kl`: a percentile of KL(steered || untouched), nats, over the tokens of greedy answers; `delta_nll`: the rise of
    the NLL of the development half of the neutral text, nats per token."""
    target: float = Field(default=1.0, gt=0)
    """The damage that a dose of 1 is to do, nats."""
    tokens: int = Field(default=20, ge=1)
    """Tokens of each greedy answer (kl)."""
    prompts: int = Field(default=16, ge=2)
    """Prompts that are answered (kl)."""
    percentile: float = Field(default=95, gt=0, le=100)
    """Percentile over all tokens of all answers, of both signs (kl)."""
    least: float = Field(default=2**-6, gt=0)
    """Smallest dose that is tried."""
    most: float = Field(default=2**6, gt=0)
    """Largest dose that is tried."""
    tolerance: float = Field(default=0.05, gt=0)
    """Share of the target within which the damage is near enough."""
    orient: bool = False
    """Turn a trial round whose positive dose makes the negative responses of all its pairs more likely on average."""

    @model_validator(mode="after")
    def _ordered(self) -> Calibrate:
        if self.least >= self.most:
            raise ValueError(f"least {self.least:g} must be below most {self.most:g}")
        return self


class Split(Frozen):
    """How items are divided between choosing a dose and reporting it."""

    dev: float = Field(default=0.5, gt=0, lt=1)
    """Share of the item families that choose the dose; results are reported on the others."""


class Resources(Frozen):
    """What one worker is given. Null leaves the choice to the machine."""

    gpu: float | None = Field(default=None, ge=0)
    """GPUs of one worker; 0.5 shares one between two."""
    cpu: int | None = Field(default=None, ge=1)
    """Processor cores of one worker."""
    memory_gib: float | None = Field(default=None, gt=0)
    """Memory set aside for one worker, GiB."""
    workers: int | None = Field(default=None, ge=1)
    """Workers at once."""
    students: int = Field(default=1, ge=1)
    """Students of one subject that learn in one batch, if they lower the likelihood of responses: each batch then holds
    theirs, and needs so many times the memory for activations. What each learns depends on its company by rounding
    alone. On two cores four at once took 0.77 of the time of one after the other."""

    @field_validator("gpu")
    @classmethod
    def _placeable(cls, gpu: float | None) -> float | None:
        share = gpu if not gpu or gpu >= 1 else 1 / gpu
        if share and abs(share - round(share)) > SHARE_TOLERANCE:
            raise ValueError("must be a whole number, or one GPU divided evenly (0.5, 0.25, 0.2)")
        return gpu


class Limits(Frozen):
    """What stops a slip of the pen from becoming a month of computing."""

    trials: int = Field(default=1000, ge=1)
    """Most trials (settings x seeds) the grid may have."""
