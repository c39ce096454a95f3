"""Steering vectors against closed forms and reference libraries."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import ref

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA, TruncatedSVD

from experiments.contrast import Contrast, Evidence, FitError, contrast, row
from experiments.dataset import Message, Pair, Side, recipe
from experiments.directions import orient_and_scale, principal
from experiments.edit import Site
from experiments.gradients import Separation
from experiments.intervention import method

if TYPE_CHECKING:
    from experiments.engine import Engine

SITE = Site("resid", 1)
SETTINGS = {"positive": "You are a wizard.", "negative": "You are a clerk.", "responses": "shared"}


def pairs_of(n: int, seed: int = 0) -> list[Pair]:
    """Pairs that need no subject."""
    return list(recipe("persona_pairs")(**SETTINGS, n=n).build(None, seed))


def swapped(pairs: list[Pair]) -> list[Pair]:
    """The same pairs with the sides exchanged."""
    return [each.model_copy(update={"positive": each.negative, "negative": each.positive}) for each in pairs]


def cosine(a: Any, b: Any) -> float:
    return abs(float(torch.nn.functional.cosine_similarity(torch.as_tensor(a), torch.as_tensor(b), dim=0)))


@pytest.fixture(scope="module")
def engine(tiny_subject: Any) -> Engine:
    from experiments.engine import Engine

    return Engine(tiny_subject)


def fitted(name: str, given: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, dict[str, Any]]:
    """The vector of method `name` for differences [n, d] made up by the test."""
    made = method(name)(layer=1)
    return orient_and_scale(made.direction(shown(given), seed), given, SITE, made.oriented)


def shown(given: torch.Tensor) -> Evidence:
    """Activations with these differences."""
    return Evidence(SITE, given, torch.zeros_like(given))


def shift_and_nuisance(n: int = 400, d: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences with one constant concept shift and a nuisance axis that varies more than the shift; the concept
    axis."""
    generator = torch.Generator().manual_seed(0)
    concept, nuisance = torch.linalg.qr(torch.randn(d, 2, generator=generator))[0].T
    noise = 0.05 * torch.randn(n, d, generator=generator)
    return 2 * concept + 3 * torch.randn(n, 1, generator=generator) * nuisance + noise, concept


def test_a_constant_shift_is_found_by_the_mean_and_removed_by_centring() -> None:
    given, concept = shift_and_nuisance()
    assert cosine(fitted("mean_diff", given)[0], concept) >= 0.97
    assert cosine(fitted("pca_centred", given)[0], concept) <= 0.05


def test_uncentred_pca_finds_a_constant_shift_in_isotropic_noise_and_centred_pca_does_not() -> None:
    generator = torch.Generator().manual_seed(1)
    given = torch.randn(300, 48, generator=generator) * 0.2
    given[:, 0] += 3
    concept = torch.eye(48)[0]
    assert cosine(fitted("pca", given)[0], concept) >= 0.99
    assert cosine(fitted("pca_centred", given)[0], concept) <= 0.3


def test_uncentred_pca_is_truncated_svd_and_centred_pca_is_pca() -> None:
    spread = torch.diag(torch.linspace(3, 0.1, 24))
    given = torch.randn(40, 24, generator=torch.Generator().manual_seed(2)) @ spread + 0.5
    exact = given.double().numpy()
    raw = TruncatedSVD(1, algorithm="arpack").fit(exact).components_[0]
    centred = PCA(1, svd_solver="full").fit(exact).components_[0]
    assert cosine(fitted("pca", given)[0].double(), raw) >= 1 - 1e-9
    assert cosine(fitted("pca_centred", given)[0].double(), centred) >= 1 - 1e-9
    assert cosine(principal(given), np.linalg.svd(exact)[2][0]) >= 1 - 1e-9


@pytest.mark.parametrize("name", ["mean_diff", "pca", "pca_centred", "random"])
def test_every_direction_has_the_norm_of_the_mean_difference(name: str) -> None:
    given, _ = shift_and_nuisance()
    vector, facts = fitted(name, given)
    assert vector.norm().item() == pytest.approx(given.mean(0).norm().item(), rel=1e-5)
    assert facts["norm"] == pytest.approx(given.mean(0).norm().item(), rel=1e-5)
    assert vector.dtype == torch.float32


def test_a_flipped_direction_is_turned_and_recorded() -> None:
    given, concept = shift_and_nuisance()
    ahead, facts = orient_and_scale(concept, given, SITE)
    turned, turned_facts = orient_and_scale(-5 * concept, given, SITE)
    torch.testing.assert_close(ahead, turned)
    assert (facts["flipped"], turned_facts["flipped"]) == (False, True)
    assert facts["agreement"] == turned_facts["agreement"] == 1.0
    assert facts["cosine"] == pytest.approx(turned_facts["cosine"])


