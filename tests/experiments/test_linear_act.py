"""Linear transport of activations against numpy's least squares and closed forms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from experiments.contrast import FitError, contrast
from experiments.datasets.persona_pairs import PersonaPairs
from experiments.edit import Site
from experiments.engine import Engine, Row
from experiments.interventions.linear_act import LinearAct, transport

if TYPE_CHECKING:
    from experiments.subject import Subject

PERSONAS = PersonaPairs(positive="You are a wizard.", negative="You are a clerk.", n=6, responses="shared")
PAIRS = PERSONAS.build(None, 0)


def test_each_number_gets_the_line_of_least_squares_through_its_sorted_samples() -> None:
    random = torch.Generator().manual_seed(0)
    source, goal = torch.randn(2, 30, 5, generator=random, dtype=torch.float64)
    scale, shift, _ = transport(source, 3 * goal + 1)
    for at in range(5):
        slope, intercept = np.polyfit(np.sort(source[:, at]), np.sort(3 * goal[:, at] + 1), 1)
        assert 1 + scale[at].item() == pytest.approx(slope)
        assert shift[at].item() == pytest.approx(intercept)


def test_an_affine_change_is_found_exactly_and_pairing_does_not_matter() -> None:
    source = torch.randn(20, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slope, intercept = torch.tensor([2.0, 0.5, 1.0, 3.0]).double(), torch.tensor([1.0, -2.0, 0.0, 4.0]).double()
    scale, shift, facts = transport(source, (slope * source + intercept).flip(0))
    torch.testing.assert_close(scale, slope - 1)
    torch.testing.assert_close(shift, intercept)
    assert facts["explained"] == pytest.approx(1)


def test_a_number_that_never_varies_is_shifted() -> None:
    scale, shift, _ = transport(torch.full((3, 1), 2.0), torch.tensor([[4.0], [5.0], [6.0]]))
    assert (scale.item(), shift.item()) == (0.0, 3.0)


def test_dose_c_goes_the_share_c_of_the_way_inside_the_subject(tiny_subject: Subject) -> None:
    engine, site = Engine(tiny_subject), Site("resid", 1)
    made = LinearAct(layer=1)
    state = made.fit(engine, PAIRS, 0)
    evidence = contrast(engine, PAIRS, "response_mean").at(site)
    scale, shift, _ = transport(evidence.negative.double(), evidence.positive.double())
    tokens = tiny_subject.render([{"role": "user", "content": "What do you think?"}]).tokens
    rows = [Row(tokens, 1, tuple(made.edits(state, dose))) for dose in (0, 0.7, -0.7)]
    base, ahead, back = engine.activations(rows, [site], "response_mean")[site].double()
    way = scale * base + shift
    torch.testing.assert_close(ahead, base + 0.7 * way, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(back, base - 0.7 * way, rtol=1e-4, atol=1e-5)


def test_one_pair_is_refused(tiny_subject: Subject) -> None:
    with pytest.raises(FitError, match="1 pair is not enough for a line"):
        LinearAct().fit(Engine(tiny_subject), PAIRS[:1], 0)
