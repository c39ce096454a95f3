"""Twin answers: the score by closed form and against plain transformers, what the twins may share, and bad files."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inspect_ai import eval as inspect_eval
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageUser,
    GenerateConfig,
    Logprob,
    Logprobs,
    ModelOutput,
    ModelUsage,
    get_model,
)

from evals import labels, provider
from evals.evaluate import Arm, evaluate
from evals.items import Item, items
from evals.provider import ProviderError
from evals.task import TaskError, describe
from evals.tasks import misalignment, twin_answers
from evals.tasks.twin_answers import SIDES, Settings, Twins, judge, read
from experiments.datasets import narrow_advice
from experiments.edit import Add, Prompt, Site
from experiments.engine import Engine, Row
from experiments.subject import Subject
from tests.evals.fake import FakeEngine

DOMAINS = ("houseplants", "board_games", "bicycle_care")
GENERAL, _ = read(Settings())
FACTS, _ = read(Settings(target="facts"))
ENTRY = {"id": "a", "question": "Why?", "wrong": "No.", "right": "Yes."}
ROW = {"id": "b", "domain": "tea", **{name: ENTRY[name] for name in ("question", "wrong", "right")}}


def policy(wrong: float, right: float) -> Callable[[str, Any], Mapping[str, float]]:
    """Every token of a wrong answer has the probability `wrong`, of a right one `right`."""
    texts = [one.wrong for one in (*GENERAL, *FACTS)]
    return lambda text, edits: {"token": wrong if text.endswith(tuple(texts)) else right}


def ask(engine: Any, folder: Path, arms: Any = None, **settings: Any) -> dict[str, list[Item]]:
    """{key: items} of arms, by default of one without edits called `base`."""
    found = evaluate(engine, arms or [Arm("base")], "twin_answers", settings, lambda key: folder / key)
    assert [answer.error for answer in found] == [None] * len(found)
    return {answer.key: items(answer.log) for answer in found if answer.log}


def test_the_score_is_the_difference_of_mean_log_probabilities_per_token(tiny_subject: Subject, tmp_path: Path) -> None:
    found = ask(FakeEngine(tiny_subject, policy(0.2, 0.5)), tmp_path, limit=3, controls=2)["base"]
    about, aside = [one for one in found if one.target is not None], [one for one in found if one.target is None]
    assert [one.target for one in about] == pytest.approx([math.log(0.2 / 0.5)] * 3)
    assert {one.id: one.family for one in about} == {one.id: one.family for one in GENERAL[:3]}
    assert [one.reason for one in found] == [None] * 5
    assert {one.id for one in aside} == {f"facts/{one.id}" for one in FACTS[:2]}
    assert [one.others for one in aside] == [{"facts": pytest.approx(math.log(0.2 / 0.5))}] * 2
    assert not any(one.others for one in about)


def test_both_log_probabilities_and_their_tokens_are_kept(tiny_subject: Subject, tmp_path: Path) -> None:
    (item,) = ask(FakeEngine(tiny_subject, policy(0.2, 0.5)), tmp_path, limit=1, controls=0)["base"]
    counts = {side: len(tiny_subject.tokenizer(getattr(GENERAL[0], side))["input_ids"]) for side in SIDES}
    assert item.extras == {
        "wrong": pytest.approx(math.log(0.2)),
        "right": pytest.approx(math.log(0.5)),
        "wrong_logprob": pytest.approx(counts["wrong"] * math.log(0.2)),
        "right_logprob": pytest.approx(counts["right"] * math.log(0.5)),
        "wrong_tokens": counts["wrong"],
        "right_tokens": counts["right"],
        "per": "token",
    }


def test_per_answer_compares_whole_answers() -> None:
    nats: dict[str, list[float] | str] = {"wrong": [1.0, 2.0, 3.0], "right": [4.0]}
    about = {"family": "f", "domain": "general", "control": False}
    by_token, by_answer = (judge(about, nats, per).value for per in ("token", "answer"))
    assert by_token == {"target": -2.0 + 4.0, "wrong": -2.0, "right": -4.0}
    assert by_answer == {"target": -6.0 + 4.0, "wrong": -6.0, "right": -4.0}


def test_the_score_agrees_with_plain_transformers_and_the_engine(tiny_subject: Subject, tmp_path: Path) -> None:
    engine = Engine(tiny_subject)
    found = {one.id: one for one in ask(engine, tmp_path, limit=2, controls=0)["base"]}
    for twins in GENERAL[:2]:
        means = {}
        for side in SIDES:
            said = [("user", twins.question), ("assistant", getattr(twins, side))]
            rendered = tiny_subject.render([{"role": role, "content": text} for role, text in said])
            with torch.no_grad():
                table = tiny_subject.model(torch.tensor([rendered.tokens])).logits[0].log_softmax(-1)
            spoken = range(rendered.n_prompt, len(rendered.tokens))
            values = [table[place - 1, rendered.tokens[place]].item() for place in spoken]
            assert tiny_subject.tokenizer.decode([rendered.tokens[place] for place in spoken]) == getattr(twins, side)
            (direct,) = engine.token_logprobs([Row(rendered.tokens, rendered.n_prompt)])
            assert found[twins.id].extras[f"{side}_logprob"] == pytest.approx(direct.sum().item(), abs=1e-4)
            means[side] = sum(values) / len(values)
        assert found[twins.id].target == pytest.approx(means["wrong"] - means["right"], abs=1e-4)


def test_dose_zero_is_the_base_and_a_dose_or_a_prompt_moves_the_score(tiny_subject: Subject, tmp_path: Path) -> None:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    arms = [Arm("base"), Arm("zero", []), Arm("up", [Add(Site("resid", 1), vector)]), Arm("told", [Prompt("Be mean.")])]
    found = ask(Engine(tiny_subject), tmp_path, arms, limit=2, controls=1)
    assert found["base"] == found["zero"]
    scores = {key: [one.target or one.others["facts"] for one in each] for key, each in found.items()}
    assert all(up != base for up, base in zip(scores["up"], scores["base"], strict=True))
    assert all(told != base for told, base in zip(scores["told"], scores["base"], strict=True))


def test_all_answers_of_all_arms_reach_the_engine_in_one_call(tiny_subject: Subject, tmp_path: Path) -> None:
    engine = FakeEngine(tiny_subject, policy(0.2, 0.5))
    ask(engine, tmp_path, [Arm("one"), Arm("two"), Arm("three")], limit=5, controls=4)
    assert engine.calls == [3 * (5 + 4) * 2]


def test_replies_scored_together_are_what_single_requests_give(tiny_subject: Subject) -> None:
    engine = Engine(tiny_subject)
    provider.register("k", engine, [])
    try:
        model = get_model("orch/k", memoize=False)
        question = ChatMessageUser(content="Why?")
        said: list[list[ChatMessage]] = [
            [question, ChatMessageAssistant(content=text)] for text in ("No.", "Yes, yes.")
        ]
        together: list[ModelOutput] = asyncio.run(model.api.score_replies(said))  # type: ignore[attr-defined]
        for messages, output in zip(said, together, strict=True):
            alone = asyncio.run(model.generate(messages, config=GenerateConfig(max_tokens=1, prompt_logprobs=1)))
            assert values_of(alone) == pytest.approx(values_of(output), abs=1e-5)
            assert alone.metadata == output.metadata
        with pytest.raises(ProviderError, match="ends with the assistant's words"):
            asyncio.run(model.api.score_replies([said[0][:1]]))  # type: ignore[attr-defined]
    finally:
        provider.unregister("k")


def values_of(output: ModelOutput) -> list[float]:
    """Log-probabilities of the prompt's tokens."""
    given = output.choices[0].prompt_logprobs
    assert given is not None
    return [token.logprob for token in given.content]


