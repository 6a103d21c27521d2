"""Stands in for vLLM's OpenAI server: the same command line, other weather. `FAKE_MODE` says which.

It speaks the script of the scripted checkpoint, as `tests.server_answers` gives it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import shared_memory
from pathlib import Path

from tests.server_answers import Exchange, answer

VERSION = "0.0.7"


def main() -> None:
    mode = os.environ.get("FAKE_MODE", "good")
    options = argparse.ArgumentParser()
    options.add_argument("--model", required=True)
    options.add_argument("--served-model-name", nargs="+", required=True)
    options.add_argument("--host", required=True)
    options.add_argument("--port", type=int, required=True)
    known, others = options.parse_known_args()
    with Path(os.environ["FAKE_STARTS"]).open("a", encoding="utf-8") as starts:
        fact = {
            "pid": os.getpid(),
            "options": vars(known) | {"others": others},
            "variables": dict(os.environ),
        }
        starts.write(json.dumps(fact | {"cwd": str(Path.cwd()), "input": sys.stdin.read()}) + "\n")
    print("loading", known.model, flush=True)
    if mode == "crash":
        print("x" * 20_000)
        sys.stdout.flush()
        raise SystemExit("RuntimeError: the weights do not fit")
    if mode == "leaves":
        _leave_things()
    if mode == "slow":
        time.sleep(1.5)
    server = ThreadingHTTPServer((known.host, known.port), _handler(mode, known.served_model_name))
    print("listening", flush=True)
    server.serve_forever()


def _leave_things() -> None:
    """A process of its own session, and shared memory that is never given back."""
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    segment = shared_memory.SharedMemory(create=True, size=4096)
    Path(os.environ["FAKE_SEGMENT"]).write_text(segment.name, encoding="utf-8")
    _leave_things.kept = segment  # type: ignore[attr-defined]


def _handler(mode: str, names: list[str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/version" and mode != "no-version":
                self._send(200, {"version": VERSION})
            elif self.path == "/v1/models" and mode != "never":
                self._send(200, {"data": [{"id": name, "max_model_len": 4096} for name in names]})
            else:
                self._send(404, {"error": {"message": "not here"}})

        def do_POST(self) -> None:
            text = self.rfile.read(int(self.headers["Content-Length"])).decode()
            print("asked", flush=True)
            if "dies #" in text:
                os._exit(3)
            if "hangs #" in text:
                time.sleep(600)
            if "breaks #" in text:
                self.connection.close()
                return
            exchange = Exchange(json.loads(text), "")
            answer(exchange, 1)
            if exchange.streaming and exchange.status == 200:
                events = [*(json.dumps(chunk) for chunk in exchange.chunks), "[DONE]"]
                self._reply(200, "".join(f"data: {event}\n\n" for event in events), "text/event-stream")
            else:
                self._send(exchange.status, exchange.whole)

        def _send(self, status: int, value: object) -> None:
            self._reply(status, json.dumps(value), "application/json")

        def _reply(self, status: int, text: str, content_type: str) -> None:
            content = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler


if __name__ == "__main__":
    main()
