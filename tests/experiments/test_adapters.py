"""Every way of changing weights against an independent model, and the table of what was certified.

`python -m tests.experiments.test_adapters --write` writes docs/certified.md from the same checks.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from experiments import students
from experiments.adapters import ADAPTER, difference, injected
from experiments.edit import Edit
from experiments.intervention import State, method
from experiments.students import train
from experiments.training import TrainingError
from experiments.tuners import TUNERS, tuner_config
from experiments.weights import factored, linear_modules, weight_edits
from tests.experiments.methods import DATA, PAIRS, USER, change, fingerprint, logits
from tests.experiments.test_svd_rotation import with_the_tuner
from tests.tiny import make_tiny_model

if TYPE_CHECKING:
    from experiments.engine import Engine
    from experiments.subject import Subject

LAYERS = [2]
SMALL: dict[str, dict[str, Any]] = {
    "vera": {"rank": 6},
    "oft": {"options": {"oft_block_size": 8}},
    "randlora": {"rank": 3},
    "shira": {"rank": 2},
    "miss": {"rank": 4},
    "gralora": {"rank": 8},
    "fourierft": {"options": {"n_frequency": 3}},
    "vblora": {"options": {"vector_length": 16, "num_vectors": 8, "topk": 2}},
    "c3a": {"options": {"block_size": 16}},
}
"""Sizes of tuners whose own defaults are larger than a matrix of the tiny models."""
PAGE = Path(__file__).parents[2] / "docs" / "certified.md"
BEGIN = "<!-- table: written by `python -m tests.experiments.test_adapters --write` -->"
END = "<!-- end of table -->"


def load_engine(folder: Path, dtype: str = "float32") -> Engine:
    from experiments.engine import Engine
    from experiments.spec import SubjectSpec
    from experiments.subject import load

    return Engine(load(SubjectSpec(model=str(folder), dtype=dtype)))


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Engine:
    return load_engine(tiny_folder)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return load_engine(make_tiny_model(tmp_path_factory.mktemp("tiny") / "gpt2", "gpt2"))


def tuned(name: str, **settings: Any) -> Any:
    return method("peft")(
        **{
            "tuner": name,
            "layers": LAYERS,
            "learning_rate": 0.03,
            "epochs": 2,
            "batch_size": 6,
            **SMALL.get(name, {}),
            **settings,
        }
    )


def fit_beside_peft(made: Any, engine: Engine) -> tuple[State, torch.Tensor]:
    """The state of a fit, and the logits of PEFT's own model with the same adapter: made anew, and given its
    parameters where training ended."""
    found: list[torch.Tensor] = []
    subject = engine.subject
    config = tuner_config(
        made.tuner, subject, linear_modules(subject, made.targets, made.layers), made.rank, made.options
    )

    def then_copy(engine: Engine, *rest: Any) -> Any:
        losses = train(engine, *rest)
        theirs = peft_model(config, subject)
        slots = dict(theirs.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, parameter in subject.model.named_parameters():
                if parameter.requires_grad:
                    slots[f"base_model.model.{name}"].copy_(parameter)
            found.append(theirs(torch.tensor([subject.render(USER).tokens])).logits[0, -1].float())
        return losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(students, "train", then_copy)
        state = made.fit(engine, PAIRS, 0)
    return state, found[0]


def peft_model(config: Any, subject: Subject) -> Any:
    """A fresh model from the subject's files with PEFT's adapter of `config`."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh: Any = AutoModelForCausalLM.from_pretrained(subject.spec.model, dtype=subject.dtype)
        return get_peft_model(fresh, copy.deepcopy(config), adapter_name=ADAPTER).eval()


@pytest.fixture(scope="module")
def bf16(tiny_folder: Path) -> Engine:
    return load_engine(tiny_folder, "bfloat16")


