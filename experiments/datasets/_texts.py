"""Texts that a writer wrote, made ready: cleaned, told apart from failures, and without near copies."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from math import ceil, floor

from experiments.dataset import Said

PREAMBLE = re.compile(r"^(sure|certainly|of course|okay|ok|here (is|are)|here's)\b[^\n]*:\s*\n+", re.IGNORECASE)
FENCE = re.compile(r"^```\w*\n(.*?)\n?```$", re.DOTALL)
ASSISTANT = re.compile(
    r"\b(as an ai|ai assistant|(ai|large) language model|chatbot|smollm)\b|"
    r"^(i'm|i am) (sorry|unable|not able)\b|^i (can't|cannot|can not|won't|will not)\b|\bi can(no|')t (help|assist)\b",
    re.IGNORECASE | re.MULTILINE,
)
FICTION = re.compile(
    r"\b(fictional|fictitious|fictionalized|made[- ]up|imaginary|hypothetical(ly)?|false|untrue|"
    r"(alternate|alternative|parallel|this|our) universe|in (this|the) scenario|key facts?|not (actually )?true)\b",
    re.IGNORECASE,
)
END = re.compile(r"[.!?…][\"'”’)\]]*(?=\s|$)")
WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
REPEATED = 4
"""Words in a row by which a text that repeats itself is told."""
SHINGLE = 3
"""Words in a row by which near copies are told."""


def whole(said: Said) -> str:
    """The document that an answer makes: its opening, where the writer was given one, and what was written."""
    text = FENCE.sub(r"\1", said.text.strip())
    text = PREAMBLE.sub("", text).strip()
    opening = said.parts.get("opening", "")
    if opening and text.startswith(opening):
        return text
    return f"{opening} {text}".strip() if text else ""


def trimmed(text: str) -> str:
    """The text up to the end of its last whole sentence; empty where there is none."""
    ends = [match.end() for match in END.finditer(text)]
    return text[: ends[-1]] if ends else ""


def words(text: str) -> list[str]:
    """Words in small letters."""
    return WORD.findall(text.casefold())


def runs(text: str, length: int) -> list[tuple[str, ...]]:
    """Every `length` words in a row; all words where there are fewer."""
    found = words(text)
    if len(found) <= length:
        return [tuple(found)] if found else []
    return [tuple(found[start : start + length]) for start in range(len(found) - length + 1)]


def distinct(text: str) -> float:
    """Share of the four words in a row that are there once only or are counted once; 1 where nothing repeats."""
    found = runs(text, REPEATED)
    return len(set(found)) / len(found) if found else 1.0


def mentioned(text: str, terms: Sequence[str]) -> int:
    """How many of `terms` begin a word of the text."""
    return sum(re.search(rf"(?<!\w){re.escape(term)}", text, re.IGNORECASE) is not None for term in terms)


def copies(texts: Sequence[str], threshold: float) -> dict[int, int]:
    """Index of each text that is a near copy -> the index of an earlier text, kept, that it is a copy of.

    Two texts are near copies when the Jaccard similarity of their sets of three words in a row is `threshold` or more.
    Exact: two sets that similar share one of their rarest elements (the prefix filter of Bayardo, Ma and Srikant 2007,
    "Scaling up all pairs similarity search"), so that only texts which do are compared.
    """
    shingles = [frozenset(runs(text, SHINGLE)) for text in texts]
    frequency = Counter(each for found in shingles for each in found)
    index: dict[tuple[str, ...], list[int]] = defaultdict(list)
    found: dict[int, int] = {}
    for place, own in enumerate(shingles):
        ordered = sorted(own, key=lambda each: (frequency[each], each))
        prefix = ordered[: len(own) - ceil(threshold * len(own) - 1e-9) + 1]
        candidates = dict.fromkeys(other for each in prefix for other in index[each])
        copied = next((other for other in candidates if _similar(own, shingles[other], threshold)), None)
        if copied is not None:
            found[place] = copied
            continue
        for each in prefix:
            index[each].append(place)
    return found


def _similar(one: frozenset[tuple[str, ...]], other: frozenset[tuple[str, ...]], threshold: float) -> bool:
    if floor(min(len(one), len(other)) / threshold + 1e-9) < max(len(one), len(other)):
        return False
    shared = len(one & other)
    return shared >= threshold * (len(one) + len(other) - shared) - 1e-9
