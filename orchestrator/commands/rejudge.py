"""`orch rejudge`: have stored answers judged again, without generating any."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.commands import options

if TYPE_CHECKING:
    from orchestrator.rejudging import Wish


@click.command("rejudge")
@click.argument("experiment")
@click.option("--judge", "models", metavar="MODEL[,MODEL...]", help="The judge as inspect names it; several: a panel.")
@click.option(
    "--rubric", "rubrics", multiple=True, metavar="ROLE=FILE", help="Another rubric for a role. May be repeated."
)
@click.option("--combine", type=click.Choice(["mean", "majority"]), help="How the votes of a panel become a verdict.")
@click.option("--allow-self", is_flag=True, help="Let a judge be the subject; every row will say so.")
@options.store
@options.registry
@click.option("--address", help="A running Ray cluster. Default: one is started here.")
@click.option("--local", is_flag=True, help="Run in this process, without Ray.")
@click.option("--quiet", is_flag=True, help="Say only what went wrong, and the result.")
@options.as_json
def rejudge_command(
    experiment: str,
    models: str | None,
    rubrics: tuple[str, ...],
    combine: str | None,
    allow_self: bool,
    store: str,
    registry: Path,
    address: str | None,
    local: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Judge the stored answers of EXPERIMENT again, by another judge or rubric, and show the new leaderboard.

    The subject is asked nothing. What is not given stays as the answers were judged last. Both versions stay, each with
    a ranking of its own: `orch board` shows them side by side. Exit codes are those of submit.
    """
    from experiments.parts import Resources
    from orchestrator.artifact import Store
    from orchestrator.commands.submit import executors, finish, nothing, run_missing, to_stderr
    from orchestrator.registry import Registry
    from orchestrator.rejudging import rejudged

    if local and address:
        raise click.UsageError("--local runs in this process: leave out --address")
    wish = _wish(models, rubrics, combine, allow_self)
    place, say = Store(store), nothing if quiet else to_stderr
    with Registry(registry) as index:
        found = rejudged(experiment, wish, place, index)
    with place.lock(experiment, to_stderr):
        ask = executors(Resources(), place, address, local, False, say)
        summary = run_missing(found, place, ask, quiet, say)
    finish(found, place, registry, as_json)
    to_stderr(f"beside its other judges     orch board {experiment}")
    if summary is not None and not summary.ok:
        sys.exit(1)


def _wish(models: str | None, rubrics: tuple[str, ...], combine: str | None, allow_self: bool) -> Wish:
    """What the options mean. Raises RejudgeError."""
    from orchestrator.rejudging import RejudgeError, Wish

    if models is None and not rubrics and combine is None:
        raise RejudgeError("nothing would change; give --judge MODEL, --rubric ROLE=FILE or --combine")
    names = [name.strip() for name in (models or "").split(",")] if models is not None else []
    if not all(names):
        raise RejudgeError(f"--judge {models!r} has an empty name; e.g. --judge openai/gpt-4.1-mini,embedded")
    files = {}
    for text in rubrics:
        role, equals, file = text.partition("=")
        if not role or not equals or not file:
            raise RejudgeError(f"--rubric {text!r} must be ROLE=FILE, e.g. --rubric aligned=my_rubric.md")
        if role in files:
            raise RejudgeError(f"--rubric gives {role!r} twice; give one file for each role")
        files[role] = Path(file).absolute()
    return Wish(names, files, combine, allow_self)


COMMANDS = (rejudge_command,)
