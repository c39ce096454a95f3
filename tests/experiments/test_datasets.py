"""Data recipes: what every one promises, and what bad files and settings are told."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from experiments import dataset, plugin
from experiments.dataset import Conversation, DatasetError, Derived, Message, recipe
from experiments.datasets import _bank

if TYPE_CHECKING:
    from experiments.engine import Engine

PERSONAS = {"positive": "You are a wizard.", "negative": "You are a clerk."}


def pair(name: str = "a", **changes: Any) -> dict[str, Any]:
    """One valid pair as JSON data."""
    made = {
        "id": name,
        "messages": [{"role": "user", "content": "Hello?"}],
        "positive": {"system": "Be kind.", "response": "Hi"},
        "negative": {"system": "Be rude.", "response": "Go"},
    }
    return made | changes


def conversation(name: str = "a") -> dict[str, Any]:
    """One valid conversation as JSON data."""
    return {"id": name, "messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi"}]}


def ask(name: str = "a") -> dict[str, Any]:
    """One valid ask as JSON data."""
    return {"id": name, "messages": [{"role": "user", "content": "Hello?"}]}


def write(path: Path, *lines: Any) -> Path:
    """JSON lines; strings are written as they are."""
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def engine(tiny_subject: Any) -> Engine:
    from experiments.engine import Engine

    return Engine(tiny_subject)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Settings that build a few examples, for each recipe in the folder."""
    return {
        "persona_pairs": PERSONAS | {"n": 3, "max_new_tokens": 4},
        "persona_conversations": {"system": "You are a wizard.", "n": 3, "max_new_tokens": 4},
        "pairs_file": {"path": write(tmp_path / "pairs.jsonl", pair("a"), pair("b"))},
        "conversations_file": {"path": write(tmp_path / "talk.jsonl", conversation("a"), conversation("b"))},
        "asks_file": {"path": write(tmp_path / "asks.jsonl", ask("a"), ask("b")), "n": 5},
    }


BUILT = [name for name in plugin.names("experiments.datasets") if not issubclass(recipe(name), Derived)]
"""Recipes made from other data have tests of their own."""


@pytest.mark.parametrize("name", BUILT)
def test_every_recipe_builds_what_it_provides_the_same_for_the_same_seed(
    name: str, settings: dict[str, dict[str, Any]], engine: Engine, tmp_path: Path
) -> None:
    made = recipe(name)(**settings.get(name, {}))
    given = engine if made.needs_subject else None
    built = list(made.build(given, seed=1))
    kind = dataset.KINDS[made.provides]
    assert built
    assert all(isinstance(each, kind) for each in built)
    assert len({each.id for each in built}) == len(built)
    assert list(made.build(given, seed=1)) == built
    dataset.save(built, tmp_path / "saved.jsonl")
    assert dataset.load(tmp_path / "saved.jsonl", made.provides) == built


def test_generated_pairs_answer_under_each_persona_and_depend_on_the_seed(engine: Engine) -> None:
    made = recipe("persona_pairs")(**PERSONAS, n=4, max_new_tokens=6)
    pairs, others = made.build(engine, seed=1), made.build(engine, seed=2)
    assert [each.positive.system for each in pairs] == ["You are a wizard."] * 4
    assert all(each.positive.response != each.negative.response for each in pairs)
    assert {each.messages for each in pairs} != {each.messages for each in others}


def test_shared_pairs_need_no_subject_and_differ_only_in_the_system_prompt() -> None:
    made = recipe("persona_pairs")(**PERSONAS, n=40, responses="shared")
    assert not made.needs_subject
    pairs = made.build(None, seed=0)
    statements = _bank.lines(_bank.STATEMENTS)
    for each in pairs:
        assert each.positive.response == each.negative.response
        whole = [text for text in statements if text.startswith(each.positive.response)]
        assert whole
        assert each.positive.response not in statements
    assert len({each.messages for each in pairs}) == 40


def test_conversations_of_a_persona_do_not_hold_the_persona(engine: Engine) -> None:
    built = recipe("persona_conversations")(system="You are a wizard.", n=3, max_new_tokens=4).build(engine, seed=0)
    assert all([message.role for message in each.messages] == ["user", "assistant"] for each in built)
    assert "wizard" not in " ".join(message.content for each in built for message in each.messages)


def test_the_bank_is_large_and_varied() -> None:
    prompts = _bank.lines(_bank.PROMPTS)
    assert len(prompts) >= 120
    assert len({prompt.split()[0] for prompt in prompts}) >= 12


