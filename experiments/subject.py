"""A subject: a causal LM with its tokenizer, chat template and named sites.

Importing this module imports neither torch nor transformers, because planning calls `identify` and must be quick.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from experiments import chat
from experiments.architecture import Architecture, SitePoint
from experiments.dataset import Message
from experiments.edit import Site
from experiments.files import SubjectError
from experiments.heap import keep_freed
from experiments.identity import identify, model_folder, resolve_dtype, template_text
from experiments.outline import REMEDY, check_files, outline
from experiments.parts import DIGITS
from experiments.spec import EMBEDDED, SubjectSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["KEEP", "Rendered", "Subject", "SubjectError", "identify", "load", "resolve_dtype"]

KEEP: Final = None
"""For `render(system=...)`: leave the system message as the messages and the spec have it."""

END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>")
"""Tokens that end an assistant's turn wherever a vocabulary has them as special tokens."""


class Rendered(NamedTuple):
    """Token ids, of which the first `n_prompt` are the prompt and the others what the assistant said."""

    tokens: tuple[int, ...]
    n_prompt: int


class Subject:
    """A loaded model in eval mode whose parameters take no gradient. Make one with `load`."""

    def __init__(self, spec: SubjectSpec, model: Any, tokenizer: Any, template: str, identity: dict[str, Any]) -> None:
        self.spec = spec
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        self.identity = identity
        self.architecture = Architecture(model)
        self.body: nn.Module = self.architecture.body
        self.blocks: list[nn.Module] = self.architecture.blocks
        self.n_layers = len(self.blocks)
        self.d_model = self.architecture.d_model
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device

    def point(self, site: Site) -> SitePoint:
        """Module and part of its output where `site` is. Raises SubjectError when there is no such site."""
        return self.architecture.point(site)

    def layer(self, name: str) -> int:
        """Decoder layer of a dotted module or parameter name; -1 for embeddings, `n_layers` for final norm and head."""
        return self.architecture.layer(name)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] in float32 of the body's last hidden states [..., d]."""
        return self.architecture.head(hidden)

    def render(
        self,
        messages: Sequence[Mapping[str, str] | Message],
        system: str | None = KEEP,
        prefix: str = "",
    ) -> Rendered:
        """Tokens of a conversation, open for the assistant to speak.

        A trailing assistant message is a prefill: it follows the generation header as it stands, whitespace included,
        and stays open. `system` replaces or sets the system message; without it the spec's own is set where the
        messages have none. `prefix` goes before the text of the first user message. The whole is tokenised as one text;
        a token that spans the border of prompt and prefill counts as prefill, so that all of the response is scored.
        Raises SubjectError for conversations that cannot be rendered.
        """
        prompt, prefill = self._texts(messages, system, prefix)
        tokens = self._encode(prompt + prefill)
        if not prefill:
            return Rendered(tokens, len(tokens))
        return Rendered(tokens, _common_prefix(tokens, self._encode(prompt)))

    def spans(
        self, messages: Sequence[Mapping[str, str] | Message], system: str | None = KEEP
    ) -> list[tuple[int, int]]:
        """(first character, character behind the last) of the trailing assistant message that each of its tokens holds.

        One for each token that `render` has behind the prompt. They leave no character out: white space that a
        tokenizer leaves out of its own count belongs to the token behind it. Tokens that are bytes of one character all
        hold it. Raises SubjectError for a tokenizer that cannot tell.
        """
        if not self.tokenizer.is_fast:
            raise SubjectError(
                f"the tokenizer {type(self.tokenizer).__name__} does not tell which characters a token holds, which "
                "masks ask for; give a subject with a tokenizer.json"
            )
        prompt, said = self._texts(messages, system, "")
        if not said:
            return []
        read = self.tokenizer(prompt + said, add_special_tokens=False, return_offsets_mapping=True)
        first = _common_prefix(read["input_ids"], self._encode(prompt))
        found: list[tuple[int, int]] = []
        end = 0
        for start, stop in read["offset_mapping"][first:]:
            found.append((max(0, min(start - len(prompt), end)), max(stop - len(prompt), end)))
            end = found[-1][1]
        return [*found[:-1], *((start, len(said)) for start, _ in found[-1:])]

    def _texts(
        self, messages: Sequence[Mapping[str, str] | Message], system: str | None, prefix: str
    ) -> tuple[str, str]:
        """The rendered prompt, and the text of a trailing assistant message."""
        turns = self._turns(messages, system, prefix)
        prefill = turns.pop()["content"] if turns[-1]["role"] == "assistant" else ""
        if not turns:
            raise SubjectError("the conversation is one assistant message; a user message must come before it")
        return chat.render(self.template, turns, _specials(self.tokenizer)), prefill

    def render_text(self, text: str) -> Rendered:
        """Tokens of raw text, with the tokenizer's own first token if it sets one.

        The first token is the prompt, since nothing predicts it. Raises SubjectError for text of fewer than two tokens.
        """
        tokens = tuple(self.tokenizer(text)["input_ids"])
        if len(tokens) > 1 and tokens[0] == tokens[1] == self.tokenizer.bos_token_id:
            tokens = tokens[1:]
        if len(tokens) < 2:
            raise SubjectError(f"text {text!r} has {len(tokens)} tokens; at least 2 are needed to score one")
        return Rendered(tokens, 1)

    def _turns(
        self, messages: Sequence[Mapping[str, str] | Message], system: str | None, prefix: str
    ) -> list[dict[str, str]]:
        turns = [message.model_dump() if isinstance(message, Message) else dict(message) for message in messages]
        if not turns:
            raise SubjectError("an empty conversation; at least one message is needed")
        has_system = turns[0]["role"] == "system"
        if system is not KEEP:
            turns = [{"role": "system", "content": system}, *turns[has_system:]]
        elif self.spec.system is not None and not has_system:
            turns = [{"role": "system", "content": self.spec.system}, *turns]
        if prefix:
            users = [turn for turn in turns if turn["role"] == "user"]
            if not users:
                raise SubjectError(f"no user message to put the prefix {prefix!r} before; add one")
            users[0]["content"] = prefix + users[0]["content"]
        return turns

    def _encode(self, text: str) -> tuple[int, ...]:
        """Tokens of rendered text: the template has already written every special token."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: those of the generation config and the tokenizer, and known end-of-turn tokens."""
        configured = self.model.generation_config.eos_token_id
        found = set(configured) if isinstance(configured, (list, tuple)) else {configured}
        found.add(self.tokenizer.eos_token_id)
        added = self.tokenizer.get_added_vocab()
        found.update(added[token] for token in END_OF_TURN if token in added)
        return tuple(sorted(token for token in found if token is not None))

    def exact_ids(self, words: Iterable[str]) -> tuple[int, ...]:
        """All tokens that say one of `words` and no more than whitespace and punctuation around it. Case counts.

        Raises ValueError for a word that begins or ends with whitespace or punctuation: nothing could ever match it.
        """
        found: set[int] = set()
        for word in words:
            if not word or _core(word) != word:
                raise ValueError(
                    f"word {word!r} is empty or has whitespace or punctuation at an end; give the bare word"
                )
            found.update(self._cores.get(word, ()))
        return tuple(sorted(found))

    @cached_property
    def _cores(self) -> dict[str, list[int]]:
        special = set(self.tokenizer.all_special_ids)
        ids = [token for token in range(len(self.tokenizer)) if token not in special]
        cores: dict[str, list[int]] = {}
        for token, text in zip(ids, self.tokenizer.batch_decode([[token] for token in ids]), strict=True):
            cores.setdefault(_core(text), []).append(token)
        return cores


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(left), len(right)))


