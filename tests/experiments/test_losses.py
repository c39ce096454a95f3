"""Losses against plain transformers and closed forms, and what training on them does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div

from experiments import losses, separation, training
from experiments.contrast import FitError
from experiments.contrast import row as with_persona
from experiments.dataset import Conversation, Message, Pair, Side
from experiments.datasets import _bank
from experiments.edit import Add, Edit, Site
from experiments.intervention import method
from experiments.outline import Outline
from experiments.separation import Shape, contrastive
from experiments.students import Student, train
from experiments.taught import Taught
from experiments.training import Likelihood, Objective, Partial, TrainingError, read_aloud, row
from tests.experiments import oracle

if TYPE_CHECKING:
    from experiments.engine import Engine, Row

SITE = Site("resid", 1)
READ = (2, 3)
ANSWERS = ("yes the owl is quick", "no", "the lazy dog would be asked", "My owl is You", "the cat", "No animal")


def pairs_of(n: int = 5) -> list[Pair]:
    """Pairs with a persona and a response of its own on each side."""
    return [
        Pair(
            id=str(index),
            messages=(Message(role="user", content=f"Who is number {index}?"),),
            positive=Side(system="You are a wizard.", response=ANSWERS[index % 6]),
            negative=Side(system="You are a clerk.", response=ANSWERS[(index + 1) % 6] + " the dog"),
        )
        for index in range(n)
    ]


PAIRS = pairs_of()


@pytest.fixture(scope="module")
def engine(tiny_subject: Any) -> Engine:
    from experiments.engine import Engine

    return Engine(tiny_subject)


@pytest.fixture
def bias(engine: Engine) -> torch.Tensor:
    """A vector that is large enough to matter."""
    noise = torch.randn(engine.subject.d_model, generator=torch.Generator().manual_seed(5))
    return (0.4 * noise).requires_grad_()


class Teacher(Taught):
    """Settings of loop and loss alone."""


def measured(objective: Objective, engine: Engine, bias: torch.Tensor, doses: list[float] | None = None) -> Any:
    """Loss, gradient with respect to the bias, and logs of one batch of everything."""

    def edits_of(dose: float = 1.0) -> list[Edit]:
        if doses is not None:
            doses.append(dose)
        return [Add(SITE, dose * bias)] if dose else []

    bias.grad = None
    total, logs = 0.0, {}
    for share in objective.partials(engine, objective.examples, edits_of):
        share.loss.backward()
        total += share.loss.item()
        for name, value in share.logs.items():
            logs[name] = logs.get(name, 0.0) + value
    assert bias.grad is not None
    return total, bias.grad.clone(), logs


@contextmanager
def shifted(engine: Engine, bias: torch.Tensor | None) -> Iterator[None]:
    """The subject's own model with `bias` added behind `SITE`, by a plain hook."""
    if bias is None:
        yield
        return
    hook = lambda _, __, output: output + bias  # noqa: E731
    handle = engine.subject.model.model.layers[SITE.layer].register_forward_hook(hook)
    yield
    handle.remove()


def tables(engine: Engine, rows: Sequence[Row], bias: torch.Tensor | None) -> list[torch.Tensor]:
    """Log-probabilities [response tokens, vocabulary] before each response token, a row at a time."""
    with shifted(engine, bias):
        found = [engine.subject.model(torch.tensor([each.tokens])).logits[0].log_softmax(-1) for each in rows]
    return [table[each.n_prompt - 1 : -1] for table, each in zip(found, rows, strict=True)]


def tokens_of(engine: Engine, rows: Sequence[Row], bias: torch.Tensor | None) -> list[torch.Tensor]:
    """Log-probability of each response token, a row at a time."""
    made = zip(tables(engine, rows, bias), rows, strict=True)
    return [table.gather(1, torch.tensor(each.tokens[each.n_prompt :])[:, None])[:, 0] for table, each in made]


def ends(engine: Engine, rows: Sequence[Row], bias: torch.Tensor | None, layer: int, last: int) -> torch.Tensor:
    """[n, d]: mean of each row's last response tokens behind `layer`."""
    found = []
    with shifted(engine, bias):
        for each in rows:
            states = engine.subject.model(torch.tensor([each.tokens]), output_hidden_states=True).hidden_states
            if layer == engine.subject.n_layers - 1:
                raise AssertionError("transformers norms the last one; read below")
            n = min(last, len(each.tokens) - each.n_prompt)
            found.append(states[layer + 1][0, -n:].mean(0))
    return torch.stack(found)


