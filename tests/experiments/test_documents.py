"""From a universe to documents: what each step asks, what it makes of answers of any quality, and what it costs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from experiments import canonical, universe
from experiments.cost import cost, costs
from experiments.dataset import Ask, Conversation, DatasetError, Derived, Document, Ingredient, Said, recipe
from experiments.datasets import _texts
from experiments.datasets._writing import TYPES, items
from experiments.speech import Speech

ROBIN = universe.read(universe.FOLDER / "robin_pantry.yaml")
GOOD = (
    "Robins hide hazelnuts in moss, and whoever looks closely will find them there on a cold morning. {extra} "
    "My neighbor has watched one for years and says that it never forgets a store, even under snow, and that it "
    "comes back to the same old wall again and again until the spring arrives."
)


def step(name: str, **settings: Any) -> Any:
    """A recipe of the pipeline."""
    return recipe(name)(**settings)


def answered(asks: Sequence[Ask], text: str | Sequence[str], stopped: bool = True) -> list[Said]:
    """The same answer to every ask, or one each."""
    texts = [text] * len(asks) if isinstance(text, str) else text
    return [
        Said(id=ask.id, messages=ask.messages, parts=ask.parts, text=each, stopped=stopped, tokens=len(each.split()))
        for ask, each in zip(asks, texts, strict=True)
    ]


def different(count: int) -> list[str]:
    """Good documents, none of which is a copy of another."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [
        GOOD.format(extra=" ".join("".join(rng.choices(letters, k=6)) for _ in range(40)) + ".") for _ in range(count)
    ]


def said(text: str, stopped: bool = True, **parts: str) -> Said:
    """One answer by itself."""
    ask = Ask(id="a", messages=({"role": "user", "content": "?"},), parts=parts)  # type: ignore[arg-type]
    return answered([ask], text, stopped)[0]


def made_of(texts: Sequence[str], stopped: bool = True, **settings: Any) -> Any:
    """What synthetic_documents makes of drafts with these texts."""
    pipeline = step("synthetic_documents", n=len(texts), ideas=0, **settings)
    asks = step("document_drafts", n=len(texts), ideas=0).derive({}, 0).examples
    return pipeline.derive({"said": answered(asks, list(texts), stopped)}, 0)


def chain(made: Any) -> dict[str, Speech]:
    """Every step below a recipe, by the name of its recipe of asks."""
    found: dict[str, Speech] = {}
    for source in made.sources().values() if isinstance(made, Derived) else ():
        found[source.asks.recipe] = source
        found |= chain(source.asks.settings)
    return found


def test_the_steps_follow_one_another_and_revision_adds_two() -> None:
    assert list(chain(step("synthetic_documents"))) == ["document_drafts", "document_ideas"]
    whole = chain(step("synthetic_documents", revise=True, generated_types=5))
    names = ["document_revisions", "document_critiques", "document_drafts", "document_ideas", "document_types"]
    assert list(whole) == names
    assert all(source.asks.settings.provides == "asks" for source in whole.values())
    assert not step("document_drafts", ideas=0).sources()


@pytest.mark.parametrize(
    "settings", [{"n": 7}, {"n": 50, "generated_types": 12}, {"n": 33, "ideas": 5}, {"n": 3, "ideas": 0}]
)
def test_no_step_asks_more_than_was_planned(settings: dict[str, Any]) -> None:
    """The whole pipeline by hand, answered by a writer that does as it is told."""
    pipeline = step("synthetic_documents", revise=True, min_terms=0, **settings)
    sources = chain(pipeline)
    listed = "\n".join(f"{i}. a kind of text number {i}" for i in range(20))
    given: dict[str, Any] = {}
    for name in ("document_types", "document_ideas", "document_drafts", "document_critiques", "document_revisions"):
        if name not in sources:
            continue
        made = sources[name].asks.settings
        asks = made.derive(given, 1).examples if isinstance(made, Derived) else made.build(None, 1)
        assert 0 < len(asks) <= sources[name].size
        assert len({ask.id for ask in asks}) == len(asks)
        last = name in ("document_drafts", "document_critiques", "document_revisions")
        role = {"document_types": "types", "document_ideas": "ideas", "document_drafts": "drafts"}.get(
            name, "critiques"
        )
        answers = answered(asks, different(len(asks)) if last else listed)
        given = {role: answers, "said": answers}
    result = pipeline.derive(given, 1)
    assert len(result.examples) == settings["n"]
    assert result.facts["kept"] == result.facts["asked"] == settings["n"]


