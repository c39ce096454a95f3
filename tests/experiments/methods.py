"""Every method of the folder, ready to be fitted on a tiny subject, and what tests ask of a fitted one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from experiments import plugin
from experiments.dataset import recipe
from experiments.edit import Add, Dense, Edit, LowRank, Project, Prompt, Scale, prompt_of
from experiments.engine import Row
from experiments.intervention import Intervention, method
from experiments.training import read_aloud

if TYPE_CHECKING:
    from experiments.engine import Engine
    from experiments.subject import Subject

METHODS = plugin.names("experiments.interventions")
PAIRS = recipe("persona_pairs")(
    positive="You are a wizard.", negative="You are a clerk.", n=6, responses="shared"
).build(None, 0)
DATA = {"pairs": PAIRS, "conversations": read_aloud(PAIRS)}
SETTINGS: dict[str, dict[str, Any]] = {
    "adopted": {"path": Path(__file__).parents[1] / "data" / "vector.safetensors"},
    "caft": {"wraps": {"method": "bias_set", "epochs": 1}, "direction": {"method": "mean_diff", "layer": 1}},
    "composed": {"parts": [{"method": "mean_diff", "layer": 1}, {"method": "prompt", "dose": 1}]},
    "dct": {"iterations": 3, "radius": 3.0},
    "melbo": {"steps": 10, "radius": 3.0},
    "peft": {"epochs": 1},
    "preventative": {"wraps": {"method": "lora", "epochs": 1}, "direction": {"method": "mean_diff", "layer": 1}},
    "svd_rotation": {"epochs": 1},
}
"""What methods need that mean nothing without, and fewer steps for those that take long; the others run as they are."""
USER = [{"role": "user", "content": "What do you think?"}]


def data_for(made: Intervention) -> Sequence[Any]:
    return DATA[made.needs[0]] if made.needs else []


def default(name: str) -> Intervention:
    return method(name)(**SETTINGS.get(name, {}))


def change(edit: Edit) -> tuple[Any, torch.Tensor]:
    """Where a linear edit acts, and the tensor that it adds there."""
    match edit:
        case Add() | Scale():
            return (type(edit), edit.site), edit.vector
        case Project():
            return edit.site, edit.gain * edit.basis.T @ edit.basis
        case LowRank():
            return edit.module, edit.b @ edit.a
        case Dense():
            return edit.parameter, edit.delta
    raise AssertionError(f"{edit} is not linear in the dose")


def asked(subject: Subject, edits: Sequence[Edit], text: str = USER[0]["content"], said: str = "") -> Row:
    """The subject asked `text` under `edits`, a prompt among them put in force, having `said` something already."""
    prompt = prompt_of(edits)
    messages = [{"role": "user", "content": text}, *([{"role": "assistant", "content": said}] if said else [])]
    rendered = subject.render(messages, system=prompt.system if prompt else None)
    return Row(rendered.tokens, rendered.n_prompt, tuple(edit for edit in edits if not isinstance(edit, Prompt)))


def logits(engine: Engine, edits: Sequence[Edit]) -> torch.Tensor:
    """Of the token behind `USER` under `edits`, [vocabulary]."""
    return engine.next_logits([asked(engine.subject, edits)])[0]


def fingerprint(subject: Subject) -> list[Any]:
    """Everything a fit could leave behind in a model."""
    weights = hashlib.sha256()
    for value in subject.model.state_dict().values():
        weights.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    modules = [
        (name, id(module), module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in subject.model.named_modules()
    ]
    flags = [
        (name, parameter.requires_grad, parameter.grad is None) for name, parameter in subject.model.named_parameters()
    ]
    attends = subject.model.config._attn_implementation
    return [weights.hexdigest(), modules, flags, sorted(vars(subject.model)), attends]
