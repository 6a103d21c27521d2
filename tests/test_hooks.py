"""What is imported into every process of an engine: torchvision's import is mended where it has to be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conformance.targets import environments

TORCH = """
import json, types
calls = []
def _load(path):
    calls.append("load " + path.name)
    if not {loads}:
        raise OSError("libcudart.so: cannot open shared object file")
class Library:
    def __init__(self, name, kind):
        calls.append(f"{{name}} {{kind}}")
    def define(self, schema):
        calls.append(schema.partition("(")[0])
library = types.SimpleNamespace(Library=Library)
ops = types.SimpleNamespace(load_library=_load)
"""
VISION = """
import torch
torch.calls.append("imported")
"""


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(VISION)
    (tmp_path / "torchvision" / "_C.so").write_text("")
    (tmp_path / "torchvision" / "image.so").write_text("")
    return tmp_path


def calls(packages: Path, code: str, *, loads: bool = True) -> list[str]:
    (packages / "torch.py").write_text(TORCH.format(loads=loads))
    paths = os.pathsep.join([str(environments._HOOKS), str(packages)])
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"{code}\nimport torch, json; print(json.dumps(torch.calls))"],
        env={"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    return list(json.loads(done.stdout))


def test_operators_are_declared_before_the_import(packages: Path) -> None:
    expected = ["load _C.so", "torchvision FRAGMENT", "nms", "qnms", "imported"]
    assert calls(packages, "import torchvision\nimport torchvision", loads=False) == expected


def test_an_extension_that_loads_is_left_alone(packages: Path) -> None:
    assert calls(packages, "import torchvision") == ["load _C.so", "imported"]


def test_nothing_happens_before_torchvision_is_imported(packages: Path) -> None:
    assert calls(packages, "import importlib.util; importlib.util.find_spec('json')") == []


def test_where_there_is_no_torchvision_nothing_is_done(packages: Path) -> None:
    (packages / "torchvision" / "__init__.py").unlink()
    (packages / "torchvision").rename(packages / "gone")
    assert (
        calls(packages, "import contextlib\nwith contextlib.suppress(ImportError):\n    import torchvision")
        == []
    )
