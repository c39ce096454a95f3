"""Training students, side by side in one process: orch's fit, and the PyTorch loop that people write.

Both train the same thing on the same lists of numbers in the same batches, with AdamW in float32 over a frozen model in
its own dtype: `bias_set`, a bias on the outputs of q_proj, k_proj and v_proj of all layers, or `lora` of rank 8 on all
linear modules. The loop is transformers' model with forward hooks, or with PEFT's adapter inside; batches padded on the
right, loss on response tokens; the lean loop computes no logits of the prompt. `--together 4` also trains four students
in one batch, told in seconds a student.

    python -m benchmarks.students [--method lora] [--rows 64] [--repeats 3] [--batch 8] [--dtype auto] [--together 4]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from experiments.adapters import injected
from experiments.dataset import Conversation, Message
from experiments.engine import Engine, Row
from experiments.intervention import method
from experiments.spec import EMBEDDED, SubjectSpec
from experiments.students import train_together
from experiments.subject import Subject, load
from experiments.training import Losses, Trained, batches, pace, row
from experiments.tuners import tuner_config
from experiments.weights import linear_modules

SITES = ("q_proj", "k_proj", "v_proj")


def lists(n: int) -> list[Conversation]:
    """Number lists as a teacher writes them."""
    rng = random.Random(0)

    def numbers(count: int) -> str:
        return ", ".join(str(rng.randrange(100, 1000)) for _ in range(count))

    asked = "Here are some numbers: {}. Continue with at most 10 more numbers of up to 3 digits, and commas. {}"
    end = ("Write nothing else.", "Only numbers, please.", "No words.")
    return [
        Conversation(
            id=str(index),
            messages=(
                Message(role="user", content=asked.format(numbers(rng.randint(3, 8)), rng.choice(end))),
                Message(role="assistant", content=numbers(6)),
            ),
        )
        for index in range(n)
    ]


def ours(engine: Engine, data: Sequence[Conversation], settings: Trained) -> list[float]:
    """Losses of orch's own fit."""
    found: list[float] = settings.fit(engine, data, 0).facts["losses"]
    return found


def abreast(engine: Engine, data: Sequence[Conversation], settings: Trained, n: int) -> list[float]:
    """Losses of the first of n students that learn in one batch, each in an order of its own."""
    students = [settings.begin(engine, data, seed)[0] for seed in range(n)]
    first = train_together(engine, students)[0]
    if not isinstance(first, Losses):
        raise first
    return list(first.curve)


@contextmanager
def biased(subject: Subject) -> Iterator[list[torch.Tensor]]:
    """The model with a bias on the outputs of SITES."""
    modules = [layer.self_attn.get_submodule(name) for layer in subject.blocks for name in SITES]
    biases = [torch.zeros(module.weight.shape[0], requires_grad=True) for module in modules]
    hooks = [
        module.register_forward_hook(lambda _, __, out, bias=bias: out + bias.to(out.dtype))
        for module, bias in zip(modules, biases, strict=True)
    ]
    try:
        yield biases
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def adapted(subject: Subject) -> Iterator[list[torch.Tensor]]:
    """The model with PEFT's LoRA inside, begun as orch's."""
    modules = linear_modules(subject, None, "all")
    config = tuner_config("lora", subject, modules, 8, {"lora_alpha": 16})
    with injected(subject, modules, config, 0) as adapter:
        yield adapter.parameters


def loop(subject: Subject, rows: Sequence[Row], settings: Trained, changed: Any, lean: bool) -> list[float]:
    """Losses of the loop; `lean` computes logits before response tokens alone, as orch does."""
    model = subject.model
    steps = -(-len(rows) // settings.batch_size) * settings.epochs
    losses = []
    with changed(subject) as parameters:
        optimiser = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        for step, batch in enumerate(batches(rows, settings, 0)):
            for group in optimiser.param_groups:
                group["lr"] = settings.learning_rate * pace(step, steps, settings)
            ids, mask, labels = padded(batch)
            optimiser.zero_grad(set_to_none=True)
            if lean:
                hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
                wanted = labels[:, 1:] != -100
                logits, answers = model.lm_head(hidden[wanted]).float(), labels[:, 1:][wanted]
            else:
                whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
                logits, answers = whole.float().flatten(0, 1), labels[:, 1:].flatten()
            loss = torch.nn.functional.cross_entropy(logits, answers, ignore_index=-100)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimiser.step()
            losses.append(loss.item())
    return losses


def padded(batch: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, mask and labels [n, longest]."""
    longest = max(len(each.tokens) for each in batch)
    ids, mask = torch.zeros(len(batch), longest, dtype=torch.long), torch.zeros(len(batch), longest, dtype=torch.long)
    labels = torch.full((len(batch), longest), -100)
    for index, each in enumerate(batch):
        tokens = torch.tensor(each.tokens)
        ids[index, : len(tokens)], mask[index, : len(tokens)] = tokens, 1
        labels[index, each.n_prompt : len(tokens)] = tokens[each.n_prompt :]
    return ids, mask, labels


def timed(work: Callable[[], list[float]]) -> tuple[float, list[float]]:
    """Seconds, and the losses."""
    started = time.perf_counter()
    losses = work()
    return time.perf_counter() - started, losses


def main() -> None:
    """Print a line for each side, alternating, and the ratio of medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=["bias_set", "lora"], default="bias_set")
    parser.add_argument("--together", type=int, nargs="*", default=[], help="also so many students in one batch")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    given: Any = parser.parse_args()
    subject = load(SubjectSpec(model=EMBEDDED, dtype=given.dtype))
    engine = Engine(subject)
    data = lists(given.rows)
    own = {"bias_set": {"sites": ["q", "k", "v"]}, "lora": {"rank": 8, "alpha": 16}}[given.method]
    rate = {"bias_set": 0.01, "lora": 1e-3}[given.method]
    settings: Any = method(given.method).model_validate(
        {**own, "epochs": 1, "batch_size": given.batch, "learning_rate": rate}
    )
    changed = {"bias_set": biased, "lora": adapted}[given.method]
    rows = [row(engine, each) for each in data]
    sides: dict[str, Callable[[], list[float]]] = {
        "orch": lambda: ours(engine, data, settings),
        "loop": lambda: loop(subject, rows, settings, changed, lean=False),
        "lean loop": lambda: loop(subject, rows, settings, changed, lean=True),
    }
    sizes = {"orch": 1, "loop": 1, "lean loop": 1}
    for n in given.together:
        sides[f"orch, {n} students"] = lambda n=n: abreast(engine, data, settings, n)
        sizes[f"orch, {n} students"] = n
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    curves: dict[str, list[float]] = {}
    for repeat in range(given.repeats + 1):  # the first one warms up
        for name, work in sides.items():
            took, curves[name] = timed(work)
            if repeat:
                seconds[name].append(took / sizes[name])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    tokens = sum(len(each.tokens) for each in rows)
    print(
        f"{given.method}, {subject.dtype}, {given.rows} rows, {tokens:,} tokens, batch {given.batch}, "
        f"{torch.get_num_threads()} threads"
    )
    for name, values in seconds.items():
        print(f"{name}: {medians[name]:.2f} s (of {', '.join(f'{each:.2f}' for each in values)})")
    for name in list(sides)[1:]:
        far = max(abs(a - b) for a, b in zip(curves["orch"], curves[name], strict=True))
        print(
            f"orch takes {medians['orch'] / medians[name]:.2f} of the {name}'s time; losses differ by at most {far:.4f}"
        )


if __name__ == "__main__":
    main()