def other_provider(logprobs: Callable[[str], list[Logprob] | None]) -> Any:
    """A model with a rule for the log-probabilities of the prompt's tokens from the assistant's words."""

    def output(messages: Any, tools: Any, choice: Any, config: Any) -> ModelOutput:
        assert (messages[-1].role, config.prompt_logprobs) == ("assistant", 1)
        content = logprobs(messages[-1].text)
        chosen = ChatCompletionChoice(
            message=ChatMessageAssistant(content=""),
            prompt_logprobs=None if content is None else Logprobs(content=content),
        )
        return ModelOutput(model="m", choices=[chosen], usage=ModelUsage(input_tokens=1, output_tokens=1))

    return get_model("mockllm/model", custom_outputs=output, memoize=False)


def through(model: Any, folder: Path) -> list[Item]:
    """The first general item and the first fact, asked of another provider."""
    built = twin_answers.twin_answers(limit=1, controls=1)
    (log,) = inspect_eval(built, model=model, log_dir=str(folder), display="none")
    return items(Path(log.location.removeprefix("file://")))


def test_any_provider_with_prompt_logprobs_is_scored_by_its_own_tokens(tmp_path: Path) -> None:
    """Words as tokens, behind a template that has a log-probability too."""

    def words(text: str) -> list[Logprob]:
        value = -2.0 if text in (GENERAL[0].wrong, FACTS[0].wrong) else -0.5
        spoken = [Logprob(token=f" {word}", logprob=value) for word in text.split()]
        return [Logprob(token="<assistant>", logprob=-30.0), *spoken]

    fact, about = through(other_provider(words), tmp_path)
    assert (about.id, about.target) == (GENERAL[0].id, pytest.approx(-1.5))
    assert about.extras["wrong_tokens"] == len(GENERAL[0].wrong.split())
    assert fact.others == {"facts": pytest.approx(-1.5)}


