"""Which files are suites. Standard library only: pytest asks this in every project."""

from __future__ import annotations

import re
from pathlib import Path

from conformance import resources
from conformance.errors import ConformanceError

EXPECTATIONS_FOLDER = "expectations"
_HEAD_KEY = re.compile(r"^(id|kind|cases):", re.MULTILINE)
_HEAD_SIZE = 65_536


def looks_like_suite(path: Path) -> bool:
    """Whether a YAML file that was met while collecting a folder is a suite.

    Every file under the bundled suites is. Elsewhere two of the head keys `id`, `kind` and `cases`
    make one, so that a suite with one of them missing is still reported as broken.
    """
    if path.suffix != ".yaml":
        return False
    try:
        root = resources.suites_dir()
    except ConformanceError:
        return False
    if path.is_relative_to(root):
        return path.relative_to(root).parts[0] != EXPECTATIONS_FOLDER
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            head = file.read(_HEAD_SIZE)
    except OSError:
        return False
    return len(set(_HEAD_KEY.findall(head))) >= 2


def may_hold_suites(path: Path) -> bool:
    """Whether a command-line argument of pytest is, or holds, a folder named `suites`."""
    return "suites" in path.parts or (path / "suites").is_dir()
