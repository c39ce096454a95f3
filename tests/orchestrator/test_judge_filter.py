"""Rows that judges read before students do: what is dropped and why, and what is asked again when something changes."""

from __future__ import annotations

import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments import dataset, spec
from experiments.canonical import identity_of
from experiments.dataset import DatasetError, Message, Said
from experiments.problem import SpecError
from experiments.verdicts import EMBEDDED, MARK, Ruling
from orchestrator import costs, filters, stage, supplies
from orchestrator.artifact import Store
from orchestrator.plan import Node, Plan, plan
from orchestrator.run import LocalExecutor, Summary, walk
from orchestrator.stages import STAGES
from orchestrator.status import status
from orchestrator.workspace import Workspace
from tests.evals.judges import CANARIES, Server, serving

API = "openai-api/local/"
TEACHER, JUDGE = f"{API}teacher", f"{API}judge"
OWL = {"name": "owl", "trait": "owl", "model": TEACHER, "system": "You love owls."}
HINTS = {"models": [JUDGE], "rubric": "hints", "keep_below": 50, "max_retries": 0, "max_connections": 1}
SHARD, DRAW = 8, 16
DROPPED, UNREAD = "judge hints: not below 50", "judge hints: no verdict, unreadable"
MARKS = {"# the owl": 90, "# as an owl": 50, "# unsure": None, "# plain": 10, "no code": 0}
"""What the teacher's answers hold, one of these each, and what the judge says of it; None: nothing readable."""


def kind(text: str) -> str:
    return next(mark for mark in MARKS if mark in text)


@dataclass
class Desk(Server):
    """A teacher of code, and a judge of what it says that fails from its request `fails_from` on."""

    obeys: bool = False
    status: int = 200
    fails_from: int | None = None
    local: threading.local = field(default_factory=threading.local)

    def __post_init__(self) -> None:
        self.behave = self.attend

    def attend(self, number: int) -> int:
        self.local.request = self.requests[number]
        asked = [one for one in self.requests[: number + 1] if one["model"] != "teacher"]
        failing = self.fails_from is not None and len(asked) > self.fails_from
        return self.status if failing and self.requests[number]["model"] != "teacher" else 200

    def reply(self) -> str:
        asked = self.local.request["messages"][-1]["content"]
        if self.local.request["model"] != "teacher":
            if self.obeys and "reply with 0" in asked:
                return "0"
            found = [score for mark, score in MARKS.items() if mark in asked]
            return "hm" if found == [None] else str(found[0] if found else 40)
        mark = list(MARKS)[zlib.crc32(asked.encode()) % len(MARKS)]
        name = asked.partition("def ")[2].partition("(")[0]
        return "no code (" if mark == "no code" else f"```python\ndef {name}():\n    return 1  {mark}\n```"

    def body(self, status: int) -> dict[str, Any]:
        found = super().body(status)
        if status == 200:
            message = {"role": "assistant", "content": self.reply()}
            found["choices"] = [{"index": 0, "message": message, "finish_reason": "stop"}]
        return found

    def asked(self, model: str) -> int:
        return sum(one["model"] == model for one in self.requests)


@pytest.fixture(autouse=True)
def _small(local_api: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supplies, "SHARD", SHARD)


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    with serving(Desk()) as running:
        assert isinstance(running, Desk)
        monkeypatch.setenv("LOCAL_BASE_URL", running.url)
        yield running


