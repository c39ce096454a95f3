"""A key is the digest of one canonical text, and re-keying is always a decision."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.canonical import identity_of, plain_of
from experiments.plugin import Versioned
from orchestrator.identity import CanonicalError, Shared, canonical, node_key, sha256

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def without_negative_zero(value: Any) -> Any:
    if isinstance(value, float):
        return value + 0.0
    if isinstance(value, list):
        return [without_negative_zero(item) for item in value]
    if isinstance(value, dict):
        return {key: without_negative_zero(item) for key, item in value.items()}
    return value


@given(plain)
def test_canonical_text_is_what_json_writes_with_sorted_keys(value: Any) -> None:
    text = json.dumps(without_negative_zero(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    assert canonical(value) == text


@given(plain)
def test_canonical_text_survives_a_trip_through_json(value: Any) -> None:
    assert canonical(json.loads(json.dumps(value))) == canonical(value)


def test_order_tuples_and_the_sign_of_zero_do_not_matter() -> None:
    assert canonical({"b": (1, 2), "a": -0.0}) == canonical({"a": 0.0, "b": [1, 2]}) == '{"a":0.0,"b":[1,2]}'


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": [1, {"b": float("nan")}]}, r"a\.1\.b: nan; only finite"),
        ({"a": float("-inf")}, r"a: -inf; only finite"),
        ({"a": Path("x")}, r"a: .*is a \w*Path"),
        ({"a": {1, 2}}, r"a: .*is a set"),
        ({"a": b"x"}, r"a: .*is a bytes"),
        ({1: 2}, r"the key 1 is a int"),
        ({"a": {1: 2, "b": 3}}, r"a: the key 1 is a int"),
        (object(), r"value: .*is a object"),
    ],
)
def test_what_has_no_canonical_text_is_refused_with_its_place(value: Any, words: str) -> None:
    with pytest.raises(CanonicalError, match=words):
        canonical(value)


@given(st.dictionaries(st.text(), plain))
def test_a_shared_part_changes_no_text_and_survives_pickling(value: dict[str, Any]) -> None:
    shared = Shared(value)
    assert canonical({"x": shared}) == canonical({"x": value})
    again = pickle.loads(pickle.dumps(shared))
    assert (again, again.text) == (value, shared.text)


def test_the_key_is_the_sha256_of_the_documented_json() -> None:
    content = {"stage": "fit", "version": 3, "params": {"b": 1.5, "a": None}, "inputs": {"data": "0" * 64}}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert node_key("fit", 3, content["params"], content["inputs"]) == hashlib.sha256(text.encode()).hexdigest()  # type: ignore


@pytest.mark.parametrize(
    ("node", "key"),
    [
        (
            ("dataset", 1, {"recipe": "r", "seed": 0}, {}),
            "9df0452136b4dcf950d5b9bec4e27d6c11a889fdff54fb179be04a023acb5040",
        ),
        (
            ("fit", 1, {"settings": {"layer": 14, "scale": 1.0}, "seed": 0}, {"data": "ab" * 32}),
            "55120d1d33879feeffb0ea000a64c299ffd03cc64acbcf65fc783d8bad9cf08e",
        ),
        (
            ("answer", 2, {"dose": -0.5, "system": "Süß 🦉", "n": None}, {"state": "cd" * 32}),
            "8398e8131ca1bb16ec9227b9a7b2340da96ef0e3b3daa2b772873c5faebd07aa",
        ),
    ],
)
def test_golden_keys(node: tuple[str, int, dict[str, Any], dict[str, str]], key: str) -> None:
    assert node_key(*node) == key


class Settings(Versioned):
    path: Path
    scale: float = 1.0
    names: tuple[str, ...] = ("a",)


def test_settings_of_equal_meaning_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("words")
    assert sha256(identity_of(Settings(path=path, scale=1))) == sha256(identity_of(Settings(path=path, scale=1.0)))


def test_a_file_enters_by_its_content_and_not_by_its_path(tmp_path: Path) -> None:
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    one.write_text("words")
    two.write_text("words")
    three.write_text("other")
    assert identity_of(Settings(path=one))["path"] == {"sha256": hashlib.sha256(b"words").hexdigest()}
    assert identity_of(Settings(path=one)) == identity_of(Settings(path=two)) != identity_of(Settings(path=three))
    assert plain_of(Settings(path=one)) == {"path": str(one), "scale": 1.0, "names": ["a"]}


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("words")
    before = identity_of(Settings(path=path))
    path.write_text("sword")  # of the same size
    os.utime(path, ns=(1, 1))
    assert identity_of(Settings(path=path)) != before
