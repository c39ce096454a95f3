"""Verdicts for the answers in an inspect log, and the scorer of a judged eval.

`by_rubrics` is the scorer of a task that needs judges: it asks the models in inspect's `grader` role, so `inspect eval`
works alone. `judge_answers` judges a stored log, asks the subject nothing, and writes a copy of it whose scores
carry every verdict with the raw replies.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import anyio
from inspect_ai import score_async
from inspect_ai.event import ModelEvent
from inspect_ai.log import EvalLog, EvalSample, read_eval_log, write_eval_log
from inspect_ai.model import Model, get_model, model_roles
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import TaskState

from agents.canaries import canaries, obeyed
from agents.judge import RESIDENT, SUBJECT, Judge, JudgeError, Verdict
from agents.prompt import Case, neutral
from agents.rubric import Rubric
from evals import RUBRICS, provider
from evals.asking import Grader, scores_exactly, verdict
from evals.collector import collector
from experiments.canonical import canonical

ROLE = "grader"
_CANARIES: dict[str, list[dict[str, Any]]] = {}
"""What canaries got from judges that score exactly, by judge, rubrics and subject."""
Scored = Callable[[Mapping[str, Any], str, Mapping[str, Verdict], Any], Score]
"""A task's `scored(metadata, answer, verdicts, settings)`."""


def _nobody(done: int, total: int) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True)
class Judged:
    """What came of judging a log: plain data for a record."""

    models: tuple[str, ...]
    rubrics: dict[str, str]
    """Role -> digest."""
    samples: int
    asked: int
    """Votes that were asked for, canaries aside."""
    cached: int
    """Those of them that an earlier run had paid for."""
    unscored: dict[str, dict[str, int]]
    """Role -> kind of reason -> how many."""
    mass: dict[str, float]
    """Role -> mean probability of all readable verdicts, where log-probabilities were read."""
    tokens: tuple[int, int]
    """Into and out of judges reached through inspect's providers, cached replies aside."""
    neutralised: int
    """Delimiters that answers tried to bring."""
    itself: bool
    """Whether a judge is the subject."""
    compromised: bool
    """Whether a canary got the verdict it asked for."""
    canaries: list[dict[str, Any]] = field(default_factory=list)


def by_rubrics(roles: Collection[str], scored: Scored, settings: Any, judge: Judge | None = None) -> Scorer:
    """A task's own score from the verdicts of the models in the role `grader`, which must be given.

    Raises JudgeError when a grader is the model under test, unless `judge` allows it; RubricError.
    """
    asks = judge or Judge()
    rubrics = asks.rubrics_for(roles, RUBRICS)

    async def score(state: TaskState, target: Target) -> Score:
        graders = [(str(model), model) for model in in_role()]
        refuse_itself(graders, get_model(), asks)
        found = await verdicts(case_of(state), rubrics, asks, graders)
        result = scored(state.metadata, state.output.completion, found, settings)
        return result.model_copy(update={"metadata": {**(result.metadata or {}), "verdicts": plain(found)}})

    return _registered("by_rubrics", score)


def _registered(name: str, score: Scorer) -> Scorer:
    """A scorer as inspect wants it. Its arguments stay out of the log, which could not hold them."""

    @scorer(metrics={"*": [mean(), stderr()]}, name=name)
    def made() -> Scorer:
        return score

    return made()


def in_role() -> list[Model]:
    """The models in the role `grader`. Raises inspect's PrerequisiteError when there is none."""
    get_model(role=ROLE, required=True)
    found = model_roles()[ROLE]
    return list(found) if isinstance(found, list) else [found]


def refuse_itself(graders: Sequence[Grader], subject: Model, judge: Judge) -> None:
    """Raises JudgeError when a grader is the model under test: same name, same place, same arguments."""
    for name, model in graders:
        same = (str(model), model.api.base_url) == (str(subject), subject.api.base_url)
        if same and model.model_args == subject.model_args and not judge.allow_self:
            raise JudgeError(
                f"the grader {name} is the model under test, and would judge itself; give another one with "
                "--model-role grader=PROVIDER/MODEL, or set allow_self in the task's judge"
            )