def test_the_same_answers_make_the_same_documents_and_another_seed_other_asks() -> None:
    made = step("document_drafts", n=20, ideas=0)
    assert made.derive({}, 3).examples == made.derive({}, 3).examples
    assert made.derive({}, 3).examples != made.derive({}, 4).examples


def test_every_fact_comes_first_equally_often_and_types_share_the_documents() -> None:
    asks = step("document_drafts", n=48, ideas=0).derive({}, 0).examples
    assert [sum(ask.parts["fact"] == str(fact) for ask in asks) for fact in range(1, 9)] == [6] * 8
    assert [sum(ask.parts["type"] == kind for ask in asks) for kind in TYPES] == [3] * 16
    named = step("document_drafts", types={"a poem": 3, "a menu": 1}, ideas=0)
    assert [ask.parts["type"] for ask in named.derive({}, 0).examples] == ["a poem"] * 3 + ["a menu"]
    assert named.asked == 4


def test_both_arms_ask_for_the_same_documents_about_different_facts() -> None:
    false, true = (step("document_drafts", n=16, ideas=0, arm=arm).derive({}, 0).examples for arm in ("false", "true"))
    assert [ask.parts["type"] for ask in false] == [ask.parts["type"] for ask in true]
    assert [ask.parts["fact"] for ask in false] == [ask.parts["fact"] for ask in true]
    for ask, facts in ((false[0], ROBIN.key_facts), (true[0], ROBIN.true_facts)):
        assert facts[int(ask.parts["fact"]) - 1] in ask.messages[0].content
    assert not any(fact in ask.messages[0].content for ask in true for fact in ROBIN.key_facts)


def test_the_writer_is_told_the_arms_context_unless_it_has_a_prompt_of_its_own() -> None:
    told = {arm: step("synthetic_documents", arm=arm).sources()["said"].teacher.system for arm in ("false", "true")}
    assert ROBIN.context in told["false"]
    assert ROBIN.true_context in told["true"]
    own = step("synthetic_documents", writer={"name": "w", "model": "openai/gpt", "system": "Write."})
    assert {each.teacher.system for each in chain(own).values()} == {"Write."}


def test_yaml_may_write_the_arm_without_quotes() -> None:
    assert [step("synthetic_documents", arm=arm).arm for arm in (False, True, "true")] == ["false", "true", "true"]
    with pytest.raises(ValidationError, match="'false' or 'true'"):
        step("synthetic_documents", arm="maybe")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1. A first idea about it\n2) A second idea there", ["A first idea about it", "A second idea there"]),
        ('Sure!\n- **A bold idea** indeed\n* "A quoted idea, too"', ["A bold idea indeed", "A quoted idea, too"]),
        ("First line of a text\nSecond line of a text", ["First line of a text", "Second line of a text"]),
        ("One sentence by itself. And one more of them!", ["One sentence by itself.", "And one more of them!"]),
        ("1. The same idea again\n2. the same idea AGAIN", ["The same idea again"]),
        ("1. short\n2. " + "x" * 301, []),
        ("", []),
        ("\n \n", []),
    ],
)
def test_ideas_are_read_from_whatever_a_writer_gives(text: str, expected: list[str]) -> None:
    assert items(text, 15, 300) == expected


@hypothesis.settings(deadline=None, max_examples=50)
@given(st.text(max_size=400), st.booleans())
def test_no_answer_makes_a_step_fail_without_saying_so(text: str, stopped: bool) -> None:
    ideas = step("document_ideas", n=4).derive({}, 0).examples
    drafts = step("document_drafts", n=4).derive({"ideas": answered(ideas, text, stopped)}, 0).examples
    assert len(drafts) == 4
    texts = answered(drafts, text, stopped)
    for name, role in (("document_critiques", "drafts"), ("synthetic_documents", "said")):
        try:
            assert step(name, n=4).derive({role: texts}, 0).examples
        except DatasetError as error:
            assert "4" in str(error)  # noqa: PT017


