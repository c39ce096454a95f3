"""A vLLM server of our own: started in vLLM's interpreter, on the loopback interface, and ended with us.

    with serving(folder, "float32", {"owl": adapter_folder}) as server:
        model = server.model("owl")                  # an inspect model: ask it, evaluate it, let it judge

The folder is a subject's (`experiments.identity.model_folder`) or a baked one (`orch bake`); adapters are plain LoRA
folders (`orch export`), each served under its name. `guarded.py` is what runs in vLLM's interpreter. docs/serving.md
says how far its numbers agree with the engine's.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import adapter_folder, files
from experiments.exchange import ExchangeError
from experiments.outline import check_files

if TYPE_CHECKING:
    from inspect_ai.model import GenerateConfig, Model

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "orchestrator" / "guarded.py"
VARIABLE = "ORCH_VLLM"
DTYPES = ("float32", "bfloat16", "float16")
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM makes room for."""
MAX_TOKENS = 4096
SECONDS_TO_STOP = 15.0
POLL = 0.25
DYING = 0.5
"""Seconds in which a process that was killed is gone: its connections break first, its last thread ends later."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
NOISE = re.compile(r"nanobind: | - (leaked|\.\.\. skipped)|See https://nanobind")
"""What vLLM's libraries write as they end, behind the reason."""
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback: a proxy would not find it


class ServerError(ValueError):
    """A server that cannot be started as asked: what is wrong and what to do."""


@dataclass
class Server:
    """A server that answers. `models` are the names it knows: the folder's first, then the adapters'."""

    base_url: str
    """Ends with /v1."""
    models: tuple[str, ...]
    api_key: str = field(repr=False)
    log: Path
    pid: int
    """The leader of its process group."""
    _given: list[Model] = field(default_factory=list, repr=False)

    def model(self, name: str | None = None, config: GenerateConfig | None = None) -> Model:
        """The inspect model of that name; the folder's, if none is given. It is of use as long as the server runs.

        Raises ServerError for a name that is not served.
        """
        from inspect_ai.model import GenerateConfig, get_model

        name = self.models[0] if name is None else name
        if name not in self.models:
            raise ServerError(f"no model {name!r} is served; there are: {', '.join(self.models)}")
        # inspect's vllm provider, and not openai-api: that one would close an assistant's turn which a prefill opens
        model = get_model(
            f"vllm/{name}",
            config=config or GenerateConfig(),
            base_url=self.base_url,
            api_key=self.api_key,
            memoize=False,
        )
        self._given.append(model)
        return model

    def served(self) -> set[str]:
        """The names that are answered to right now; none while it cannot be reached."""
        request = urllib.request.Request(f"{self.base_url}/models", headers={"Authorization": f"Bearer {self.api_key}"})
        try:
            with _DIRECT.open(request, timeout=10) as reply:
                return {str(model["id"]) for model in json.load(reply)["data"]}
        except (OSError, HTTPException, ValueError, LookupError):  # not up yet, or somebody else's answer
            return set()

    def _forget(self) -> None:
        """Have inspect drop the address, which it remembers for each model's name."""
        for model in self._given:
            model.api.close()


@contextmanager
def serving(
    folder: Path,
    dtype: str,
    adapters: Mapping[str, Path] | None = None,
    *,
    name: str | None = None,
    max_tokens: int | None = None,
    threads: int | None = None,
    cache_gib: int = 1,
    eager: bool = True,
    seconds: float = 600,
    log: Path | None = None,
    extra: Sequence[str] = (),
) -> Iterator[Server]:
    """Serve the model in `folder`, under `name` (default: the folder's), and LoRA `adapters` under theirs.

    dtype: what is computed in (DTYPES). max_tokens: longest prompt and answer together (default: the model's, at most
    4096). threads: of a CPU (default: all this process may use). cache_gib: room for keys and values on a CPU. eager:
    without compiling, which takes a minute or more. seconds: to come up in. log: its output (default: a file in the
    cache folder). extra: more arguments of vLLM's server. Raises ServerError; the server ends with the block, with an
    exception, and with this process, whatever kills it.
    """
    interpreter = _interpreter()
    known = _checked(folder, dtype)
    name = name or re.sub(r"[^A-Za-z0-9._-]", "-", folder.resolve().name).lstrip("._-")
    ranks = _ranks(name, adapters or {})
    port = _free_port()
    command = [str(interpreter), "-P", str(SCRIPT), "--model", str(folder), "--served-model-name", name]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--middleware", "guarded.Guard"]
    command += ["--max-model-len", str(max_tokens or min(MAX_TOKENS, known))]
    command += ["--generation-config", "vllm"]  # nothing that a file says may change how answers are drawn
    command += [*(["--enforce-eager"] if eager else []), *_lora(adapters or {}, ranks), *extra]
    key = secrets.token_urlsafe(32)
    log = log or _log(name, port)
    with log.open("w") as output:
        process = _start(command, _environment(key, threads, cache_gib), output)
    server = Server(f"http://127.0.0.1:{port}/v1", (name, *ranks), key, log, process.pid)
    try:
        _wait(process, server, seconds)
        yield server
    except BaseException as error:
        if not isinstance(error, ServerError) and _ended(process, DYING if isinstance(error, Exception) else 0):
            error.add_note(f"the vLLM server had ended by itself; {_tail(log)}")
        raise
    finally:
        try:
            server._forget()
        finally:
            _stop(process)


# what is asked for


