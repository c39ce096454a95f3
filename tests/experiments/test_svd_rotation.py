"""The rotation adapter against dense linear algebra, and its PEFT tuner through PEFT's own doors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from experiments.intervention import method
from experiments.rotation import RotationError, Shape, initial, singular_basis
from experiments.svd_rotation import SvdRotationConfig
from experiments.training import TrainingError
from tests.experiments.methods import PAIRS, USER, logits
from tests.tiny import make_tiny_model

if TYPE_CHECKING:
    from experiments.engine import Engine

TARGETS = ["q_proj", "down_proj"]
TOKENS = torch.arange(5, 29)[None]
WAYS = [
    {"rotate": "both", "scaling": "exp"},
    {"rotate": "v", "scaling": "add"},
    {"rotate": "u", "scaling": "tanh", "block_size": 4},
    {"rotate": "none", "scaling": "exp"},
    {"rotate": "both", "scaling": "none", "block_size": 2},
]


@pytest.fixture(scope="module")
def engine(tiny_subject: Any) -> Engine:
    from experiments.engine import Engine

    return Engine(tiny_subject)


def shaped(rank: int, way: dict[str, Any], max_angle: float = 45.0) -> Shape:
    return Shape(rank, way["rotate"], way["scaling"], max_angle, way.get("block_size"))


def parameters_of(shape: Shape, std: float, seed: int = 0) -> dict[str, torch.Tensor]:
    made = initial(shape, std, torch.Generator().manual_seed(seed))
    return {name: value.double() for name, value in made.items()}


def angles(rotation: torch.Tensor) -> torch.Tensor:
    """Rotation angles of an orthogonal matrix, degrees."""
    return torch.rad2deg(torch.linalg.eigvals(rotation).angle().abs())


@pytest.mark.parametrize("std", [0.002, 0.05, 3.0])
@pytest.mark.parametrize("block", [None, 8])
def test_a_rotation_is_orthogonal_and_turns_nothing_by_more_than_the_bound(std: float, block: int | None) -> None:
    shape = Shape(64, "v", "none", 40.0, block)
    theta = parameters_of(shape, std)["theta_v"]
    identity = torch.eye(64)
    for dose in (1.0, -1.0, 0.3):
        rotation = identity + shape.turned(theta.float(), dose)
        assert (rotation @ rotation.T - identity).abs().max() <= 1e-6
        bound = 2 * math.degrees(math.atan(abs(dose) * math.tan(math.radians(20))))
        assert angles(rotation.double()).max() <= bound + 1e-3
    assert shape.angle({"theta_v": theta}) == pytest.approx(angles(identity + shape.turned(theta, 1.0)).max().item())
    if std == 3.0:
        assert shape.angle({"theta_v": theta}) > 39  # the bound is reached, and a bound on elements would not hold
        elementwise = 2 * math.tan(math.radians(20)) * torch.tanh(theta - theta.mT)
        whole = torch.eye(elementwise.shape[-1]).double()
        assert angles(whole + torch.linalg.solve(whole - elementwise[0] / 2, elementwise[0])).max() > 60


def test_opposite_doses_turn_back() -> None:
    shape = Shape(12, "u", "none", 60.0)
    theta = parameters_of(shape, 0.5)["theta_u"]
    ahead, back = (torch.eye(12) + shape.turned(theta, dose) for dose in (0.8, -0.8))
    torch.testing.assert_close(back, ahead.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(back @ ahead, torch.eye(12).double(), rtol=0, atol=1e-12)
    assert torch.equal(shape.turned(theta, 0.0), torch.zeros(12, 12).double())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dose", [1.0, -0.6])
def test_the_changed_weight_is_the_formula_written_out(way: dict[str, Any], dose: float) -> None:
    shape = shaped(8, way)
    weight = torch.randn(20, 14, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    u, s, v, rest = u[:, :8], s[:8], vt[:8].T, weight - u[:, :8] * s[:8] @ vt[:8]
    parameters = parameters_of(shape, 0.3)

    def rotation(name: str) -> torch.Tensor:
        if name not in parameters:
            return torch.eye(8).double()
        half = dose / 2 * torch.block_diag(*shape.bounded(parameters[name]))
        return torch.linalg.inv(torch.eye(8) - half) @ (torch.eye(8) + half)

    way_of = parameters.get("lambda", torch.zeros(8))
    new = {"exp": s * (dose * way_of).exp(), "tanh": s * (1 + dose * way_of.tanh()), "add": s + dose * way_of}
    values = new.get(way["scaling"], s)
    expected = (u @ rotation("theta_u")) @ values.diag() @ (v @ rotation("theta_v")).T + rest
    found = weight + u @ shape.core(s, parameters, dose) @ v.T
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert (found - weight).norm() > 1e-3
    assert torch.equal(shape.core(s, parameters, 0.0), torch.zeros(8, 8).double())


def test_the_gradient_of_the_bounded_generator_is_that_of_finite_differences() -> None:
    shape = Shape(6, "both", "exp", 30.0, 3)
    values = torch.linspace(3, 1, 6, dtype=torch.float64)
    parameters = {name: value.requires_grad_() for name, value in parameters_of(shape, 0.4).items()}

    def core(*given: torch.Tensor) -> torch.Tensor:
        return shape.core(values, dict(zip(parameters, given, strict=True)), 1.0)

    assert torch.autograd.gradcheck(core, tuple(parameters.values()))


def test_the_same_weight_has_the_same_basis_whatever_its_signs() -> None:
    weight = torch.randn(12, 9, generator=torch.Generator().manual_seed(0))
    u, s, v = singular_basis(weight, 9)
    torch.testing.assert_close(u * s @ v.T, weight, rtol=0, atol=1e-5)
    minus = singular_basis(-weight, 9)
    torch.testing.assert_close(minus[0], u)
    torch.testing.assert_close(minus[2], -v)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 64}, "q_proj: rank 64: a weight of .* has 32 singular directions; lower rank"),
        ({"rank": 6, "block_size": 4}, "blocks of 4 of 6 directions: must divide them"),
        ({"rotate": "none", "scaling": "none"}, "nothing would be trained"),
        ({"targets": ["q_prj"]}, "did you mean 'q_proj'"),
    ],
)
def test_what_does_not_fit_is_refused_at_fit(engine: Engine, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        method("svd_rotation")(**settings).fit(engine, PAIRS, 0)


@pytest.mark.parametrize("angle", [0, 180, -5])
def test_an_angle_that_is_none_is_refused(angle: float) -> None:
    with pytest.raises(ValueError, match="max_angle"):
        method("svd_rotation")(max_angle=angle)
    with pytest.raises(RotationError, match="less than 180"):
        SvdRotationConfig(max_angle=angle)


# the method and the PEFT tuner


def adapted(folder: Path | str, seed: int = 0, **settings: Any) -> Any:
    """A fresh model with the PEFT tuner, its parameters far from their start."""
    fresh: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = SvdRotationConfig(**{"target_modules": TARGETS, "r": 8, "init_std": 0.1, **settings})
        model = get_peft_model(fresh, config)
    return model.eval()


def scored(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(tokens).logits
    return found


def dosed(model: Any, dose: float, adapter: str = "default") -> Any:
    for module in model.modules():
        if hasattr(module, "svdrot_u"):
            module.set_scale(adapter, dose)
    return model


def with_the_tuner(made: Any, state: Any, engine: Engine, dose: float) -> torch.Tensor:
    """Logits of a model of its own with the PEFT tuner, given the bases and parameters of `state`."""
    targets = {name.rpartition(".")[0] for name in state.tensors}
    way = {"rotate": made.rotate, "scaling": made.scaling, "block_size": made.block_size, "r": made.rank}
    model = adapted(engine.subject.spec.model, target_modules=list(targets), **way)
    slots = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for place, tensor in state.tensors.items():
            name, _, key = place.rpartition(".")
            slots[f"base_model.model.{name}.svdrot_{key}.default"].copy_(tensor)
    assert len(state.tensors) == sum("svdrot_" in name for name in slots)
    return scored(dosed(model, dose), torch.tensor([engine.subject.render(USER).tokens]))[0, -1]


@pytest.mark.parametrize("way", WAYS)
def test_edits_at_every_dose_are_what_the_peft_tuner_computes(way: dict[str, Any], engine: Engine) -> None:
    made: Any = method("svd_rotation")(rank=8, targets=TARGETS, learning_rate=0.05, epochs=2, layers=[1, 3], **way)
    state = made.fit(engine, PAIRS, 0)
    base = logits(engine, [])
    for dose in (1.0, -1.0, 2.0):
        expected = with_the_tuner(made, state, engine, dose)
        assert (logits(engine, made.edits(state, dose)) - expected).abs().max() <= 1e-4
        assert (expected - base).abs().max() > 1e-3
    assert torch.equal(logits(engine, made.edits(state, 0.0)), base)
    assert all(len(edit.a) <= 8 for edit in made.edits(state, 1.0))
    assert state.facts["losses"][-1] < state.facts["losses"][0]
    assert state.facts["largest_angle"] <= made.max_angle


def test_at_dose_zero_and_switched_off_the_tuner_is_the_base_model_exactly(tiny_folder: Path) -> None:
    model = adapted(tiny_folder)
    base = scored(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32))
    assert (scored(model) - base).abs().max() > 1e-2
    assert torch.equal(scored(dosed(model, 0.0)), base)
    dosed(model, 1.0)
    with model.disable_adapter():
        assert torch.equal(scored(model), base)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_adapter_trained_by_peft_is_saved_and_loaded_without_error(architecture: str, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", architecture)
    model = adapted(folder, target_modules=["c_attn", "c_proj"] if architecture == "gpt2" else TARGETS, block_size=4)
    trained = [each for each in model.parameters() if each.requires_grad]
    assert all("svdrot_" in name for name, each in model.named_parameters() if each.requires_grad)
    optimiser = torch.optim.AdamW(trained, lr=0.05)
    losses = []
    for _ in range(3):
        optimiser.zero_grad()
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    expected = scored(model)
    model.save_pretrained(tmp_path / "adapter")
    fresh: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).eval()
    assert torch.equal(scored(loaded), expected)
    again = {name: value for name, value in loaded.state_dict().items() if "svdrot_" in name}
    first = {name: value for name, value in model.state_dict().items() if "svdrot_" in name}
    assert again.keys() == first.keys()
    assert sum("svdrot_u" in name for name in first) == sum("svdrot_lambda" in name for name in first) > 0
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_saved_bases_are_loaded_not_computed_again(tiny_folder: Path, tmp_path: Path) -> None:
    model = adapted(tiny_folder)
    before = scored(model)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "svdrot_u" in name or "svdrot_v" in name:
                buffer[:, ::2] *= -1  # another choice of signs: the same weight, another meaning of the parameters
    expected = scored(model)
    assert (expected - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    fresh: Any = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path))
    assert torch.equal(scored(loaded.eval()), expected)


def test_two_adapters_live_in_one_model_and_merging_is_undone(tiny_folder: Path) -> None:
    model = adapted(tiny_folder)
    one = scored(model)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model.add_adapter("other", SvdRotationConfig(target_modules=TARGETS, r=4, rotate="v", init_std=0.2))
    model.set_adapter("other")
    other = scored(model)
    model.set_adapter("default")
    assert torch.equal(scored(model), one)
    assert (other - one).abs().max() > 1e-2
    model.merge_adapter()
    torch.testing.assert_close(scored(model), one, rtol=0, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(scored(model), one, rtol=0, atol=1e-4)
    merged = scored(model.merge_and_unload(safe_merge=True))
    torch.testing.assert_close(merged, one, rtol=0, atol=1e-4)