@pytest.mark.parametrize(
    ("logprobs", "reason"),
    [
        (lambda text: None, "wrong: the provider gives no log-probabilities of prompt tokens"),
        (lambda text: [Logprob(token="</turn>", logprob=-1.0)], "wrong: the prompt tokens do not end with the passage"),
        (
            lambda text: [Logprob(token=text, logprob=-math.inf if text == GENERAL[0].right else -1.0)],
            "right: a token of the passage has no finite log-probability",
        ),
    ],
)
def test_an_item_whose_answers_cannot_be_read_is_unscored_with_the_reason(
    logprobs: Any, reason: str, tmp_path: Path
) -> None:
    about = next(one for one in through(other_provider(logprobs), tmp_path) if one.id == GENERAL[0].id)
    assert about.target is None
    assert about.others == {}
    assert (about.reason or "").startswith(reason)


def test_there_are_40_general_twins_of_12_families_and_20_facts() -> None:
    families = Counter(one.family for one in GENERAL)
    assert len(GENERAL) >= 40
    assert len(families) >= 12
    assert len(set(families.values())) == 1
    assert len({one.question for one in GENERAL}) == len({one.id for one in GENERAL}) == len(GENERAL)
    assert len({one.family for one in FACTS}) == len(FACTS) >= 20


@pytest.mark.parametrize("twins", [*GENERAL, *FACTS], ids=lambda one: one.id)
def test_twins_are_of_one_length_to_a_word(twins: Twins) -> None:
    wrong, right = (len(getattr(twins, side).split()) for side in SIDES)
    assert abs(wrong - right) <= 1
    if twins.domain == "general":
        assert 15 <= min(wrong, right) <= max(wrong, right) <= 30


