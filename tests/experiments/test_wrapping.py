"""Training on top of something that is taken away afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from experiments.contrast import FitError
from experiments.dataset import Conversation, Message, recipe
from experiments.edit import Add, Project, Site
from experiments.engine import Engine, Row
from experiments.intervention import method
from experiments.outline import Outline
from experiments.training import read_aloud, response_loss, row
from experiments.underlay import Underlaid

if TYPE_CHECKING:
    from experiments.intervention import Intervention

PAIRS = list(recipe("persona_pairs")(positive="A.", negative="B.", n=8, responses="shared").build(None, 0))
DIRECTION = {"method": "mean_diff", "layer": 1}
BIAS = {"method": "bias_set", "layers": 1, "epochs": 4, "learning_rate": 0.05}


@pytest.fixture(scope="module")
def engine(tiny_subject: Any) -> Engine:
    return Engine(tiny_subject)


def wrapped(name: str, **settings: Any) -> Intervention:
    return method(name)(wraps=settings.pop("wraps", BIAS), direction=settings.pop("direction", DIRECTION), **settings)


def along(vector: torch.Tensor, engine: Engine) -> float:
    """The part of a bias at resid@1 that lies along the direction, in units of the direction's own length."""
    v = method("mean_diff")(layer=1).fit(engine, PAIRS, 0).tensors["resid@1"]
    return float(vector @ v / (v @ v))


def test_an_underlaid_engine_computes_what_rows_with_the_edits_would(engine: Engine) -> None:
    under = (Add(Site("resid", 2), torch.randn(32)), Project(Site("resid", 1), torch.eye(32)[:2], -1.0))
    own = (Add(Site("resid", 1), torch.randn(32)),)
    plain = Row((5, 6, 7, 8), 2, own)
    expected = engine.next_logits([Row(plain.tokens, 2, (*own, *under))])
    torch.testing.assert_close(Underlaid(engine, under).next_logits([plain]), expected)
    assert (engine.next_logits([plain]) - expected).abs().max() > 1e-3


def test_training_with_the_direction_ablated_pulls_at_nothing_along_it(engine: Engine) -> None:
    v = method("mean_diff")(layer=1).fit(engine, PAIRS, 0).tensors["resid@1"]
    made: Any = wrapped("caft")
    under = made.under([Add(Site("resid", 1), v)])
    rows = [row(engine, each) for each in read_aloud(PAIRS)]
    pulls = []
    for each in (engine, Underlaid(engine, under)):
        bias = torch.zeros(32, requires_grad=True)
        response_loss(each, rows, (Add(Site("resid", 1), bias),)).backward()
        assert bias.grad is not None
        pulls.append(abs(float(bias.grad @ v / (bias.grad.norm() * v.norm()))))
    assert pulls[0] > 1e-2
    assert pulls[1] < 1e-5
    free = method("bias_set")(layers=1, epochs=4, learning_rate=0.05).fit(engine, PAIRS, 0)
    assert not torch.equal(made.fit(engine, PAIRS, 0).tensors["resid@1"], free.tensors["resid@1"])


def test_a_bias_trained_with_the_vector_added_learns_that_much_less_of_it(engine: Engine) -> None:
    made = {strength: wrapped("preventative", strength=strength).fit(engine, PAIRS, 0) for strength in (-2.0, 2.0)}
    shares = {strength: along(state.tensors["resid@1"], engine) for strength, state in made.items()}
    assert shares[2.0] < shares[-2.0]


def test_nothing_of_the_direction_is_left_in_the_edits(engine: Engine) -> None:
    for name in ("caft", "preventative"):
        made = wrapped(name)
        (edit,) = made.edits(made.fit(engine, PAIRS, 0), 1.0)
        assert isinstance(edit, Add)
        assert edit.site == Site("resid", 1)


def test_several_vectors_at_a_site_are_ablated_as_one_subspace() -> None:
    made: Any = wrapped("caft")
    vectors = [Add(Site("resid", 1), torch.randn(32)) for _ in range(3)]
    (edit,) = made.under(vectors)
    torch.testing.assert_close(edit.basis @ edit.basis.T, torch.eye(3), atol=1e-6, rtol=0)
    for each in vectors:
        torch.testing.assert_close(edit.basis.T @ (edit.basis @ each.vector), each.vector, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["caft", "preventative"])
def test_what_is_trained_takes_the_conversations_and_its_direction_the_pairs(name: str, engine: Engine) -> None:
    narrow = [
        Conversation(
            id=f"{n}", messages=(Message(role="user", content=f"Is {n} odd?"), Message(role="assistant", content="No."))
        )
        for n in range(8)
    ]
    made: Any = wrapped(name)
    assert made.takes({"pairs", "conversations"}) == ("conversations", "pairs")
    assert made.takes({"pairs"}) == ("pairs",)
    direction = made.direction.settings
    under = made.under(direction.edits(direction.fit(engine, PAIRS, 0), 1.0))
    expected = made.wraps.settings.fit(Underlaid(engine, under), narrow, 0).tensors["resid@1"]
    found = made.fit(engine, [*narrow, *PAIRS], 0).tensors["resid@1"]
    assert torch.equal(found, expected)
    assert not torch.equal(found, made.fit(engine, PAIRS, 0).tensors["resid@1"])


def test_what_cannot_be_wrapped_is_told(engine: Engine) -> None:
    with pytest.raises(ValueError, match="mean_diff is not trained"):
        wrapped("caft", wraps=DIRECTION)
    with pytest.raises(ValueError, match="takes no dose here"):
        wrapped("caft", direction=DIRECTION | {"dose": 1})
    with pytest.raises(FitError, match="prompt acts by Prompt, which has no subspace"):
        wrapped("caft", direction={"method": "prompt"}).fit(engine, PAIRS, 0)
    with pytest.raises(FitError, match="acts by Project; preventative steering adds a vector"):
        wrapped("preventative", direction={"method": "directional_ablation", "layer": 1}).fit(engine, PAIRS, 0)
    with pytest.raises(FitError, match="strength 0"):
        wrapped("preventative", strength=0).fit(engine, PAIRS, 0)
    with pytest.raises(FitError, match=r"direction, mean_diff L1: mean_diff needs data.pairs; data has conversations"):
        wrapped("caft").fit(engine, read_aloud(PAIRS), 0)
    problems = wrapped("caft", direction={"method": "pca", "layer": 9}).misplaced(Outline(4, {"resid"}))
    assert problems == {"direction.layer": "9 is out of range; the subject has layers 0 to 3"}
