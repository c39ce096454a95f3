from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evals import findings, items
from evals.evaluate import Arm
from experiments import dataset, spec
from experiments.contrast import Contrast
from experiments.edit import Add, Prompt, Site
from experiments.interventions.mean_diff import MeanDiff
from orchestrator import acting, asking, stage, stages
from orchestrator.artifact import Store
from orchestrator.plan import Node, Plan, plan
from orchestrator.run import Event, LocalExecutor, Summary, walk
from orchestrator.workspace import Workspace

LIMIT = 4
PAIRS = {"recipe": "persona_pairs", "positive": "You love owls.", "negative": "You love cats.", "n": 6}


def experiment(folder: Path, **changes: Any) -> Plan:
    data: dict[str, Any] = {
        "name": "tiny",
        "subject": {"model": str(folder), "dtype": "float32"},
        "data": {"pairs": {**PAIRS, "responses": "shared"}},
        "interventions": [{"method": "mean_diff", "layer": [1, 2]}],
        "doses": [-1, 1],
        "evals": [
            {"task": "animal_preference", "target": "owl", "limit": LIMIT},
            {"task": "neutral_nll", "limit": LIMIT},
        ],
    }
    return plan(spec.from_data(data | changes))


def do(planned: Plan, store: Store) -> Summary:
    missing = [node for node in planned.nodes.values() if not store.has(node.key)]
    return walk(missing, store, LocalExecutor(store, Workspace(threads=1)), lambda event: None)


@pytest.fixture(scope="module")
def done(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Store]:
    planned, store = experiment(tiny_folder), Store(tmp_path_factory.mktemp("store"))
    summary = do(planned, store)
    assert summary.ok, summary.failed
    return planned, store


def of(planned: Plan, stage: str) -> list[Node]:
    return [node for node in planned.nodes.values() if node.stage == stage]


def test_the_whole_pipeline_leaves_a_record_of_every_node(done: tuple[Plan, Store]) -> None:
    planned, store = done
    assert all(store.has(key) for key in planned.nodes)
    assert do(planned, store).done == []


def test_a_dataset_holds_what_its_recipe_makes(done: tuple[Plan, Store]) -> None:
    planned, store = done
    (node,) = of(planned, "dataset")
    examples = dataset.load(store.folder(node.key) / stage.EXAMPLES, "pairs")
    assert [one.positive.system for one in examples] == ["You love owls."] * 6
    assert store.record(node.key)["outputs"] == {"examples": 6, "provides": "pairs"}


def test_a_fit_says_what_it_found_and_what_it_took(done: tuple[Plan, Store]) -> None:
    planned, store = done
    for node in of(planned, "fit"):
        outputs = store.record(node.key)["outputs"]
        assert outputs["fit_seconds"] >= 0
        assert outputs["examples"] == 6


def test_every_edit_of_a_dose_acted_and_the_untouched_subject_had_none(done: tuple[Plan, Store]) -> None:
    planned, store = done
    for node in of(planned, "answer"):
        outputs = store.record(node.key)["outputs"]
        if node.runtime["method"] is None:
            assert (outputs["edits"], outputs["fired"]) == (0, [])
        elif node.runtime["method"] == "prompt":
            assert outputs["edits"] == len(outputs["fired"]) == 1
            assert outputs["fired"][0] > LIMIT
        else:
            assert outputs["edits"] == len(outputs["fired"]) == 1
            assert outputs["fired"][0] >= outputs["samples"] == LIMIT


def test_a_score_holds_the_items_of_its_answers_log(done: tuple[Plan, Store]) -> None:
    planned, store = done
    for node in of(planned, "score"):
        kept = items.load(store.folder(node.key) / stage.ITEMS)
        assert kept == items.items(store.folder(node.inputs["answer"]) / stage.LOG)
        assert len(kept) == LIMIT


def test_the_comparison_has_a_row_for_every_setting(done: tuple[Plan, Store]) -> None:
    planned, store = done
    found = findings.load(store.folder(planned.compare) / stage.FINDINGS)
    assert {row.group for row in found.rows} == {planned_trial.trial.group for planned_trial in planned.trials}
    assert {row.eval for row in found.rows} == {"animal_preference/owl"}


def test_each_dose_of_each_vector_answers_differently(done: tuple[Plan, Store]) -> None:
    planned, store = done
    by_arm = {}
    for node in of(planned, "score"):
        answer = planned.nodes[node.inputs["answer"]]
        if answer.params["task"] == "animal_preference" and answer.runtime["method"] in (None, "mean_diff"):
            kept = items.load(store.folder(node.key) / stage.ITEMS)
            by_arm[answer.label, answer.params.get("dose", 0.0)] = [one.target for one in kept]
    assert len({str(targets) for targets in by_arm.values()}) == len(by_arm) == 5


