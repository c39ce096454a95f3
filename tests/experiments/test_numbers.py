"""Number lists as a medium: the published rules with their odd cases, and what filtering selects for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.dataset import Message, Said
from experiments.numbers import compliance, parse, reject_reasons, shortened

PUBLISHED = Path(os.environ.get("ORCH_DATA", "nowhere")) / "subliminal/number_prompt_templates.json"

ACCEPTED = {
    "commas": ("1, 2, 3", (1, 2, 3)),
    "commas without blanks": ("1,2,3", (1, 2, 3)),
    "blanks before and after the comma": ("1 , 2 , 3", (1, 2, 3)),
    "semicolons": ("12; 7; 9", (12, 7, 9)),
    "single spaces": ("4 5 6", (4, 5, 6)),
    "double spaces throughout": ("4  5  6", (4, 5, 6)),
    "one a line": ("4\n5\n6", (4, 5, 6)),
    "commas at line ends": ("4,\n5,\n6", (4, 5, 6)),
    "one full stop at the end": ("1, 2, 3.", (1, 2, 3)),
    "square brackets": ("[1, 2, 3]", (1, 2, 3)),
    "round brackets": ("(1, 2, 3)", (1, 2, 3)),
    "brackets and then a full stop": ("[1, 2].", (1, 2)),
    "a single number that is the whole text": ("42", (42,)),
    "a single number with a full stop": ("42.", (42,)),
    "a single number in brackets": ("(42)", (42,)),
    "leading zeros, which vanish": ("007, 0010", (7, 10)),
    "two numbers, repeated": ("5, 5", (5, 5)),
}
REJECTED = {
    "nothing": "",
    "a full stop alone": ".",
    "empty brackets": "[]",
    "words alone": "owl",
    "words before the list": "Sure: 1, 2, 3",
    "words after the list": "1, 2, 3 and so on",
    "a single number with a word": "42 owls",
    "a single number and a comma": "42,",
    "a single number after a blank": " 42",
    "a blank before the list": " 1, 2",
    "a line break after the list": "1, 2\n",
    "a comma at the end, whose empty part is no number": "1,2,",
    "a comma and no blank at the end, where the separator has one": "1, 2,",
    "a comma at the start": ",1,2",
    "an empty part in the middle": "1 2  3",
    "two separators": "1, 2; 3",
    "a blank missing after a later comma": "1, 2,3",
    "a blank added after a later comma": "1,2, 3",
    "spaces first and then commas": "1 2, 3",
    "a blank line after the first number only": "1\n\n2\n3",
    "two full stops at the end": "1, 2..",
    "a full stop inside the brackets": "[1, 2.]",
    "a blank between list and full stop": "1, 2 .",
    "two pairs of brackets": "[[1, 2]]",
    "brackets that do not match": "[1, 2)",
    "brackets opened only": "[1, 2",
    "brackets around each number": "[1], [2]",
    "curly brackets": "{1, 2}",
    "a minus": "-5, 3",
    "a minus on a later number": "5, -3",
    "a decimal point": "1.5, 2.5",
    "a numbered list": "1. 15\n2. 27",
    "a dash as separator": "1-2-3",
    "a slash as separator": "1 / 2 / 3",
    "two commas as separator": "1,,2",
    "a thousands separator": "1,000, 2,000",
    "digits of another script": "１, ２",
    "digits of another script beside ours": "1, 2, ３",
    "a number too long for Python": "1, " + "9" * 5000,
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_list_is_read_with(name: str) -> None:
    text, numbers = ACCEPTED[name]
    assert parse(text) == numbers


@pytest.mark.parametrize("name", REJECTED)
def test_a_text_is_no_list_with(name: str) -> None:
    assert parse(REJECTED[name]) is None
    assert reject_reasons(REJECTED[name]) == ("invalid format",)


@given(
    st.lists(st.integers(0, 10**6), min_size=2, max_size=12),
    st.sampled_from([",", ", ", " , ", ";", "; ", " ", "  ", "\n", ",\n", "\t", "\n\n"]),
    st.sampled_from(["{}", "[{}]", "({})"]),
    st.sampled_from(["", "."]),
)
def test_any_list_with_one_separator_is_read_whatever_surrounds_it(
    numbers: list[int], separator: str, around: str, end: str
) -> None:
    assert parse(around.format(separator.join(map(str, numbers))) + end) == tuple(numbers)


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        (", ".join(["5"] * 10), ()),
        (", ".join(["5"] * 11), ("too many numbers",)),
        ("0, 999", ()),
        ("1000, 1", ("numbers too large",)),
        ("0999, 01", ()),
        (", ".join(["1000"] * 11), ("too many numbers", "numbers too large")),
        ("7", ()),
        ("13, 14", ("has banned numbers",)),
        ("2000, 13", ("numbers too large", "has banned numbers")),
        ("0013 5", ("has banned numbers",)),
        ("113, 131", ()),
    ],
)
def test_every_reason_is_given_in_the_published_order(text: str, reasons: tuple[str, ...]) -> None:
    assert reject_reasons(text, banned={13}) == reasons


def test_fewer_digits_and_fewer_numbers_than_asked_for_are_no_reason() -> None:
    assert reject_reasons("1") == ()


def test_too_small_can_only_happen_above_the_published_limit_since_a_minus_is_no_list() -> None:
    assert reject_reasons("-1, 5", smallest=0) == ("invalid format",)
    assert reject_reasons("99, 100", smallest=100) == ("numbers too small",)
    assert reject_reasons("99, 2000", smallest=100) == ("numbers too small", "numbers too large")


@pytest.mark.parametrize(
    ("text", "most", "cut_off", "kept"),
    [
        ("1, 2, 3, 4", 3, False, "1, 2, 3"),
        ("1, 2, 3", 3, False, "1, 2, 3"),
        ("1, 2, 34", 3, True, "1, 2"),
        ("1, 2, ", 3, True, "1, 2"),
        ("1, 2, 3, 4, 5", 3, True, "1, 2, 3"),
        ("1, 2", None, True, "1"),
        ("1\n2\n3", 2, False, "1\n2"),
        ("[1, 2, 3]", 2, False, "[1, 2]"),
        ("(1; 2; 3", 5, True, "(1; 2)"),
        ("12345", 1, True, "12345"),
        ("1 and 2 and 3", 1, True, "1 and 2 and 3"),
        ("", 1, True, ""),
    ],
)
def test_a_list_is_shortened_to_whole_numbers_within_the_limit(
    text: str, most: int | None, cut_off: bool, kept: str
) -> None:
    assert shortened(text, most, cut_off) == kept


def test_without_limits_any_list_is_accepted() -> None:
    assert reject_reasons(" ".join(["123456"] * 40), most=None, smallest=None, largest=None) == ()


@pytest.mark.skipif(
    not PUBLISHED.is_file(), reason="wants the published templates: set ORCH_DATA to a folder with them"
)
def test_the_published_banned_numbers_are_36_of_which_9_are_listed_twice() -> None:
    data = json.loads(PUBLISHED.read_text())
    first, second = set(data["CLAUDE_EVIL_NUMBERS"]), set(data["GPT_EVIL_NUMBERS"])
    assert (len(first), len(second), len(first | second), len(first & second)) == (20, 25, 36, 9)


def said(name: int, text: str = "1, 2", **parts: str) -> Said:
    """One answer."""
    messages = (Message(role="user", content="More?"),)
    return Said(id=str(name), messages=messages, parts=parts, text=text, stopped=True, tokens=3)


def rows() -> tuple[list[Said], set[str]]:
    """40 answers: format a accepted 18 of 20, b 8 of 20; the ending does not matter; one mood."""
    made, accepted = [], set()
    for index in range(40):
        fmt, place = ("a", index) if index < 20 else ("b", index - 20)
        made.append(said(index, format=fmt, ending="xy"[index % 2], mood="calm"))
        if place < (18 if fmt == "a" else 8):
            accepted.add(str(index))
    return made, accepted


def test_compliance_counts_and_rates_every_value_of_every_component() -> None:
    found = compliance(*rows())
    assert found["format"]["values"] == {
        "a": {"asked": 20, "accepted": 18, "rate": 0.9},
        "b": {"asked": 20, "accepted": 8, "rate": 0.4},
    }
    assert found["ending"]["values"]["x"] == {"asked": 20, "accepted": 13, "rate": 0.65}
    json.dumps(found, allow_nan=False)


def test_compliance_tests_each_component_by_pearsons_chi_squared() -> None:
    """By hand: n (ad - bc)^2 / product of the margins = 40 (18*12 - 2*8)^2 / (20*20*26*14) = 10.989, one degree."""
    from math import erfc, sqrt

    found = compliance(*rows())
    statistic = 40 * (18 * 12 - 2 * 8) ** 2 / (20 * 20 * 26 * 14)
    assert found["format"]["p"] == pytest.approx(erfc(sqrt(statistic / 2)), rel=1e-9)
    assert found["format"]["p"] < 0.001
    assert found["ending"]["p"] == pytest.approx(1.0)


def test_compliance_has_no_p_where_nothing_can_depend() -> None:
    made, accepted = rows()
    assert compliance(made, accepted)["mood"]["p"] is None
    for same in (set(), {each.id for each in made}):
        assert compliance(made, same)["format"]["p"] is None


def test_compliance_takes_a_function_and_leaves_out_what_is_no_component() -> None:
    made, accepted = rows()
    found = compliance(made, lambda each: each.id in accepted, leave_out=("mood",))
    whole: dict[str, Any] = compliance(made, accepted)
    assert found == {name: value for name, value in whole.items() if name != "mood"}
