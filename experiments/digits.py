"""The embedded subject for small images: a transformer of one layer, never trained, that reads 8x8 digits as text.

It is there for one experiment whose outcome is known: a student that learns a teacher's extra answers to noise comes to
read digits if both began from the same weights, and not otherwise (Cloud et al. 2025, section 6 of
https://arxiv.org/abs/2507.14805, with a perceptron on MNIST). An image is four lines of four block characters, each two
by two pixels; every character is one token, every other text is read byte by byte. Nothing is downloaded: the folder
holds a config and a tokenizer, and weights are drawn when it is loaded (`SubjectSpec.init`).

Wider weights than is usual for language models (0.1 instead of 0.02) make the untrained answers differ enough to be
told apart by a frozen head: with 0.02 a teacher's own accuracy stayed at 70 to 87 %.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import files
from experiments.parts import DIGITS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BLOCKS = "░▘▝▀▖▌▞▛▗▚▐▜▄▙▟█"
"""Block characters by the four pixels they show: 1 upper left, 2 upper right, 4 lower left, 8 lower right."""
SIDE = 4
"""Characters in a line, and lines in an image."""
LABELS = tuple("0123456789")
INK = 8
"""A pixel of 0 to 16 is ink from here on."""
END = "<|end|>"
HELD_OUT = 360
"""Images that no recipe teaches, of 1,797: they are for the eval."""

_BYTES = 256
_VOCABULARY = _BYTES + len(BLOCKS) + 1
_END_ID = _VOCABULARY - 1
_ENDS = {"bos_token_id": _END_ID, "eos_token_id": _END_ID}
CONFIG: dict[str, Any] = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": _VOCABULARY,
    "n_positions": 512,
    "n_embd": 64,
    "n_inner": 256,
    "n_layer": 1,
    "n_head": 4,
    "initializer_range": 0.1,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "tie_word_embeddings": False,
    "dtype": "float32",
    **_ENDS,
}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}" + END + "{% endfor %}"
INSTALL = "pip install scikit-learn"


class DigitsError(ValueError):
    """The images cannot be had: what is missing, and what to run."""


@dataclass(frozen=True)
class Image:
    """One handwritten digit."""

    index: int
    """Its place in scikit-learn's bundled set."""
    text: str
    """Four lines of four block characters."""
    label: str
    """The digit that was written."""


def identity() -> dict[str, Any]:
    """What fixes the subject but for its weights' seed: config, chat template and vocabulary."""
    return {"model": DIGITS, "digits_sha256": _digest()}


def _digest() -> str:
    return files.digest_text(json.dumps([CONFIG, TEMPLATE, BLOCKS, END], sort_keys=True))


def folder() -> Path:
    """Config, tokenizer and chat template, written on first use; safe when several processes ask at once."""
    return files.publish(files.cache_folder() / f"{DIGITS}-{_digest()[:16]}", _write)


def _write(target: Path) -> None:
    specials = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END)
    own = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONFIG["n_positions"],
        "clean_up_tokenization_spaces": False,
    }
    written = {"config": CONFIG, "generation_config": _ENDS, "tokenizer_config": {**own, **specials}}
    for name, content in written.items():
        (target / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (target / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    _tokenizer().save(str(target / "tokenizer.json"))


def _tokenizer() -> Tokenizer:
    """Bytes, and the block characters as tokens of their own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(block, normalized=False) for block in BLOCKS])
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return tokenizer


def drawn(blocks: Sequence[int]) -> str:
    """The text of an image whose characters have these places in `BLOCKS`, line after line from the top."""
    lines = (blocks[start : start + SIDE] for start in range(0, len(blocks), SIDE))
    return "\n".join("".join(BLOCKS[each] for each in line) for line in lines)


def images(held_out: bool) -> list[Image]:
    """The images that are held out for the eval, or all others, in an order in which every cut is a fair sample.

    Raises DigitsError without scikit-learn, which brings them along.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DigitsError(
            f"the images of digits come with scikit-learn, which is not installed ({error}); run: {INSTALL} "
            "(it is among the dev extras)"
        ) from error
    bundled = load_digits()
    ink = (bundled.images >= INK).reshape(-1, SIDE, 2, SIDE, 2)  # image, line, row, character, column
    blocks = ink[:, :, 0, :, 0] + 2 * ink[:, :, 0, :, 1] + 4 * ink[:, :, 1, :, 0] + 8 * ink[:, :, 1, :, 1]
    order = random.Random(0).sample(range(len(blocks)), len(blocks))
    chosen = order[:HELD_OUT] if held_out else order[HELD_OUT:]
    return [Image(each, drawn(blocks[each].reshape(-1).tolist()), str(bundled.target[each])) for each in chosen]