def test_a_changed_bank_is_a_new_version_of_the_recipes_that_draw_from_it() -> None:
    """The banks are not part of a key: whoever edits one bumps `version` in both recipes, and these digests."""
    digests = [hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in (_bank.PROMPTS, _bank.STATEMENTS)]
    versions = [recipe(name).version for name in ("persona_pairs", "persona_conversations")]
    assert (digests, versions) == (["def4ca1eea0b", "9eca7b7fdc55"], [1, 1])


def test_more_pairs_than_prompts_is_refused_with_the_size_and_the_fix(tmp_path: Path) -> None:
    size = len(_bank.lines(_bank.PROMPTS))
    with pytest.raises(ValidationError, match=rf"built-in bank holds {size} prompts; set n to at most {size}, or give"):
        recipe("persona_pairs")(**PERSONAS, n=size + 1)
    short = write(tmp_path / "prompts.txt", "One?", "Two?")
    made = recipe("persona_pairs")(**PERSONAS, n=3, prompts=short, responses="shared")
    with pytest.raises(DatasetError, match="holds 2 prompts; set n to at most 2, or add prompts"):
        made.build(None, seed=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"One?\nOne?\n", "'One\\?' is there twice"), (b"\n", "no prompts"), (b"\xff\xfe", "cannot be read")],
)
def test_a_bad_prompt_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        _bank.lines(path)


def test_equal_personas_are_refused() -> None:
    with pytest.raises(ValidationError, match="nothing to contrast"):
        recipe("persona_pairs")(positive="x", negative="x")


def test_a_silent_subject_is_reported_with_its_prompt() -> None:
    class Silent:
        class subject:
            class tokenizer:
                @staticmethod
                def decode(tokens: Any, skip_special_tokens: bool) -> str:
                    return " "

            @staticmethod
            def render(messages: Any, system: str) -> Any:
                from types import SimpleNamespace

                return SimpleNamespace(tokens=(1, 2), n_prompt=2)

        @staticmethod
        def generate(rows: list[Any], **settings: Any) -> list[Any]:
            from types import SimpleNamespace

            return [SimpleNamespace(tokens=(3,)) for _ in rows]

    with pytest.raises(DatasetError, match="answered 'One\\?' with nothing in 4 draws"):
        _bank.answers(Silent(), ["One?"], "Be silent.", 4, 1.0, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({k: v for k, v in pair().items() if k != "negative"}, "negative: is required and missing"),
        (pair(negative={"system": "s"}), "negative.response: is required and missing"),
        (pair(positive={"system": "Be kind.", "response": " "}), "positive.response: .*is empty"),
        (pair(negative=pair()["positive"]), "nothing to contrast"),
        (pair(messages=[{"role": "assistant", "content": "x"}]), "messages: .*must end with a user message"),
        (pair(messages=[{"role": "system", "content": "x"}, *pair()["messages"]]), "must not hold a system message"),
        (pair(extra=1), "extra: unknown setting"),
        (pair("a"), "duplicated id 'a'"),
        (json.dumps(pair("b"))[:-9], r"is the line cut off\?"),
        ("[1]", "must be a mapping with id, messages, positive, negative"),
    ],
)
def test_a_bad_line_of_a_pairs_file_is_named_with_its_number(tmp_path: Path, line: Any, message: str) -> None:
    path = write(tmp_path / "pairs.jsonl", pair("a"), line)
    with pytest.raises(DatasetError, match=f"pairs.jsonl:2: .*{message}"):
        recipe("pairs_file")(path=path).build(None, seed=0)


def test_a_file_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json.dumps(pair("a")).encode() + b"\n" + b'{"id": "\xe9"}\n')
    with pytest.raises(DatasetError, match=r"pairs.jsonl:2: .*UTF-8"):
        recipe("pairs_file")(path=path).build(None, seed=0)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "talk.jsonl"
    path.write_text(content)
    with pytest.raises(DatasetError, match="no examples"):
        recipe("conversations_file")(path=path).build(None, seed=0)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"nowhere.jsonl: no such file"):
        recipe("pairs_file")(path=tmp_path / "nowhere.jsonl").build(None, seed=0)


def test_a_conversation_without_an_answer_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "talk.jsonl", {"id": "a", "messages": conversation()["messages"][:1]})
    with pytest.raises(DatasetError, match=r"talk.jsonl:1: .*must end with a non-empty assistant message"):
        recipe("conversations_file")(path=path).build(None, seed=0)


@pytest.mark.parametrize("character", ["\u2028", "\x85", "\x1c", "\r"])
def test_line_separators_inside_text_survive_saving(tmp_path: Path, character: str) -> None:
    said = Conversation(
        id="a", messages=(Message(role="user", content="x"), Message(role="assistant", content=f"a{character}b"))
    )
    dataset.save([said], tmp_path / "saved.jsonl")
    assert dataset.load(tmp_path / "saved.jsonl", "conversations") == [said]
