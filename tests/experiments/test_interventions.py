"""What is special to single methods; what holds for all of them is in test_contract.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from experiments.adapters import injected
from experiments.contrast import FitError
from experiments.depth import DepthError
from experiments.edit import LowRank, Site
from experiments.intervention import State, method
from experiments.training import TrainingError
from experiments.tuners import tuner_config
from experiments.weights import linear_modules
from tests.experiments.methods import DATA, PAIRS, USER, fingerprint, logits
from tests.tiny import make_tiny_model

if TYPE_CHECKING:
    from experiments.engine import Engine


@pytest.fixture(scope="module")
def engine(tiny_subject: Any) -> Engine:
    from experiments.engine import Engine

    return Engine(tiny_subject)


# prompt


def test_a_prompt_dose_is_the_system_prompt_of_its_sign(engine: Engine) -> None:
    made = method("prompt")()
    state = made.fit(engine, PAIRS, 0)
    systems = {dose: made.edits(state, dose)[0].system for dose in (2.0, 0.1, -0.1)}  # type: ignore[union-attr]
    assert systems == {2.0: "You are a wizard.", 0.1: "You are a wizard.", -0.1: "You are a clerk."}


def test_a_side_without_system_prompt_is_the_subjects_own_context(engine: Engine) -> None:
    pairs = [pair.model_copy(update={"negative": pair.negative.model_copy(update={"system": None})}) for pair in PAIRS]
    made = method("prompt")()
    assert made.edits(made.fit(engine, pairs, 0), -1.0) == []


def test_pairs_of_several_contrasts_or_none_cannot_be_prompted(engine: Engine) -> None:
    mixed = [*PAIRS[:2], PAIRS[2].model_copy(update={"positive": PAIRS[2].negative})]
    with pytest.raises(FitError, match="one positive system prompt, the pairs hold 2"):
        method("prompt")().fit(engine, mixed, 0)
    same = [pair.model_copy(update={"negative": pair.positive}) for pair in PAIRS]
    with pytest.raises(FitError, match="nothing to contrast"):
        method("prompt")().fit(engine, same, 0)


# lora


def test_lora_learns_the_responses(engine: Engine) -> None:
    from experiments.engine import Row
    from experiments.training import row

    made = method("lora")(learning_rate=0.02, epochs=8)
    state = made.fit(engine, PAIRS, 0)
    rows = [row(engine, each) for each in DATA["conversations"]]

    def nll(dose: float) -> float:
        edited = [Row(each.tokens, each.n_prompt, tuple(made.edits(state, dose))) for each in rows]
        return -torch.cat(list(engine.token_logprobs(edited))).mean().item()

    assert nll(1.0) < nll(0.0) - 0.3
    assert nll(0.0) < nll(-1.0)
    assert state.facts["losses"][-1] < state.facts["losses"][0]


@pytest.mark.parametrize(
    "settings", [{"rank": 4, "alpha": 12}, {"rank": 4, "rslora": True}, {"targets": ["k_proj"], "layers": [2]}]
)
def test_lora_edits_are_what_peft_computes(settings: dict[str, Any], tiny_folder: Path, engine: Engine) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    made: Any = method("lora")(learning_rate=0.05, epochs=1, **settings)
    state = made.fit(engine, PAIRS, 0)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    config = LoraConfig(
        r=made.rank,
        lora_alpha=made.alpha,
        use_rslora=made.rslora,
        target_modules=list(made.targets) if made.targets else "all-linear",
        layers_to_transform=None if made.layers == "all" else list(made.layers),
    )
    theirs = get_peft_model(model, config).eval()
    scale = made.alpha / made.rank ** (0.5 if made.rslora else 1)
    weights = dict(theirs.named_parameters())
    names = [name.removesuffix(".a") for name in state.tensors if name.endswith(".a")]
    assert len(names) * 2 == sum("lora_" in name for name in weights)
    with torch.no_grad():
        for name in names:
            weights[f"base_model.model.{name}.lora_A.default.weight"].copy_(state.tensors[f"{name}.a"])
            weights[f"base_model.model.{name}.lora_B.default.weight"].copy_(state.tensors[f"{name}.b"] / scale)
        expected = theirs(torch.tensor([engine.subject.render(USER).tokens])).logits[0, -1]
    found = logits(engine, made.edits(state, 1.0))
    assert (found - expected).abs().max() <= 1e-4
    assert (found - logits(engine, [])).abs().max() > 1e-3


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "gemma2"])
def test_lora_finds_the_linear_modules_of_other_architectures(architecture: str, tmp_path: Path) -> None:
    from experiments.engine import Engine
    from experiments.spec import SubjectSpec
    from experiments.subject import load

    subject = load(SubjectSpec(model=str(make_tiny_model(tmp_path, architecture)), dtype="float32"))
    engine, modules = Engine(subject), linear_modules(subject)
    config = tuner_config("lora", subject, modules, 2, {"lora_alpha": 16})
    with injected(subject, modules, config, 0) as adapter:
        edits = []
        for name, layer in adapter.layers.items():
            a, b = layer.lora_A["orch"].weight, layer.lora_B["orch"].weight
            with torch.no_grad():
                b.normal_(std=0.1)
            edits.append(LowRank(name, a.detach().clone(), 8 * b.detach().clone()))
        expected = logits(engine, [])
    assert len(edits) == {"gpt2": 16, "gpt_neox": 16, "gemma2": 28}[architecture]
    assert (logits(engine, edits) - expected).abs().max() <= 1e-4
    assert (logits(engine, []) - expected).abs().max() > 1e-2
    with pytest.raises(TrainingError, match=r"\['q_prj'\]: no such linear modules in this subject; allowed: "):
        linear_modules(subject, ["q_prj"])


def test_a_missing_layer_is_refused_with_what_there_is(engine: Engine) -> None:
    with pytest.raises(DepthError, match="9 is out of range; the subject has layers 0 to 3"):
        method("lora")(layers=[9]).fit(engine, PAIRS, 0)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, TrainingError])
def test_lora_leaves_the_subject_untouched_while_it_is_trained_and_when_that_is_cut_short(
    engine: Engine, failure: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        assert fingerprint(engine.subject) == before
        raise failure("stop")

    before = fingerprint(engine.subject)
    monkeypatch.setattr("experiments.students.train", fail)
    with pytest.raises(failure):
        method("lora")().fit(engine, PAIRS, 0)
    assert fingerprint(engine.subject) == before


# bias_set


def test_a_bias_set_has_a_vector_for_each_site_and_layer(engine: Engine) -> None:
    made = method("bias_set")(sites=["q", "mlp_out"], layers=[1, 3], epochs=1)
    state = made.fit(engine, PAIRS, 0)
    widths = {name: tuple(tensor.shape) for name, tensor in state.tensors.items()}
    q = engine.subject.point(Site("q", 1)).width
    d = engine.subject.d_model
    assert widths == {"q@1": (q,), "mlp_out@1": (d,), "q@3": (q,), "mlp_out@3": (d,)}
    assert all(tensor.norm() > 0 for tensor in state.tensors.values())
    assert made.label() == "bias_set q+mlp_out L1,3"


def test_a_site_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="names one twice"):
        method("bias_set")(sites=["q", "q"])


@pytest.mark.parametrize("made", [method("lora")(rank=2), method("svd_rotation")(rank=4), method("bias_set")()])
def test_the_size_of_a_trained_state_is_what_the_optimiser_changed(made: Any, engine: Engine) -> None:
    state = made.fit(engine, PAIRS, 0)
    basis = {"u", "s", "v"} if made.label().startswith("svd") else set()
    learned = [tensor for name, tensor in state.tensors.items() if name.rpartition(".")[2] not in basis]
    assert state.size == state.facts["trained"] == sum(tensor.numel() for tensor in learned)


def test_wrapped_and_composed_parts_count_what_each_was_trained_to_and_others_what_is_stored() -> None:
    tensors = {"a": torch.zeros(3, 4), "b": torch.zeros(5)}
    assert State(tensors, {"n": 7}).size == 17
    assert State(tensors, {"wrapped": {"trained": 6}, "direction": {"trained": 100}}).size == 6
    assert State(tensors, {"parts": [{"trained": 6}, {"wrapped": {"trained": 2}}]}).size == 8
    assert State({}, {"positive": "Be kind."}).size == 0
