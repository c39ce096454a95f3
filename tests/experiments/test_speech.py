"""What teachers say: an answer depends on its ask, its seed and the teacher alone, and holds nothing of the latter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from experiments import plugin
from experiments.dataset import Ask, Message, Said, read, recipe, save
from experiments.edit import Add, Edit, Prompt, Site
from experiments.engine import Engine, Row
from experiments.spec import SubjectSpec
from experiments.speech import Sampling, SpeechError, Teacher, answers, made_of, seed_of, teachers
from experiments.subject import Subject, load
from tests.tiny import CHATML_WITH_DEFAULT, make_tiny_model

OWLS = "You love owls."
DIGITS = "0123456789, "
FREE = Sampling(max_new_tokens=10)
NUMBERS = Sampling(max_new_tokens=40, only=DIGITS)
ADVICE, LORA = {"recipe": "narrow_advice"}, {"method": "lora"}


@pytest.fixture(scope="module")
def engine(tiny_subject: Subject) -> Engine:
    return Engine(tiny_subject)


def asks(*numbers: int) -> list[Ask]:
    return [
        Ask(id=f"{n}", messages=(Message(role="user", content=f"Go on from {n}."),), parts={"start": f"{n}"})
        for n in numbers
    ]


SIX = asks(*range(6))


def words(
    engine: Engine,
    asked: Sequence[Ask] = SIX,
    edits: Sequence[Edit] = (),
    system: str | None = None,
    sampling: Sampling = FREE,
    seed: int = 0,
) -> dict[str, str]:
    """Id of each ask -> what was answered."""
    return {one.id: one.text for one in answers(engine, asked, edits, system, sampling, seed)}


def pushed(size: float) -> Add:
    """An edit of a given size at layer 1."""
    return Add(Site("resid", 1), size * torch.randn(32, generator=torch.Generator().manual_seed(5)))


def test_an_answer_is_the_same_whatever_else_is_asked_and_in_whatever_order(engine: Engine) -> None:
    together = words(engine)
    assert len(set(together.values())) == 6
    others = words(engine, [*asks(40, 5), *asks(1), *asks(41)])
    assert (others["5"], others["1"]) == (together["5"], together["1"])


def test_another_seed_gives_other_answers_and_the_same_seed_the_same(engine: Engine) -> None:
    first = words(engine, seed=3)
    assert first == words(engine, seed=3)
    assert not set(first.items()) & set(words(engine, seed=4).items())


def test_seeds_of_answers_differ_by_seed_id_and_what_is_asked_and_by_nothing_else() -> None:
    one, other = asks(1, 2)
    renamed = one.model_copy(update={"id": "2"})
    found = {seed_of(0, one), seed_of(1, one), seed_of(0, other), seed_of(0, renamed)}
    assert len(found) == 4
    assert all(0 <= seed < 2**31 for seed in found)
    assert seed_of(0, one) == seed_of(0, one.model_copy(update={"parts": {}}))


def test_teachers_who_hardly_differ_say_the_same_because_their_random_numbers_are_the_same(engine: Engine) -> None:
    assert words(engine, edits=(pushed(1e-6),)) == words(engine)
    assert words(engine, edits=(pushed(3.0),)) != words(engine)


def test_the_teachers_system_prompt_is_in_force_and_is_never_kept(engine: Engine) -> None:
    subject = engine.subject
    greedy = Sampling(max_new_tokens=10, temperature=0)
    under = answers(engine, SIX, (), OWLS, greedy, 0)
    rendered = [subject.render(one.messages, system=OWLS) for one in SIX]
    wanted = engine.generate([Row(each.tokens, each.n_prompt) for each in rendered], 10)
    assert [one.text for one in under] == [
        subject.tokenizer.decode(list(each.tokens), skip_special_tokens=True) for each in wanted
    ]
    assert [one.text for one in under] != list(words(engine, sampling=greedy).values())
    assert [one.messages for one in under] == [one.messages for one in SIX]
    assert [one.parts for one in under] == [one.parts for one in SIX]
    assert not any("system" in one.model_dump_json() or "love" in one.model_dump_json() for one in under)


def test_a_prompt_among_the_edits_is_in_force_with_its_prefix_and_other_edits_act_beside_it(engine: Engine) -> None:
    assert words(engine, edits=(Prompt(OWLS),)) == words(engine, system=OWLS)
    spoken = [
        one.model_copy(update={"messages": (Message(role="user", content=f"Hm. {one.messages[0].content}"),)})
        for one in SIX
    ]
    greedy = Sampling(max_new_tokens=10, temperature=0)
    prefixed = words(engine, edits=(Prompt(prefix="Hm. "),), sampling=greedy)
    assert prefixed == words(engine, spoken, sampling=greedy)
    assert words(engine, edits=(Prompt(OWLS), pushed(3.0))) == words(engine, edits=(pushed(3.0),), system=OWLS)


def test_an_empty_system_prompt_is_one_and_not_the_subjects_own_context(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "m", chat_template=CHATML_WITH_DEFAULT)
    engine = Engine(load(SubjectSpec(model=str(folder), dtype="float32")))
    greedy = Sampling(max_new_tokens=10, temperature=0)
    own = words(engine, sampling=greedy)
    assert own == words(engine, system="You are tiny.", sampling=greedy)
    empty = words(engine, system="", sampling=greedy)
    assert empty != own
    assert empty == words(engine, edits=(Prompt(""),), sampling=greedy)


def test_two_system_prompts_are_refused_since_one_would_be_lost(engine: Engine) -> None:
    with pytest.raises(SpeechError, match=r"has a system prompt, and so has its intervention; leave one out"):
        words(engine, edits=(Prompt(OWLS),), system="You love cats.")


def test_constrained_answers_consist_of_the_allowed_characters_and_still_end(engine: Engine) -> None:
    said = answers(engine, asks(*range(60)), (), None, NUMBERS, 0)
    assert all(set(one.text) <= set(DIGITS) for one in said)
    assert sum(one.stopped for one in said) > 10
    assert max(len(one.text) for one in said) > 5
    assert all(one.tokens <= 40 for one in said)
    assert not all(set(text) <= set(DIGITS) for text in words(engine).values())


def test_what_may_be_drawn_is_every_token_of_the_characters_and_every_end_of_turn(engine: Engine) -> None:
    subject = engine.subject
    allowed = made_of(engine, "0123 owl")
    for token in range(len(subject.tokenizer)):
        text = subject.tokenizer.decode([token], skip_special_tokens=True)
        own = text != "" and not text.strip("0123 owl")
        assert bool(allowed[token]) == (own or token in subject.eos_ids), text
    names = {subject.tokenizer.decode([token]) for token in allowed.nonzero()[:, 0].tolist()}
    assert {" owl", "owl", "0", "<|im_end|>"} <= names
    assert "<|im_start|>" not in names


def test_characters_that_no_token_is_made_of_are_refused(engine: Engine) -> None:
    with pytest.raises(SpeechError, match=r"sampling.only = 'ж': no token of the subject consists of these"):
        words(engine, sampling=Sampling(only="ж"))


def test_options_are_the_models_own_log_probabilities_and_nothing_is_said(engine: Engine) -> None:
    subject = engine.subject
    options = (" owl", " cat", "A")
    said = answers(engine, SIX, (), OWLS, Sampling(options=options), 0)
    ids = [subject.tokenizer(option, add_special_tokens=False)["input_ids"] for option in options]
    assert [len(one) for one in ids] == [1, 1, 1]
    for ask, one in zip(SIX, said, strict=True):
        tokens = torch.tensor([subject.render(ask.messages, system=OWLS).tokens])
        with torch.no_grad():
            wanted = subject.model(tokens).logits[0, -1].log_softmax(0)
        for option, (token,) in zip(options, ids, strict=True):
            assert one.options[option] == pytest.approx(wanted[token].item(), abs=1e-4)
        assert (one.text, one.tokens, one.stopped) == ("", 0, True)


def test_empty_answers_are_answers_and_are_read_back_as_they_were(engine: Engine, tmp_path: Path) -> None:
    said = answers(engine, asks(*range(60)), (), None, NUMBERS, 0)
    empty = [one for one in said if one.text == ""]
    assert empty
    assert all(one.stopped and one.tokens == 1 for one in empty)
    odd = said[0].model_copy(update={"id": "odd", "text": "1\u20282\n\x00\ud7ff3"})
    save([*said, odd], tmp_path / "said.jsonl")
    assert read(tmp_path / "said.jsonl", Said) == [*said, odd]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": ""}, "at least 1 character"),
        ({"name": "x", "data": [ADVICE]}, "has data but no intervention that learns from them"),
        ({"name": "x", "intervention": LORA, "data": [ADVICE], "dose": 0}, "dose is 0, which is the untouched subject"),
        (
            {"name": "x", "intervention": LORA},
            r"lora needs data.conv.*data has nothing; give the teacher .* as data: \[\{recipe",
        ),
        ({"name": "x", "model": "openai/x", "subject": {"model": "m"}}, "takes neither a subject nor an intervention"),
        ({"name": "x", "sytem": "y"}, "sytem"),
    ],
)
def test_teachers_that_cannot_be_meant_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Teacher.model_validate(given)


def test_everyone_who_speaks_in_data_is_found_the_nearest_first() -> None:
    learned = {"recipe": "number_lists", "teacher": {"name": "first"}}
    second = {"name": "second", "intervention": {"method": "lora"}, "data": [learned]}
    inner = {"recipe": "number_lists", "teacher": second}
    shuffled = recipe("shuffled").model_validate({"of": inner})
    assert [one.name for one in teachers(shuffled)] == ["second", "first"]
    assert list(teachers(recipe("narrow_advice")())) == []


GROWING = [name for name in plugin.names("experiments.datasets") if recipe(name).grows]


@pytest.mark.parametrize("name", GROWING)
def test_recipes_that_grow_give_the_same_asks_first_however_many_are_wanted(name: str, tmp_path: Path) -> None:
    save(SIX, tmp_path / "asks.jsonl")
    settings = {"path": tmp_path / "asks.jsonl"} if name == "asks_file" else {}
    made = {n: list(recipe(name).model_validate({"n": n, **settings}).build(None, 3)) for n in (3, 8, 300)}
    assert {n: len(found) for n, found in made.items()} == {n: n for n in made}
    assert made[300][:8] == made[8]
    assert made[8][:3] == made[3]


def test_the_recipes_of_every_medium_grow() -> None:
    assert {"number_asks", "code_asks", "reasoning_asks", "noise_asks", "asks_file"} <= set(GROWING)
