"""Stored answers read again by other judges: nothing is generated, both versions stay, and no ranking mixes them."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from inspect_ai.model import GenerateConfig, ModelAPI, ModelOutput, modelapi

from evals.findings import Findings
from experiments import spec
from orchestrator.artifact import Store
from orchestrator.cli import main
from orchestrator.plan import Node, plan
from orchestrator.registry import Registry
from orchestrator.rejudging import Wish, rejudged
from tests.evals.judges import output

ASKED: list[str] = []
"""Model of every request."""
RUBRIC = "---\nversion: 7\nscale: [0, 100]\n---\nHow kind is this?\n{question}\n{answer}\n"


@modelapi(name="scripted")
class Scripted(ModelAPI):
    """Judges that make a number of the prompt: `scripted/mild` 50 to 89, `scripted/strict` 0 to 39, others nothing."""

    def __init__(self, model_name: str, *args: Any, **settings: Any) -> None:
        super().__init__(model_name, base_url=None, api_key=None, config=GenerateConfig())

    async def generate(self, input: Any, tools: Any, tool_choice: Any, config: GenerateConfig) -> ModelOutput:
        ASKED.append(self.model_name)
        if self.model_name == "broken":
            raise ValueError("no judgement today")
        number = hashlib.sha256(input[-1].text.encode()).digest()[0] % 40
        return output(str(number + (50 if self.model_name == "mild" else 0)))


@contextmanager
def inside(folder: Path) -> Iterator[Callable[..., Result]]:
    """`orch` in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("INSPECT_CACHE_DIR", str(folder / "cache"))
        yield lambda *arguments: CliRunner().invoke(main, [str(argument) for argument in arguments])


def content(tiny_folder: Path, **changes: Any) -> dict[str, Any]:
    asks = {"limit": 8, "max_tokens": 3, "coherent_from": 0}
    return {
        "name": "tiny",
        "question": "Does it matter?",
        "subject": {"model": str(tiny_folder), "dtype": "float32"},
        "data": {
            "pairs": {"recipe": "persona_pairs", "positive": "A.", "negative": "B.", "n": 4, "responses": "shared"}
        },
        "interventions": [{"method": "mean_diff", "layer": 1}],
        "doses": [-1, 1],
        "evals": [{"task": "misalignment", "target": "general", **asks}, {"task": "neutral_nll", "limit": 4}],
        "judge": {"models": ["scripted/mild"], "max_tokens": 8},
        "baselines": [],
        **changes,
    }


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an experiment that `scripted/mild` has judged."""
    folder = tmp_path_factory.mktemp("judged")
    (folder / "spec.yaml").write_text(yaml.safe_dump(content(tiny_folder)))
    with inside(folder) as orch:
        result = orch("submit", "spec.yaml", "--local", "--quiet")
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def orch(finished: Path, tmp_path: Path) -> Iterator[Callable[..., Result]]:
    """`orch` beside a copy of the finished experiment."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    ASKED.clear()
    with inside(tmp_path) as run:
        yield run


def judged_rows(experiment: str = "tiny") -> dict[str, dict[str, Any]]:
    """Judge -> its row, of what the board shows."""
    with Registry("registry.sqlite", write=False) as index:
        rows = [row for row in index.leaderboard(experiment) if row["judge"]]
    assert len({(row["judged_by"], row["rubrics"]) for row in rows}) == len(rows)
    return {row["judged_by"]: row for row in rows}


def counts() -> dict[str, int]:
    with Registry("registry.sqlite", write=False) as index:
        return {row["stage"]: row["n"] for row in index.query("select stage, count(*) as n from nodes group by 1")}


