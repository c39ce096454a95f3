"""An intervention as a plain checkpoint: the subject's folder with the edits in its weights, for any program to load.

`folding.py` says what each edit is as parameters, `biases.py` where they find a place: where the model has no bias for
one, its config may switch biases on (Llama, Qwen 3, Gemma), or the same model can be written as a Llama (Qwen 2 and
Mistral are Llamas with and without biases of q, k and v). What has no place is refused with what to do. Before a folder
gets its name, its logits are compared with the engine's.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from experiments.biases import empty, place_for
from experiments.edit import Edit, Prompt, prompt_of
from experiments.engine import Row
from experiments.folding import BakeError, Draft, fold
from experiments.output import whole

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.engine import Engine
    from experiments.subject import Subject

__all__ = ["BakeError", "Baked", "bake"]

FACTS = "orch.json"
TOLERANCE = 1e-5
"""Largest difference of logits in float32, as a share of the largest logit: what the order of sums explains."""
MOST_LOST = 0.25
"""Largest share of the edits' effect that storing in the subject's dtype may cost."""
CONVERSATIONS = (
    "What do you think of honesty?",
    "Name three animals, and say which one you would like to be.",
    "Translate into French: the train leaves at seven, and nobody is on it.",
)
TEXT = "The harbour was quiet in the morning, and the boats lay still."


@dataclass(frozen=True)
class Baked:
    """What was written, and how well it agrees with the engine."""

    folder: Path
    architecture: str
    difference: float
    """Largest difference of a logit between the folder, loaded by transformers, and the engine with the edits, where
    both compute in float32 and nothing was rounded to the subject's dtype yet: whether the edits went to the right
    places. In half precision two ways to compute the same model differ by whole logits, which would hide a mistake."""
    tolerance: float
    effect: float
    """Largest change of a logit that the edits make."""
    lost: float
    """What storing in the subject's dtype costs: the root mean square of the logits' change by it, as a share of that
    by the edits. 0 in float32."""
    rounding: float
    """Largest share of a parameter's own change that is lost as it is stored, |stored - sum| / |change|."""
    rounded: str
    """That parameter."""
    notes: tuple[str, ...] = ()


def bake(engine: Engine, edits: Sequence[Edit], folder: Path, facts: Mapping[str, Any] | None = None) -> Baked:
    """Write the subject with `edits` in it to `folder`: safetensors, config, tokenizer, chat template, `orch.json`.

    `facts` (JSON-able) say where it comes from. Nothing is left at `folder` unless all went well. For a subject in half
    precision float32 copies of it are made, one after the other, and one is written beside `folder` for a while. Raises
    BakeError for edits that a checkpoint cannot hold and for logits that differ, OutputError for a folder that exists.
    """
    subject = engine.subject
    prompt = _system(edits)
    draft = fold(subject, edits)
    config, notes = place_for(subject, draft)
    with whole(folder) as work:
        rounding, rounded, architecture = _write(subject, draft, config, work, subject.dtype)
        notes += _write_tokenizer(subject, prompt, work)
        rows = _rows(subject, prompt, work)
        expected, effect, size = _expected(engine, edits, rows)
        with _unrounded(subject, draft, config, work) as exact:
            difference = (_logits(exact, rows, subject) - expected).abs().max().item()
        lost = 0.0
        if subject.dtype != torch.float32 and effect.any():
            lost = ((_logits(work, rows, subject) - expected).norm() / effect.norm()).item()
        found = difference, TOLERANCE * max(1.0, size), effect.abs().max().item(), lost
        baked = Baked(folder, architecture, *found, rounding, rounded, tuple(notes))
        _require_equal(baked)
        content = {**(facts or {}), **asdict(baked), "folder": folder.name}
        (work / FACTS).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return baked


def _system(edits: Sequence[Edit]) -> Prompt | None:
    """The prompt among the edits. Raises BakeError for a prefix of the user's own words."""
    prompt = prompt_of(edits)
    if prompt is not None and prompt.prefix:
        raise BakeError(
            f"a prefix of the first user message ({prompt.prefix!r}) belongs to the user's text, not to a model; put "
            "it into the text that you send, or use a system prompt"
        )
    return prompt


# writing


