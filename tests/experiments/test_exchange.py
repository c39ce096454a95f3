"""What we write others read, and the other way round; what does not fit is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments import adapter_folder, control_vector
from experiments.canonical import file_digest
from experiments.edit import Add, Edit, LowRank, Project, Prompt, Scale, Site
from experiments.engine import Engine, Row
from experiments.exchange import ExchangeError, contents, write_vectors
from experiments.interventions.adopted import Adopted
from experiments.outline import Outline
from experiments.output import OutputError
from experiments.spec import SubjectSpec
from experiments.subject import load
from tests.tiny import make_tiny_model

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.subject import Subject

USER = [{"role": "user", "content": "What do you think of the lazy dog?"}]
FOUR = {"operation": "add", "site": "resid", "layer_map": "blocks", "scale_convention": "stored"}


@pytest.fixture(scope="module")
def engine(tiny_subject: Subject) -> Engine:
    return Engine(tiny_subject)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits(engine: Engine, edits: Sequence[Edit]) -> Tensor:
    rendered = engine.subject.render(USER)
    return engine.next_logits([Row(rendered.tokens, rendered.n_prompt, tuple(edits))])[0]


def adopt(engine: Engine, path: Path, dose: float = 1.0, **settings: Any) -> list[Edit]:
    made = Adopted(path=path, **settings)
    return made.edits(made.fit(engine, [], 0), dose)


def vector_file(path: Path, tensors: Mapping[str, Tensor], **facts: str) -> Path:
    save_file(dict(tensors), path, metadata=facts)
    return path


# vectors in safetensors


@pytest.mark.parametrize(
    "edits",
    [
        [Add(Site("resid", 1), noise(32), "last:3"), Add(Site("resid", 3), noise(32, seed=1), "last:3")],
        [Add(Site("q", 1), noise(32)), Add(Site("mlp_out", 0), noise(32, seed=1))],
        [Scale(Site("up", 2), noise(64))],
        [Project(Site("resid", 2), torch.linalg.qr(noise(32, 3)).Q.T.contiguous(), -1.0)],
    ],
    ids=["resid", "two sites", "scale", "ablate"],
)
def test_a_file_of_ours_comes_back_as_the_same_edits(edits: list[Edit], engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "vector.safetensors"
    write_vectors(edits, path, {"method": "x"})
    again = adopt(engine, path)
    assert torch.equal(logits(engine, again), logits(engine, edits))
    places = {(edit.site, edit.positions) for edit in edits}  # type: ignore[union-attr]
    assert {(edit.site, edit.positions) for edit in again} == places  # type: ignore[union-attr]
    assert (logits(engine, adopt(engine, path, -0.5)) - logits(engine, edits)).abs().max() > 1e-3


def test_a_file_states_its_four_facts(tmp_path: Path) -> None:
    path = tmp_path / "vector.safetensors"
    write_vectors([Add(Site("resid", 1), noise(32), "last:2")], path, {"method": "mean_diff", "dose": 2.0})
    found = contents(path)
    assert found.facts == {**FOUR, "positions": "last:2"}
    assert json.loads(found.about["about"]) == {"method": "mean_diff", "dose": 2.0}
    assert found.shapes == {"resid@1": (32,)}


@pytest.mark.parametrize(
    ("tensors", "facts", "settings", "at"),
    [
        ({"layer_2": noise(32)}, FOUR, {}, {2: 0}),
        ({"direction.2": noise(32)}, FOUR | {"layer_map": "hidden_states"}, {}, {1: 0}),
        ({"v.1": noise(32), "v.3": noise(32, seed=1)}, {}, FOUR, {1: 0, 3: 1}),
        ({"v.1": noise(32), "v.3": noise(32, seed=1)}, {}, FOUR | {"layer": -1}, {3: 1}),
    ],
    ids=["named", "hidden states", "facts by settings", "one layer"],
)
def test_a_foreign_file_goes_where_its_facts_say(
    tensors: dict[str, Tensor], facts: dict[str, str], settings: Any, at: dict[int, int], engine: Engine, tmp_path: Path
) -> None:
    path = vector_file(tmp_path / "v.safetensors", tensors, **facts)
    expected = [Add(Site("resid", layer), 1.5 * noise(32, seed=seed)) for layer, seed in at.items()]
    assert torch.equal(logits(engine, adopt(engine, path, 1.5, **settings)), logits(engine, expected))


def test_a_matrix_has_a_row_for_each_hidden_state_and_the_first_is_the_embedding(
    engine: Engine, tmp_path: Path
) -> None:
    rows = noise(5, 32)
    path = vector_file(tmp_path / "v.safetensors", {"vectors": rows}, **FOUR | {"layer_map": "hidden_states"})
    (edit,) = adopt(engine, path, layer=2)
    assert isinstance(edit, Add)
    assert edit.site == Site("resid", 2)
    assert torch.equal(edit.vector, rows[3])
    with pytest.raises(ExchangeError, match="number 0 is the embedding's output by layer_map hidden_states"):
        adopt(engine, path)


def test_unit_makes_dose_one_a_vector_of_length_one(engine: Engine, tmp_path: Path) -> None:
    path = vector_file(tmp_path / "v.safetensors", {"resid@1": 7 * noise(32)}, operation="add", scale_convention="unit")
    (edit,) = adopt(engine, path, 3.0)
    assert isinstance(edit, Add)
    assert edit.vector.norm().item() == pytest.approx(3.0)
    path = vector_file(
        tmp_path / "a.safetensors", {"resid@1": 7 * noise(32)}, operation="ablate", scale_convention="unit"
    )
    (projection,) = adopt(engine, path)
    assert isinstance(projection, Project)
    assert projection.basis.norm().item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("tensors", "facts", "settings", "says"),
    [
        (
            {"v.1": noise(32)},
            {},
            {},
            "does not say operation, site, layer_map, scale_convention; say it in the settings",
        ),
        ({"v.1": noise(32)}, FOUR, {"site": "mlp_out"}, "says site: resid, the settings say mlp_out"),
        (
            {"v.1": noise(32)},
            FOUR | {"operation": "replace"},
            {},
            "operation is 'replace'; allowed: add, ablate, scale",
        ),
        ({"v.1": noise(31)}, FOUR, {}, "the vector of resid@1 has width 31, the subject has 32 there"),
        ({"v.4": noise(32)}, FOUR, {}, "'v.4' number 4 is layer 4 by layer_map blocks; the subject has layers 0 to 3"),
        ({"v.1": noise(32)}, FOUR, {"layer": 2}, "has no vector for the layers 2"),
        ({"v": noise(32)}, FOUR, {}, "does not say its layer"),
        ({"v.1.2": noise(32)}, FOUR, {}, "does not say its layer"),
        ({"a.1": noise(32), "b.1": noise(32)}, FOUR, {}, "several vectors for resid@1"),
        ({"v.1": noise(32) * float("nan")}, FOUR, {}, "is zero or not finite"),
        ({"v.1": torch.zeros(32)}, FOUR, {}, "is zero or not finite"),
        ({"v.1": noise(1, 32)}, FOUR, {}, r"has shape \[1, 32\]; must be \[d\]"),
        ({"v.1": noise(2, 32)}, FOUR | {"operation": "ablate"}, {}, "its 2 directions are not orthonormal"),
        ({"resid@1": noise(32), "v.2": noise(32)}, FOUR, {}, "some tensors are named by site and layer"),
        ({"resid@1": noise(32)}, FOUR, {"layer_map": "hidden_states"}, "says layer_map: blocks"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_the_reason(
    tensors: dict[str, Tensor], facts: dict[str, str], settings: Any, says: str, engine: Engine, tmp_path: Path
) -> None:
    path = vector_file(tmp_path / "v.safetensors", tensors, **facts)
    with pytest.raises(ExchangeError, match=says):
        adopt(engine, path, **settings)


def test_a_plan_says_what_is_wrong_with_a_file_without_its_numbers(tmp_path: Path) -> None:
    path = vector_file(tmp_path / "v.safetensors", {"v.4": noise(32)}, **FOUR)
    sites = ("resid", "q")
    assert Adopted(path=path).misplaced(Outline(5, sites)) == {}
    assert "the subject has layers 0 to 3" in Adopted(path=path).misplaced(Outline(4, sites))["path"]
    gate = vector_file(tmp_path / "g.safetensors", {"v.1": noise(32)}, **FOUR | {"site": "gate"})
    assert "is for 'gate'; the subject's sites are q, resid" in Adopted(path=gate).misplaced(Outline(4, sites))["path"]
    assert "out of range" in Adopted(path=path, layer=9).misplaced(Outline(4, sites))["layer"]


def test_what_is_no_file_of_vectors_is_named(tmp_path: Path) -> None:
    (tmp_path / "v.pt").write_bytes(b"PK\x03\x04")
    (tmp_path / "v.safetensors").write_text("nonsense")
    (tmp_path / "v.gguf").write_bytes(b"GGUF" + b"\x00" * 20)
    (tmp_path / "folder").mkdir()
    for name, says in {
        "v.pt": "is a pickle, and reading one runs whatever is in it",
        "v.safetensors": "is no safetensors file",
        "v.gguf": "cannot be read as GGUF",
        "folder": "no PEFT adapter's folder",
        "nothing": "no such file",
    }.items():
        with pytest.raises(ExchangeError, match=says):
            contents(tmp_path / name)


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        ([], "this trial has nothing"),
        ([Prompt(system="x")], "this trial has Prompt; a prompt is text: copy it"),
        ([LowRank("m", noise(1, 2), noise(2, 1))], "this trial has LowRank; use --format peft or bake"),
        ([Add(Site("q", 1), noise(2)), Scale(Site("q", 2), noise(2))], r"different kind \(Add, Scale\)"),
        ([Add(Site("q", 1), noise(2)), Add(Site("q", 2), noise(2), "prompt")], r"different positions \(all, prompt\)"),
        ([Add(Site("q", 1), noise(2)), Add(Site("q", 1), noise(2))], "two edits at q@1"),
        ([Project(Site("q", 1), noise(1, 2), -0.5)], "strength 0.5; export it at dose 1"),
    ],
)
def test_what_a_file_of_vectors_cannot_say_is_refused(edits: list[Edit], says: str, tmp_path: Path) -> None:
    with pytest.raises(ExchangeError, match=says):
        write_vectors(edits, tmp_path / "v.safetensors", {})
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_exists_is_left_alone(tmp_path: Path) -> None:
    path = vector_file(tmp_path / "v.safetensors", {"v.1": noise(3)})
    before = path.read_bytes()
    with pytest.raises(OutputError, match="exists; give a name that does not"):
        write_vectors([Add(Site("q", 1), noise(2))], path, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# control vectors, against repeng


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_repeng_reads_our_control_vector_and_steers_to_our_logits(family: str, tmp_path: Path) -> None:
    from repeng import ControlModel, ControlVector

    subject = load(SubjectSpec(model=str(make_tiny_model(tmp_path / family, family)), dtype="float32"))
    engine = Engine(subject)
    edits = [Add(Site("resid", layer), noise(32, seed=layer)) for layer in (3, 1)]
    control_vector.write(edits, tmp_path / "v.gguf", family)
    theirs = ControlVector.import_gguf(tmp_path / "v.gguf")
    assert theirs.model_type == family
    assert sorted(theirs.directions) == [1, 3]
    expected = logits(engine, edits)
    base = logits(engine, [])
    model = ControlModel(subject.model, [1, -1])
    model.set_control(theirs, 1.0)
    with torch.no_grad():
        found = model(input_ids=torch.tensor([subject.render(USER).tokens])).logits[0, -1]
    model.unwrap()
    assert (found - expected).abs().max() <= 1e-4
    assert (expected - base).abs().max() > 0.1


def test_a_control_vector_of_repengs_is_adopted_layer_by_layer(engine: Engine, tmp_path: Path) -> None:
    from repeng import ControlModel, ControlVector

    directions = {layer: noise(32, seed=layer).numpy() for layer in (2, 0, 3)}
    ControlVector("llama", directions).export_gguf(tmp_path / "v.gguf")
    edits = adopt(engine, tmp_path / "v.gguf", 0.7)
    subject = engine.subject
    model = ControlModel(subject.model, [0, 2, 3])
    model.set_control(ControlVector("llama", directions), 0.7)
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([subject.render(USER).tokens])).logits[0, -1]
    model.unwrap()
    assert (logits(engine, edits) - theirs).abs().max() <= 1e-4
    made = Adopted(path=tmp_path / "v.gguf")
    facts = made.fit(engine, [], 0).facts
    assert {name: facts[name] for name in FOUR} == FOUR
    assert facts["about"] == {"model_hint": "llama"}


def test_what_llama_cpp_has_no_place_for_is_refused(tmp_path: Path) -> None:
    for edit, says in {
        Add(Site("resid", 0), noise(4)): "no control vector at layer 0",
        Add(Site("q", 1), noise(4)): "Add at q@1",
        Add(Site("resid", 1), noise(4), "prompt"): "positions 'prompt'",
        Scale(Site("resid", 1), noise(4)): "Scale at resid@1",
    }.items():
        with pytest.raises(ExchangeError, match=says):
            control_vector.write([edit], tmp_path / "v.gguf", "llama")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("architecture", "tensors", "says"),
    [
        ("llama", {"direction.1": np.ones(32, "float32")}, "architecture 'llama', not a controlvector"),
        ("controlvector", {"token_embd": np.ones(32, "float32")}, "no tensor named direction.LAYER"),
        ("controlvector", {"direction.1": np.ones((2, 32), "float32")}, r"direction.1 is F32 \[2, 32\]"),
        ("controlvector", {"direction.9": np.ones(32, "float32")}, "the subject has layers 0 to 3"),
        ("controlvector", {"direction.1": np.ones(16, "float32")}, "has width 16, the subject has 32"),
    ],
)
def test_a_gguf_that_does_not_fit_is_refused(
    architecture: str, tensors: dict[str, Any], says: str, engine: Engine, tmp_path: Path
) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "v.gguf", architecture)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ExchangeError, match=says):
        adopt(engine, tmp_path / "v.gguf")


# adapters, against PEFT


def peft_logits(subject: Subject, folder: Path) -> Tensor:
    """Of a fresh model with the adapter that PEFT loads."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(subject.spec.model, dtype=torch.float32)
    with torch.no_grad():
        tokens = torch.tensor([subject.render(USER).tokens])
        return PeftModel.from_pretrained(model, folder).eval()(tokens).logits[0, -1]


