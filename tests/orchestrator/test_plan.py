"""A spec becomes a graph whose keys change with everything that matters and with nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from experiments import intervention, plugin, spec
from experiments.intervention import Intervention
from experiments.problem import SpecError
from experiments.source import parse
from experiments.spec import SubjectSpec
from orchestrator.artifact import Store
from orchestrator.identity import CanonicalError, node_key
from orchestrator.plan import STAGE_VERSIONS, Node, Plan, plan
from orchestrator.status import status

BASE: dict[str, Any] = {
    "name": "owl",
    "subject": {"model": "m", "dtype": "float32"},
    "data": {"pairs": {"recipe": "persona_pairs", "positive": "owls", "negative": "cats", "responses": "shared"}},
    "interventions": [{"method": "mean_diff", "layer": [1, 2]}, {"method": "lora"}],
    "doses": [-1, 1],
    "evals": [{"task": "animals", "target": "owl"}],
    "seeds": [0, 1],
    "baselines": [],
}


@dataclass
class Facts:
    identity: dict[str, Any]
    runtime: dict[str, Any] = field(default_factory=dict)
    version: int = 1
    higher_is: str = "more target"
    rubrics: tuple[str, ...] = ()
    scoring: dict[str, Any] = field(default_factory=dict)


def identify(subject: SubjectSpec) -> dict[str, Any]:
    return {"model": Path(subject.model).name, "dtype": subject.dtype, "system": subject.system}


def describe(task: str, target: str | None, params: Any) -> Facts:
    if target == "unicorn":
        raise ValueError("unknown target 'unicorn'; allowed: owl, cat")
    return Facts({"target": target, **params})


def planned(**changes: Any) -> Plan:
    experiment = spec.from_source(parse(yaml.safe_dump(BASE | changes), "s.yaml"))
    return plan(experiment, identify, describe)


def keys(made: Plan, stage: str) -> set[str]:
    return {node.key for node in made.nodes.values() if node.stage == stage}


def test_every_node_is_there_once_and_after_its_inputs() -> None:
    made = planned()
    count = {stage: len(keys(made, stage)) for stage in STAGE_VERSIONS}
    answers = 3 * 2 * 2 * 2 + 2  # settings, seeds, doses, evals with the damage; and the untouched subject
    assert count == {
        "dataset": 2, "generate": 0, "interpret": 0, "fit": 6, "calibrate": 0, "answer": answers, "judge": 0,
        "score": answers, "compare": 1,
    }  # fmt: skip
    seen: set[str] = set()
    for key, node in made.nodes.items():
        assert key == node.key
        assert seen.issuperset(node.inputs.values())
        seen.add(key)


def test_a_key_is_what_identity_says_of_the_node_alone() -> None:
    for node in planned().nodes.values():
        plain = yaml.safe_load(yaml.safe_dump(_plain(node.params)))
        assert node.key == node_key(node.stage, node.version, plain, dict(node.inputs))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def test_the_untouched_subject_answers_once_for_all_trials() -> None:
    made = planned()
    base = [node for node in made.nodes.values() if node.stage == "answer" and not node.inputs]
    assert len(base) == len(made.evals) == 2
    assert all("dose" not in node.params for node in base)


def test_the_compare_node_reads_every_score() -> None:
    made = planned()
    inputs = made.nodes[made.compare].inputs
    assert set(inputs.values()) == keys(made, "score")
    assert inputs["base/0"] == made.base[0]
    assert inputs["3/1/-1.0"] == made.trials[3].scores[1, -1.0]


def test_trials_that_differ_in_what_is_applied_alone_share_a_fit() -> None:
    made = planned(interventions=[{"method": "melbo", "steps": [5, 6], "vector": [0, 1], "control": [False, True]}])
    own = [made.nodes[one.fit] for one in made.trials]
    shared = {node.inputs["fit"] for node in own}
    assert len({node.key for node in own}) == len(own) == 2 * 2 * 2 * 2
    assert len(shared) == 2 * 2  # steps, seeds
    for one, node in zip(made.trials, own, strict=True):
        source = made.nodes[node.inputs["fit"]]
        assert source.inputs == {"data": one.data[0]}
        left_out = {"vector", "control"}
        assert source.params["settings"].keys() == node.params["settings"].keys() - left_out
        assert {**node.params, "settings": None} == {**source.params, "settings": None}
        assert not left_out & source.runtime["settings"].keys()
        assert node.runtime["settings"]["vector"] == one.trial.intervention.vector  # type: ignore[attr-defined]
    lone = planned(interventions=[{"method": "melbo", "steps": 5, "vector": 1}])
    assert {made.nodes[one.fit].inputs["fit"] for one in made.trials} >= {
        lone.nodes[one.fit].inputs["fit"] for one in lone.trials
    }


@pytest.mark.parametrize("name", plugin.names("experiments.interventions"))
def test_what_is_applied_alone_has_a_default(name: str) -> None:
    made = intervention.method(name)
    assert all(not made.model_fields[setting].is_required() for setting in made.applied)


def test_seeds_share_nothing_and_methods_share_their_data() -> None:
    made = planned()
    by_seed: dict[int, set[str]] = {}
    for one in made.trials:
        by_seed.setdefault(one.trial.seed, set()).add(one.data[0])
    assert [len(found) for found in by_seed.values()] == [1, 1]
    assert by_seed[0] != by_seed[1]


def test_trials_carry_the_group_of_the_subject_as_it_is_and_not_as_it_is_written() -> None:
    first = planned(subject={"model": "/here/m", "dtype": "float32"})
    second = planned(subject={"model": "/there/m", "dtype": "float32"})
    assert [one.trial.group for one in first.trials] == [one.trial.group for one in second.trials]


@pytest.mark.parametrize(
    "changes",
    [
        {"subject": {"model": "/another/place/m", "dtype": "float32"}},
        {"resources": {"gpu": 1, "workers": 4, "memory_gib": 3}},
        {"question": "other words?"},
        {"name": "another-name"},
        {"limits": {"trials": 5000}},
        {"seeds": [0, 1], "doses": [1.0, -1.0]},
        {"interventions": [{"method": "lora", "rank": 8}, {"method": "mean_diff", "layer": [1, 2]}]},
    ],
)
def test_where_with_what_and_in_which_order_never_changes_a_result(changes: dict[str, Any]) -> None:
    for stage in ("dataset", "fit", "answer", "score"):
        assert keys(planned(**changes), stage) == keys(planned(), stage)
    if "interventions" not in changes:
        assert planned(**changes).compare == planned().compare


PAIRS = BASE["data"]["pairs"]


@pytest.mark.parametrize(
    ("changes", "stage"),
    [
        ({"seeds": [2, 3]}, "dataset"),
        ({"data": {"pairs": PAIRS | {"positive": "eagles"}}}, "dataset"),
        ({"subject": {"model": "n", "dtype": "float32"}}, "fit"),
        ({"subject": {"model": "m", "dtype": "bfloat16"}}, "fit"),
        ({"subject": {"model": "m", "dtype": "float32", "system": "You are brief."}}, "fit"),
        ({"interventions": [{"method": "mean_diff", "layer": 3}]}, "fit"),
        ({"doses": [-2, 2]}, "answer"),
        ({"evals": [{"task": "animals", "target": "cat"}, {"task": "neutral_nll", "limit": 3}]}, "answer"),
    ],
)
def test_what_matters_changes_every_key_from_its_stage_on(changes: dict[str, Any], stage: str) -> None:
    stages = ["dataset", "fit", "answer", "score"]
    before, after = planned(), planned(**changes)
    base = {before.nodes[key].inputs["answer"] for key in before.base.values()} | set(before.base.values())
    for later in stages[stages.index(stage) :]:
        assert not (keys(before, later) - base) & keys(after, later)
    for earlier in stages[: stages.index(stage)]:
        assert keys(before, earlier) & keys(after, earlier)


@pytest.mark.parametrize("changes", [{"budget": {"delta_nll": 0.3}}, {"split": {"dev": 0.4}}])
def test_how_results_are_compared_changes_the_comparison_alone(changes: dict[str, Any]) -> None:
    before, after = planned(), planned(**changes)
    assert set(before.nodes) - set(after.nodes) == {before.compare}


def test_data_by_path_counts_by_content(tmp_path: Path) -> None:
    entry = [{"method": "mean_diff", "layer": 1}]
    made = []
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        sides = {"positive": {"system": None, "response": "yes"}, "negative": {"system": None, "response": text}}
        pair = {"id": "1", "messages": [{"role": "user", "content": "?"}], **sides}
        (tmp_path / name).write_text(json.dumps(pair))
        made.append(
            planned(interventions=entry, data={"pairs": {"recipe": "pairs_file", "path": str(tmp_path / name)}})
        )
    assert set(made[0].nodes) == set(made[1].nodes)
    assert not keys(made[0], "fit") & keys(made[2], "fit")
    node = next(node for node in made[0].nodes.values() if node.stage == "dataset")
    assert node.runtime["settings"]["path"] == str(tmp_path / "a")
    assert str(tmp_path) not in str(node.params)


def test_the_subject_enters_data_only_when_it_writes_them() -> None:
    shared, generated = planned(), planned(data={"pairs": PAIRS | {"responses": "generated"}})
    params = {bool(node.params.get("subject")) for node in shared.nodes.values() if node.stage == "dataset"}
    assert params == {False}
    params = {bool(node.params.get("subject")) for node in generated.nodes.values() if node.stage == "dataset"}
    assert params == {True}


class Old(Intervention):
    needs: ClassVar[tuple[Any, ...]] = ()
    rank: int = 8


class New(Old):
    alpha: float = 16.0


def test_a_new_setting_rekeys_its_own_method_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    real = intervention.method
    monkeypatch.setattr(intervention, "method", lambda name: Old if name == "lora" else real(name))
    before = planned()
    monkeypatch.setattr(intervention, "method", lambda name: New if name == "lora" else real(name))
    after = planned()
    changed = [old.trial.label for old, new in zip(before.trials, after.trials, strict=True) if old.fit != new.fit]
    kept = [old.trial.label for old, new in zip(before.trials, after.trials, strict=True) if old.fit == new.fit]
    assert len(changed) == 2
    assert [label.split()[0] for label in kept] == ["mean_diff"] * 4


def test_nan_cannot_be_keyed() -> None:
    with pytest.raises(CanonicalError, match=r"settings\.scale: nan"):
        _ = Node("fit", 1, {"settings": {"scale": float("nan")}}, {}, "x").key


def test_golden_keys_of_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervention, "method", lambda name: Old)
    made = planned(interventions=[{"method": "lora"}])
    first = made.trials[0]
    assert [first.fit[:12], first.scores[0, 1.0][:12], made.base[0][:12]] == [
        "c50a5e5df4b5",
        "4dfd3954dd5d",
        "4e19ec3f5d29",
    ]


def test_wrong_evals_and_subjects_are_all_told_with_their_lines() -> None:
    evals = [{"task": "animals", "target": "unicorn"}, {"task": "other", "target": "unicorn"}]

    def nobody(subject: SubjectSpec) -> dict[str, Any]:
        raise ValueError(f"no such model {subject.model!r}")

    experiment = spec.from_source(parse(yaml.safe_dump(BASE | {"evals": evals}, sort_keys=False), "s.yaml"))
    with pytest.raises(SpecError) as error:
        plan(experiment, nobody, describe)
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert "subject: no such model 'm'" in lines[0]
    assert all(line.startswith("s.yaml:") and "unicorn" in line for line in lines[1:])


def test_files_of_an_eval_may_stand_beside_the_spec(tmp_path: Path) -> None:
    (tmp_path / "items.json").write_text("[]")
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(BASE | {"evals": [{"task": "animals", "data": "items.json"}]}))
    made = plan(spec.load(tmp_path / "s.yaml")[0], identify, describe)
    assert made.evals[0].facts.identity["data"] == str(tmp_path / "items.json")


def test_every_planned_stage_can_be_run() -> None:
    from orchestrator.stages import STAGES

    assert set(STAGES) == set(STAGE_VERSIONS)


def test_planning_imports_neither_torch_nor_ray_nor_transformers_nor_inspect() -> None:
    code = "import sys, orchestrator.plan, orchestrator.status, experiments.spec\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "ray", "transformers", "inspect_ai", "numpy"} & set(done.stdout.split())


def states(made: Plan, store: Store) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for one in status(made, store):
        found.setdefault(one.node.stage, set()).add(one.state)
    return found


def publish(store: Store, *nodes: Node) -> None:
    for node in nodes:
        with store.publishing(node):
            pass


def test_status_says_what_would_run_and_what_waits(tmp_path: Path) -> None:
    store, made = Store(tmp_path), planned()
    assert states(made, store) == {
        "dataset": {"run"},
        "fit": {"blocked"},
        "answer": {"run", "blocked"},
        "score": {"blocked"},
        "compare": {"blocked"},
    }
    first = made.nodes[made.trials[0].data[0]]
    publish(store, first)
    told = {one.node.key: str(one) for one in status(made, store)}
    assert told[first.key].startswith("have: record of 20")
    assert told[made.trials[0].fit] == "run: no record"
    second = made.nodes[made.trials[1].data[0]]
    assert told[made.trials[1].fit] == f"blocked: waits for dataset {second.short}"
    assert "more" in told[made.compare]


def test_status_names_the_setting_that_changed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old = planned(seeds=[0], interventions=[{"method": "lora"}])
    publish(store, *(node for node in old.nodes.values() if node.stage in ("dataset", "fit")))
    new = planned(seeds=[0], interventions=[{"method": "lora", "alpha": 32}])
    told = {one.node.stage: one.why for one in status(new, store) if one.node.stage == "fit"}
    assert told["fit"] == f"changed since {old.nodes[old.trials[0].fit].short}: settings.alpha 16.0 -> 32.0"
    new = planned(seeds=[1], interventions=[{"method": "lora"}])
    told = {one.node.stage: one.why for one in status(new, store) if one.node.stage == "dataset"}
    assert told["dataset"] == f"changed since {old.nodes[old.trials[0].data[0]].short}: seed 0 -> 1"


def test_status_says_why_it_failed_before(tmp_path: Path) -> None:
    store, made = Store(tmp_path), planned()
    node = made.nodes[made.trials[0].data[0]]
    for _ in range(2):
        with pytest.raises(RuntimeError), store.publishing(node):
            raise RuntimeError("no such bank\nsecond line")
    told = {one.node.key: str(one) for one in status(made, store)}
    assert told[node.key] == "failed before: RuntimeError: no such bank (2 attempts), will be tried again"
    assert told[made.trials[0].fit] == f"blocked: waits for dataset {node.short}, which failed before"
    publish(store, node)
    assert next(one.state for one in status(made, store) if one.node.key == node.key) == "have"
