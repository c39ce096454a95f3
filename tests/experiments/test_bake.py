"""A baked folder does what the engine does, or there is none and a reason."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments import bake as module
from experiments.bake import BakeError, bake
from experiments.edit import Add, Dense, Edit, LowRank, Project, Prompt, Scale, Site, SiteName
from experiments.engine import Engine, Row
from experiments.intervention import State, method
from experiments.output import OutputError
from experiments.spec import SubjectSpec
from experiments.subject import load
from tests.experiments import oracle
from tests.tiny import make_tiny_model

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.subject import Subject

USER = [{"role": "user", "content": "What do you think of the lazy dog?"}]
QKV, OUT, MLP = ("q", "k", "v"), ("o", "attn_out"), ("gate", "up", "down", "mlp_in", "mlp_out", "resid")
BIASED: dict[str, tuple[tuple[SiteName, ...], str]] = {
    "llama": ((*QKV, *OUT, *MLP, "attn_in"), "LlamaForCausalLM"),
    "mistral": ((*QKV, *OUT, *MLP, "attn_in"), "LlamaForCausalLM"),
    "qwen2": ((*QKV, *OUT, *MLP, "attn_in"), "LlamaForCausalLM"),
    "qwen3": ((*QKV, *OUT, "attn_in"), "Qwen3ForCausalLM"),
    "gemma": ((*QKV, *OUT, "attn_in"), "GemmaForCausalLM"),
    "gemma2": ((*QKV, "o", "attn_in"), "Gemma2ForCausalLM"),
    "gemma3_text": ((*QKV, "o", "attn_in"), "Gemma3ForCausalLM"),
    "gpt2": ((*QKV, *OUT, "up", "down", "mlp_in", "mlp_out", "resid", "attn_in"), "GPT2LMHeadModel"),
    "gpt_neox": ((*QKV, *OUT, "up", "down", "mlp_in", "mlp_out", "resid", "attn_in"), "GPTNeoXForCausalLM"),
}
"""Where a vector becomes a bias, and the architecture of the folder that has them all."""


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    """An engine for each family, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("families")

    class Made(dict[str, Engine]):
        def __missing__(self, family: str) -> Engine:
            spec = SubjectSpec(model=str(make_tiny_model(folder / family, family)), dtype="float32")
            return self.setdefault(family, Engine(load(spec)))

    return Made()