def adapter(subject: Subject, modules: Sequence[str], rank: int, seed: int = 0) -> list[Edit]:
    from transformers.pytorch_utils import Conv1D

    edits: list[Edit] = []
    for index, name in enumerate(modules):
        module = subject.model.get_submodule(name)
        d_out, d_in = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
        own = rank + index % 3
        edits.append(LowRank(name, 0.3 * noise(own, d_in, seed=seed), 0.3 * noise(d_out, own, seed=seed + 1)))
    return edits


@pytest.mark.parametrize(
    ("family", "modules"),
    [
        ("llama", ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.3.mlp.gate_proj"]),
        ("gpt2", ["transformer.h.1.attn.c_attn", "transformer.h.2.mlp.c_proj"]),
        ("gpt_neox", ["gpt_neox.layers.1.attention.query_key_value", "gpt_neox.layers.0.mlp.dense_h_to_4h"]),
    ],
)
def test_peft_loads_our_folder_and_computes_our_logits(family: str, modules: list[str], tmp_path: Path) -> None:
    subject = load(SubjectSpec(model=str(make_tiny_model(tmp_path / family, family)), dtype="float32"))
    engine = Engine(subject)
    edits = [*adapter(subject, modules, 2), *adapter(subject, modules[:1], 3, seed=5)]  # one module twice
    adapter_folder.write(edits, tmp_path / "adapter", subject.spec.model)
    expected = logits(engine, edits)
    assert (peft_logits(subject, tmp_path / "adapter") - expected).abs().max() <= 1e-4
    assert (logits(engine, adopt(engine, tmp_path / "adapter")) - expected).abs().max() <= 1e-5
    assert (logits(engine, []) - expected).abs().max() > 0.1


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 12},
        {"r": 4, "lora_alpha": 12, "use_rslora": True},
        {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3, "down_proj": 9}},
    ],
    ids=["alpha", "rslora", "patterns"],
)
def test_a_lora_of_pefts_is_adopted_with_its_scale(settings: dict[str, Any], engine: Engine, tmp_path: Path) -> None:
    peft_folder(engine.subject, tmp_path / "theirs", **settings)
    expected = peft_logits(engine.subject, tmp_path / "theirs")
    assert (logits(engine, adopt(engine, tmp_path / "theirs")) - expected).abs().max() <= 1e-4
    assert (logits(engine, []) - expected).abs().max() > 0.1


