"""`python -m conformance.worker --adapter NAME`: runs one engine and answers requests about it.

One JSON object a line: `{"id": 1, "method": "parse", "params": {...}}` is answered by
`{"id": 1, "result": {...}}` or `{"id": 1, "error": {"type": ..., "message": ..., "traceback": ...}}`.
Before the first request the worker answers request 0, "start", by itself. `shutdown`, or the end of
the input, ends it.

Engines print. So the protocol runs on a copy of descriptor 1, and descriptor 1 itself leads to stderr
before anything else is imported; descriptor 0 is empty for the same reason.
"""

from __future__ import annotations

import os

from conformance.worker import guardian

_METHODS = (
    "describe", "parse", "parse_stream", "certify", "render", "preprocess", "forward", "generate",
    "loglikelihood", "stages",
)  # fmt: skip
_TRACEBACK_LIMIT = 16_000


def main() -> int:
    """Guard, redirect, load the adapter, answer. Returns the exit code."""
    code = guardian.split()
    if code is not None:
        return code
    answers = os.dup(1)
    requests = os.dup(0)
    os.dup2(2, 1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return _serve(requests, answers)


def _serve(requests: int, answers: int) -> int:
    import argparse
    import json

    options = argparse.ArgumentParser(prog="python -m conformance.worker")
    options.add_argument("--adapter", required=True, help="name, or a module's full dotted name")
    name = options.parse_args().adapter

    # Whatever an engine raises, be it SystemExit or KeyboardInterrupt, costs one request only.
    try:
        adapter = _load(name)
    except BaseException as error:  # noqa: BLE001
        _send(answers, _line(0, error=_description(error)))
        return 1
    _send(answers, _line(0, result={}))
    with os.fdopen(requests, "rb") as lines:
        for line in lines:
            request = json.loads(line)
            number, method = request["id"], request["method"]
            if method == "shutdown":
                break
            try:
                if method not in _METHODS:
                    raise ValueError(f"no such method: {method!r}")
                result = getattr(adapter, method)(**request["params"])
                answer = _line(number, result=_with_parts(result) if method == "describe" else result)
            except BaseException as error:  # noqa: BLE001
                answer = _line(number, error=_description(error))
            _send(answers, answer)
    return 0


def _load(name: str) -> object:
    import importlib

    # A name without a dot is one of ours; tests bring adapters from elsewhere.
    module = name if "." in name else f"{__package__}.adapters.{name.replace('-', '_')}"
    return importlib.import_module(module).create()


def _with_parts(info: object) -> object:
    """What the adapter says of its engine, with the parts of its environment: all its imports see them."""
    parts = os.environ.get("CONFORMANCE_PARTS")
    if not parts or not isinstance(info, dict):
        return info
    return {**info, "environment": {**info.get("environment", {}), "parts": parts}}


def _line(number: object, **answer: object) -> bytes:
    import json

    return json.dumps({"id": number, **answer}).encode() + b"\n"


def _send(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _description(error: BaseException) -> dict[str, str]:
    import traceback

    try:
        message = str(error)
    except Exception:  # noqa: BLE001 - an engine's exception may not even have a text
        message = ""
    text = "".join(traceback.format_exception(error))
    return {"type": type(error).__name__, "message": message, "traceback": text[-_TRACEBACK_LIMIT:]}


if __name__ == "__main__":
    raise SystemExit(main())