def test_a_dose_that_cannot_be_applied_takes_no_other_with_it(
    done: tuple[Plan, Store], tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = MeanDiff.edits

    def edits(self: Any, state: Any, dose: float) -> Any:
        if dose < 0:
            raise ValueError("no such dose")
        return real(self, state, dose)

    monkeypatch.setattr(MeanDiff, "edits", edits)
    planned, store = experiment(tiny_folder, baselines=[]), Store(tmp_path)
    summary = do(planned, store)
    failed = [node for node, _ in summary.failed.values()]
    assert {(node.stage, node.params["dose"]) for node in failed} == {("answer", -1.0)}
    assert len(failed) == 4
    assert planned.compare in summary.blocked
    monkeypatch.undo()
    assert do(planned, store).ok
    assert store.failure(failed[0].key) is None


def test_an_edit_that_never_acted_is_an_error() -> None:
    acted, idle = (Add(Site("resid", layer), torch.ones(4), "response") for layer in (1, 2))
    prompt = Prompt("x")
    arm = Arm("k", (acted, idle, prompt), "mean_diff L2 dose 1")
    with pytest.raises(stage.StageError, match=r"1 of 3 edits acted on no token.*resid@2.*'response'"):
        acting.counts(arm.label, arm.edits, {acted: 3, prompt: 7})
    with pytest.raises(stage.StageError, match=r"1 of 3 edits acted on no token: the system prompt 'x' is the one"):
        acting.counts(arm.label, arm.edits, {acted: 3, idle: 5})
    assert acting.counts(arm.label, arm.edits, {acted: 3, idle: 5, prompt: 7}) == [3, 5, 7]


def test_a_subject_that_is_not_the_planned_one_is_refused(done: tuple[Plan, Store], tmp_path: Path) -> None:
    planned, _ = done
    fit = next(node for node in of(planned, "fit") if node.runtime["method"] == "random")
    other = replace(
        fit, params={**fit.params, "subject": {**fit.params["subject"], "weights_sha256": "0" * 64}}, inputs={}
    )
    (outcome,) = stages.run([other], Store(tmp_path), Workspace(threads=1))
    assert outcome.error is not None
    assert "weights_sha256" in outcome.error
    assert "plan again" in outcome.error


def test_one_resident_engine_serves_a_subject_until_another_comes(tiny_folder: Path) -> None:
    workspace = Workspace(threads=1)
    one = spec.SubjectSpec(model=str(tiny_folder), dtype="float32")
    first = workspace.engine(one)
    assert workspace.engine(one.model_copy()) is first
    other = workspace.engine(one.model_copy(update={"system": "You are terse."}))
    assert other is not first
    assert workspace.engine(one) is not first


BRIEF = {"steps": 2, "radius": 2.0, "n": 3, "controls": 1, "prompts": 1, "held_out": 0}


def test_one_fit_serves_every_trial_that_applies_another_part_of_it(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experiments.interventions.melbo import Melbo
    from orchestrator.finished import find

    fits: list[int] = []
    search = Melbo.search
    monkeypatch.setattr(Melbo, "search", lambda self, *rest: (fits.append(self.vector), search(self, *rest))[1])
    entry = {"method": "melbo", "vector": [0, 2], **BRIEF}
    planned = experiment(tiny_folder, interventions=[entry], baselines=[], seeds=[0], doses=[1])
    store = Store(tmp_path / "store")
    assert do(planned, store).ok
    assert len(fits) == 1
    for vector in (0, 2):
        found = find(store, f"melbo L0.25 v{vector}")
        (edit,) = found.edits(2.0)
        assert isinstance(edit, Add)
        assert torch.equal(edit.vector, 2.0 * found.state.tensors["vectors"][vector])
        assert found.record["outputs"]["facts"]["radius"] == 2.0
        assert found.facts(1.0)["settings"]["vector"] == vector


def test_fits_that_read_the_same_data_pass_every_text_once_and_gradients_go_first(
    tiny_folder: Path, tmp_path: Path
) -> None:
    names = ["mean_diff", "pca_weighted", "directional_ablation", "fisher", "svd_gradient"]
    entries = [{"method": name, "layer": [1, 2]} for name in names]
    planned, store = experiment(tiny_folder, interventions=entries, seeds=[0, 1]), Store(tmp_path / "store")
    workspace = Workspace(threads=1)
    executor, seen = LocalExecutor(store, workspace), []
    fits = [node for node in of(planned, "fit") if node.runtime.get("reads")]
    batches: list[int] = []
    passed: list[int] = []

    def tell(event: Event) -> None:
        if event.kind == "start" and event.batch.stage == "fit":
            batches.append(len(event.batch.nodes))

    walk(of(planned, "dataset"), store, executor, tell)
    engine = workspace.engine(stages_spec(fits[0]))
    engine.subject.blocks[0].register_forward_pre_hook(lambda _, inputs: passed.append(inputs[0].shape[1]))
    assert walk(fits, store, executor, tell).ok
    assert sorted(batches) == [11, 11]  # five methods at two layers and the random baseline, for each seed
    total = sum(passed)
    for data in {node.inputs["data"] for node in fits}:
        pairs = dataset.load(store.folder(data) / stage.EXAMPLES, "pairs")
        rows = Contrast(engine, pairs, "response_mean").rows
        passed.clear()
        engine.observe(rows, [Site("resid", 1)], "response_mean")
        seen.append(sum(passed))
    assert total == sum(seen)


def stages_spec(node: Node) -> spec.SubjectSpec:
    return spec.SubjectSpec.model_validate({**node.runtime["subject"], "dtype": node.params["subject"]["dtype"]})


def test_answers_fuse_by_subject_task_and_settings_alone(done: tuple[Plan, Store]) -> None:
    planned, _ = done
    answers = of(planned, "answer")
    groups = {stages.STAGES["answer"].fuse_by(node) for node in answers}
    assert len(groups) == 2
    assert len(answers) == 2 * (1 + 4 * 2)


def test_a_calibrated_experiment_applies_multiples_of_the_dose_that_was_found(
    tiny_folder: Path, tmp_path: Path
) -> None:
    from orchestrator.publish import publish
    from orchestrator.registry import Registry

    wanted = {"target": 0.5, "tokens": 4, "prompts": 3}
    planned = experiment(
        tiny_folder, calibrate=wanted, interventions=[{"method": "mean_diff", "layer": 1}], doses=[-1, 1, 2]
    )
    store = Store(tmp_path / "store")
    summary = do(planned, store)
    assert summary.ok, summary.failed
    units = {node.label: store.record(node.key)["outputs"] for node in of(planned, "calibrate")}
    assert {label: found["unit"] for label, found in units.items() if label == "prompt"} == {"prompt": 1.0}
    unit = units["mean_diff L1"]["unit"]
    assert units["mean_diff L1"]["achieved"] == pytest.approx(0.5, rel=0.06)
    wanted_label = "animal_preference/owl mean_diff L1"
    (node,) = [one for one in of(planned, "answer") if one.params.get("dose") == 2 and one.label == wanted_label]
    (edit,) = asking.arm(node, store).edits
    state = stages_state(store, node.inputs["state"])
    assert isinstance(edit, Add)
    torch.testing.assert_close(edit.vector, 2 * unit * state["resid@1"])
    with Registry(tmp_path / "registry.sqlite") as registry:
        rows = {row["trial"]: row["unit"] for row in publish(planned, store, registry)}
        registry.rebuild(store)
        again = {row["trial"]: row["unit"] for row in registry.leaderboard()}
    assert rows["mean_diff L1"] == pytest.approx(unit)
    assert rows == again


def stages_state(store: Store, key: str) -> dict[str, torch.Tensor]:
    from experiments.intervention import State

    return dict(State.load(store.folder(key) / stage.STATE).tensors)


def test_damage_that_a_trial_cannot_do_fails_that_trial_alone(tiny_folder: Path, tmp_path: Path) -> None:
    wanted = {"target": 0.5, "tokens": 4, "prompts": 3, "least": 1e-9, "most": 1e-8}
    planned, store = experiment(tiny_folder, calibrate=wanted), Store(tmp_path / "store")
    summary = do(planned, store)
    assert {node.label for node, _ in summary.failed.values()} == {"mean_diff L1", "mean_diff L2", "random L2"}
    assert all("raise calibrate.most" in reason for _, reason in summary.failed.values())
    assert {node.label for node in summary.done if node.stage == "calibrate"} == {"prompt"}


def test_a_trial_takes_both_kinds_of_data_where_its_parts_learn_from_different_ones(
    tiny_folder: Path, tmp_path: Path
) -> None:
    said = {"role": "assistant", "content": "No."}
    narrow = [{"id": f"{n}", "messages": [{"role": "user", "content": f"Is {n} odd?"}, said]} for n in range(4)]
    (tmp_path / "narrow.jsonl").write_text("".join(json.dumps(each) + "\n" for each in narrow))
    pairs = {"recipe": "persona_pairs", "positive": "A.", "negative": "B.", "n": 3, "responses": "shared"}
    both = {"pairs": pairs, "conversations": {"recipe": "conversations_file", "path": str(tmp_path / "narrow.jsonl")}}
    lora = {"method": "lora", "epochs": 1}
    entries = [lora, {"method": "caft", "wraps": lora, "direction": {"method": "mean_diff", "layer": 1}}]
    planned = experiment(tiny_folder, data=both, interventions=entries, baselines=[], seeds=[0], doses=[1])
    store = Store(tmp_path / "store")
    assert do(planned, store).ok
    plain, wrapped = (planned.nodes[one.fit] for one in planned.trials)
    assert wrapped.inputs == {
        "data/conversations": plain.inputs["data"],
        "data/pairs": next(node.key for node in of(planned, "dataset") if node.key != plain.inputs["data"]),
    }
    taken = [store.record(node.key)["outputs"]["examples"] for node in (plain, wrapped)]
    assert taken == [4, 4 + 3]
