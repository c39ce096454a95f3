"""YAML as data: plain values, and the line and column of each. Nothing in a file can run code or blow up memory.

Differences from YAML 1.1 as PyYAML reads it: keys are text, dates and `1:30` are text, and a number with a leading
zero is refused, because 1.1 reads it as octal and 1.2 does not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from experiments import hub
from experiments.files import is_adapter
from experiments.problem import Problem, SpecError, SpecPath, shown

MOST_BYTES = 2**20
MOST_NODES = 10_000
MOST_DEPTH = 50
LOADER: Any = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
CORE = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq")}
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+$")


@dataclass(frozen=True)
class Source:
    """A YAML file: its name, its values, and where each of them stands."""

    name: str
    data: Any
    text: str = field(default="", repr=False)
    marks: dict[SpecPath, tuple[int, int]] = field(default_factory=dict, repr=False)
    folder: Path | None = None
    """Folder of the file, which relative paths inside it start from."""

    def position(self, path: SpecPath) -> tuple[int, int]:
        """Line and column, from 1, of the nearest known place at or above `path`."""
        while path and path not in self.marks:
            path = path[:-1]
        return self.marks.get(path, (1, 1))

    def where(self, path: SpecPath = ()) -> str:
        """`file.yaml:12:5`."""
        line, column = self.position(path)
        return f"{self.name}:{line}:{column}"


def read(path: str | Path) -> Source:
    """Read a YAML file. Raises SpecError: no such file, too large, not UTF-8, and whatever `parse` raises."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
            size = path.stat().st_size
    except OSError as error:
        raise SpecError(Problem((), f"{path}: cannot be read: {error.strerror or error}")) from error
    if len(content) > MOST_BYTES:
        size = max(size, len(content))
        raise SpecError(
            Problem((), f"{path}: {size:,} bytes; a spec may have {MOST_BYTES:,}; keep data in files of its own")
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecError(
            Problem(
                (), f"{path}: not UTF-8: byte {content[error.start]:#04x} at offset {error.start}; save it as UTF-8"
            )
        ) from error
    return parse(text, str(path), path.resolve().parent)


def parse(text: str, name: str = "spec", folder: Path | None = None) -> Source:
    """Values and places of one YAML document.

    Raises SpecError with `name:line:column` for syntax errors, tags, repeated keys, several documents, an empty
    document, and aliases that would expand to more than 10,000 values.
    """
    try:
        _check_events(text, name)
        root = yaml.compose(text, Loader=LOADER)
    except yaml.MarkedYAMLError as error:
        raise _syntax(error, text, name) from error
    except yaml.YAMLError as error:
        raise _unreadable(error, text, name) from error
    if root is None:
        raise SpecError(Problem((), f"{name}: empty; a spec needs at least name, subject and interventions"))
    _check_size(root, name)
    marks: dict[SpecPath, tuple[int, int]] = {}
    data = _value(root, (), name, marks)
    return Source(name, data, text, marks, folder)


def locate(path: Path, folder: Path | None) -> Path:
    """The absolute path of the file a spec names: from the spec's folder, else the working directory, else ORCH_DATA.

    A PEFT adapter's folder counts as a file; a file on the hub (`hf://...`) is fetched. Raises ValueError with the
    places looked at when no such file exists, HubError for one that the hub does not give.
    """
    if hub.named(path):
        return hub.fetch(path)
    path = path.expanduser()
    bases = [folder, Path.cwd(), Path(os.environ["ORCH_DATA"]) if os.environ.get("ORCH_DATA") else None]
    places = list(dict.fromkeys(base.absolute() / path for base in bases if base))
    for place in places:
        if os.path.isfile(place) or is_adapter(place):
            return place
    looked = " or ".join(str(place) for place in places)
    raise ValueError(
        f"no such file; got {str(path)!r}; looked for {looked}; a relative path starts from the spec's folder"
    )


def _refuse(name: str, mark: Any, text: str) -> SpecError:
    return SpecError(Problem((), f"{name}:{mark.line + 1}:{mark.column + 1}: {text}"))


def _syntax(error: yaml.MarkedYAMLError, text: str, name: str) -> SpecError:
    mark: Any = error.problem_mark or error.context_mark
    lines = text.splitlines()
    line = lines[mark.line] if mark and mark.line < len(lines) else ""
    reason = f"{error.context}: {error.problem}" if error.context else f"{error.problem}"
    if line[: len(line) - len(line.lstrip())].count("\t"):
        reason = f"{reason}; the line is indented with a tab: use spaces"
    if mark and not "".join(lines[mark.line :])[mark.column :].strip():
        reason = f"{reason}; is the file cut off?"
    return _refuse(name, mark, f"not YAML: {reason}") if mark else SpecError(Problem((), f"{name}: not YAML: {reason}"))


def _unreadable(error: yaml.YAMLError, text: str, name: str) -> SpecError:
    position = getattr(error, "position", None)
    for index, character in enumerate(text):
        if ord(character) < 32 and character not in "\t\n\r":
            line, column = text.count("\n", 0, index) + 1, index - text.rfind("\n", 0, index)
            return SpecError(
                Problem((), f"{name}:{line}:{column}: control character U+{ord(character):04X}; remove it")
            )
    where = f"{name}: " if position is None else f"{name}: at character {position}: "
    return SpecError(Problem((), f"{where}not YAML: {str(error).splitlines()[0]}"))


def _check_events(text: str, name: str) -> None:
    """Refuse, before anything is built: tags, a second document, values nested too deep."""
    documents = depth = 0
    for event in yaml.parse(text, Loader=LOADER):
        mark = event.start_mark
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise _refuse(name, mark, "a second document; a spec is one document: put each in a file of its own")
        tag = getattr(event, "tag", None)
        if tag is not None and tag not in CORE:
            raise _refuse(name, mark, f"tag {shown(tag)}; a spec is plain data: text, numbers, lists and mappings")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MOST_DEPTH:
                raise _refuse(name, mark, f"nested deeper than {MOST_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            yield value
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _check_size(root: yaml.Node, name: str) -> None:
    """Refuse a document whose aliases, written out, make more than MOST_NODES values. Counts without expanding."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in open_nodes:
            raise _refuse(name, node.start_mark, "an anchor that contains its own alias")
        if id(node) not in sizes:
            open_nodes.add(id(node))
            sizes[id(node)] = 1 + sum(size(child) for child in _children(node))
            open_nodes.discard(id(node))
        return sizes[id(node)]

    if size(root) > MOST_NODES:
        raise SpecError(
            Problem((), f"{name}: {sizes[id(root)]:,} values once aliases are written out; at most {MOST_NODES:,}")
        )


def _value(node: yaml.Node, path: SpecPath, name: str, marks: dict[SpecPath, tuple[int, int]]) -> Any:
    """The plain value of `node`; writes its place, and that of everything in it, into `marks`."""
    marks.setdefault(path, (node.start_mark.line + 1, node.start_mark.column + 1))
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, name, marks)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*path, index), name, marks) for index, item in enumerate(node.value)]
    return _scalar(node, name)


def _mapping(
    node: yaml.MappingNode, path: SpecPath, name: str, marks: dict[SpecPath, tuple[int, int]]
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in node.value:
        mark = key.start_mark
        if not isinstance(key, yaml.ScalarNode):
            raise _refuse(name, mark, "a key that is a list or a mapping; keys are words")
        if key.tag == "tag:yaml.org,2002:merge":
            raise _refuse(
                name, mark, "'<<' (merge) is not read; write the settings out, or use an alias for a whole value"
            )
        if key.value in result:
            first = marks[(*path, key.value)]
            raise _refuse(name, mark, f"the key {key.value!r} is given twice; the first is on line {first[0]}")
        marks[(*path, key.value)] = (mark.line + 1, mark.column + 1)
        result[key.value] = _value(value, (*path, key.value), name, marks)
    return result


def _scalar(node: Any, name: str) -> Any:
    kind = node.tag.rpartition(":")[2]
    text = node.value
    if kind == "null":
        return None
    try:
        if kind == "bool":
            return yaml.SafeLoader.bool_values[text.lower()]
        if kind == "int" and ":" not in text:
            if _LEADING_ZERO.match(text):
                raise _refuse(
                    name,
                    node.start_mark,
                    f"number {text} has a leading zero; write {text.lstrip('+-0') or 0}, or quote it",
                )
            return int(text.replace("_", ""), 0)
        if kind == "float" and ":" not in text:
            return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
    except (KeyError, ValueError) as error:
        if isinstance(error, SpecError):
            raise
        raise _refuse(name, node.start_mark, f"{shown(text)} is not a {kind}") from error
    return text
