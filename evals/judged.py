"""The items of a judged log: what a task makes of the verdicts, without asking anybody anything."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inspect_ai.log import read_eval_log

from evals.items import Item, of_score
from evals.judging import verdicts_of
from evals.task import load_task


def judged_items(log: Path, task: str, arguments: Mapping[str, Any]) -> list[Item]:
    """Items of a log that `judging.judge_answers` wrote, in order of their ids. Raises JudgeError without verdicts."""
    module = load_task(task)
    settings = module.Settings(**arguments)
    samples = read_eval_log(str(log)).samples or []
    found = [
        of_score(
            str(sample.id),
            module.scored(sample.metadata, sample.output.completion, verdicts_of(sample), settings),
        )
        for sample in samples
    ]
    return sorted(found, key=lambda one: one.id)
