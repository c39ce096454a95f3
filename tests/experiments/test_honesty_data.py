"""Pairs built from components: any number of them, all different, whose sides differ where the contrast is alone."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from pydantic import ValidationError

from experiments.dataset import DatasetError, Pair, recipe
from experiments.datasets import _bank, _combine
from experiments.datasets import statement_pairs as statements
from experiments.datasets import suffix_pairs as suffixes

LOVE = {"positive": "I love {topic}", "negative": "I hate {topic}"}
CASES = [
    ("suffix_pairs", {}),
    ("suffix_pairs", {"place": "prompt", "system": "You write to a pen friend."}),
    ("suffix_pairs", LOVE),
    ("statement_pairs", {"person": "first"}),
    ("statement_pairs", {"person": "third"}),
    ("statement_pairs", {"person": "both"}),
]
every = pytest.mark.parametrize(("name", "settings"), CASES, ids=str)


def built(name: str, seed: int = 0, **settings: Any) -> list[Pair]:
    return list(recipe(name)(**settings).build(None, seed))


def whole(pair: Pair) -> tuple[str, str]:
    """All that each side is shown to say."""
    first, second = (f"{side.system or ''} {side.response}" for side in (pair.positive, pair.negative))
    return first, second


def apart(first: str, second: str) -> tuple[list[str], list[str]]:
    """The words between the beginning and the end that both texts share."""
    one, other = first.split(), second.split()
    while one and other and one[0] == other[0]:
        one, other = one[1:], other[1:]
    while one and other and one[-1] == other[-1]:
        one, other = one[:-1], other[:-1]
    return one, other


@every
def test_a_thousand_pairs_are_all_different_and_the_same_for_the_same_seed(name: str, settings: dict[str, Any]) -> None:
    pairs = built(name, 3, n=1000, **settings)
    assert len({whole(pair) for pair in pairs}) == len({pair.id for pair in pairs}) == 1000
    assert built(name, 3, n=1000, **settings) == pairs
    others = {whole(pair) for pair in built(name, 4, n=1000, **settings)}
    assert len(others & {whole(pair) for pair in pairs}) < 500


@every
def test_twins_are_as_long_as_each_other(name: str, settings: dict[str, Any]) -> None:
    pairs = built(name, n=1000, **settings)
    differences = [len(first.split()) - len(second.split()) for first, second in map(whole, pairs)]
    assert max(map(abs, differences)) <= 1
    assert abs(fmean(differences)) <= 0.25
    assert abs(fmean(len(first) - len(second) for first, second in map(whole, pairs))) <= 2


@every
def test_twins_differ_in_one_place_of_few_words(name: str, settings: dict[str, Any]) -> None:
    for pair in built(name, n=1000, **settings):
        one, other = apart(*whole(pair))
        assert 1 <= len(one) <= 4
        assert 1 <= len(other) <= 4
        assert len(one) + len(other) < len(whole(pair)[0].split())


@every
def test_questions_before_the_pairs_are_the_same_for_both_sides_and_say_nothing_of_the_contrast(
    name: str, settings: dict[str, Any]
) -> None:
    for pair in built(name, n=300, **settings):
        (ask,) = pair.messages
        assert ask.role == "user"
        assert not re.search(r"\b(tru|hones|lie|lying|decei|mislead|love|hate)", ask.content)


@every
def test_no_brace_or_bracket_of_a_template_is_left_over(name: str, settings: dict[str, Any]) -> None:
    for pair in built(name, n=1000, **settings):
        assert not re.search(r"[][{}|]", f"{pair.messages[0].content} {whole(pair)}")


# pairs with a shared ending


def test_the_answers_of_suffix_pairs_end_with_the_same_words_about_what_was_asked() -> None:
    subjects = _bank.lines(suffixes.SUBJECTS)
    for pair in built("suffix_pairs", n=300):
        first, second = (side.response.split("; ") for side in (pair.positive, pair.negative))
        assert first[1] == second[1]
        assert pair.positive.system is pair.negative.system is None
        (subject,) = [each for each in subjects if first[1].endswith(f" {each}")]
        assert subject in pair.messages[0].content


def test_in_the_prompt_the_contrast_is_the_end_of_the_system_prompt_and_answers_are_alike() -> None:
    for pair in built("suffix_pairs", n=300, place="prompt", system="You write letters."):
        assert pair.positive.response == pair.negative.response
        assert pair.positive.system != pair.negative.system
        for side in (pair.positive, pair.negative):
            assert re.fullmatch(r"You write letters\. [A-Z][^.]*\.", side.system or "")


def test_the_contrast_is_the_one_that_the_spec_gives() -> None:
    settings = {
        "positive": ["I adore {topic}", "Give me {topic}, always!"],
        "negative": ["I avoid {topic}", "Spare me {topic}, always!"],
        "place": "prompt",
    }
    found = {
        tuple(re.sub(r"(?<=adore |avoid ).*(?=\.)|(?<= me ).*(?=, )", "X", side.system or "") for side in sides)
        for sides in ((pair.positive, pair.negative) for pair in built("suffix_pairs", n=200, **settings))
    }
    assert found == {("I adore X.", "I avoid X."), ("Give me X, always!", "Spare me X, always!")}


def test_one_opening_without_a_topic_gives_the_prompt_baseline_its_two_system_prompts() -> None:
    from experiments.intervention import method

    settings = {"positive": "You are always honest.", "negative": "You are never honest.", "place": "prompt"}
    state = method("prompt")().fit(None, built("suffix_pairs", n=50, **settings), 0)  # type: ignore[arg-type]
    assert state.facts == {"positive": "You are always honest.", "negative": "You are never honest."}


def few(folder: Path, **settings: Any) -> dict[str, Any]:
    """Components that make 2 x 2 x 1 x 3 pairs."""
    (folder / "topics.txt").write_text("tea\nrain\n")
    (folder / "subjects.txt").write_text("owls\nglass\nsalt\n")
    return {
        "positive": ["I love {topic}", "I like {topic}"],
        "negative": ["I hate {topic}", "I dislike {topic}"],
        "endings": "let me turn to {subject}",
        "topics": folder / "topics.txt",
        "subjects": folder / "subjects.txt",
    } | settings


def test_every_size_up_to_the_largest_can_be_had_and_the_next_is_refused(tmp_path: Path) -> None:
    settings = few(tmp_path)
    for n in range(1, 13):
        assert len({whole(pair) for pair in built("suffix_pairs", n=n, **settings)}) == n
    for refuses in (lambda made: made.check(), lambda made: made.build(None, 0)):
        with pytest.raises(DatasetError, match=r"n=13, .* make 12 different pairs; set n to at most 12"):
            refuses(recipe("suffix_pairs")(n=13, **settings))


def test_components_that_no_text_names_make_no_more_pairs(tmp_path: Path) -> None:
    plain = {"positive": "I am kind", "negative": "I am rude"}
    assert len({whole(pair) for pair in built("suffix_pairs", n=3, **few(tmp_path, **plain))}) == 3
    with pytest.raises(DatasetError, match="make 1 different pairs"):
        built("suffix_pairs", n=2, **few(tmp_path, **plain, endings="let me go on"))


def test_the_built_in_components_make_all_the_pairs_they_promise() -> None:
    assert len({whole(pair) for pair in built("suffix_pairs", n=8000, **LOVE)}) == 40 * 4 * 50
    with pytest.raises(ValidationError, match="make 8000 different pairs; set n to at most 8000"):
        recipe("suffix_pairs")(n=8001, **LOVE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"positive": "I love {topic}"}, "belong together"),
        ({"positive": ["a", "b"], "negative": "c"}, "positive has 2 openings and negative 1"),
        ({"positive": "I am", "negative": "I am"}, "same on both sides: nothing to contrast"),
        ({"positive": ["a", "a"], "negative": ["b", "b"]}, "same two openings twice"),
        ({"positive": "I love {thing}", "negative": "I hate {thing}"}, r"'thing' in braces; allowed: \{topic\}"),
        ({"positive": "I love {topic}", "negative": "I hate"}, r"'I hate' lacks \{topic\}, which others have"),
        ({"positive": "I love {topic", "negative": "I hate"}, "write {{ and }} for braces that are meant"),
        ({"positive": " ", "negative": "I hate"}, "openings: each needs words"),
        ({"positive": [], "negative": []}, "openings: each needs words"),
        ({"endings": ["so", "so"]}, "endings: each must differ"),
        ({"endings": ["about {subject}", "so"]}, r"'so' lacks \{subject\}"),
        ({"endings": "about {topic}"}, r"'topic' in braces; allowed: \{subject\}"),
    ],
)
def test_a_contrast_that_cannot_be_is_refused_with_what_is_wrong(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe("suffix_pairs")(**settings)


def test_a_file_of_topics_that_repeats_one_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "topics.txt").write_text("tea\ntea\n")
    with pytest.raises(DatasetError, match=r"topics.txt: the topic 'tea' is there twice"):
        recipe("suffix_pairs")(topics=tmp_path / "topics.txt").check()


# statements


HONEST = {
    *("admitted", "the", "truth", "honestly", "revealed", "to", "a", "true", "an", "honest", "was", "frank", "with"),
    *("owned", "up", "levelled", "came", "clean"),
}
DISHONEST = {
    *("denied", "a", "lie", "dishonestly", "hid", "from", "false", "was", "to", "told", "lies", "about", "dishonest"),
    *("lied", "spun", "tales", "for"),
}


@pytest.mark.parametrize("person", ["first", "third"])
def test_statements_differ_in_words_about_honesty_alone(person: str) -> None:
    seen: Counter[str] = Counter()
    for pair in built("statement_pairs", n=2000, person=person):
        one, other = apart(pair.positive.response, pair.negative.response)
        assert set(one) <= HONEST
        assert set(other) <= DISHONEST
        assert pair.positive.system is pair.negative.system is None
        seen.update(one + other)
    assert set(seen) >= {"truth", "lie", "honestly", "dishonestly", "true", "false", "frank", "spun"}


def test_statements_are_about_the_person_that_was_asked_for() -> None:
    first, third = (built("statement_pairs", n=600, person=person) for person in ("first", "third"))
    own, others = re.compile(r"\b(I|my|me)\b"), re.compile(r"\b(she|her|he|his)\b", re.IGNORECASE)
    for pair in first:
        assert own.search(pair.positive.response)
        assert not others.search(pair.positive.response)
        assert re.search(r"\b(you|your)\b", pair.messages[0].content)
    for pair in third:
        assert not own.search(pair.positive.response)
        assert (
            len({"her" if word in ("she", "her") else "him" for word in others.findall(pair.positive.response.lower())})
            == 1
        )
        assert others.search(pair.messages[0].content)


def test_both_persons_take_turns() -> None:
    pairs = built("statement_pairs", n=7, person="both")
    first, third = (built("statement_pairs", n=n, person=p) for n, p in ((4, "first"), (3, "third")))
    assert [whole(pair) for pair in pairs[0::2]] == [whole(pair) for pair in first]
    assert [whole(pair) for pair in pairs[1::2]] == [whole(pair) for pair in third]


@pytest.mark.parametrize(("person", "most"), [("first", 9600), ("third", 19200), ("both", 19200)])
def test_statements_can_be_had_up_to_the_largest_number_and_no_more(person: str, most: int) -> None:
    pairs = built("statement_pairs", n=most, person=person)
    assert len({whole(pair) for pair in pairs}) == most
    with pytest.raises(ValidationError, match=f"there are {most} different pairs with person: {person}; set n to at"):
        recipe("statement_pairs")(n=most + 1, person=person)


def test_every_frame_has_one_honest_and_one_dishonest_reading() -> None:
    for frame in _bank.lines(statements.FRAMES):
        assert len(statements.CHOICE.findall(frame)) == 1
        assert frame.count("{who}") == frame.count("{deed}") == 1


# drawing


def test_combinations_are_different_and_cover_everything_evenly() -> None:
    assert sorted(_combine.draw((2, 3, 2), 12, 0)) == [(a, b, c) for a in range(2) for b in range(3) for c in range(2)]
    counts = Counter(_combine.draw((4, 100), 200, 1)[i][0] for i in range(200))
    assert all(30 <= counts[index] <= 70 for index in range(4))


def test_changed_components_are_a_new_version_of_the_recipe() -> None:
    """Components are not part of a key: whoever edits one bumps `version`, and these digests."""

    def digest(*texts: object) -> str:
        whole = [text.read_text(encoding="utf-8") if isinstance(text, Path) else repr(text) for text in texts]
        return hashlib.sha256("\0".join(whole).encode()).hexdigest()[:12]

    suffix = digest(suffixes.TOPICS, suffixes.SUBJECTS, suffixes.HONESTY, suffixes.ENDINGS, suffixes.ASKS)
    statement = digest(statements.FRAMES, statements.PEOPLE, statements.DEEDS, statements.ACTORS, statements.ASKS)
    assert (suffix, recipe("suffix_pairs").version) == ("01b97bf291d1", 1)
    assert (statement, recipe("statement_pairs").version) == ("16f024576ec8", 1)
