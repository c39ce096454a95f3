"""`orch`: one command line for people and agents. Wrong use is one message and exit code 2; a defect, a traceback."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import click

from orchestrator.commands import about, exchange, judge, look, plan, rejudge, results, submit

PACKAGES = ("experiments", "agents", "evals", "orchestrator")
ROOT = Path(__file__).resolve().parent.parent


def is_error_of_use(error: BaseException) -> bool:
    """Whether `error` is one of this project's own typed errors, whose message is all that a user needs."""
    kind = type(error)
    return isinstance(error, ValueError) and kind.__module__.partition(".")[0] in PACKAGES


def shadowed() -> list[str]:
    """One sentence for each of the four packages that would be imported from somewhere else."""
    found = []
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        where = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if where != ROOT / name:
            found.append(f"`{name}` is imported from {where or 'nowhere'}, not from {ROOT / name}")
    return found


class Orch(click.Group):
    """The group that turns errors of use into messages, and lists its commands in the order of use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("orch: interrupted; finished nodes are kept: resume by running the same command", err=True)
            ctx.exit(130)
        except ValueError as error:
            if not is_error_of_use(error):
                raise
            click.echo(f"orch: {error}", err=True)
            ctx.exit(2)


@click.group(cls=Orch, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="orch-experiments", prog_name="orch")
def main() -> None:
    """Run experiments that intervene on language models, and rank what came of them.

    Results are kept by what they are: nothing is computed twice, and an interrupted command goes on where it stopped.
    """
    if wrong := shadowed():
        raise click.ClickException(
            "; ".join(wrong) + ". Another distribution has a package of that name: uninstall it, or run orch in an "
            "environment of its own"
        )


for command in (
    *submit.COMMANDS,
    *plan.COMMANDS,
    *look.COMMANDS,
    *results.COMMANDS,
    *rejudge.COMMANDS,
    *judge.COMMANDS,
    *exchange.COMMANDS,
    *about.COMMANDS,
):
    main.add_command(command)
