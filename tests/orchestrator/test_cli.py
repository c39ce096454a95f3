from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from orchestrator import cli as cli_module
from orchestrator.cli import main

ROOT = Path(__file__).parent.parent.parent
HEAVY = ("torch", "ray", "inspect_ai", "transformers", "scipy")


@pytest.fixture
def spec_file(tiny_folder: Path, tmp_path: Path) -> Path:
    content = {
        "name": "tiny",
        "subject": {"model": str(tiny_folder), "dtype": "float32"},
        "data": {
            "pairs": {"recipe": "persona_pairs", "positive": "A.", "negative": "B.", "n": 4, "responses": "shared"}
        },
        "interventions": [{"method": "mean_diff", "layer": 1}],
        "doses": [-1, 1],
        "evals": [
            {"task": "animal_preference", "target": "owl", "limit": 4},
            {"task": "neutral_nll", "limit": 4},
        ],
        "baselines": [],
    }
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def orch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, [str(argument) for argument in arguments])


def modules_after(code: str, folder: Path) -> set[str]:
    script = f"{code}\nimport sys; print('MODULES', *sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "MODULES" in done.stdout, done.stderr
    return set(done.stdout.rpartition("MODULES")[2].split())


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = "from orchestrator.cli import main\nmain(['--help'], standalone_mode=False)"
    assert not modules_after(code, tmp_path) & {*HEAVY, "pydantic", "numpy"}


def test_every_command_has_help(orch: Any) -> None:
    for name in main.commands:
        result: Result = orch(name, "--help")
        assert result.exit_code == 0
        assert len(result.output.splitlines()[2]) > 20


def test_a_plan_names_every_node_its_state_and_why(orch: Any, spec_file: Path) -> None:
    result = orch("plan", spec_file)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[-1] == "tiny: 1 trials, 15 nodes: 3 run, 12 blocked"
    assert any(re.match(r"  run +dataset\[persona_pairs\]:[0-9a-f]{12}  no record$", line) for line in lines)
    assert any(re.match(r"  blocked +fit\[mean_diff L1\]:[0-9a-f]{12}  waits for dataset ", line) for line in lines)


def test_a_plan_as_json_has_the_same_nodes(orch: Any, spec_file: Path) -> None:
    document = json.loads(orch("plan", spec_file, "--json").stdout)
    assert document["experiment"] == "tiny"
    assert sum(document["counts"].values()) == len(document["nodes"])
    keys = {node["key"] for node in document["nodes"]}
    assert all(set(node["inputs"].values()) <= keys for node in document["nodes"])
    assert document["warnings"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"interventions": [{"method": "mean_dif"}]}, "did you mean 'mean_diff'"),
        ({"evals": ["nonsense"]}, "unknown eval 'nonsense'"),
        ({"subject": "no/such/model"}, "no/such/model"),
        ({"doses": []}, "doses"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "submit"])
def test_a_wrong_spec_is_one_message_and_exit_code_two(
    orch: Any, spec_file: Path, change: dict[str, Any], says: str, command: str
) -> None:
    spec_file.write_text(yaml.safe_dump(yaml.safe_load(spec_file.read_text()) | change))
    result = orch(command, spec_file)
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert "Traceback" not in result.output
    assert not Path("store").exists()


def test_a_spec_that_is_not_there_is_named(orch: Any) -> None:
    result = orch("plan", "nowhere.yaml")
    assert result.exit_code == 2
    assert "nowhere.yaml" in result.stderr


def test_a_defect_keeps_its_traceback(orch: Any, spec_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr("experiments.spec.load", broken)
    result = orch("plan", spec_file)
    assert type(result.exception) is ValueError
    assert result.exit_code == 1


def test_only_this_projects_own_errors_are_errors_of_use() -> None:
    from experiments.problem import Problem, SpecError
    from orchestrator.artifact import StoreError
    from orchestrator.resources import ClusterError

    for error in (SpecError(Problem((), "x")), StoreError("x"), ClusterError("x")):
        assert cli_module.is_error_of_use(error)
    for defect in (ValueError("x"), KeyError("x"), json.JSONDecodeError("x", "y", 0)):
        assert not cli_module.is_error_of_use(defect)


def test_local_excludes_a_cluster(orch: Any, spec_file: Path) -> None:
    result = orch("submit", spec_file, "--local", "--detach")
    assert result.exit_code == 2
    assert "leave out" in result.stderr


def test_why_shows_the_record_or_the_failure(orch: Any, tmp_path: Path) -> None:
    from orchestrator.artifact import Store
    from orchestrator.plan import Node

    store = Store(tmp_path / "store")
    good, bad = (Node("fit", 1, {"n": n}, {}, f"chore {n}") for n in range(2))
    with store.publishing(good):
        pass
    store.fail(bad, "Traceback\nValueError: no luck")
    assert good.key in orch("why", good.short).stdout
    assert "no luck" in orch("why", bad.key[:7]).stdout
    unknown = orch("why", "0" * 12)
    assert unknown.exit_code == 2
    assert "0" * 12 in unknown.stderr


def test_the_schema_is_json_and_knows_the_methods(orch: Any) -> None:
    document = json.loads(orch("schema").stdout)
    assert "interventions" in document["properties"]
    assert "mean_diff" in json.dumps(document)


def test_methods_and_tasks_list_what_the_folders_hold(orch: Any) -> None:
    methods = {row["method"] for row in json.loads(orch("methods", "--json").stdout)}
    tasks = {row["task"] for row in json.loads(orch("tasks", "--json").stdout)}
    assert {"mean_diff", "random", "prompt"} <= methods
    assert {"animal_preference", "neutral_nll"} <= tasks
    assert "mean_diff" in orch("methods").stdout


def test_the_doctor_finds_a_token_that_others_can_read(
    orch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    token.write_text("x" * 64)
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    result = orch("doctor")
    assert result.exit_code == 1
    assert f"chmod 600 {token}" in result.stdout or "readable by others" in result.stdout
    token.chmod(0o600)
    findings = {row["name"]: row for row in json.loads(orch("doctor", "--json").stdout)}
    assert findings["ray token"]["ok"]
