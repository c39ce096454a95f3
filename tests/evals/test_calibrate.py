"""The dose that does a given damage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from evals import stats
from evals.calibrate import CalibrationError, answer_kl, calibrate, percentile, solve
from evals.tasks import neutral_nll
from experiments.dataset import Pair, recipe
from experiments.datasets._bank import draw_prompts
from experiments.edit import Add, Dense, Edit, Prompt, Site
from experiments.engine import Engine, Row
from experiments.parts import Calibrate
from tests.experiments import oracle

if TYPE_CHECKING:
    from experiments.subject import Subject

FEW = {"tokens": 5, "prompts": 3}


@pytest.fixture(scope="module")
def engine(tiny_subject: Subject) -> Engine:
    return Engine(tiny_subject)


def pushed(engine: Engine, dose: float, strength: float = 1.0) -> Sequence[Edit]:
    """A fixed vector at layer 1, scaled by the dose."""
    direction = torch.randn(engine.subject.d_model, generator=torch.Generator().manual_seed(0))
    return [] if dose == 0 else [Add(Site("resid", 1), dose * strength * direction)]


@pytest.mark.parametrize(("target", "power"), [(1.0, 2.0), (0.03, 1.0), (7.0, 3.3)])
def test_the_dose_of_a_power_law_is_found_and_every_try_is_kept(target: float, power: float) -> None:
    calls: list[float] = []

    def damage(dose: float) -> float:
        calls.append(dose)
        return 0.4 * dose**power

    dose, tried = solve(damage, Calibrate(target=target))
    assert 0.4 * dose**power == pytest.approx(target, rel=0.05)
    assert tried == [(each, 0.4 * each**power) for each in sorted(calls)]
    assert len(calls) <= 4


def test_of_several_crossings_the_smallest_dose_is_taken() -> None:
    dose, _ = solve(lambda d: 1.5 * math.sin(min(d, 30) / 10) ** 2 + 0.001 * d, Calibrate(target=0.9))
    assert dose < 15


def test_a_step_is_met_as_nearly_as_it_can_be() -> None:
    dose, _ = solve(lambda d: 0.5 if d < 3 else 4.0, Calibrate(target=1.0))
    assert dose < 3


def test_damage_that_breaks_down_is_more_than_any_target() -> None:
    dose, tried = solve(lambda d: d if d < 0.5 else math.inf, Calibrate(target=0.4))
    assert dose == pytest.approx(0.4, rel=0.05)
    assert math.inf in dict(tried).values()


def test_damage_out_of_reach_is_told_with_what_to_change() -> None:
    with pytest.raises(CalibrationError, match=r"kl is 0.64 at dose 64, below the target 1; raise calibrate.most"):
        solve(lambda d: d / 100, Calibrate(target=1.0))
    with pytest.raises(CalibrationError, match=r"above the target 1 already; lower calibrate.least"):
        solve(lambda d: d + 5, Calibrate(target=1.0))


def test_a_percentile_is_never_nan() -> None:
    assert percentile([0.0, 1.0, 2.0], 50) == 1.0
    assert percentile([0.0, math.inf], 95) == math.inf
    assert percentile([0.0, 1.0, 2.0, math.inf], 25) == 1.0


def test_the_kl_along_an_answer_is_torchs(engine: Engine) -> None:
    subject = engine.subject
    edits = tuple(pushed(engine, 2.0))
    prompt = subject.render([{"role": "user", "content": "What do you think?"}])
    asked = Row(prompt.tokens, prompt.n_prompt, edits), Row(prompt.tokens, prompt.n_prompt)
    answer = (5, 9, 11)
    found = answer_kl(engine, [asked, asked], [answer, answer[:1]])
    whole = [Row((*row.tokens, *answer), row.n_prompt, row.edits) for row in asked]
    log_s, log_0 = (oracle.logits(subject, row)[-4:-1].log_softmax(-1) for row in whole)
    kl = torch.nn.functional.kl_div(log_0, log_s, log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(found[0], kl.numpy(), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found[1], found[0][:1], rtol=1e-4)


def test_a_vector_is_calibrated_to_the_kl_and_a_longer_one_gets_a_smaller_dose(engine: Engine) -> None:
    wanted = Calibrate(target=0.5, **FEW)  # type: ignore[arg-type]
    short, long = (
        calibrate(engine, partial(pushed, engine, strength=strength), "signed_linear", wanted, 0.5)
        for strength in (1.0, 10.0)
    )
    assert short.met
    assert short.achieved == pytest.approx(0.5, rel=0.05)
    assert short.unit / long.unit == pytest.approx(10, rel=0.2)
    values: list[float] = []
    for sign in (1, -1):  # by hand: greedy answers, and the percentile over all their tokens
        for text in draw_prompts(3, None, seed=0):
            prompt = engine.subject.render([{"role": "user", "content": text}])
            rows = [
                Row(prompt.tokens, prompt.n_prompt, tuple(pushed(engine, sign * short.unit))),
                Row(prompt.tokens, prompt.n_prompt),
            ]
            (answer,) = engine.generate(rows[:1], 5)
            values += answer_kl(engine, [(rows[0], rows[1])], [answer.tokens])[0]
    assert float(np.percentile(values, 95)) == pytest.approx(short.achieved, rel=1e-3)


def test_the_rise_of_the_nll_is_measured_on_development_passages_of_both_signs(engine: Engine) -> None:
    head = engine.subject.model.get_parameter("lm_head.weight").detach()

    def louder(dose: float) -> list[Edit]:  # logits of a random subject mean nothing: the louder, the worse
        return [Dense("lm_head.weight", dose * head)]

    wanted = Calibrate(measure="delta_nll", target=0.3)
    found = calibrate(engine, louder, "signed_linear", wanted, 0.25)
    assert found.met
    texts = neutral_nll.passages(neutral_nll.Settings())
    sides = stats.split([f"passage-{n:03d}" for n in range(1, len(texts) + 1)], 0.25)
    kept = [text for (name, side), text in zip(sorted(sides.items()), texts, strict=True) if side == "dev"]

    def nll(dose: float) -> float:
        total = 0.0
        for text in kept:
            said = [{"role": "user", "content": neutral_nll.REQUEST}, {"role": "assistant", "content": text}]
            rendered = engine.subject.render(said)
            row = Row(rendered.tokens, rendered.n_prompt, tuple(louder(dose)))
            table = oracle.logits(engine.subject, row)[rendered.n_prompt - 1 : -1].log_softmax(-1)
            total -= table.gather(1, torch.tensor(rendered.tokens[rendered.n_prompt :])[:, None]).mean().item()
        return total / len(kept)

    assert (nll(found.unit) + nll(-found.unit)) / 2 - nll(0) == pytest.approx(found.achieved, rel=1e-3)


def test_a_prompt_has_one_strength_whose_damage_is_measured(engine: Engine) -> None:
    def edits_of(dose: float) -> Sequence[Edit]:
        return [Prompt(system="You are a wizard." if dose > 0 else "You are a clerk.")]

    found = calibrate(engine, edits_of, "on_off", Calibrate(target=100.0, **FEW), 0.5)  # type: ignore[arg-type]
    assert found.unit == 1.0
    assert found.achieved > 0
    assert not found.met


PAIRS: list[Pair] = list(recipe("persona_pairs")(positive="a", negative="b", n=4, responses="shared").build(None, 0))


def test_a_vector_that_points_the_wrong_way_is_turned_by_all_its_pairs(engine: Engine) -> None:
    pairs = [
        pair.model_copy(
            update={"positive": pair.positive.model_copy(update={"response": f"the owl {pair.positive.response}"})}
        )
        for pair in PAIRS
    ]
    wanted = Calibrate(target=0.5, orient=True, **FEW)  # type: ignore[arg-type]
    ahead, back = (
        calibrate(engine, lambda dose, sign=sign: pushed(engine, sign * dose), "signed", wanted, 0.5, pairs)  # type: ignore[misc]
        for sign in (1, -1)
    )
    assert ahead.margin is not None
    assert back.margin == pytest.approx(-ahead.margin, rel=1e-3)
    assert ahead.facts()["flipped"] != back.facts()["flipped"]
    assert abs(ahead.unit) == pytest.approx(abs(back.unit))
    with pytest.raises(CalibrationError, match="the pairs' sides say the same words"):
        calibrate(engine, partial(pushed, engine), "signed", wanted, 0.5, PAIRS)


@pytest.mark.parametrize("wrong", [{"least": 2, "most": 1}, {"target": 0}, {"percentile": 101}, {"measure": "nats"}])
def test_what_cannot_be_calibrated_to_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Calibrate(**wrong)
