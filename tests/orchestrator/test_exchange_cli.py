"""`orch bake`, `orch export` and `orch adopt` on trials that were really fitted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from experiments.spec import load as load_spec
from orchestrator import stages
from orchestrator.artifact import Store
from orchestrator.cli import main
from orchestrator.plan import Node, plan
from orchestrator.workspace import Workspace

SPEC: dict[str, Any] = {
    "name": "tiny",
    "seeds": [0, 1],
    "data": {"pairs": {"recipe": "persona_pairs", "positive": "A.", "negative": "B.", "n": 4, "responses": "shared"}},
    "interventions": [
        {"method": "mean_diff", "layer": 1},
        {"method": "mean_diff", "layer": 2, "positions": "response"},
        {"method": "lora", "rank": 2, "epochs": 1, "layers": [[1]]},
        {"method": "prompt"},
    ],
    "doses": [-1, 1],
    "evals": [{"task": "animal_preference", "target": "owl", "limit": 4}],
    "baselines": [],
}


@pytest.fixture(scope="module")
def fitted(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store in which every trial of the spec is fitted, and one of them calibrated."""
    folder = tmp_path_factory.mktemp("fitted")
    (folder / "spec.yaml").write_text(
        yaml.safe_dump({**SPEC, "subject": {"model": str(tiny_folder), "dtype": "float32"}})
    )
    store, workspace = Store(folder / "store"), Workspace()
    nodes = plan(load_spec(folder / "spec.yaml")[0]).nodes.values()
    for stage in ("dataset", "fit"):
        for node in nodes:
            if node.stage == stage:
                assert stages.run([node], store, workspace)[0].error is None
    lora = next(node for node in nodes if node.stage == "fit" and node.label == "lora r2" and node.params["seed"] == 0)
    with store.publishing(Node("calibrate", 1, {}, {"state": lora.key}, "lora r2")) as draft:
        draft.outputs["unit"] = 3.0
    return folder


@pytest.fixture
def orch(fitted: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(fitted)
    return lambda *arguments: CliRunner().invoke(main, [str(argument) for argument in arguments])


def fits(folder: Path, label: str) -> list[dict[str, Any]]:
    found = [record for record in Store(folder / "store").records("fit") if record["label"] == label]
    return sorted(found, key=lambda record: record["params"]["seed"])


def done(result: Result) -> str:
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([[5, 9, 30, 7]])).logits[0]