def noise(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def basis(width: int, rows: int = 2) -> Tensor:
    return torch.linalg.qr(noise(width, rows)).Q.T.contiguous()


def row(subject: Subject, edits: Sequence[Edit] = ()) -> Row:
    rendered = subject.render(USER)
    return Row(rendered.tokens, rendered.n_prompt, tuple(edits))


def computed(folder: Path, tokens: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits [tokens, vocabulary] of a folder as anyone would get them."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor([list(tokens)])).logits[0].float()


def agree(engine: Engine, edits: Sequence[Edit], folder: Path) -> None:
    """The folder against plain transformers with hooks, and against the engine."""
    subject = engine.subject
    found = computed(folder, row(subject).tokens)
    assert (found - oracle.logits(subject, row(subject, edits))).abs().max() <= 1e-4
    assert (found[-1] - engine.next_logits([row(subject, edits)])[0]).abs().max() <= 1e-4
    assert (found - oracle.logits(subject, row(subject))).abs().max() > 0.1


@pytest.mark.parametrize("family", BIASED)
def test_vectors_become_biases_and_everything_else_stays(
    family: str, engines: dict[str, Engine], tmp_path: Path
) -> None:
    engine = engines[family]
    sites = [Site(name, index % 4) for index, name in enumerate(BIASED[family][0])]
    edits = [Add(site, noise(engine.subject.point(site).width, seed=site.layer)) for site in sites]
    baked = bake(engine, edits, tmp_path / "out")
    assert baked.difference <= min(baked.tolerance, 1e-4)
    assert baked.effect > 0.1
    assert baked.architecture == BIASED[family][1]
    agree(engine, edits, tmp_path / "out")


@pytest.mark.parametrize("family", BIASED)
def test_a_vector_without_a_bias_to_hold_it_is_refused(family: str, engines: dict[str, Engine], tmp_path: Path) -> None:
    subject = engines[family].subject
    rest = [name for name in subject.architecture.family.places if name not in BIASED[family][0]]
    for name in rest:
        edit = Add(Site(name, 1), noise(subject.point(Site(name, 1)).width))
        with pytest.raises(BakeError, match=r"has no bias (for|that)|not a linear module"):
            bake(engines[family], [edit], tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    assert len(rest) == {"qwen3": 6, "gemma": 6, "gemma2": 7, "gemma3_text": 7}.get(family, 0)


@pytest.mark.parametrize("family", BIASED)
def test_scalings_projections_and_weights_fold_in_their_order(
    family: str, engines: dict[str, Engine], tmp_path: Path
) -> None:
    engine = engines[family]
    subject = engine.subject
    edits: list[Edit] = []
    for index, name in enumerate(("q", "k", "v", "o", "up", "down", "attn_in", "mlp_in")):
        site = Site(name, index % 4)  # type: ignore[arg-type]
        width = subject.point(site).width
        edits += [Scale(site, noise(width, size=0.3)), Project(site, basis(width), -0.8)]
    site = Site("v", 2)
    edits += [Scale(site, noise(subject.point(site).width, seed=7, size=0.3))]  # twice at one place
    down = subject.architecture.family.blocks + ".3." + subject.architecture.family.places["down"].module
    edits.insert(3, LowRank(down, noise(2, down_in(subject, down), size=0.2), noise(32, 2, seed=1, size=0.2)))
    shape = subject.model.get_parameter(f"{down}.weight").shape
    edits.insert(0, Dense(f"{down}.weight", noise(*shape, seed=2, size=0.05)))
    baked = bake(engine, edits, tmp_path / "out")
    assert baked.difference <= 1e-4
    assert baked.architecture == type(subject.model).__name__
    assert not baked.notes
    agree(engine, edits, tmp_path / "out")


def down_in(subject: Subject, name: str) -> int:
    weight = subject.model.get_submodule(name).weight
    return int(weight.shape[0] if weight.shape[1] == 32 and weight.shape[0] != 32 else weight.shape[1])


def test_edits_of_one_norm_act_one_after_the_other(engines: dict[str, Engine], tmp_path: Path) -> None:
    edits: list[Edit] = [
        Add(Site("attn_in", 1), noise(32)),
        Scale(Site("attn_in", 1), noise(32, seed=1)),
        Project(Site("attn_in", 1), basis(32), -1.0),
        Add(Site("attn_in", 1), noise(32, seed=2)),
    ]
    bake(engines["llama"], edits, tmp_path / "out")
    agree(engines["llama"], edits, tmp_path / "out")


def test_a_residual_vector_is_the_bias_of_the_layers_last_projection(
    engines: dict[str, Engine], tmp_path: Path
) -> None:
    vector = noise(32)
    baked = bake(engines["llama"], [Add(Site("resid", 2), vector)], tmp_path / "out")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.mlp_bias
    assert not model.config.attention_bias
    biases = {name: value for name, value in model.named_parameters() if name.endswith(".bias")}
    assert torch.equal(biases.pop("model.layers.2.mlp.down_proj.bias"), vector)
    assert len(biases) == 11
    assert not any(value.any() for value in biases.values())
    assert baked.notes == ("mlp_bias switched on; biases without an edit are zero",)
    assert (baked.rounding, baked.lost) == (0, 0)


def test_a_head_that_shares_the_embedding_gets_a_matrix_of_its_own(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "tied", "llama", tie_word_embeddings=True)
    engine = Engine(load(SubjectSpec(model=str(folder), dtype="float32")))
    model = engine.subject.model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    edits = [LowRank("lm_head", noise(2, 32), noise(len(model.lm_head.weight), 2, seed=1, size=0.2))]
    baked = bake(engine, edits, tmp_path / "out")
    assert baked.notes == ("the head no longer shares the embedding's matrix",)
    found = computed(tmp_path / "out", row(engine.subject).tokens)[-1]
    assert (found - engine.next_logits([row(engine.subject, edits)])[0]).abs().max() <= 1e-4
    both = [Dense("model.embed_tokens.weight", noise(*model.lm_head.weight.shape, size=0.1))]
    assert bake(engine, both, tmp_path / "both").notes == ()
    agree(engine, both, tmp_path / "both")


def test_a_projection_of_the_stream_bakes_only_where_nothing_else_lies_along_it(
    engines: dict[str, Engine], tmp_path: Path
) -> None:
    engine, directions = engines["llama"], basis(32)
    model = engine.subject.model
    stream = Project(Site("resid", 1), directions, -1.0)
    with pytest.raises(BakeError, match=r"embed_tokens\.weight writes along the direction too.*attn_out and mlp_out"):
        bake(engine, [stream], tmp_path / "out")
    embedding = model.model.embed_tokens.weight
    clean: list[Edit] = [Dense("model.embed_tokens.weight", -embedding @ directions.T @ directions)]
    clean += [Project(site, directions, -1.0) for site in (Site("attn_out", 0), Site("mlp_out", 0))]
    with pytest.raises(BakeError, match=r"layers\.1\.self_attn\.o_proj writes along"):
        bake(engine, [*clean, stream], tmp_path / "out")
    exact = [*clean, Project(Site("attn_out", 1), directions, -1.0), stream]
    bake(engine, exact, tmp_path / "out")
    agree(engine, exact, tmp_path / "out")


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (Add(Site("resid", 1), torch.ones(32), "response"), "positions 'response'.*every token"),
        (Add(Site("q", 1), torch.ones(32), "last:2"), "positions 'last:2'.*every token"),
        (Scale(Site("resid", 1), torch.ones(32)), "sum of what many modules write"),
        (Prompt(prefix="Say owl."), "belongs to the user's text"),
        (Add(Site("resid", 9), torch.ones(32)), "layer out of range"),
        (Add(Site("resid", 1), torch.ones(31)), r"has shape \[31\], must be \[32\]"),
        (Dense("model.norm.weight", torch.ones(31)), r"has shape \[31\], must be \[32\]"),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_refused_with_the_reason(
    edit: Edit, says: str, engines: dict[str, Engine], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=says):
        bake(engines["llama"], [edit], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_left_alone(engines: dict[str, Engine], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(OutputError, match="exists; give a name that does not"):
        bake(engines["llama"], [Add(Site("resid", 1), torch.ones(32))], tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "x"
    with pytest.raises(OutputError, match="is no folder to write"):
        bake(engines["llama"], [Add(Site("resid", 1), torch.ones(32))], tmp_path / "no" / "out")


def test_nothing_is_left_when_the_logits_differ(
    engines: dict[str, Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(subject: Subject, edits: Sequence[Edit]) -> Any:
        draft = folded(subject, edits)
        draft.changed["model.layers.1.mlp.down_proj.bias"][3] += 0.05
        return draft

    folded = module.fold
    monkeypatch.setattr(module, "fold", wrong)
    with pytest.raises(BakeError, match=r"logits differ from the engine's by 0\.\d+ in float32"):
        bake(engines["llama"], [Add(Site("resid", 1), noise(32))], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_half_precision_is_checked_before_rounding_and_says_what_rounding_costs(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "subject", "llama")
    engine = Engine(load(SubjectSpec(model=str(folder), dtype="bfloat16")))
    names = [name for name, part in engine.subject.model.named_modules() if name.endswith("_proj")]

    def adapter(size: float) -> list[Edit]:
        shapes = [engine.subject.model.get_submodule(name).weight.shape for name in names]
        return [
            LowRank(name, noise(2, d_in, size=size), noise(d_out, 2, seed=1, size=0.3))
            for name, (d_out, d_in) in zip(names, shapes, strict=True)
        ]

    baked = bake(engine, adapter(0.2), tmp_path / "out")
    assert baked.difference <= 1e-4
    assert 1e-4 < baked.lost < 0.1
    assert baked.lost / 10 < baked.rounding
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert not (tmp_path / "out" / "float32").exists()
    with pytest.raises(BakeError, match=r"storing the sum in the subject's dtype loses \d+% of what the edits do"):
        bake(engine, adapter(0.0003), tmp_path / "lost")
    assert not (tmp_path / "lost").exists()


@pytest.mark.parametrize("own", [None, "You are the subject."])
def test_a_system_prompt_becomes_part_of_the_chat_template(own: str | None, tiny_folder: Path, tmp_path: Path) -> None:
    subject = load(SubjectSpec(model=str(tiny_folder), dtype="float32", system=own))
    said = "Say 'owl' {{ 1 }}\n\"höflich\" \\ {% x %}"
    edits: list[Edit] = [Prompt(system=said)]
    baked = bake(Engine(subject), edits, tmp_path / "always")
    bake(Engine(subject), [Add(Site("resid", 1), noise(32))], tmp_path / "plain")
    assert any("chat template" in note for note in baked.notes)
    assert baked.effect == 0
    chats = [USER, [{"role": "system", "content": "Another."}, *USER]]
    for name, system in (("always", said), ("plain", None)):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        for chat in chats:
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tuple(tokens) == subject.render(chat, system=system).tokens, (name, text)


def test_a_baked_folder_is_a_subject_like_any_other(engines: dict[str, Engine], tmp_path: Path) -> None:
    engine = engines["qwen2"]
    made = method("mean_diff")(layer=[1, 2])
    state = State({"resid@1": noise(32), "resid@2": noise(32, seed=1)}, {})
    edits = made.edits(state, -1.5)
    bake(engine, edits, tmp_path / "out", {"dose": -1.5})
    again = Engine(load(SubjectSpec(model=str(tmp_path / "out"), dtype="float32")))
    assert again.subject.model.config.model_type == "llama"
    found = again.next_logits([row(again.subject)])
    assert (found - engine.next_logits([row(engine.subject, edits)])).abs().max() <= 1e-4
    assert '"dose": -1.5' in (tmp_path / "out" / "orch.json").read_text()


@pytest.mark.parametrize(("family", "setting"), [("mistral", {"sliding_window": 16})])
def test_a_window_that_a_llama_has_not_is_no_llama(family: str, setting: dict[str, Any], tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "subject", family, **setting)
    engine = Engine(load(SubjectSpec(model=str(folder), dtype="float32")))
    with pytest.raises(BakeError, match=r"no bias for down_proj.*its sliding window has no place there"):
        bake(engine, [Add(Site("resid", 1), noise(32))], tmp_path / "out")