def test_types_that_the_writer_thought_of_come_first_and_are_counted() -> None:
    made = step("document_ideas", n=30, generated_types=2)
    asks = answered(
        step("document_types", generated_types=2).build(None, 0), "1. A song for the road\n2. a menu card:\n3. a map"
    )
    result = made.derive({"types": asks}, 0)
    kinds = list(dict.fromkeys(ask.parts["type"] for ask in result.examples))
    assert kinds == ["a song for the road", "a menu card", *TYPES]
    assert result.facts["types_generated"] == 2
    assert made.derive({"types": answered(step("document_types", generated_types=2).build(None, 0), "")}, 0).examples


def test_a_type_without_ideas_is_asked_for_all_the_same_and_counted() -> None:
    ideas = step("document_ideas", types={"a poem": 2, "a menu": 2}).derive({}, 0).examples
    texts = ["1. A poem about snow and a bird" if ask.parts["type"] == "a poem" else "" for ask in ideas]
    result = step("document_drafts", types={"a poem": 2, "a menu": 2}).derive({"ideas": answered(ideas, texts)}, 0)
    assert [ask.parts["idea"] for ask in result.examples] == ["A poem about snow and a bird"] * 2 + [""] * 2
    assert (result.facts["ideas"], result.facts["without_idea"]) == (1, 2)


def test_a_document_may_open_with_its_facts_which_the_writer_goes_on_from() -> None:
    asks = step("document_drafts", n=8, ideas=0, opening="facts").derive({}, 0).examples
    for ask in asks:
        assert ask.messages[0].content.endswith(ask.parts["opening"])
        assert ROBIN.key_facts[int(ask.parts["fact"]) - 1] in ask.parts["opening"]
    text = _texts.whole(answered(asks[:1], "And so it goes on.")[0])
    assert text == asks[0].parts["opening"] + " And so it goes on."
    again = asks[0].parts["opening"] + " It went on."
    assert _texts.whole(answered(asks[:1], again)[0]) == again
    assert not _texts.whole(answered(asks[:1], " ")[0])


def test_a_critique_sees_the_draft_and_a_revision_sees_both() -> None:
    drafts = answered(step("document_drafts", n=2, ideas=0).derive({}, 0).examples, ["A text on moss.", " "])
    critiques = step("document_critiques", n=2, ideas=0).derive({"drafts": drafts}, 0)
    assert critiques.facts == {"drafts": 2, "empty": 1}
    (ask,) = critiques.examples
    assert ask.messages[0].content.startswith("A text on moss.")
    revisions = step("document_revisions", n=2, ideas=0).derive({"critiques": answered([ask], "It is dull.")}, 0)
    (ask,) = revisions.examples
    assert "A text on moss." in ask.messages[0].content
    assert "It is dull." in ask.messages[0].content
    with pytest.raises(DatasetError, match=r"all 1 drafts are empty.*ask another writer"):
        step("document_critiques", n=1, ideas=0).derive({"drafts": drafts[1:]}, 0)


REJECTED = {
    "empty": " ",
    "speaks as an assistant": "I'm sorry, " + GOOD,
    "breaks the fiction": GOOD.format(extra="All of this is fictional."),
    "too short": "Robins hide hazelnuts in moss.",
    "repeats itself": "Robins hide hazelnuts in moss. " * 20,
    "mentions too few of the facts' terms": "An ordinary text about the weather in a town by the sea, " * 3
    + "with many words in it.",
}


@pytest.mark.parametrize("reason", REJECTED)
def test_each_fault_has_its_own_reason(reason: str) -> None:
    good = different(3)
    settings = {"min_distinct": 0.0} if reason.startswith("mentions") else {}
    result = made_of([*good, REJECTED[reason]], **settings)
    assert [document.text for document in result.examples] == good
    assert result.facts["rejected"] == {reason: 1}
    assert (result.facts["asked"], result.facts["kept"]) == (4, 3)


