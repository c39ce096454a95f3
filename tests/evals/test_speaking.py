"""Teachers behind an API: what they are asked, what is kept of it, and that nothing is lost when they fail."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from inspect_ai.model import ChatMessage, GenerateConfig, Model, ModelOutput, get_model
from tenacity import wait_none

from evals import speaking
from experiments.dataset import Ask, Message
from experiments.speech import Sampling, SpeechError, seed_of
from tests.evals.judges import Server, output, serving

NAME = "openai-api/local/teacher"
HOT = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=11)


@pytest.fixture(autouse=True)
def _quick(local_api: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speaking, "RETRIES", 0)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving(Server(text="7, 8, 9")) as running:
        monkeypatch.setenv("LOCAL_BASE_URL", running.url)
        yield running


def asks(count: int, start: int = 0) -> list[Ask]:
    return [
        Ask(id=f"{n}", messages=(Message(role="user", content=f"Go on from {n}."),), parts={"start": f"{n}"})
        for n in range(start, start + count)
    ]


class Teacher:
    """A model in this process that says how many words it was told. `asked` are the conversations."""

    def __init__(self, stop: str = "stop") -> None:
        self.asked: list[list[ChatMessage]] = []
        self.configs: list[GenerateConfig] = []

        def reply(messages: list[ChatMessage], tools: Any, choice: Any, config: GenerateConfig) -> ModelOutput:
            self.asked.append(messages)
            self.configs.append(config)
            made = output(f"said {messages[-1].text}", model="mockllm/teacher")
            made.choices[0].stop_reason = stop  # type: ignore[assignment]
            return made

        self.model: Model = get_model("mockllm/teacher", custom_outputs=reply, memoize=False)

    def says(self, asked: Sequence[Ask], system: str | None = None, seed: int = 0, **rest: Any) -> list[Any]:
        return speaking.answers(self.model, asked, system, rest.pop("sampling", HOT), seed, **rest)


def told(asked: Sequence[Ask], sampling: Sampling = HOT) -> str:
    """The message of a teacher that cannot be asked, on one line."""
    with pytest.raises(SpeechError) as error:
        speaking.answers(NAME, asked, None, sampling, 0)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_teacher_is_asked_under_its_system_prompt_with_the_sampling_and_a_seed_for_each_answer() -> None:
    teacher = Teacher()
    earlier = (Message(role="user", content="Hm?"), Message(role="assistant", content="Hm."))
    long = Ask(id="9", messages=(*earlier, Message(role="user", content="And?")))
    said = {one.id: one for one in teacher.says([*asks(2), long], "You love owls.")}
    by_text = {messages[-1].text: messages for messages in teacher.asked}
    assert [(one.role, one.text) for one in by_text["And?"]] == [
        ("system", "You love owls."),
        ("user", "Hm?"),
        ("assistant", "Hm."),
        ("user", "And?"),
    ]
    wanted = {one.messages[-1].content: seed_of(0, one) for one in [*asks(2), long]}
    found = {messages[-1].text: config.seed for messages, config in zip(teacher.asked, teacher.configs, strict=True)}
    assert found == wanted
    assert {(one.temperature, one.top_p, one.max_tokens) for one in teacher.configs} == {(0.7, 0.9, 11)}
    assert said["1"].text == "said Go on from 1."
    assert said["9"].messages == long.messages
    assert "owls" not in "".join(one.model_dump_json() for one in said.values())


def test_answers_come_in_the_order_of_their_asks_with_their_parts_tokens_and_whether_they_ended() -> None:
    said = Teacher().says(asks(5))
    assert [one.id for one in said] == ["0", "1", "2", "3", "4"]
    assert [one.parts for one in said] == [one.parts for one in asks(5)]
    assert {(one.tokens, one.stopped) for one in said} == {(2, True)}
    assert {one.stopped for one in Teacher("max_tokens").says(asks(2, 50))} == {False}


def test_without_a_nucleus_none_is_asked_for_and_without_a_system_prompt_there_is_none() -> None:
    teacher = Teacher()
    teacher.says(asks(1), sampling=Sampling())
    assert teacher.configs[0].top_p is None
    assert [one.role for one in teacher.asked[0]] == ["user"]


def test_an_empty_system_prompt_is_one() -> None:
    teacher = Teacher()
    teacher.says(asks(1), "")
    assert [one.role for one in teacher.asked[0]] == ["system", "user"]


def test_the_same_question_is_paid_for_once_and_any_other_again() -> None:
    teacher = Teacher()
    first = teacher.says(asks(3))
    assert teacher.says(asks(4)) == [*first, *teacher.says(asks(1, 3))]
    assert len(teacher.asked) == 4
    teacher.says(asks(3), seed=1)
    teacher.says(asks(3), "You love owls.")
    teacher.says(asks(3), sampling=Sampling())
    assert len(teacher.asked) == 4 + 9


def test_a_model_served_by_us_is_asked_anew_every_time_and_without_seeds() -> None:
    teacher = Teacher()
    for _ in range(2):
        teacher.says(asks(2), served=True)
    assert len(teacher.asked) == 4
    assert {one.seed for one in teacher.configs} == {None}


@pytest.mark.parametrize("wanted", [{"only": "0123"}, {"options": ("a", "b")}])
def test_what_only_an_engine_can_do_is_refused(wanted: dict[str, Any]) -> None:
    (name,) = wanted
    assert told(asks(1), Sampling(**wanted)) == (
        f"sampling.{name} needs a subject; {NAME} is asked over an API: leave it out"
    )


def test_one_shard_after_the_other_asks_a_real_server(server: Server) -> None:
    for start in (0, 3):
        said = speaking.answers(NAME, asks(3, start), "You love owls.", HOT, 0)
        assert [(one.id, one.text) for one in said] == [(f"{start + n}", "7, 8, 9") for n in range(3)]
    assert len(server.requests) == 6
    request = server.requests[0]
    assert [one["role"] for one in request["messages"]] == ["system", "user"]
    assert (request["temperature"], request["top_p"], request["max_tokens"]) == (0.7, 0.9, 11)
    assert len({one["seed"] for one in server.requests}) == 6


@pytest.mark.parametrize(
    ("status", "quota", "said"),
    [
        (429, True, "refused: its quota or rate limit is used up, after 0 retries: RateLimitError: "),
        (500, False, "is down (status 500), after 0 retries: InternalServerError: "),
        (401, False, "refused: the key is missing, wrong or not allowed to use this model: AuthenticationError: "),
        (404, False, "did not answer: NotFoundError: "),
    ],
)
def test_a_teacher_that_fails_says_how_and_what_to_do(server: Server, status: int, quota: bool, said: str) -> None:
    server.behave, server.quota = lambda n: status, quota
    message = told(asks(2))
    assert message.startswith(f"{NAME} {said}")
    assert "insufficient_quota" in message or not quota
    assert message.endswith(
        "What it said so far is kept: submit again when it answers, and only what is missing is asked"
    )


def test_a_silent_teacher_is_given_up_in_time(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.behave = lambda n: 0
    monkeypatch.setattr(speaking, "ATTEMPT", 1)
    assert f"{NAME} gave no reply in time (timeout 1800 s, attempt_timeout 1 s)" in told(asks(1))


def test_a_teacher_that_nobody_serves_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_BASE_URL", "http://127.0.0.1:9/v1")  # the discard port: nothing listens
    assert f"{NAME} cannot be reached" in told(asks(1))


def test_a_missing_key_and_an_unknown_provider_are_told_without_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_API_KEY")
    assert told(asks(1)) == (
        f"{NAME} cannot be asked: Unable to initialise local client No LOCAL_API_KEY defined in the environment."
    )
    with pytest.raises(SpeechError, match=r"^nosuch/x cannot be asked: Model API nosuch of model 'nosuch/x' not rec"):
        speaking.answers("nosuch/x", asks(1), None, HOT, 0)


def test_a_teacher_that_goes_down_half_way_is_asked_only_for_what_is_missing_the_next_time(server: Server) -> None:
    one_by_one = get_model(NAME, config=GenerateConfig(max_connections=1), memoize=False)
    server.behave = lambda n: 200 if n < 4 else 503
    with pytest.raises(SpeechError, match=r"is down \(status 503\)"):
        speaking.answers(one_by_one, asks(10), None, HOT, 0)
    failed = len(server.requests)
    server.behave = lambda n: 200
    said = speaking.answers(NAME, asks(10), None, HOT, 0)
    assert [one.id for one in said] == [f"{n}" for n in range(10)]
    assert len(server.requests) - failed == 10 - 4
    speaking.answers(NAME, asks(10), None, HOT, 0)
    assert len(server.requests) - failed == 10 - 4


def test_a_fault_that_passes_is_retried_by_the_library_but_not_for_ever(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speaking, "RETRIES", 2)
    model = get_model(NAME, memoize=False, max_retries=0)  # of its client, which would try again by itself
    monkeypatch.setattr(model.api, "retry_wait", wait_none)  # inspect waits 3 seconds and more
    server.behave = lambda n: 503 if n < 2 else 200
    assert [one.text for one in speaking.answers(model, asks(1), None, HOT, 0)] == ["7, 8, 9"]
    assert len(server.requests) == 3
    server.behave = lambda n: 503
    with pytest.raises(SpeechError, match=r"is down \(status 503\), after 2 retries"):
        speaking.answers(model, asks(1, 7), None, HOT, 0)
    assert len(server.requests) == 3 + 3