@dataclass(frozen=True)
class Certificate:
    """What was found of one method on one subject."""

    kept: str
    """In which form the state is kept."""
    at_zero: float
    """Largest difference of a logit at dose 0 from the base."""
    odd: float | None
    """Largest ||D(c) + D(-c)|| / ||D(c)|| of a weight; None where the dose is signed, but not linear."""
    error: float
    """Largest difference of a logit at dose 1 from the independent model."""
    effect: float
    """The same from the base."""

    def check(self) -> None:
        assert self.at_zero == 0
        assert self.odd is None or self.odd < 1e-5
        assert self.error <= 1e-4
        assert self.effect > 1e-2

    def cells(self) -> list[str]:
        odd = "R(-c) = R(c)', not linear" if self.odd is None else told(self.odd, 1e-5)
        return [self.kept, "exact" if self.at_zero == 0 else f"off by {self.at_zero:.1g}", odd, told(self.error, 1e-4)]


def told(value: float, limit: float) -> str:
    """A figure that is the same on every machine while it is what it should be."""
    return f"≤ {limit:.0e}" if value <= limit else f"{value:.1g}"


def certify(made: Any, state: State, oracle: torch.Tensor, engine: Engine) -> Certificate:
    base = logits(engine, [])
    at = {dose: logits(engine, made.edits(state, dose)) for dose in (0.0, 1.0)}
    return Certificate(
        kept(state),
        (at[0.0] - base).abs().max().item(),
        oddness(lambda dose: made.edits(state, dose)) if made.dose_kind == "signed_linear" else None,
        (at[1.0] - oracle).abs().max().item(),
        (oracle - base).abs().max().item(),
    )


def kept(state: State) -> str:
    ranks = {len(tensor) for name, tensor in state.tensors.items() if name.endswith(".a")}
    forms = [f"factors of rank {', '.join(map(str, sorted(ranks)))}"] if ranks else []
    forms += ["matrices"] if any(name.endswith(".weight") for name in state.tensors) else []
    forms += ["biases"] if any(name.endswith(".bias") for name in state.tensors) else []
    return " and ".join(forms) or "bases and parameters"


def oddness(edits_of: Callable[[float], list[Edit]]) -> float:
    """The largest ||D(c) + D(-c)|| / ||D(c)|| over the edited places, at c = 0.7."""
    ahead, back = (dict(map(change, edits_of(dose))) for dose in (0.7, -0.7))
    assert ahead.keys() == back.keys()
    return max(float((ahead[place] + back[place]).norm() / ahead[place].norm()) for place in ahead)


def certified_tuner(name: str, engine: Engine) -> Certificate | None:
    """None where PEFT cannot adapt this subject."""
    made = tuned(name)
    try:
        state, oracle = fit_beside_peft(made, engine)
    except TrainingError as error:
        if "cannot adapt this subject" not in str(error):
            raise
        return None
    return certify(made, state, oracle, engine)


def certified_lora(engine: Engine) -> Certificate:
    settings = {"layers": LAYERS, "learning_rate": 0.03, "epochs": 2}
    state = method("lora")(rank=4, alpha=8, **settings).fit(engine, PAIRS, 0)
    twin, oracle = fit_beside_peft(tuned("lora", rank=4, options={"lora_alpha": 8}, **settings), engine)
    assert all(torch.equal(tensor, twin.tensors[name]) for name, tensor in state.tensors.items())
    return certify(method("lora")(rank=4, alpha=8, **settings), state, oracle, engine)


