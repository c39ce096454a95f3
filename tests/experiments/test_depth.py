"""Which layers a setting means."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from experiments.depth import DepthError, Depths, layers, shown


class Setting(BaseModel):
    at: Depths


@pytest.mark.parametrize(
    ("depths", "expected"),
    [
        (None, (15,)),
        (0, (0,)),
        (29, (29,)),
        (-1, (29,)),
        (0.5, (15,)),
        (0.99, (29,)),
        ("all", tuple(range(30))),
        ("10-12", (10, 11, 12)),
        ("-3--1", (27, 28, 29)),
        ("0.3-0.4", (9, 10, 11, 12)),
        ("1[0-9]", tuple(range(10, 20))),
        (".*[05]", (0, 5, 10, 15, 20, 25)),
        ((20, 0.5, "2-3", 20), (2, 3, 15, 20)),
    ],
)
def test_layers_are_named_by_number_fraction_range_and_pattern(depths: Any, expected: tuple[int, ...]) -> None:
    given = depths if depths is None else Setting(at=depths).at
    assert layers(given, 30) == expected


@pytest.mark.parametrize(
    ("depths", "reason"),
    [
        (30, "30 is out of range; the subject has layers 0 to 29"),
        (-31, "-31 is out of range"),
        ("10-40", "40 is out of range"),
        ("12-10", "'12-10' matches none of the layers 0 to 29"),
        ("9[0-9]", r"'9\[0-9\]' matches none"),
    ],
)
def test_layers_that_the_subject_lacks_are_refused(depths: Any, reason: str) -> None:
    with pytest.raises(DepthError, match=reason):
        layers(Setting(at=depths).at, 30)


@pytest.mark.parametrize("depths", [1.5, 0.0, True, "[", "twelve", "", (), None, (3, 2.0)])
def test_what_is_a_layer_in_no_subject_is_refused(depths: Any) -> None:
    with pytest.raises(ValidationError):
        Setting(at=depths)


def test_a_label_shows_layers_as_they_were_written() -> None:
    assert [shown(each) for each in (None, 14, 0.5, "10-14", (3, 7))] == ["Lmid", "L14", "L0.5", "L10-14", "L3,7"]
