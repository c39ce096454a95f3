"""`orch submit` and `orch stop`: run what is missing of an experiment, here or on a cluster, attached or not."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.commands import options

if TYPE_CHECKING:
    from experiments.parts import Resources
    from orchestrator.artifact import Store
    from orchestrator.plan import Graph
    from orchestrator.run import Executor, Summary

Say = Callable[[str], None]
Executors = Callable[[], contextlib.AbstractContextManager["Executor"]]

MOST_FAILURES = 10
"""Failed nodes that are named at the end; all are in the store."""


@click.command("submit")
@options.spec
@options.store
@options.registry
@click.option(
    "--address", help="A running Ray cluster: auto, HOST:PORT or ray://HOST:PORT. Default: one is started here."
)
@click.option("--detach", is_flag=True, help="Return at once; a Ray job does the work.")
@click.option("--local", is_flag=True, help="Run in this process, without Ray.")
@click.option(
    "--dashboard/--no-dashboard", default=True, help="Ray's dashboard on 127.0.0.1 while a cluster of our own runs."
)
@click.option("--fresh", is_flag=True, help="Drop the results that this spec has, and compute them again.")
@click.option("--quiet", is_flag=True, help="Say only what went wrong, and the result.")
@options.as_json
def submit_command(
    spec: Path,
    store: str,
    registry: Path,
    address: str | None,
    detach: bool,
    local: bool,
    dashboard: bool,
    fresh: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Run what is missing of SPEC, and show the leaderboard.

    Finished nodes are kept by what they are, so the same command goes on after an interruption, and a changed spec
    runs only what the change touches. Exit codes: 0 done, 1 some nodes failed, 2 wrong use, 130 interrupted.
    """
    from experiments.spec import load
    from orchestrator import costs
    from orchestrator.artifact import Store
    from orchestrator.plan import plan
    from orchestrator.registry import Registry
    from orchestrator.status import status

    if local and (address or detach):
        raise click.UsageError("--local runs in this process: leave out --address and --detach")
    experiment, _ = load(spec)
    say = nothing if quiet else to_stderr
    for warning in experiment.warnings():
        say(f"note: {warning}")
    planned = plan(experiment)
    with Registry(registry):
        pass  # one that cannot be used is found out now, not after hours
    if detach:
        for line in costs.lines(costs.asked(planned, status(planned, Store(store)))):
            say(line)
        _detach(spec, store, registry, address, experiment.name)
        return
    place = Store(store)
    with place.lock(experiment.name, to_stderr):
        if fresh:
            for key in planned.nodes:
                place.discard(key)
        ask = executors(experiment.resources, place, address, local, dashboard, say)
        summary = run_missing(planned, place, ask, quiet, say)
    finish(planned, place, registry, as_json)
    if summary is not None and not summary.ok:
        sys.exit(1)


def nothing(text: str) -> None:
    """For --quiet."""


def to_stderr(text: str) -> None:
    click.echo(text, err=True)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def run_missing(planned: Graph, store: Store, executor: Executors, quiet: bool, say: Say) -> Summary | None:
    """Run every node without a record; None when there is none, and then nothing was started."""
    from orchestrator import costs
    from orchestrator.status import status

    states = status(planned, store)
    missing = [one.node for one in states if one.state != "have"]
    name, trials, nodes = planned.name, len(planned.trials), len(planned.nodes)
    say(f"{name}: {trials:,} trials, {nodes:,} nodes, {len(missing):,} to run")
    for line in costs.lines(costs.asked(planned, states)):
        say(line)
    if not missing:
        return None
    from orchestrator.progress import progress
    from orchestrator.run import walk

    meter = progress(missing, terminal=sys.stderr.isatty(), quiet=quiet, write=to_stderr)
    with executor() as where, meter as tell:
        signal.signal(signal.SIGTERM, _interrupt)  # now, because Ray sets its own when it starts
        summary = walk(missing, store, where, tell)
    for line in _told(summary):
        to_stderr(line)
    return summary


