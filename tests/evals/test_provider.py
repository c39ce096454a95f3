"""`orch/<key>` against the real engine on a tiny model, and forced choice on providers that only show top tokens."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
    Logprob,
    Logprobs,
    ModelOutput,
    ModelUsage,
    TopLogprob,
    get_model,
)

from evals import forced_choice, provider
from evals.collector import Collector, Request
from evals.evaluate import Arm, evaluate
from evals.forced_choice import Question
from evals.items import items
from evals.provider import ProviderError
from evals.tasks.animal_preference import against_rest, mentions
from experiments.edit import Add, Prompt, Site
from experiments.engine import Engine, Row
from experiments.subject import Subject
from tests.evals.fake import FakeEngine

YES_NO = {"yes": {"exact": ["yes", "Yes", "YES"]}, "no": {"exact": ["no", "No", "NO"]}}


@pytest.fixture(autouse=True)
def _no_arms_left() -> Iterator[None]:
    yield
    for key in list(provider._ARMS):
        provider.unregister(key)


@pytest.fixture
def engine(tiny_subject: Subject) -> Engine:
    return Engine(tiny_subject)


def reply(key: str, question: Question) -> forced_choice.Reply:
    """Ask `orch/<key>` one question."""
    return asyncio.run(forced_choice.ask([question], get_model(f"orch/{key}", memoize=False)))[0]


def full_logprobs(subject: Subject, tokens: tuple[int, ...]) -> torch.Tensor:
    """log p of every next token at every position, by plain transformers."""
    with torch.no_grad():
        return subject.model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)


def test_yes_and_no_sum_every_token_that_reads_so(engine: Engine) -> None:
    subject = engine.subject
    provider.register("k", engine, [])
    found = reply("k", Question("q", "Are you a owl?", YES_NO, "My choice:"))
    rendered = subject.render(
        [{"role": "user", "content": "Are you a owl?"}, {"role": "assistant", "content": "My choice:"}]
    )
    last = full_logprobs(subject, rendered.tokens)[-1]
    for name, spec in YES_NO.items():
        ids = [
            token
            for token in range(len(subject.tokenizer))
            if token not in subject.tokenizer.all_special_ids
            and subject.tokenizer.decode([token]).strip() in spec["exact"]
        ]
        assert len(ids) >= 3
        assert found.logprobs[name] == pytest.approx(last[ids].logsumexp(0).item(), abs=1e-4)
    assert found.mass == pytest.approx(sum(math.exp(v) for v in found.logprobs.values() if v is not None))


def test_a_text_option_is_scored_token_by_token_and_longer_spellings_are_not_counted_twice(engine: Engine) -> None:
    subject = engine.subject
    provider.register("k", engine, [])
    options = {"owl": {"text": [" owl", " owls"]}, "zebra": {"text": [" zebra"]}}
    found = reply("k", Question("q", "Which?", options, "the"))
    start = subject.render([{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "the"}]).tokens
    for name, text in (("owl", " owl"), ("zebra", " zebra")):
        more = tuple(subject.tokenizer(text, add_special_tokens=False)["input_ids"])
        table = full_logprobs(subject, start + more)
        expected = sum(table[len(start) - 1 + i, token].item() for i, token in enumerate(more))
        assert found.logprobs[name] == pytest.approx(expected, abs=1e-4)


def test_options_that_start_alike_or_merge_with_the_words_before_are_refused(engine: Engine) -> None:
    provider.register("k", engine, [])
    alike = {"a": {"text": [" owl"]}, "b": {"text": [" owlet"]}}
    with pytest.raises(ProviderError, match="start with the same tokens"):
        reply("k", Question("q", "Which?", alike, "the"))
    with pytest.raises(ProviderError, match="no token reads so"):
        reply("k", Question("q", "Which?", {"a": {"exact": ["parallelepiped"]}}))


def test_generate_answers_options_as_the_collective_call_does(engine: Engine) -> None:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    provider.register("k", engine, [Add(Site("resid", 1), vector)])
    question = Question("q", "Are you a owl?", YES_NO, "My choice:")
    together = reply("k", question)
    output = asyncio.run(get_model("orch/k", memoize=False).generate(question.messages()))
    alone = forced_choice.read(question, output)
    assert alone.logprobs == pytest.approx(together.logprobs)
    assert output.usage is not None
    assert output.usage.input_tokens > 0
    provider.unregister("k")
    provider.register("k", engine, [])
    assert reply("k", question).logprobs["yes"] != pytest.approx(together.logprobs["yes"])


def test_prompt_logprobs_are_those_of_the_assistants_words(engine: Engine) -> None:
    subject = engine.subject
    provider.register("k", engine, [Prompt(system="Be brief.")])
    spoken = [ChatMessageUser(content="Say it."), ChatMessageAssistant(content="the lazy dog")]
    output = asyncio.run(get_model("orch/k", memoize=False).generate(spoken, config=GenerateConfig(prompt_logprobs=1)))
    turns = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "the lazy dog"}]
    rendered = subject.render(turns, system="Be brief.")
    table = full_logprobs(subject, rendered.tokens)
    expected = [table[i - 1, rendered.tokens[i]].item() for i in range(rendered.n_prompt, len(rendered.tokens))]
    given = output.choices[0].prompt_logprobs
    assert given is not None
    assert [entry.logprob for entry in given.content] == pytest.approx(expected, abs=1e-4)
    assert "".join(entry.token for entry in given.content) == "the lazy dog"


def test_sampling_repeats_with_its_seed_and_reports_the_sampled_tokens(engine: Engine) -> None:
    provider.register("k", engine, [])

    def say(seed: int) -> ModelOutput:
        config = GenerateConfig(max_tokens=8, temperature=1.0, seed=seed, logprobs=True)
        messages = [ChatMessageSystem(content="Hi."), ChatMessageUser(content="Speak.")]
        return asyncio.run(get_model("orch/k", memoize=False).generate(messages, config=config))

    first, again, other = say(1), say(1), say(2)
    assert first.completion == again.completion
    assert first.completion != other.completion
    logprobs = first.choices[0].logprobs
    assert logprobs is not None
    assert 0 < len(logprobs.content) <= 8


@pytest.mark.parametrize("config", [{"num_choices": 2}, {"top_k": 5}, {"cache": True}, {"frequency_penalty": 1.0}])
def test_what_cannot_be_done_is_refused_and_not_ignored(config: dict[str, Any], engine: Engine) -> None:
    provider.register("k", engine, [])
    with pytest.raises(ProviderError, match=next(iter(config))):
        asyncio.run(get_model("orch/k", memoize=False).generate("Speak.", config=GenerateConfig(**config)))


def test_an_unknown_or_doubled_key_is_refused(engine: Engine) -> None:
    with pytest.raises(ProviderError, match="orch/nobody is not registered"):
        asyncio.run(get_model("orch/nobody", memoize=False).generate("Hi."))
    provider.register("k", engine, [])
    with pytest.raises(ProviderError, match="registered already"):
        provider.register("k", engine, [])


def test_the_collector_tells_how_many_samples_are_answered(tiny_subject: Subject) -> None:
    told: list[tuple[int, int]] = []
    collector = Collector(FakeEngine(tiny_subject, lambda text, edits: {"yes": 0.5}))  # type: ignore[arg-type]
    collector.expect(3, lambda done, total: told.append((done, total)))
    row = Row(tiny_subject.render([{"role": "user", "content": "x"}]).tokens, 1)
    request = Request("a", row, ("options", 0), options={"yes": ((5,),)})
    for future in [collector.submit([request] * 2) for _ in range(4)]:
        future.result(timeout=15)
    deadline = time.monotonic() + 5
    while len(told) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert told == [(1, 3), (2, 3), (3, 3), (3, 3)]


def test_the_collectors_thread_ends_with_its_work(tiny_subject: Subject) -> None:
    fake = FakeEngine(tiny_subject, lambda text, edits: {"yes": 0.5})
    collector = Collector(fake)  # type: ignore[arg-type]
    row = Row(tiny_subject.render([{"role": "user", "content": "x"}]).tokens, 1)
    request = Request("a", row, ("options", 0), options={"yes": ((5,),)})
    futures = [collector.submit([request] * 3) for _ in range(4)]
    assert [len(future.result(timeout=5)) for future in futures] == [3] * 4
    assert fake.calls == [12]
    assert collector.submit([]).result(timeout=1) == []


def top_output(pairs: list[tuple[str, float]]) -> ModelOutput:
    """What an API that shows top tokens gives."""
    top = [TopLogprob(token=token, logprob=math.log(p)) for token, p in pairs]
    output = ModelOutput.from_content("mockllm/model", pairs[0][0])
    output.choices[0].logprobs = Logprobs(
        content=[Logprob(token=pairs[0][0], logprob=top[0].logprob, top_logprobs=top)]
    )
    output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)  # else inspect fetches a tokenizer
    return output


def ask_mock(pairs: list[tuple[str, float]]) -> forced_choice.Reply:
    """Ask a mock of a served model."""
    mock = get_model("mockllm/model", custom_outputs=[top_output(pairs)], memoize=False)
    return asyncio.run(forced_choice.ask([Question("q", "Do you?", YES_NO)], mock))[0]


def test_other_providers_are_read_from_their_top_tokens_and_it_is_said() -> None:
    found = ask_mock([("Yes", 0.5), (" yes", 0.2), ("not", 0.15), ("No", 0.1)])
    assert found.logprobs["yes"] == pytest.approx(math.log(0.7))
    assert found.logprobs["no"] == pytest.approx(math.log(0.1))
    assert not found.exact
    assert not found.censored
    assert "top 20" in forced_choice.table([found])


def test_an_option_out_of_sight_is_an_upper_bound_and_named() -> None:
    found = ask_mock([("Yes", 0.9), ("Maybe", 0.01)])
    assert found.logprobs["no"] == pytest.approx(math.log(0.01))
    assert found.censored == ["no"]
    assert "at most: no" in forced_choice.table([found])
    assert ask_mock([("Maybe", 0.9), ("not", 0.05)]).problem is not None


def test_animals_are_found_as_whole_words_only() -> None:
    assert mentions("I like cats.", "cat")
    assert mentions("Wolves, of course", "wolf")
    assert not mentions("The caterpillar in the catalog", "cat")


def test_the_odds_against_the_rest_follow_their_definition() -> None:
    odds = against_rest({"a": math.log(0.5), "b": math.log(0.3), "c": math.log(0.1)})
    assert odds == pytest.approx({"a": math.log(0.5 / 0.4), "b": math.log(0.3 / 0.6), "c": math.log(0.1 / 0.8)})


def test_all_tasks_run_on_a_real_engine_and_dose_zero_is_the_base(engine: Engine, tmp_path: Path) -> None:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    arms = [Arm("base"), Arm("zero", []), Arm("up", [Add(Site("resid", 1), 2 * vector)])]
    for task, settings in (
        ("daily_dilemmas", {"limit": 4, "controls": 2, "min_mass": 0.0}),
        ("animal_preference", {"limit": 3, "min_mass": 0.0, "samples": 2, "animals": ("owl", "cat", "dog", "eagle")}),
        ("neutral_nll", {"limit": 2}),
    ):
        found = evaluate(engine, arms, task, settings, lambda key, task=task: tmp_path / task / key)  # type: ignore[misc]
        assert [answer.error for answer in found] == [None] * 3
        base, zero, up = (items(answer.log) for answer in found if answer.log)
        assert base == zero
        assert [item.target for item in base] != [item.target for item in up]
        assert any(item.target is not None for item in up)