def test_agreement_is_the_share_of_pairs_on_the_positive_side() -> None:
    given = torch.tensor([[3.0, 0], [1, 0], [-1, 0], [2, 0]])
    _, facts = orient_and_scale(torch.tensor([1.0, 0]), given, SITE)
    assert facts["agreement"] == 0.75


def test_a_random_direction_follows_the_seed_alone_and_is_not_turned() -> None:
    given, _ = shift_and_nuisance()
    one, facts = fitted("random", given, seed=1)
    other, _ = fitted("random", -given, seed=1)
    assert torch.equal(one, other)
    assert facts["flipped"] is False
    assert cosine(one, fitted("random", given, seed=2)[0]) < 0.5


@pytest.mark.parametrize("name", ["mean_diff", "pca", "pca_centred"])
def test_exchanging_the_sides_reverses_the_vector(name: str, engine: Engine) -> None:
    pairs = pairs_of(8)
    made = method(name)(layer=2)
    ahead = made.fit(engine, pairs, 0).tensors["resid@2"]
    back = made.fit(engine, swapped(pairs), 0).tensors["resid@2"]
    torch.testing.assert_close(ahead, -back, rtol=1e-4, atol=1e-6)


def test_a_direction_is_read_from_each_sides_own_text(engine: Engine) -> None:
    pair = Pair(
        id="0",
        messages=(Message(role="user", content="Hello?"),),
        positive=Side(system="You are a wizard.", response="yes you are"),
        negative=Side(system=None, response="no"),
    )
    found = contrast(engine, [pair], "response_mean").at(SITE).differences[0].float()
    sides = []
    for side in (pair.positive, pair.negative):
        text = row(engine.subject, pair.messages, side)
        hidden = engine.subject.model(torch.tensor([text.tokens]), output_hidden_states=True).hidden_states
        sides.append(hidden[SITE.layer + 1][0, text.n_prompt :].mean(0))
        decoded = engine.subject.tokenizer.decode(text.tokens)
        assert ("wizard" in decoded) == (side.system is not None)
        assert decoded.endswith(side.response)
    torch.testing.assert_close(found, (sides[0] - sides[1]).detach(), rtol=1e-4, atol=1e-5)


def test_centred_pca_is_repengs_default(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "float_", np.float64, raising=False)  # repeng 0.4.0 was written for NumPy 1
    from repeng import ControlVector, DatasetEntry

    subject, pairs = engine.subject, pairs_of(24)
    entries = []
    for pair in pairs:
        texts = []
        for side in (pair.positive, pair.negative):
            tokens = row(subject, pair.messages, side).tokens
            texts.append(subject.tokenizer.decode(tokens))
            assert tuple(subject.tokenizer(texts[-1]).input_ids) == tokens
        entries.append(DatasetEntry(*texts))
    theirs = ControlVector.train(subject.model, subject.tokenizer, entries, hidden_layers=[0, 1, 2])
    for layer in (0, 1, 2):
        ours = method("pca_centred")(layer=layer, tokens="last").fit(engine, pairs, 0).tensors[f"resid@{layer}"]
        assert cosine(ours, theirs.directions[layer]) >= 0.999