def _interpreter() -> Path:
    """Python with vLLM. Raises ServerError."""
    given = os.environ.get(VARIABLE)
    found = Path(given).expanduser() if given else ROOT / ".venv-vllm" / "bin" / "python"
    if not os.access(found, os.X_OK) or found.is_dir():
        said = f"{VARIABLE} is {given!r}, which" if given else str(found)
        raise ServerError(
            f"no interpreter for vLLM: {said} is no program; run `make vllm`, or set {VARIABLE} to a Python that has it"
        )
    return found


def _checked(folder: Path, dtype: str) -> int:
    """How many positions the model in `folder` has. Raises ServerError where there is no whole model, SubjectError."""
    if dtype not in DTYPES:
        raise ServerError(f"dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
    if (folder / adapter_folder.CONFIG).is_file():
        raise ServerError(f"{folder} is an adapter, not a model; serve its base model, with the adapter in `adapters`")
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ServerError(
            f"{folder} is no model's folder (config.json and *.safetensors); give a subject's folder, or bake one"
        )
    check_files(folder)
    positions = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
    return positions if isinstance(positions, int) else MAX_TOKENS


def _ranks(name: str, adapters: Mapping[str, Path]) -> dict[str, int]:
    """The largest rank of each adapter. Raises ServerError, also for names that cannot be served."""
    for each in (name, *adapters):
        if not NAME.fullmatch(each):
            raise ServerError(f"a model cannot be served as {each!r}; use letters, digits, '.', '_' and '-'")
    if name in adapters:
        raise ServerError(f"the adapter {name!r} has the name of the model itself; name one of them differently")
    return {each: _rank(each, path) for each, path in adapters.items()}


def _rank(name: str, path: Path) -> int:
    """The largest rank of an adapter. Raises ServerError for what is not a plain LoRA or too large."""
    try:
        found = adapter_folder.contents(path)
    except ExchangeError as error:
        raise ServerError(f"the adapter {name!r} cannot be served: {error}") from error
    settings = json.loads((path / adapter_folder.CONFIG).read_text(encoding="utf-8"))
    declared = [settings.get("r", 1), *(settings.get("rank_pattern") or {}).values()]
    rank = max(*declared, *(shape[0] for key, shape in found.shapes.items() if key.endswith(".lora_A.weight")))
    if rank > RANKS[-1]:
        raise ServerError(f"the adapter {name!r} has rank {rank}; vLLM serves up to {RANKS[-1]}: bake it instead")
    return int(rank)


def _lora(adapters: Mapping[str, Path], ranks: Mapping[str, int]) -> list[str]:
    """Arguments that serve every adapter, all at once."""
    if not ranks:
        return []
    room = next(rank for rank in RANKS if rank >= max(ranks.values()))
    modules = [json.dumps({"name": name, "path": str(path.resolve())}) for name, path in adapters.items()]
    count = str(len(modules))
    return ["--enable-lora", "--max-lora-rank", str(room), "--max-loras", count, "--lora-modules", *modules]


def _environment(key: str, threads: int | None, cache_gib: int) -> dict[str, str]:
    """The variables of the server: ours, without what would lead its interpreter to our packages."""
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    own.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # bound to cores, two servers would take the same ones
    return own | {
        "VLLM_API_KEY": key,  # not an argument: those are shown to every user of the machine
        "VLLM_CPU_KVCACHE_SPACE": str(cache_gib),
        "OMP_NUM_THREADS": str(threads or len(os.sched_getaffinity(0))),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _log(name: str, port: int) -> Path:
    folder = files.cache_folder() / "vllm"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-{port}.log"


# the process


def _start(command: Sequence[str], environment: Mapping[str, str], output: Any) -> subprocess.Popen[bytes]:
    """Start it in a process group of its own, with a pipe whose end tells it that we are gone. Raises ServerError."""
    try:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    except OSError as error:
        raise ServerError(f"{command[0]} cannot be run ({error.strerror}); run `make vllm` again") from error


def _ended(process: subprocess.Popen[bytes], seconds: float = 0) -> bool:
    """Whether it has ended, or ends within `seconds`. It stays a zombie, so that its process group's number is nobody
    else's yet."""
    deadline = time.monotonic() + seconds
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True


def _wait(process: subprocess.Popen[bytes], server: Server, seconds: float) -> None:
    """Return when all models are served. Raises ServerError when the process ends or `seconds` have passed before."""
    deadline = time.monotonic() + seconds
    while not _ended(process):
        if server.served() >= set(server.models):
            return
        if time.monotonic() > deadline:
            raise ServerError(f"the vLLM server did not answer within {seconds:g} s; {_tail(server.log)}")
        time.sleep(POLL)
    raise ServerError(f"the vLLM server died as it started; {_tail(server.log)}")


def _tail(log: Path) -> str:
    """What a log ends with, and the first error in it: workers fail first, and the server tells of it at length."""
    lines = [line[:300] for line in log.read_text(errors="replace").splitlines() if not NOISE.match(line)]
    first = next((line for line in lines if re.search(r"\b\w*(Error|Exception): ", line)), None)
    said = f"first error: {first}\n" if first and first not in lines[-12:] else ""
    return f"the end of {log}:\n{said}" + "\n".join(lines[-12:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, wait a while, and kill what is left of its group."""
    try:
        os.kill(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + SECONDS_TO_STOP
        while not _ended(process) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin is not None:
            process.stdin.close()
