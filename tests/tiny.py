"""Tiny random language models, written to disk the way a real one is, so that tests load them by path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 400  # at most: training stops where the words run out
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>")
WORDS = (
    "Yes", "yes", "YES", "No", "no", "NO", "A", "B", " A", " B", " owl", " cat", " dog", " eagle", "owl", " yes", " no",
    "user", "assistant", "system", " animal", " favorite", " the", " is", " you", " You", "You", "My",
)  # fmt: skip
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_WITH_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are tiny.<|im_end|>\n' }}{% endif %}" + CHATML
)
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox")


def make_tiny_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of some 350 ids in which every one of `WORDS` is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    filler = "the quick owl and the lazy dog were asked what animal they would like to be"
    tokenizer.train_from_iterator([word for word in WORDS for _ in range(50)] + [filler] * 20, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<pad>",
    )
    fast.chat_template = chat_template
    return fast


def tiny_config(architecture: str, vocabulary: int = VOCABULARY, layers: int = 4, **overrides: Any) -> Any:
    """Config of `architecture` with 4 layers, width 32, 4 heads and (where there are such) 2 key-value heads."""
    common: dict[str, Any] = {"vocab_size": vocabulary, "initializer_range": 0.15, "bos_token_id": 1}
    common |= {"eos_token_id": 2, "pad_token_id": 3}
    if architecture == "gpt2":
        sizes: dict[str, Any] = {"n_layer": layers, "n_embd": 32, "n_head": 4, "n_positions": 512}
    else:
        sizes = {
            "num_hidden_layers": layers,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
        }
    if architecture not in ("gpt2", "gpt_neox"):
        sizes |= {"num_key_value_heads": 2, "head_dim": 8}
    if architecture in ("gemma2", "gemma3_text"):
        kinds = ["sliding_attention", "full_attention"]
        sizes |= {"query_pre_attn_scalar": 8, "sliding_window": 16, "layer_types": (kinds * layers)[:layers]}
    return AutoConfig.for_model(architecture, **common | sizes | overrides)


def make_tiny_model(
    folder: Path,
    architecture: str = "llama",
    *,
    seed: int = 0,
    layers: int = 4,
    chat_template: str | None = CHATML,
    **overrides: Any,
) -> Path:
    """Write a random model of `architecture` (float32 safetensors) with its tokenizer to `folder`, and return `folder`.

    Biases and norm weights are random too, so that a test which ignores them fails. `overrides` go to the config.
    """
    tokenizer = make_tiny_tokenizer(chat_template)
    config = tiny_config(architecture, len(tokenizer), layers, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
