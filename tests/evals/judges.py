"""Answers to be judged and judges to judge them: a stored log, scripted models, and a server that fails on demand."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from inspect_ai import Task
from inspect_ai import eval as inspect_eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import (
    ChatMessage,
    GenerateConfig,
    Logprob,
    Logprobs,
    Model,
    ModelOutput,
    ModelUsage,
    TopLogprob,
    get_model,
)
from inspect_ai.solver import Solver, TaskState, solver

from agents.rubric import Rubric

SCALE = Rubric("nice", 1, "How nice?\n{question}\n{answer}", scale=(0, 100), unscored={"REFUSAL": "refusal"})
YES_NO = Rubric("plants", 1, "About plants?\n{question}\n{answer}", choices={"yes": 1.0, "no": 0.0})
CANARIES = 9
"""Calls that canaries cost a judge, for each rubric."""


def output(text: str, top: Mapping[str, float] | None = None, model: str = "mockllm/judge") -> ModelOutput:
    """A reply, with the probabilities of its first token where given."""
    made = ModelOutput.from_content(model, text)
    if top is not None:
        shown = [TopLogprob(token=token, logprob=math.log(share)) for token, share in top.items()]
        first = Logprob(token=text, logprob=shown[0].logprob, top_logprobs=shown)
        made.choices[0].logprobs = Logprobs(content=[first])
    made.usage = ModelUsage(input_tokens=7, output_tokens=2, total_tokens=9)  # else inspect fetches a tokenizer
    return made


@solver
def says(answers: Mapping[str, str]) -> Solver:
    """A subject that says what is written down."""

    async def solve(state: TaskState, generate: Any) -> TaskState:
        state.output = output(answers[str(state.sample_id)], model="mockllm/subject")
        return state

    return solve


def stored(answers: Sequence[str], folder: Path) -> Path:
    """A log with these answers, `s0`, `s1`, ..., and no scores."""
    named = {f"s{index}": answer for index, answer in enumerate(answers)}
    samples = [Sample(id=name, input=f"Question {name}?") for name in named]
    task = Task(dataset=MemoryDataset(samples), solver=says(named))
    (log,) = inspect_eval(task, model="mockllm/subject", log_dir=str(folder), score=False, display="none")
    assert log.status == "success"
    return Path(log.location.removeprefix("file://"))


Script = Callable[[str], ModelOutput]


class Scripted:
    """A judge in this process that replies as `script` says to a prompt. `asked` are the prompts."""

    def __init__(self, script: Script, name: str = "mockllm/judge") -> None:
        self.asked: list[str] = []
        self.configs: list[GenerateConfig] = []

        def reply(messages: list[ChatMessage], tools: Any, choice: Any, config: GenerateConfig) -> ModelOutput:
            self.asked.append(messages[-1].text)
            self.configs.append(config)
            return script(messages[-1].text)

        self.name = name
        self.model: Model = get_model(name, custom_outputs=reply, memoize=False)


@dataclass
class Server:
    """What a judge behind HTTP does: `behave(n)` is the status of the n-th request (from 0), 0 for no reply at all."""

    behave: Callable[[int], int] = lambda n: 200
    text: str = "70"
    quota: bool = False
    requests: list[dict[str, Any]] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""

    def body(self, status: int) -> dict[str, Any]:
        """The reply in OpenAI's form."""
        if status != 200:
            code = "insufficient_quota" if self.quota else "trouble"
            return {"error": {"message": f"You have trouble ({code}).", "type": code, "code": code}}
        first = {"token": self.text, "logprob": -0.1, "bytes": None}
        top = [{"token": self.text, "logprob": math.log(0.6), "bytes": None}]
        top.append({"token": "10", "logprob": math.log(0.2), "bytes": None})
        message = {"role": "assistant", "content": self.text}
        logprobs = {"content": [{**first, "top_logprobs": top}]}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": logprobs}
        usage = {"prompt_tokens": 20, "completion_tokens": 1, "total_tokens": 21}
        about = {"id": "x", "object": "chat.completion", "created": 1, "model": "judge-2024-08-06"}
        return {**about, "choices": [choice], "usage": usage}

    def model(self) -> Model:
        """It through inspect's OpenAI-compatible provider, the client's own retries off."""
        return get_model("openai-api/local/judge", base_url=self.url, api_key="none", memoize=False, max_retries=0)


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    """The server on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                number = len(server.requests)
                server.requests.append(request)
            status = server.behave(number)
            if status == 0:
                server.released.wait(20)
                return
            body = json.dumps(server.body(status)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            """Quiet."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    try:
        yield server
    finally:
        server.released.set()
        http.shutdown()
        http.server_close()
        thread.join(5)
