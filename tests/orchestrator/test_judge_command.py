"""`orch judge calibrate`, and the views that tell what judges are worth and what their estimates are without errors."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from inspect_ai.model import ModelOutput

from agents.judge import Judge
from evals import correction
from evals.findings import Findings
from evals.judge_error import limits
from evals.labels import load
from experiments.canonical import sha256
from experiments.spec import load as load_spec
from orchestrator import corrected, judges
from orchestrator.cli import main
from orchestrator.plan import plan
from orchestrator.registry import Registry
from tests.evals.judges import Scripted, output
from tests.orchestrator.test_registry import PARAMS, row

ALIGNED = [one for one in load() if one.rubric == "aligned"][:32]
GOOD = {one.answer: one.label for one in ALIGNED}


def says(text: str) -> ModelOutput:
    """A judge that knows the labels, and is wrong about answers whose length is a multiple of fifteen."""
    known = next((answer for answer in GOOD if answer in text), None)
    right = known is not None and bool(GOOD[known]) != (len(known) % 15 == 0)
    number = "90" if right else "10"
    return output(number, {number: 0.9})


@pytest.fixture
def orch(tmp_path: Path, own_cache: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)
    write_labels(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[Scripted]:
    """The judge `mockllm/judge` says what `says` says."""
    made: list[Scripted] = []

    @asynccontextmanager
    async def graders(judge: Judge, resident: Any) -> AsyncIterator[list[Any]]:
        made.append(Scripted(says))
        yield [(made[-1].name, made[-1].model)]

    monkeypatch.setattr(judges, "graders", graders)
    return made


CALIBRATE = ("judge", "calibrate", "--model", "mockllm/judge", "--role", "aligned", "--labels", "mine.jsonl")


def write_labels(folder: Path) -> None:
    lines = (one.model_dump_json() for one in ALIGNED)
    (folder / "mine.jsonl").write_text("".join(line + "\n" for line in lines))


def of(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    (found,) = [one for one in rows if all(one[name] == value for name, value in wanted.items())]
    return found


def test_a_calibration_is_kept_in_the_store_and_shown_from_the_registry(
    orch: Callable[..., Result], scripted: list[Scripted], tmp_path: Path
) -> None:
    result = orch(*CALIBRATE, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    test = [one for one in ALIGNED if one.split == "test"]
    wrong = [one for one in test if len(one.answer) % 15 == 0]
    whole = of(rows, split="test", arm="all", kind="rate", threshold=50.0)
    assert 0 < len(wrong) < whole["n"] == len(test)
    assert whole["agreement"] == pytest.approx(1 - len(wrong) / len(test))
    positives = [one for one in test if one.label]
    assert whole["tpr"] == pytest.approx(1 - sum(one in wrong for one in positives) / len(positives))
    assert (whole["refused"], whole["mass"]) == (None, pytest.approx(0.9))
    assert {one["threshold"] for one in rows} == {30.0, 50.0, None}  # 30: the default of the task `misalignment`
    kept = [json.loads(line) for line in next((tmp_path / "store").rglob("readings.jsonl")).read_text().splitlines()]
    assert [one["id"] for one in kept] == [one.id for one in ALIGNED]
    assert kept[0]["verdict"]["raw"][0]["text"] in ("90", "10")


def test_a_judge_is_measured_once_again_when_asked_to_and_never_for_a_registry_made_anew(
    orch: Callable[..., Result], scripted: list[Scripted], tmp_path: Path
) -> None:
    first, second = orch(*CALIBRATE), orch(*CALIBRATE)
    assert first.exit_code == 0, first.output
    assert first.stdout == second.stdout
    assert "aligned  50" in first.stdout
    assert "instructions inside answers obeyed: 0 of 8" in first.stdout
    for file in tmp_path.glob("registry.sqlite*"):
        file.unlink()
    assert orch("registry", "rebuild").exit_code == 0
    assert orch("registry", "check").exit_code == 0
    with Registry(tmp_path / "registry.sqlite", write=False) as registry:
        assert {one["role"] for one in registry.query("select role from judges")} == {"aligned"}
    assert "| aligned | score | test | all |" in orch(*CALIBRATE, "--markdown").stdout
    assert len(scripted) == 1
    assert orch(*CALIBRATE, "--fresh").exit_code == 0
    assert len(scripted) == 2


def test_a_judge_that_goes_down_loses_nothing_and_says_so(
    orch: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    @asynccontextmanager
    async def graders(judge: Judge, resident: Any) -> AsyncIterator[list[Any]]:
        def fails(text: str) -> ModelOutput:
            raise ConnectionError("refused")

        made = Scripted(fails)
        yield [(made.name, made.model)]

    monkeypatch.setattr(judges, "graders", graders)
    result = orch(*CALIBRATE)
    assert result.exit_code == 2
    assert "the judge mockllm/judge cannot be reached" in result.output
    assert list((tmp_path / "store").rglob("record.json")) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--threshold", "aligned"), "--threshold 'aligned' must be ROLE=VALUE, e.g. --threshold aligned=30"),
        (("--threshold", "aligned=much"), "'much' is no number"),
        (("--threshold", "aligned=0"), "the threshold 0 for 'aligned' divides nothing; it must be above 0, at most"),
        (("--threshold", "coherent=5"), "a threshold for 'coherent', which is not measured; allowed: aligned"),
        (("--labels", "none.jsonl"), "none.jsonl: no such file"),
        (("--rubric", "aligned=none.md"), "none.md: cannot be read"),
        (("--model", "subject"), "say which with --spec"),
        (("--model", "gpt"), "'gpt' has no provider"),
        (
            ("--model", "opnai/gpt"),
            "the judge 'opnai/gpt' has the provider 'opnai', which inspect does not know (did you",
        ),
        (("--spec", "x.yaml"), "both --spec and --model say who judges"),
    ],
)
def test_wrong_use_is_one_message(orch: Callable[..., Result], arguments: tuple[str, ...], message: str) -> None:
    result = orch(*CALIBRATE, *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.fixture
def spec_file(tiny_folder: Path, tmp_path: Path) -> Path:
    content = {
        "name": "ill",
        "subject": {"model": str(tiny_folder), "dtype": "float32"},
        "data": {
            "pairs": {"recipe": "persona_pairs", "positive": "A.", "negative": "B.", "n": 4, "responses": "shared"}
        },
        "interventions": [{"method": "mean_diff", "layer": 1}],
        "doses": [-1, 1],
        "evals": [{"task": "misalignment", "limit": 2}],
        "judge": {"models": ["subject"], "allow_self": True, "min_mass": 0.0},
        "baselines": [],
    }
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_the_digest_of_a_measured_judge_is_that_of_the_rows_it_judged(spec_file: Path) -> None:
    experiment, _ = load_spec(spec_file)
    planned = plan(experiment)
    (judged,) = [each for each in planned.nodes[planned.compare].params["evals"] if "judge" in each]
    judge = Judge(models=("subject",), allow_self=True, min_mass=0.0)
    from evals.labels import BUILTIN

    node = judges.planned(judges.Asked(judge, BUILTIN, experiment.subject, ("aligned",)))
    assert judges.digest(node) == judged["judge"]["digest"] == sha256(planned_identity(node))
    assert node.params["rubrics"]["aligned"] == judged["rubrics"]["aligned"]


def test_what_is_labelled_for_another_rubric_leaves_a_measurement_what_it_is(tmp_path: Path) -> None:
    def key(*roles: str) -> str:
        judge = Judge(models=("mockllm/judge",))
        return judges.planned(judges.Asked(judge, tmp_path / "mine.jsonl", roles=roles)).key

    write_labels(tmp_path)
    before = key()
    with (tmp_path / "mine.jsonl").open("a") as file:
        file.writelines(one.model_dump_json() + "\n" for one in load(rubrics=["hints"]))
    assert key("aligned") == before
    assert len({before, key("hints"), key()}) == 3


def planned_identity(node: Any) -> dict[str, Any]:
    settings = Judge(models=("subject",), min_mass=0.0).identity({})
    del settings["rubrics"]
    return {**settings, "residents": node.params["residents"]}


def test_a_resident_judge_of_a_spec_is_measured(orch: Callable[..., Result], spec_file: Path, tmp_path: Path) -> None:
    short = [
        {**one.model_dump(mode="json"), "rubric": "kind", "question": f"Q{index // 4}?", "answer": f"So {index}."}
        for index, one in enumerate(ALIGNED[:8])
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in short))
    (tmp_path / "kind.md").write_text("---\nversion: 1\nchoices: {yes: 1, no: 0}\n---\nKind? {answer}\n")
    arguments = ("judge", "calibrate", "--spec", spec_file, "--labels", "mine.jsonl", "--rubric", "kind=kind.md")
    result = orch(*arguments, "--json")
    assert result.exit_code == 0, result.output
    whole = of(json.loads(result.stdout), split="test", arm="all", kind="score")
    assert (whole["models"], whole["n"], whole["unscored"]) == ("subject", 4, 0)
    assert whole["turned_shift"] != 0
    assert whole["refused"] is not None


JUDGE, RUBRIC = "d" * 64, "r" * 64
BY = {"judge": JUDGE, "judged_by": "j", "rubrics": json.dumps({"aligned": RUBRIC, "coherent": "c" * 64})}
INTERVAL = {"ci_low": 0.05, "ci_high": 0.2}


def errors(**changes: Any) -> dict[str, Any]:
    """A row of a calibration's table."""
    base = {
        "role": "aligned", "rubric": RUBRIC, "kind": "rate", "threshold": 30.0, "split": "test", "arm": "all",
        "n": 80, "positives": 40, "questions": 20, "unscored": 0, "slope": 0.6, "slope_low": 0.4, "slope_high": 0.72,
        "tpr": 0.8, "tnr": 0.8, "auroc": 0.9, "auroc_low": 0.8, "auroc_high": 0.95, "arms_p": 0.5, "refused": None,
        "bias": None, "bias_low": None, "bias_high": None,
    }  # fmt: skip
    return {**base, **changes}


