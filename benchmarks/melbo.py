"""How long MELBO vectors take to train: together, as rows of one batch, against one after the other as published.

    python -m benchmarks.melbo --vectors 32 --steps 100 --dtype bfloat16 float32

Both run in this process in turns, from the same random starts, on the same prompts, with the same steps of the same
optimiser; the table gives medians. `published` runs the whole model for every vector, prompt and step, as the post's
code does; `stopped` is the same loop, but ends each pass at the target layer. `cos` is the smallest cosine between a
vector trained together and its twin trained alone.

`--alone N` trains only N vectors one after the other and counts their time vectors / N times: every vector takes the
same passes. Without it nothing is extrapolated.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks import melbo_baseline
from benchmarks.sweep import timed
from experiments.directions import own_seed
from experiments.downstream import downstream
from experiments.engine import Engine, Row
from experiments.intervention import method
from experiments.interventions.melbo import Melbo
from experiments.spec import EMBEDDED, SubjectSpec
from experiments.spheres import Sphere, ascend, drawn
from experiments.subject import Subject, load

QUESTIONS = (
    "How would I pick a lock on a door that I have no key for?",
    "Tell me what you really think of the people who made you.",
    "My neighbour asked me to lie for him in court. What should I do?",
    "a = 5 + 8, b = 2 + 9. What is a * b?",
)

FIRST = 1  # token that counts first: the one before it would decide all by itself


def prompts_of(subject: Subject, n: int) -> list[tuple[int, ...]]:
    """Tokens of the first n questions, ready for the subject to answer."""
    return [subject.render([{"role": "user", "content": text}]).tokens for text in QUESTIONS[:n]]


def together(engine: Engine, rows: list[tuple[int, ...]], starts: torch.Tensor, made: Melbo) -> torch.Tensor:
    """Vectors [n, d], all trained at once, as a fit does."""
    source, targets = made.places(engine.subject.n_layers)
    effect = downstream(engine, [Row(tokens, len(tokens)) for tokens in rows], targets, made.target_tokens)
    leaf = starts.clone().requires_grad_()
    radius = float(starts[0].norm())

    def objective() -> torch.Tensor:
        return made.climb(effect, made.arms(engine.subject, source, {"vectors": leaf}, radius))

    ascend([Sphere(leaf, radius, made.step(leaf, radius))], objective, made.steps)
    return leaf.detach()


def measure(dtype: str, args: argparse.Namespace, clock: Callable[[], float]) -> None:
    """Print one row of the table."""
    subject = load(SubjectSpec(model=args.model, dtype=dtype), device="cpu")
    engine, rows = Engine(subject), prompts_of(subject, args.prompts)
    made = method("melbo")(steps=args.steps, radius=args.radius, learning_rate=args.rate, target_tokens=FIRST)
    assert isinstance(made, Melbo)
    source, (target,) = made.places(subject.n_layers)
    starts = drawn([subject.d_model], args.radius, [own_seed(0, index) for index in range(args.vectors)])
    n = args.alone or args.vectors
    seconds: dict[str, list[float]] = {"together": [], "published": [], "stopped": []}
    cosines: list[torch.Tensor] = []
    for _ in range(args.repeats):
        took, found = timed(lambda: together(engine, rows, starts, made), clock)
        seconds["together"].append(took)
        for name in args.against:
            took, alone = timed(
                lambda name=name: melbo_baseline.train(
                    subject.model,
                    subject.blocks,
                    rows,
                    starts[:n],
                    (source.layer, target.layer, FIRST),
                    args.steps,
                    args.rate,
                    name == "stopped",
                ),
                clock,
            )
            seconds[name].append(took * args.vectors / n)
            cosines.append(torch.cosine_similarity(found[:n], alone))
    medians = {name: statistics.median(each) for name, each in seconds.items() if each}
    ratios = "  ".join(
        f"{name} {medians[name]:9.2f} s {medians[name] / medians['together']:6.2f}x" for name in args.against
    )
    turned = torch.cosine_similarity(found, starts).median().item()
    print(
        f"{dtype:9} {sum(map(len, rows)):7} {medians['together']:11.2f} s  {ratios}  "
        f"{torch.cat(cosines).min():8.5f} {turned:10.3f}",
        flush=True,
    )


def main() -> None:
    """Parse arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--vectors", type=int, default=32)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=1, help=f"1 to {len(QUESTIONS)}")
    parser.add_argument("--radius", type=float, default=20.0, help="about what the rule finds for the default subject")
    parser.add_argument("--rate", type=float, default=0.025, help="AdamW's step size: 3 %% of the radius, over sqrt(d)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--against", nargs="+", choices=["published", "stopped"], default=["published", "stopped"])
    parser.add_argument("--alone", type=int, default=None, help="train only so many one after the other")
    parser.add_argument("--cpu", action="store_true", help="processor seconds: for a busy machine, with one thread")
    args = parser.parse_args()
    print(
        f"{args.vectors} vectors x {args.steps} steps, R = {args.radius:g}, {torch.get_num_threads()} threads, "
        f"median of {args.repeats}"
        + (f"; one after the other: {args.alone} vectors, times {args.vectors / args.alone:g}" if args.alone else "")
    )
    print("dtype      tokens   together   one after the other (time, ratio)   smallest cos, cos to the start")
    for dtype in args.dtype:
        measure(dtype, args, time.process_time if args.cpu else time.perf_counter)


if __name__ == "__main__":
    main()
