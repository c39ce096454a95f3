"""What detectors said is on the board: how often they are right, and of each dataset what they took it for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from click.testing import CliRunner

from evals.detections import Detected, Detection
from evals.findings import Findings
from orchestrator import detected, summary
from orchestrator.cli import main
from orchestrator.registry import Registry
from tests.orchestrator.test_registry import PARAMS, ROWS


def said(data: str, trait: str, order: str, p: float, shuffled: bool = False, seed: int = 0) -> list[Detection]:
    """A ranking of candidates, likeliest first; the first with adjusted `p`."""
    return [
        Detection("likelihood", data, trait, shuffled, seed, name, place, 0.1 / place, 3.0 / place, 0.0, p, p, 0.25)
        for place, name in enumerate(order.split(), 1)
    ]


FOUND = [
    *said("owls", "owl", "owl cat dog", 0.04),
    *said("cats", "cat", "dog owl cat", 0.5),
    *said("owls shuffled", "owl", "dog owl cat", 0.9, shuffled=True),
]
VERDICT = Detected("likelihood", 0.8125, 0.551, 0.999, 0.5, 1 / 3, 2)


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    path = tmp_path / "r.sqlite"
    with Registry(path) as index:
        old = Findings(ROWS, [], detections=said("old", "owl", "owl cat", 0.01))
        index.publish("k0", "owls", PARAMS, {}, old, submitted_at="2024-01-01T00:00:00+00:00")
        index.publish("k1", "owls", PARAMS, {}, Findings(ROWS, [], detections=FOUND, detectors=[VERDICT]))
        index.publish("k2", "plain", PARAMS, {}, Findings(ROWS, []))
    return path


def publish_last(index: Registry, found: Findings) -> None:
    index.publish("last", "owls", PARAMS, {}, found, submitted_at="2099-01-01T00:00:00+00:00")


def test_a_detector_has_one_line_and_every_dataset_one(registry: Path) -> None:
    with Registry(registry, write=False) as index:
        lines = detected.lines(index.detections("owls"))
        assert detected.lines(index.detections("plain")) == []
        assert detected.lines(index.detections()) == lines
    assert lines[1:-1] == [
        "  likelihood: AUROC 0.81 [0.55, 1.00] over 2 datasets; the trait comes first in 50% (by chance 33%)",
        "    cats, seed 0: 1st dog (z +3.00, p adj 0.5); cat (z +1.00, p adj 0.5) is number 3 of 3; "
        "score +0.0333, found four times in five from 0.25",
        "    owls, seed 0: 1st owl* (z +3.00, p adj 0.04)",
        "    owls shuffled, seed 0 (shuffled: nothing to find): 1st dog (z +3.00, p adj 0.9)",
    ]


def test_the_board_and_the_page_show_them(registry: Path) -> None:
    board = CliRunner().invoke(main, ["board", "--registry", str(registry)])
    assert board.exit_code == 0, board.output
    assert board.stdout.count("owls: detection without training") == 1
    assert "1st owl* (z +3.00, p adj 0.04)" in board.stdout
    assert "old, seed" not in board.stdout
    with Registry(registry, write=False) as index:
        assert "## Detection without training" in summary.page(index, "owls")
        assert "## Detection without training" not in summary.page(index, "plain")


def test_a_detector_without_a_true_candidate_says_why_it_has_no_auroc(registry: Path) -> None:
    with Registry(registry) as index:
        publish_last(index, Findings(ROWS, [], detections=said("owls", "ant", "owl cat", 0.5)))
        lines = detected.lines(index.detections("owls"))
    assert lines[1] == "  likelihood: no AUROC: it needs a dataset whose trait is among the candidates"
    assert lines[2].endswith("1st owl (z +3.00, p adj 0.5)")


def test_many_datasets_are_cut_short_and_counted(registry: Path) -> None:
    many = [row for seed in range(20) for row in said("owls", "owl", "owl cat", 0.5, seed=seed)]
    with Registry(registry) as index:
        publish_last(index, Findings(ROWS, [], detections=many, detectors=[VERDICT]))
        lines = detected.lines(index.detections("owls"))
    assert len(lines) == 2 + detected.MOST + 2
    assert "... 8 more datasets" in lines[-2]


def test_an_interval_that_one_dataset_cannot_have_is_left_out(registry: Path) -> None:
    lone = dataclasses.replace(VERDICT, low=None, high=None, datasets=1)
    with Registry(registry) as index:
        publish_last(index, Findings(ROWS, [], detections=FOUND, detectors=[lone]))
        lines = detected.lines(index.detections("owls"))
    assert lines[1].startswith("  likelihood: AUROC 0.81 over 1 dataset; ")
