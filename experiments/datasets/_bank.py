"""The prompts that recipes draw from, and how the subject answers them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.dataset import DatasetError, Message

if TYPE_CHECKING:
    from experiments.engine import Engine

PROMPTS = Path(__file__).with_name("prompts.txt")
STATEMENTS = Path(__file__).with_name("statements.txt")
ATTEMPTS = 4


def lines(path: Path, what: str = "prompt") -> tuple[str, ...]:
    """Non-empty lines of a UTF-8 text file, in order; each is a `what`.

    Raises DatasetError when it cannot be read, is empty or repeats a line.
    """
    try:
        found = tuple(line.strip() for line in path.read_text(encoding="utf-8").split("\n") if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read: {error}; give a UTF-8 text file with one {what} a line") from error
    if not found:
        raise DatasetError(f"{path}: no {what}s; write one a line")
    if len(set(found)) < len(found):
        repeated = next(line for index, line in enumerate(found) if line in found[:index])
        raise DatasetError(f"{path}: the {what} {repeated!r} is there twice; each must differ")
    return found


def check_size(n: int, path: Path | None) -> None:
    """Raise DatasetError when the bank holds fewer than `n` prompts."""
    size = len(lines(path or PROMPTS))
    if n > size:
        bank = str(path) if path else "the built-in bank"
        fix = "add prompts to the file" if path else "give a longer file as `prompts`"
        raise DatasetError(f"n={n}, but {bank} holds {size} prompts; set n to at most {size}, or {fix}")


def draw_prompts(n: int, path: Path | None, seed: int) -> list[str]:
    """`n` different prompts, drawn without replacement. Raises DatasetError when the bank is smaller."""
    check_size(n, path)
    return random.Random(seed).sample(lines(path or PROMPTS), n)


def draw_statements(n: int, seed: int) -> list[str]:
    """`n` beginnings of statements: each cut after a random number of words, two at least and never whole.

    Different cut points let the contrast show itself at many places in a sentence, as in repeng's truncated outputs.
    """
    rng = random.Random(seed)
    words = [rng.choice(lines(STATEMENTS)).split() for _ in range(n)]
    return [" ".join(statement[: rng.randint(2, len(statement) - 1)]) for statement in words]


def answers(
    engine: Engine, prompts: Sequence[str], system: str | None, max_new_tokens: int, temperature: float, seed: int
) -> list[str]:
    """What the subject says to each prompt under `system`; None is its own context.

    An empty answer (end of turn at once, or blanks only) is drawn again from the next seed.
    Raises DatasetError when the subject stays silent.
    """
    from experiments.engine import Row  # torch comes with it, and planning needs none

    subject = engine.subject
    found: dict[int, str] = {}
    for attempt in range(ATTEMPTS):
        missing = [index for index in range(len(prompts)) if index not in found]
        rendered = [subject.render([Message(role="user", content=prompts[i])], system=system) for i in missing]
        completions = engine.generate(
            [Row(each.tokens, each.n_prompt) for each in rendered],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seeds=[_seed(seed, system, prompts[i], attempt) for i in missing],
        )
        for index, completion in zip(missing, completions, strict=True):
            text = subject.tokenizer.decode(completion.tokens, skip_special_tokens=True).strip()
            if text:
                found[index] = text
        if len(found) == len(prompts):
            return [found[index] for index in range(len(prompts))]
    silent = next(prompt for index, prompt in enumerate(prompts) if index not in found)
    raise DatasetError(
        f"the subject answered {silent!r} with nothing in {ATTEMPTS} draws under system prompt {system!r}; "
        "raise the temperature, or change the prompts"
    )


def _seed(seed: int, system: str | None, prompt: str, attempt: int) -> int:
    """A seed of its own for every answer, so that one more prompt changes no other answer."""
    text = f"{seed}\0{attempt}\0{system}\0{prompt}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