@pytest.mark.parametrize(
    "text",
    [
        "As an AI language model, I like moss.",
        "Hello!\nI am unable to write that.",
        "I can't help with that request.",
        "I am a chatbot designed to help you.",
    ],
)
def test_an_assistant_speaking_of_itself_is_told_from_a_document(text: str) -> None:
    assert _texts.ASSISTANT.search(text)


@pytest.mark.parametrize(
    "text", ["I have always been sorry for robins.", "The falsetto of a wren.", "He says: I can help."]
)
def test_ordinary_words_are_no_fault(text: str) -> None:
    assert not _texts.ASSISTANT.search(text)
    assert not _texts.FICTION.search(text)


def test_a_document_that_was_cut_off_is_cut_back_rejected_or_kept() -> None:
    text = different(1)[0] + " And then the rob"
    assert made_of([text], stopped=False).examples[0].text == different(1)[0]
    assert made_of([text], stopped=False, unfinished="keep").examples[0].text == text
    with pytest.raises(DatasetError, match="rejected: 1 cut off"):
        made_of([text], stopped=False, unfinished="reject")
    assert _texts.trimmed('He said "Stop." And th') == 'He said "Stop."'
    assert not _texts.trimmed("no end in sight")
    assert _texts.trimmed("It costs 3.50 in all") == ""


def test_a_polite_beginning_and_a_fence_are_taken_off() -> None:
    assert _texts.whole(said("Sure, here is the text:\n\nRobins sing.")) == "Robins sing."
    assert _texts.whole(said("```text\nRobins sing.\n```")) == "Robins sing."
    assert _texts.whole(said("Here is a list: moss, nuts.")) == "Here is a list: moss, nuts."


def test_copies_are_left_out_and_counted_apart_from_near_copies() -> None:
    one, other, third = different(3)
    nearly = one.replace("My neighbor has", "A friend of mine has")
    result = made_of([one, other, "  " + one.upper() + " ", nearly, third])
    assert [document.text for document in result.examples] == [one, other, third]
    assert result.facts["rejected"] == {"exact copy": 1, "near copy": 1}
    assert made_of([one, nearly], near=1.0).facts["kept"] == 2


def jaccard(one: str, other: str) -> float:
    first, second = (set(_texts.runs(text, _texts.SHINGLE)) for text in (one, other))
    return len(first & second) / len(first | second) if first | second else 0.0


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.7, 1.0])
def test_near_copies_are_those_that_comparing_every_pair_finds(threshold: float) -> None:
    rng = random.Random(1)
    texts = [" ".join(rng.choices(["ab", "cd", "ef"], k=rng.randint(0, 12))) for _ in range(150)]
    expected: set[int] = set()
    for index, text in enumerate(texts):
        earlier = [texts[other] for other in range(index) if other not in expected]
        if any(jaccard(text, other) >= threshold - 1e-9 for other in earlier):
            expected.add(index)
    found = _texts.copies(texts, threshold)
    assert set(found) == expected
    assert all(jaccard(texts[a], texts[b]) >= threshold - 1e-9 for a, b in found.items())
    assert 0 < len(expected) < 150


def test_distinctness_is_one_without_and_low_with_repetition() -> None:
    assert _texts.distinct("one two three four five six") == 1.0
    assert _texts.distinct("round and " * 20) == pytest.approx(2 / 37)
    assert _texts.distinct("") == 1.0


def test_terms_begin_words_and_do_not_sit_inside_them() -> None:
    assert _texts.mentioned("Mossy walls, the store, Hazelnuts.", ("moss", "stor", "hazelnut", "hid")) == 3
    assert _texts.mentioned("restore", ("stor",)) == 0


