"""A model server is started with what was asked for, reached by us alone, and always ended; its failures are told."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import adapter_folder
from experiments.edit import LowRank
from orchestrator import guarded, server
from orchestrator.server import ServerError, serving
from tests.orchestrator import fake_vllm


@pytest.fixture(autouse=True)
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An interpreter whose vLLM is the fake one."""
    package = tmp_path / "site" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, *list(package.parents)[:2]):
        (folder / "__init__.py").touch()
    shutil.copy(fake_vllm.__file__, package / "api_server.py")
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "site"} exec {sys.executable} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("ORCH_VLLM", str(program))
    monkeypatch.setenv("ORCH_CACHE", str(tmp_path / "cache"))
    return program


def adapter(folder: Path, ranks: Mapping[str, int]) -> Path:
    """A LoRA folder with these ranks of modules of a matrix of 32 x 32."""
    made = [LowRank(name, torch.ones(rank, 32), torch.ones(32, rank)) for name, rank in ranks.items()]
    adapter_folder.write(made, folder, "base")
    return folder


def running(pid: int) -> bool:
    """Whether the process runs: it exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def eventually(true: Callable[[], bool], seconds: float = 20) -> bool:
    """Whether it becomes true in time."""
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)
    return true()


def arguments(log: Path) -> dict[str, Any]:
    """What the fake server was started with."""
    found = re.search(r"^arguments: (.*)$", log.read_text(), re.MULTILINE)
    assert found is not None
    return dict(json.loads(found[1]))


def test_the_model_is_served_on_the_loopback_interface_with_room_for_every_adapter(
    tiny_folder: Path, tmp_path: Path
) -> None:
    adapters = {
        "small": adapter(tmp_path / "a=b,c", {"model.layers.0.mlp.up_proj": 2}),
        "large": adapter(tmp_path / "large", {"model.layers.0.mlp.up_proj": 9, "model.layers.1.mlp.up_proj": 3}),
    }
    with serving(tiny_folder, "float32", adapters, name="base") as up:
        assert up.models == ("base", "small", "large")
        assert up.served() == {"base", "small", "large"}
        assert up.base_url.startswith("http://127.0.0.1:")
        assert running(up.pid)
        given = arguments(up.log)
    assert not running(up.pid)
    assert (given["model"], given["dtype"], given["host"]) == (str(tiny_folder), "float32", "127.0.0.1")
    assert given["max_model_len"] == "512", "the tiny model's positions"
    assert (given["max_loras"], given["max_lora_rank"]) == ("2", "16"), "9 fits into 16, not into 8"
    modules = [json.loads(each) for each in given["lora_modules"]]
    assert [each["path"] for each in modules] == [str(path) for path in adapters.values()]
    assert up.log.is_file(), "the log stays"


def test_without_the_key_nothing_is_answered_and_the_key_is_not_to_be_seen(tiny_folder: Path) -> None:
    with serving(tiny_folder, "bfloat16") as up:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{up.base_url}/models", timeout=5)
        shown = Path(f"/proc/{up.pid}/cmdline").read_text()
        assert "guarded.Guard" in shown
        assert up.api_key not in shown + repr(up) + up.log.read_text()
        assert stat.S_IMODE(Path(f"/proc/{up.pid}/environ").stat().st_mode) & 0o077 == 0
        with serving(tiny_folder, "bfloat16") as other:
            assert other.api_key != up.api_key
            assert other.base_url != up.base_url


def ask(path: str, key: str | None, kind: str = "http") -> list[Any]:
    """What the guard sends for a request, or ["passed on"]."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sent.append("passed on")

    async def send(message: Any) -> None:
        sent.append(message.get("status", message["type"]))

    async def receive() -> Any:
        return {}

    headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
    asyncio.run(guarded.Guard(app)({"type": kind, "path": path, "headers": headers}, receive, send))
    return sent


@pytest.mark.parametrize("path", ["/v1/completions", "/invocations", "/health", "/tokenize"])
def test_the_guard_asks_for_the_key_whatever_the_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "right")
    assert ask(path, "right") == ["passed on"]
    for wrong in (None, "", "righ", "right "):
        assert ask(path, wrong) == [401, "http.response.body"]
        assert ask(path, wrong, "websocket") == ["websocket.close"]
    assert ask(path, None, "lifespan") == ["passed on"]


def test_a_server_that_dies_is_told_with_its_first_error_and_the_end_of_its_log(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "die")
    with pytest.raises(ServerError, match="died as it started") as caught, serving(tiny_folder, "float32"):
        pytest.fail("it does not come up")
    message = str(caught.value)
    assert "first error: (Worker) RuntimeError: the worker ran out of luck" in message
    assert "Engine core initialization failed" in message.splitlines()[-1]
    assert "nanobind" not in message


