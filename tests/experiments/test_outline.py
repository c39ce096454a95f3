"""What is told of a subject before its weights are read."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.edit import Site
from experiments.intervention import Intervention, method
from experiments.outline import Outline, check_files, outline
from experiments.spec import EMBEDDED, SubjectSpec
from experiments.subject import Subject, SubjectError, load
from experiments.weights import linear_modules
from tests.tiny import ARCHITECTURES, make_tiny_model, tiny_config


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_and_sites_are_read_from_the_config(tmp_path: Path, architecture: str) -> None:
    tiny_config(architecture, layers=3).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    found = outline(SubjectSpec(model=str(tmp_path)))
    assert found.n_layers == 3
    assert "resid" in found.sites
    assert ("gate" in found.sites) == (architecture not in ("gpt2", "gpt_neox"))
    assert found.widths


def test_widths_and_matrices_are_those_of_the_loaded_subject(tmp_path: Path) -> None:
    for architecture in ARCHITECTURES:
        folder = make_tiny_model(tmp_path / architecture, architecture=architecture)
        found, subject = outline(SubjectSpec(model=str(folder))), load(SubjectSpec(model=str(folder), dtype="float32"))
        assert {name: subject.point(Site(name, 1)).width for name in found.widths} == found.widths  # type: ignore[arg-type]
        assert set(found.linears) == {name.rpartition(".")[2] for name in linear_modules(subject)}


def test_the_outline_is_that_of_the_loaded_subject(tiny_folder: Path, tiny_subject: Subject) -> None:
    found = outline(SubjectSpec(model=str(tiny_folder)))
    assert found.n_layers == tiny_subject.n_layers
    assert set(found.sites) == set(tiny_subject.architecture.family.places)
    assert found.widths["resid"] == tiny_subject.d_model
    assert outline(SubjectSpec(model=EMBEDDED)).n_layers == 30


def test_an_outline_imports_no_torch(tiny_folder: Path) -> None:
    code = (
        "import sys\nfrom experiments.outline import outline\nfrom experiments.spec import SubjectSpec\n"
        "outline(SubjectSpec(model=sys.argv[1]))\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny_folder)], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_weights_cut_anywhere_are_damaged(tiny_folder: Path, tmp_path: Path, keep: int) -> None:
    content = (tiny_folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content)
    check_files(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content[:keep])
    with pytest.raises(SubjectError, match=r"model\.safetensors is damaged .*; save or fetch"):
        check_files(tmp_path)


def test_a_config_without_layers_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(SubjectError, match="how many layers"):
        outline(SubjectSpec(model=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "settings", "wrong"),
    [
        ("mean_diff", {"layer": 3}, {}),
        ("mean_diff", {"layer": 4}, {"layer": "4 is out of range; the subject has layers 0 to 3"}),
        ("mean_diff", {"site": "gate"}, {"site": "the subject has no 'gate'; its sites are q, resid"}),
        (
            "bias_set",
            {"layers": [0, 9], "sites": ["q", "up"]},
            {"layers": "9 is out", "sites": "the subject has no 'up'"},
        ),
        ("lora", {}, {}),
        ("prompt", {}, {}),
    ],
)
def test_a_method_says_which_settings_the_subject_cannot_have(
    name: str, settings: dict[str, object], wrong: dict[str, str]
) -> None:
    made: Intervention = method(name).model_validate(settings)
    found = made.misplaced(Outline(4, ("resid", "q")))
    assert found.keys() == wrong.keys()
    assert all(found[setting].startswith(text) for setting, text in wrong.items())


def test_a_model_without_a_known_layout_is_named(tmp_path: Path) -> None:
    make_tiny_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "architectures": ["MambaForCausalLM"]}')
    with pytest.raises(SubjectError, match=r"MambaForCausalLM \(model type 'mamba'\) has no known layout"):
        outline(SubjectSpec(model=str(tmp_path)))
