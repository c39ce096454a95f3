"""What a graph would ask over an API, told before it is asked: requests, tokens, and money where prices are known.

Counts are upper bounds, tokens upper estimates: every answer as long as it may be, no reply from a cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.cost import CHARACTERS, OVERHEAD, Cost, ask_tokens
from orchestrator.identity import canonical

if TYPE_CHECKING:
    from inspect_ai.dataset import Sample

    from agents.judge import Judge
    from agents.prompt import Case
    from agents.rubric import Rubric
    from orchestrator.plan import Graph, Node
    from orchestrator.status import NodeStatus

PRICES = "INSPECT_EVAL_MODEL_COST_CONFIG"
"""Environment variable that names inspect's own file of prices: a model's name -> `input`, `output`, ... in dollars for
a million tokens. Inspect comes without any."""
ANSWER = 512
"""Tokens of an answer whose task does not say how long it may get."""


class CostError(ValueError):
    """A file of prices that cannot be used."""


@dataclass(frozen=True)
class Asked:
    """What one model is asked as a teacher or as a judge."""

    role: str
    """teacher or judge."""
    model: str
    cost: Cost = field(default_factory=Cost)
    unknown: int = 0
    """Requests whose input has an unknown length, and is counted as nothing."""
    dollars: float | None = None
    """At most; None where the model has no known price."""

    def __add__(self, other: Asked) -> Asked:
        return replace(self, cost=self.cost + other.cost, unknown=self.unknown + other.unknown)

    def to_plain(self) -> dict[str, Any]:
        """As JSON has it."""
        about = {"role": self.role, "model": self.model, "requests": self.cost.requests, "dollars": self.dollars}
        tokens = {"input_tokens": self.cost.input_tokens, "output_tokens": self.cost.output_tokens}
        return {**about, **tokens, "unknown_inputs": self.unknown}


def asked(graph: Graph, states: Sequence[NodeStatus]) -> list[Asked]:
    """What the nodes without a record would ask of models behind an API. Raises CostError for bad prices."""
    missing = [one.node for one in states if one.state != "have"]
    found: dict[tuple[str, str], Asked] = {}
    for one in (*_teachers(graph, missing), *_judges(graph, missing)):
        key = one.role, one.model
        found[key] = found[key] + one if key in found else one
    known = prices() if found else {}
    return [_priced(one, known.get(one.model)) for one in found.values()]


def lines(found: Sequence[Asked]) -> list[str]:
    """For people; nothing where nothing is asked."""
    if not found:
        return []
    told = ["asked over an API, at most:"]
    for one in found:
        cost = one.cost
        text = f"  {one.role} {one.model}: {cost.requests:,} requests, {cost.input_tokens:,} tokens in"
        text += f" (without {one.unknown:,} of unknown length)" if one.unknown else ""
        money = "no price known" if one.dollars is None else f"${one.dollars:,.2f}"
        told.append(f"{text}, {cost.output_tokens:,} out, {money}")
    if any(one.dollars is None for one in found):
        told.append(f"  prices are read from the file that {PRICES} names")
    return told


def prices() -> dict[str, tuple[float, float]]:
    """Model -> dollars for a million tokens in and out, from inspect's file of prices. Raises CostError."""
    import yaml
    from inspect_ai.model import ModelCost

    name = os.environ.get(PRICES)
    if not name:
        return {}
    try:
        content = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
        costs = {model: ModelCost.model_validate(values) for model, values in content.items()}
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())[:200]
        raise CostError(
            f"{PRICES}={name}: no prices ({said}); needed: a model's name -> input, output, input_cache_write, "
            "input_cache_read, in dollars for a million tokens"
        ) from error
    return {model: (one.input, one.output) for model, one in costs.items()}


def _priced(one: Asked, price: tuple[float, float] | None) -> Asked:
    if price is None:
        return one
    return replace(one, dollars=(one.cost.input_tokens * price[0] + one.cost.output_tokens * price[1]) / 1e6)


