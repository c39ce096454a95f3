"""What `orch` says about everything a user can get wrong: `python -m tests.bad_input` shows every case.

Each case of `bad_cases.py` makes its files in a folder of its own and runs the command line there.
`tests/test_bad_input.py` checks the same cases; `python -m tests.bad_input --write` writes docs/errors.md from them.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from click.testing import CliRunner, Result

from tests.bad_cases import CASES, MODEL, Case

FAILED = re.compile(r"^  failed  (.+\]):\w+: (.*)  \(orch why \w+\)$", re.MULTILINE)
OWN_NOTES = re.compile("opposite|signs count")
"""Notes that a case is about; others stand under most specs."""
COMMANDS = {"Run": "submit", "Fit": "submit", "Rejudge": "rejudge"}
"""What cases of a kind are run with; all others are planned."""
ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "errors.md"
BEGIN, END = "<!-- cases: written by `python -m tests.bad_input --write` -->", "<!-- end of cases -->"


def run(case: Case, folder: Path, command: str) -> Result:
    """`orch plan`, `orch submit --local` or `orch rejudge` on `case`, made in `folder`, which holds a good model."""
    case.make(folder)
    return orch(folder, *arguments(case, command))


def arguments(case: Case, command: str) -> list[str]:
    """What is typed behind `orch`."""
    if command == "rejudge":
        return [command, *case.options, "--local"]
    return [command, "spec.yaml", *(["--local", *case.options] if command == "submit" else [])]


def orch(folder: Path, *arguments: str) -> Result:
    """The command line in `folder`, in this process."""
    from orchestrator.cli import main

    with contextlib.chdir(folder):
        return CliRunner().invoke(main, list(arguments), prog_name="orch")


def copied(source: Path, folder: Path) -> Path:
    """`folder`, made, with a copy of the model in it."""
    shutil.copytree(source, folder / MODEL)
    return folder


def shown(message: str, folder: Path) -> str:
    """A message without what differs from run to run: of a run, what failed, without its key."""
    if failed := FAILED.findall(message):
        message = "\n".join(f"failed {name}: {reason}" for name, reason in dict.fromkeys(failed))
    notes = [line for line in message.splitlines() if not line.startswith("note: ") or OWN_NOTES.search(line)]
    message = "\n".join(notes).strip().removeprefix("orch: ").rpartition("\nError: ")[2]
    return message.replace(f"{folder.resolve()}/", "").replace(str(folder.resolve()), ".")


@contextlib.contextmanager
def good_model() -> Iterator[Path]:
    """A tiny random model in a temporary folder; digests are remembered there too."""
    from tests.tiny import make_tiny_model

    with tempfile.TemporaryDirectory(prefix="orch-bad-input-") as name:
        os.environ["ORCH_CACHE"] = str(Path(name) / "cache")
        yield make_tiny_model(Path(name) / MODEL)


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    lines: list[str] = []
    kind = ""
    with good_model() as source:
        for number, case in enumerate(CASES):
            command = COMMANDS.get(case.kind, "plan")
            folder = copied(source, source.parent / f"{number}")
            result = run(case, folder, command)
            message = shown(result.stderr, folder)
            typed = " ".join(arguments(case, command))
            print(f"{case.kind}: {case.name}\n  $ orch {typed}  -> exit code {result.exit_code}")
            print("".join(f"  {line}\n" for line in message.splitlines()))
            if case.kind != kind:
                kind = case.kind
                lines += ["", f"## {kind}", "", "| what is wrong | what orch says |", "|---|---|"]
            lines.append(f"| {case.name} | {'<br>'.join(cell(line) for line in message.splitlines())} |")
    if "--write" in sys.argv:
        page = PAGE.read_text(encoding="utf-8")
        head, tail = page.split(BEGIN)[0], page.split(END)[1]
        PAGE.write_text("\n".join([head + BEGIN, *lines, "", END + tail]), encoding="utf-8")


def cell(line: str) -> str:
    return line.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    main()
