"""What is installed, what can be asked for, and whether this machine is fit to run it."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import click

from orchestrator.commands import options

if TYPE_CHECKING:
    from pydantic import BaseModel


@click.command()
def schema() -> None:
    """Print the JSON schema of a spec, every method and recipe with its settings."""
    from experiments.schema import schema as of_specs

    click.echo(json.dumps(of_specs(), indent=2))


@click.command()
@options.as_json
def methods(as_json: bool) -> None:
    """List the interventions, what each needs and its settings."""
    from experiments import intervention, plugin

    rows = []
    for name in plugin.names("experiments.interventions"):
        cls = intervention.method(name)
        rows.append(
            {
                "method": name,
                "needs": " or ".join(cls.needs) or "nothing",
                "doses": cls.dose_kind,
                "settings": _settings(cls),
                "about": _first_line(cls.__doc__),
            }
        )
    _show(rows, as_json)


@click.command("evals")
@options.as_json
def evals_command(as_json: bool) -> None:
    """List the evals, their targets and their settings."""
    from evals.task import load_task
    from experiments import plugin

    rows = []
    for name in plugin.names("evals.tasks"):
        module = load_task(name)
        allowed = module.targets(module.Settings())
        rows.append(
            {
                "task": name,
                "version": module.VERSION,
                "higher is": module.HIGHER_IS,
                "targets": ", ".join(allowed[:6]) + (f", ... ({len(allowed)})" if len(allowed) > 6 else ""),
                "settings": _settings(module.Settings),
                "about": _first_line(module.__doc__),
            }
        )
    _show(rows, as_json)


def _settings(cls: type[BaseModel]) -> str:
    """`layer, tokens=last`: names, and the defaults where there are."""
    return ", ".join(
        name if field.is_required() else f"{name}={field.get_default(call_default_factory=True)}"
        for name, field in cls.model_fields.items()
    )


def _first_line(text: str | None) -> str:
    return (text or "").strip().split("\n", 1)[0]


def _show(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        (_, name), *others = row.items()
        click.echo(click.style(name, bold=True))
        for field, value in others:
            click.echo(click.wrap_text(str(value), 110, f"  {field + ':':<11}", " " * 13))


@click.command()
@options.store
@options.registry
@options.as_json
def doctor(store: str, registry: os.PathLike[str], as_json: bool) -> None:
    """Check this machine: versions, processor, token, store. Exits with 1 when something is wrong."""
    from orchestrator import checkup

    findings = checkup.findings(store, registry)
    if as_json:
        click.echo(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            click.echo(f"{'ok  ' if finding.ok else 'BAD '} {finding.name:<{width}}  {finding.text}")
    if not all(finding.ok for finding in findings):
        raise SystemExit(1)


COMMANDS = (schema, methods, evals_command, doctor)