def _write(subject: Subject, draft: Draft, config: Any, folder: Path, dtype: torch.dtype) -> tuple[float, str, str]:
    """Config and weights. Gives the largest share of a change lost to rounding, whose it is, and the architecture."""
    model = empty(config)
    old = {name: value.detach().cpu() for name, value in subject.model.state_dict().items()}
    state: dict[str, Tensor] = {}
    worst, whose = 0.0, ""
    for name, like in model.state_dict().items():
        if name in draft.changed:
            total = draft.changed[name]
            stored = state[name] = total.to(dtype).contiguous()
            change = (total - old[name].float() if name in old else total).norm().item()
            lost = (stored.float() - total).norm().item() / change if change else 0.0
            worst, whose = max((worst, whose), (lost, name))
        else:
            state[name] = (old[name] if name in old else torch.zeros(like.shape)).to(dtype)
    if config.tie_word_embeddings:
        names = {id(module): name for name, module in model.named_modules()}
        head, first = (names[id(module)] for module in (model.get_output_embeddings(), model.get_input_embeddings()))
        state[f"{head}.weight"] = state[f"{first}.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.generation_config = copy.deepcopy(subject.model.generation_config)
    model.config.dtype = dtype
    with _quietly():
        model.save_pretrained(folder)
    return worst, whose, type(model).__name__


def _write_tokenizer(subject: Subject, prompt: Prompt | None, folder: Path) -> list[str]:
    """The tokenizer with the chat template in force; system prompts go into the template."""
    tokenizer = copy.deepcopy(subject.tokenizer)
    system = None if prompt is None else prompt.system
    tokenizer.chat_template = with_system(subject.template, system, subject.spec.system)
    tokenizer.save_pretrained(folder)
    if system is not None:
        return ["the system prompt is in the chat template, in place of any other; text that is not a chat lacks it"]
    return [] if subject.spec.system is None else ["the subject's system prompt is in the chat template"]


def with_system(template: str, always: str | None, default: str | None) -> str:
    """A chat template whose conversations begin with the system message `always`, or with `default` if they have none.

    A variable tag ends the addition, because the newline behind a block tag would be dropped.
    """
    has = "(messages and messages[0]['role'] == 'system')"
    if always is not None:
        first = f"{{'role': 'system', 'content': {always!a}}}"
        return f"{{% set messages = [{first}] + (messages[1:] if {has} else messages) %}}{{{{ '' }}}}{template}"
    if default is not None:
        first = f"{{'role': 'system', 'content': {default!a}}}"
        return f"{{% if not {has} %}}{{% set messages = [{first}] + messages %}}{{% endif %}}{{{{ '' }}}}{template}"
    return template


# comparing


def _rows(subject: Subject, prompt: Prompt | None, folder: Path) -> list[Row]:
    """A few texts. Raises BakeError where the folder's chat template says something else than the subject."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    rows = [Row(*subject.render_text(TEXT))]
    for text in CONVERSATIONS:
        messages = [{"role": "user", "content": text}]
        row = Row(*subject.render(messages, system=None if prompt is None else prompt.system))
        said = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        if tuple(tokenizer(said, add_special_tokens=False)["input_ids"]) != row.tokens:
            raise BakeError(f"the folder's chat template renders {text!r} unlike the subject's; keep the trial")
        rows.append(row)
    return rows


def _expected(engine: Engine, edits: Sequence[Edit], rows: Sequence[Row]) -> tuple[Tensor, Tensor, float]:
    """Logits [tokens, vocabulary] with the edits, what the edits change of them, and the largest; in float32."""
    subject = engine.subject
    if subject.dtype != torch.float32:
        model = copy.deepcopy(subject.model).float()
        subject = type(subject)(subject.spec, model, subject.tokenizer, subject.template, subject.identity)
        engine = type(engine)(subject, engine.max_tokens)
    inside = tuple(edit for edit in edits if not isinstance(edit, Prompt))
    begun = [(row.tokens[:end], min(end, row.n_prompt)) for row in rows for end in range(1, len(row.tokens) + 1)]
    found, base = (engine.next_logits([Row(*each, held) for each in begun]) for held in (inside, ()))
    return found, found - base, found.abs().max().item()


@contextmanager
def _unrounded(subject: Subject, draft: Draft, config: Any, folder: Path) -> Iterator[Path]:
    """The folder with float32 weights: itself, or one inside it that goes away."""
    if subject.dtype == torch.float32:
        yield folder
        return
    exact = folder / "float32"
    _write(subject, draft, config, exact, torch.float32)
    yield exact
    shutil.rmtree(exact)


def _logits(folder: Path, rows: Sequence[Row], subject: Subject) -> Tensor:
    """Logits [tokens, vocabulary] of the model in `folder`, computed by transformers in float32 and row by row.

    Attention is the eager one: the default leaves out Gemma 2's soft cap, which the engine computes.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"local_files_only": True, "attn_implementation": "eager", "dtype": torch.float32}
    with _quietly(), torch.no_grad():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
        model.eval().to(subject.device)
        tokens = [torch.tensor([row.tokens], device=subject.device) for row in rows]
        return torch.cat([model(each, use_cache=False).logits[0].cpu() for each in tokens])


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' progress bars: the output is read by people and programs."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _require_equal(baked: Baked) -> None:
    """Raise BakeError where the folder does not do what the engine does."""
    if not baked.difference <= baked.tolerance:  # also where it is not a number
        raise BakeError(
            f"the baked model's logits differ from the engine's by {baked.difference:.3g} in float32, more than the "
            f"{baked.tolerance:.3g} that the order of sums explains (the edits move logits by {baked.effect:.3g}); "
            "nothing was written; keep the trial, and report this: the edits went to a wrong place"
        )
    if not baked.lost <= MOST_LOST:
        raise BakeError(
            f"storing the sum in the subject's dtype loses {baked.lost:.0%} of what the edits do (allowed "
            f"{MOST_LOST:.0%}; {baked.rounding:.0%} of the change of {baked.rounded}): they are too small beside the "
            "weights; nothing was written; take a larger dose, export the adapter (`orch export`), or fit and bake "
            "with dtype: float32"
        )