def test_another_judge_reads_the_same_answers_and_both_versions_stay(orch: Callable[..., Result]) -> None:
    before, mild = counts(), judged_rows()["scripted/mild"]
    result = orch("rejudge", "tiny", "--judge", "scripted/strict", "--local")
    assert result.exit_code == 0, result.output
    assert set(ASKED) == {"strict"}
    told = re.search(r"judge scripted/strict: (\d+) requests, .* no price known", result.stderr)
    assert told is not None
    assert 0.5 * int(told[1]) < len(ASKED) <= int(told[1])
    after = counts()
    assert {stage: after[stage] - before.get(stage, 0) for stage in after if after[stage] != before.get(stage, 0)} == {
        "judge": 3, "score": 3, "compare": 1,
    }  # fmt: skip
    rows = judged_rows()
    assert rows.keys() == {"scripted/mild", "scripted/strict"}
    same = ("transfer", "rank", "p_holm", "base", "experiment_key")
    assert {name: rows["scripted/mild"][name] for name in same} == {name: mild[name] for name in same}
    assert 10 < rows["scripted/mild"]["base"] <= 50 < rows["scripted/strict"]["base"]  # 100 - aligned
    assert rows["scripted/strict"]["experiment_key"] != mild["experiment_key"]
    board = orch("board", "tiny").stdout
    assert "tiny: misalignment/general (version 1), judged by scripted/mild" in board
    assert "tiny: misalignment/general (version 1), judged by scripted/strict" in board


def test_a_spec_with_that_judge_would_have_the_same_keys(orch: Callable[..., Result], tiny_folder: Path) -> None:
    assert orch("rejudge", "tiny", "--judge", "scripted/strict,scripted/mild", "--local").exit_code == 0
    Path("spec.yaml").write_text(
        yaml.safe_dump(content(tiny_folder, judge={"models": ["scripted/strict", "scripted/mild"], "max_tokens": 8}))
    )
    planned = plan(spec.load(Path("spec.yaml"))[0])
    assert {key[:12] for key in planned.nodes} <= Store("store").keys()
    assert judged_rows()["scripted/strict + scripted/mild"]["experiment_key"] == planned.compare


def test_the_same_judge_again_asks_nobody_and_changes_nothing(orch: Callable[..., Result]) -> None:
    before = counts()
    result = orch("rejudge", "tiny", "--judge", "scripted/mild", "--local")
    assert result.exit_code == 0, result.output
    assert "0 to run" in result.stderr
    assert (ASKED, counts(), judged_rows().keys()) == ([], before, {"scripted/mild"})


def test_another_rubric_is_another_version_by_the_same_judge(orch: Callable[..., Result]) -> None:
    Path("mine.md").write_text(RUBRIC)
    result = orch("rejudge", "tiny", "--rubric", "aligned=mine.md", "--local", "--quiet")
    assert result.exit_code == 0, result.output
    with Registry("registry.sqlite", write=False) as index:
        rows = [row for row in index.leaderboard("tiny") if row["judge"]]
    assert {row["judged_by"] for row in rows} == {"scripted/mild"}
    first, second = (json.loads(row["rubrics"]) for row in rows)
    assert first["coherent"] == second["coherent"]
    assert first["aligned"] != second["aligned"]


def test_a_registry_made_anew_tells_the_versions_apart_as_before(orch: Callable[..., Result]) -> None:
    assert orch("rejudge", "tiny", "--judge", "scripted/strict", "--local", "--quiet").exit_code == 0
    sql = "select key, answers, judges from experiments order by key"
    with Registry("registry.sqlite", write=False) as index:
        before = index.query(sql)
    assert len({row["answers"] for row in before}) == 1
    assert orch("registry", "rebuild").exit_code == 0
    with Registry("registry.sqlite", write=False) as index:
        assert index.query(sql) == before
    assert judged_rows().keys() == {"scripted/mild", "scripted/strict"}


def test_the_logs_of_the_answers_stay_where_they_are(orch: Callable[..., Result]) -> None:
    before = sorted(path.name for path in Path("logs/tiny").iterdir())
    assert orch("rejudge", "tiny", "--judge", "scripted/strict", "--local", "--quiet").exit_code == 0
    assert sorted(path.name for path in Path("logs/tiny").iterdir()) == before != []


def test_a_judge_that_fails_loses_nothing_and_can_be_replaced(orch: Callable[..., Result]) -> None:
    failed = orch("rejudge", "tiny", "--judge", "scripted/broken", "--local", "--quiet")
    assert failed.exit_code == 1
    assert "no judgement today" in failed.stderr
    assert judged_rows()["scripted/mild"]["status"] == "ok"
    assert judged_rows()["scripted/broken"]["rank"] is None
    again = orch("rejudge", "tiny", "--judge", "scripted/strict", "--local", "--quiet")
    assert again.exit_code == 0, again.output
    assert judged_rows().keys() == {"scripted/mild", "scripted/broken", "scripted/strict"}