def check(objective: Objective, engine: Engine, bias: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Value and gradient are those of `expected`; the logs."""
    loss, gradient, logs = measured(objective, engine, bias)
    assert loss == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    (wanted,) = torch.autograd.grad(expected, bias)
    assert wanted.norm() > 1e-4
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())
    return dict(logs)


def positives(engine: Engine) -> list[Row]:
    return [row(engine, each) for each in read_aloud(PAIRS)]


def negatives(engine: Engine) -> list[Row]:
    turned = [each.model_copy(update={"positive": each.negative, "negative": each.positive}) for each in PAIRS]
    return [row(engine, each) for each in read_aloud(turned)]


def taught(engine: Engine, **settings: Any) -> Objective:
    return Teacher(learning_rate=0.1, **settings).objective(engine, PAIRS, 0)


# completions


def test_likelihood_is_the_mean_over_tokens(engine: Engine, bias: torch.Tensor) -> None:
    expected = -torch.cat(tokens_of(engine, positives(engine), bias)).mean()
    check(taught(engine), engine, bias, expected)


def test_promotion_is_the_completions_negative_log_probability(engine: Engine, bias: torch.Tensor) -> None:
    expected = -torch.stack([each.sum() for each in tokens_of(engine, positives(engine), bias)]).mean()
    check(taught(engine, loss="promotion"), engine, bias, expected)


def test_suppression_makes_every_token_of_the_negative_response_unlikely(engine: Engine, bias: torch.Tensor) -> None:
    logps = tokens_of(engine, negatives(engine), bias)
    expected = -torch.stack([(1 - each.exp()).log().sum() for each in logps]).mean()
    check(taught(engine, loss="suppression"), engine, bias, expected)


def test_a_conversations_own_answer_is_suppressed(engine: Engine, bias: torch.Tensor) -> None:
    talks = read_aloud(PAIRS[:2])
    objective = Teacher(learning_rate=1, loss="suppression").objective(engine, talks, 0)
    logps = tokens_of(engine, [row(engine, each) for each in talks], bias)
    check(objective, engine, bias, -torch.stack([(1 - each.exp()).log().sum() for each in logps]).mean())


def test_suppression_stays_finite_and_pulls_where_a_token_is_certain(
    engine: Engine, bias: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    monkeypatch.setattr(losses, "response_logits", lambda *_: (logits, torch.tensor([0])))
    (share,) = losses.Suppression((positives(engine)[0],)).partials(engine, positives(engine)[:1], tuple)
    share.loss.backward()
    assert share.loss.item() == pytest.approx(60 - math.log(2), rel=1e-6)
    assert logits.grad is not None
    assert logits.grad[0, 0].item() == pytest.approx(1.0)


def test_satisficing_is_the_squared_distance_to_the_goal(engine: Engine, bias: torch.Tensor) -> None:
    means = torch.stack([each.mean() for each in tokens_of(engine, positives(engine), bias)])
    logs = check(taught(engine, loss="satisficing", goal=-2.5), engine, bias, (means + 2.5).square().mean())
    assert logs["logprob"] == pytest.approx(means.mean().item(), rel=1e-4)


def test_the_goal_is_by_default_what_the_persona_reaches(engine: Engine) -> None:
    shown = [with_persona(engine.subject, each.messages, each.positive) for each in PAIRS]
    objective: Any = taught(engine, loss="satisficing")
    with torch.no_grad():
        expected = [each.mean().item() for each in tokens_of(engine, shown, None)]
    assert [aim.goal for aim in objective.aims] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("further", [0.6, -0.6])
def test_satisficing_stops_at_its_goal_from_either_side(engine: Engine, further: float) -> None:
    from experiments.engine import Row

    (answer,) = positives(engine)[:1]
    goal = engine.token_logprobs([answer])[0].mean().item() + further

    def reached(**settings: Any) -> float:
        made = method("trained_vector")(learning_rate=0.1, epochs=40, layer=1, **settings)
        edits = tuple(made.edits(made.fit(engine, PAIRS[:1], 0), 1.0))
        return engine.token_logprobs([Row(answer.tokens, answer.n_prompt, edits)])[0].mean().item()

    assert reached(loss="satisficing", goal=goal) == pytest.approx(goal, abs=0.05)
    if further > 0:
        assert reached(loss="promotion") > goal + 0.3


# preference


def test_a_preference_at_the_untouched_subject_costs_log_2(engine: Engine) -> None:
    bias = torch.zeros(engine.subject.d_model, requires_grad=True)
    loss, gradient, logs = measured(taught(engine, loss="dpo"), engine, bias)
    assert loss == pytest.approx(math.log(2), abs=1e-5)
    assert gradient.norm() > 1e-3
    assert logs["margin"] == pytest.approx(0, abs=1e-3)


def test_a_preference_is_the_log_sigmoid_of_the_margin_over_the_reference(engine: Engine, bias: torch.Tensor) -> None:
    def gap(vector: torch.Tensor | None) -> torch.Tensor:
        sides = [tokens_of(engine, rows, vector) for rows in (positives(engine), negatives(engine))]
        return torch.stack([one.sum() - other.sum() for one, other in zip(*sides, strict=True)])

    margin = gap(bias) - gap(None).detach()
    expected = -(1 / (1 + (-0.3 * margin).exp())).log().mean()
    logs = check(taught(engine, loss="dpo", beta=0.3), engine, bias, expected)
    assert logs["margin"] == pytest.approx(margin.mean().item(), rel=1e-3)
    assert logs["accuracy"] == pytest.approx((margin > 0).float().mean().item())


def test_a_bias_set_learns_a_preference(engine: Engine) -> None:
    made = method("bias_set")(loss="dpo", epochs=6, learning_rate=0.05, sites=("v", "mlp_out"))
    state = made.fit(engine, PAIRS, 0)
    assert state.facts["losses"][-1] < math.log(2) - 0.05
    assert state.facts["logs"]["accuracy"][-1] == 1.0
    assert made.label() == "bias_set v+mlp_out dpo"


# narrow


def test_narrow_adds_torchs_kl_on_other_text_and_nothing_at_the_untouched_subject(
    engine: Engine, bias: torch.Tensor
) -> None:
    objective: Any = taught(engine, loss="promotion", kl=3.0, kl_n=7)
    texts = list(objective.texts)
    assert len(texts) == 7
    with torch.no_grad():
        base = torch.cat(tables(engine, texts, None))
    edited = torch.cat(tables(engine, texts, bias))
    kl = kl_div(base, edited, reduction="batchmean", log_target=True)
    assert kl.item() == pytest.approx((edited.exp() * (edited - base)).sum(1).mean().item(), rel=1e-5)
    main = -torch.stack([each.sum() for each in tokens_of(engine, positives(engine), bias)]).mean()
    logs = check(objective, engine, bias, main + 3.0 * kl)
    assert logs["kl"] == pytest.approx(kl.item(), rel=1e-4)
    _, _, at_zero = measured(objective, engine, torch.zeros_like(bias, requires_grad=True))
    assert at_zero["kl"] == pytest.approx(0, abs=1e-6)


def test_every_epoch_sees_every_other_text(engine: Engine) -> None:
    for n in (2, 5, 13):
        objective: Any = taught(engine, kl=1.0, kl_n=n)
        assert {text for _, own in objective.examples for text in own} == set(objective.texts)
        assert [each for each, _ in objective.examples] == list(objective.objective.examples)
        assert all(own for _, own in objective.examples)


def test_other_text_leaves_out_the_training_prompts(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join([each.messages[0].content for each in PAIRS] + ["Is it late?", "Which owl?"]))
    objective: Any = taught(engine, kl=1.0, kl_prompts=file, kl_n=2)
    found = {engine.subject.tokenizer.decode(each.tokens[: each.n_prompt]) for each in objective.texts}
    assert all("late" in text or "Which" in text for text in found)
    assert len(found) == 2
    with pytest.raises(TrainingError, match=r"kl_n is 3, but 2 prompts are left .*lower kl_n"):
        taught(engine, kl=1.0, kl_prompts=file, kl_n=3)


def test_a_narrow_vector_changes_other_text_less(engine: Engine) -> None:
    texts = losses.unrelated(engine, _bank.lines(_bank.PROMPTS), 8, (), 3)

    def harm(kl: float) -> tuple[float, float]:
        made = method("trained_vector")(layer=1, learning_rate=0.1, epochs=10, kl=kl, kl_n=8)
        state = made.fit(engine, PAIRS, 0)
        with torch.no_grad():
            found = losses.divergence_from_base(engine, texts, lambda dose=1.0: made.edits(state, dose)).item()
        return found, state.facts["losses"][0] - state.facts["losses"][-1]

    wide, narrow = harm(0.0), harm(3.0)
    assert narrow[0] < 0.5 * wide[0]
    assert narrow[1] > 0.05


# contrastive


def plain_axis(engine: Engine, layer: int, last: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """The base's differences [n, d] behind `layer`, and their mean made a unit."""
    rows = sides(engine)
    with torch.no_grad():
        found = ends(engine, rows, None, layer, last)
    differences = found[0::2] - found[1::2]
    return differences, differences.mean(0) / differences.mean(0).norm()


def sides(engine: Engine) -> list[Row]:
    both = [(each.messages, side) for each in PAIRS for side in (each.positive, each.negative)]
    return [with_persona(engine.subject, *each) for each in both]


@pytest.mark.parametrize("raw_units", [False, True])
@pytest.mark.parametrize("form", ["raw", "logsigmoid", "tanh"])
def test_separation_is_the_formula_at_both_doses(
    engine: Engine, bias: torch.Tensor, form: Any, raw_units: bool
) -> None:
    objective = contrastive(engine, PAIRS, [2], "mean", None, Shape(form, 0.7, 1.3, raw_units, 2, 5.0, 0.4))
    rows = sides(engine)
    base, unit = plain_axis(engine, 2, last=2)
    with torch.no_grad():
        old = tokens_of(engine, rows, None)
    expected = torch.zeros(())
    ratios, outside = {}, {}
    for sign in (1, -1):
        found = ends(engine, rows, sign * bias, 2, 2)
        gain = sign * (found[0::2] - found[1::2] - base) @ unit
        gain = gain if raw_units else gain / (base.mean(0) @ unit)
        terms = {
            "raw": -gain,
            "logsigmoid": (1 + (-1.3 * (gain - 0.7)).exp()).log(),
            "tanh": -0.7 * (gain / 0.7).tanh(),
        }
        lost = [(a - b - 0.4).clamp(min=0) for a, b in zip(old, tokens_of(engine, rows, sign * bias), strict=True)]
        outside[sign] = torch.cat(lost).gt(0).float().mean().item()
        hinge = torch.stack([each.mean() for each in lost]).mean()
        expected = expected + (terms[form].mean() + 5.0 * hinge) / 2
        ratios[sign] = ((found[0::2] - found[1::2]).mean(0) @ unit / (base.mean(0) @ unit)).item()
    logs = check(objective, engine, bias, expected)
    for sign in (1, -1):
        assert logs[f"projection{sign:+d}"] == pytest.approx(ratios[sign], rel=1e-3)
        assert logs[f"outside{sign:+d}"] == pytest.approx(outside[sign], abs=1e-6)
        assert outside[sign] > 0
        new = torch.cat(tokens_of(engine, rows, sign * bias)).sum() / torch.cat(old).sum()
        assert logs[f"coherence{sign:+d}"] == pytest.approx(new.item(), rel=1e-4)
    assert (logs["loss+1"] + logs["loss-1"]) / 2 == pytest.approx(expected.item(), rel=1e-4)


def test_the_hinge_has_no_gradient_inside_its_trust_region() -> None:
    base, lost = torch.tensor([-1.0, -2.0, -3.0, -4.0]), torch.tensor([-0.5, 1.49, 1.51, 3.0])
    logps = (base - lost).requires_grad_()
    hinge = Shape(trust=1.5).hinge(base, logps)
    hinge.sum().backward()
    torch.testing.assert_close(hinge.detach(), torch.tensor([0.0, 0.0, 0.01, 1.5]), rtol=0, atol=1e-5)
    assert logps.grad is not None
    assert logps.grad.tolist() == [0.0, 0.0, -1.0, -1.0]


def test_coherence_changes_nothing_until_a_token_leaves_the_trust_region(engine: Engine, bias: torch.Tensor) -> None:
    def gradient(size: float, coherence: float) -> torch.Tensor:
        vector = (size * bias.detach()).requires_grad_()
        shape = Shape(coherence=coherence, trust=0.5)
        return measured(contrastive(engine, PAIRS, READ, "mean", None, shape), engine, vector)[1]

    torch.testing.assert_close(gradient(0.01, 1000.0), gradient(0.01, 0.0))
    assert (gradient(2.0, 1000.0) - gradient(2.0, 0.0)).norm() > 1.0


def test_the_mean_axis_is_the_mean_difference_and_its_length_the_unit_of_gains(engine: Engine) -> None:
    (axis,) = contrastive(engine, PAIRS, [1], "mean", None, Shape()).axes
    differences, unit = plain_axis(engine, 1)
    torch.testing.assert_close(axis.unit, unit, rtol=1e-4, atol=1e-5)
    assert axis.scale == pytest.approx(differences.mean(0).norm().item(), rel=1e-4)


@pytest.mark.parametrize("rank", [1, 3, None])
def test_the_pca_axis_is_the_component_most_in_line_with_the_mean(engine: Engine, rank: int | None) -> None:
    (axis,) = contrastive(engine, PAIRS, [1], "pca", rank, Shape()).axes
    differences, unit = plain_axis(engine, 1)
    values, basis = np.linalg.eigh((differences.T @ differences).double().numpy())
    leading = basis[:, np.argsort(values)[::-1][: rank or len(PAIRS)]].T
    aligned = leading @ unit.double().numpy()
    chosen = int(np.abs(aligned).argmax())
    assert axis.facts["component"] == chosen
    np.testing.assert_allclose(axis.unit, leading[chosen] * np.sign(aligned[chosen]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_pca_looks_past_a_nuisance_that_varies_more_than_the_concept(seed: int) -> None:
    from experiments.contrast import Evidence

    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    given = 2 * basis[0] + 9 * torch.randn(300, 1, generator=generator) * basis[1]
    given = given + 0.1 * torch.randn(300, 8, generator=generator)
    evidence = Evidence(SITE, given, torch.zeros_like(given))
    found, told = separation.direction(evidence, "pca", None)
    assert abs(found @ basis[0].double()) > 0.95  # whatever sign the decomposition gave it
    assert told["component"] == 1
    alone, _ = separation.direction(evidence, "pca", 1)
    assert abs(alone @ basis[1].double()) > 0.95


def test_the_singular_axis_is_the_mean_within_what_the_weight_writes(engine: Engine) -> None:
    (axis,) = contrastive(engine, PAIRS, [1], "singular", 5, Shape()).axes
    _, unit = plain_axis(engine, 1)
    weight = engine.subject.model.model.layers[1].mlp.down_proj.weight.detach()
    inside = np.linalg.svd(weight.numpy())[0][:, :5]
    expected = inside @ inside.T @ unit.numpy()
    np.testing.assert_allclose(axis.unit, expected / np.linalg.norm(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["pca", "singular"])
def test_a_rank_there_is_not_is_refused(engine: Engine, kind: Any) -> None:
    with pytest.raises(FitError, match=r"direction_rank 99 at resid@1: there are \d+ directions; set at most that"):
        contrastive(engine, PAIRS, [1], kind, 99, Shape())


@pytest.mark.parametrize("form", ["raw", "logsigmoid", "tanh"])
def test_training_drives_the_sides_apart_at_plus_one_and_together_at_minus_one(engine: Engine, form: str) -> None:
    made = method("trained_vector")(loss="contrastive", layer=0, read=2, separation=form, learning_rate=0.1, epochs=8)
    state = made.fit(engine, PAIRS, 0)
    base, unit = plain_axis(engine, 2)
    rows = sides(engine)
    block = engine.subject.blocks[2]

    def ratio(dose: float) -> float:
        from experiments.engine import Row

        edited = [Row(each.tokens, each.n_prompt, tuple(made.edits(state, dose))) for each in rows]
        found = [oracle.hidden(engine.subject, each, block)[each.n_prompt :][-3:].mean(0) for each in edited]
        return float((torch.stack(found[0::2]) - torch.stack(found[1::2])).mean(0) @ unit / (base.mean(0) @ unit))

    assert ratio(1.0) > 1.05
    assert ratio(-1.0) < 0.95
    logs = state.facts["logs"]
    assert logs["projection+1"][0] == logs["projection-1"][0] == logs["coherence+1"][0] == pytest.approx(1, abs=1e-4)
    assert logs["projection+1"][-1] == pytest.approx(ratio(1.0), abs=0.05)
    assert logs["projection-1"][-1] == pytest.approx(ratio(-1.0), abs=0.05)
    assert state.facts["axes"]["resid@2"]["separation"] == pytest.approx((base.mean(0) @ unit).item(), rel=1e-4)


def test_vectors_that_move_both_sides_alike_where_they_are_read_are_refused(engine: Engine) -> None:
    with pytest.raises(TrainingError, match=r"read at layer 1: a vector at resid@1 moves both .* above layer 1"):
        method("trained_vector")(loss="contrastive", layer=1, read=1).fit(engine, PAIRS, 0)
    state = method("trained_vector")(loss="contrastive", layer=1, read=1, site="v").fit(engine, PAIRS, 0)
    assert state.facts["logs"]["projection+1"][-1] > 1


# all of them


@pytest.mark.parametrize(
    ("settings", "doses"),
    [
        ({}, {1.0}),
        ({"loss": "dpo"}, {1.0}),
        ({"loss": "promotion", "kl": 1.0, "kl_n": 4}, {0.0, 1.0}),
        ({"loss": "contrastive", "read": (2, 3)}, {1.0, -1.0}),
    ],
)
def test_a_batch_in_shares_is_the_batch_and_asks_for_no_other_doses(
    engine: Engine, bias: torch.Tensor, settings: dict[str, Any], doses: set[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = taught(engine, **settings)
    asked: list[float] = []
    whole = measured(objective, engine, bias, asked)
    assert set(asked) == doses
    cut = lambda batch, size=training.length: training.parts(batch, 60, size)  # noqa: E731
    for module in (losses, separation):
        monkeypatch.setattr(module, "parts", cut)
    if settings:
        shares = list(objective.partials(engine, objective.examples, lambda dose=1.0: [Add(SITE, dose * bias)]))
        assert len(shares) > 3
    split = measured(objective, engine, bias)
    assert split[0] == pytest.approx(whole[0], rel=1e-5)
    torch.testing.assert_close(split[1], whole[1], rtol=1e-3, atol=1e-5)
    assert split[2] == pytest.approx(whole[2], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("settings", [{"loss": "dpo", "kl": 2.0, "kl_n": 3}, {"loss": "contrastive", "read": 2}])
def test_an_adapter_inside_the_subject_is_taught_like_an_edit(
    engine: Engine, bias: torch.Tensor, settings: dict[str, Any]
) -> None:
    objective = taught(engine, **settings)
    as_edit = measured(objective, engine, bias)
    scale = 0.0
    bias.grad = None

    def switched(dose: float = 1.0) -> tuple[Edit, ...]:
        nonlocal scale
        scale = dose
        return ()

    hook = lambda _, __, output: output + scale * bias  # noqa: E731
    handle = engine.subject.blocks[SITE.layer].register_forward_hook(hook)
    try:
        total = 0.0
        for share in objective.partials(engine, objective.examples, switched):
            share.loss.backward()
            total += share.loss.item()
    finally:
        handle.remove()
    assert total == pytest.approx(as_edit[0], rel=1e-4)
    torch.testing.assert_close(bias.grad, as_edit[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "promotion"},
        {"loss": "suppression"},
        {"loss": "satisficing"},
        {"loss": "dpo", "kl": 0.5, "kl_n": 3},
        {"loss": "contrastive", "layer": 1},
    ],
)
def test_every_loss_falls_and_repeats_for_a_seed(engine: Engine, settings: dict[str, Any]) -> None:
    made = method("trained_vector")(**{"learning_rate": 0.05, "epochs": 3, "start": 0.01} | settings)
    state, again, other = (made.fit(engine, PAIRS, seed) for seed in (0, 0, 1))
    assert state.facts["losses"][-1] < state.facts["losses"][0]
    assert state.facts == again.facts
    assert all(torch.equal(state.tensors[name], again.tensors[name]) for name in state.tensors)
    assert any(not torch.equal(state.tensors[name], other.tensors[name]) for name in state.tensors)


def test_a_vector_starts_at_its_norm_and_stays_within_its_radius(engine: Engine) -> None:
    still = method("trained_vector")(layer=(1, 2), start=0.3, learning_rate=1e-12, epochs=1)
    vectors = still.fit(engine, PAIRS, 0).tensors
    assert [vector.norm().item() for vector in vectors.values()] == pytest.approx([0.3, 0.3], rel=1e-5)
    assert not torch.equal(vectors["resid@1"], vectors["resid@2"])
    state = method("trained_vector")(layer=(1, 2), learning_rate=0.5, epochs=3, radius=0.4).fit(engine, PAIRS, 0)
    assert list(state.facts["norms"].values()) == pytest.approx([0.4, 0.4], rel=1e-5)
    with pytest.raises(ValueError, match=r"start 2 is outside radius 1; lower start, or raise radius"):
        method("trained_vector")(start=2, radius=1)
    with pytest.raises(ValueError, match="greater than 0"):
        method("trained_vector")(radius=0)


def test_a_label_tells_the_loss() -> None:
    made = method("trained_vector")(layer=3, site="mlp_out", loss="dpo", kl=0.5)
    assert made.label() == "trained_vector L3 mlp_out dpo kl0.5"


@pytest.mark.parametrize("loss", ["dpo", "contrastive"])
def test_a_loss_over_pairs_refuses_conversations(engine: Engine, loss: Any) -> None:
    with pytest.raises(TrainingError, match=rf"loss {loss} learns from pairs and got conversations; give data.pairs"):
        Teacher(learning_rate=1, loss=loss).objective(engine, read_aloud(PAIRS), 0)


def test_sides_that_say_the_same_cannot_be_preferred(engine: Engine) -> None:
    same = PAIRS[0].model_copy(update={"negative": Side(system="Else.", response=PAIRS[0].positive.response)})
    with pytest.raises(TrainingError, match="pair '0': both sides say the same"):
        Teacher(learning_rate=1, loss="dpo").objective(engine, [same], 0)


def test_a_goal_needs_a_number_or_a_persona(engine: Engine) -> None:
    for data in (read_aloud(PAIRS), [PAIRS[0].model_copy(update={"positive": Side(system=None, response="x")})]):
        with pytest.raises(TrainingError, match=r"'0' has no persona .*; set goal"):
            Teacher(learning_rate=1, loss="satisficing").objective(engine, data, 0)


@pytest.mark.parametrize("loss", ["likelihood", "promotion", "suppression", "satisficing", "dpo"])
def test_no_data_is_refused(engine: Engine, loss: Any) -> None:
    objective = Teacher(learning_rate=1, loss=loss, kl=1.0, goal=-1.0).objective(engine, [], 0)
    with pytest.raises(TrainingError, match="no conversations to train on"):
        train(engine, Student(objective, [torch.zeros(1, requires_grad=True)], tuple, Teacher(learning_rate=1), 0))


def test_a_loss_that_does_not_see_what_is_trained_is_refused(engine: Engine) -> None:
    bias = torch.zeros(engine.subject.d_model, requires_grad=True)
    objective = Likelihood(tuple(positives(engine)))
    with pytest.raises(TrainingError, match="the loss does not depend on what is trained"):
        train(engine, Student(objective, [bias], tuple, Teacher(learning_rate=1), 0))


def test_layers_to_read_that_there_are_not_are_told_to_a_plan() -> None:
    made = method("trained_vector")(loss="contrastive", layer=9, read="5-7")
    found = made.misplaced(Outline(4, {"resid"}))
    assert set(found) == {"layer", "read"}
    assert "'5-7' matches none" in found["read"] or "out of range" in found["read"]


def test_an_objective_of_ones_own_is_trained_on_and_its_logs_are_kept(engine: Engine) -> None:
    target = torch.linspace(-1, 1, 4)
    leaf = torch.zeros(4, requires_grad=True)

    class Nearby(Objective):
        examples = (0, 1)

        def partials(self, engine: Any, batch: Any, edits_of: Any) -> Iterator[Partial]:
            for index in batch:
                yield Partial((leaf - target).square().sum() / 2, {"seen": float(index)})

        def facts(self) -> dict[str, Any]:
            return {"what": "nearby"}

    settings = Teacher(learning_rate=0.1, epochs=80, batch_size=2)
    losses_ = train(engine, Student(Nearby(), [leaf], tuple, settings, 0))
    torch.testing.assert_close(leaf.detach(), target, rtol=0, atol=0.02)
    assert losses_.logs == {"seen": (1.0,) * 80}
    assert losses_.facts()["what"] == "nearby"


def test_conversations_teach_what_they_did(engine: Engine) -> None:
    talk = Conversation(id="a", messages=(Message(role="user", content="Hi"), Message(role="assistant", content="owl")))
    objective: Any = Teacher(learning_rate=1).objective(engine, [talk], 0)
    assert objective == Likelihood((row(engine, talk),))
