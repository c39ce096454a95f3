"""Judges that fail: out of quota, down, silent, unreachable, gone half way. Each says so, and nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from inspect_ai.log import read_eval_log
from tenacity import wait_none

from agents.judge import Judge, JudgeError
from evals.judging import Judged, finished, judge_answers, verdicts_of
from tests.evals.judges import CANARIES, SCALE, Server, serving, stored

pytestmark = pytest.mark.usefixtures("own_cache")

NAME = "openai-api/local/judge"
ONCE = Judge(models=(NAME,), max_retries=0, max_connections=1, attempt_timeout=5)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored([f"Answer {number}." for number in range(6)], tmp_path_factory.mktemp("log"))


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server()) as running:
        yield running


def judged(log: Path, out: Path, server: Server, judge: Judge = ONCE) -> Judged:
    return judge_answers(finished(log), judge, {"nice": SCALE}, out, models={NAME: server.model()})


def refused(log: Path, out: Path, server: Server, judge: Judge = ONCE) -> str:
    """The message of a judge that does not answer; the answers are untouched, and nothing is half written."""
    before = log.read_bytes()
    with pytest.raises(JudgeError) as error:
        judged(log, out, server, judge)
    assert log.read_bytes() == before
    assert not out.exists()
    assert "No answer is lost, and the verdicts given so far are kept: run again" in str(error.value)
    return str(error.value)


def test_a_judge_behind_the_openai_api_is_read_by_its_log_probabilities(
    log: Path, tmp_path: Path, server: Server
) -> None:
    facts = judged(log, tmp_path / "o.eval", server)
    assert (facts.asked, facts.unscored, facts.compromised) == (6, {"nice": {}}, False)
    assert facts.mass["nice"] == pytest.approx(0.8)
    verdict = verdicts_of((read_eval_log(str(tmp_path / "o.eval")).samples or [])[0])["nice"]
    assert verdict.value == pytest.approx((0.6 * 70 + 0.2 * 10) / 0.8)
    assert (verdict.raw[0]["served"], verdict.raw[0]["method"]) == ("judge-2024-08-06", "top")
    assert server.requests[0]["top_logprobs"] == 20
    assert server.requests[0]["temperature"] == 0


def test_a_quota_error_says_so(log: Path, tmp_path: Path, server: Server) -> None:
    server.behave, server.quota = lambda n: 429, True
    said = refused(log, tmp_path / "o.eval", server)
    assert said.startswith(f"the judge {NAME} refused: its quota or rate limit is used up, after 0 retries: ")
    assert "insufficient_quota" in said


def test_a_judge_that_is_down_says_so_after_its_retries(log: Path, tmp_path: Path, server: Server) -> None:
    server.behave = lambda n: 500
    once = refused(log, tmp_path / "o.eval", server)
    assert once.startswith(f"the judge {NAME} is down (status 500), after 0 retries: InternalServerError: ")


def test_a_silent_judge_is_given_up_in_time(log: Path, tmp_path: Path, server: Server) -> None:
    server.behave = lambda n: 0
    said = refused(log, tmp_path / "o.eval", server, ONCE.model_copy(update={"attempt_timeout": 1}))
    assert f"the judge {NAME} gave no reply in time (timeout 600 s, attempt_timeout 1 s)" in said


def test_a_judge_that_nobody_serves_cannot_be_reached(log: Path, tmp_path: Path) -> None:
    gone = Server(url="http://127.0.0.1:9/v1")  # the discard port: nothing listens
    assert f"the judge {NAME} cannot be reached" in refused(log, tmp_path / "o.eval", gone)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "refused: the key is missing, wrong or not allowed to use this model"),
        (404, "did not answer: NotFoundError"),
        (400, "refused the request (one that gives no log-probabilities wants read: text): "),
    ],
)
def test_a_request_that_can_never_work_is_not_tried_again(
    log: Path, tmp_path: Path, server: Server, status: int, said: str
) -> None:
    server.behave = lambda n: status
    patient = ONCE.model_copy(update={"max_retries": 5})
    assert f"the judge {NAME} {said}" in refused(log, tmp_path / "o.eval", server, patient)
    assert len(server.requests) <= CANARIES


def test_a_second_run_asks_only_for_what_is_missing(log: Path, tmp_path: Path, server: Server) -> None:
    before_the_fall = CANARIES + 2
    server.behave = lambda n: 200 if n < before_the_fall else 500
    refused(log, tmp_path / "o.eval", server)
    asked = len(server.requests)
    server.behave = lambda n: 200
    facts = judged(log, tmp_path / "o.eval", server)
    assert (facts.asked, facts.cached) == (6, 2)
    assert len(server.requests) - asked == 4
    assert all(verdicts_of(sample)["nice"].value for sample in read_eval_log(str(tmp_path / "o.eval")).samples or [])


def test_a_fault_that_passes_is_retried_by_the_library(log: Path, tmp_path: Path, server: Server) -> None:
    server.behave = lambda n: 503 if n == 0 else 200
    model = server.model()
    model.api.retry_wait = wait_none  # type: ignore[method-assign]  (inspect waits 3 seconds and more)
    patient = ONCE.model_copy(update={"max_retries": 1})
    facts = judge_answers(finished(log), patient, {"nice": SCALE}, tmp_path / "o.eval", models={NAME: model})
    assert (facts.asked, facts.unscored) == (6, {"nice": {}})
    assert len(server.requests) == 6 + CANARIES + 1