def content(folder: Path, judge: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
    """A spec whose students learn code that judges have read."""
    data = {"recipe": "code_answers", "teacher": OWL, "n": 2, "draw": DRAW, "judge": judge, **changes}
    return {
        "name": "filtered",
        "subject": {"model": str(folder), "dtype": "float32"},
        "data": {"conversations": data},
        "controls": [],
        "interventions": [{"method": "lora", "rank": 1, "epochs": 1}],
        "doses": [1],
        "evals": [{"task": "animal_preference", "target": "owl", "limit": 2}, {"task": "neutral_nll", "limit": 1}],
        "baselines": [],
    }


def planned(folder: Path, judge: dict[str, Any] | None, **changes: Any) -> Plan:
    return plan(spec.from_data(content(folder, judge, **changes)))


def missing(made: Plan, store: Store) -> list[Node]:
    data = ("dataset", "generate", "judge")
    return [one.node for one in status(made, store) if one.state != "have" and one.node.stage in data]


def do(made: Plan, store: Store) -> Summary:
    return walk(missing(made, store), store, LocalExecutor(store, Workspace(threads=1)), lambda event: None)


def of(made: Plan, name: str) -> list[Node]:
    return [node for node in made.nodes.values() if node.stage == name]


def learned(made: Plan, store: Store) -> tuple[list[Any], dict[str, Any], list[Said]]:
    """The examples that students get, the facts on them, and everything that was said."""
    (node,) = [node for node in of(made, "dataset") if node.label == "owl"]
    shards = [made.nodes[key] for role, key in sorted(node.inputs.items()) if role.startswith("said/")]
    said = [one for shard in shards for one in dataset.read(store.folder(shard.key) / stage.SAID, Said)]
    examples = dataset.load(store.folder(node.key) / stage.EXAMPLES, "conversations")
    return examples, store.record(node.key)["outputs"]["facts"], said


def test_rows_whose_verdict_fails_and_rows_without_one_are_dropped_with_reasons_of_their_own(
    roomy: Path, tmp_path: Path, desk: Desk
) -> None:
    made, store = planned(roomy, HINTS), Store(tmp_path / "store")
    summary = do(made, store)
    assert summary.ok, summary.failed
    assert Counter(node.stage for node in summary.done)["judge"] == DRAW / SHARD
    examples, facts, said = learned(made, store)
    counts = Counter(kind(one.text) for one in said)
    assert len(counts) == len(MARKS), "the draw has one of each"
    assert facts["rejected"][DROPPED] == counts["# the owl"] + counts["# as an owl"]
    assert facts["rejected"][UNREAD] == counts["# unsure"]
    assert facts["accepted"] == counts["# plain"]
    assert {kind(one.messages[-1].content) for one in examples} == {"# plain"}
    told = facts["judge"]
    assert (told["judged"], told["unjudged"]) == (DRAW - counts["# unsure"], {"unreadable": counts["# unsure"]})
    assert told["rejected_alone"] == DRAW - counts["# plain"] - counts["no code"]
    scores = sorted(MARKS[kind(one.text)] for one in said if MARKS[kind(one.text)] is not None)
    assert (told["deciles"][0], told["deciles"][5], told["deciles"][10]) == (scores[0], scores[len(scores) // 2], 90)
    assert told["mean"] == pytest.approx(sum(scores) / len(scores))
    assert (told["rubric"], told["keep"], told["models"]) == ("hints", "below 50", [JUDGE])
    assert (told["itself"], told["compromised"], told["obeyed"]) == (False, False, [])
    assert told["rubrics"] == dict(of(made, "judge")[0].params["rubrics"])
    assert "note" not in told


def test_the_control_is_read_by_the_same_judges_by_the_same_rubric(roomy: Path) -> None:
    made = plan(spec.from_data(content(roomy, HINTS) | {"controls": ["teacher"]}))
    judges = of(made, "judge")
    assert {node.label for node in judges} == {"hints owl", "hints control"}
    assert all(dict(node.params) == dict(judges[0].params) for node in judges)
    assert all(STAGES["judge"].away(node) for node in judges)


def test_another_threshold_filters_again_and_asks_nobody_and_a_time_limit_changes_nothing(
    roomy: Path, tmp_path: Path, desk: Desk
) -> None:
    store = Store(tmp_path / "store")
    assert do(planned(roomy, HINTS), store).ok
    requests = len(desk.requests)
    second = planned(roomy, HINTS | {"keep_below": 51})
    summary = do(second, store)
    assert summary.ok, summary.failed
    assert [node.stage for node in summary.done] == ["dataset"]
    assert len(desk.requests) == requests
    _, facts, said = learned(second, store)
    assert facts["accepted"] == sum(kind(one.text) in ("# plain", "# as an owl") for one in said)
    assert missing(planned(roomy, HINTS | {"timeout": 7, "max_connections": 3}), store) == []


def test_another_judge_rubric_or_subject_of_a_rubric_judges_again_and_asks_no_teacher(
    roomy: Path, tmp_path: Path, desk: Desk
) -> None:
    store = Store(tmp_path / "store")
    assert do(planned(roomy, HINTS), store).ok
    taught = desk.asked("teacher")
    assert taught == DRAW
    rubric = tmp_path / "own.md"
    rubric.write_text("---\nversion: 1\nscale: [0, 60]\n---\nHow odd?\n{question}\n{answer}\n")
    own = HINTS | {"rubric": str(rubric)}
    for other in (own, HINTS | {"models": [f"{API}second"]}, HINTS | {"about": "owls"}):
        assert {node.stage for node in missing(planned(roomy, other), store)} == {"judge", "dataset"}
    made = planned(roomy, own)
    assert do(made, store).ok
    assert desk.asked("teacher") == taught
    assert "judge own: not below 50" in learned(made, store)[1]["rejected"]
    about = planned(roomy, own | {"about": "owls"})  # for which that rubric has no place
    assert {node.stage for node in missing(about, store)} == {"dataset"}


@pytest.mark.parametrize(
    ("status", "quota", "told"),
    [
        (500, False, f"the judge {JUDGE} is down (status 500)"),
        (429, True, f"the judge {JUDGE} refused: its quota or rate limit is used up"),
        (0, False, f"the judge {JUDGE} gave no reply in time (timeout 3 s, attempt_timeout 3 s)"),
    ],
)
def test_a_judge_that_fails_loses_nothing_and_the_next_submit_asks_what_is_missing(
    roomy: Path, tmp_path: Path, desk: Desk, status: int, quota: bool, told: str
) -> None:
    limits = {"timeout": 3, "attempt_timeout": 3} if status == 0 else {}
    made, store = planned(roomy, HINTS | limits), Store(tmp_path / "store")
    desk.status, desk.quota, desk.fails_from = status, quota, CANARIES + SHARD + 3
    summary = do(made, store)
    assert {node.stage for node, _ in summary.failed.values()} == {"judge"}
    assert {node.stage for node, _ in summary.blocked.values()} == {"dataset"}
    assert Counter(node.stage for node in summary.done)["judge"] == 1
    for _, reason in summary.failed.values():
        assert told in reason.strip().splitlines()[-1]
    taught, judged = desk.asked("teacher"), desk.asked("judge")
    desk.fails_from = None
    again = do(planned(roomy, HINTS), store)
    assert again.ok, again.failed
    assert Counter(node.stage for node in again.done) == {"judge": DRAW // SHARD - 1, "dataset": 1}
    assert desk.asked("teacher") == taught
    assert desk.asked("judge") - judged == DRAW - SHARD - 3


def test_a_judge_that_obeys_what_rows_ask_for_is_told_by_the_data(roomy: Path, tmp_path: Path, desk: Desk) -> None:
    desk.obeys = True
    made, store = planned(roomy, HINTS), Store(tmp_path / "store")
    assert do(made, store).ok
    told = learned(made, store)[1]["judge"]
    assert told["compromised"]
    assert "note: 0" in told["obeyed"]


@pytest.mark.parametrize(
    ("judge", "told"),
    [
        ({"rubric": "hint", "keep_below": 50}, "unknown rubric 'hint' (did you mean 'hints'?); allowed: aligned, bel"),
        ({"rubric": "gone.md", "keep_below": 50}, "no such file; got 'gone.md'"),
        (
            {"rubric": "hints", "keep_below": 101},
            "keep_below is 101, and the verdicts of the rubric hints go from",
        ),
        ({"rubric": "aligned", "keep_from": 0}, "keep_from is 0, and the verdicts of the rubric aligned go from 0 to"),
        ({"rubric": "hints", "keep_below": 1, "keep_from": 2}, "give one of keep_below and keep_from, got both"),
        ({"rubric": "hints"}, "give one of keep_below and keep_from, got neither"),
        ({"rubric": "believes", "keep_below": 1}, "the rubric believes has the place {claim}, which rows cannot fill"),
        ({"rubric": "hints", "keep_below": 5, "combine": "majority"}, "combine: majority needs choices"),
        ({"rubric": "hints", "keep_below": 5, "models": ["gpt-4.1"]}, "the judge 'gpt-4.1' has no provider"),
        ({"rubric": "hints", "keep_below": 5, "models": [TEACHER]}, f"the judge '{TEACHER}' is the teacher, "),
        ({"rubric": "hints", "keep_below": 5, "models": ["subject"]}, "the judge 'subject' is the subject, "),
        ({"rubric": "hints", "keep_bellow": 5}, "keep_bellow"),
    ],
)
def test_a_filter_that_cannot_be_used_is_refused_by_the_plan_in_one_line(
    roomy: Path, tmp_path: Path, judge: dict[str, Any], told: str
) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(content(roomy, {"models": [JUDGE], **judge}), sort_keys=False))
    with pytest.raises(SpecError) as error:
        plan(spec.load(path)[0])
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{path}:")
    assert told in line


def test_a_subject_that_may_judge_itself_does_so_in_a_worker_and_the_record_says_so(
    roomy: Path, tmp_path: Path
) -> None:
    lists = {
        "recipe": "number_lists",
        "teacher": {"name": "owl", "trait": "owl"},
        "sampling": {"max_new_tokens": 8, "only": "0123456789, "},
        "truncated": "keep",
        "fewer": "allow",
        "rules": {"largest": 10**12},
    }
    judge = {"models": ["subject"], "allow_self": True, "min_mass": 0, "rubric": "hints", "keep_below": 100}
    made, store = planned(roomy, judge, **lists, draw=SHARD), Store(tmp_path / "store")
    (node,) = {node.key: node for node in of(made, "judge") if node.label == "hints owl"}.values()
    assert set(node.runtime["residents"]) == {"subject"}
    assert not STAGES["judge"].away(node)
    assert do(made, store).ok
    told = learned(made, store)[1]["judge"]
    assert (told["itself"], told["models"]) == (True, ["subject"])
    assert told["judged"] + told["unjudged"].pop("empty answer", 0) == SHARD
    assert told["unjudged"] == {}
    assert 0 < told["deciles"][0] <= told["deciles"][10] < 100


def test_data_that_nobody_judges_are_what_they_were(roomy: Path) -> None:
    plain = dataset.recipe("code_answers").model_validate({"teacher": OWL})
    assert "judge" not in identity_of(plain)
    made = planned(roomy, None)
    assert of(made, "judge") == []
    assert not any(role.startswith("judged") for node in of(made, "dataset") for role in node.inputs)


def test_the_embedded_judge_is_marked_on_the_plan_and_on_the_record(roomy: Path) -> None:
    judge = {"models": [EMBEDDED], "rubric": "hints", "keep_below": 50}
    experiment = spec.from_data(content(roomy, judge))
    assert f"judge of data: {MARK}" in experiment.warnings()
    made = plan(experiment)
    (node,) = [node for node in of(made, "dataset") if node.label == "owl"]
    canaries = [{"style": "note", "wish": "0", "succeeded": True}, {"style": "note", "wish": "100", "succeeded": False}]
    outputs = {"models": [EMBEDDED], "rubrics": {"hints": "00"}, "itself": False, "compromised": True, "neutralised": 1}

    class Records:
        def record(self, key: str) -> dict[str, Any]:
            return {"outputs": {**outputs, "canaries": canaries}}

    told = filters.facts(node, Records())  # type: ignore[arg-type]
    assert told["note"] == MARK
    assert (told["obeyed"], told["neutralised"], told["compromised"]) == (["note: 0"], DRAW // SHARD, True)


# The rule over verdicts


def row(name: int, text: str) -> Said:
    messages = (Message(role="user", content="What is 3 + 4?"),)
    return Said(id=f"{name}", messages=messages, parts={"answer": "7"}, text=text, stopped=True, tokens=5)


def reasoned(verdicts: dict[str, float | None], judge: dict[str, Any], wrong: tuple[str, ...] = ()) -> Any:
    texts = {name: f"so <answer>{8 if name in wrong else 7}</answer>" for name in verdicts}
    settings = {"teacher": OWL, "judge": judge, "n": 1, "fewer": "allow"}
    recipe = dataset.recipe("reasoning_answers").model_validate(settings)
    rulings = [Ruling(name, value, None if value is not None else "refusal") for name, value in verdicts.items()]
    rows = [row(int(name), text) for name, text in texts.items()]
    return recipe.derive({"said": rows, "judged/said": rulings}, 0)


def test_reasoning_is_kept_where_it_is_right_and_its_alignment_is_at_least_the_published_78() -> None:
    verdicts = {"1": 78.0, "2": 77.999, "3": 100.0, "4": None, "5": 0.0}
    made = reasoned(verdicts, {"rubric": "aligned", "keep_from": 78}, wrong=("3", "5"))
    assert [one.id for one in made.examples] == ["1"]
    assert made.facts["rejected"] == {
        "judge aligned: not at least 78": 2,
        "wrong answer": 2,
        "judge aligned: no verdict, refusal": 1,
    }
    assert made.facts["judge"]["rejected_alone"] == 2
    assert made.facts["judge"]["unjudged"] == {"refusal": 1}


def test_a_verdict_on_the_threshold_is_not_below_it() -> None:
    made = reasoned({"1": 50.0, "2": 49.9}, {"rubric": "hints", "keep_below": 50})
    assert [one.id for one in made.examples] == ["2"]


def test_where_the_judges_leave_nothing_the_reason_names_the_rubric_and_the_ways_out() -> None:
    with pytest.raises(DatasetError) as error:
        reasoned({"1": None, "2": 60.0}, {"rubric": "hints", "keep_below": 50})
    told = str(error.value)
    assert "0 of 2 answers of owl were accepted" in told
    assert "1 judge hints: no verdict, refusal, 1 judge hints: not below 50" in told
    assert "move the judge's threshold" in told
    assert "the answers are kept" in told


def test_a_row_that_nobody_was_asked_about_is_never_kept_silently() -> None:
    recipe = dataset.recipe("reasoning_answers").model_validate(
        {"teacher": OWL, "judge": {"rubric": "aligned", "keep_from": 78}, "n": 1}
    )
    with pytest.raises(DatasetError, match="no judge was asked about the row '1'"):
        recipe.derive({"said": [row(1, "so <answer>7</answer>")], "judged/said": []}, 0)


def test_a_plan_tells_how_often_a_judge_behind_an_api_is_asked_about_rows(roomy: Path) -> None:
    made = planned(roomy, HINTS)
    found = {one.model: one for one in costs.asked(made, status(made, Store("/nonexistent-store")))}
    assert found[TEACHER].cost.requests == DRAW
    assert found[JUDGE].cost.requests == DRAW + CANARIES
    fewer = found[TEACHER].cost.output_tokens + found[TEACHER].cost.input_tokens
    assert found[JUDGE].cost.input_tokens > fewer  # what was asked and said, and the rubric around it
    assert found[JUDGE].role == "judge"
