"""`orch board`, `orch report`, `orch registry`: what came of experiments."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from orchestrator.commands import options

WIDTH = 120


@click.command()
@click.argument("experiment", required=False)
@options.registry
@options.as_json
@click.option("--markdown", is_flag=True, help="A Markdown table.")
def board(experiment: str | None, registry: Path, as_json: bool, markdown: bool) -> None:
    """Rank the interventions of EXPERIMENT, or of every one. What cannot be ranked stands below, with the reason."""
    from orchestrator import corrected, detected, matrix, report
    from orchestrator.registry import Registry

    with Registry(registry, write=False) as index:
        rows = index.leaderboard(experiment)
        found, told = index.confusions(experiment), index.detections(experiment)
        judged = corrected.judged(index, experiment)
    if as_json:
        click.echo(json.dumps(rows, indent=1, allow_nan=False))
    elif markdown:
        click.echo(report.markdown(rows))
    else:
        click.echo(report.plain(rows, width()))
        for line in (*corrected.lines(judged), *matrix.lines(found), *detected.lines(told)):
            click.echo(line)


@click.command("picture")
@click.argument("experiment")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--eval", "name", help="The eval, where the experiment has matrices of several.")
@click.option("--student", help="The setting, where several learned from the same data.")
@options.registry
def picture_command(experiment: str, target: Path, name: str | None, student: str | None, registry: Path) -> None:
    """Draw the confusion matrix of EXPERIMENT's datasets and traits to TARGET, a .png, .pdf or .svg."""
    from orchestrator import matrix
    from orchestrator.registry import Registry

    with Registry(registry, write=False) as index:
        found = index.confusions(experiment)
    kept = [one for one in found if name in (None, one["eval"]) and student in (None, one["student"])]
    if len(kept) != 1:
        known = "; ".join(f"--eval {one['eval']} --student '{one['student']}'" for one in found) or "none"
        raise matrix.PictureError(f"{experiment}: {len(kept)} matrices fit, one is drawn; there are: {known}")
    matrix.picture(kept[0], target)
    click.echo(f"{target}: {matrix.verdict(kept[0])}")


def width() -> int:
    """Columns a table may have: those of the terminal, else as many as it likes to have."""
    import shutil

    return shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH


@click.command("report")
@click.argument("experiment")
@options.registry
def report_command(experiment: str, registry: Path) -> None:
    """Write a page about EXPERIMENT in Markdown: its question, leaderboard, failures and costs."""
    from orchestrator import summary
    from orchestrator.registry import Registry

    with Registry(registry, write=False) as index:
        click.echo(summary.page(index, experiment))


@click.group("registry")
def registry_group() -> None:
    """Look after registry.sqlite, the index of the records."""


@registry_group.command()
@options.store
@options.registry
@options.as_json
def rebuild(store: str, registry: Path, as_json: bool) -> None:
    """Make the registry anew from the records of the store."""
    from orchestrator.artifact import Store
    from orchestrator.registry import Registry

    with Registry(registry) as index:
        count = index.rebuild(Store(store))
    found = {"registry": str(registry), "store": store, "records": count}
    click.echo(json.dumps(found, indent=1) if as_json else f"{registry}: {count:,} records of {store}")


@registry_group.command()
@options.store
@options.registry
@options.as_json
def check(store: str, registry: Path, as_json: bool) -> None:
    """Say whether the registry and the store hold the same results. Exits with 1 when they do not."""
    from orchestrator.artifact import Store
    from orchestrator.registry import Registry

    with Registry(registry, write=False) as index:
        indexed = {row["key"][:12] for row in index.query("select key from nodes where status = 'have'")}
    kept = Store(store).keys()
    missing = {"not in the registry": sorted(kept - indexed), "not in the store": sorted(indexed - kept)}
    if as_json:
        click.echo(json.dumps({"results": len(kept), "indexed": len(indexed)} | missing, indent=1))
    else:
        click.echo(f"{len(kept):,} results in {store}, {len(indexed):,} in {registry}")
        for name, keys in missing.items():
            if keys:
                click.echo(f"{len(keys):,} {name}: {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}")
    if kept != indexed:
        click.echo("make it right with: orch registry rebuild", err=as_json)
        sys.exit(1)


COMMANDS = (board, picture_command, report_command, registry_group)
