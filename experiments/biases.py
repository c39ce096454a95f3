"""A config of the same model with a place for every bias: its own, with biases switched on, or that of a Llama."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from experiments.folding import BakeError

if TYPE_CHECKING:
    from experiments.folding import Draft
    from experiments.subject import Subject

SWITCHES = ("mlp_bias", "attention_bias")
"""Settings of a model's config that give biases to its linear modules."""


def place_for(subject: Subject, draft: Draft) -> tuple[Any, list[str]]:
    """A config of a model that has a place for every parameter, and what was changed for that.

    Raises BakeError with the biases that are missing.
    """
    present = set(subject.model.state_dict())
    wanted = present | set(draft.changed)
    for config, notes in _candidates(subject, draft):
        names = set(empty(config).state_dict())
        if wanted <= names and all(name.endswith(".bias") for name in names - wanted):
            return config, notes
    kinds = sorted({name.rpartition(".bias")[0].rpartition(".")[2] for name in draft.new})
    kind = subject.model.config.model_type
    raise BakeError(
        f"{type(subject.model).__name__} ({kind}) has no bias for {', '.join(kinds)}, which {len(draft.new)} of the "
        f"edits need, and no setting of its config gives it one ({_others(kind)}); train `lora` and merge that, export "
        "the vector (`orch export`) for a program that adds it as it runs, or keep the trial as it is"
    )


def _others(kind: str) -> str:
    if kind in ("qwen2", "mistral"):
        return "as a Llama it would, but its sliding window has no place there"
    return "q, k, v, o can have one by attention_bias" if kind not in ("gpt2", "gpt_neox") else "all others have one"


def _candidates(subject: Subject, draft: Draft) -> Iterator[tuple[Any, list[str]]]:
    """Configs from the subject's own to those that differ most."""
    own = copy.deepcopy(subject.model.config)
    common = []
    if draft.untied:
        own.tie_word_embeddings = False
        common = ["the head no longer shares the embedding's matrix"]
    yield own, common
    bases = [(own, common)]
    if (llama := _as_llama(own)) is not None:
        bases.append((llama, [*common, f"written as a Llama, which computes the same as {own.model_type}"]))
        yield bases[1]
    for base, said in bases:
        off = [switch for switch in SWITCHES if getattr(base, switch, None) is False]
        for chosen in [[switch] for switch in off] + ([off] if len(off) > 1 else []):
            config = copy.deepcopy(base)
            for switch in chosen:
                setattr(config, switch, True)
            notes = [*said, f"{' and '.join(chosen)} switched on; biases without an edit are zero"]
            if base.model_type == "qwen3":
                notes.append("vLLM's Qwen 3 has no bias of o_proj and will not load this; transformers does")
            yield config, notes


def _as_llama(config: Any) -> Any | None:
    """The config of a Llama that computes the same, for the families of which there is one."""
    from transformers import LlamaConfig

    if config.model_type not in ("qwen2", "mistral"):
        return None
    window = config.sliding_window
    if window is not None and window < config.max_position_embeddings:
        return None
    given = config.to_dict()
    shared = {name: given[name] for name in LlamaConfig().to_dict() if name in given}
    for name in ("model_type", "architectures", "transformers_version"):
        shared.pop(name, None)
    return LlamaConfig(**shared, attention_bias=config.model_type == "qwen2")


def empty(config: Any) -> Any:
    """A model of `config` without storage."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