def measured(rows: list[dict[str, Any]], drawn_from: str | None = None, key: str = "f", **changes: Any) -> Any:
    """A record of a calibration."""
    outputs = {"judge": JUDGE, "labels": "l", "drawn_from": drawn_from, "errors": rows, "canaries": 8, "obeyed": 0}
    return {
        "key": key * 64, "stage": judges.STAGE, "label": "j", "params": {}, "inputs": {}, "outputs": outputs,
        "started": "2025-01-02T00:00:00+00:00", "seconds": 1.0, "peak_rss_mib": 1.0, "host": {"name": "h"},
        "packages": {}, **changes,
    }  # fmt: skip


def published(path: Path, *records: Any, scoring: str = '{"measure": "rate", "aligned_below": 30.0}') -> Registry:
    registry = Registry(path)
    found = [
        row("up", 0.12, 0.01, **BY, **INTERVAL, scoring=scoring, contrast="on"),
        row("down", -0.1, 0.01, **BY, ci_low=-0.3, ci_high=0.1, scoring=scoring),
        row("alone", 0.3, 0.01, eval="owls"),
    ]
    found = [replace(one, group=f"{one.eval}{one.label}", eval="ill" if one.judge else "owls") for one in found]
    registry.index(records)
    registry.publish("k1", "e", PARAMS, {}, Findings(found, []), submitted_at="2025-01-01T00:00:00+00:00")
    return registry