def peft_folder(subject: Subject, folder: Path, **settings: Any) -> Path:
    """An adapter that PEFT made and saved, with weights that do something."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(subject.spec.model, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj", "down_proj"], **settings})
    made = get_peft_model(model, config)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(made.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.3 * noise(*parameter.shape, seed=index))
    made.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"use_dora": True}, "has use_dora: True, which is not a low-rank change alone"),
        ({"init_lora_weights": "pissa"}, "began with init_lora_weights 'pissa', which changes the base weights"),
        ({"lora_bias": True}, "has lora_bias: True"),
        ({"modules_to_save": ["norm"]}, "is not a LoRA factor of a linear module"),
    ],
)
def test_a_lora_that_is_more_than_two_factors_is_refused(
    settings: dict[str, Any], says: str, engine: Engine, tmp_path: Path
) -> None:
    peft_folder(engine.subject, tmp_path / "theirs", **settings)
    with pytest.raises(ExchangeError, match=says):
        adopt(engine, tmp_path / "theirs")


def test_an_adapter_that_does_not_fit_is_refused(engine: Engine, tmp_path: Path) -> None:
    folder = peft_folder(engine.subject, tmp_path / "theirs", r=2)
    with pytest.raises(ExchangeError, match="is an adapter, which knows its modules; leave out site"):
        adopt(engine, folder, site="resid")
    weights = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    damaged = {
        "has shape": {**weights, name: weights[name][:, :-1].contiguous()},
        "no module or parameter 'model.layers.9": {
            key.replace("layers.0", "layers.9"): weights[key] for key in weights
        },
        "lacks a factor": {key: value for key, value in weights.items() if key != name},
        "are not finite": {**weights, name: weights[name] * float("inf")},
    }
    for says, tensors in damaged.items():
        save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=says):
            adopt(engine, folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ExchangeError, match=r"has no adapter_model\.safetensors"):
        contents(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ExchangeError, match="is a IA3 adapter; a LORA one can be adopted"):
        contents(folder)


def test_what_is_not_low_rank_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(ExchangeError, match="this trial has Add"):
        adapter_folder.write([Add(Site("q", 1), noise(4))], tmp_path / "adapter", "base")
    assert list(tmp_path.iterdir()) == []


def test_an_adapters_folder_is_identified_by_its_two_files(engine: Engine, tmp_path: Path) -> None:
    folder = peft_folder(engine.subject, tmp_path / "theirs", r=2)
    digest = file_digest(folder)
    (folder / "README.md").write_text("another text")
    assert file_digest(shutil.copytree(folder, tmp_path / "elsewhere")) == digest
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    assert file_digest(folder) != digest
