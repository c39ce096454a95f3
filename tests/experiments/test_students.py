"""Students that learn in one batch, against the same students alone and against PEFT's own training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from experiments import students
from experiments.acting import delta
from experiments.edit import Add, LowRank
from experiments.engine import Engine
from experiments.intervention import State, method
from experiments.students import Course, Student, train, train_together
from experiments.training import Losses, TrainingError, batches, pace, row
from tests.experiments.oracle import right_padded
from tests.experiments.test_training import SITE, Loop, talks


@pytest.fixture(scope="module")
def engine(tiny_subject: Any) -> Engine:
    return Engine(tiny_subject)


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"rank": 4, "learning_rate": 0.01, "epochs": 2, "batch_size": 4}),
    "lora r1": ("lora", {"rank": 1, "learning_rate": 0.03, "epochs": 2, "batch_size": 4, "targets": ["o_proj"]}),
    "biases": ("bias_set", {"sites": ["q", "v"], "epochs": 3, "batch_size": 4}),
    "vector": ("trained_vector", {"layer": 2, "start": 1.0, "radius": 2.0, "epochs": 1, "batch_size": 2}),
    "rotation": ("svd_rotation", {"rank": 4, "epochs": 1, "batch_size": 6}),
    "sft": ("sft", {"epochs": 1, "batch_size": 3, "layers": 3, "targets": ["down_proj"]}),
}


def began(engine: Engine, name: str, seed: int = 0, data: Any = None) -> tuple[Student, Any]:
    chosen, settings = SETTINGS[name]
    made: Any = method(chosen).model_validate(settings)
    found: tuple[Student, Any] = made.begin(engine, data or talks(), seed)
    return found


def fitted(engine: Engine, name: str, seed: int = 0, data: Any = None) -> State:
    chosen, settings = SETTINGS[name]
    return method(chosen).model_validate(settings).fit(engine, data or talks(), seed)


def assert_alike(state: State, other: State) -> None:
    assert state.tensors.keys() == other.tensors.keys()
    for name, tensor in state.tensors.items():
        torch.testing.assert_close(tensor, other.tensors[name], rtol=2e-3, atol=2e-5)
    assert state.facts["losses"] == pytest.approx(other.facts["losses"], rel=1e-3)


def test_students_of_all_methods_learn_in_one_batch_what_each_learns_alone(engine: Engine) -> None:
    begun = [began(engine, name, seed) for seed, name in enumerate(SETTINGS)]
    learned = train_together(engine, [student for student, _ in begun])
    for seed, (name, (_, finish), losses) in enumerate(zip(SETTINGS, begun, learned, strict=True)):
        assert isinstance(losses, Losses)
        assert_alike(finish(losses), fitted(engine, name, seed))


def test_students_of_different_data_and_length_end_each_at_its_own_time(engine: Engine) -> None:
    data = [talks(3), talks(9, first=20)]
    begun = [began(engine, "biases", 0, each) for each in data]
    learned = train_together(engine, [student for student, _ in begun])
    assert [len(losses.curve) for losses in learned if isinstance(losses, Losses)] == [3, 9]
    for each, (_, finish), losses in zip(data, begun, learned, strict=True):
        assert_alike(finish(losses), fitted(engine, "biases", 0, each))


def test_a_student_whose_loss_is_not_finite_leaves_and_the_others_learn_the_same(engine: Engine) -> None:
    wild = Student(
        talks(),
        [leaf := torch.full((engine.subject.d_model,), 1e30, requires_grad=True)],
        lambda: [Add(SITE, leaf * 1e30)],
        Loop(learning_rate=0.1),
        0,
    )
    good, finish = began(engine, "biases")
    gone, losses = train_together(engine, [wild, good])
    assert isinstance(gone, TrainingError)
    assert "step 1 of 3: the loss or its gradient is not finite" in str(gone)
    assert_alike(finish(losses), fitted(engine, "biases"))


def test_a_student_without_conversations_leaves_the_others_alone(engine: Engine) -> None:
    good, finish = began(engine, "biases")
    empty = Student([], [torch.zeros(3, requires_grad=True)], list, Loop(learning_rate=1), 0)
    gone, losses = train_together(engine, [empty, good])
    assert "no conversations to train on" in str(gone)
    assert_alike(finish(losses), fitted(engine, "biases"))


def test_masked_tokens_are_left_out_for_the_student_that_masks_them(engine: Engine) -> None:
    masked = [each.model_copy(update={"masked": ((0, 3),)}) for each in talks()]
    begun = [began(engine, "biases", 0, masked), began(engine, "biases", 0)]
    learned = train_together(engine, [student for student, _ in begun])
    states = [finish(losses) for (_, finish), losses in zip(begun, learned, strict=True)]
    assert_alike(states[0], fitted(engine, "biases", 0, masked))
    assert_alike(states[1], fitted(engine, "biases"))
    assert states[0].facts["tokens"]["masked"] > 0


def test_one_backward_pass_serves_all_students(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = Engine.forward

    def counted(self: Engine, rows: Any, positions: Any) -> Any:
        seen.append(len(rows))
        return forward(self, rows, positions)

    monkeypatch.setattr(Engine, "forward", counted)
    begun = [began(engine, "lora", seed) for seed in range(3)]
    train_together(engine, [student for student, _ in begun])
    assert seen == [12, 6, 12, 6]


def test_who_learns_by_another_loss_or_inside_the_subject_does_not_join(engine: Engine) -> None:
    def joins(name: str, **settings: Any) -> bool:
        made: Any = method(name).model_validate(settings)
        return bool(made.joins)

    assert all(joins(name, **settings) for name, settings in SETTINGS.values())
    assert not joins("bias_set", kl=1.0)
    assert not joins("lora", loss="promotion")
    assert not joins("peft", tuner="dora")


def test_passes_of_few_tokens_give_every_student_the_same(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(students, "TOKENS", 20)
    begun = [began(engine, name) for name in ("biases", "lora")]
    learned = train_together(engine, [student for student, _ in begun])
    monkeypatch.undo()
    for name, (_, finish), losses in zip(("biases", "lora"), begun, learned, strict=True):
        assert_alike(finish(losses), fitted(engine, name))


def test_lora_is_trained_in_float32_whatever_the_subject_computes_in(engine: Engine) -> None:
    edits = began(engine, "lora")[0].edits_of()
    assert edits
    assert all(isinstance(edit, LowRank) and edit.exact and edit.a.dtype == torch.float32 for edit in edits)


def test_lora_learns_what_pefts_own_model_learns_in_a_plain_loop(engine: Engine) -> None:
    from peft import LoraConfig, get_peft_model

    settings = {"rank": 4, "alpha": 8, "learning_rate": 0.01, "epochs": 2, "batch_size": 4, "targets": ["q_proj"]}
    made: Any = method("lora").model_validate(settings)
    state = made.fit(engine, talks(), 3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], bias="none")
    model: Any = get_peft_model(copy.deepcopy(engine.subject.model), config)
    named = dict(model.named_parameters())
    begun = made.begin(engine, talks(), 3)[0]
    leaves = iter(begun.parameters)
    adapters = [name for name in named if ".lora_A." in name]
    with torch.no_grad():
        for name in adapters:  # what PEFT draws for the seed is begun with: only the training is compared
            named[name].copy_(next(leaves))
            named[name.replace("lora_A", "lora_B")].copy_(next(leaves))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=made.learning_rate, weight_decay=made.weight_decay)
    rows = [row(engine, each) for each in talks()]
    course = Course(engine, begun)
    curve = []
    for step, batch in enumerate(batches(rows, made, 3)):
        optimiser.param_groups[0]["lr"] = made.learning_rate * pace(step, course.steps, made)
        tokens, mask, labels = right_padded(batch)
        optimiser.zero_grad()
        loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, made.max_grad_norm)
        optimiser.step()
        curve.append(loss.item())
    assert state.facts["losses"] == pytest.approx(curve, rel=1e-4)
    for name in adapters:
        module = name.removeprefix("base_model.model.").partition(".lora_A.")[0]
        torch.testing.assert_close(state.tensors[f"{module}.a"], named[name].detach(), rtol=1e-3, atol=1e-5)
        b = 2.0 * named[name.replace("lora_A", "lora_B")].detach()
        torch.testing.assert_close(state.tensors[f"{module}.b"], b, rtol=1e-3, atol=1e-5)


def test_an_exact_adapter_is_computed_in_float32_beside_bfloat16_states() -> None:
    torch.manual_seed(0)
    module = torch.nn.Linear(64, 8)
    a, b, x = torch.randn(4, 64), torch.randn(8, 4), torch.randn(5, 64).bfloat16()
    expected = (x.double() @ a.double().T @ b.double().T).float()
    like = torch.zeros(5, 8, dtype=torch.bfloat16)
    found = {exact: delta(LowRank("m", a, b, exact), module, like)(like, lambda: x) for exact in (True, False)}
    assert found[True].dtype == torch.bfloat16
    torch.testing.assert_close(found[True], expected.bfloat16(), rtol=1e-6, atol=0)
    assert not torch.equal(found[False], found[True])


def test_alone_and_without_company_is_the_same_run(engine: Engine) -> None:
    student, finish = began(engine, "lora", 5)
    (losses,) = train_together(engine, [student])
    other, ended = began(engine, "lora", 5)
    assert_alike(finish(losses), ended(train(engine, other)))
