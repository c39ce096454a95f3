"""`orch bake`, `orch export`, `orch adopt`: interventions for other programs, and theirs for us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.commands import options

if TYPE_CHECKING:
    from experiments.exchange import Contents
    from orchestrator.finished import Finished

FORMATS = {".safetensors": "safetensors", ".gguf": "gguf", "": "peft"}
"""Format by the ending of the name; a folder is an adapter's."""

trial = click.argument("trial")
seed = click.option("--seed", type=int, help="Which one, where seeds share a label.")
calibrated = click.option("--calibrated", is_flag=True, help="Doses are multiples of what `calibrate:` found.")


@click.command()
@trial
@click.option("--dose", type=float, required=True, metavar="C", help="Dose that the checkpoint has for good.")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder to make.")
@seed
@calibrated
@options.store
@options.as_json
def bake(trial: str, dose: float, out: Path, seed: int | None, calibrated: bool, store: str, as_json: bool) -> None:
    """Write the subject with TRIAL in its weights, as a plain checkpoint that transformers and vLLM load.

    TRIAL is a finished trial's label, or the beginning of its fit's key. The folder's logits are compared with the
    engine's before it gets its name.
    """
    from dataclasses import asdict

    from experiments.bake import bake as made

    found = _found(trial, seed, calibrated, store)
    edits = found.edits(dose)
    baked = made(found.engine(), edits, out, found.facts(dose))
    if as_json:
        click.echo(json.dumps({**asdict(baked), "folder": str(out)}, indent=1))
        return
    click.echo(f"{out}: {found.record['label']} at dose {dose:g} as {baked.architecture}")
    click.echo(
        f"logits differ from the engine's by at most {baked.difference:.2g} in float32 (allowed "
        f"{baked.tolerance:.2g}); the edits move them by up to {baked.effect:.3g}"
    )
    if baked.lost:
        click.echo(
            f"storing in the subject's dtype costs {baked.lost:.2%} of that; at most {baked.rounding:.2%} of a "
            f"parameter's change ({baked.rounded})"
        )
    for note in baked.notes:
        click.echo(f"note: {note}")


@click.command()
@trial
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="PATH", help="File or folder to make.")
@click.option("--dose", type=float, default=1.0, show_default=True, metavar="C", help="What dose 1 of the file is.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(sorted(FORMATS.values())),
    help="Else by the ending of PATH: .safetensors, .gguf, or none for an adapter's folder.",
)
@seed
@calibrated
@options.store
def export(
    trial: str, out: Path, dose: float, kind: str | None, seed: int | None, calibrated: bool, store: str
) -> None:
    """Write TRIAL for other programs: vectors, a GGUF control vector, or a PEFT LoRA folder."""
    from experiments import adapter_folder, control_vector
    from experiments.exchange import ExchangeError, write_vectors

    kind = kind or FORMATS.get(out.suffix)
    if kind is None:
        raise ExchangeError(f"{out} ends in {out.suffix!r}; allowed: {', '.join(filter(None, FORMATS))}, or --format")
    found = _found(trial, seed, calibrated, store)
    edits = found.edits(dose)
    if kind == "safetensors":
        write_vectors(edits, out, found.facts(dose))
    elif kind == "gguf":
        control_vector.write(edits, out, _model_type(found))
    else:
        adapter_folder.write(edits, out, _base_model(found))
    click.echo(f"{out}: {found.record['label']} at dose {dose:g} as {kind}; dose 1 of it is dose {dose:g} of the trial")


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--subject", metavar="MODEL", help="Also say whether its layers and sites fit this model.")
@options.as_json
def adopt(path: Path, subject: str | None, as_json: bool) -> None:
    """Say what is in somebody else's vector or adapter at PATH, and the line that takes it into a spec."""
    from experiments.exchange import ALLOWED, contents

    found = contents(path)
    missing = {} if found.kind == "peft" else {fact: "|".join(ALLOWED[fact]) for fact in _unsaid(found)}
    problems = _problems(path, subject) if subject and not missing else {}
    entry = ", ".join([f"path: {path}", *(f"{fact}: {allowed}" for fact, allowed in missing.items())])
    line = f"- {{method: adopted, {entry}}}"
    if as_json:
        shown: dict[str, Any] = {"kind": found.kind, "facts": found.facts, "about": found.about, "missing": missing}
        click.echo(json.dumps({**shown, "tensors": found.shapes, "problems": problems, "spec": line}, indent=1))
    else:
        for text in _described(found):
            click.echo(text)
        for fact, allowed in missing.items():
            click.echo(f"{fact + ':':<18}not said; choose one of {allowed}")
        click.echo(f"\nunder interventions:\n  {line}")
        for text in problems.values():
            click.echo(f"orch: {text}", err=True)
    if problems:
        raise SystemExit(2)


def _found(trial: str, seed: int | None, calibrated: bool, store: str) -> Finished:
    from orchestrator.artifact import Store
    from orchestrator.finished import find

    return find(Store(store), trial, seed, calibrated)


def _model_type(found: Finished) -> str:
    """The subject's family, as transformers names it and repeng's hint has it."""
    from experiments.identity import model_folder

    config = json.loads((model_folder(found.spec, weights=False) / "config.json").read_text(encoding="utf-8"))
    return str(config["model_type"])


def _base_model(found: Finished) -> str:
    """What an adapter says it belongs on: the name of the spec, or the folder of the embedded model."""
    from experiments.identity import model_folder
    from experiments.spec import EMBEDDED

    model = found.spec.model
    return str(model_folder(found.spec, weights=False)) if model == EMBEDDED else model


def _unsaid(found: Contents) -> list[str]:
    """Facts that neither the file nor the names in it say."""
    from experiments.exchange import ALLOWED, stated

    return [fact for fact in ALLOWED if fact not in stated(found)]


def _problems(path: Path, model: str) -> dict[str, str]:
    """What is wrong with the file for `model`, as a plan would say it."""
    from experiments.interventions.adopted import Adopted
    from experiments.outline import outline
    from experiments.spec import SubjectSpec

    return Adopted(path=path).misplaced(outline(SubjectSpec(model=model)))


def _described(found: Contents) -> list[str]:
    from experiments.exchange import stated

    facts = found.facts if found.kind == "peft" else stated(found)
    lines = [f"{name + ':':<18}{value}" for name, value in [("kind", found.kind), *facts.items()]]
    lines += [f"{name + ':':<18}{value}" for name, value in found.about.items() if value not in (None, "")]
    names = sorted(found.shapes)
    first = ", ".join(f"{name} {list(found.shapes[name])}" for name in names[:4])
    return [*lines, f"{'tensors:':<18}{len(names)}: {first}" + (", ..." if len(names) > 4 else "")]


COMMANDS = (bake, export, adopt)
