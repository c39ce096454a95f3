"""Lists of numbers as a medium: how an answer is read, why one is rejected, and what rejecting selects for.

The rules are those of subliminal learning (Cloud et al. 2025, https://arxiv.org/abs/2507.14805; `parse_response` and
`get_reject_reasons` of github.com/MinhxLe/subliminal-learning) with their odd cases, written from a description.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from experiments.dataset import Said

DIGITS = re.compile(r"[0-9]+")
SEPARATORS = ("", ",", ";")
"""What may stand between two numbers, blanks left aside."""
PAIRS = ("[]", "()")

INVALID = "invalid format"
TOO_MANY = "too many numbers"
TOO_SMALL = "numbers too small"
TOO_LARGE = "numbers too large"
BANNED = "has banned numbers"


def parse(text: str) -> tuple[int, ...] | None:
    """The numbers of an answer that is a list of numbers and nothing else; None for any other answer.

    One full stop at the end and then one pair of brackets around the whole are left out. What stands between the first
    two numbers is the separator, and the answer is split at exactly that text: `1, 2,3` is no list. Blanks outside
    brackets and separators are not forgiven. Leading zeros are, so `007` is 7.
    """
    text = text.removesuffix(".")
    if len(text) >= 2 and text[0] + text[-1] in PAIRS:
        text = text[1:-1]
    runs = list(DIGITS.finditer(text))
    if not runs:
        return None
    if len(runs) == 1:
        parts = [text]
    else:
        separator = text[runs[0].end() : runs[1].start()]
        if separator.strip() not in SEPARATORS:
            return None
        parts = text.split(separator)
    if not all(DIGITS.fullmatch(part) for part in parts):
        return None
    try:
        return tuple(int(part) for part in parts)
    except ValueError:  # more digits than Python turns into a number
        return None


def shortened(text: str, most: int | None, cut_off: bool) -> str:
    """The beginning of a list, with at most `most` numbers.

    Where the list was cut off, its last number may have gone on, and is left out. A bracket that the list opens with is
    closed. Other texts, and lists within the limit, stay as they are.
    """
    runs = list(DIGITS.finditer(text))
    separator = text[runs[0].end() : runs[1].start()] if len(runs) > 1 else ""
    if not separator or separator.strip() not in SEPARATORS:
        return text
    parts = text.split(separator)
    kept = (parts[:-1] if cut_off else parts)[:most]
    if len(kept) == len(parts):
        return text
    closing = next((pair[1] for pair in PAIRS if text[0] == pair[0]), "")
    return separator.join(kept) + closing


def reject_reasons(
    text: str,
    most: int | None = 10,
    smallest: int | None = 0,
    largest: int | None = 999,
    banned: Collection[int] = (),
) -> tuple[str, ...]:
    """Every reason to reject an answer, in the published order; () for one that is kept. A limit of None is no limit.

    Not looked at: how many digits a number was to have, and whether the format that was asked for was followed.
    """
    numbers = parse(text)
    if numbers is None:
        return (INVALID,)
    found = {
        TOO_MANY: most is not None and len(numbers) > most,
        TOO_SMALL: smallest is not None and min(numbers) < smallest,
        TOO_LARGE: largest is not None and max(numbers) > largest,
        BANNED: any(number in banned for number in numbers),
    }
    return tuple(reason for reason, holds in found.items() if holds)


def compliance(
    said: Iterable[Said], accepted: Callable[[Said], bool] | Collection[str], leave_out: Collection[str] = ()
) -> dict[str, Any]:
    """How often answers were accepted, for every value of every component of what was asked.

    `accepted` are the accepted answers' ids, or says it of one. Gives component -> `{"p": ..., "values": {value:
    {"asked", "accepted", "rate"}}}` as plain data, without the components in `leave_out`. `p` is that of Pearson's
    chi-squared test that acceptance does not depend on the value, without a continuity correction: a small one says
    that filtering changed what was asked. None where nothing can depend: one value, or all answers alike.
    """
    holds = accepted if callable(accepted) else (lambda each: each.id in accepted)
    counts: dict[str, dict[str, list[int]]] = {}
    for each in said:
        kept = int(holds(each))
        for component, value in each.parts.items():
            if component not in leave_out:
                tally = counts.setdefault(component, {}).setdefault(value, [0, 0])
                tally[0] += 1
                tally[1] += kept
    return {component: _component(values) for component, values in counts.items()}


def _component(values: Mapping[str, list[int]]) -> dict[str, Any]:
    return {
        "p": _association(list(values.values())),
        "values": {
            value: {"asked": asked, "accepted": kept, "rate": kept / asked}
            for value, (asked, kept) in sorted(values.items())
        },
    }


def _association(tallies: list[list[int]]) -> float | None:
    """p of the chi-squared test on (asked, accepted) by value."""
    from scipy.stats import chi2_contingency  # slow to import, and planning needs none

    asked, kept = (sum(column) for column in zip(*tallies, strict=True))
    if len(tallies) < 2 or kept in (0, asked):
        return None
    table = [[accepted, total - accepted] for total, accepted in tallies]
    return float(chi2_contingency(table, correction=False).pvalue)