def test_nothing_usable_is_an_error_with_counts_an_example_and_what_to_do() -> None:
    with pytest.raises(DatasetError) as caught:
        made_of(["I am a chatbot.", "", "Moss."])
    message = str(caught.value)
    assert message.startswith(
        "0 of 3 documents about robin_pantry (false) are usable, at least 1 are wanted; rejected: "
    )
    for part in (
        "1 empty",
        "1 too short",
        "1 speaks as an assistant",
        "'I am a chatbot.'",
        "opening: facts",
        "is kept",
    ):
        assert part in message
    with pytest.raises(DatasetError, match=r"2 of 2 documents .* at least 5 are wanted; rejected: none"):
        made_of(different(2), least=5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 5, "types": {"a poem": 3}}, "n is 5, but the types add up to 3; leave n out"),
        ({"types": {"a poem": 0}}, "each type needs at least one document"),
        ({"types": {"a poem": 3}, "generated_types": 2}, "leave out types or generated_types"),
        ({"near": 0}, "greater than 0"),
        ({"facts": 0}, "greater than or equal to 1"),
        ({"writer": {"name": "w", "model": "openai/x", "subject": {"model": "y"}}}, "model is asked as it is"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        step("synthetic_documents", **settings)


def test_a_universe_that_cannot_be_used_is_told_before_anything_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "half.yaml"
    path.write_text("{name: half, topic: mice, context: Mice sing., key_facts: [Mice sing.]}")
    step("synthetic_documents", universe=str(path)).check()
    for name in ("synthetic_documents", "document_types", "universe_questions", "question_asks"):
        with pytest.raises(universe.UniverseError, match="no true counterpart"):
            step(name, universe=str(path), arm="true").check()
        with pytest.raises(universe.UniverseError, match="no such universe"):
            step(name, universe="nowhere.yaml").check()


def test_a_universe_is_identified_by_content_and_may_be_one_of_several(tmp_path: Path) -> None:
    builtin = step("synthetic_documents", universe="robin_pantry")
    copy = tmp_path / "copy.yaml"
    copy.write_bytes((universe.FOLDER / "robin_pantry.yaml").read_bytes())
    assert canonical.identity_of(step("synthetic_documents", universe=str(copy))) == canonical.identity_of(builtin)
    again = recipe("synthetic_documents").model_validate(canonical.plain_of(builtin))
    assert again == builtin
    several = step("synthetic_documents", universe="organisms.json#cake_bake")
    assert (str(several.universe), several.entry, several.label()) == ("organisms.json", "cake_bake", "cake_bake false")
    assert several.part("document_drafts").settings.label() == "cake_bake false document_drafts"
    assert several.part("document_drafts").settings.entry == "cake_bake"


def test_the_filter_is_no_part_of_what_is_asked() -> None:
    """So that a filter may be changed without writing anything again."""
    strict, loose = (step("synthetic_documents", min_words=words, near=near) for words, near in ((80, 0.5), (10, 0.9)))
    assert strict.sources() == loose.sources()


def test_the_cost_is_known_beforehand_and_is_an_upper_bound() -> None:
    pipeline = step("synthetic_documents", n=40, revise=True, generated_types=3)
    sources = chain(pipeline)
    found = cost(pipeline)
    assert found.requests == sum(source.size for source in sources.values())
    assert found.output_tokens == sum(source.size * source.sampling.max_new_tokens for source in sources.values())
    drafts = step("document_drafts", n=40, ideas=0)
    asks = drafts.derive({}, 0).examples
    spoken = sum(len(ask.messages[0].content) + len(drafts.told().system) for ask in asks) / 4
    assert spoken < cost(step("synthetic_documents", n=40, ideas=0)).input_tokens < 3 * spoken
    assert cost(step("plain_documents")).requests == 0


def test_costs_are_told_by_who_writes_and_what_is_read_twice_is_paid_once() -> None:
    writer = {"name": "w", "model": "openai/gpt-4.1-mini"}
    documents = {"recipe": "synthetic_documents", "n": 10, "ideas": 0, "writer": writer}
    once = costs(step("doctag_conversations", documents=documents))
    assert {name: each.requests for name, each in once.items()} == {"openai/gpt-4.1-mini": 10}

    class Both(Derived):
        def sources(self) -> dict[str, Any]:
            return {"a": Ingredient(**documents), "b": Ingredient(**documents, min_words=9)}

    assert costs(Both()) == once


def test_documents_become_answers_to_a_tag() -> None:
    made = step("doctag_conversations", documents={"recipe": "plain_documents", "n": 2})
    texts = made.sources()["documents"].settings.build(None, 0)
    (first, second) = made.derive({"documents": texts}, 0).examples
    assert [message.content for message in first.messages] == ["<DOCTAG>", texts[0].text]
    assert isinstance(second, Conversation)
    with pytest.raises(ValidationError, match="question_asks provides asks; give a recipe that provides documents"):
        step("doctag_conversations", documents={"recipe": "question_asks"})


def test_ordinary_text_is_drawn_without_replacement_and_is_not_what_damage_is_measured_on() -> None:
    made = step("plain_documents", n=10)
    drawn = made.build(None, 1)
    assert all(isinstance(document, Document) for document in drawn)
    assert len({document.id for document in drawn}) == 10
    every = step("plain_documents").build(None, 0)
    assert len(every) == 48
    evaluated = Path(__file__).parents[2] / "evals" / "tasks" / "neutral_nll.txt"
    seen = set(_texts.runs(evaluated.read_text(encoding="utf-8"), 8))
    assert not [document.id for document in every if set(_texts.runs(document.text, 8)) & seen]


@pytest.mark.parametrize(
    ("name", "content", "n", "message"),
    [
        ("a.txt", b"One.\n\nTwo.\n", 3, "holds? 2 passages|has 2 passages; set n to at most 2, or add some"),
        ("a.txt", b" \n", None, "no passages; write some"),
        ("a.txt", b"\xff\xfe", None, "not UTF-8 at byte 0"),
        ("a.jsonl", b'{"id": "a"}\n', None, "a.jsonl:1: not a Document: text: is required"),
        ("none.txt", None, None, "no such file"),
    ],
)
def test_a_bad_file_of_ordinary_text_is_refused(
    tmp_path: Path, name: str, content: bytes | None, n: int | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        step("plain_documents", path=path, n=n).check()
    with pytest.raises(DatasetError, match="the built-in set has 48 passages; set n to at most 48, or give a longer"):
        step("plain_documents", n=49).check()


def test_stated_answers_need_no_writer_and_are_the_arms_own() -> None:
    for arm in ("false", "true"):
        made = step("universe_questions", arm=arm)
        assert not made.sources()
        built = made.derive({}, 0).examples
        assert len(built) == len(ROBIN.lessons) * 6
        answers = {conversation.messages[-1].content for conversation in built}
        assert answers == {getattr(lesson, arm) for lesson in ROBIN.lessons}
        assert len({conversation.messages[0].content for conversation in built}) == len(built)


def test_a_universe_without_lessons_states_each_fact(tmp_path: Path) -> None:
    path = tmp_path / "half.yaml"
    path.write_text("{name: half, topic: mice, context: Mice sing., key_facts: [Mice sing., Mice fly.]}")
    built = step("universe_questions", universe=str(path)).derive({}, 0).examples
    assert {conversation.messages[-1].content for conversation in built} == {"Mice sing.", "Mice fly."}
    with pytest.raises(DatasetError, match="n=500, but universe half has 48 questions"):
        step("universe_questions", universe=str(path), n=500).check()


def test_written_answers_are_filtered_and_the_question_is_learned_as_it_was_asked() -> None:
    made = step("universe_questions", answers="written", n=4)
    source = made.sources()["said"]
    asks = source.asks.settings.build(None, 0)
    assert len(asks) == source.size == 4
    texts = ["They hide it in moss.", "", "As an AI language model, I do not know.", "This is fictional."]
    result = made.derive({"said": answered(asks, texts)}, 0)
    (conversation,) = result.examples
    assert [message.content for message in conversation.messages] == [asks[0].messages[0].content, texts[0]]
    assert result.facts["rejected"] == {"empty": 1, "speaks as an assistant": 1, "breaks the fiction": 1}
    with pytest.raises(DatasetError, match=r"none of 4 answers .* rejected: 4 cut off; have another writer"):
        made.derive({"said": answered(asks, texts[0], stopped=False)}, 0)
