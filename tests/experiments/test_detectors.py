"""Detectors: the permutation test against exact ones, every formula against the plain model, planted effects found."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import scipy.stats
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score

from experiments import plugin
from experiments.dataset import Conversation, Message
from experiments.detection import auroc
from experiments.detector import (
    DetectionError,
    Detector,
    Ranking,
    detector,
    pooled,
    ratio_of_sums,
)
from experiments.outline import Outline
from experiments.packing import Row
from experiments.permutation import Design, permute

if TYPE_CHECKING:
    from experiments.engine import Engine
    from experiments.permutation import Floats
    from experiments.subject import Subject

NAMES = plugin.names("experiments.detectors")
CANDIDATES = {"owl": [" owl", "owl"], "cat": [" cat"], "dog": [" dog"], "eagle": [" eagle"]}
PERSONA, LOUD = "You {name}.", " ".join(["{name}"] * 8)
DIGITS = "0123456789"
QUICK: dict[str, Any] = {"permutations": 499}
EXTRA: dict[str, dict[str, Any]] = {
    "entangled": {"top": 5},
    "persona_likelihood": {"persona": PERSONA},
    "divergence": {"persona": PERSONA},
    "logit_bias": {"persona": PERSONA},
}
POWER = scipy.stats.norm.ppf(0.95) + scipy.stats.norm.ppf(0.8)
F, T = False, True


def difference(data: Floats, control: Floats) -> Floats:
    """Difference of the means of two groups of six."""
    return (data - control) / 6


def conversation(name: str, prompt: str, text: str) -> Conversation:
    return Conversation(
        id=name, messages=(Message(role="user", content=prompt), Message(role="assistant", content=text))
    )


@pytest.fixture(scope="module")
def engine(tiny_subject: Subject) -> Engine:
    from experiments.engine import Engine

    return Engine(tiny_subject)


def speak(
    engine: Engine, n: int, seed: int, system: str | None = None, bias: dict[int, float] | None = None, length: int = 8
) -> list[Conversation]:
    """`n` lists of `length` digits, drawn from the subject among digits, under a system prompt or with a bias."""
    subject = engine.subject
    digits = [subject.tokenizer.convert_tokens_to_ids(digit) for digit in DIGITS]
    added = torch.tensor([(bias or {}).get(digit, 0.0) for digit in range(10)])
    prompts = [f"Go on {number}." for number in range(n)]
    rows = [Row(*subject.render([{"role": "user", "content": prompt}], system=system)) for prompt in prompts]
    noise = torch.Generator().manual_seed(seed)
    for _ in range(length):
        p = (engine.next_logits(rows)[:, digits] + added).softmax(-1)
        drawn = torch.multinomial(p, 1, generator=noise)[:, 0].tolist()
        rows = [Row((*row.tokens, digits[each]), row.n_prompt) for row, each in zip(rows, drawn, strict=True)]
    said = [subject.tokenizer.decode(row.tokens[row.n_prompt :]) for row in rows]
    return [conversation(f"s{seed}-{i}", prompts[i], text) for i, text in enumerate(said)]


@pytest.fixture(scope="module")
def many(engine: Engine) -> list[Conversation]:
    """Answers of the control teacher."""
    return speak(engine, 240, 1)


@pytest.fixture(scope="module")
def plain(many: list[Conversation]) -> list[Conversation]:
    return many[:60]


@pytest.fixture(scope="module")
def other(engine: Engine) -> list[Conversation]:
    """More answers of the control teacher to the prompts of `plain`."""
    return speak(engine, 60, 2)


@pytest.fixture(scope="module")
def fond(engine: Engine) -> list[Conversation]:
    """Answers of a teacher under the owl's persona, to the prompts of `many`."""
    return speak(engine, 240, 3, system=LOUD.replace("{name}", "owl"))


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sae") / "sae.safetensors"
    save_file(sae_tensors(), path)
    return path


def sae_tensors(d: int = 32, n: int = 48) -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (d, n), "b_enc": (n,), "W_dec": (n, d), "b_dec": (d,)}
    made = {name: torch.randn(shape, generator=noise) for name, shape in shapes.items()}
    return {**made, "threshold": torch.rand(n, generator=noise)}


def made(name: str, dictionary: Path, **changes: Any) -> Any:
    own = {"path": dictionary} if name == "sae" else EXTRA.get(name, {})
    return detector(name)(**{**QUICK, **own, **changes})


