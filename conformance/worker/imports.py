"""An adapter without an engine: tells whether modules can be imported where an engine would run.

Standard library only.
"""

from __future__ import annotations

import importlib
import os
import sys

from conformance.worker.adapter import Json

VARIABLE = "CONFORMANCE_IMPORTS"
"""Names them, with blanks between."""
BEGINNING = "importing "
"""On standard error before the name of each, in case the process does not survive it."""


def create() -> Imports:
    """Make the adapter."""
    return Imports()


class Imports:
    """Implements `describe` of `conformance.worker.adapter.Adapter`, and no more."""

    def describe(self) -> Json:
        """`TargetInfo`, whose environment says of each module what its import raised; empty if nothing."""
        names = os.environ[VARIABLE].split()
        found = {name: _raised(name) for name in names}
        return {"name": "imports", "version": "1", "capabilities": [], "environment": found}


def _raised(name: str) -> str:
    sys.stderr.write(f"{BEGINNING}{name}\n")
    sys.stderr.flush()
    try:
        importlib.import_module(name)
    except BaseException as error:  # noqa: BLE001 - engines raise anything, even SystemExit
        return f"{type(error).__name__}: {error}"
    return ""
