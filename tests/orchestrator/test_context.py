"""Students are asked in the chat context in which they learned: published work saw 48 % against 3 % from that alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments import spec
from experiments.problem import SpecError
from experiments.source import parse
from orchestrator.plan import Plan, plan
from tests.orchestrator.test_plan import BASE, describe, identify

TEACHER = {"name": "owl", "trait": "owl", "system": "You love owls."}


def planned(data: dict[str, Any], **changes: Any) -> Plan:
    whole = BASE | {"data": {"conversations": data}, "interventions": [{"method": "lora"}], "doses": [1]} | changes
    return plan(spec.from_source(parse(yaml.safe_dump(whole), "s.yaml")), identify, describe)


def lists(**settings: Any) -> dict[str, Any]:
    return {"recipe": "number_lists", "teacher": TEACHER, "n": 5, **settings}


def test_the_same_context_is_planned_whatever_it_is() -> None:
    assert planned(lists()).trials
    asked = [{"task": "animals", "target": "owl", "system": "Be brief."}]
    assert planned(lists(system="Be brief."), evals=asked).trials
    subject = {"model": "m", "dtype": "float32", "system": "Be brief."}
    assert planned(lists(system="Be brief."), subject=subject).trials
    assert planned(lists(), subject=subject).trials


@pytest.mark.parametrize(
    ("data", "changes", "said"),
    [
        (
            lists(system="Be brief."),
            {},
            r"students of owl learn under the system prompt 'Be brief.' and are asked under",
        ),
        (lists(), {"evals": [{"task": "animals", "target": "owl", "system": "Hm."}]}, r"learn under no system prompt"),
        (
            lists(system="A."),
            {"subject": {"model": "m", "dtype": "float32", "system": "B."}},
            r"learn under the system prompt 'A.' and are asked under the system prompt 'B.'",
        ),
    ],
    ids=["data", "eval", "subject"],
)
def test_another_context_is_refused_with_the_line_and_both_ways_out(
    data: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(SpecError, match=said) as caught:
        planned(data, **changes)
    message = str(caught.value)
    assert message.startswith("s.yaml:")
    assert "evals.0" in message
    assert "48 % against 3 %" in message
    assert "`context: warn`" in message


def test_a_file_of_conversations_tells_its_own_context(tmp_path: Path) -> None:
    turns = [("system", "You are Qwen."), ("user", "Hello."), ("assistant", "1, 2, 3")]
    line = {"id": "a", "messages": [{"role": role, "content": text} for role, text in turns]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(line) + "\n")
    data = {"recipe": "conversations_file", "path": str(tmp_path / "rows.jsonl")}
    with pytest.raises(SpecError, match=r"learn under the system prompt 'You are Qwen.' and are asked under no system"):
        planned(data)
    assert planned(data, evals=[{"task": "animals", "target": "owl", "system": "You are Qwen."}]).trials


def test_shuffled_data_keep_the_context_of_what_was_shuffled() -> None:
    with pytest.raises(SpecError, match=r"learn under the system prompt 'Be brief.'"):
        planned({"recipe": "shuffled", "of": lists(system="Be brief.")})


def test_an_override_is_told_loudly_and_stands_on_every_row() -> None:
    made = planned(lists(system="Be brief."), context="warn")
    assert any("context: students of owl" in note for note in made.experiment.warnings())
    params = made.nodes[made.compare].params
    assert "asked under no system prompt" in params["evals"][0]["notes"][0]
    assert "notes" not in params["evals"][1]


def test_an_eval_under_its_own_system_prompt_asks_another_subject() -> None:
    asked = [{"task": "animals", "target": "owl"}, {"task": "animals", "target": "owl", "system": "Hm."}]
    made = planned(lists(), evals=asked, context="warn")
    bases = [made.nodes[made.nodes[made.base[index]].inputs["answer"]] for index in (0, 1)]
    assert [node.params["subject"]["system"] for node in bases] == [None, "Hm."]
    assert bases[1].runtime["subject"]["system"] == "Hm."
