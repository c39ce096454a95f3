"""The contract of every method in the folder on every kind of subject: what a trial may count on, whichever it is."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from experiments.edit import Add, Edit, Site
from experiments.engine import Engine, Row
from experiments.intervention import DoseKind, Intervention, State, method
from tests.experiments import oracle
from tests.experiments.contract import (
    ARCHITECTURES,
    CASES,
    NEW,
    PROMISES,
    TEXTS,
    Fitted,
    Workshop,
    answers,
    effect,
    same,
    starts_at_once,
)
from tests.experiments.methods import METHODS, SETTINGS, data_for, default, fingerprint

CLOSE = 1e-5
GATE = "has no 'gate'; its sites are attn_in, attn_out, down, k, mlp_in, mlp_out, o, q, resid, up, v"
NAMES = "no such linear modules in this subject; allowed: c_attn, c_fc, c_proj (did you mean 'c_proj'?)"
TURNED = "c_attn, c_fc, c_proj are stored transposed here, which not every tuner takes: use lora, or one that"
WRITERS = "sspace takes resid, attn_out, mlp_out and the projections"
GATED, NAMED = {"method": "mean_diff", "site": "gate"}, {"method": "lora", "targets": ["q_proj"]}
REFUSED: dict[tuple[str, str], tuple[dict[str, Any], str, str]] = {
    ("gpt2", "mean_diff"): ({"site": "gate"}, "gate@2: GPT2LMHeadModel ", GATE),
    ("gpt2", "directional_ablation"): ({"site": "gate"}, "gate@0: GPT2LMHeadModel ", GATE),
    ("gpt2", "bias_set"): ({"sites": ["q", "gate"]}, "gate@0: GPT2LMHeadModel ", GATE),
    ("gpt2", "trained_vector"): ({"site": "gate"}, "gate@2: GPT2LMHeadModel ", GATE),
    ("gpt2", "melbo"): ({"site": "gate"}, "gate@1: GPT2LMHeadModel ", GATE),
    ("gpt2", "dct"): ({"site": "gate"}, "gate@1: GPT2LMHeadModel ", GATE),
    ("gpt2", "composed"): ({"parts": [GATED, {"method": "prompt"}]}, "mean_diff Lmid gate: gate@2: ", GATE),
    ("gpt2", "preventative"): ({"wraps": {"method": "lora"}, "direction": GATED}, "direction, ", GATE),
    ("gpt2", "caft"): ({"wraps": NAMED, "direction": {"method": "mean_diff"}}, "wraps, lora r8: ", NAMES),
    ("gpt2", "lora"): ({"targets": ["q_proj"]}, "targets ['q_proj']: ", NAMES),
    ("gpt2", "sft"): ({"targets": ["q_proj"]}, "targets ['q_proj']: ", NAMES),
    ("gpt2", "svd_rotation"): ({"targets": ["q_proj"]}, "targets ['q_proj']: ", NAMES),
    ("gpt2", "peft"): ({"tuner": "oft"}, "PEFT's OFT cannot adapt this subject: Target module Conv1D", TURNED),
    ("gpt_neox", "random"): ({"site": "gate"}, "gate@2: GPTNeoXForCausalLM ", GATE),
    ("gemma2", "sspace"): ({"site": "attn_in"}, "attn_in@2: no weight writes there; ", WRITERS),
}
"""What cannot work on an architecture: settings, how the refusal begins, and what it says is allowed. The defaults, and
the settings of all other tests, work on every architecture."""

every = pytest.mark.parametrize(
    ("architecture", "case"),
    [pytest.param(kind, case, id=f"{kind}-{case}") for kind in ARCHITECTURES for case in CASES],
)


@pytest.fixture(scope="module")
def workshops(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Workshop]:
    """One for each architecture, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("contract")

    class Made(dict[str, Workshop]):
        def __missing__(self, architecture: str) -> Workshop:
            return self.setdefault(architecture, Workshop(folder, architecture))

    return Made()


@pytest.fixture
def workshop(workshops: dict[str, Workshop], architecture: str) -> Workshop:
    return workshops[architecture]


