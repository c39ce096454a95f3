"""Words that an answer may not hold, found also inside the names that code is full of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Annotated

from pydantic import AfterValidator

RUN = re.compile(r"[^\W\d_]+")
"""Letters without a break: `red_owl` has two runs."""
CAMEL = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[^\W\d_A-Za-z]+")
"""Words within a run: `RedOwl` has two."""


def _phrase(text: str) -> str:
    if not RUN.search(text):
        raise ValueError(f"must be a word or several; got {text!r}, without a letter")
    return text


Phrase = Annotated[str, AfterValidator(_phrase)]
"""One word, or several in a row."""


def has_words(text: str, phrases: Iterable[str]) -> bool:
    """Whether one of the phrases stands in the text in whole words, whatever their case: `owl` is in `RedOwl` and
    `red_owl`, but not in `bowl`; a plural is a word of its own."""
    readings = [[word.lower() for word in pattern.findall(text)] for pattern in (RUN, CAMEL)]
    return any(_in_a_row(RUN.findall(phrase.lower()), reading) for phrase in phrases for reading in readings)


def _in_a_row(wanted: Sequence[str], words: Sequence[str]) -> bool:
    size = len(wanted)
    return any(list(wanted) == words[start : start + size] for start in range(len(words) - size + 1))
