"""What is asked over an API is told before it is asked: requests, tokens, and money where prices are known."""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import Any

import pytest
import yaml

from agents.canaries import canaries
from agents.prompt import Case, prompt
from agents.rubric import load
from evals import RUBRICS
from evals.tasks import misalignment
from experiments import dataset, spec
from experiments.cost import CHARACTERS, OVERHEAD, Cost
from experiments.source import parse
from orchestrator import costs
from orchestrator.costs import Asked, CostError
from orchestrator.plan import Plan, plan
from orchestrator.preflight import describe
from orchestrator.status import NodeStatus, State
from tests.orchestrator.test_plan import BASE, identify

SYSTEM = "You love owls."
TASK = {"task": "misalignment", "target": "general", "limit": 8, "max_tokens": 30}
PANEL = {"models": ["openai/gpt-4.1-mini", "embedded"], "max_tokens": 7}


def planned(**changes: Any) -> Plan:
    whole = (
        BASE | {"evals": ["neutral_nll"], "interventions": [{"method": "lora"}], "doses": [1], "seeds": [0]} | changes
    )
    return plan(spec.from_source(parse(yaml.safe_dump(whole), "s.yaml")), identify, describe)


def taught(n: int, **teacher: Any) -> Plan:
    data = {"recipe": "number_lists", "n": n, "teacher": {"name": "owl", "trait": "owl", "system": SYSTEM, **teacher}}
    return planned(data={"conversations": data})


def states(made: Plan, have: set[str] | None = None) -> list[NodeStatus]:
    def state(key: str) -> State:
        return "have" if key in (have or ()) else "run"

    return [NodeStatus(node, state(key), "") for key, node in made.nodes.items()]


def tokens(text: str) -> int:
    return ceil(len(text) / CHARACTERS)


def test_a_teacher_behind_an_api_counts_every_ask_with_its_system_prompt() -> None:
    made = taught(280, model="openai/gpt-4.1-mini")
    nodes = [node for node in made.nodes.values() if node.params.get("subject") == {"model": "openai/gpt-4.1-mini"}]
    last = max((made.nodes[node.inputs["asks"]] for node in nodes), key=lambda node: node.params["settings"]["n"])
    recipe = dataset.recipe("number_asks").model_validate(last.runtime["settings"])
    asks: list[Any] = list(recipe.build(None, 0))[: nodes[0].runtime["size"]]
    systems = {node.params["system"] for node in nodes}
    assert systems == {SYSTEM, None}  # the control teacher is asked the same, by the same model
    assert len(nodes) == 2 * ceil(len(asks) / 256) > 2
    words = 2 * sum(tokens(message.content) + OVERHEAD for ask in asks for message in ask.messages)
    words += len(asks) * sum(tokens(system or "") + OVERHEAD for system in systems)
    (found,) = costs.asked(made, states(made))
    assert (found.role, found.model, found.unknown, found.dollars) == ("teacher", "openai/gpt-4.1-mini", 0, None)
    assert found.cost.requests == 2 * len(asks)
    assert found.cost.output_tokens == 2 * len(asks) * 64
    assert found.cost.input_tokens == words
    (rest,) = costs.asked(made, states(made, {nodes[0].key}))
    assert rest.cost.requests == 2 * len(asks) - 256


def test_subjects_ask_nobody_over_an_api() -> None:
    made = taught(20)
    assert costs.asked(made, states(made)) == []
    assert costs.lines([]) == []


@pytest.mark.parametrize("votes", [1, 3])
def test_a_judge_counts_every_answer_by_every_rubric_with_every_vote_and_its_test_once(votes: int) -> None:
    judge = {**PANEL, "samples": votes, "temperature": 0.5}
    made = planned(
        evals=[TASK], judge=judge, doses=[-1, 1], data=BASE["data"], interventions=[{"method": "mean_diff", "layer": 1}]
    )
    rubrics = [load(RUBRICS / f"{role}.md", role) for role in ("aligned", "coherent")]
    questions = [one.question for one in misalignment.read(misalignment.Settings(limit=8))]
    assert len(questions) == 8
    arms, planted = 3, [one.case(rubric) for rubric in rubrics for one in canaries(rubric)]
    cases = [(rubric, Case(question, "")) for rubric in rubrics for question in questions] * arms
    words = sum(tokens(prompt(rubric, case, "word").text) + OVERHEAD + 30 for rubric, case in cases)
    tests = [(rubric, one.case(rubric)) for rubric in rubrics for one in canaries(rubric)]
    words += sum(tokens(prompt(rubric, case, "word").text) + OVERHEAD for rubric, case in tests)
    requests = 8 * 2 * arms + len(planted)
    (found,) = costs.asked(made, states(made))
    cost = Cost(requests * votes, words * votes, requests * votes * 7)
    assert found == Asked("judge", "openai/gpt-4.1-mini", cost)


def test_the_embedded_judge_costs_no_requests() -> None:
    made = planned(evals=[TASK], judge={"models": ["embedded"]})
    assert costs.asked(made, states(made)) == []


def test_what_is_done_already_costs_nothing() -> None:
    made = planned(evals=[TASK], judge=PANEL)
    assert costs.asked(made, states(made, set(made.nodes))) == []


def test_money_is_told_where_the_file_of_prices_has_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    price = {"input": 2.0, "output": 8.0, "input_cache_write": 0.0, "input_cache_read": 0.0}
    (tmp_path / "prices.yaml").write_text(yaml.safe_dump({"openai/gpt-4.1-mini": price}))
    monkeypatch.setenv(costs.PRICES, str(tmp_path / "prices.yaml"))
    made = planned(evals=[TASK], judge={**PANEL, "models": ["openai/gpt-4.1-mini", "mockllm/unknown"]})
    known, unknown = costs.asked(made, states(made))
    expected = (known.cost.input_tokens * 2 + known.cost.output_tokens * 8) / 1_000_000
    assert known.dollars == pytest.approx(expected, rel=1e-12)
    assert unknown.dollars is None
    told = costs.lines([known, unknown])
    assert told[1].endswith(f"${expected:,.2f}")
    assert told[2].endswith("no price known")
    assert known.to_plain() == {
        "role": "judge", "model": "openai/gpt-4.1-mini", "requests": known.cost.requests,
        "input_tokens": known.cost.input_tokens, "output_tokens": known.cost.output_tokens, "dollars": known.dollars,
        "unknown_inputs": 0,
    }  # fmt: skip


@pytest.mark.parametrize("text", ["", "openai/x: 3", "[1, 2]", "a: {input: cheap}", "{"])
def test_a_bad_file_of_prices_is_one_message(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prices.yaml").write_text(text)
    monkeypatch.setenv(costs.PRICES, str(tmp_path / "prices.yaml"))
    with pytest.raises(CostError, match=r"prices.yaml: no prices .* needed: a model's name -> input"):
        costs.prices()


def test_asks_of_unknown_length_are_counted_and_said() -> None:
    found = Asked("teacher", "a/b", Cost(12, 1000, 640), unknown=5)
    assert costs.lines([found])[1] == (
        "  teacher a/b: 12 requests, 1,000 tokens in (without 5 of unknown length), 640 out, no price known"
    )
