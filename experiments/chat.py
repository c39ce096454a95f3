"""Chat templates: find one on disk, and render a conversation with it the same way today and next year.

Rendering is done here and not by the tokenizer for two reasons: planning needs it without importing transformers, and a
template that prints today's date must not give a new result every day, so the clock that templates see stands still.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.environment import Template
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from experiments.files import SubjectError

TODAY = datetime.datetime(2024, 7, 26, tzinfo=datetime.UTC)
"""The only day templates know; the one that Llama 3 templates fall back on."""

HINT = "set `subject: {model: ..., chat_template: file.jinja}`"


class _Generation(Extension):
    """The `{% generation %}` block of training templates: it marks the assistant's words and prints them unchanged."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON without jinja's own escaping of HTML characters."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


@lru_cache(maxsize=16)
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = TODAY.strftime
    return environment.from_string(template)


def render(template: str, messages: Sequence[Mapping[str, str]], specials: Mapping[str, str]) -> str:
    """Text of a conversation up to and including the header of the assistant's next turn.

    `specials` are `bos_token` and the like, which templates print. Raises SubjectError with the template's complaint.
    """
    try:
        return _compiled(template).render(
            messages=list(messages), tools=None, documents=None, add_generation_prompt=True, **specials
        )
    except Exception as error:  # a template is a program, and may fail in any way
        roles = ", ".join(message["role"] for message in messages)
        raise SubjectError(
            f"the chat template cannot render a conversation of roles [{roles}]: {error}; give it the roles it knows "
            f"(a template without a system role needs `system: null`), or another template: {HINT}"
        ) from error


def template_of(folder: Path) -> str | None:
    """The chat template in a model folder: `chat_template.jinja`, else that of `tokenizer_config.json`, else None."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return read_template(file)
    return choose(_tokenizer_config(folder).get("chat_template"))


def choose(found: Any) -> str | None:
    """One template out of what a tokenizer may hold: a text, named texts (the one called default), or nothing."""
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    if isinstance(found, dict):
        found = found.get("default")
    return found if isinstance(found, str) else None


def read_template(path: Path) -> str:
    """A template file. Raises SubjectError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8: {error.reason} at byte {error.start}"
        raise SubjectError(
            f"chat_template {str(path)!r} cannot be read ({reason}); give the path of a Jinja file in UTF-8"
        ) from error


def specials_of(folder: Path) -> dict[str, str]:
    """`bos_token`, `eos_token` and the like of a model folder, by their names."""
    config = _tokenizer_config(folder)
    named = {key: value for key, value in config.items() if key.endswith("_token")}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SubjectError(f"{file} is not JSON ({error}); fetch or save the tokenizer again") from error
    return config if isinstance(config, dict) else {}
