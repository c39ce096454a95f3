from __future__ import annotations

import json
import os
import re
import sqlite3
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


def test_an_interruption_says_how_to_resume(orch: Any, spec_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("orchestrator.run.walk", interrupted)
    result = orch("submit", spec_file, "--local")
    assert result.exit_code == 130
    assert "resume by running the same command" in result.stderr


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
    tasks = {row["task"] for row in json.loads(orch("evals", "--json").stdout)}
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


def test_submit_runs_shows_the_leaderboard_and_then_has_nothing_left_to_do(
    orch: Any, spec_file: Path, tmp_path: Path
) -> None:
    first = orch("submit", spec_file, "--local")
    assert first.exit_code == 0, first.output
    assert "tiny: 1 trials, 15 nodes, 15 to run" in first.stderr
    assert "[15/15] compare[tiny]:" in first.stderr
    assert "mean_diff L1" in first.stdout
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", first.stderr)
    assert len(list((tmp_path / "logs" / "tiny").glob("*.eval"))) == 6
    code = f"from orchestrator.cli import main\nmain(['submit', {str(spec_file)!r}, '--quiet'], standalone_mode=False)"
    assert not modules_after(code, tmp_path) & {"torch", "ray", "transformers"}
    assert json.loads(orch("board", "tiny", "--json").stdout)[0]["trial"] == "mean_diff L1"
    assert "| mean_diff L1 |" in orch("board", "--markdown").stdout


def test_a_failed_node_is_told_with_its_reason_and_exit_code_one(
    orch: Any, spec_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experiments.interventions.mean_diff import MeanDiff

    def fit(self: Any, engine: Any, data: Any, seed: int) -> Any:
        raise ArithmeticError("no direction in it")

    monkeypatch.setattr(MeanDiff, "fit", fit)
    result = orch("submit", spec_file, "--local", "--quiet")
    assert result.exit_code == 1
    assert "1 failed, 9 blocked" in result.stderr
    assert "ArithmeticError: no direction in it" in result.stderr
    assert "failed" in result.stdout
    assert json.loads(orch("plan", spec_file, "--json").stdout)["counts"]["failed before"] == 1
    monkeypatch.undo()


def test_fresh_computes_again_what_was_there(orch: Any, spec_file: Path) -> None:
    spec_file.write_text(yaml.safe_dump(yaml.safe_load(spec_file.read_text()) | {"name": "again"}))
    assert "15 to run" in orch("submit", spec_file, "--local").stderr
    assert "0 to run" in orch("submit", spec_file, "--local").stderr
    assert "15 to run" in orch("submit", spec_file, "--local", "--fresh").stderr


@pytest.mark.parametrize("command", ["submit", "board", "report"])
def test_a_registry_that_is_damaged_is_refused_before_anything_runs(
    orch: Any, spec_file: Path, tmp_path: Path, command: str
) -> None:
    (tmp_path / "registry.sqlite").write_bytes(b"not a database at all, but long enough to be one" * 50)
    result = orch(command, *([spec_file, "--local"] if command == "submit" else ["tiny"]))
    assert result.exit_code == 2
    assert "registry.sqlite" in result.stderr
    assert "orch registry rebuild" in result.stderr
    assert not (tmp_path / "store").exists()


def test_the_registry_is_rebuilt_from_the_store_and_checked_against_it(
    orch: Any, spec_file: Path, tmp_path: Path
) -> None:
    assert orch("submit", spec_file, "--local", "--quiet").exit_code == 0
    rows = json.loads(orch("board", "tiny", "--json").stdout)
    (tmp_path / "registry.sqlite").unlink()
    missing = orch("board")
    assert missing.exit_code == 2
    assert "orch registry rebuild" in missing.stderr
    assert "15 records" in orch("registry", "rebuild").stdout
    again = json.loads(orch("board", "tiny", "--json").stdout)
    assert [{**row, "submitted_at": None} for row in again] == [{**row, "submitted_at": None} for row in rows]
    assert orch("registry", "check").exit_code == 0
    next((tmp_path / "store" / "compare").rglob("record.json")).unlink()
    stale = orch("registry", "check")
    assert stale.exit_code == 1
    assert "1 not in the store" in stale.stdout


def test_a_report_has_the_question_the_leaderboard_and_the_cost(orch: Any, spec_file: Path) -> None:
    spec_file.write_text(yaml.safe_dump(yaml.safe_load(spec_file.read_text()) | {"question": "Does it run?"}))
    assert orch("submit", spec_file, "--local", "--quiet").exit_code == 0
    page = orch("report", "tiny").stdout
    assert page.startswith("# tiny\n\nDoes it run?")
    assert "| mean_diff L1 |" in page
    assert "## Cost" in page
    assert orch("registry", "rebuild").exit_code == 0
    assert orch("report", "tiny").stdout.startswith("# tiny\n\nDoes it run?")
    unknown = orch("report", "nobody")
    assert unknown.exit_code == 2
    assert "known: tiny" in unknown.stderr


BOARD = {
    *("rank", "experiment", "trial", "method", "settings", "eval", "target", "dose"),
    *("transfer", "transfer_low", "transfer_high", "even", "p", "p_holm", "mde"),
    *("delta_nll", "others", "specificity", "n", "seeds", "status"),
}


def test_the_board_and_the_view_have_the_columns_that_programs_count_on(orch: Any, spec_file: Path) -> None:
    submitted = json.loads(orch("submit", spec_file, "--local", "--quiet", "--json").stdout)
    assert submitted == json.loads(orch("board", "--json").stdout)
    (row,) = [row for row in submitted if row["target"] == "owl"]
    assert row.keys() >= BOARD
    assert (row["experiment"], row["trial"], row["method"]) == ("tiny", "mean_diff L1", "mean_diff")
    assert row["eval"] == "animal_preference/owl"
    assert json.loads(row["settings"])["layer"] == 1
    assert row["others"] > 0
    assert row["specificity"] == pytest.approx(abs(row["transfer"]) / (abs(row["transfer"]) + row["others"]), rel=0.3)
    with sqlite3.connect("registry.sqlite") as db:
        names = [column[0] for column in db.execute("select * from leaderboard").description]
    assert set(names) >= BOARD


def test_a_plan_tells_programs_every_node_and_guesses_the_time(orch: Any, spec_file: Path) -> None:
    before = json.loads(orch("plan", spec_file, "--json").stdout)
    assert before["estimate"] == {"nodes": len(before["nodes"]), "seconds": None, "unknown": len(before["nodes"])}
    assert set(before["nodes"][0]) == {"key", "stage", "label", "status", "reason", "inputs"}
    assert before["counts"] == {"run": 3, "blocked": len(before["nodes"]) - 3}
    assert orch("submit", spec_file, "--local", "--quiet").exit_code == 0
    changed = yaml.safe_load(spec_file.read_text()) | {"doses": [-2, -1, 1, 2]}
    spec_file.write_text(yaml.safe_dump(changed))
    after = json.loads(orch("plan", spec_file, "--json").stdout)["estimate"]
    assert after["nodes"] == 9  # an answer and a score for each of two doses and two evals, and the comparison
    assert after["unknown"] == 0
    assert after["seconds"] > 0
    assert "by what such nodes took before" in orch("plan", spec_file).stdout
    Path("registry.sqlite").write_text("not a registry")
    odd = orch("plan", spec_file)
    assert odd.exit_code == 0
    assert "no estimate" in odd.stderr


def test_status_says_how_far_an_experiment_is_and_who_is_at_work(orch: Any, spec_file: Path) -> None:
    from orchestrator.artifact import Store

    before = json.loads(orch("status", spec_file, "--json").stdout)
    assert before["trials"] == {"total": 1, "done": 0, "failed": 0}
    assert before["running"] is None
    assert orch("submit", spec_file, "--local", "--quiet").exit_code == 0
    with Store("store").lock("tiny"):
        found = json.loads(orch("status", spec_file, "--json").stdout)
        assert f"process {os.getpid()}" in found["running"]
    assert found["trials"] == {"total": 1, "done": 1, "failed": 0}
    assert found["stages"]["compare"] == {"have": 1}
    text = orch("status", spec_file).stdout
    assert text.startswith("tiny: 1 of 1 trials done, 0 failed")
    assert "nobody on this machine" in text


def test_status_names_what_failed(orch: Any, spec_file: Path) -> None:
    wrong = {"pairs": {"recipe": "persona_pairs", "positive": "A.", "negative": "B.", "n": 1, "responses": "shared"}}
    changed = yaml.safe_load(spec_file.read_text()) | {"data": wrong, "interventions": [{"method": "pca_centred"}]}
    spec_file.write_text(yaml.safe_dump(changed))
    assert orch("submit", spec_file, "--local", "--quiet").exit_code == 1
    found = json.loads(orch("status", spec_file, "--json").stdout)
    assert found["trials"] == {"total": 1, "done": 0, "failed": 1}
    assert found["failures"][0]["label"].startswith("fit[pca_centred")


def test_a_trial_is_shown_and_two_are_compared(orch: Any, spec_file: Path) -> None:
    changed = yaml.safe_load(spec_file.read_text()) | {"interventions": [{"method": "mean_diff", "layer": [1, 2]}]}
    spec_file.write_text(yaml.safe_dump(changed))
    assert orch("submit", spec_file, "--local", "--quiet").exit_code == 0
    about = json.loads(orch("show", "mean_diff L1", "--json").stdout)
    assert about["identity"]["settings.layer"] == 1
    assert about["identity"]["data.recipe"] == "persona_pairs"
    assert [seed["seed"] for seed in about["seeds"]] == [0]
    assert {row["eval"] for row in about["rows"]} >= {"animal_preference/owl"}
    assert {point["dose"] for point in about["curve"]} == {-1.0, 0.0, 1.0}
    by_key = json.loads(orch("show", about["seeds"][0]["fit"][:12], "--json").stdout)
    assert by_key == about
    assert "settings.layer" in orch("show", "mean_diff L1").stdout
    found = json.loads(orch("diff", "mean_diff L1", "mean_diff L2", "--json").stdout)
    assert found["identity"] == [{"what": "settings.layer", "a": 1, "b": 2}]
    assert any(one["what"].endswith(" transfer") for one in found["results"])
    assert "the same" in orch("diff", "mean_diff L1", "mean_diff L1").stdout
    missing = orch("show", "mean_dif L1")
    assert missing.exit_code == 2
    assert "did you mean 'mean_diff L1'" in missing.stderr
