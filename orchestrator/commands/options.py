"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Command = Callable[..., Any]

spec = click.argument("spec", type=click.Path(path_type=Path), metavar="SPEC")
store = click.option(
    "--store",
    envvar="ORCH_STORE",
    default="store",
    show_default=True,
    show_envvar=True,
    help="Folder or fsspec URL where results are kept.",
)
registry = click.option(
    "--registry",
    envvar="ORCH_REGISTRY",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("registry.sqlite"),
    show_default=True,
    show_envvar=True,
    help="SQLite index of the records.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="JSON on standard output, for programs and agents.")
