"""`python -m conformance.worker.guarded MODULE [ARGUMENT…]`: runs a module as a program, under the guardian.

It is for programs of an engine that speak for themselves, such as its HTTP server. The module gets a fresh
interpreter with the same options, and no standard input. What it prints goes where this process prints.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from conformance.worker import guardian


def main() -> int:
    """Guard, and become the program; the guardian returns its exit code."""
    code = guardian.split()
    if code is None:
        _become(sys.argv[1:])
    return code


def _become(program: list[str]) -> NoReturn:
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.execv(sys.executable, [sys.executable, "-P", "-X", "faulthandler", "-m", *program])  # noqa: S606


if __name__ == "__main__":
    raise SystemExit(main())
