"""Ask one eval of many arms in one inspect run, so that the engine sees all doses' questions at once."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inspect_ai import Task
from inspect_ai import eval as inspect_eval
from inspect_ai.log import EvalLog
from inspect_ai.model import GenerateConfig, get_model

from evals import provider
from evals.collector import collector
from evals.task import load_task
from experiments.edit import Edit

if TYPE_CHECKING:
    from experiments.engine import Engine

LOG_NAME = "answer.eval"


@dataclass(frozen=True)
class Arm:
    """One fitted intervention at one dose. `key` is its content hash; the base is the arm without edits."""

    key: str
    edits: Sequence[Edit] = ()
    label: str = ""


@dataclass(frozen=True)
class Answer:
    """What came of an arm. `log` is the `.eval` file; `error` is None exactly when the eval finished."""

    key: str
    log: Path | None
    seconds: float
    samples: int
    questions: int
    tokens: int
    error: str | None = None


def evaluate(
    engine: Engine,
    arms: Sequence[Arm],
    task: str,
    settings: Mapping[str, Any],
    folder: Callable[[str], Path],
    tell: Callable[[int, int], None] = lambda done, total: None,
    score: bool = True,
) -> list[Answer]:
    """Run `task` against every arm and put each log at `folder(key) / "answer.eval"`.

    Answers are in the order of `arms`. An arm whose requests fail has its error in its Answer; the other arms are
    not lost. Without `score` the logs hold answers that a judge is still to read.
    `tell` hears, from another thread, how many samples are answered, and of how many. Raises TaskError or
    ValueError for a task that cannot be built. One call at a time per process (an inspect rule), and never inside a
    running event loop.
    """
    keys = [arm.key for arm in arms]
    if len(set(keys)) != len(keys):
        raise ValueError(f"arms must have different keys, got {sorted(keys)}")
    build = getattr(load_task(task), task)
    for arm in arms:
        provider.register(arm.key, engine, arm.edits)
    try:
        with tempfile.TemporaryDirectory(prefix="orch-eval-") as logs:
            built = plain(build(**settings), task, settings)
            collector(engine).expect(len(arms) * len(built.dataset), tell)
            with without_git():
                found = run(built, arms, Path(logs), score)
            by_key = {log.eval.model.removeprefix("orch/"): log for log in found}
            return [answer(arm, by_key.get(arm.key), folder(arm.key)) for arm in arms]
    finally:
        for arm in arms:
            provider.unregister(arm.key)


def plain(built: Task, task: str, settings: Mapping[str, Any]) -> Task:
    """The task without its registration, for which inspect would search all installed packages once an arm."""
    metadata = {"task": task, "settings": dict(settings)}
    return Task(
        dataset=built.dataset,
        solver=built.solver,
        scorer=built.scorer,
        version=built.version,
        name=task,
        metadata=metadata,
    )


@contextmanager
def without_git() -> Iterator[None]:
    """inspect asks git three times an arm; the node's record names the commit once, so git finds no repository here."""
    before = os.environ.get("GIT_DIR")
    os.environ["GIT_DIR"] = os.devnull
    try:
        yield
    finally:
        del os.environ["GIT_DIR"]
        if before is not None:
            os.environ["GIT_DIR"] = before


def run(built: Task, arms: Sequence[Arm], logs: Path, score: bool) -> list[EvalLog]:
    """One inspect `eval()` over all arms, everything in flight at once, as little logging as keeps the log readable."""
    n_samples = len(built.dataset)
    return inspect_eval(
        built,
        model=[
            get_model(f"orch/{arm.key}", config=GenerateConfig(max_connections=100_000), memoize=False) for arm in arms
        ],
        log_dir=str(logs),
        log_format="eval",
        display="none",
        max_tasks=len(arms) + 1,
        max_samples=n_samples,
        log_realtime=False,
        log_model_api=False,
        log_images=False,
        log_buffer=n_samples,
        fail_on_error=True,
        score=score,
        score_display=False,
        ctl_server=False,
        tags=["orch"],
        metadata={"arms": {arm.key: arm.label for arm in arms}},
    )


def answer(arm: Arm, log: EvalLog | None, folder: Path) -> Answer:
    """Move the arm's log to its folder."""
    asked = provider.arm(arm.key).asked
    if log is None:
        return Answer(arm.key, None, 0.0, 0, asked[0], asked[1], f"inspect gave no log for orch/{arm.key}")
    path = folder / LOG_NAME
    folder.mkdir(parents=True, exist_ok=True)
    shutil.move(log.location.removeprefix("file://"), path)
    error = None
    if log.status != "success":
        error = log.error.message if log.error else f"the eval's status is {log.status}"
    samples = log.results.completed_samples if log.results else 0
    return Answer(arm.key, path, elapsed(log), samples, asked[0], asked[1], error)


def elapsed(log: EvalLog) -> float:
    """Wall seconds from the start to the end of the arm's eval (arms run side by side, so they do not add up)."""
    start, end = log.stats.started_at, log.stats.completed_at
    if not start or not end:
        return 0.0
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()
