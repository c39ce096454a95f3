"""The training loop against plain PyTorch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from experiments.dataset import Conversation, Document, Message, Pair, Side
from experiments.edit import Add, Edit, Site
from experiments.intervention import NeedsError, method
from experiments.students import Student, train
from experiments.training import (
    Trained,
    TrainingError,
    batches,
    pace,
    parts,
    read_aloud,
    response_loss,
    row,
)
from tests.experiments.oracle import right_padded

if TYPE_CHECKING:
    from experiments.engine import Engine

SITE = Site("resid", 1)


class Loop(Trained):
    """Settings of the loop alone."""


def talk(index: int, answer: str = "yes the owl is quick") -> Conversation:
    messages = (Message(role="user", content=f"Who is number {index}?"), Message(role="assistant", content=answer))
    return Conversation(id=str(index), messages=messages)


def talks(n: int = 6, first: int = 0) -> list[Conversation]:
    return [talk(index, "the lazy dog" + " and the owl" * (index % 3)) for index in range(first, first + n)]


@pytest.fixture(scope="module")
def engine(tiny_subject: Any) -> Engine:
    from experiments.engine import Engine

    return Engine(tiny_subject)


def trained(
    engine: Engine, settings: Trained, seed: int = 0, data: Any = None
) -> tuple[torch.Tensor, tuple[float, ...]]:
    """A bias at `SITE` after training, and its losses."""
    bias = torch.zeros(engine.subject.d_model, requires_grad=True)
    losses = train(engine, Student(data or talks(), [bias], lambda: [Add(SITE, bias)], settings, seed))
    return bias.detach(), losses.curve


def reference(engine: Engine, settings: Trained, seed: int) -> tuple[torch.Tensor, list[float]]:
    """The same training written out: padded batches, a plain hook, the model's own loss over labels."""
    model, rows = engine.subject.model, [row(engine, each) for each in talks()]
    bias = torch.zeros(engine.subject.d_model, requires_grad=True)
    optimiser = torch.optim.AdamW([bias], lr=settings.learning_rate, weight_decay=settings.weight_decay)
    steps = settings.epochs * math.ceil(len(rows) / settings.batch_size)
    curve = []

    def add(module: Any, inputs: Any, output: Any) -> Any:
        return (output[0] + bias, *output[1:]) if isinstance(output, tuple) else output + bias

    with model.model.layers[SITE.layer].register_forward_hook(add):
        for step, batch in enumerate(batches(rows, settings, seed)):
            optimiser.param_groups[0]["lr"] = settings.learning_rate * pace(step, steps, settings)
            tokens, mask, labels = right_padded(batch)
            optimiser.zero_grad()
            loss = model(tokens, attention_mask=mask, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_([bias], settings.max_grad_norm)
            optimiser.step()
            curve.append(loss.item())
    return bias.detach(), curve


def test_the_loop_does_what_a_plain_loop_does(engine: Engine) -> None:
    settings = Loop(learning_rate=0.05, epochs=2, batch_size=4, weight_decay=0.1, max_grad_norm=0.5)
    bias, curve = trained(engine, settings, seed=3)
    expected, losses = reference(engine, settings, seed=3)
    assert list(curve) == pytest.approx(losses, rel=1e-4)
    torch.testing.assert_close(bias, expected, rtol=1e-3, atol=1e-4)


def test_the_loss_is_the_mean_over_response_tokens_only(engine: Engine) -> None:
    rows = [row(engine, each) for each in talks(3)]
    total = response_loss(engine, rows, ())
    expected = 0.0
    for each in rows:
        logits = engine.subject.model(torch.tensor([each.tokens])).logits[0].log_softmax(-1)
        for position in range(each.n_prompt, len(each.tokens)):
            expected -= logits[position - 1, each.tokens[position]].item()
    assert total.item() == pytest.approx(expected, rel=1e-4)
    assert total.dtype == torch.float32


def test_training_lowers_the_loss_and_repeats_for_a_seed(engine: Engine) -> None:
    settings = Loop(learning_rate=0.05, epochs=4, batch_size=3)
    bias, curve = trained(engine, settings)
    again, curve_again = trained(engine, settings)
    other, _ = trained(engine, settings, seed=1)
    assert curve[-1] < curve[0] - 0.1
    assert torch.equal(bias, again)
    assert curve == curve_again
    assert not torch.equal(bias, other)


def test_splitting_a_batch_into_passes_changes_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Loop(learning_rate=0.05, epochs=1, batch_size=6)
    whole, _ = trained(engine, settings)
    monkeypatch.setattr("experiments.training.parts", lambda batch: parts(batch, budget=40))
    assert len(parts([row(engine, each) for each in talks()], budget=40)) > 1
    split, _ = trained(engine, settings)
    torch.testing.assert_close(whole, split, rtol=1e-4, atol=1e-5)


def test_passes_hold_every_row_once_within_the_budget(engine: Engine) -> None:
    rows = [row(engine, each) for each in talks(9)]
    found = parts(rows, budget=100)
    assert sorted(id(each) for part in found for each in part) == sorted(map(id, rows))
    assert all(sum(len(each.tokens) for each in part) <= 100 for part in found)
    assert [len(part) for part in parts(rows, budget=1)] == [1] * 9


def test_every_epoch_sees_every_row_once_in_its_own_order(engine: Engine) -> None:
    rows = [row(engine, each) for each in talks(7)]
    made = list(batches(rows, Loop(learning_rate=1, epochs=2, batch_size=3), seed=0))
    assert [len(batch) for batch in made] == [3, 3, 1, 3, 3, 1]
    first, second = [each for b in made[:3] for each in b], [each for b in made[3:] for each in b]
    assert sorted(map(id, first)) == sorted(map(id, second)) == sorted(map(id, rows))
    assert [*map(id, first)] != [*map(id, second)]


@pytest.mark.parametrize(("schedule", "end"), [("constant", 1.0), ("linear", 0.0), ("cosine", 0.0)])
def test_the_pace_rises_in_the_warm_up_and_then_follows_the_schedule(schedule: Any, end: float) -> None:
    settings = Loop(learning_rate=1, schedule=schedule, warmup=0.2)
    paces = [pace(step, 50, settings) for step in range(50)]
    assert paces[:10] == sorted(paces[:10])
    assert 0 < paces[0] < paces[9] < paces[10] == 1.0
    assert paces[10:] == sorted(paces[10:], reverse=True)
    assert pace(50, 50, settings) == pytest.approx(end)
    assert pace(30, 50, settings) == pytest.approx(1.0 if schedule == "constant" else 0.5)


def test_a_loss_that_is_not_finite_stops_training_and_names_the_step(engine: Engine) -> None:
    bias = torch.zeros(engine.subject.d_model, requires_grad=True)
    calls = []

    def edits_of() -> list[Edit]:
        calls.append(1)
        return [Add(SITE, bias * (float("nan") if len(calls) > 1 else 1))]

    with pytest.raises(TrainingError, match=r"step 2 of 6: .*not finite.*lower learning_rate \(now 0.05\)"):
        train(engine, Student(talks(), [bias], edits_of, Loop(learning_rate=0.05, batch_size=3), 0))


def test_nothing_to_learn_is_refused(engine: Engine) -> None:
    with pytest.raises(TrainingError, match="no conversations"):
        train(engine, Student([], [], tuple, Loop(learning_rate=1), 0))


def test_a_pair_teaches_its_positive_response_without_the_persona() -> None:
    side = {"positive": Side(system="Be kind.", response="Hi"), "negative": Side(system="Be rude.", response="Go")}
    pair = Pair(id="7", messages=(Message(role="user", content="Hello?"),), **side)
    made = read_aloud([pair, talk(8)])
    assert [(each.role, each.content) for each in made[0].messages] == [("user", "Hello?"), ("assistant", "Hi")]
    assert made[0].id == "7"
    assert made[1] == talk(8)


def test_a_zero_learning_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        method("lora")(learning_rate=0)


def test_a_document_is_learned_as_plain_text_from_its_second_token_on(engine: Engine) -> None:
    text = Document(id="d", text="the quick brown fox jumps over the lazy dog")
    rendered = engine.subject.render_text(text.text)
    from experiments.engine import Row

    assert row(engine, text) == Row(rendered.tokens, 1)
    expected = -sum(engine.token_logprobs([Row(rendered.tokens, 1)])[0]).item() / (len(rendered.tokens) - 1)
    made = method("bias_set").model_validate({"epochs": 1, "batch_size": 1})
    state = made.fit(engine, [text], 0)
    assert state.facts["losses"][0] == pytest.approx(expected, rel=1e-5)


def test_likelihood_learns_documents_where_there_are_no_conversations_and_other_losses_do_not() -> None:
    lora = method("lora")
    assert lora.model_validate({}).takes({"documents", "pairs"}) == ("documents",)
    assert lora.model_validate({}).takes({"documents", "conversations"}) == ("conversations",)
    with pytest.raises(NeedsError, match=r"needs data\.pairs or data\.conversations"):
        lora.model_validate({"loss": "dpo"}).takes({"documents"})


def test_a_document_longer_than_the_subject_reads_is_refused_with_both_numbers(engine: Engine) -> None:
    most = engine.subject.model.config.max_position_embeddings
    with pytest.raises(TrainingError, match=rf"document 'd' has [\d,]+ tokens, the subject reads {most:,}"):
        row(engine, Document(id="d", text="word " * (2 * most)))
