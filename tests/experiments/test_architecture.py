"""Sites against what the models' own forward passes compute: hidden states, residual sums, what attention is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from experiments.architecture import FAMILIES, Architecture, SitePoint
from experiments.edit import SITE_NAMES, Site
from experiments.files import SubjectError
from tests.tiny import ARCHITECTURES, make_tiny_model

IDS = torch.tensor([[1, 30, 41, 52, 63, 74, 85, 96, 17, 28, 39, 40]])
UNGATED = {"gpt2", "gpt_neox"}
POST_NORMED = {"gemma2", "gemma3_text"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("families")
    return {
        name: AutoModelForCausalLM.from_pretrained(make_tiny_model(root / name, name)).eval() for name in ARCHITECTURES
    }


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest, models: dict[str, Any]) -> Architecture:
    return Architecture(models[request.param])


def record(points: dict[Site, SitePoint], model: Any) -> tuple[dict[Site, Tensor], Any]:
    """Values at `points` in one forward pass, and the pass's outputs with its hidden states."""
    seen: dict[Site, Tensor] = {}
    handles = []
    for site, point in points.items():

        def note(module: Any, args: Any, output: Tensor, site: Site = site, point: SitePoint = point) -> None:
            assert isinstance(output, Tensor), f"{site} is not a plain tensor"
            seen[site] = (output if point.part is None else output[..., point.part]).detach()

        handles.append(point.module.register_forward_hook(note))
    with torch.no_grad():
        outputs = model(IDS, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    return seen, outputs


def capture(architecture: Architecture, names: tuple[str, ...]) -> tuple[dict[Site, Tensor], Any]:
    sites = [Site(name, layer) for name in names for layer in range(len(architecture.blocks))]  # type: ignore[arg-type]
    return record({site: architecture.point(site) for site in sites}, architecture.model)


def kind(architecture: Architecture) -> str:
    return str(architecture.config.model_type)


def test_every_supported_type_is_tested() -> None:
    assert set(FAMILIES) == set(ARCHITECTURES)


def test_every_site_is_a_tensor_of_the_width_it_claims(architecture: Architecture) -> None:
    names = tuple(name for name in SITE_NAMES if not (name == "gate" and kind(architecture) in UNGATED))
    seen, _ = capture(architecture, names)
    assert len(seen) == 4 * len(names)
    for site, value in seen.items():
        assert value.shape == (1, IDS.shape[1], architecture.point(site).width), str(site)
    stream = {"resid", "attn_in", "attn_out", "mlp_in", "mlp_out", "o", "down"}
    assert all(value.shape[-1] == 32 for site, value in seen.items() if site.name in stream)


def test_resid_is_the_hidden_state_behind_its_layer(architecture: Architecture) -> None:
    seen, outputs = capture(architecture, ("resid",))
    for layer in range(3):  # transformers puts the last layer's hidden state behind the final norm
        torch.testing.assert_close(seen[Site("resid", layer)], outputs.hidden_states[layer + 1], rtol=0, atol=0)


def test_resid_is_the_one_before_plus_what_attention_and_mlp_add(architecture: Architecture) -> None:
    seen, outputs = capture(architecture, ("resid", "attn_out", "mlp_out"))
    before = outputs.hidden_states[0]
    for layer in range(4):
        after = seen[Site("resid", layer)]
        added = seen[Site("attn_out", layer)] + seen[Site("mlp_out", layer)]
        torch.testing.assert_close(before + added, after, rtol=1e-5, atol=1e-5)
        before = after


def test_attn_in_and_mlp_in_are_what_the_projections_read(architecture: Architecture) -> None:
    read: dict[Site, Tensor] = {}
    for layer in range(4):
        for name, reader in (("attn_in", "q"), ("mlp_in", "up")):
            module = architecture.point(Site(reader, layer)).module  # type: ignore[arg-type]
            site = Site(name, layer)  # type: ignore[arg-type]
            module.register_forward_pre_hook(lambda _, args, site=site: read.__setitem__(site, args[0]))
    seen, _ = capture(architecture, ("attn_in", "mlp_in"))
    for layer in range(4):
        for name in ("attn_in", "mlp_in"):
            site = Site(name, layer)  # type: ignore[arg-type]
            torch.testing.assert_close(seen[site], read[site], rtol=0, atol=0)
            module = architecture.point(Site("q" if name == "attn_in" else "up", layer)).module
            module._forward_pre_hooks.clear()


def test_o_and_down_are_what_the_blocks_add_unless_a_post_norm_follows(architecture: Architecture) -> None:
    seen, _ = capture(architecture, ("o", "attn_out", "down", "mlp_out"))
    for inner, outer in (("o", "attn_out"), ("down", "mlp_out")):
        equal = torch.equal(seen[Site(inner, 1)], seen[Site(outer, 1)])  # type: ignore[arg-type]
        assert equal == (kind(architecture) not in POST_NORMED)


def test_v_is_what_attention_is_given_and_q_and_k_are_their_states_before_rope(
    architecture: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[Tensor, Tensor, Tensor]] = []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Any:
        given.append((q, k, v))
        return sdpa(module, q, k, v, *args, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", spy)
    architecture.model.set_attn_implementation("sdpa")
    seen, _ = capture(architecture, ("q", "k", "v"))
    normed = kind(architecture) in {"qwen3", "gemma3_text"}
    for layer, (q, k, v) in enumerate(given):
        for name, value in (("q", q), ("k", k), ("v", v)):
            mine = seen[Site(name, layer)].view(1, IDS.shape[1], value.shape[1], -1).transpose(1, 2)  # type: ignore[arg-type]
            if name == "v" or kind(architecture) == "gpt2":
                torch.testing.assert_close(mine, value, rtol=0, atol=0)
            elif not normed:  # rope turns nothing at position 0, and keeps lengths everywhere
                torch.testing.assert_close(mine[:, :, 0], value[:, :, 0], rtol=0, atol=0)
                torch.testing.assert_close(mine.norm(dim=-1), value.norm(dim=-1), rtol=1e-5, atol=1e-5)
    assert len(given) == 4


def test_q_k_and_v_of_a_fused_projection_are_disjoint_and_complete(models: dict[str, Any]) -> None:
    for name in ("gpt2", "gpt_neox"):
        architecture = Architecture(models[name])
        columns = torch.arange(96)
        parts = [columns[architecture.point(Site(part, 0)).part] for part in ("q", "k", "v")]
        assert sorted(torch.cat(parts).tolist()) == columns.tolist()


def test_a_missing_gate_names_the_sites_there_are(models: dict[str, Any]) -> None:
    for name in UNGATED:
        with pytest.raises(SubjectError, match=r"gate@1: .* has no 'gate'; its sites are attn_in, .*up"):
            Architecture(models[name]).point(Site("gate", 1))


def test_a_layer_out_of_range_names_the_range(models: dict[str, Any]) -> None:
    for layer in (-1, 4):
        with pytest.raises(SubjectError, match=r"layers 0 to 3"):
            Architecture(models["llama"]).point(Site("resid", layer))


def test_an_unknown_type_names_the_class_and_what_was_looked_for() -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "ffn_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 32,
    }
    model = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16, max_position_embeddings=8))
    with pytest.raises(
        SubjectError, match=r"OPTForCausalLM \(model type 'opt'\).*llama.*model\.layers, transformer\.h"
    ):
        Architecture(model)


