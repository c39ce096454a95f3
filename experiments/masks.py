"""Masks: parts of a response that carry no loss, as characters of its text and as tokens of a subject.

Characters are what is stored, so that data with masks serve subjects of any tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from experiments.dataset import Span


def covered(tokens: Sequence[Span], masked: Sequence[Span]) -> list[int]:
    """Numbers of the tokens, given as the characters they hold, that hold any of the characters that are masked."""
    return [
        number
        for number, (first, stop) in enumerate(tokens)
        if any(first < behind and begin < stop for begin, behind in masked)
    ]


def spans_of(tokens: Sequence[Span], chosen: Iterable[int]) -> tuple[Span, ...]:
    """The characters of the chosen tokens, in as few parts as there are."""
    found: list[Span] = []
    for first, stop in sorted(tokens[number] for number in chosen):
        if first == stop:  # a token without a character of its own
            continue
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((first, stop))
    return tuple(found)
