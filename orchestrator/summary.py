"""A page about one experiment, in Markdown, from the registry alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evals import journal
from orchestrator import detected, matrix, report
from orchestrator.registry import RegistryError

if TYPE_CHECKING:
    from orchestrator.registry import Registry

UNRANKED = "select stage as eval, label, status, reason from failures where experiment = ?"
COST = """
with recursive needed(key) as (
  select value from json_each(?) union select i.input from node_inputs i join needed on i.node = needed.key
)
select stage, coalesce(method, '') as method, count(*) as nodes, round(sum(
    coalesce(json_extract(outputs, '$.eval_seconds'), json_extract(outputs, '$.fit_seconds'), seconds)), 1) as seconds,
  max(peak_rss_mib) as peak_rss_mib
from nodes join needed using (key) group by 1, 2 order by seconds desc
"""


def page(registry: Registry, experiment: str) -> str:
    """Question, leaderboard, what has no rank, and cost. Raises RegistryError for a name it does not know."""
    rows = registry.leaderboard(experiment)
    if not rows:
        known = [row["name"] for row in registry.query("select distinct name from experiments order by name")]
        raise RegistryError(f"no experiment {experiment!r} in {registry.path}; known: {', '.join(known) or 'none'}")
    key = rows[0]["experiment_key"]
    (about,) = registry.query("select question, submitted_at, complete from experiments where key = ?", [key])
    state = "" if about["complete"] else " Some scores are missing."
    parts = [f"# {experiment}", about["question"], f"Submitted {about['submitted_at']}, key {key[:12]}.{state}"]
    keys = list(dict.fromkeys(row["experiment_key"] for row in rows))
    if others := ", ".join(other[:12] for other in keys[1:]):
        parts.append(f"The same answers were judged by others too: {others}.")
    parts += [report.markdown(rows).rstrip()]
    if drawn := matrix.lines(registry.confusions(experiment)):
        parts += ["## Datasets and traits", "```\n" + "\n".join(drawn).rstrip() + "\n```"]
    if told := detected.lines(registry.detections(experiment)):
        parts += ["## Detection without training", "```\n" + "\n".join(told).rstrip() + "\n```"]
    curves = registry.query("select * from dose_response where experiment_key = ?", [key])
    if scores := journal.of_curves(curves):
        parts += ["## Score of journal 004", "For comparison only: docs/journal_score.md.", "\n".join(table(scores))]
    for title, sql, value in (("Without a rank", UNRANKED, experiment), ("Cost", COST, json.dumps(keys))):
        if found := registry.query(sql, [value]):
            parts += [f"## {title}", "\n".join(table(found))]
    return "\n\n".join(part for part in parts if part)


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows as a Markdown table."""
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    return lines + [f"| {' | '.join(_cell(row[name]) for name in names)} |" for row in rows]


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