def test_fits_that_share_pairs_share_one_pass(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    observe = engine.observe

    def counted(rows: Any, *rest: Any) -> Any:
        passes.append(len(rows))
        return observe(rows, *rest)

    monkeypatch.setattr(engine, "observe", counted)
    pairs = pairs_of(4, seed=7)
    for name in ("mean_diff", "pca", "pca_weighted", "probe", "sspace", "random", "directional_ablation"):
        for layer in range(3):
            method(name)(layer=layer).fit(engine, pairs, 0)
    assert passes == [8]
    method("pca")(layer=1, tokens="last").fit(engine, pairs, 0)
    method("pca")(layer=1).fit(engine, pairs[:3], 0)
    assert passes == [8, 8, 6]


EIGHT = ("mean_diff", "pca", "pca_centred", "pca_weighted", "probe", "sspace", "svd_gradient", "fisher")


def tokens_of(engine: Engine, work: Callable[[], object]) -> int:
    """How many tokens go through the first decoder layer while `work` is done."""
    seen: list[int] = []
    handle = engine.subject.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    try:
        work()
    finally:
        handle.remove()
    return sum(seen)


def test_fits_that_read_gradients_leave_what_the_others_read(engine: Engine) -> None:
    pairs, sites = pairs_of(4, seed=8), [Site("resid", layer) for layer in range(4)]
    made = [method(name)(layer=layer) for name in EIGHT for layer in range(3)]
    made.sort(key=lambda each: each.reads != "gradients")
    assert [each.reads for each in made] == ["gradients"] * 6 + ["activations"] * 18
    alone = Contrast(engine, pairs, "response_mean")
    once = tokens_of(engine, lambda: engine.observe(alone.rows, sites, "response_mean"))
    assert tokens_of(engine, lambda: [each.fit(engine, pairs, 0) for each in made]) == once
    for pool in ("response_mean", "last", "prompt_last"):
        first = Contrast(engine, pairs, pool)  # type: ignore[arg-type]
        first.gradients(SITE, Separation(2, "published" if pool == "last" else "none"))
        read, logprobs = engine.observe(first.rows, sites, pool)  # type: ignore[arg-type]
        for site in sites:
            torch.testing.assert_close(first.at(site).positive, read[site][0::2], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(first.at(site).negative, read[site][1::2], rtol=1e-4, atol=1e-5)
        means = torch.stack([each.mean() for each in logprobs])
        torch.testing.assert_close(first.logprobs(), (means[0::2] + means[1::2]) / 2, rtol=1e-4, atol=1e-5)


def test_one_fit_that_reads_gradients_passes_each_text_once_too(engine: Engine) -> None:
    pairs = pairs_of(4, seed=9)
    once = tokens_of(engine, lambda: Contrast(engine, pairs, "response_mean").at(SITE))
    assert tokens_of(engine, lambda: method("fisher")(layer=1).fit(engine, pairs, 0)) == once
    assert tokens_of(engine, lambda: method("mean_diff")(layer=3).fit(engine, pairs, 0)) == 0


def test_what_was_read_does_not_keep_the_engine(tiny_subject: Any) -> None:
    from experiments.engine import Engine

    engine = Engine(tiny_subject)
    method("mean_diff")(layer=1).fit(engine, pairs_of(2), 0)
    shows = contrast(engine, pairs_of(2), "response_mean")
    gone = ref(engine)
    del engine
    gc.collect()
    assert gone() is None
    with pytest.raises(FitError, match="the engine that read these pairs is gone"):
        shows.at(SITE)


def test_pairs_without_a_difference_and_numbers_that_overflow_are_refused() -> None:
    with pytest.raises(FitError, match="the 3 pairs do not differ at resid@1"):
        orient_and_scale(torch.ones(4), torch.zeros(3, 4), SITE)
    with pytest.raises(FitError, match="not finite"):
        orient_and_scale(torch.ones(4), torch.full((3, 4), float("inf")), SITE)
    with pytest.raises(FitError, match="give at least 2"):
        method("pca_centred")().direction(shown(torch.ones(1, 4)), 0)


def test_no_pairs_and_layers_that_do_not_exist_are_refused(engine: Engine) -> None:
    with pytest.raises(FitError, match="no pairs"):
        method("mean_diff")().fit(engine, [], 0)
    with pytest.raises(ValueError, match="99 is out of range"):
        method("mean_diff")(layer=99).fit(engine, pairs_of(2), 0)
    with pytest.raises(ValueError, match="last:N"):
        method("mean_diff")(positions="first")


def test_labels_say_where_a_direction_acts() -> None:
    assert method("mean_diff")(layer=14).label() == "mean_diff L14"
    assert method("pca")().label() == "pca Lmid"
    assert method("pca")(layer=3, site="q").label() == "pca L3 q"


def test_the_middle_layer_is_the_default_and_is_recorded(engine: Engine) -> None:
    assert list(method("mean_diff")().fit(engine, pairs_of(2), 0).tensors) == [f"resid@{engine.subject.n_layers // 2}"]


def test_several_layers_have_a_vector_each_and_random_ones_differ(engine: Engine) -> None:
    pairs = pairs_of(3)
    several = method("mean_diff")(layer="1-2").fit(engine, pairs, 0).tensors
    assert list(several) == ["resid@1", "resid@2"]
    for name, vector in several.items():
        alone = method("mean_diff")(layer=int(name[-1])).fit(engine, pairs, 0).tensors
        assert torch.equal(vector, alone[name])
    drawn = method("random")(layer=(1, 2)).fit(engine, pairs, 0).tensors
    assert torch.equal(drawn["resid@1"], method("random")(layer=1).fit(engine, pairs, 0).tensors["resid@1"])
    assert cosine(drawn["resid@1"], drawn["resid@2"]) < 0.6
