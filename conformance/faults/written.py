"""Whether the place of a fault was written down before the fault was first measured: git knows."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from conformance import resources
from conformance.faults.places import Place, places

_FILE = "conformance/faults/places.yaml"


def at(commit: str, root: Path | None = None) -> Mapping[str, Mapping[str, Any]] | None:
    """The places of faults as a commit has them, by fault.

    Args:
        commit: It, or `HEAD`.
        root: Of the source tree; None: this one.

    Returns:
        None where nothing can be told: this is no git checkout, git is not here, or the clone has no such
        commit. No fault where the commit has no such file.
    """
    root = resources.checkout_root() if root is None else root
    git = shutil.which("git")
    if root is None or git is None or not (root / ".git").exists():
        return None
    if _asked(git, root, "cat-file", "-e", f"{commit}^{{commit}}") is None:
        return None
    text = _asked(git, root, "show", f"{commit}:{_FILE}")
    found = yaml.safe_load(text) if text else {}
    return {name: entry for entry in found.get("places", ()) for name in entry["faults"]}


def unwritten(faults: Mapping[str, Place] | None = None, *, root: Path | None = None) -> list[str]:
    """Faults whose place is not the one that HEAD has; none where HEAD cannot be asked.

    Args:
        faults: With their places; None: all.
        root: Of the source tree; None: this one.
    """
    committed = at("HEAD", root)
    if committed is None:
        return []
    chosen = places().by_fault if faults is None else faults
    return [name for name, place in chosen.items() if not agrees(place, committed.get(name))]


def agrees(place: Place, written: Mapping[str, Any] | None) -> bool:
    """Whether a place is the one that was written down."""
    if written is None:
        return False
    mine = place.model_dump(by_alias=True, exclude={"faults"})
    return mine == {name: value for name, value in written.items() if name != "faults"}


def _asked(git: str, root: Path, *arguments: str) -> str | None:
    """What git says; None if it says no."""
    done = subprocess.run(  # noqa: S603 - a fixed command in our own tree
        [git, "-C", str(root), *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=30,
        check=False,
    )
    return done.stdout if done.returncode == 0 else None
