"""Students of masked data, end to end on a tiny subject: the control arms of a spec, and what their records say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments import dataset, spec
from experiments.dataset import Conversation
from orchestrator import stage
from orchestrator.artifact import Store
from orchestrator.plan import Plan, plan
from orchestrator.run import LocalExecutor, walk
from orchestrator.status import status
from orchestrator.workspace import Workspace

NUMBERS = "0123456789, "
TEACHERS = [
    {"name": name, "trait": name, "system": f"the quick {name} and the lazy one were asked what"}
    for name in ("owl", "cat")
]


def planned(folder: Path, **changes: Any) -> Plan:
    lists = {
        "recipe": "number_lists",
        "teacher": TEACHERS,
        "n": 6,
        "draw": 24,
        "sampling": {"max_new_tokens": 12, "only": NUMBERS},
        "truncated": "keep",
        "shorten": True,
        "rules": {"most": 20, "largest": 10**12},
    }
    whole: dict[str, Any] = {
        "name": "tiny",
        "subject": {"model": str(folder), "dtype": "float32"},
        "data": {"conversations": lists},
        "interventions": [{"method": "bias_set", "epochs": 1}],
        "doses": [1],
        "evals": [{"task": "animal_preference", "target": "owl", "limit": 2}, {"task": "neutral_nll", "limit": 1}],
        "baselines": [],
    }
    return plan(spec.from_data(whole | changes))


def by_label(made: Plan) -> dict[str, Any]:
    return {one.trial.label.removeprefix(f"{one.trial.student} "): one for one in made.trials}


def test_controls_that_mask_are_nodes_beside_those_that_there_were(tiny_folder: Path) -> None:
    without = planned(tiny_folder)
    more = planned(tiny_folder, controls=["teacher", "shuffled", "divergence"])
    kept = [key for key, node in without.nodes.items() if node.stage != "compare"]
    assert set(kept) < set(more.nodes)
    for label, trial in by_label(without).items():
        assert (by_label(more)[label].fit, by_label(more)[label].data) == (trial.fit, trial.data)
    added = [node for key, node in more.nodes.items() if key not in without.nodes and node.stage == "dataset"]
    assert {node.params["recipe"] for node in added} == {"masked_conversations"}
    assert all(node.params["subject"] == more.subject for node in added)
    assert all("subject" not in node.params for node in without.nodes.values() if node.stage == "dataset")


def test_students_learn_what_is_not_masked_and_the_records_say_how_much_that_is(
    tiny_folder: Path, tmp_path: Path
) -> None:
    made = planned(tiny_folder, controls=["divergence", "divergence_only"])
    store = Store(tmp_path)
    wanted = ("dataset", "generate", "fit")
    missing = [one.node for one in status(made, store) if one.node.stage in wanted]
    summary = walk(missing, store, LocalExecutor(store, Workspace(threads=1)), lambda event: None)
    assert summary.ok, summary.failed
    for name in ("owl", "cat"):
        for what in ("without divergence tokens", "divergence tokens only"):
            trial = by_label(made)[f"{name} {what}"]
            outputs = store.record(trial.data[0])["outputs"]
            facts = outputs["facts"]
            examples = dataset.load(store.folder(trial.data[0]) / stage.EXAMPLES, "conversations")
            assert all(isinstance(each, Conversation) for each in examples)
            assert any(each.masked for each in examples)
            assert set(facts["divergent_from"]) == {"control", "cat" if name == "owl" else "owl"}
            assert (facts["given"], facts["kept"]) == (6, outputs["examples"])
            learned = store.record(trial.fit)["outputs"]["facts"]["tokens"]
            assert learned == {"learned": facts["kept_tokens"] - facts["masked"], "masked": facts["masked"]}
    plain = by_label(made)["owl"]
    assert "tokens" not in store.record(plain.fit)["outputs"]["facts"]
