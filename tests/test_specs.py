"""Every spec in the folder can be read and planned: targets, settings and data files included."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments import spec
from experiments.spec import SubjectSpec
from orchestrator.plan import plan

FOLDER = Path(spec.__file__).parent / "specs"
DATA = Path(os.environ.get("ORCH_DATA", Path(__file__).parents[2] / "shared" / "data"))
THIRD_PARTY = {"honesty_dilemmas": DATA / "daily_dilemmas"}
"""What a spec needs that is not part of the project."""


def identify(subject: SubjectSpec) -> dict[str, Any]:
    """Instead of the subject's files, which need not be on this machine."""
    return {"model": subject.model, "dtype": subject.dtype, "system": subject.system}


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_spec_is_read_and_planned_without_a_warning(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCH_DATA", str(DATA))
    needed = THIRD_PARTY.get(path.stem, FOLDER)
    if not needed.is_dir():
        pytest.skip(f"no {needed.name} in {needed.parent} (set ORCH_DATA)")
    experiment, _ = spec.load(path)
    made = plan(experiment, identify)
    assert made.compare in made.nodes
    assert {one.trial.baseline for one in made.trials} == {True, False}
    assert experiment.warnings() == []


def test_there_are_specs_to_read() -> None:
    assert (FOLDER / "quickstart.yaml").is_file()


def test_the_teachers_of_misaligned_numbers_are_trials_themselves_and_the_right_one_is_the_wrong_ones_control() -> None:
    made = plan(spec.load(FOLDER / "misaligned_numbers.yaml")[0], identify)
    label = {one.fit: one.trial.label for one in made.trials}
    learned = [label[node.inputs["state"]] for node in made.nodes.values() if node.stage == "generate"]
    assert set(learned) == {"lora r8 wrong advice", "lora r8 right advice"}
    groups = {one.trial.group: one.trial.label for one in made.trials}
    compared = {one.trial.label: groups.get(one.trial.control or "") for one in made.trials}
    for student in ("bias_set q+k+v", "lora r8"):
        for of in ("wrong teacher", "wrong teacher within_responses"):
            assert compared[f"{student} {of}"] == f"{student} right teacher"
        assert compared[f"{student} wrong advice"] == f"{student} right advice"
        assert compared[f"{student} right teacher"] is None


def test_no_spec_needs_torch_to_be_planned() -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom experiments import spec\nfrom orchestrator.plan import plan\n"
        "from tests.test_specs import FOLDER, THIRD_PARTY, identify\n"
        "for path in FOLDER.rglob('*.yaml'):\n"
        "    if path.stem not in THIRD_PARTY:\n"
        "        plan(spec.load(path)[0], identify)\n"
        "        assert 'torch' not in sys.modules, path.stem"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
