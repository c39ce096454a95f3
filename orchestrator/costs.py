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
from orchestrator.filters import ABOUT
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
    tokens: dict[str, list[int] | None] = {}
    for node in missing:
        if node.stage != "generate" or node.runtime["model"] is None:
            continue
        params = node.params
        requests, asks, unknown = _shard(graph, node, tokens)
        spent = requests * (ceil(len(params["system"] or "") / CHARACTERS) + OVERHEAD) + asks
        cost = Cost(requests, spent, requests * params["sampling"]["max_new_tokens"])
        yield Asked("teacher", node.runtime["model"], cost, unknown)


def _shard(graph: Graph, node: Node, known: dict[str, list[int] | None]) -> tuple[int, int, int]:
    """How many asks a `generate` node has, their tokens, and of how many these are unknown. `known` grows: tokens by
    the asks' key."""
    from experiments import dataset

    first, size = node.params["first"], node.runtime["size"]
    requests = min(node.params["count"], size - first)
    asks = graph.nodes[node.inputs["asks"]]
    if asks.key not in known:
        recipe = dataset.recipe(asks.runtime["recipe"]).model_validate(asks.runtime["settings"])
        known[asks.key] = ask_tokens(recipe, size)
    tokens = known[asks.key]
    return requests, sum((tokens or [])[first : first + requests]), requests if tokens is None else 0


def _judges(graph: Graph, missing: Sequence[Node]) -> Iterator[Asked]:
    """Every answer that judges behind an API would read, and once what tests them."""
    from agents.judge import RESIDENT, Judge
    from evals import RUBRICS

    costs: dict[str, Cost] = {}
    asks: dict[str, list[int] | None] = {}
    tested: set[str] = set()
    for node in missing:
        if node.stage != "judge":
            continue
        judge = Judge.model_validate(node.runtime["judge"])
        models = [name for name in judge.models if name not in RESIDENT]
        if not models:
            continue
        rubrics = judge.rubrics_for(node.params["rubrics"], RUBRICS)
        unknown = 0
        if "said" in node.inputs:
            cost, unknown = _reading_rows(graph, node, rubrics, judge, asks)
        else:
            arguments = graph.nodes[node.inputs["answer"]].runtime["arguments"]
            kind = canonical([node.runtime["task"], arguments, node.params["rubrics"]])
            if kind not in costs:
                costs[kind] = _reading(node.runtime["task"], arguments, rubrics, judge)
            cost = costs[kind]
        if (who := canonical([models, node.params["rubrics"]])) not in tested:
            tested.add(who)
            cost = cost + _testing(rubrics, judge)
        yield from (Asked("judge", name, cost, unknown) for name in models)


def _reading_rows(
    graph: Graph, node: Node, rubrics: Mapping[str, Rubric], judge: Judge, known: dict[str, list[int] | None]
) -> tuple[Cost, int]:
    """What one model is asked about all that a teacher says in a shard, and how many asks have an unknown length."""
    from agents.prompt import Case

    said = graph.nodes[node.inputs["said"]]
    requests, asks, unknown = _shard(graph, said, known)
    case = Case("", "", {ABOUT: node.params.get(ABOUT, "")})
    (rubric,) = rubrics.values()
    one = _one(rubric, case, judge, said.params["sampling"]["max_new_tokens"])
    tokens = requests * one.input_tokens + judge.samples * asks
    return Cost(requests * one.requests, tokens, requests * one.output_tokens), unknown


def _reading(task: str, arguments: Mapping[str, Any], rubrics: Mapping[str, Rubric], judge: Judge) -> Cost:
    """What one model is asked about all answers to a task."""
    from agents.prompt import Case
    from evals.task import load_task

    samples: Sequence[Sample] = list(getattr(load_task(task), task)(**arguments).dataset)
    longest = int(arguments.get("max_tokens") or ANSWER)
    total = Cost()
    for rubric in rubrics.values():
        for sample in samples:
            metadata = sample.metadata or {}
            question = metadata.get("question", sample.input)
            total += _one(rubric, Case(str(question), "", metadata), judge, longest)
    return total


def _testing(rubrics: Mapping[str, Rubric], judge: Judge) -> Cost:
    """What one model is asked about the answers that try to instruct it."""
    from agents.canaries import canaries

    found = (_one(rubric, one.case(rubric), judge, 0) for rubric in rubrics.values() for one in canaries(rubric))
    return sum(found, Cost())


def _one(rubric: Rubric, case: Case, judge: Judge, longest: int) -> Cost:
    """All votes of one model on one answer of at most `longest` tokens beside those it has."""
    from agents.prompt import Form, prompt
    from evals.asking import FIRST_WORDS, wants_top

    form: Form = "word" if wants_top(rubric, judge) or rubric.scale else "line"
    tokens = ceil(len(prompt(rubric, case, form).text) / CHARACTERS) + OVERHEAD + longest
    reply = FIRST_WORDS if judge.read == "logprobs" else judge.max_tokens
    return Cost(judge.samples, judge.samples * tokens, judge.samples * reply)