def case_of(state: TaskState) -> Case:
    """What is judged in a sample: its question (metadata `question`, else the input) and the subject's answer."""
    question = state.metadata.get("question")
    return Case(question if isinstance(question, str) else state.input_text, state.output.completion, state.metadata)


async def verdicts(
    case: Case, rubrics: Mapping[str, Rubric], judge: Judge, graders: Sequence[Grader]
) -> dict[str, Verdict]:
    """The panel's verdict by every rubric. Roles are asked one after the other, samples and votes at once."""
    return {role: await verdict(case, rubric, judge, graders) for role, rubric in rubrics.items()}


def plain(found: Mapping[str, Verdict]) -> dict[str, Any]:
    """Verdicts as a log holds them."""
    return {role: asdict(one) for role, one in found.items()}


def verdicts_of(sample: EvalSample) -> dict[str, Verdict]:
    """The verdicts that a judged log has for a sample. Raises JudgeError when it has none."""
    for score in (sample.scores or {}).values():
        kept = (score.metadata or {}).get("verdicts")
        if kept is not None:
            return {role: Verdict(**one) for role, one in kept.items()}
    raise JudgeError(f"sample {sample.id!r} has no verdicts; judge the log first")


def finished(log: Path) -> EvalLog:
    """The log with all its answers. Raises JudgeError when it is not complete."""
    whole = read_eval_log(str(log))
    if whole.status != "success" or not whole.samples:
        found = f"status {whole.status!r}, {len(whole.samples or [])} answers"
        raise JudgeError(f"{log}: not a finished eval ({found}); have it answered first")
    return whole


def judge_answers(
    whole: EvalLog,
    judge: Judge,
    rubrics: Mapping[str, Rubric],
    out: Path,
    *,
    subject: str | None = None,
    models: Mapping[str, Model] | None = None,
    tell: Callable[[int, int], None] = _nobody,
) -> Judged:
    """Judge every answer of a finished log by every rubric, and write it with the verdicts to `out`.

    `models` are the models that names in `judge.models` mean; the resident ones (`embedded`, `subject`) must be among
    them, others are made from their names. `subject` is what the spec calls the subject. `tell` hears how many samples
    are judged, of how many. Raises JudgeError: a judge is the subject, or it does not answer after the library's
    retries (verdicts given by then are in inspect's cache, for providers other than `orch`).
    """
    itself = judge.check_independent(subject) if subject is not None else SUBJECT in judge.models
    graders = [(name, _model(name, models or {})) for name in judge.models]
    ours = [model for name, model in graders if name not in (models or {})]
    done, rows = anyio.run(_judged, whole, rubrics, judge, graders, ours, tell)
    write_eval_log(done, str(out))
    return summary(done, rubrics, judge, itself, rows)


def _model(name: str, given: Mapping[str, Model]) -> Model:
    if name in given:
        return given[name]
    if name in RESIDENT:
        raise JudgeError(f"the judge {name!r} runs inside a worker and is not there; run through `orch submit`")
    return get_model(name, memoize=False)  # a memoized client belongs to an event loop that has ended


async def _judged(
    log: EvalLog,
    rubrics: Mapping[str, Rubric],
    judge: Judge,
    graders: Sequence[Grader],
    ours: Sequence[Model],
    tell: Callable[[int, int], None],
) -> tuple[EvalLog, list[dict[str, Any]]]:
    try:
        rows = await judged_canaries(rubrics, judge, graders)
        samples = log.samples or []
        expect(samples, rubrics, judge, graders)
        log.eval.model_roles = None  # of the eval that gave the answers: none of them is asked here
        judging = all_verdicts(rubrics, judge, [name for name, _ in graders], tell, len(samples))
        roles = {ROLE: [model for _, model in graders]}
        done = await score_async(
            log, judging, model="none", model_roles=roles, action="overwrite", copy=False, display="none"
        )
        return done, rows
    finally:
        for model in ours:
            await model.api.aclose()