def _core(text: str) -> str:
    """`text` without whitespace and punctuation at its ends. A sign or point before a digit stays: -1 is not 1."""
    left, right = 0, len(text)
    while left < right and _is_edge(text[left]):
        left += 1
    while right > left and _is_edge(text[right - 1]):
        right -= 1
    if left and text[left : left + 1].isdigit() and text[left - 1] in "+-.,−":
        left -= 1
    return text[left:right]


def _is_edge(character: str) -> bool:
    return character.isspace() or character in "▁Ġ`" or unicodedata.category(character).startswith("P")


def _specials(tokenizer: Any) -> dict[str, str]:
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name.endswith("_token")}


def load(spec: SubjectSpec, device: str | None = None) -> Subject:
    """Load the model that `spec` names, on `device` (default: the GPU if there is one, else the CPU).

    On a CPU the process keeps freed memory from then on (`experiments/heap.py`). Raises SubjectError for whatever is
    wrong with the model: not found, damaged, incomplete, of unknown layout, without a chat template.
    """
    import torch

    gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    identity = identify(spec, gpu)
    outline(spec)
    folder = model_folder(spec, weights=spec.drawn is None)
    made = spec.model in (EMBEDDED, DIGITS)
    remedy = f"delete the folder {folder}: it is made again" if made else REMEDY
    weights = spec.drawn is not None or any(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not weights:
        raise SubjectError(f"{folder} lacks config.json or *.safetensors; {remedy}")
    check_files(folder, remedy)
    if not gpu:
        keep_freed()
    model, tokenizer = _read(folder, identity["dtype"], spec.drawn)
    template = template_text(spec, chat.choose(tokenizer.chat_template))
    model.eval().requires_grad_(False).to(device or ("cuda" if gpu else "cpu"))
    return Subject(spec, model, tokenizer, template, identity)


def _read(folder: Path, dtype: str, drawn: int | None) -> tuple[Any, Any]:
    """Model and tokenizer of a folder, with the folder's weights or those `drawn` with a seed.

    Raises SubjectError if transformers cannot load it, or would invent weights that nobody asked to have drawn.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a sweep loads many times, and its output is read by people
    try:
        model, missing = _stored(folder, dtype) if drawn is None else (_drawn(folder, dtype, drawn), [])
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and its parsers raise anything for a bad folder
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SubjectError(
            f"{folder} cannot be loaded as a causal language model ({first}); save or fetch it again"
        ) from error
    finally:
        if shown:
            logging.enable_progress_bar()
    if missing:
        raise SubjectError(
            f"{folder}: the weights lack {len(missing)} tensors, {missing[0]!r} first; they would be random; "
            f"save or fetch the model again"
        )
    return model, tokenizer


def _stored(folder: Path, dtype: str) -> tuple[Any, list[str]]:
    """The model with the folder's weights, and the names of those it lacks."""
    import torch
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "use_safetensors": True, "local_files_only": True}
    model: Any
    report: dict[str, Any]
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)  # type: ignore[misc]
    return model, sorted(report["missing_keys"])


def _drawn(folder: Path, dtype: str, seed: int) -> Any:
    """A model that was never trained: the architecture's own initialisation, drawn in float32 whatever the dtype."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.to(getattr(torch, dtype))
