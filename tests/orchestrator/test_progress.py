"""What a person sees while nodes run."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator import progress
from orchestrator.progress import Bars, Left, Lines
from orchestrator.run import Batch, Event
from orchestrator.stage import Outcome
from tests.orchestrator.work import Chore

NODES: list[Any] = [*(Chore("answer", f"a{n}") for n in range(8)), Chore("score", "s")]
FIRST = Batch("answer", tuple(NODES[:4]))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def finished(batch: Batch) -> Event:
    return Event("finish", batch, [Outcome(node.key, seconds=25.0, items=10) for node in batch.nodes])


def test_a_long_batch_is_counted_by_its_share_while_it_runs(clock: list[float]) -> None:
    left = Left(NODES)
    clock[0] += 50
    left.take(Event("items", FIRST, items=(10, 40)))
    assert left.so_far("answer") == 1
    assert left.eta("answer") == pytest.approx(350)
    clock[0] += 50
    left.take(finished(FIRST))
    assert left.so_far("answer") == 4
    assert left.eta("answer") == pytest.approx(100)
    assert left.brief("answer") == "40 items, about 2 min left"


def test_time_that_other_stages_took_in_between_is_not_counted(clock: list[float]) -> None:
    left = Left(NODES)
    clock[0] += 10
    left.take(finished(Batch("answer", (NODES[0],))))
    clock[0] += 3600
    left.take(finished(Batch("score", (NODES[8],))))
    clock[0] += 30
    left.take(finished(Batch("answer", tuple(NODES[1:4]))))
    assert left.eta("answer") == pytest.approx(40)


def test_a_lost_batch_is_not_counted_any_more(clock: list[float]) -> None:
    left = Left(NODES)
    left.take(Event("items", FIRST, items=(10, 40)))
    left.take(Event("lost", FIRST, text="killed"))
    assert left.so_far("answer") == 0
    assert left.eta("answer") is None


def test_a_plain_line_says_once_a_minute_how_far_a_long_batch_is(clock: list[float]) -> None:
    lines: list[str] = []
    with Lines(NODES, lines.append) as tell:
        tell(Event("start", FIRST))
        for done in range(1, 40):
            clock[0] += 5
            tell(Event("items", FIRST, items=(done, 40)))
        tell(finished(FIRST))
    assert [line.split("  ")[1] for line in lines[:-1]] == [
        "13 items, about 6 min left",
        "26 items, about 4 min left",
        "39 items, about 3 min left",
    ]
    assert lines[-1].startswith("[4/9] answer[quick, 4 nodes]:a0")


def test_quiet_says_only_what_went_wrong(clock: list[float]) -> None:
    lines: list[str] = []
    with Lines(NODES, lines.append, quiet=True) as tell:
        clock[0] += 500
        tell(Event("items", FIRST, items=(1, 40)))
        tell(finished(FIRST))
        tell(Event("lost", FIRST, text="killed"))
    assert lines == ["lost   answer[quick, 4 nodes]:a0: killed"]


def test_a_bar_moves_while_a_batch_runs(clock: list[float]) -> None:
    bars = Bars(NODES)
    tell = bars._tell
    tell(Event("start", FIRST))
    tell(Event("items", FIRST, items=(30, 40)))
    shown = bars.rich.tasks[bars.tasks["answer"]]
    assert (shown.completed, shown.total) == (3, 8)
    tell(finished(FIRST))
    assert shown.completed == 4
    assert "40 items" in shown.fields["note"]
