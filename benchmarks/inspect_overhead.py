"""What inspect costs: one sweep through `evaluate()` against the same rows handed to the engine directly.

The sweep is 4 directions x 5 doses x 100 dilemmas x 2 actions (4,000 rows) on the published DailyDilemmas, or on the
built-in ones where those are not at hand. Prints seconds of wall clock and of CPU for both, and their ratio.

    python benchmarks/inspect_overhead.py [model] [dilemmas]
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from evals import provider
from evals.evaluate import Arm, evaluate
from evals.items import items
from evals.tasks import _dilemmas as dilemmas
from evals.tasks import daily_dilemmas
from experiments.edit import Add, Site
from experiments.engine import Engine, Row
from experiments.spec import EMBEDDED, SubjectSpec
from experiments.subject import load

METHODS, DOSES = 4, (-2.0, -1.0, 0.0, 1.0, 2.0)
DATA = Path(os.environ.get("ORCH_DATA", "../shared/data"))
PUBLISHED = DATA / "daily_dilemmas" / "dilemma_to_action_to_values_aggregated.csv"


def arms_of(engine: Engine) -> list[Arm]:
    """4 random directions at mid depth, each at 5 doses; dose 0 is the base."""
    generator = torch.Generator().manual_seed(0)
    site = Site("resid", engine.subject.n_layers // 2)
    vectors = [torch.randn(engine.subject.d_model, generator=generator) for _ in range(METHODS)]
    return [
        Arm(f"m{number}d{dose:+g}", [Add(site, dose * vector)] if dose else [])
        for number, vector in enumerate(vectors)
        for dose in DOSES
    ]


def directly(engine: Engine, arms: list[Arm], settings: dict[str, Any]) -> int:
    """The same questions without inspect; returns the number of rows."""
    found, frameworks = daily_dilemmas.read(daily_dilemmas.Settings(**settings))
    chosen = dilemmas.select(found, frameworks, "honesty", settings["limit"], 0)
    ids = {name: engine.subject.exact_ids(spec["exact"]) for name, spec in daily_dilemmas.OPTIONS.items()}
    options = {name: tuple((token,) for token in tokens) for name, tokens in ids.items()}
    rendered = [
        engine.subject.render(provider.plain(question.messages()))
        for dilemma in chosen
        for question in daily_dilemmas.questions(
            {"situation": dilemma.situation, "to_do": dilemma.to_do.action, "not_to_do": dilemma.not_to_do.action},
            settings["orders"],
            daily_dilemmas.PREFILL,
        )
    ]
    rows = [Row(one.tokens, one.n_prompt, tuple(arm.edits)) for arm in arms for one in rendered]
    engine.option_logprobs(rows, [options] * len(rows), top=provider.TOP)
    return len(rows)


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """(result, wall seconds, CPU seconds of this process)."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def main(model: str, limit: int) -> None:
    """Run both, twice in turn, and print a line for each."""
    engine = Engine(load(SubjectSpec(model=model)))
    arms = arms_of(engine)
    data = str(PUBLISHED) if PUBLISHED.is_file() else "builtin"
    settings = {"limit": limit, "controls": 0, "data": data, "orders": "yes_first", "min_mass": 0.0}
    directly(engine, arms[:1], settings | {"limit": 2})  # warm up
    for _ in range(2):
        rows, wall, cpu = timed(lambda: directly(engine, arms, settings))
        with tempfile.TemporaryDirectory() as folder:
            answers, wall_2, cpu_2 = timed(
                lambda at=folder: evaluate(engine, arms, "daily_dilemmas", settings, lambda key: Path(at) / key)
            )
            _, wall_3, _ = timed(lambda found=answers: [items(answer.log) for answer in found if answer.log])
            size = sum(answer.log.stat().st_size for answer in answers if answer.log) / 1e6
        print(f"rows {rows}  engine {wall:.1f} s (CPU {cpu:.1f})  evaluate {wall_2:.1f} s (CPU {cpu_2:.1f})  "
              f"ratio {wall_2 / wall:.2f}  reading items {wall_3:.1f} s  logs {size:.1f} MB", flush=True)  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else EMBEDDED, int(sys.argv[2]) if len(sys.argv) > 2 else 100)
