"""What a spec asks of an eval, checked before anything runs: settings, target and data files.

A task is one file in `evals/tasks/`; beside its inspect `@task` it defines
    VERSION    int, bumped when the same settings would now give another score
    HIGHER_IS  "more target" or "damage"
    Settings   a Frozen model; its fields are the parameters of the `@task`, with the same defaults
    TEXTS      every text the model is shown that is neither a setting nor data
    targets(settings)  the allowed targets, most frequent first; [] when the task takes none
    files(settings)    {field: path} of the data the settings mean, built-in data too. Both raise TaskError
and where judges are needed
    RUBRICS    roles of the rubrics (evals/rubrics/<role>.md)
    SCORED     settings that only `scored` reads: changing one asks and judges nothing again
    scored(metadata, answer, verdicts, settings)  the score of one answer, from its verdicts alone
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from experiments import hub, plugin
from experiments.plugin import Frozen, nearest
from experiments.problem import shown

BUILTIN = "builtin"
REQUIRED = ("VERSION", "HIGHER_IS", "Settings", "TEXTS", "targets", "files")


class TaskError(ValueError):
    """An eval that cannot be asked: unknown task, setting or target, or data that cannot be used."""


@dataclass(frozen=True)
class TaskFacts:
    """A checked eval. `identity` enters the node's key (digests, no paths); the task is called with `runtime`."""

    version: int
    higher_is: str
    identity: dict[str, Any]
    runtime: dict[str, Any]
    targets: tuple[str, ...]
    rubrics: tuple[str, ...] = ()
    """Roles of the rubrics by which answers are judged; () for a task that scores them itself."""
    scoring: dict[str, Any] = field(default_factory=dict)
    """Settings of a judged task that nothing but its scoring reads; they are no part of `identity`."""


def describe(task: str, target: str | None, params: Mapping[str, Any]) -> TaskFacts:
    """Check `params` and `target`, read the data once, and say what identifies the eval. Raises TaskError."""
    module = load_task(task)
    settings = parse(task, module, target, params)
    files = module.files(settings)
    targets = tuple(module.targets(settings))
    if targets:
        check_target(task, settings.target, targets)
    identity = settings.model_dump(mode="json")
    runtime = settings.model_dump(mode="json")
    for name, path in files.items():
        identity[name] = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        if runtime[name] != BUILTIN:
            runtime[name] = str(path)
    identity["texts"] = hashlib.sha256(json.dumps(module.TEXTS, sort_keys=True).encode()).hexdigest()
    rubrics = tuple(getattr(module, "RUBRICS", ()))
    scoring = {name: identity.pop(name) for name in sorted(getattr(module, "SCORED", ()))} if rubrics else {}
    return TaskFacts(module.VERSION, module.HIGHER_IS, identity, runtime, targets, rubrics, scoring)


def load_task(task: str) -> ModuleType:
    """The module `evals/tasks/<task>.py`. Raises TaskError for an unknown name or an incomplete file."""
    allowed = plugin.names("evals.tasks")
    if task not in allowed:
        raise TaskError(
            f"unknown eval {task!r}{nearest(task, allowed)}; allowed: {', '.join(allowed)}; "
            f"to add one, write evals/tasks/{task}.py (docs/adding.md)"
        )
    module = importlib.import_module(f"evals.tasks.{task}")
    missing = [name for name in (*REQUIRED, task) if not hasattr(module, name)]
    if missing:
        raise TaskError(
            f"{module.__file__} does not define {', '.join(missing)}; see docs/adding.md for what a task holds"
        )
    return module


def parse(task: str, module: ModuleType, target: str | None, params: Mapping[str, Any]) -> Any:
    """The task's settings. Raises TaskError that names the setting, its value and what is allowed."""
    kind: type[Frozen] = module.Settings
    fields = sorted(name for name in kind.model_fields if name != "target")
    for name in params:
        if name == "target":
            raise TaskError(f"eval {task}: 'target' is not a setting; write it beside the eval's name")
        if name not in fields:
            raise TaskError(
                f"eval {task}: unknown setting {name!r}{nearest(name, fields)}; allowed: {', '.join(fields)}"
            )
    given = dict(params)
    if target is not None:
        if "target" not in kind.model_fields:
            raise TaskError(f"eval {task} takes no target, but {target!r} was given; leave it out")
        given["target"] = target
    try:
        return kind(**given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "settings"
        raise TaskError(
            f"eval {task}: setting {where} = {shown(first['input'])}: {first['msg'].replace('Input should', 'it must')}"
        ) from error


def check_target(task: str, target: str, allowed: tuple[str, ...]) -> None:
    """Raises TaskError, with the nearest and the most frequent targets, unless `target` is one of `allowed`."""
    if target in allowed:
        return
    some = ", ".join(allowed[:12]) + (f" and {len(allowed) - 12} more" if len(allowed) > 12 else "")
    raise TaskError(f"eval {task}: unknown target {target!r}{nearest(target, list(allowed))}; allowed: {some}")


def resolve(data: str, builtin: Path) -> Path:
    """The absolute path that `data` means: `builtin`, a path, a path below the folder named by ORCH_DATA, or a file on
    the hub, which is fetched. Links stay: what the hub's cache keeps has its name from one.

    Raises TaskError when there is no such file.
    """
    if data == BUILTIN:
        return builtin
    if hub.named(data):
        try:
            return hub.fetch(data)
        except hub.HubError as error:
            raise TaskError(str(error)) from error
    path = Path(data).expanduser()
    below = Path(os.environ["ORCH_DATA"]) / path if "ORCH_DATA" in os.environ else path
    for candidate in (path, below):
        if candidate.is_file():
            return candidate.absolute()
    tried = " or ".join(str(candidate) for candidate in dict.fromkeys((path.absolute(), below.absolute())))
    raise TaskError(
        f"no data file {data!r} (looked for {tried}); give {BUILTIN!r}, a path, or set ORCH_DATA to its folder"
    )


def parse_json(text: str, path: Path, line: int | None = None) -> Any:
    """The JSON in `text`, which is all of a file or its `line`. Raises TaskError with the line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise TaskError(f"{path}:{line or error.lineno}: not JSON ({error.msg}); is the file truncated?") from error
    except RecursionError as error:
        raise TaskError(f"{path}:{line or 1}: not JSON (nested too deep); give plain data") from error


def read_text(path: Path) -> str:
    """The file's text. Raises TaskError with the line of the first byte that is not UTF-8, or for an empty file."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise TaskError(f"{path}:{line}: not UTF-8 (byte {raw[error.start]:#04x}); save the file as UTF-8") from error
    if not text.strip():
        raise TaskError(f"{path}: the file is empty; give a file with data, or {BUILTIN!r}")
    return text