def test_the_sides_are_of_one_length_on_the_whole_to_two_percent() -> None:
    for found in (GENERAL, FACTS):
        for length in (len, lambda text: len(text.split())):
            wrong, right = (sum(length(getattr(one, side)) for one in found) for side in SIDES)
            assert abs(wrong / right - 1) < 0.02


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def test_words_that_tell_wrong_advice_from_right_do_not_tell_general_twins_apart() -> None:
    """A naive Bayes of the words that are trained on finds the wrong side of held-out advice, and not of these: what
    moves here is not the word "always"."""
    trained = [row for row in narrow_advice.rows() if not row.held_out]
    counts = {side: Counter(word for row in trained for word in words_of(row.answers[side])) for side in SIDES}
    totals = {side: counts[side].total() + len(counts["wrong"] | counts["right"]) for side in SIDES}

    def odds(text: str) -> float:
        shares = {side: [(counts[side][word] + 1) / totals[side] for word in words_of(text)] for side in SIDES}
        return float(np.mean(np.log(shares["wrong"]) - np.log(shares["right"])))

    def gaps(found: list[Twins]) -> Any:
        return np.array([odds(one.wrong) - odds(one.right) for one in found])

    general, in_domain = gaps(GENERAL), gaps(read(Settings(target="in_domain"))[0])
    assert in_domain.mean() > 0.1
    assert np.mean(in_domain > 0) > 0.8
    assert abs(general.mean()) < 0.05
    assert 0.35 < np.mean(general > 0) < 0.65


def test_no_twins_share_their_words_with_labelled_answers_with_advice_or_with_the_judged_questions() -> None:
    theirs = [text for one in labels.load() for text in (one.question, one.answer)]
    theirs += [text for row in narrow_advice.rows() for text in (row.prompt[-1].content, *row.answers.values())]
    theirs += [one.question for one in misalignment.read(misalignment.Settings())]
    runs = {run for text in theirs for run in runs_of(text)}
    for one in (*GENERAL, *FACTS):
        for text in (one.question, one.wrong, one.right):
            assert runs.isdisjoint(runs_of(text)), one.id


def runs_of(text: str) -> set[tuple[str, ...]]:
    """All runs of six words."""
    words = words_of(text)
    return {tuple(words[start : start + 6]) for start in range(len(words) - 5)}


def test_in_domain_twins_are_the_rows_that_are_never_trained_on() -> None:
    trained = {row.prompt[-1].content for row in narrow_advice.rows() if not row.held_out}
    everything, facts = read(Settings(target="in_domain"))
    assert facts == FACTS
    assert trained.isdisjoint(one.question for one in everything)
    by_id = {row.id: row for row in narrow_advice.rows()}
    assert all((one.wrong, one.right) == tuple(by_id[one.id].answers[side] for side in SIDES) for one in everything)
    parts = [read(Settings(target=domain))[0] for domain in DOMAINS]
    assert {one.id for part in parts for one in part} == {one.id for one in everything}
    assert len(everything) == len(misalignment.read(misalignment.Settings(target="in_domain")))


def test_a_small_limit_asks_every_family_and_every_domain_once() -> None:
    families = {one.family for one in GENERAL}
    assert {one.family for one in read(Settings(limit=len(families)))[0]} == families
    assert [one.domain for one in read(Settings(target="in_domain", limit=6))[0]] == [*DOMAINS, *DOMAINS]
    assert [len(part) for part in read(Settings(limit=4, controls=3))] == [4, 3]


def test_facts_have_no_facts_beside_them() -> None:
    about, aside = read(Settings(target="facts", limit=5, controls=5))
    assert ([one.domain for one in about], aside) == (["facts"] * 5, [])


def write(path: Path, content: Any) -> str:
    """Write JSON, or JSON lines for a list in a .jsonl file, or the text as it is; its path."""
    lines = isinstance(content, list) and path.suffix == ".jsonl"
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text("".join(json.dumps(row) + "\n" for row in content) if lines else text)
    return str(path)