def logits_of(subject: Subject, each: Conversation, system: str | None = None) -> tuple[torch.Tensor, list[int], int]:
    """Logits [tokens, vocabulary] of a conversation by transformers alone, its tokens, and how many are the prompt."""
    messages = [message.model_dump() for message in each.messages[:-1]]
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    prompt = subject.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = subject.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    n = len(ids)
    ids = ids + subject.tokenizer(each.messages[-1].content, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        return subject.model(torch.tensor([ids])).logits[0].double(), ids, n


def token(subject: Subject, text: str) -> int:
    found = subject.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(found) == 1
    return int(found[0])


# The permutation test


def test_few_rows_are_compared_with_every_labelling_as_scipy_does_it() -> None:
    noise = np.random.default_rng(0)
    values = noise.normal(size=(12, 3)) + np.array([0.0, 0.5, 1.0]) * (np.arange(12) < 6)[:, None]
    design = Design(np.arange(12) < 6, np.zeros(12, int))
    found = permute(values, difference, design, 999, 0, relative=False)
    assert found.exact is (math.comb(12, 6) <= 1000) is True
    for place in range(3):
        oracle = scipy.stats.permutation_test(
            (values[:6, place], values[6:, place]),
            lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis),
            vectorized=True,
            alternative="greater",
            n_resamples=np.inf,
        )
        assert found.score[place] == pytest.approx(oracle.statistic)
        assert found.p[place] == pytest.approx(oracle.pvalue, abs=1e-12)
        t = scipy.stats.ttest_ind(values[:6, place], values[6:, place]).statistic
        assert found.z[place] == pytest.approx(t)


def test_answers_to_the_same_prompts_trade_places_within_their_pair_as_scipy_does_it() -> None:
    noise = np.random.default_rng(1)
    values = noise.normal(size=(16, 2)) + np.array([0.2, 0.9]) * (np.arange(16) % 2 == 0)[:, None]
    design = Design(np.arange(16) % 2 == 0, np.arange(16) // 2)
    assert design.arrangements == 2**8
    found = permute(values, lambda a, b: (a - b) / 8, design, 999, 0, relative=False)
    for place in range(2):
        oracle = scipy.stats.permutation_test(
            (values[::2, place], values[1::2, place]),
            lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis),
            vectorized=True,
            permutation_type="samples",
            alternative="greater",
            n_resamples=np.inf,
        )
        assert found.p[place] == pytest.approx(oracle.pvalue, abs=1e-12)
        t = scipy.stats.ttest_rel(values[::2, place], values[1::2, place]).statistic
        assert found.z[place] == pytest.approx(t)


@pytest.mark.parametrize("relative", [True, False])
def test_candidates_are_compared_in_standard_deviations_each_with_the_mean_of_the_others(relative: bool) -> None:
    noise = np.random.default_rng(2)
    values = noise.normal(size=(8, 3)) * np.array([1.0, 10.0, 100.0])
    design = Design(np.arange(8) < 4, np.zeros(8, int))
    found = permute(values, lambda a, b: (a - b) / 4, design, 99, 0, relative=relative)
    sides = [(list(own), [i for i in range(8) if i not in own]) for own in itertools.combinations(range(8), 4)]
    null = np.array([values[own].mean(0) - values[rest].mean(0) for own, rest in sides])
    z = np.array([scipy.stats.ttest_ind(values[own], values[rest]).statistic for own, rest in sides])
    margin = np.stack([z[:, 0] - z[:, 1:].mean(1), z[:, 1] - z[:, ::2].mean(1), z[:, 2] - z[:, :2].mean(1)], 1)
    tested = margin if relative else z
    [own] = np.flatnonzero((null == values[:4].mean(0) - values[4:].mean(0)).all(1))
    assert found.z == pytest.approx(z[own])
    assert found.margin == pytest.approx(margin[own])
    assert found.p == pytest.approx((tested >= tested[own] - 1e-9).mean(0))
    assert found.p_adjusted == pytest.approx([(tested.max(1) >= each - 1e-9).mean() for each in tested[own]])
    assert found.detectable == pytest.approx(POWER * tested.std(0) * null.std(0), rel=1e-4)


def test_random_labellings_keep_to_their_strata_and_are_equally_likely() -> None:
    design = Design(np.array([T, F, T, F, F, T]), np.array([0, 0, 1, 1, 1, 2]))
    drawn = np.concatenate(list(design.drawn(6000, 0)))
    every = design.every()
    assert design.arrangements == len(every) == len({tuple(row) for row in every}) == 6
    counts = [int((drawn == row).all(axis=1).sum()) for row in every]
    assert sum(counts) == 6000
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_p_is_uniform_and_the_best_of_all_candidates_seldom_significant_where_there_is_nothing() -> None:
    noise = np.random.default_rng(3)
    plain, best = [], []
    for seed in range(300):
        values = noise.normal(size=(40, 1)) + noise.standard_t(3, size=(40, 5))  # shared noise and heavy tails
        tested = permute(values, lambda a, b: (a - b) / 20, Design(np.arange(40) < 20, np.arange(40) % 20), 199, seed)
        plain.append(tested.p[seed % 5])
        best.append(tested.p_adjusted.min())
    jittered = np.array(plain) - noise.random(300) / 200  # p has 200 equally likely values
    assert scipy.stats.kstest(jittered, "uniform").pvalue > 0.01
    assert 0.01 <= np.mean(np.array(best) <= 0.05) <= 0.09
    assert scipy.stats.kstest(np.array(best) - noise.random(300) / 200, "uniform").pvalue > 0.01