def test_a_trial_is_baked_by_label_and_seed_or_by_key(
    orch: Any, fitted: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    shown = done(orch("bake", "mean_diff L1", "--seed", 1, "--dose", -2, "--out", tmp_path / "label"))
    assert "mean_diff L1 at dose -2 as LlamaForCausalLM" in shown
    assert "note: mlp_bias switched on; biases without an edit are zero" in shown
    key = fits(fitted, "mean_diff L1")[1]["key"]
    report = json.loads(done(orch("bake", key[:8], "--dose", -2, "--out", tmp_path / "key", "--json")))
    assert report["difference"] <= 1e-4 < 0.1 < report["effect"]
    assert torch.equal(logits(tmp_path / "label"), logits(tmp_path / "key"))
    assert (logits(tmp_path / "key") - logits(tiny_folder)).abs().max() > 0.1
    facts = json.loads((tmp_path / "key" / "orch.json").read_text())
    assert (facts["method"], facts["seed"], facts["dose"], facts["key"]) == ("mean_diff", 1, -2, key)


def test_a_calibrated_dose_is_a_multiple_of_the_one_that_was_found(orch: Any, fitted: Path, tmp_path: Path) -> None:
    key = fits(fitted, "lora r2")[0]["key"][:12]
    done(orch("bake", key, "--dose", 2, "--calibrated", "--out", tmp_path / "two"))
    done(orch("bake", key, "--dose", 6, "--out", tmp_path / "six"))
    assert torch.equal(logits(tmp_path / "two"), logits(tmp_path / "six"))
    other = orch("bake", fits(fitted, "lora r2")[1]["key"], "--dose", 2, "--calibrated", "--out", tmp_path / "x")
    assert other.exit_code == 2
    assert "was calibrated 0 ways (never)" in other.stderr


def test_an_export_comes_back_as_the_trial(orch: Any, fitted: Path, tiny_folder: Path, tmp_path: Path) -> None:
    from experiments.intervention import State, method
    from experiments.interventions.adopted import Adopted
    from experiments.spec import SubjectSpec

    engine = Workspace().engine(SubjectSpec(model=str(tiny_folder), dtype="float32"))
    for label, name, dose in (
        ("mean_diff L1", "v.safetensors", 1.0),
        ("mean_diff L1", "v.gguf", 2.0),
        ("lora r2", "adapter", 1.5),
    ):
        done(orch("export", label, "--seed", 0, "--dose", dose, "--out", tmp_path / name))
        record = fits(fitted, label)[0]
        own = method(record["params"]["method"])(**record["runtime"]["settings"])
        state = State.load(Store(fitted / "store").folder(record["key"]) / "state.safetensors")
        adopted = Adopted(path=tmp_path / name)
        theirs = adopted.edits(adopted.fit(engine, [], 0), -0.5)
        ours = own.edits(state, -0.5 * dose)
        tensors = [
            [getattr(edit, part) for edit in edits for part in ("vector", "a", "b") if hasattr(edit, part)]
            for edits in (sorted(theirs, key=place), sorted(ours, key=place))
        ]
        for one, other in zip(*tensors, strict=True):
            torch.testing.assert_close(one, other)
        assert "{method: adopted, path:" in done(orch("adopt", tmp_path / name, "--subject", tiny_folder))


def place(edit: Any) -> str:
    return str(getattr(edit, "site", None) or edit.module)


def test_adopt_says_what_is_in_a_file_and_what_it_does_not_say(orch: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"layer.1": torch.ones(32)}, tmp_path / "v.safetensors", metadata={"operation": "add"})
    shown = done(orch("adopt", tmp_path / "v.safetensors"))
    assert "operation:        add" in shown
    assert "layer_map:        not said; choose one of blocks|hidden_states" in shown
    assert f"- {{method: adopted, path: {tmp_path / 'v.safetensors'}, site: resid|" in shown
    document = json.loads(done(orch("adopt", tmp_path / "v.safetensors", "--json")))
    assert sorted(document["missing"]) == ["layer_map", "scale_convention", "site"]
    assert document["tensors"] == {"layer.1": [32]}


def test_the_line_that_adopt_prints_runs(orch: Any, fitted: Path, tmp_path: Path) -> None:
    done(orch("export", "mean_diff L1", "--seed", 0, "--out", tmp_path / "v.gguf"))
    line = done(orch("adopt", tmp_path / "v.gguf")).splitlines()[-1]
    spec = yaml.safe_load((fitted / "spec.yaml").read_text()) | {"interventions": yaml.safe_load(line), "seeds": [0]}
    del spec["data"]
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    planned = plan(load_spec(tmp_path / "spec.yaml")[0])
    (fit,) = [node for node in planned.nodes.values() if node.stage == "fit"]
    assert fit.label == "adopted v"
    assert list(fit.params["settings"]["path"]) == ["sha256"]
    assert stages.run([fit], Store(tmp_path / "store"), Workspace())[0].error is None


