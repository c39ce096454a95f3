"""How long a sweep of 4 vectors x 5 doses over forced choices takes: the engine against the loop people write.

    ORCH_DATA=../shared/data python benchmarks/sweep.py --rows 200 --dtype float32 bfloat16

Both run in this process in turns, on the same rows, vectors and dtype; the table gives the medians. Rows are real
dilemmas, two actions each, in the data's order. The vectors are random directions of a tenth of the residual stream's
norm: time does not depend on where they point.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import baseline
from experiments.edit import Add, Site
from experiments.engine import Engine, Row
from experiments.spec import EMBEDDED, SubjectSpec
from experiments.subject import Subject, load

CSV = "daily_dilemmas/dilemma_to_action_to_values_aggregated.csv"
DOSES = (-2.0, -1.0, 0.0, 1.0, 2.0)
METHODS = 4
PROMPT = (
    "Read the situation and the action, then decide. Answer with yes or no.\n\n"
    "Situation: {dilemma_situation}\n\nAction: {action}\n\nDo you take this action?"
)
PREFILL = "My choice:"


def rows_of(subject: Subject, n: int) -> list[tuple[int, ...]]:
    """Tokens of the first n questions in the data's order."""
    folder = Path(os.environ.get("ORCH_DATA", "../shared/data"))
    with (folder / CSV).open(encoding="utf-8", newline="") as file:
        records = [record for record, _ in zip(csv.DictReader(file), range(n), strict=False)]
    messages = ([("user", PROMPT.format(**record)), ("assistant", PREFILL)] for record in records)
    return [subject.render([{"role": r, "content": c} for r, c in each]).tokens for each in messages]


def vectors(engine: Engine, rows: list[tuple[int, ...]], site: Site) -> list[torch.Tensor]:
    """Random directions, a tenth as long as what is there."""
    norm = (
        engine.activations([Row(tokens, len(tokens)) for tokens in rows[:8]], [site], "last")[site].norm(dim=-1).mean()
    )
    random = torch.Generator().manual_seed(0)
    drawn = [torch.randn(engine.subject.d_model, generator=random) for _ in range(METHODS)]
    return [(0.1 * norm * each / each.norm()).to(engine.subject.dtype) for each in drawn]


def engine_sweep(
    engine: Engine, rows: list[tuple[int, ...]], arms: list[tuple[torch.Tensor, float]], site: Site, yes: Any, no: Any
) -> torch.Tensor:
    """[arms, rows] log-odds, in one call."""
    edits = [(Add(site, dose * vector),) if dose else () for vector, dose in arms]
    asked = [Row(tokens, len(tokens), edit) for edit in edits for tokens in rows]
    options = {"yes": [(token,) for token in yes], "no": [(token,) for token in no]}
    scores = engine.option_logprobs(asked, [options] * len(asked))
    odds = torch.tensor([each.logprobs["yes"] - each.logprobs["no"] for each in scores])
    return odds.view(len(arms), len(rows))


def timed(work: Callable[[], torch.Tensor], clock: Callable[[], float]) -> tuple[float, torch.Tensor]:
    """Seconds, and what came out."""
    start = clock()
    result = work()
    return clock() - start, result


def measure(dtype: str, args: argparse.Namespace) -> None:
    """Print one row of the table."""
    subject = load(SubjectSpec(model=args.model, dtype=dtype), device="cpu")
    engine = Engine(subject, **({"max_tokens": args.max_tokens} if args.max_tokens else {}))
    site = Site("resid", subject.n_layers // 2)
    rows = rows_of(subject, args.rows)
    arms = [(vector, dose) for vector in vectors(engine, rows, site) for dose in DOSES]
    yes, no = subject.exact_ids(["yes", "Yes", "YES"]), subject.exact_ids(["no", "No", "NO"])
    pad, block = subject.tokenizer.pad_token_id or 0, subject.blocks[site.layer]
    clock = time.process_time if args.cpu else time.perf_counter
    loop, packed, difference = [], [], 0.0
    for _ in range(args.repeats):
        # As from_pretrained leaves them: without gradients torch multiplies the last position's head row by row.
        subject.model.requires_grad_(True)
        seconds, expected = timed(lambda: baseline.sweep(subject.model, block, rows, arms, yes, no, pad), clock)
        loop.append(seconds)
        subject.model.requires_grad_(False)
        seconds, found = timed(lambda: engine_sweep(engine, rows, arms, site, yes, no), clock)
        packed.append(seconds)
        difference = max(difference, (expected - found).abs().max().item())
    slow, quick = statistics.median(loop), statistics.median(packed)
    tokens = sum(map(len, rows)) * len(arms)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{dtype:9} {len(rows):5} {slow:8.2f} {quick:8.2f} {slow / quick:6.2f}x {difference:12.2e} "
        f"{tokens / slow:9.0f} {tokens / quick:9.0f} {memory:9.2f}",
        flush=True,
    )


def main() -> None:
    """Parse arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--max-tokens", type=int, default=None, help="default: the engine's own")
    parser.add_argument("--cpu", action="store_true", help="processor seconds: for a busy machine, with one thread")
    args = parser.parse_args()
    print(f"{METHODS} vectors x {len(DOSES)} doses, {torch.get_num_threads()} threads, median of {args.repeats}")
    print("dtype      rows   loop s engine s  ratio  |difference|  loop t/s engine t/s  peak GiB")
    for dtype in args.dtype:
        measure(dtype, args)


if __name__ == "__main__":
    main()