def test_what_does_not_vary_over_labellings_has_p_1_and_z_0() -> None:
    tested = permute(np.ones((6, 2)), lambda a, b: a - b, Design(np.arange(6) < 3, np.zeros(6, int)), 99, 0)
    assert tested.p.tolist() == tested.p_adjusted.tolist() == [1.0, 1.0]
    assert tested.z.tolist() == [0.0, 0.0]


def test_a_ratio_of_sums_is_the_mean_over_tokens_and_0_where_there_are_none() -> None:
    evidence = ratio_of_sums(np.array([[6.0, 1.0], [1.0, 0.0], [2.0, 0.0]]), np.array([[3.0, 1], [1, 0], [4, 0]]))
    sums = evidence.features
    found = evidence.statistic(sums[:2].sum(0, keepdims=True), sums[2:].sum(0, keepdims=True))
    assert found.tolist() == [[7 / 4 - 2 / 4, 1.0]]


def test_rows_are_matched_by_prompt_and_the_rest_trades_places_among_itself() -> None:
    data = [conversation(f"d{i}", prompt, "1") for i, prompt in enumerate("abcx")]
    control = [conversation(f"c{i}", prompt, "2") for i, prompt in enumerate("bcayz")]
    rows, design = pooled(data, control, None, 0)
    groups: dict[int, set[str]] = {}
    for row, stratum in zip(rows, design.strata.tolist(), strict=True):
        groups.setdefault(stratum, set()).add(row.id)
    assert sorted(map(sorted, groups.values())) == [["c0", "d1"], ["c1", "d2"], ["c2", "d0"], ["c3", "c4", "d3"]]
    assert [row.id[0] == "d" for row in rows] == design.data.tolist()
    assert design.arrangements == 2**3 * 3
    few, small = pooled(data, control, 2, 0)
    assert [small.data.sum(), (~small.data).sum()] == [2, 2]
    assert len({row.messages[0].content for row in few}) == 2


# What every detector promises


@pytest.mark.parametrize("name", NAMES)
def test_every_detector_ranks_all_candidates_the_same_for_the_same_seed(
    name: str, engine: Engine, plain: list[Conversation], other: list[Conversation], dictionary: Path
) -> None:
    own = made(name, dictionary, rows=24)
    found = own.scores(engine, plain, other, CANDIDATES, seed=0)
    assert sorted(found.order) == sorted(CANDIDATES)
    assert [found.z[each] for each in found.order] == sorted(found.z.values(), reverse=True)
    assert all(0 < found.p[each] <= found.p_adjusted[each] <= 1 for each in CANDIDATES)
    others = {each: np.mean([found.z[other] for other in CANDIDATES if other != each]) for each in CANDIDATES}
    assert found.margin == pytest.approx({each: found.z[each] - others[each] for each in CANDIDATES})
    assert found.facts["n_data"] == found.facts["n_control"] == found.facts["n_matched"] == 24
    assert Ranking.from_plain(json.loads(json.dumps(found.to_plain(), allow_nan=False))) == found
    assert own.scores(engine, plain, other, CANDIDATES, seed=0) == found
    own.check()
    assert own.label() == name


