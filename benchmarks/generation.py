"""How long number completions take: the engine against `transformers.generate` and, where it is installed, vLLM.

    python -m benchmarks.generation --rows 1000 --tokens 36 --dtype bfloat16 --repeats 3

The three get the same rows (the first `number_asks`) and sample at temperature 1, in turns, `--repeats` times; the
table has the fastest run of each. `transformers` is its `generate` on left-padded batches of the sizes given. `vLLM` is
the server of `orchestrator/server.py`, asked over HTTP by `--connections` at once; its start is told apart. Samplers
differ, so answers may end at different lengths: tokens are those that came out.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from experiments.dataset import Ask, recipe
from experiments.engine import Engine, Row
from experiments.identity import model_folder
from experiments.spec import EMBEDDED, SubjectSpec
from experiments.subject import Subject, load
from orchestrator.server import Server, ServerError, serving


class Run(NamedTuple):
    """One measured run."""

    seconds: float
    tokens: int
    """That came out, all rows together."""


def rows_of(subject: Subject, n: int) -> list[tuple[int, ...]]:
    """Tokens of n prompts, ready for the subject to answer."""
    asks = recipe("number_asks")(n=n).build(None, 0)
    return [subject.render(ask.messages).tokens for ask in asks if isinstance(ask, Ask)]


def measured(work: Callable[[], int]) -> Run:
    """How long `work` takes, which says how many tokens it made."""
    gc.collect()
    start = time.perf_counter()
    tokens = work()
    return Run(time.perf_counter() - start, tokens)


def by_engine(engine: Engine, rows: Sequence[tuple[int, ...]], tokens: int) -> int:
    """Tokens that the engine made."""
    asked = [Row(row, len(row)) for row in rows]
    made = engine.generate(asked, tokens, temperature=1.0, seeds=range(len(rows)))
    return sum(len(completion.tokens) for completion in made)


def by_transformers(model: Any, rows: Sequence[tuple[int, ...]], tokens: int, batch: int, ends: Sequence[int]) -> int:
    """Tokens that `generate` made, those behind an end not counted."""
    made = 0
    for at in range(0, len(rows), batch):
        some = rows[at : at + batch]
        longest = max(map(len, some))
        ids = torch.tensor([[ends[0]] * (longest - len(row)) + list(row) for row in some])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in some])
        options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        found = model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, eos_token_id=list(ends), pad_token_id=ends[0], **options
        )[:, longest:]
        ended = torch.isin(found, torch.tensor(list(ends))).cumsum(1)
        made += int((ended.cumsum(1) <= 1).sum())
    return made


def by_server(server: Server, rows: Sequence[tuple[int, ...]], tokens: int, connections: int) -> int:
    """Tokens that the server made."""
    headers = {"Authorization": f"Bearer {server.api_key}", "Content-Type": "application/json"}

    def ask(row: tuple[int, ...]) -> int:
        body = {"model": server.models[0], "prompt": row, "max_tokens": tokens, "temperature": 1.0}
        request = urllib.request.Request(f"{server.base_url}/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=3600) as reply:
            return int(json.load(reply)["usage"]["completion_tokens"])

    with ThreadPoolExecutor(connections) as pool:
        return sum(pool.map(ask, rows))


def here(subject: Subject, folder: Path, rows: Sequence[tuple[int, ...]], args: argparse.Namespace) -> dict[str, Run]:
    """The fastest run of the engine and of transformers by batch size, in turns."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=subject.dtype).eval()
    engine, ends = Engine(subject), sorted(subject.eos_ids)
    works: dict[str, Callable[[], int]] = {"engine": lambda: by_engine(engine, rows, args.tokens)}
    for batch in args.batch:
        works[f"transformers, {batch} rows"] = lambda batch=batch: by_transformers(
            plain, rows, args.tokens, batch, ends
        )
    runs: dict[str, list[Run]] = {name: [] for name in works}
    for _ in range(args.repeats):
        for name, work in works.items():
            runs[name].append(measured(work))
    return {name: min(found) for name, found in runs.items()}


def served(folder: Path, rows: Sequence[tuple[int, ...]], args: argparse.Namespace) -> dict[str, Run]:
    """The fastest run of vLLM, eager and compiled as asked for; none, and a line that says why, where it is missing."""
    best = {}
    longest = max(map(len, rows)) + args.tokens
    for kind in args.vllm:
        start = time.perf_counter()
        try:
            with serving(folder, args.dtype, eager=kind == "eager", max_tokens=longest, threads=args.threads) as up:
                print(f"vLLM, {kind}: came up in {time.perf_counter() - start:.0f} s", flush=True)
                work = [
                    measured(lambda: by_server(up, rows, args.tokens, args.connections)) for _ in range(args.repeats)
                ]
        except ServerError as error:
            print(f"vLLM, {kind}: not measured: {error}")
            continue
        best[f"vLLM, {kind}"] = min(work)
    return best


def main() -> None:
    """Parse arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=36, help="at most so many new tokens a row")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 64], help="rows of a batch of transformers")
    parser.add_argument("--vllm", nargs="*", choices=["eager", "compiled"], default=["eager"])
    parser.add_argument("--connections", type=int, default=128, help="requests to vLLM under way at once")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    spec = SubjectSpec(model=args.model, dtype=args.dtype)
    folder = model_folder(spec, weights=True)
    subject = load(spec, device="cpu")
    rows = rows_of(subject, args.rows)
    print(f"{len(rows)} rows, {sum(map(len, rows))} tokens, up to {args.tokens} new ones each, {args.dtype}, "
          f"{args.threads} threads, best of {args.repeats}", flush=True)  # fmt: skip
    runs = here(subject, folder, rows, args)
    runs |= served(folder, rows, args)
    usual = min(run.seconds for name, run in runs.items() if name.startswith("transformers"))
    print("                            seconds   new tokens   tokens/s   times the best of transformers")
    for name, run in runs.items():
        rate = run.tokens / run.seconds
        print(f"{name:26} {run.seconds:8.1f} {run.tokens:12} {rate:10.0f} {usual / run.seconds:8.2f}x")


if __name__ == "__main__":
    main()