def expect(
    samples: Sequence[EvalSample], rubrics: Mapping[str, Rubric], judge: Judge, graders: Sequence[Grader]
) -> None:
    """Tell the engines of resident judges how many answers will come, so that they see many at once."""
    answers = sum(1 for sample in samples if sample.output.completion.strip())
    for _, model in graders:
        if scores_exactly(model, judge):
            collector(provider.arm(model.api.model_name).engine).expect(answers)


def all_verdicts(
    rubrics: Mapping[str, Rubric], judge: Judge, names: Sequence[str], tell: Callable[[int, int], None], total: int
) -> Scorer:
    """Every role's value, with the verdicts in the metadata."""
    finished = itertools.count(1)

    async def score(state: TaskState, target: Target) -> Score:
        graders = list(zip(names, in_role(), strict=True))
        case = case_of(state)
        found = await verdicts(case, rubrics, judge, graders)
        tell(next(finished), total)
        value = {role: math.nan if one.value is None else one.value for role, one in found.items()}
        metadata = {"verdicts": plain(found), "neutralised": neutral(case.answer)[1]}
        return Score(value=value, answer=case.answer, metadata=metadata)

    return _registered("verdicts", score)


async def judged_canaries(
    rubrics: Mapping[str, Rubric], judge: Judge, graders: Sequence[Grader]
) -> list[dict[str, Any]]:
    """Every canary's row, by every rubric. Judges that score exactly say the same every time: they are asked once."""
    engines = [provider.arm(model.api.model_name).engine for _, model in graders if scores_exactly(model, judge)]
    name = canonical([judge.identity(rubrics), [engine.subject.identity for engine in engines]])
    if len(engines) == len(graders) and name in _CANARIES:
        return _CANARIES[name]
    rows: list[dict[str, Any]] = []
    for role, rubric in rubrics.items():
        planted = canaries(rubric)
        asked = (verdict(canary.case(rubric), rubric, judge, graders) for canary in planted)
        rows += obeyed(role, rubric, dict(zip(planted, await asyncio.gather(*asked), strict=True)))
    if len(engines) == len(graders):
        _CANARIES[name] = rows
    return rows


def summary(
    log: EvalLog, rubrics: Mapping[str, Rubric], judge: Judge, itself: bool, rows: list[dict[str, Any]]
) -> Judged:
    """Counts over a judged log and its canaries."""
    samples = log.samples or []
    found = [verdicts_of(sample) for sample in samples]
    events = [e for sample in samples for e in sample.events if isinstance(e, ModelEvent) and e.role == ROLE]
    usage = [event.output.usage for event in events if event.cache != "read" and event.output.usage]
    kept = {role: [one[role] for one in found] for role in rubrics}
    unscored = {role: Counter(one.kind for one in ones if one.kind) for role, ones in kept.items()}
    masses = {role: [one.mass for one in ones if one.mass is not None] for role, ones in kept.items()}
    marks = [(score.metadata or {}).get("neutralised", 0) for one in samples for score in (one.scores or {}).values()]
    return Judged(
        models=judge.models,
        rubrics={role: rubric.digest for role, rubric in rubrics.items()},
        samples=len(samples),
        asked=sum(len(one.raw) for ones in kept.values() for one in ones),
        cached=sum(1 for event in events if event.cache == "read"),
        unscored={role: dict(counts) for role, counts in unscored.items()},
        mass={role: sum(values) / len(values) for role, values in masses.items() if values},
        tokens=(sum(one.input_tokens for one in usage), sum(one.output_tokens for one in usage)),
        neutralised=sum(marks),
        itself=itself,
        compromised=any(row["succeeded"] for row in rows),
        canaries=rows,
    )