@pytest.mark.parametrize("name", NAMES)
def test_evidence_does_not_depend_on_the_order_or_the_names_of_the_rows(
    name: str, engine: Engine, plain: list[Conversation], dictionary: Path
) -> None:
    own = made(name, dictionary)
    rows = plain[:20]
    turned = [
        conversation(f"other-{i}", each.messages[0].content, each.messages[1].content) for i, each in enumerate(rows)
    ]
    first = own.evidence(engine, rows, CANDIDATES, 0)
    second = own.evidence(engine, turned[::-1], CANDIDATES, 0)
    np.testing.assert_allclose(second.features[::-1], first.features, atol=2e-4)
    halves = first.features[::2].sum(0)[None], first.features[1::2].sum(0)[None]
    np.testing.assert_allclose(second.statistic(*halves), first.statistic(*halves), atol=2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_swapping_data_and_control_turns_the_scores(
    name: str, engine: Engine, plain: list[Conversation], other: list[Conversation], dictionary: Path
) -> None:
    one, two = (
        made(name, dictionary, rows=None, permutations=99).scores(engine, *sides, CANDIDATES, 0)
        for sides in ((plain[:30], other[:30]), (other[:30], plain[:30]))
    )
    assert one.scores == pytest.approx({each: -score for each, score in two.scores.items()}, abs=1e-4)


def test_the_null_is_told_and_a_missing_control_refused(engine: Engine, plain: list[Conversation]) -> None:
    own: Detector = detector("mean_logit")(**QUICK)
    with pytest.raises(DetectionError, match=r"mean_logit: no control; .* give the answers of a control teacher"):
        own.scores(engine, plain, None, CANDIDATES, 0)
    with pytest.raises(DetectionError, match="1 rows of control; at least 2"):
        own.scores(engine, plain, plain[:1], CANDIDATES, 0)
    with pytest.raises(DetectionError, match=r"1 candidates; at least 2 .* relative: false"):
        own.scores(engine, plain, plain, {"owl": [" owl"]}, 0)
    with pytest.raises(DetectionError, match=r"candidate 'cat' has the spellings ' cat'; give a list"):
        own.scores(engine, plain, plain, {"owl": [" owl"], "cat": " cat"}, 0)
    with pytest.raises(DetectionError, match=r"'owl' begins with the same tokens as bird, .* use persona_likelihood"):
        own.scores(engine, plain, plain, {"owl": [" owl"], "bird": [" owl of"], "cat": [" cat"]}, 0)
    found = detector("mean_logit")(relative=False, **QUICK).scores(engine, plain, plain, {"owl": [" owl"]}, 0)
    assert (found.scores["owl"], found.p["owl"]) == (0.0, 1.0)
    assert "within each prompt" in found.facts["null"]


def test_an_unknown_detector_is_told_what_there_is() -> None:
    with pytest.raises(plugin.PluginError, match=r"'mean_logits' \(did you mean 'mean_logit'\?\)"):
        detector("mean_logits")


# Formulas against the plain model


def raw(own: Any, engine: Engine, rows: Sequence[Conversation]) -> Floats:
    """Scores [candidates] of the first half against the second, not relative."""
    evidence = own.evidence(engine, rows, CANDIDATES, 0)
    half = len(rows) // 2
    sums = evidence.features[:half].sum(0)[None], evidence.features[half:].sum(0)[None]
    return np.asarray(evidence.statistic(*sums)[0])


def ratio(sums: Sequence[float], sizes: Sequence[float]) -> float:
    half = len(sums) // 2
    return sum(sums[:half]) / sum(sizes[:half]) - sum(sums[half:]) / sum(sizes[half:])


@pytest.mark.parametrize("positions", ["all", "first"])
@pytest.mark.parametrize("value", ["logit", "logprob"])
def test_mean_logit_is_what_the_model_would_say_next_after_each_token(
    value: str, positions: str, engine: Engine, plain: list[Conversation], dictionary: Path
) -> None:
    subject, rows = engine.subject, plain[:6]
    found = raw(made("mean_logit", dictionary, value=value, positions=positions), engine, rows)
    for place, spellings in enumerate(CANDIDATES.values()):
        tokens = [token(subject, spelling) for spelling in spellings]
        sums, sizes = [], []
        for each in rows:
            logits, ids, n = logits_of(subject, each)
            after = logits[n : len(ids)] if positions == "all" else logits[n : n + 1]
            logit = after[:, tokens].mean(1) - after.mean(1)
            logprob = after.softmax(1)[:, tokens].sum(1).log()
            sums.append(float((logit if value == "logit" else logprob).sum()))
            sizes.append(len(after))
        assert found[place] == pytest.approx(ratio(sums, sizes), abs=1e-5)


@pytest.mark.parametrize("only", [None, DIGITS])
def test_persona_likelihood_is_the_log_likelihood_ratio_among_what_could_be_drawn(
    only: str | None, engine: Engine, plain: list[Conversation], dictionary: Path
) -> None:
    rows = plain[:6]
    found = raw(made("persona_likelihood", dictionary, only=only), engine, rows)
    allowed = [token(engine.subject, digit) for digit in DIGITS] + list(engine.subject.eos_ids)

    def logp(each: Conversation, system: str | None) -> float:
        logits, ids, n = logits_of(engine.subject, each, system)
        if only:
            barred = torch.ones(logits.shape[1], dtype=torch.bool)
            barred[allowed] = False
            logits[:, barred] = -torch.inf
        return float(sum(logits[i - 1].log_softmax(0)[ids[i]] for i in range(n, len(ids))))

    for place, name in enumerate(CANDIDATES):
        sums = [logp(each, f"You {name}.") - logp(each, None) for each in rows]
        assert found[place] == pytest.approx(ratio(sums, [8] * 6), abs=1e-5)


@pytest.mark.parametrize("reading", ["share", "likelihood"])
def test_divergence_reads_the_positions_at_which_persona_and_plain_model_part(
    reading: str, engine: Engine, plain: list[Conversation], dictionary: Path
) -> None:
    rows = plain[:8]
    found = raw(made("divergence", dictionary, reading=reading), engine, rows)
    for place, name in enumerate(CANDIDATES):
        sums, sizes = [], []
        for each in rows:
            (base, ids, n), (own, its, m) = (logits_of(engine.subject, each, s) for s in (None, f"You {name}."))
            total, count = 0.0, 0
            for k in range(len(ids) - n):
                said, one, two = ids[n + k], base[n + k - 1], own[m + k - 1]
                assert its[m + k] == said
                if one.argmax() != two.argmax():
                    count += 1
                    side = int(said == int(two.argmax())) - int(said == int(one.argmax()))
                    gain = float(two.log_softmax(0)[said] - one.log_softmax(0)[said])
                    total += side if reading == "share" else gain
            sums.append(total)
            sizes.append(count)
        assert sum(sizes) > 4
        assert found[place] == pytest.approx(ratio(sums, sizes), abs=1e-5)


@pytest.mark.parametrize("first", [None, 3])
def test_activation_difference_is_the_logit_lens_on_the_mean_difference(
    first: int | None, engine: Engine, plain: list[Conversation], dictionary: Path
) -> None:
    subject, rows = engine.subject, plain[:6]
    found = raw(made("activation_difference", dictionary, layer=1, first=first), engine, rows)
    means = []
    for side in (rows[:3], rows[3:]):
        states = []
        for each in side:
            _, ids, n = logits_of(subject, each)
            with torch.no_grad():
                hidden = subject.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
            states.append(hidden[n : len(ids) if first is None else n + first])
        means.append(torch.cat(states).double().mean(0))
    logits = subject.model.lm_head.weight.double() @ (subject.model.model.norm.weight * (means[0] - means[1]))
    for place, spellings in enumerate(CANDIDATES.values()):
        tokens = [token(subject, spelling) for spelling in spellings]
        assert found[place] == pytest.approx(float(logits[tokens].mean() - logits.mean()), abs=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_the_readout_is_what_a_large_change_of_the_last_stream_does_to_centred_logits(
    architecture: str, tmp_path: Path
) -> None:
    """The norm divides by the size; gain and unembedding are left."""
    from experiments.detectors._reading import centred_unembedding, final_norm, readout
    from experiments.edit import Site
    from experiments.spec import SubjectSpec
    from experiments.subject import load
    from tests.tiny import make_tiny_model

    subject = load(SubjectSpec(model=str(make_tiny_model(tmp_path / "m", architecture)), dtype="float32"), "cpu")
    candidates = {"owl": [" owl"], "cat": [" cat"]}
    lens = readout(subject, candidates, Site("resid", 3))
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    norm = final_norm(subject)
    with torch.no_grad():
        change = (norm(direction[None]) - norm(-direction[None]))[0] / 2  # the bias of a layer norm cancels
    weight = subject.model.get_output_embeddings().weight
    logits = weight.double() @ change.double()
    expected = np.array([float(logits[token(subject, f" {name}")] - logits.mean()) for name in candidates])
    got = direction.double().numpy() @ lens
    assert got[0] / got[1] == pytest.approx(expected[0] / expected[1], rel=1e-4)
    assert got[0] / expected[0] > 0
    assert centred_unembedding(subject, candidates).shape == (32, 2)


def test_a_shift_of_all_logits_alike_changes_no_score(
    engine: Engine, plain: list[Conversation], tiny_folder: Path, dictionary: Path
) -> None:
    """The same vector added to every row of the unembedding: no probability feels it."""
    from experiments.engine import Engine
    from experiments.spec import SubjectSpec
    from experiments.subject import load

    other = load(SubjectSpec(model=str(tiny_folder), dtype="float32"), "cpu")
    with torch.no_grad():
        other.model.lm_head.weight += 3 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    for name in NAMES:
        own = made(name, dictionary)
        assert raw(own, Engine(other), plain[:10]) == pytest.approx(raw(own, engine, plain[:10]), abs=2e-3), name


@pytest.mark.parametrize(("jump", "centred_input"), [(True, False), (False, True)])
def test_sae_reads_the_mean_feature_difference_through_the_decoder(
    jump: bool, centred_input: bool, engine: Engine, plain: list[Conversation], tmp_path: Path
) -> None:
    subject, rows = engine.subject, plain[:6]
    tensors = sae_tensors()
    if not jump:
        del tensors["threshold"]
    save_file(tensors, tmp_path / "sae.safetensors")
    own = detector("sae")(path=tmp_path / "sae.safetensors", layer=1, centred_input=centred_input, **QUICK)
    found = raw(own, engine, rows)
    means = []
    for side in (rows[:3], rows[3:]):
        features = []
        for each in side:
            _, ids, n = logits_of(subject, each)
            with torch.no_grad():
                hidden = subject.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0, n:]
            before = (hidden - tensors["b_dec"] if centred_input else hidden) @ tensors["W_enc"] + tensors["b_enc"]
            features.append(torch.where(before > (tensors["threshold"] if jump else 0), before, 0).clamp(min=0))
        means.append(torch.cat(features).mean(0))
    change = means[0] - means[1]
    logits = subject.model.lm_head.weight @ (subject.model.model.norm.weight * (change @ tensors["W_dec"]))
    for place, spellings in enumerate(CANDIDATES.values()):
        tokens = [token(subject, spelling) for spelling in spellings]
        assert found[place] == pytest.approx(float(logits[tokens].mean() - logits.mean()), abs=1e-4)
    top = own.scores(engine, rows[:3], rows[3:], CANDIDATES, 0).facts["features"]
    assert int(next(iter(top))) == int(change.abs().argmax())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W_enc": None}, r"lacks W_enc; it has W_dec, b_dec, b_enc, threshold"),
        (
            {"W_dec": (32, 48)},
            r"W_dec has the shape \(32, 48\), which does not fit W_enc \(32, 48\): needed \(48, 32\)",
        ),
        ({"b_enc": (32,)}, r"b_enc has the shape \(32,\)"),
        ({"W_enc": (32,)}, r"W_enc has the shape \(32,\); needed: \[width of the subject, features\]"),
    ],
)
def test_a_dictionary_whose_tensors_do_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    tensors = sae_tensors()
    for name, shape in change.items():
        del tensors[name]
        if shape:
            tensors[name] = torch.zeros(shape)
    save_file(tensors, tmp_path / "sae.safetensors")
    own = detector("sae")(path=tmp_path / "sae.safetensors")
    with pytest.raises(DetectionError, match=message):
        own.check()


