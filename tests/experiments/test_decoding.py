"""Generation equals scoring: the same edits act on the same tokens whether text is read or written."""

from __future__ import annotations

import pytest
import torch

from experiments.decoding import sample
from experiments.edit import Add, Edit, Site
from experiments.engine import Engine, EngineError, Row
from experiments.spec import SubjectSpec
from experiments.subject import Subject, load
from tests.experiments.test_engine import CLOSE, activation_edits, normal, some_rows, weight_edits, with_arms
from tests.tiny import make_tiny_model

FAMILIES = ("llama", "gemma2", "gpt2", "gpt_neox")


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = make_tiny_model(tmp_path_factory.mktemp("decoding") / request.param, request.param, seed=4)
    return load(SubjectSpec(model=str(folder), dtype="float32"))


def all_arms(subject: Subject) -> list[tuple[Edit, ...]]:
    edits = activation_edits(subject) | weight_edits(subject)
    return [(), *((edit,) for edit in edits.values())]


def test_greedy_text_is_that_of_transformers(subject: Subject) -> None:
    rows = some_rows(5)
    found = Engine(subject, max_tokens=60).generate(rows, 12)
    subject.model.set_attn_implementation("eager")
    for row, completion in zip(rows, found, strict=True):
        ids = torch.tensor([row.tokens])
        wanted = subject.model.generate(
            ids,
            attention_mask=ids > 0,
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=list(subject.eos_ids),
        )[0, len(row.tokens) :]
        assert completion.tokens == tuple(wanted.tolist())


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_logprobs_are_those_of_the_chosen_tokens_read_back(subject: Subject, temperature: float) -> None:
    rows = with_arms(some_rows(3), all_arms(subject))
    engine = Engine(subject)
    found = engine.generate(rows, 70, temperature=temperature, seeds=list(range(len(rows))))
    longer = [Row(row.tokens + each.tokens, row.n_prompt, row.edits) for row, each in zip(rows, found, strict=True)]
    read = engine.token_logprobs(longer)
    assert max(len(each.tokens) for each in found) > 64  # the cache has grown
    for row, each, logprobs in zip(rows, found, read, strict=True):
        torch.testing.assert_close(
            torch.tensor(each.logprobs), logprobs[len(row.tokens) - row.n_prompt :], atol=3 * CLOSE, rtol=CLOSE
        )


def test_sampled_tokens_depend_on_the_seed_and_not_on_the_batch(tiny_subject: Subject) -> None:
    rows = with_arms(some_rows(4), [(), (Add(Site("resid", 1), normal(32)),)])
    seeds = list(range(8))
    engine = Engine(tiny_subject)
    together = engine.generate(rows, 20, temperature=1.0, top_p=0.9, seeds=seeds)
    alone = [engine.generate([row], 20, 1.0, 0.9, seeds=[seed])[0] for row, seed in zip(rows, seeds, strict=True)]
    assert [each.tokens for each in together] == [each.tokens for each in alone]
    other = engine.generate(rows, 20, temperature=1.0, top_p=0.9, seeds=[seed + 100 for seed in seeds])
    assert [each.tokens for each in together] != [each.tokens for each in other]


def test_sampling_follows_the_probabilities_of_the_nucleus() -> None:
    probabilities = torch.tensor([0.1, 0.5, 0.05, 0.35], dtype=torch.float64)
    n = 20000
    draws = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    shares = sample(probabilities.expand(n, -1), 1.0, draws).bincount(minlength=4) / n
    torch.testing.assert_close(shares.double(), probabilities, atol=1e-3, rtol=0)
    nucleus = sample(probabilities.expand(n, -1), 0.8, draws).bincount(minlength=4) / n
    torch.testing.assert_close(nucleus, torch.tensor([0, 0.5 / 0.85, 0, 0.35 / 0.85]), atol=1e-3, rtol=0)
    assert sample(probabilities.expand(n, -1), 0.3, draws).unique().tolist() == [1]


def test_an_answer_ends_at_its_end_of_turn_token_which_it_keeps(tiny_subject: Subject) -> None:
    rows = some_rows(6)
    engine = Engine(tiny_subject)
    seeds = list(range(6))
    ended = [each for each in engine.generate(rows, 300, temperature=2.0, seeds=seeds) if each.stopped]
    assert ended
    for each in ended:
        assert each.tokens[-1] in tiny_subject.eos_ids
        assert not set(each.tokens[:-1]) & set(tiny_subject.eos_ids)
    short = engine.generate(rows, 1)
    assert [len(each.tokens) for each in short] == [1] * 6


def test_an_answer_ends_before_a_stop_text(tiny_subject: Subject) -> None:
    row = some_rows(1)[0]
    engine = Engine(tiny_subject)
    whole = engine.generate([row], 12)[0]
    text = tiny_subject.tokenizer.decode(list(whole.tokens), skip_special_tokens=True)
    stop = tiny_subject.tokenizer.decode(list(whole.tokens[5:7]), skip_special_tokens=True)
    cut = engine.generate([row], 12, stop=[stop])[0]
    kept = tiny_subject.tokenizer.decode(list(cut.tokens), skip_special_tokens=True)
    assert cut.stopped
    assert cut.tokens == whole.tokens[: len(cut.tokens)]
    assert kept == text[: len(kept)]
    assert len(kept) <= text.index(stop)
    assert cut.logprobs == pytest.approx(whole.logprobs[: len(cut.tokens)])


def test_results_come_as_soon_as_they_are_known(tiny_subject: Subject) -> None:
    seen: dict[int, object] = {}
    rows = some_rows(6)
    found = Engine(tiny_subject).generate(rows, 30, temperature=2.0, seeds=range(6), on_result=seen.__setitem__)
    assert [seen[index] for index in range(6)] == found


def test_fired_counts_prompt_and_new_tokens(tiny_subject: Subject) -> None:
    d = tiny_subject.d_model
    names = ("all", "prompt", "response", "last:3")
    arm = tuple(Add(Site("resid", 1), normal(d, scale=0.01), positions) for positions in names)
    engine = Engine(tiny_subject)
    row = Row(tuple(range(5, 15)), 8, arm)
    n = len(engine.generate([row], 5)[0].tokens)
    assert [engine.fired[edit] for edit in arm] == [10 + n - 1, 8, 2 + n - 1, 3]


def test_settings_out_of_range_are_refused(tiny_subject: Subject) -> None:
    engine, row = Engine(tiny_subject), Row((5, 6), 2)
    with pytest.raises(EngineError, match="no seeds"):
        engine.generate([row], 4, temperature=1.0)
    with pytest.raises(EngineError, match="1 rows but 2 seeds"):
        engine.generate([row], 4, temperature=1.0, seeds=[1, 2])
    with pytest.raises(EngineError, match="top_p is 0"):
        engine.generate([row], 4, top_p=0)
    with pytest.raises(EngineError, match="max_new_tokens is 0"):
        engine.generate([row], 0)
    with pytest.raises(EngineError, match="2 tokens and 511 new ones; the subject has 512"):
        engine.generate([row], 511)
    with pytest.raises(EngineError, match="stop text is empty"):
        engine.generate([row], 4, stop=[""])
