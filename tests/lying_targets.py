"""Tiny targets for tests, named on the command line as `lying_targets:Name`.

Each misbehaves in one way. They answer with the whole output as content unless they say otherwise.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import conformance.checks
from conformance.checks.base import CheckOutcome
from conformance.errors import WorkerDiedError
from conformance.results import Evidence
from conformance.targets.protocol import ParseRequest, ParseResult, TargetInfo


class Honest:
    """Content is the output, unless `LIES` names the output."""

    spec = ""
    version = "1.0"

    def describe(self) -> TargetInfo:
        version = os.environ.get("FAKE_VERSION", self.version)
        return TargetInfo(name="fake", version=version, capabilities=("parse",))

    def parse(self, request: ParseRequest) -> ParseResult:
        log = os.environ.get("FAKE_LOG")
        if log:
            with Path(log).open("a") as file:
                file.write(f"{os.getpid()} {request.output}\n")
        if request.output in os.environ.get("LIES", "").split(","):
            return ParseResult(content="a lie")
        return ParseResult(content=request.output)

    def close(self) -> None:
        pass


class Lying(Honest):
    """Always the same wrong content."""

    def parse(self, request: ParseRequest) -> ParseResult:
        return ParseResult(content="a lie")


class Slow(Honest):
    """Takes `FAKE_SECONDS` for each case."""

    def parse(self, request: ParseRequest) -> ParseResult:
        time.sleep(float(os.environ.get("FAKE_SECONDS", "0.3")))
        return super().parse(request)


class Hanging(Honest):
    """Never answers, and swallows every exception on the way."""

    def parse(self, request: ParseRequest) -> ParseResult:
        while True:
            try:
                time.sleep(60)
            except Exception:  # noqa: BLE001 - that is the lie
                continue


class Exiting(Honest):
    """Ends the process politely."""

    def parse(self, request: ParseRequest) -> ParseResult:
        raise SystemExit(0)


class Crashing(Honest):
    """Ends the process on the output `crash`, as a native crash does."""

    def parse(self, request: ParseRequest) -> ParseResult:
        if request.output == "crash":
            os.kill(os.getpid(), 9)
        return super().parse(request)


class Gone(Honest):
    """Its worker process has died."""

    def parse(self, request: ParseRequest) -> ParseResult:
        raise WorkerDiedError(
            "the worker was killed by signal 11", stderr_tail="Segmentation fault: last words"
        )


class Unstartable(Honest):
    """Cannot say who it is; `FAKE_LOG` counts the attempts."""

    def describe(self) -> TargetInfo:
        log = os.environ.get("FAKE_LOG")
        if log:
            with Path(log).open("a") as file:
                file.write("start\n")
        raise WorkerDiedError("the engine did not start", stderr_tail="ImportError: no engine")


class Terminal(Honest):
    """Content that would drive a terminal."""

    def parse(self, request: ParseRequest) -> ParseResult:
        return ParseResult(content="\x1b[2Jgone\u202e")


def unsure() -> Honest:
    """Makes every check inconclusive: no suite kind has a statistical check yet."""

    def judge(case: object, suite: object, target: object, **options: object) -> CheckOutcome:
        return CheckOutcome("inconclusive", evidence=Evidence(input="?"), reason="too few items")

    conformance.checks.judge = judge
    return Honest()
