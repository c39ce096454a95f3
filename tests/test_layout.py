from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import dataset, intervention, plugin

ROOT = Path(__file__).parent.parent
PACKAGES = ("experiments", "agents", "evals", "orchestrator")
WHERE = (
    "import experiments as x, agents as a, evals as e, orchestrator as o; print(*(m.__file__ for m in (x, a, e, o)))"
)
ONLY_RAY = ["orchestrator/cluster.py", "orchestrator/jobs.py"]


def imports(path: Path) -> set[str]:
    """Top-level names of everything `path` imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def test_imports_go_one_way() -> None:
    command = shutil.which("lint-imports", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if command is None:
        pytest.skip("import-linter is not installed: pip install -e '.[dev]'")
    done = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_two_files_import_ray() -> None:
    assert [path.relative_to(ROOT).as_posix() for path in sources() if "ray" in imports(path)] == ONLY_RAY


def test_experiments_import_neither_ray_nor_inspect() -> None:
    for path in (ROOT / "experiments").rglob("*.py"):
        assert not imports(path) & {"ray", "inspect_ai", "agents", "evals", "orchestrator"}, path


def test_the_packages_are_this_projects_from_any_folder(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", WHERE], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert [Path(file).parent.parent for file in done.stdout.split()] == [ROOT] * 4, done.stderr


@pytest.mark.parametrize(
    ("package", "load"),
    [("experiments.interventions", intervention.method), ("experiments.datasets", dataset.recipe)],
)
def test_no_default_is_a_place_on_the_machine_it_was_read_on(package: str, load: Callable[[str], Any]) -> None:
    for name in plugin.names(package):
        for setting, field in load(name).model_fields.items():
            assert not (isinstance(field.default, Path) and field.default.is_absolute()), f"{name}: {setting}"


def test_the_installed_command_runs_this_projects_packages_from_any_folder(tmp_path: Path) -> None:
    command = Path(sys.executable).parent / "orch"
    if not command.exists():
        pytest.skip("orch is not installed: pip install -e .")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [command, "methods"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "mean_diff" in done.stdout


def test_a_package_of_another_distribution_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "__init__.py").write_text("")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.path.append({str(ROOT)!r})\n"
    code += "from orchestrator.cli import main; main(['methods'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"`agents` is imported from {tmp_path / 'agents'}" in done.stderr
    assert "Traceback" not in done.stderr
