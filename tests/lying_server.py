"""A small OpenAI-compatible server in this process: honest, or with lies of `tests.server_lies`."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

from tests.server_answers import MODEL, Exchange, answer
from tests.server_lies import LIES, TRANSPORT_LIES


class LyingServer:
    """Serves on a free loopback port while it is entered.

    Args:
        lies: Names of `LIES` or `TRANSPORT_LIES`.
        elsewhere: Where the lie `redirect` points to.
        key: Without it in the header, a request is answered with 401; empty asks for none.
    """

    def __init__(self, *lies: str, elsewhere: str = "", key: str = "") -> None:
        unknown = [name for name in lies if name not in LIES and name not in TRANSPORT_LIES]
        assert not unknown, unknown
        self.lies = lies
        self.elsewhere = elsewhere
        self.key = key
        self.seen: list[tuple[str, dict[str, str], str]] = []
        """Path, headers and body of every request."""
        self.statuses: list[int] = []
        """Of the honest answers."""
        self.active: list[Exchange] = []
        self.lock = threading.Condition()
        self.asked: set[str] = set()
        """What was asked, each wording once."""
        self.stopping = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def lies_about(self, exchange: Exchange) -> None:
        """Change an honest exchange."""
        for name in self.lies:
            if name in LIES and (exchange.status == 200 or "bad" in name or "error" in name):
                LIES[name](exchange)

    def meet(self, exchange: Exchange) -> None:
        """Hold a request until every wording that was ever asked is being asked at the same time.

        The first of its wording is not held: who asks alone asks it for the first time. The last of those
        that are asked together may find the others gone, and goes on alone after a second.
        """
        mine = _wording(exchange)
        with self.lock:
            if mine not in self.asked:
                self.asked.add(mine)
                return
            self.lock.wait_for(lambda: self.asked <= {_wording(other) for other in self.active}, timeout=1)
            exchange.beside = tuple(other for other in self.active if _wording(other) != mine)


def _wording(exchange: Exchange) -> str:
    return json.dumps([exchange.body.get(key) for key in ("messages", "model")])


def _handler(server: LyingServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            server.seen.append((self.path, dict(self.headers), ""))
            if not self._refused():
                self._send(200, json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]}))

        def do_POST(self) -> None:
            text = self.rfile.read(int(self.headers["Content-Length"])).decode()
            server.seen.append((self.path, dict(self.headers), text))
            if self._refused():
                return
            if "redirect" in server.lies:
                self.send_response(307)
                self.send_header("Location", server.elsewhere)
                self.end_headers()
                return
            exchange = Exchange(json.loads(text), self.headers.get("Authorization", ""))
            with server.lock:
                number = len(server.seen)
                exchange.earlier = tuple(server.statuses)
                answer(exchange, number)
                server.statuses.append(exchange.status)
                server.active.append(exchange)
                server.lock.notify_all()
            try:
                if exchange.status == 200 and any(name.startswith("requests-") for name in server.lies):
                    server.meet(exchange)
                server.lies_about(exchange)
                self._reply(exchange)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client has had enough
            finally:
                with server.lock:
                    server.active.remove(exchange)

        def _refused(self) -> bool:
            if not server.key or self.headers.get("Authorization") == f"Bearer {server.key}":
                return False
            self._send(401, json.dumps({"error": {"message": "wrong key"}}))
            return True

        def _reply(self, exchange: Exchange) -> None:
            if exchange.raw is not None:
                self._send(200, exchange.raw, exchange.content_type or "application/json")
            elif exchange.streaming and exchange.status == 200:
                self._stream(exchange)
            else:
                self._send(exchange.status, json.dumps(exchange.whole))

        def _send(self, status: int, text: str, content_type: str = "application/json") -> None:
            content = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            if "compressed" in server.lies:
                self.send_header("Content-Encoding", "gzip")
            length = len(content) + (100 if "cut-off" in server.lies else 0)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(content)

        def _stream(self, exchange: Exchange) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            self.end_headers()
            for number, event in enumerate(exchange.chunks):
                self._event(json.dumps(event))
                if number == 1:
                    self._spoil(json.dumps(event))
            if exchange.done:
                self._event("[DONE]")
            if exchange.trailer is not None:
                self._event(exchange.trailer)

        def _spoil(self, event: str) -> None:
            while "endless-stream" in server.lies and not server.stopping.is_set():
                self._event(event)
                time.sleep(0.01)
            while "flood" in server.lies and not server.stopping.is_set():
                self._event(event + " " * 100_000)
            if "stalled-stream" in server.lies:
                server.stopping.wait(30)
            while "drip" in server.lies and not server.stopping.is_set():
                self.wfile.write(b":")
                self.wfile.flush()
                time.sleep(0.05)

        def _event(self, data: str) -> None:
            self.wfile.write(f"data: {data}\n\n".encode())
            self.wfile.flush()

    return Handler