def certified_sft(engine: Engine) -> Certificate:
    """Against a model into whose own weights the changes are written."""
    from transformers import AutoModelForCausalLM

    made: Any = method("sft")(layers=LAYERS, learning_rate=0.01, epochs=1)
    state = made.fit(engine, PAIRS, 0)
    model: Any = AutoModelForCausalLM.from_pretrained(engine.subject.spec.model, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, delta in state.tensors.items():
            model.get_parameter(name).add_(delta)
        oracle = model(torch.tensor([engine.subject.render(USER).tokens])).logits[0, -1]
    return certify(made, state, oracle, engine)


def certified_rotation(engine: Engine) -> Certificate:
    """Against the PEFT tuner in a model of its own."""
    made: Any = method("svd_rotation")(rank=8, layers=LAYERS, learning_rate=0.03, epochs=2)
    state = made.fit(engine, PAIRS, 0)
    return certify(made, state, with_the_tuner(made, state, engine, 1.0), engine)


OTHERS: dict[str, Callable[[Engine], Certificate]] = {
    "lora": certified_lora,
    "sft": certified_sft,
    "svd_rotation": certified_rotation,
}


def row_of(name: str, engine: Engine, gpt2: Engine) -> str:
    """The table's row of a method, or of a tuner of the method `peft`. Asserts what it claims."""
    if name.startswith("peft "):
        first, second = (certified_tuner(name.removeprefix("peft "), each) for each in (engine, gpt2))
    else:
        first, second = (OTHERS[name](each) for each in (engine, gpt2))
    assert first is not None
    for found in (first, second):
        if found:
            found.check()
    also = f" ({second.kept} on GPT-2)" if second and second.kept != first.kept else ""
    form, *rest = first.cells()
    return f"| {' | '.join([name, form + also, *rest, second.cells()[-1] if second else 'refused'])} |"


NAMES = [*OTHERS, *(f"peft {name}" for name in TUNERS)]


@pytest.mark.parametrize("name", NAMES)
def test_what_the_page_certifies_of_a_method_holds(name: str, engine: Engine, gpt2: Engine) -> None:
    noise = torch.get_rng_state()
    before = [(fingerprint(each.subject), storage(each)) for each in (engine, gpt2)]
    assert row_of(name, engine, gpt2) in PAGE.read_text(encoding="utf-8").splitlines(), "write docs/certified.md anew"
    assert [(fingerprint(each.subject), storage(each)) for each in (engine, gpt2)] == before
    assert torch.equal(torch.get_rng_state(), noise)


def storage(engine: Engine) -> list[int]:
    return [parameter.data_ptr() for parameter in engine.subject.model.parameters()]


def test_the_page_has_a_row_for_every_method_and_tuner_and_no_other() -> None:
    table = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    rows = table.split("---|\n")[-1].strip().splitlines()
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == NAMES


@pytest.mark.parametrize("name", ["lora", "rslora", "dora", "pissa", "ia3", "vera", "randlora"])
def test_gpt2_is_adapted_by_the_tuners_that_know_its_matrices(name: str, gpt2: Engine) -> None:
    assert certified_tuner(name, gpt2) is not None


@pytest.mark.parametrize("name", TUNERS)
def test_a_bfloat16_subject_is_adapted_in_float32_and_left_as_it_was(name: str, bf16: Engine) -> None:
    before = fingerprint(bf16.subject), storage(bf16)
    made = tuned(name, epochs=1)
    state, oracle = fit_beside_peft(made, bf16)
    assert (fingerprint(bf16.subject), storage(bf16)) == before
    assert all(tensor.dtype == torch.float32 for tensor in state.tensors.values())
    base, found = logits(bf16, []), logits(bf16, made.edits(state, 1.0))
    assert torch.equal(logits(bf16, made.edits(state, 0)), base)
    noise = 0.05  # of the logits' rounding; PEFT's own models of PiSSA and OLoRA round the weights they replace
    assert (found - oracle).abs().mean() < noise + 0.2 * (oracle - base).abs().mean()


def test_peft_learns_the_responses_and_its_opposite_forgets_them(engine: Engine) -> None:
    from experiments.engine import Row
    from experiments.training import row

    made = tuned("dora", learning_rate=0.02, epochs=6)
    state = made.fit(engine, PAIRS, 0)
    rows = [row(engine, each) for each in DATA["conversations"]]
    nll = {}
    for dose in (-1.0, 0.0, 1.0):
        edited = [Row(each.tokens, each.n_prompt, tuple(made.edits(state, dose))) for each in rows]
        nll[dose] = -torch.cat(list(engine.token_logprobs(edited))).mean().item()
    assert nll[1.0] < nll[0.0] - 0.2
    assert nll[0.0] < nll[-1.0]
    assert state.facts["losses"][-1] < state.facts["losses"][0]


@pytest.mark.parametrize("name", ["lora", "dora", "pissa", "olora", "oft", "ia3"])
@pytest.mark.parametrize("which", ["engine", "gpt2"])
def test_inside_the_subject_a_dose_is_what_it_is_as_edits(
    name: str, which: str, request: pytest.FixtureRequest
) -> None:
    at: Engine = request.getfixturevalue(which)
    if which == "gpt2" and name in ("oft", "olora"):
        pytest.skip("PEFT cannot adapt GPT-2 with it")
    base, made = logits(at, []), tuned(name)
    modules = linear_modules(at.subject, None, made.layers)
    config = tuner_config(name, at.subject, modules, made.rank, made.options)
    inside = {}
    with injected(at.subject, modules, config, 0) as adapter, torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in adapter.parameters:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for dose in (0.0, 1.0, -0.7, 2.0):
            assert adapter.edits_of(dose) == []
            inside[dose] = logits(at, [])
        tensors = adapter.tensors()
    for dose, found in inside.items():
        assert (found - logits(at, weight_edits(tensors, dose))).abs().max() <= (1e-5 if dose == 0 else 2e-4)
    assert (inside[-0.7] - base).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["peft", "lora", "sft", "svd_rotation"])
