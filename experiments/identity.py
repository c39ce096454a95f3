"""Which subject a spec means: the folder with its files, and what of it enters a result's key. Imports no torch."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from experiments import chat, digits, embedded, files
from experiments.files import SubjectError
from experiments.parts import DIGITS
from experiments.spec import EMBEDDED, SubjectSpec

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
WEIGHTS = "weights_sha256"
_SMALL = ("*.json", "*.jinja", "*.model", "*.txt")


def identify(spec: SubjectSpec, gpu: bool | None = None) -> dict[str, Any]:
    """What a result depends on, as JSON values: which weights (without loading them), dtype, template, chat context.

    No path enters. `gpu` says where the subject will run (None: where this process runs), for `dtype: auto`.
    Raises SubjectError for a subject that does not exist or has no chat template.
    """
    fixed, own, specials = _parts(spec)
    template = template_text(spec, own)
    probe = [{"role": "user", "content": "?"}]
    if spec.system is not None:
        probe.insert(0, {"role": "system", "content": spec.system})
    if spec.drawn is not None:
        fixed = {name: value for name, value in fixed.items() if name != WEIGHTS} | {"init": spec.drawn}
    return {
        **fixed,
        "dtype": resolve_dtype(spec, _has_gpu() if gpu is None else gpu),
        "system": spec.system,
        "chat_template_sha256": files.digest_text(template),
        "chat_context": chat.render(template, probe, specials),
    }


def _parts(spec: SubjectSpec) -> tuple[dict[str, Any], str | None, dict[str, str]]:
    """What fixes the files, the model's own chat template, and its special tokens."""
    if spec.model == EMBEDDED:
        _refuse_revision(spec)
        return embedded.identity(), embedded.chat_template(), embedded.SPECIALS
    folder = model_folder(spec, weights=False)
    # a hub snapshot's folder is named by its commit
    fixed = {"model": spec.model, "revision": folder.name}
    if spec.model == DIGITS:
        fixed = digits.identity()
    elif _is_local(spec):
        fixed = _local_identity(folder, spec.drawn is None)
    return fixed, chat.template_of(folder), chat.specials_of(folder)


def model_folder(spec: SubjectSpec, weights: bool) -> Path:
    """Folder with the subject's files: an embedded model's, a local folder, or a hub snapshot.

    Without `weights` no large file is fetched. Raises SubjectError naming what was looked for and where.
    """
    if spec.model == EMBEDDED:
        return embedded.folder()
    if spec.model == DIGITS:
        _refuse_revision(spec)
        return digits.folder()
    if _is_local(spec):
        _refuse_revision(spec)
        return Path(spec.model).expanduser()
    return _snapshot(spec, weights)


def _snapshot(spec: SubjectSpec, weights: bool) -> Path:
    """A hub model's snapshot folder. The hub cache comes first, so that planning and running agree on the commit."""
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {
        "revision": spec.revision,
        "allow_patterns": [*_SMALL, *(["*.safetensors"] if weights else [])],
        "ignore_patterns": ["*/*"],
    }
    try:
        cached = _cached_snapshot(spec)
        if cached is not None:
            complete = (cached / "config.json").is_file() and (not weights or any(cached.glob("*.safetensors")))
            if complete:
                return cached
            options["revision"] = cached.name
        return Path(snapshot_download(spec.model, **options))
    except (OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        revision = f" at revision {spec.revision!r}" if spec.revision else ""
        raise SubjectError(
            f"subject {spec.model!r}{revision}: neither the embedded name {EMBEDDED!r} or {DIGITS!r}, nor a "
            f"folder, nor a model that the Hugging Face hub or its local cache gives ({first}); check the name, the "
            "network and HF_HUB_OFFLINE"
        ) from error


def _cached_snapshot(spec: SubjectSpec) -> Path | None:
    """Snapshot folder of the hub's local cache for the spec's revision, or None."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(spec.model, "config.json", revision=spec.revision)
    return Path(found).parent if isinstance(found, str) else None


def resolve_dtype(spec: SubjectSpec, gpu: bool) -> str:
    """The dtype `spec` means on a GPU or on this CPU: `auto` is bfloat16 where the processor has it, else float32."""
    if spec.dtype != "auto":
        return spec.dtype
    if gpu:
        import torch

        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if _cpu_flags() & {"amx_bf16", "avx512_bf16"} else "float32"


def _cpu_flags() -> set[str]:
    """Instruction sets of this CPU that matter here, in the names Linux gives them."""
    try:
        found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        return set(found[1].split()) if found else set()
    except OSError:  # not Linux: ask torch, at the price of its import
        import torch

        return {"avx512_bf16"} if torch.cpu._is_avx512_bf16_supported() else set()


def _has_gpu() -> bool:
    """Whether this process sees an NVIDIA GPU, without importing torch."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1", "none", "NoDevFiles")
    return not hidden and any(Path("/dev").glob("nvidia[0-9]*"))


def template_text(spec: SubjectSpec, own: str | None) -> str:
    """The chat template in force: the spec's file, else the model's `own`. Raises SubjectError if there is neither."""
    if spec.chat_template is not None:
        return chat.read_template(Path(spec.chat_template))
    if own is None:
        raise SubjectError(f"subject {spec.model!r} has no chat template (a base model?); {chat.HINT}")
    return own


def _refuse_revision(spec: SubjectSpec) -> None:
    if spec.revision is not None:
        raise SubjectError(
            f"subject {spec.model!r} takes no revision (got {spec.revision!r}): its files fix it; leave `revision` out"
        )


def _is_local(spec: SubjectSpec) -> bool:
    return Path(spec.model).expanduser().is_dir()


def _local_identity(folder: Path, trained: bool) -> dict[str, Any]:
    """Digests of a folder's files; one that is not `trained` needs no weights in it."""
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or (trained and not weights):
        raise SubjectError(
            f"{folder} is not a model folder: it needs config.json and *.safetensors (save_pretrained writes both)"
        )
    config = [path for name in ("config.json", "generation_config.json") if (path := folder / name).is_file()]
    tokenizer = [path for name in TOKENIZER_FILES if (path := folder / name).is_file()]
    return {
        "model": "local",
        "config_sha256": files.digest_all(config),
        "tokenizer_sha256": files.digest_all(tokenizer),
        WEIGHTS: files.digest_all(weights),
    }