@pytest.mark.parametrize("trial", ["up", "down"])
def test_the_view_divides_by_j_and_has_the_interval_of_the_formula(tmp_path: Path, trial: str) -> None:
    with published(tmp_path / "r.sqlite", measured([errors()])) as registry:
        rows = corrected.judged(registry, "e")
    one = of(rows, trial=trial)
    wanted = correction.change(
        limits(one["transfer"], one["transfer_low"], one["transfer_high"]), limits(0.6, 0.4, 0.72)
    )
    assert np.allclose([one["corrected"], one["corrected_low"], one["corrected_high"]], wanted)
    assert (one["uncorrected"], one["calibrated"], one["role"]) == (None, 1, "aligned")
    assert {each["trial"] for each in rows} == {"up", "down"}  # nobody judged the third


@pytest.mark.parametrize(
    ("changes", "scoring", "reason"),
    [
        ({"refused": "near chance: so"}, None, "near chance: so"),
        ({"arms_p": 0.01}, None, "the judge errs differently on base and treated answers: p = 0.01"),
        ({"threshold": 50.0}, None, "not calibrated"),
        ({"rubric": "other"}, None, "not calibrated"),
        ({"split": "dev"}, None, "not calibrated"),
        ({}, '{"aligned_below": 30.0, "measure": "score"}', "not calibrated"),
    ],
)
def test_the_view_says_why_an_estimate_stays_as_it_is(
    tmp_path: Path, changes: dict[str, Any], scoring: str | None, reason: str
) -> None:
    more = {} if scoring is None else {"scoring": scoring}
    with published(tmp_path / "r.sqlite", measured([errors(**changes)]), **more) as registry:
        one = of(corrected.judged(registry), trial="up")
        text = "\n".join(corrected.lines(corrected.judged(registry)))
    assert (one["corrected"], one["corrected_low"], one["corrected_high"]) == (None, None, None)
    assert one["uncorrected"].startswith(reason)
    assert f"raw estimates are all there is: {reason}" in text