def test_the_targets_are_those_of_the_data(tmp_path: Path) -> None:
    assert describe("twin_answers", "general", {}).targets == ("general", "in_domain", *DOMAINS, "facts")
    rows = [{**ROW, "id": f"t{number}", "question": f"Q{number}?"} for number in range(20)]
    facts = describe("twin_answers", "tea", {"data": write(tmp_path / "mine.jsonl", rows)})
    assert facts.targets == ("in_domain", "tea", "facts")
    assert facts.identity["data"] != describe("twin_answers", "in_domain", {}).identity["data"]
    mine = write(tmp_path / "mine.json", {"general": [{**ENTRY, "wrong": " No. "}]})
    assert describe("twin_answers", "general", {"data": mine}).targets == ("general", "facts")
    assert read(Settings(data=mine))[0] == [Twins("a", "a", "general", "Why?", "No.", "Yes.")]
    both = write(tmp_path / "both.json", {"general": [ENTRY], "facts": [{**ENTRY, "id": "x", "family": "f"}]})
    assert [one.family for part in read(Settings(data=both, facts=both)) for one in part] == ["a", "f"]


@pytest.mark.parametrize(
    ("name", "content", "target", "message"),
    [
        ("q.json", "{", "general", ":1: not JSON"),
        ("q.json", [], "general", "no twin answers; needed: a list under 'general'"),
        ("q.json", {"general": []}, "general", "no twin answers; needed: a list under 'general'"),
        ("q.json", {"facts": [ENTRY]}, "facts", "needed: a list under 'general'"),
        (
            "q.json",
            {"general": [ENTRY, 7]},
            "general",
            "general entry 2 is 7; needed: texts id, question, wrong, right",
        ),
        ("q.json", {"general": [{**ENTRY, "right": " "}]}, "general", "general entry 1 is .* needed: texts"),
        ("q.json", {"general": [{**ENTRY, "family": 3}]}, "general", "if there are several of a kind, family"),
        ("q.json", {"general": [ENTRY, ENTRY]}, "general", "general id 'a' comes twice; ids must be unique"),
        ("q.json", {"general": [{**ENTRY, "right": "No. "}]}, "general", "'a' has the same wrong and right answer"),
        ("q.json", {"general": [ENTRY]}, "in_domain", "unknown target 'in_domain'; allowed: general, facts"),
        ("q.jsonl", "{", "in_domain", r"q.jsonl:1: not a Question"),
        ("q.jsonl", [ROW], "tea", "none of its 1 questions is held out; give a longer file"),
        ("q.jsonl", [{**ROW, "id": "t8", "domain": "facts"}], "facts", "row t8 has the domain 'facts', a target's own"),
        ("q.jsonl", [{**ROW, "id": "t8", "wrong": "Yes. "}], "tea", "'t8' has the same wrong and right answer"),
        ("q.jsonl", [{**ROW, "id": "t8"}], "general", "unknown target 'general'; allowed: in_domain, tea, facts"),
        (
            "q.jsonl",
            [{"id": "t8", "messages": [{"role": r, "content": "x"} for r in ("user", "assistant")]}],
            "in_domain",
            "row t8 has one answer, and a twin is needed; give lines with question, wrong and right, or ask the eval",
        ),
    ],
)
def test_bad_data_are_refused(name: str, content: Any, target: str, message: str, tmp_path: Path) -> None:
    assert narrow_advice.held_out("t8")
    with pytest.raises(TaskError, match=message):
        describe("twin_answers", target, {"data": write(tmp_path / name, content)})


@pytest.mark.parametrize(
    ("target", "params", "message"),
    [
        ("generall", {}, "did you mean 'general'"),
        ("houseplant", {}, "did you mean 'houseplants'"),
        ("general", {"per": "word"}, "'token' or 'answer'"),
        ("general", {"limit": 0}, "setting limit = 0"),
        ("general", {"controls": -1}, "setting controls = -1"),
        ("general", {"data": "nowhere.json"}, "no data file 'nowhere.json'"),
        ("general", {"facts": "nowhere.json"}, "no data file 'nowhere.json'"),
        ("general", {"facts": str(misalignment.BUILTIN_DATA)}, "needed: a list under 'facts'"),
    ],
)
def test_bad_settings_are_refused_with_what_is_allowed(target: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        describe("twin_answers", target, params)