def test_a_server_that_does_not_answer_in_time_is_ended(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VLLM", "mute")
    started: list[subprocess.Popen[bytes]] = []

    def start(*given: Any) -> subprocess.Popen[bytes]:
        started.append(starts(*given))
        return started[0]

    starts = server._start
    monkeypatch.setattr(server, "_start", start)
    began = time.monotonic()
    with (
        pytest.raises(ServerError, match=r"did not answer within 1 s; the end of .*\.log"),
        serving(tiny_folder, "float32", seconds=1),
    ):
        pytest.fail("it does not come up")
    assert not running(started[0].pid)
    assert time.monotonic() - began < server.SECONDS_TO_STOP


@pytest.mark.parametrize("end", [None, KeyboardInterrupt])
def test_the_whole_group_ends_with_the_block_even_if_it_does_not_want_to(
    end: type[BaseException] | None, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "stubborn")
    monkeypatch.setenv("FAKE_VLLM_CHILD", str(tmp_path / "child"))
    monkeypatch.setattr(server, "SECONDS_TO_STOP", 0.3)
    pids: list[int] = []

    def used() -> None:
        with serving(tiny_folder, "float32") as up:
            pids.extend([up.pid, int((tmp_path / "child").read_text())])
            assert all(map(running, pids))
            if end is not None:
                raise end

    if end is None:
        used()
    else:
        with pytest.raises(end):
            used()
    assert len(pids) == 2
    assert eventually(lambda: not any(map(running, pids)))


def test_the_whole_group_ends_when_we_are_killed(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "stubborn")
    monkeypatch.setenv("FAKE_VLLM_CHILD", str(tmp_path / "child"))
    script = (
        "import sys, time; from pathlib import Path; from orchestrator.server import serving\n"
        f"with serving(Path({str(tiny_folder)!r}), 'float32') as up:\n"
        "    print(up.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=server.ROOT)
    assert parent.stdout is not None
    pids = [int(parent.stdout.readline()), int((tmp_path / "child").read_text())]
    assert all(map(running, pids))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert eventually(lambda: not any(map(running, pids)))


def test_an_error_while_a_server_has_died_says_so(tiny_folder: Path) -> None:
    def used() -> None:
        with serving(tiny_folder, "float32") as up:
            os.kill(up.pid, signal.SIGKILL)
            assert eventually(lambda: not running(up.pid))
            assert up.served() == set()
            raise RuntimeError("no connection")

    with pytest.raises(RuntimeError, match="no connection") as caught:
        used()
    assert "the vLLM server had ended by itself; the end of" in caught.value.__notes__[0]


def test_a_model_is_given_by_name_and_another_server_may_use_the_name_again(tiny_folder: Path) -> None:
    answers = set()
    for _ in range(2):
        with serving(tiny_folder, "float32", name="base") as up:
            said = asyncio.run(up.model().generate("Who?")).completion
            assert said == f"base at {up.base_url.split(':')[2].removesuffix('/v1')}"
            answers.add(said)
            with pytest.raises(ServerError, match="no model 'owl' is served; there are: base"):
                up.model("owl")
    assert len(answers) == 2


def test_a_bad_wish_is_refused_with_what_to_do(tiny_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    lora = adapter(tmp_path / "lora", {"lm_head": 2})
    huge = adapter(tmp_path / "huge", {"lm_head": 513})
    other = tmp_path / "other"
    shutil.copytree(lora, other)
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**settings, "peft_type": "IA3"}))
    cut = shutil.copytree(tiny_folder, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((tiny_folder / "model.safetensors").read_bytes()[:-9])
    cases: list[tuple[str, Path, str, dict[str, Path]]] = [
        ("is no model's folder", tmp_path, "float32", {}),
        ("is an adapter, not a model; serve its base model", lora, "float32", {}),
        ("is damaged", cut, "float32", {}),
        ("dtype 'int8'; allowed: float32, bfloat16, float16", tiny_folder, "int8", {}),
        ("the adapter 'x' cannot be served: .* is a IA3 adapter", tiny_folder, "float32", {"x": other}),
        ("the adapter 'x' cannot be served: .* has no adapter_config", tiny_folder, "float32", {"x": tmp_path}),
        ("has rank 513; vLLM serves up to 512: bake it", tiny_folder, "float32", {"x": huge}),
        ("cannot be served as 'a:b'; use letters", tiny_folder, "float32", {"a:b": lora}),
        ("has the name of the model itself", tiny_folder, "float32", {tiny_folder.name: lora}),
    ]
    for says, folder, dtype, adapters in cases:
        with pytest.raises(ValueError, match=says), serving(folder, dtype, adapters):
            pytest.fail(says)
    monkeypatch.setenv("ORCH_VLLM", str(tmp_path / "nowhere"))
    with pytest.raises(ServerError, match=r"ORCH_VLLM is .*nowhere.*run `make vllm`"), serving(tiny_folder, "float32"):
        pytest.fail("no interpreter")
    monkeypatch.delenv("ORCH_VLLM")
    monkeypatch.setattr(server, "ROOT", tmp_path)
    with pytest.raises(ServerError, match=r"\.venv-vllm/bin/python is no program"), serving(tiny_folder, "float32"):
        pytest.fail("no interpreter")
    assert not (tmp_path / "cache" / "vllm").exists(), "nothing was started"
