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


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What models behind an API reply is kept for this test alone."""
    monkeypatch.setenv("INSPECT_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def local_api(own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`openai-api/local/...` has the key it wants; where it is, LOCAL_BASE_URL, is for the test's server to say."""
    monkeypatch.setenv("LOCAL_API_KEY", "none")


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
