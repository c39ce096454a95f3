"""Fixtures that many tests share. Everything here is offline, small and made once a session."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before torch is imported: tiny models gain nothing from threads, and threads that spin on a busy machine cost minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from experiments.subject import Subject


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random four-layer Llama with its tokenizer on disk."""
    from tests.tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def tiny_subject(tiny_folder: Path) -> Subject:
    """The subject around `tiny_folder`, in float32. Shared: leave its weights and hooks as you found them."""
    from experiments.spec import SubjectSpec
    from experiments.subject import load

    return load(SubjectSpec(model=str(tiny_folder), dtype="float32"))