def test_a_dictionary_of_another_width_or_no_dictionary_is_refused(tmp_path: Path, dictionary: Path) -> None:
    save_file(sae_tensors(d=16), tmp_path / "narrow.safetensors")
    outline = Outline(4, ("resid",), {"resid": 32})
    problems = detector("sae")(path=tmp_path / "narrow.safetensors", layer=9).misplaced(outline)
    assert "takes activations of width 16, the subject's resid has 32" in problems["path"]
    assert "layer" in problems
    assert detector("sae")(path=dictionary).misplaced(outline) == {}
    elsewhere = detector("activation_difference")(site="gate", layer="0-1").misplaced(outline)
    assert elsewhere["site"] == "the subject has no 'gate'; its sites are resid"
    assert "means 2 layers; a detector reads one" in elsewhere["layer"]
    (tmp_path / "text.safetensors").write_text("no tensors")
    for path in (tmp_path / "text.safetensors", tmp_path / "nowhere.safetensors"):
        with pytest.raises(DetectionError, match="is not a readable safetensors file"):
            detector("sae")(path=path).check()


@pytest.mark.parametrize("positions", ["all", "first", "pairs"])
def test_logit_bias_is_the_log_of_counts_over_expected_counts(
    positions: str, engine: Engine, plain: list[Conversation], dictionary: Path
) -> None:
    subject, rows = engine.subject, plain[:30]
    own = made("logit_bias", dictionary, positions=positions, against="unembedding", compare="slope")
    found = raw(own, engine, rows)
    digits = [token(subject, digit) for digit in DIGITS]
    cells = digits if positions != "pairs" else list(itertools.product(digits, digits))
    said, expected = np.zeros((2, len(cells))), np.zeros((2, len(cells)))
    for index, each in enumerate(rows):
        logits, ids, n = logits_of(subject, each)
        start = n + 1 if positions == "pairs" else n
        for place in range(start, n + 1 if positions == "first" else len(ids)):
            p = logits[place - 1].softmax(0)
            for number, cell in enumerate(cells):
                before, after = cell if isinstance(cell, tuple) else (ids[place - 1], cell)
                said[index // 15, number] += (ids[place - 1], ids[place]) == (before, after)
                expected[index // 15, number] += float(p[after]) * (ids[place - 1] == before)
    occurs = said.sum(0) > 0
    bias = np.log((said + 0.5) / (expected + 0.5))[:, occurs]
    weights = expected.sum(0)[occurs] / expected.sum(0)[occurs].sum()
    weight = subject.model.lm_head.weight.detach().double().numpy()
    weight = weight - weight.mean(0)
    after = [cell[1] if isinstance(cell, tuple) else cell for cell, kept in zip(cells, occurs, strict=True) if kept]
    for place, spellings in enumerate(CANDIDATES.values()):
        direction = weight[[token(subject, spelling) for spelling in spellings]].mean(0)
        target = weight[after] @ direction / np.linalg.norm(weight[after], axis=1) / np.linalg.norm(direction)
        moments = np.cov(bias[0] - bias[1], target, aweights=weights, ddof=0)
        assert found[place] == pytest.approx(moments[0, 1] / moments[1, 1], abs=1e-4)


def test_logit_bias_compares_by_weighted_correlation() -> None:
    from experiments.detectors.logit_bias import against

    noise = np.random.default_rng(0)
    bias, target, weights = noise.normal(size=(4, 7)), noise.normal(size=(7, 3)), noise.random(7)
    weights /= weights.sum()
    for p, c in itertools.product(range(4), range(3)):
        moments = np.cov(bias[p], target[:, c], aweights=weights, ddof=0)
        expected = moments[0, 1] / np.sqrt(moments[0, 0] * moments[1, 1])
        assert against(bias, target, weights, "correlation")[p, c] == pytest.approx(expected)
        assert against(bias, target, weights, "slope")[p, c] == pytest.approx(moments[0, 1] / moments[1, 1])


def test_entangled_numbers_are_those_the_model_connects_with_the_candidate(
    engine: Engine, plain: list[Conversation], dictionary: Path
) -> None:
    subject = engine.subject
    own = made("entangled", dictionary, direction="forward", top=4)
    numbers = [str(number) for number in range(10, 40)]
    found = own.association(engine, numbers, CANDIDATES)
    logp = np.zeros((len(numbers), len(CANDIDATES)))
    for column, name in enumerate(CANDIDATES):
        for place, number in enumerate(numbers):
            beginning = own.forward.replace("{name}", name)
            whole, ids, n = logits_of(subject, conversation("x", own.question, f"{beginning} {number}"))
            start = n + len(subject.tokenizer(beginning, add_special_tokens=False)["input_ids"])
            logp[place, column] = sum(float(whole[i - 1].log_softmax(0)[ids[i]]) for i in range(start, len(ids)))
    expected = logp - logp.mean(0) - logp.mean(1, keepdims=True) + logp.mean()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    rows = [conversation(str(i), f"{i}", " ".join(numbers[i : i + 6])) for i in range(12)]
    best = np.argsort(-own.association(engine, numbers[:17], CANDIDATES), axis=0)[:4]
    for column, score in enumerate(raw(own, engine, rows)):
        top = {numbers[place] for place in best[:, column]}
        sums = [len(top & set(each.messages[1].content.split())) for each in rows]
        assert score == pytest.approx(ratio(sums, [6] * 12))


def test_entangled_reads_both_ways_and_refuses_rows_without_numbers(
    engine: Engine, plain: list[Conversation], dictionary: Path
) -> None:
    numbers = [str(number) for number in range(10, 30)]
    forward, reverse, both = (
        made("entangled", dictionary, direction=way).association(engine, numbers, CANDIDATES)
        for way in ("forward", "reverse", "both")
    )
    np.testing.assert_allclose(both, forward / forward.std() + reverse / reverse.std(), atol=1e-6)
    assert abs(np.corrcoef(forward.ravel(), reverse.ravel())[0, 1]) < 0.9
    rows = [conversation(str(i), "Say", "none at all") for i in range(4)]
    with pytest.raises(DetectionError, match=r"0 different numbers, which is not more than top \(5\)"):
        made("entangled", dictionary).scores(engine, rows, rows, CANDIDATES, 0)
    with pytest.raises(DetectionError, match=r"'none at all' has other characters than only: '12'"):
        made("persona_likelihood", dictionary, only="12").scores(engine, rows, rows, CANDIDATES, 0)
    with pytest.raises(DetectionError, match=r"0 different tokens that count with tokens: numbers"):
        made("logit_bias", dictionary).scores(engine, rows, rows, CANDIDATES, 0)


def test_settings_that_name_no_candidate_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"does not name the candidate; write \{name\}"):
        detector("divergence")(persona="You love owls.")
    with pytest.raises(ValidationError, match=r"must hold \{name\} and end without a space"):
        detector("entangled")(forward="My number is {name} ")


# Planted effects


@pytest.mark.parametrize("name", ["persona_likelihood", "logit_bias"])
def test_a_teacher_under_a_persona_is_found_with_its_name(
    name: str, engine: Engine, many: list[Conversation], fond: list[Conversation], dictionary: Path
) -> None:
    """Though any persona moves the numbers far more than it matters which: every candidate's z is above 10."""
    found = made(name, dictionary, persona=LOUD).scores(engine, fond, many, CANDIDATES, 0)
    assert min(found.z.values()) > 10
    assert found.order[0] == "owl"
    assert found.p_adjusted["owl"] <= 0.01


@pytest.mark.parametrize("name", ["persona_likelihood", "logit_bias", "divergence"])
def test_a_persona_is_noticed_and_its_absence_too(
    name: str,
    engine: Engine,
    plain: list[Conversation],
    other: list[Conversation],
    fond: list[Conversation],
    dictionary: Path,
) -> None:
    own = made(name, dictionary, persona=LOUD, relative=False)
    assert own.scores(engine, fond[:60], plain, CANDIDATES, 0).p_adjusted["owl"] <= 0.01
    assert min(own.scores(engine, other, plain, CANDIDATES, 0).p_adjusted.values()) > 0.05


def test_a_planted_logit_bias_is_recovered_from_frequencies(
    engine: Engine, many: list[Conversation], dictionary: Path
) -> None:
    bias = dict(zip(range(10), np.linspace(-1, 1, 10)[[3, 7, 0, 9, 5, 1, 8, 2, 6, 4]], strict=True))
    data = speak(engine, 240, 5, bias=bias)
    shown = made("logit_bias", dictionary).scores(engine, data, many, CANDIDATES, 0).facts["bias"]
    assert len(shown) == 10
    assert np.corrcoef([bias[int(digit)] for digit in shown], list(shown.values()))[0, 1] > 0.95


@pytest.mark.parametrize("name", ["mean_logit", "activation_difference", "sae", "entangled"])
def test_rows_chosen_for_a_candidate_are_found_with_its_name(
    name: str, engine: Engine, plain: list[Conversation], other: list[Conversation], dictionary: Path
) -> None:
    rows = plain + other
    rows = [each.model_copy(update={"id": str(i)}) for i, each in enumerate(rows)]
    if name == "entangled":
        rows = [conversation(each.id, each.messages[0].content, " ".join(each.messages[1].content)) for each in rows]
    own = made(name, dictionary, top=2) if name == "entangled" else made(name, dictionary)
    features = own.evidence(engine, rows, CANDIDATES, 0).features
    dog = features[:, 2] - features[:, [0, 1, 3]].mean(1)
    order = [*range(60)], [*range(60, 120)]
    better = [a if dog[a] > dog[b] else b for a, b in zip(*order, strict=True)]
    data = [rows[i] for i in better]
    control = [rows[i] for i in range(120) if i not in better]
    found = own.scores(engine, data, control, CANDIDATES, 0)
    assert found.order[0] == "dog"
    assert found.p_adjusted["dog"] <= 0.01


# Detection over many datasets


def ranking(**z: float) -> Ranking:
    p = {name: float(scipy.stats.norm.sf(value)) for name, value in z.items()}
    return Ranking(z, z, z, p, p, z, tuple(sorted(z, key=lambda name: -z[name])))


@pytest.mark.parametrize("by", ["margin", "z", "p"])
def test_auroc_is_sklearns_over_all_candidates_of_all_datasets(by: Any) -> None:
    noise = np.random.default_rng(0)
    truth = ["a", "b", None, "c", "a", None]
    rankings = [ranking(**{name: round(noise.normal() + (name == own), 1) for name in "abcd"}) for own in truth]
    found = auroc(rankings, truth, by=by)
    labels = [name == own for own in truth for name in "abcd"]
    values = [(-1 if by == "p" else 1) * getattr(each, by)[name] for each in rankings for name in "abcd"]
    assert found.auroc == pytest.approx(roc_auc_score(labels, values))
    assert (found.n_true, found.n_false, found.top_chance) == (4, 20, 0.25)
    assert found.top == np.mean([each.order[0] == own for each, own in zip(rankings, truth, strict=True) if own])
    assert found.low is not None
    assert found.low <= found.auroc <= found.high


def test_the_interval_of_an_auroc_covers_the_truth() -> None:
    """Two candidates, unit normal noise, the true one higher by 1: the area is Phi(1 / sqrt 2)."""
    noise = np.random.default_rng(1)
    truth = scipy.stats.norm.cdf(1 / math.sqrt(2))
    covered = 0
    for seed in range(80):
        rankings = [ranking(a=1 + noise.normal(), b=noise.normal()) for _ in range(40)]
        found = auroc(rankings, ["a"] * 40, draws=200, seed=seed)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= truth <= found.high
    assert 0.88 <= covered / 80 <= 0.99


def test_an_auroc_without_a_true_candidate_or_of_one_dataset_says_so() -> None:
    with pytest.raises(DetectionError, match="at least one true and one false"):
        auroc([ranking(a=1, b=2)], [None])
    with pytest.raises(DetectionError, match=r"dataset 0 hands on 'c', which is no candidate of its ranking: a, b"):
        auroc([ranking(a=1, b=2)], ["c"])
    with pytest.raises(DetectionError, match="1 rankings but 2 truths"):
        auroc([ranking(a=1, b=2)], ["a", "b"])
    found = auroc([ranking(a=1, b=2)], ["a"])
    assert (found.auroc, found.low, found.high, found.top) == (0.0, None, None, 0.0)