@pytest.mark.parametrize("loss", ["contrastive", "dpo"])
def test_adapters_learn_other_losses_too(name: str, loss: str, engine: Engine) -> None:
    others = [pair.negative.model_copy(update={"response": "No."}) for pair in PAIRS]
    pairs = [pair.model_copy(update={"negative": other}) for pair, other in zip(PAIRS, others, strict=True)]
    before = fingerprint(engine.subject)
    made: Any = method(name)(loss=loss, learning_rate=0.003, epochs=4, layers=[1])
    state = made.fit(engine, pairs, 0)
    assert state.facts["losses"][-1] < state.facts["losses"][0]
    assert fingerprint(engine.subject) == before
    assert made.label().endswith(loss)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ["q_prj"]}, r"\['q_prj'\]: no such linear modules in this subject; .*did you mean 'q_proj'"),
        ({"options": {"lora_alfa": 3}}, r"tuner dora has no option 'lora_alfa' \(did you mean 'lora_alpha'\?\)"),
        ({"options": {"target_modules": "q_proj"}}, "'target_modules' of tuner dora is not to be set: use `targets`"),
        ({"options": {"task_type": "CAUSAL_LM"}}, "has no option 'task_type'"),
        ({"options": {"r": 3}}, "use `rank`"),
        ({"options": {"lora_dropout": 0.1}}, "without dropout"),
        ({"tuner": "lora", "options": {"init_lora_weights": "eva"}}, "needs a preparation"),
        ({"tuner": "ia3", "rank": 4}, "tuner ia3 has no rank; got 4"),
        ({"tuner": "ia3", "options": {"feedforward_modules": ["down"]}}, "'down' is no target"),
        ({"tuner": "oft", "options": {"oft_block_size": 8, "use_cayley_neumann": True, "r": 2}}, "use `rank`"),
        ({"tuner": "vblora"}, "PEFT's VBLORA cannot adapt this subject: "),
        ({"tuner": "delora", "rank": 10**9}, "PEFT's DELORA cannot adapt this subject: "),
    ],
)
def test_what_peft_or_the_subject_lacks_is_refused_at_fit(
    settings: dict[str, Any], message: str, engine: Engine
) -> None:
    before = fingerprint(engine.subject)
    with pytest.raises(TrainingError, match=message):
        method("peft")(**settings).fit(engine, PAIRS, 0)
    assert fingerprint(engine.subject) == before


