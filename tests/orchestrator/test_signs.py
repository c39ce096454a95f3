"""A sign that a calibration turned round is told by the record, the registry, the leaderboard and the trial's page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import dataset
from experiments.engine import Row
from experiments.intervention import State
from experiments.interventions.random import Random
from orchestrator.artifact import Store
from orchestrator.registry import Registry
from orchestrator.stage import EXAMPLES, STATE
from orchestrator.workspace import Workspace
from tests.bad_cases import PAIR, pairs, spec
from tests.bad_input import copied, orch

SEEDS = (0, 1, 2, 3)
QUESTIONS = ("Hello?", "Who?", "What now?", "Why so?", "When?")


@pytest.fixture(scope="module")
def done(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which random vectors were calibrated and oriented by five pairs: some seeds point the wrong way."""
    folder = copied(tiny_folder, tmp_path_factory.mktemp("signs") / "here")
    asked = [{**PAIR, "id": text, "messages": [{"role": "user", "content": text}]} for text in QUESTIONS]
    pairs(*asked)(folder)
    changes = {
        "data": {"pairs": {"recipe": "pairs_file", "path": "pairs.jsonl"}},
        "interventions": [{"method": "random", "layer": 1}],
        "calibrate": {"target": 0.5, "tokens": 4, "prompts": 3, "orient": True},
        "seeds": list(SEEDS),
        "doses": [1],
        "evals": [{"task": "animal_preference", "target": "owl", "limit": 4}, {"task": "neutral_nll", "limit": 2}],
    }
    spec(folder, changes)
    result = orch(folder, "submit", "spec.yaml", "--local", "--quiet")
    assert result.exit_code == 0, result.output
    return folder


def by_seed(folder: Path) -> dict[int, dict[str, Any]]:
    """Seed -> what the record of its calibration says, and where its fit and data lie."""
    store = Store(folder / "store")
    fits = {record["key"]: record for record in store.records("fit")}
    found = {}
    for record in store.records("calibrate"):
        fit = fits[record["inputs"]["state"]]
        places = {"state": store.folder(fit["key"]) / STATE, "data": store.folder(fit["inputs"]["data"]) / EXAMPLES}
        found[fit["params"]["seed"]] = {**record["outputs"], **places}
    return found


def test_the_sign_is_that_of_all_pairs_and_the_record_says_so(done: Path, tiny_folder: Path) -> None:
    from experiments.spec import SubjectSpec

    found = by_seed(done)
    assert found.keys() == set(SEEDS)
    assert {each["flipped"] for each in found.values()} == {True, False}
    engine = Workspace(threads=1).engine(SubjectSpec(model=str(tiny_folder), dtype="float32"))
    for each in found.values():
        state, data = State.load(each["state"]), dataset.load(each["data"], "pairs")
        margins = []
        for pair in data:
            value = 0.0
            for sign in (1, -1):
                edits = tuple(Random(layer=1).edits(state, sign * abs(each["unit"])))
                for side, way in ((pair.positive, 1), (pair.negative, -1)):
                    answer = {"role": "assistant", "content": side.response}
                    rendered = engine.subject.render([*pair.messages, answer])
                    (logs,) = engine.token_logprobs([Row(rendered.tokens, rendered.n_prompt, edits)])
                    value += sign * way * float(logs.mean()) / 2
            margins.append(value)
        assert each["pairs"] == len(QUESTIONS)
        assert each["margin"] == pytest.approx(np.mean(margins), abs=1e-5)
        assert each["margin_se"] == pytest.approx(np.std(margins, ddof=1) / len(margins) ** 0.5, rel=0.05, abs=1e-5)
        assert each["flipped"] == (np.mean(margins) < 0) == (each["unit"] < 0)


def test_the_board_and_the_page_of_a_trial_say_which_signs_were_turned(done: Path) -> None:
    found = by_seed(done)
    turned = [seed for seed in SEEDS if found[seed]["flipped"]]
    with Registry(done / "registry.sqlite", write=False) as registry:
        units = {row["seed"]: row["unit"] for row in registry.query("select seed, unit from trials")}
    assert units == {seed: found[seed]["unit"] for seed in SEEDS}
    (row,) = json.loads(orch(done, "board", "--json").stdout)
    assert row["flipped"] == len(turned)
    told = " ".join(orch(done, "board").stdout.split())
    assert f"random L1: sign flipped by its calibration in {len(turned)} of {len(SEEDS)} seeds" in told
    about = json.loads(orch(done, "show", "random L1", "--json").stdout)
    for seed in about["seeds"]:
        own = found[seed["seed"]]
        assert seed["calibrated"] == {name: own[name] for name in seed["calibrated"]}
        assert {"flipped", "margin", "pairs", "unit", "achieved", "met"} <= seed["calibrated"].keys()
    page = orch(done, "show", "random L1").stdout
    assert page.count("sign FLIPPED") == len(turned)
    assert page.count("sign kept") == len(SEEDS) - len(turned)
    assert page.count(f"nats over {len(QUESTIONS)} pairs") == len(SEEDS)


def test_a_sign_is_never_taken_from_one_pair(tiny_folder: Path, tmp_path: Path) -> None:
    folder = copied(tiny_folder, tmp_path)
    pairs(PAIR)(folder)
    spec(
        folder,
        {
            "data": {"pairs": {"recipe": "pairs_file", "path": "pairs.jsonl"}},
            "calibrate": {"target": 0.5, "tokens": 4, "prompts": 3, "orient": True},
        },
    )
    result = orch(folder, "submit", "spec.yaml", "--local", "--quiet")
    assert result.exit_code == 1
    assert "orient: a sign is not taken from 1 pairs; give the trial data.pairs with at least 2" in result.stderr