def test_a_type_whose_layers_look_different_names_what_is_lacking(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path, "llama"))
    del model.model.layers[0].mlp.gate_proj
    with pytest.raises(
        SubjectError, match=r"LlamaForCausalLM calls itself 'llama'.*lacks 'model.layers.0.mlp.gate_proj'"
    ):
        Architecture(model)


def test_every_parameter_and_module_has_its_layer(architecture: Architecture) -> None:
    layers = {name: architecture.layer(name) for name, _ in architecture.model.named_parameters()}
    assert set(layers.values()) == {-1, 0, 1, 2, 3, 4}
    for name, layer in layers.items():
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        assert numbers == ([layer] if 0 <= layer < 4 else []), name
        if layer == -1:
            assert any(part in name for part in ("embed", "wte", "wpe"))
    assert architecture.layer("lm_head") == 4


def test_the_layer_of_a_name_the_model_lacks_is_refused(models: dict[str, Any]) -> None:
    for name in ("model.layers.9.mlp", "model.layers.0.mlp.gate", "model", "model.layers", "", "config"):
        with pytest.raises(SubjectError, match="has no module or parameter"):
            Architecture(models["llama"]).layer(name)


def test_body_and_head_give_the_models_own_logits(architecture: Architecture) -> None:
    with torch.no_grad():
        logits = architecture.head(architecture.body(IDS).last_hidden_state)
        torch.testing.assert_close(logits, architecture.model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_gemma_logits_are_soft_capped(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path, "gemma2", final_logit_softcapping=0.5))
    with torch.no_grad():
        logits = Architecture(model).head(model.model(IDS).last_hidden_state)
        assert logits.abs().max() <= 0.5
        torch.testing.assert_close(logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
