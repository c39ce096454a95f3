"""A stand-in for vllm.entrypoints.openai.api_server: it takes the same arguments, and behaves as FAKE_VLLM says.

`work` (default) answers, `die` writes an error of a worker and a long traceback, `mute` never answers, `stubborn`
answers, starts a child of its own, and ignores being asked to end; the child's number is in the file FAKE_VLLM_CHILD.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MODE = os.environ.get("FAKE_VLLM", "work")


class Handler(BaseHTTPRequestHandler):
    """Lists the models, and answers every chat with the name of its model and the number of this port."""

    models: tuple[str, ...] = ()

    def do_GET(self) -> None:
        """`/v1/models`."""
        self.answer({"data": [{"id": name} for name in self.models]})

    def do_POST(self) -> None:
        """`/v1/chat/completions`."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        message = {"role": "assistant", "content": f"{asked['model']} at {self.server.server_port}"}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        self.answer({"id": "1", "object": "chat.completion", "created": 0, "model": asked["model"], "choices": choices})

    def answer(self, document: Any) -> None:
        """Send the document to whoever has the key."""
        allowed = self.headers.get("Authorization") == f"Bearer {os.environ['VLLM_API_KEY']}"
        self.send_response(200 if allowed else 401)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(document if allowed else {}).encode())


def main() -> None:
    """Serve, or do not."""
    parser = argparse.ArgumentParser()
    for flag in ("--model", "--served-model-name", "--host", "--dtype", "--middleware", "--max-model-len"):
        parser.add_argument(flag)
    for flag in ("--generation-config", "--max-lora-rank", "--max-loras"):
        parser.add_argument(flag)
    parser.add_argument("--port", type=int)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--lora-modules", nargs="*", default=[])
    args: Any = parser.parse_args()
    print("arguments:", json.dumps(vars(args)), flush=True)
    if MODE == "die":
        print("(Worker) RuntimeError: the worker ran out of luck")
        print("\n".join(f"(APIServer)   frame {i}" for i in range(30)))
        sys.exit("RuntimeError: Engine core initialization failed. See root cause above.\nnanobind: leaked 1 types!")
    if MODE == "mute":
        time.sleep(60)
    if MODE == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdin=subprocess.DEVNULL)
        Path(os.environ["FAKE_VLLM_CHILD"]).write_text(str(child.pid))
    Handler.models = (args.served_model_name, *(json.loads(each)["name"] for each in args.lora_modules))
    ThreadingHTTPServer((args.host, args.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
