"""What a teacher said as a log that judges read like any eval's answers, and the verdicts in it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalSample, EvalSpec, read_eval_log
from inspect_ai.model import ModelOutput

from evals.judging import verdicts_of
from experiments.dataset import Said
from experiments.verdicts import Ruling

NOBODY = "none/none"


def log_of(said: Sequence[Said], about: str | None) -> EvalLog:
    """A finished log in which every row is a sample: its prompt, and what was said. `about` fills a rubric's place."""
    names = [each.id for each in said]
    dataset = EvalDataset(name="rows", samples=len(names), sample_ids=names)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    spec = EvalSpec(created=created, task="rows", dataset=dataset, model=NOBODY, config=EvalConfig())
    return EvalLog(status="success", eval=spec, samples=[_sample(each, about) for each in said])


def _sample(said: Said, about: str | None) -> EvalSample:
    question = "\n\n".join(message.content for message in said.messages)
    metadata = {"question": question} | ({} if about is None else {"about": about})
    output = ModelOutput.from_content(NOBODY, said.text)
    return EvalSample(id=said.id, epoch=1, input=question, target="", output=output, metadata=metadata)


def rulings(log: Path) -> list[Ruling]:
    """The verdict on each row of a judged log, which has one rubric. Raises JudgeError for a row without any."""
    found = []
    for sample in read_eval_log(str(log)).samples or []:
        (verdict,) = verdicts_of(sample).values()
        found.append(Ruling(str(sample.id), verdict.value, verdict.kind))
    return found