def executors(
    wanted: Resources, store: Store, address: str | None, local: bool, dashboard: bool, say: Say
) -> Executors:
    """A context that gives the executor: this process, or Ray."""

    @contextlib.contextmanager
    def here() -> Iterator[Executor]:
        from orchestrator.run import LocalExecutor
        from orchestrator.workspace import Workspace

        yield LocalExecutor(store, Workspace(threads=len(os.sched_getaffinity(0))))

    @contextlib.contextmanager
    def on_ray() -> Iterator[Executor]:
        from orchestrator.cluster import RayExecutor, connected
        from orchestrator.resources import Ask

        memory = int(wanted.memory_gib * 2**30) if wanted.memory_gib else None
        ask = Ask(cpus=wanted.cpu, gpus=wanted.gpu, memory=memory)
        with connected(address, dashboard=dashboard) as url:
            if url:
                say(f"dashboard: {url} (its token: ~/.ray/auth_token)")
            executor = RayExecutor(store, ask, most=wanted.workers, tell=say)
            yield executor
            executor.close()

    return here if local else on_ray


def _told(summary: Summary) -> list[str]:
    """What came of a walk."""
    from orchestrator.progress import clock, last_line

    lines = [f"{len(summary.done):,} nodes done in {clock(summary.seconds)}"]
    if summary.ok:
        return lines
    lines[0] += f", {len(summary.failed):,} failed, {len(summary.blocked):,} blocked by them"
    for node, reason in list(summary.failed.values())[:MOST_FAILURES]:
        lines.append(f"  failed  {node.name}: {last_line(reason)}  (orch why {node.short})")
    if len(summary.failed) > MOST_FAILURES:
        lines.append(f"  ... and {len(summary.failed) - MOST_FAILURES:,} more")
    lines.append("the same command tries them again")
    return lines


def finish(planned: Graph, store: Store, registry: Path, as_json: bool) -> None:
    """Bring the registry up to date, show the leaderboard, and say where to look next."""
    from orchestrator import detected, logs, matrix, report
    from orchestrator.commands.results import width
    from orchestrator.publish import publish
    from orchestrator.registry import Registry

    with Registry(registry) as index:
        rows = publish(planned, store, index)
        found = [*matrix.lines(index.confusions(planned.name)), *detected.lines(index.detections(planned.name))]
    click.echo(json.dumps(rows, indent=1, allow_nan=False) if as_json else report.plain(rows, width()))
    for line in [] if as_json else found:
        click.echo(line)
    name = planned.name
    to_stderr("")
    if folder := logs.link(planned, store):
        to_stderr(f"every question and answer   inspect view --log-dir {os.path.relpath(folder)}")
    to_stderr(f"a page about it             orch report {name}")
    sql = f"select * from dose_response where experiment = '{name}'"
    to_stderr(f'dose-response curves        sqlite-utils query {os.path.relpath(registry)} "{sql}" --table')


def _detach(spec: Path, store: str, registry: Path, address: str | None, name: str) -> None:
    """Hand the work to a Ray job, on a head of our own when no cluster is named, and say how to follow it."""
    from orchestrator import head, jobs

    own = address is None
    where = address or head.start().address
    place = store if "://" in store else str(Path(store).absolute())
    arguments = [
        "submit",
        str(spec.absolute()),
        "--store",
        place,
        "--registry",
        str(registry.absolute()),
        "--address",
        where,
    ]
    job = jobs.submit_job(where, arguments, name)
    url = jobs.dashboard_url(where)
    ray = f"RAY_AUTH_MODE=token ray job {{}} --address {url}"
    click.echo(f"submitted {job}")
    click.echo(f"  follow     {ray.format('logs')} --follow {job}")
    click.echo(f"  status     {ray.format('status')} {job}")
    click.echo(f"  cancel     {ray.format('stop')} {job}")
    click.echo(f"  dashboard  {url} (its token: ~/.ray/auth_token)")
    click.echo("  result     orch board" + (f" {name}" if name else ""))
    if own:
        click.echo("  the cluster stays up for more jobs; end it with: orch stop")


@click.command()
def stop() -> None:
    """Stop the Ray cluster that `orch submit --detach` left running here, with its jobs. Finished nodes are kept."""
    from orchestrator import head

    stopped = head.stop()
    click.echo(f"stopped the cluster at {stopped.address}" if stopped else "no cluster of ours is running here")


COMMANDS = (submit_command, stop)
