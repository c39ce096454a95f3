"""Experiment: the question, the subject, the grid."""

from __future__ import annotations

from typing import Literal

from experiments.plugin import Frozen

EMBEDDED = "smollm2-135m-instruct"


class SubjectSpec(Frozen):
    """Which language model, and in which chat context it is met."""

    model: str
    """Embedded name (`smollm2-135m-instruct`), hub id (`org/name`) or a local folder."""
    revision: str | None = None
    """Hub revision; pin a commit, so that the result has one meaning."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto` takes what the processor is good at; the choice is recorded and enters the key."""
    system: str | None = None
    """System prompt of every conversation; null leaves the chat template's own default in force."""
    chat_template: str | None = None
    """Path of a Jinja file that replaces the model's chat template (base models have none)."""