def test_a_folder_of_an_adapter_can_stand_in_a_spec(orch: Any, fitted: Path, tmp_path: Path) -> None:
    done(orch("export", "lora r2", "--seed", 0, "--out", tmp_path / "adapter"))
    spec = yaml.safe_load((fitted / "spec.yaml").read_text()) | {"seeds": [0]}
    spec |= {"interventions": [{"method": "adopted", "path": "adapter"}]}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    (fit,) = [n for n in plan(load_spec(tmp_path / "spec.yaml")[0]).nodes.values() if n.stage == "fit"]
    assert stages.run([fit], Store(tmp_path / "store"), Workspace())[0].error is None
    spec["interventions"][0]["path"] = "."
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    refused = orch("plan", tmp_path / "spec.yaml")
    assert refused.exit_code == 2
    assert "no such file; got '.'" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bake", "mean_diff L1", "--dose", "1"], "'mean_diff L1' means 2 trials; give a key or --seed"),
        (["bake", "mean_diff L1", "--seed", "7", "--dose", "1"], "has no trial of seed 7; there are"),
        (["bake", "nobody", "--dose", "1"], "no finished trial 'nobody' in the store store; there are: lora-r2"),
        (["bake", "mean_diff L1", "--seed", "0", "--dose", "0"], "dose 0 of mean_diff L1 is the subject itself"),
        (["bake", "mean_diff L1", "--seed", "0", "--dose", "nan"], "dose nan of mean_diff L1"),
        (["bake", "mean_diff L2", "--seed", "0", "--dose", "1"], "positions 'response'"),
        (["export", "lora r2", "--seed", "0"], "this trial has LowRank"),
        (["export", "mean_diff L1", "--seed", "0", "--format", "peft"], "this trial has Add"),
        (["export", "mean_diff L2", "--seed", "0", "--format", "gguf"], "positions 'response'"),
        (["export", "prompt", "--seed", "0"], "a prompt is text: copy it"),
    ],
)
def test_wrong_use_is_one_message_and_exit_code_two(arguments: list[str], says: str, orch: Any, tmp_path: Path) -> None:
    result = orch(*arguments, "--out", tmp_path / "out.safetensors")
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_wrong_places_and_files_are_told_too(orch: Any, fitted: Path, tmp_path: Path) -> None:
    (unit,) = Store(fitted / "store").records("calibrate")
    (tmp_path / "there").mkdir()
    (tmp_path / "v.safetensors").write_text("no")
    for arguments, says in {
        ("bake", "mean_diff L1", "--seed", 0, "--dose", 1, "--out", tmp_path / "there"): "exists; give a name",
        ("export", "mean_diff L1", "--seed", 0, "--out", tmp_path / "no" / "v.gguf"): "is no folder to write",
        ("export", "mean_diff L1", "--seed", 0, "--out", tmp_path / "v.npz"): "ends in '.npz'; allowed: .safetensors",
        ("bake", unit["key"][:9], "--dose", 1, "--out", tmp_path / "x"): "is a node of stage calibrate; its fit is",
        ("adopt", tmp_path / "v.safetensors"): "is no safetensors file",
        ("adopt", tmp_path / "nothing"): "no such file",
    }.items():
        result = orch(*arguments)
        assert result.exit_code == 2, result.output
        assert says in result.stderr


def test_a_subject_whose_files_changed_is_not_baked(
    tiny_folder: Path, orch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Another:
        subject = type("Subject", (), {"identity": {"model": "another"}})

    monkeypatch.setattr("orchestrator.workspace.Workspace.engine", lambda *_: Another)
    result = orch("bake", "mean_diff L1", "--seed", 0, "--dose", 1, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "was fitted to another subject" in result.stderr


def test_a_report_has_the_journals_score_of_every_curve(tiny_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    spec = {**SPEC, "subject": {"model": str(tiny_folder), "dtype": "float32"}, "seeds": [0]}
    spec["interventions"] = SPEC["interventions"][:1]
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    assert CliRunner().invoke(main, ["submit", "spec.yaml", "--local", "--quiet"]).exit_code == 0
    page = CliRunner().invoke(main, ["report", "tiny"]).stdout
    assert "## Score of journal 004" in page
    (line,) = [line for line in page.splitlines() if line.startswith("| animal_preference/owl | mean_diff L1 | 3 |")]
    assert line.count("|") == 10