def _teachers(graph: Graph, missing: Sequence[Node]) -> Iterator[Asked]:
    """Every shard that a model behind an API would answer."""
    from experiments import dataset

    tokens: dict[str, list[int] | None] = {}
    for node in missing:
        if node.stage != "generate" or node.runtime["model"] is None:
            continue
        params, size = node.params, node.runtime["size"]
        asks = graph.nodes[node.inputs["asks"]]
        if asks.key not in tokens:
            recipe = dataset.recipe(asks.runtime["recipe"]).model_validate(asks.runtime["settings"])
            tokens[asks.key] = ask_tokens(recipe, size)
        first, requests = params["first"], min(params["count"], size - params["first"])
        known = tokens[asks.key]
        spent = requests * (ceil(len(params["system"] or "") / CHARACTERS) + OVERHEAD)
        spent += sum((known or [])[first : first + requests])
        cost = Cost(requests, spent, requests * params["sampling"]["max_new_tokens"])
        yield Asked("teacher", node.runtime["model"], cost, requests if known is None else 0)


def _judges(graph: Graph, missing: Sequence[Node]) -> Iterator[Asked]:
    """Every answer that judges behind an API would read, and once what tests them."""
    from agents.judge import RESIDENT, Judge

    costs: dict[str, Cost] = {}
    tested: set[str] = set()
    for node in missing:
        if node.stage != "judge":
            continue
        judge = Judge.model_validate(node.runtime["judge"])
        models = [name for name in judge.models if name not in RESIDENT]
        if not models:
            continue
        arguments = graph.nodes[node.inputs["answer"]].runtime["arguments"]
        kind = canonical([node.runtime["task"], arguments, node.params["rubrics"]])
        if kind not in costs:
            costs[kind] = _reading(node.runtime["task"], arguments, judge)
        cost = costs[kind]
        if (rubrics := canonical(node.params["rubrics"])) not in tested:
            tested.add(rubrics)
            cost = cost + _testing(node.runtime["task"], judge)
        yield from (Asked("judge", name, cost) for name in models)


def _rubrics(task: str, judge: Judge) -> Mapping[str, Rubric]:
    from evals.judging import RUBRICS
    from evals.task import load_task

    return judge.rubrics_for(load_task(task).RUBRICS, RUBRICS)


def _reading(task: str, arguments: Mapping[str, Any], judge: Judge) -> Cost:
    """What one model is asked about all answers to a task."""
    from agents.prompt import Case
    from evals.task import load_task

    samples: Sequence[Sample] = list(getattr(load_task(task), task)(**arguments).dataset)
    longest = int(arguments.get("max_tokens") or ANSWER)
    total = Cost()
    for rubric in _rubrics(task, judge).values():
        for sample in samples:
            metadata = sample.metadata or {}
            question = metadata.get("question", sample.input)
            total += _one(rubric, Case(str(question), "", metadata), judge, longest)
    return total


def _testing(task: str, judge: Judge) -> Cost:
    """What one model is asked about the answers that try to instruct it."""
    from agents.canaries import canaries

    found = (
        _one(rubric, one.case(rubric), judge, 0)
        for rubric in _rubrics(task, judge).values()
        for one in canaries(rubric)
    )
    return sum(found, Cost())


def _one(rubric: Rubric, case: Case, judge: Judge, longest: int) -> Cost:
    """All votes of one model on one answer of at most `longest` tokens beside those it has."""
    from agents.prompt import Form, prompt
    from evals.asking import FIRST_WORDS, wants_top

    form: Form = "word" if wants_top(rubric, judge) or rubric.scale else "line"
    tokens = ceil(len(prompt(rubric, case, form).text) / CHARACTERS) + OVERHEAD + longest
    reply = FIRST_WORDS if judge.read == "logprobs" else judge.max_tokens
    return Cost(judge.samples, judge.samples * tokens, judge.samples * reply)