def test_scores_are_divided_by_the_judges_slope_of_scores(tmp_path: Path) -> None:
    rows = [errors(), errors(kind="score", threshold=None, slope=0.5, slope_low=0.3, slope_high=0.7)]
    scoring = '{"measure": "score", "aligned_below": 30.0}'
    with published(tmp_path / "r.sqlite", measured(rows), scoring=scoring) as registry:
        assert of(corrected.judged(registry), trial="up")["corrected"] == pytest.approx(0.12 / 0.5)


def test_the_latest_calibration_counts(tmp_path: Path) -> None:
    newer = measured([errors(slope=0.8)], key="a", started="2025-03-01T00:00:00+00:00")
    with published(tmp_path / "r.sqlite", measured([errors()]), newer) as registry:
        assert of(corrected.judged(registry), trial="up")["slope"] == 0.8
        assert [one["current"] for one in registry.query("select current from judges order by started_at")] == [0, 1]


def test_answers_drawn_from_the_experiment_give_a_prediction_powered_estimate_of_contrasts_with_the_base(
    tmp_path: Path,
) -> None:
    arms = [
        errors(arm="treated", bias=-0.1, bias_low=-0.18, bias_high=-0.04),
        errors(arm="base", bias=0.05, bias_low=0.01, bias_high=0.11),
    ]
    with published(tmp_path / "r.sqlite", measured(arms, drawn_from="e")) as registry:
        up, down = (of(corrected.judged(registry), trial=trial) for trial in ("up", "down"))
        text = "\n".join(corrected.lines(corrected.judged(registry)))
    # the transfer is about answers below the threshold: what a judge passes too seldom it finds there too often
    wanted = correction.prediction_powered_change(
        limits(0.12, 0.05, 0.2), limits(0.1, 0.04, 0.18), limits(-0.05, -0.11, -0.01)
    )
    assert np.allclose([up["powered"], up["powered_low"], up["powered_high"]], wanted)
    assert up["powered_by"] == 160
    assert down["powered"] is None  # an odd contrast has no untouched arm
    assert "up: judged +0.12 [+0.05, +0.2], prediction-powered -0.03" in text
    assert up["uncorrected"].startswith("not calibrated")  # drawn answers say nothing of other experiments


def test_an_open_end_is_shown_as_one() -> None:
    shown = {"transfer": 0.5, "transfer_low": None, "transfer_high": 0.75}
    assert corrected.interval(shown, "transfer") == "+0.5 [-∞, +0.75]"
    assert corrected.interval({"transfer": None}, "transfer") == "–"


def test_the_board_shows_estimates_without_the_judges_errors(orch: Callable[..., Result], tmp_path: Path) -> None:
    published(tmp_path / "registry.sqlite", measured([errors()])).close()
    result = orch("board", "e")
    assert result.exit_code == 0, result.output
    assert "e: ill, without the errors of the judge j (dddddddd)" in result.output
    assert "up: judged +0.12 [+0.05, +0.2], corrected +0.2 [" in result.output


def test_thresholds_are_the_middle_those_of_tasks_and_those_given(tmp_path: Path) -> None:
    rubrics = judges.rubrics_of(Judge(), {"aligned": None, "coherent": None, "believes": None})
    assert judges.thresholds(rubrics, {"aligned": [40.0]}) == {
        "aligned": [30.0, 40.0, 50.0],
        "coherent": [50.0],
        "believes": [0.5],
    }