@contextmanager
def other_noise() -> Iterator[None]:
    """Every global source of randomness somewhere else; checks that it is left there."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    torch.manual_seed(987), random.seed(987), np.random.seed(987)
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    try:
        yield
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (random.getstate(), str(np.random.get_state())) == states[1:]
    finally:
        torch.set_rng_state(before[0]), random.setstate(before[1]), np.random.set_state(before[2])


@every
def test_the_same_seed_gives_the_same_state_and_leaves_the_subject_untouched(workshop: Workshop, case: str) -> None:
    before = fingerprint(workshop.subject)
    made, state = workshop.fitted(case)
    with other_noise():
        again = made.fit(Engine(workshop.subject), data_for(made), 0)
    assert fingerprint(workshop.subject) == before
    assert state.facts == again.facts
    assert state.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(state.tensors[key], again.tensors[key]) for key in state.tensors)


@every
def test_dose_zero_is_the_subject_and_any_other_is_not(workshop: Workshop, case: str) -> None:
    fitted = workshop.fitted(case)
    assert fitted.edits(0) == fitted.edits(0.0) == fitted.edits(-0.0) == []
    assert effect(workshop.engine, fitted.edits(0)) == 0
    for dose in fitted.doses:
        moved = effect(workshop.engine, fitted.edits(dose))
        assert moved > 1e-3
        if not starts_at_once(fitted):  # dose 0 is where the small doses lead, not a special case
            assert effect(workshop.engine, fitted.edits(dose / 1000)) <= 0.02 * moved + CLOSE


@every
def test_a_dose_behaves_as_the_method_declares(workshop: Workshop, case: str) -> None:
    fitted = workshop.fitted(case)
    PROMISES[fitted.made.dose_kind](workshop.engine, fitted)


@every
def test_a_saved_state_is_the_state(workshop: Workshop, case: str, tmp_path: Path) -> None:
    made, state = workshop.fitted(case)
    state.save(tmp_path / "state.safetensors")
    loaded = State.load(tmp_path / "state.safetensors")
    assert loaded.facts == state.facts
    assert loaded.tensors.keys() == state.tensors.keys()
    for name, tensor in state.tensors.items():
        assert torch.equal(loaded.tensors[name], tensor)
        assert loaded.tensors[name].dtype == tensor.dtype
    mine, theirs = (made.edits(each, 0.7) for each in (state, loaded))
    assert same(mine, theirs)
    assert torch.equal(answers(workshop.engine, mine), answers(workshop.engine, theirs))


@every
def test_what_a_dose_does_is_what_plain_transformers_computes(workshop: Workshop, case: str) -> None:
    row = workshop.row(case, 2)
    workshop.engine.fired.clear()
    found = workshop.engine.next_logits([row])[0]
    torch.testing.assert_close(found, oracle.logits(workshop.subject, row)[-1], atol=3 * CLOSE, rtol=CLOSE)
    assert all(workshop.engine.fired[edit] > 0 for edit in row.edits)


@every
def test_a_row_alone_is_the_row_beside_those_of_every_other_method(workshop: Workshop, case: str) -> None:
    for place in range(len(TEXTS)):
        alone = workshop.engine.next_logits([workshop.rows[case, place]])[0]
        torch.testing.assert_close(workshop.next_logits[case, place], alone, atol=CLOSE, rtol=0)
    alone = workshop.engine.token_logprobs([workshop.rows[case, 2]])[0]
    assert len(alone) > 5
    torch.testing.assert_close(workshop.token_logprobs[case, 2], alone, atol=CLOSE, rtol=0)


@every
def test_text_written_with_a_cache_is_what_one_pass_over_it_reads(workshop: Workshop, case: str) -> None:
    for place in range(len(TEXTS)):
        row, written = workshop.rows[case, place], workshop.written[case, place]
        whole = Row(row.tokens + written.tokens, row.n_prompt, row.edits)
        read = workshop.engine.token_logprobs([whole])[0][len(row.tokens) - row.n_prompt :]
        torch.testing.assert_close(torch.tensor(written.logprobs), read, atol=3 * CLOSE, rtol=CLOSE)
    likeliest = oracle.logits(workshop.subject, whole)[len(row.tokens) - 1 : -1].log_softmax(-1).max(-1).values
    torch.testing.assert_close(torch.tensor(written.logprobs), likeliest, atol=1e-4, rtol=CLOSE)
    assert max(len(workshop.written[case, place].tokens) for place in range(len(TEXTS))) == NEW


@pytest.mark.parametrize(
    ("architecture", "case"),
    [
        pytest.param(kind, case, id=f"{kind}-{case}")
        for kind in ARCHITECTURES
        for case, (name, settings) in CASES.items()
        if method(name)(**settings).reads
    ],
)
def test_what_the_engine_has_read_for_others_changes_nothing_but_rounding(workshop: Workshop, case: str) -> None:
    made, state = workshop.fitted(case)
    for name, tensor in made.fit(workshop.engine, data_for(made), 0).tensors.items():
        assert (tensor - state.tensors[name]).norm() <= 1e-4 * tensor.norm()


@pytest.mark.parametrize(("architecture", "name"), [pytest.param(*key, id="-".join(key)) for key in REFUSED])
def test_what_an_architecture_cannot_have_is_refused_with_what_it_has(
    workshop: Workshop, architecture: str, name: str
) -> None:
    settings, place, allowed = REFUSED[architecture, name]
    made = method(name)(**settings)
    before = fingerprint(workshop.subject)
    with pytest.raises(ValueError, match=re.escape(place)) as refusal:
        made.fit(workshop.engine, data_for(made), 0)
    assert allowed in str(refusal.value)
    assert fingerprint(workshop.subject) == before


def digests(workshop: Workshop) -> dict[str, str]:
    """What every method learns, as one number each."""
    found = {}
    for name in METHODS:
        _, state = workshop.fitted(name)
        held = hashlib.sha256(json.dumps(dict(state.facts), sort_keys=True).encode())
        for key, tensor in sorted(state.tensors.items()):
            held.update(key.encode() + tensor.contiguous().numpy().tobytes())
        found[name] = held.hexdigest()
    return found


def test_another_process_learns_the_same(workshops: dict[str, Workshop], tmp_path: Path) -> None:
    code = (
        "import json, sys\nfrom pathlib import Path\nfrom tests.experiments.contract import Workshop\n"
        "from tests.experiments.test_contract import digests\n"
        "print(json.dumps(digests(Workshop(Path(sys.argv[1]), 'llama'))))"
    )
    other = {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, env=os.environ | other
    )
    assert json.loads(ran.stdout) == digests(workshops["llama"])


def pretending(kind: DoseKind, vector: Callable[[float], float]) -> Fitted:
    """A method that declares `kind` and adds a vector of the size that `vector` makes of the dose."""

    class Pretending(Intervention):
        dose_kind: ClassVar[DoseKind] = kind

        def edits(self, state: State, dose: float) -> list[Edit]:
            return [Add(Site("resid", 1), vector(dose) * state.tensors["vector"])]

    return Fitted(Pretending(), State({"vector": torch.linspace(-1, 1, 32)}))


TRUE: dict[DoseKind, Callable[[float], float]] = {
    "signed_linear": lambda dose: dose,
    "signed": lambda dose: dose + 0.3 * dose**2,
    "one_sided": abs,
    "on_off": lambda dose: math.copysign(1, dose),
}
FALSE: list[tuple[DoseKind, Callable[[float], float]]] = [
    ("signed_linear", lambda dose: dose + 1e-4 * abs(dose)),
    ("signed_linear", lambda dose: dose + 0.01 * dose**3),
    ("signed_linear", lambda dose: 0.0),
    ("signed", abs),
    ("signed", lambda dose: max(dose, 0.0)),
    ("one_sided", lambda dose: 1.0),
    ("on_off", lambda dose: dose),
    ("on_off", lambda dose: 1.0),
]


@pytest.mark.parametrize("kind", PROMISES)
def test_a_true_declaration_of_a_dose_passes(kind: DoseKind, workshops: dict[str, Workshop]) -> None:
    PROMISES[kind](workshops["llama"].engine, pretending(kind, TRUE[kind]))


@pytest.mark.parametrize(("kind", "vector"), FALSE)
def test_a_false_declaration_of_a_dose_does_not_pass(
    kind: DoseKind, vector: Callable[[float], float], workshops: dict[str, Workshop]
) -> None:
    with pytest.raises(AssertionError):
        PROMISES[kind](workshops["llama"].engine, pretending(kind, vector))


@pytest.mark.parametrize("name", METHODS)
def test_settings_and_label_are_described(name: str) -> None:
    made = method(name)
    assert made.__doc__
    assert all(field.description for field in made.model_fields.values())
    assert name in SETTINGS or made().label().startswith(name)
    assert default(name).label()
    assert set(made.needs) <= {"pairs", "conversations"}
    assert made.dose_kind in PROMISES


@pytest.mark.parametrize("name", METHODS)
def test_unknown_settings_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        method(name)(**SETTINGS.get(name, {}), no_such_setting=1)