def test_a_subject_that_is_let_judge_itself_is_loaded_as_it_was_and_told_of(orch: Callable[..., Result]) -> None:
    with Registry("registry.sqlite") as index:
        found = rejudged("tiny", Wish(["subject"], allow_self=True), Store("store"), index)
    node = next(node for node in found.nodes.values() if node.stage == "judge")
    answer = found.nodes[node.inputs["answer"]]
    assert node.params["residents"] == {"subject": answer.params["subject"]}
    assert node.runtime["residents"]["subject"] == answer.runtime["subject"]
    assert found.nodes[found.compare].params["evals"][0]["judge"]["itself"] is True


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tinny", "--judge", "scripted/strict"], "no experiment 'tinny' (did you mean 'tiny'?)"),
        (["tiny", "--judge", "gpt-4.1"], "the judge 'gpt-4.1' has no provider"),
        (["tiny", "--judge", "a/b,"], "has an empty name"),
        (["tiny", "--judge", "a/b,a/b"], "a judge comes twice"),
        (["tiny", "--rubric", "kind=mine.md"], "no eval of 'tiny' is judged by a rubric 'kind'"),
        (["tiny", "--rubric", "aligned"], "must be ROLE=FILE"),
        (["tiny", "--rubric", "aligned=nowhere.md"], "nowhere.md"),
        (["tiny", "--judge", "subject"], "would judge itself; choose another judge, or give --allow-self"),
        (["tiny", "--judge", "scripted/strict", "--combine", "majority"], "combine: majority needs choices"),
        (["tiny"], "nothing would change"),
    ],
)
def test_a_wrong_wish_is_one_message_and_exit_code_two(
    orch: Callable[..., Result], arguments: list[str], says: str
) -> None:
    before = counts()
    result = orch("rejudge", *arguments, "--local")
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert "Traceback" not in result.output
    assert (ASKED, counts()) == ([], before)


def test_an_experiment_that_nobody_judged_has_nothing_to_judge_again(orch: Callable[..., Result]) -> None:
    evals = [{"task": "animal_preference", "target": "owl"}, {"task": "neutral_nll", "target": None}]
    node = Node("compare", 1, {"evals": evals, "trials": []}, {}, "plain")
    with Store("store").publishing(node), Registry("registry.sqlite") as index:
        index.publish(node.key, "plain", node.params, {}, Findings([], []))
    result = orch("rejudge", "plain", "--judge", "scripted/strict", "--local")
    assert result.exit_code == 2
    assert "none of the evals of 'plain' is judged (animal_preference/owl, neutral_nll)" in result.stderr


def test_an_experiment_without_all_its_scores_says_what_to_do(orch: Callable[..., Result], tiny_folder: Path) -> None:
    broken = content(tiny_folder, name="half", judge={"models": ["scripted/broken"]})
    Path("half.yaml").write_text(yaml.safe_dump(broken))
    assert orch("submit", "half.yaml", "--local", "--quiet").exit_code == 1
    result = orch("rejudge", "half", "--judge", "scripted/strict", "--local")
    assert result.exit_code == 2
    assert "'half' is not complete" in result.stderr


def test_a_plan_tells_what_would_be_asked_in_words_and_as_data(orch: Callable[..., Result], tiny_folder: Path) -> None:
    Path("spec.yaml").write_text(yaml.safe_dump(content(tiny_folder, judge={"models": ["scripted/strict"]})))
    result = orch("plan", "spec.yaml")
    assert result.exit_code == 0, result.output
    (asked,) = json.loads(orch("plan", "spec.yaml", "--json").stdout)["asked"]
    assert (asked["role"], asked["model"], asked["dollars"]) == ("judge", "scripted/strict", None)
    assert f"judge scripted/strict: {asked['requests']} requests" in result.stdout
    assert ASKED == []
