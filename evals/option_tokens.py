"""Which token sequences say an option."""

from __future__ import annotations

import json
import weakref
from typing import TYPE_CHECKING

from evals.collector import OptionTokens

if TYPE_CHECKING:
    from experiments.subject import Subject

_KNOWN: weakref.WeakKeyDictionary[Subject, dict[tuple[str, str], OptionTokens]] = weakref.WeakKeyDictionary()


class ProviderError(ValueError):
    """A request that `orch/...` cannot answer, or a key nobody registered."""


def option_tokens(
    subject: Subject, options: dict[str, dict[str, list[str]]], messages: list[dict[str, str]]
) -> OptionTokens:
    """Token sequences of every option, no sequence of an option extending another of it (its probability is counted
    already).

    Raises ProviderError for options that no token sequence can tell apart.
    """
    prefill = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
    cached = (json.dumps(options, sort_keys=True), prefill)
    known = _KNOWN.setdefault(subject, {})
    if cached not in known:
        found: dict[str, tuple[tuple[int, ...], ...]] = {}
        for name, spec in options.items():
            sequences: set[tuple[int, ...]] = {(token,) for token in subject.exact_ids(spec.get("exact", ()))}
            sequences |= {continuation(subject, messages, text) for text in spec.get("text", ())}
            if not sequences:
                raise ProviderError(
                    f"option {name!r} = {spec}: no token reads so; give other spellings under 'exact', or use 'text'"
                )
            found[name] = tuple(sorted(s for s in sequences if not any(extends(s, other) for other in sequences)))
        check_distinct(found)
        known[cached] = found
    return known[cached]


def continuation(subject: Subject, messages: list[dict[str, str]], text: str) -> tuple[int, ...]:
    """The tokens that `text` adds after the open assistant turn. Raises ProviderError when it would merge with what
    is there."""
    is_open = messages[-1]["role"] == "assistant"
    prefill = messages[-1]["content"] if is_open else ""
    before = subject.render(messages).tokens
    turns = messages[:-1] if is_open else messages
    after = subject.render([*turns, {"role": "assistant", "content": prefill + text}]).tokens
    if after[: len(before)] != before or len(after) == len(before):
        raise ProviderError(
            f"option text {text!r} merges with the words before it ({prefill[-20:]!r}) into one token; "
            "start it with a space"
        )
    return after[len(before) :]


def extends(longer: tuple[int, ...], shorter: tuple[int, ...]) -> bool:
    """Whether `longer` starts with `shorter` and goes on."""
    return len(longer) > len(shorter) and longer[: len(shorter)] == shorter


def check_distinct(found: OptionTokens) -> None:
    """Raises ProviderError when a sequence of one option is, or starts with, a sequence of another."""
    for name, sequences in found.items():
        for other, others in found.items():
            clash = name != other and any(a == b or extends(a, b) for a in sequences for b in others)
            if clash:
                raise ProviderError(f"options {name!r} and {other!r} start with the same tokens; leave one of them out")
