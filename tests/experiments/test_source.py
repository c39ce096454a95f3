"""YAML in, plain data with positions out, and nothing dangerous in between."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import yaml

from experiments.problem import SpecError
from experiments.source import MOST_BYTES, parse, read

TEXT = """\
name: owl
subject: {model: m, dtype: float32}
interventions:
  - method: mean_diff
    layer: [10, 14]
  - {method: lora, rank: 8}
"""


def test_values_equal_what_safe_load_reads() -> None:
    assert parse(TEXT).data == yaml.safe_load(TEXT)


@pytest.mark.parametrize(
    ("path", "where"),
    [
        (("name",), "1:1"),
        (("subject", "dtype"), "2:21"),
        (("interventions", 0, "layer"), "5:5"),
        (("interventions", 0, "layer", 1), "5:17"),
        (("interventions", 1, "rank"), "6:20"),
        (("interventions", 1, "absent"), "6:5"),
        (("nowhere",), "1:1"),
    ],
)
def test_where_gives_line_and_column_of_the_nearest_place(path: tuple[str | int, ...], where: str) -> None:
    assert parse(TEXT, "s.yaml").where(path) == f"s.yaml:{where}"


def test_scalars_keep_the_meaning_a_researcher_expects() -> None:
    text = (
        "{a: 1e-4, b: 1.5, c: 1_000, d: 0x1f, e: 2024-01-02, f: 1:30, g: no, h: ~, i: -.inf, j: '012', k: null, l: -2}"
    )
    data = parse(text).data
    assert data == {
        "a": "1e-4", "b": 1.5, "c": 1000, "d": 31, "e": "2024-01-02", "f": "1:30", "g": False, "h": None,
        "i": -math.inf, "j": "012", "k": None, "l": -2,
    }  # fmt: skip
    assert math.isnan(parse("a: .nan").data["a"])


def test_keys_are_words_whatever_they_look_like() -> None:
    assert parse("{no: 1, 12: 2, on: 3}").data == {"no": 1, "12": 2, "on": 3}


def test_an_alias_is_its_anchor_written_out() -> None:
    assert parse("a: &x [1, 2]\nb: *x").data == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        ("a: !!python/object/apply:os.system ['true']", ":1:4:", "tag"),
        ("a: !thing 1", ":1:4:", "tag"),
        ("a: !!binary aGk=", ":1:4:", "tag"),
        ("a: 1\nb: 2\na: 3", ":3:1:", "given twice; the first is on line 1"),
        ("a: 1\n---\nb: 2", ":2:1:", "second document"),
        ("a:\n\tb: 1", ":2:1:", "tab"),
        ("a: [1, 2", ":2", "not YAML"),
        ("a: b: c", ":1:5:", "mapping values"),
        ("a: 010", ":1:4:", "leading zero; write 10"),
        ("a: &x [*x]", ":1:", "contains its own alias"),
        ("a: {<<: {b: 1}}", ":1:5:", "merge"),
        ("{[1]: 2}", ":1:2:", "keys are words"),
        ("a: *nothing", ":1:4:", "undefined alias"),
        ("a: x\x00", ":1:5:", "U+0000"),
        ("a: " + "[" * 60 + "]" * 60, ":1:", "nested deeper"),
        ("", "", "empty"),
        ("# only a comment\n", "", "empty"),
    ],
)
def test_bad_text_is_refused_with_its_place(text: str, where: str, words: str) -> None:
    with pytest.raises(SpecError) as error:
        parse(text, "s.yaml")
    assert f"s.yaml{where}" in str(error.value)
    assert words in str(error.value)


def test_a_yaml_bomb_is_refused_at_once() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    started = time.monotonic()
    with pytest.raises(SpecError, match="values once aliases are written out"):
        parse("\n".join(lines))
    assert time.monotonic() - started < 2


def test_deep_nesting_is_refused_without_exhausting_the_stack() -> None:
    with pytest.raises(SpecError, match="nested deeper"):
        parse("[" * 200_000)


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "big.yaml"
    with path.open("wb") as file:
        file.truncate(100 * 2**20)
    with pytest.raises(SpecError, match=rf"104,857,600 bytes; a spec may have {MOST_BYTES:,}"):
        read(path)


def test_a_file_at_the_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_bytes(b"a: 1\n#" + b"x" * (MOST_BYTES - 6))
    assert read(path).data == {"a": 1}


def test_bytes_that_are_not_utf8_are_refused_with_their_offset(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_bytes(b"a: caf\xe9\n")
    with pytest.raises(SpecError, match=r"not UTF-8: byte 0xe9 at offset 6"):
        read(path)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read(path).data == {"a": 1}


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_what_cannot_be_opened_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        read(tmp_path / name)