def test_an_unknown_tuner_is_refused_with_those_there_are(engine: Engine) -> None:
    with pytest.raises(ValueError, match="'lora', 'rslora', 'dora'"):
        method("peft")(tuner="lroa")
    with pytest.raises(TrainingError, match=r"unknown tuner 'loraa' \(did you mean 'lora'\?\); allowed: lora, rslora"):
        tuner_config("loraa", engine.subject, {}, None, {})


def test_a_tuner_this_peft_does_not_have_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    monkeypatch.delitem(PEFT_TYPE_TO_TUNER_MAPPING, "HRA")
    with pytest.raises(TrainingError, match=r"tuner hra: PEFT .* has no HRA; install a newer one"):
        tuned("hra").fit(engine, PAIRS, 0)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, TrainingError])
@pytest.mark.parametrize("name", ["dora", "olora"])
def test_a_subject_is_left_as_it_was_when_training_is_cut_short(
    name: str, failure: type[BaseException], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        assert any("lora_A" in name for name, _ in engine.subject.model.named_parameters())
        raise failure("stop")

    before = fingerprint(engine.subject), storage(engine)
    monkeypatch.setattr(students, "train", fail)
    with pytest.raises(failure):
        tuned(name).fit(engine, PAIRS, 0)
    assert (fingerprint(engine.subject), storage(engine)) == before


# weights


@pytest.mark.parametrize(("rank", "kept_rank"), [(1, 1), (12, 12), (20, None)])
def test_factors_are_kept_where_they_are_exact_and_smaller(rank: int, kept_rank: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*size, generator=generator).double() for size in ((rank, 30), (40, rank)))
    found = factored(b @ a)
    assert (None if found is None else len(found[0])) == kept_rank
    if found:
        assert (found[1].double() @ found[0].double() - b @ a).norm() <= 1e-6 * (b @ a).norm()


def test_nearly_low_rank_is_not_low_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(40, 3, generator=generator).double() @ torch.randn(3, 30, generator=generator).double()
    noise = torch.randn(40, 30, generator=generator).double()
    assert factored(low + 1e-4 * noise) is None
    assert factored(torch.zeros(40, 30).double()) is None


def test_a_map_that_is_not_linear_has_no_difference() -> None:
    class Bent(torch.nn.Module):
        def __init__(self, base: torch.nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + x.relu()  # type: ignore[no-any-return]

    module = torch.nn.Linear(6, 6)
    with pytest.raises(TrainingError, match="up_proj: the adapter is not linear in its input"):
        difference("up_proj", Bent(module), module.weight.data, module)


def test_small_updates_survive_in_a_bfloat16_subject(bf16: Engine) -> None:
    made: Any = method("sft")(learning_rate=1e-6, epochs=2, layers=[0], targets=["q_proj"])
    before = fingerprint(bf16.subject)
    delta = made.fit(bf16, PAIRS, 0).tensors["model.layers.0.self_attn.q_proj.weight"]
    weight = bf16.subject.model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    assert delta.dtype == torch.float32
    assert 0 < delta.abs().max() < 1e-5
    assert ((weight + delta.bfloat16()) == weight).float().mean() > 0.5  # what training in bfloat16 would have lost
    assert fingerprint(bf16.subject) == before


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="orch-certified-") as folder:
        engines = [load_engine(make_tiny_model(Path(folder) / kind, kind)) for kind in ("llama", "gpt2")]
        rows = [row_of(name, *engines) for name in NAMES]
    columns = ["method", "a state keeps", "dose 0", "opposite doses cancel", "dose 1 on Llama", "dose 1 on GPT-2"]
    lines = ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *rows, ""]
    print("\n".join(lines))
    if "--write" in sys.argv:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text("\n".join([page.split(BEGIN)[0] + BEGIN, *lines, END + page.split(END)[1]]), encoding="utf-8")


if __name__ == "__main__":
    main()
