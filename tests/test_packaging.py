"""The wheel: complete without the checkout, and no more than it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT

Python = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index"]
    command = [*pip, "--target", str(folder), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def python(installed: Path, tmp_path: Path) -> Python:
    """Python in an empty folder that sees the installed wheel and its dependencies, not the checkout.

    `-S` leaves out the `.pth` files, and with them an editable install of the checkout.
    """
    path = os.pathsep.join([str(installed), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "CONFORMANCE_"))}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-S", *arguments],
            cwd=tmp_path,
            env=variables | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


def test_only_the_two_packages_are_importable(installed: Path) -> None:
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names - {"bin"} == {"conformance", "model_impl"}


def test_the_wheel_holds_data_licence_and_entry_points(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = next(name for name in names if name.endswith("entry_points.txt"))
        text = archive.read(entry_points).decode()
    assert "conformance = conformance.cli:main" in text
    assert "conformance = conformance.plugin" in text
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "conformance/data/ci/matrix.yaml" in names
    assert "conformance/data/ci/faults.json" in names
    assert "conformance/data/ci/trials.json" in names
    assert "conformance/data/ci/sensitivity.json" in names
    for folder in ("suites/parser", "suites/template", "suites/expectations", "reports/templates"):
        assert any(name.startswith(f"conformance/data/{folder}/") for name in names), folder
    nano = {path for path in (ROOT / "model_impl/nano").rglob("*.*") if "__pycache__" not in path.parts}
    assert {path.relative_to(ROOT).as_posix() for path in nano} <= set(names)
    files = {path for path in (ROOT / "suites").rglob("*.*") if "__pycache__" not in path.parts}
    packed = {name.removeprefix("conformance/data/") for name in names if "/data/suites/" in name}
    assert {path.relative_to(ROOT).as_posix() for path in files} == packed
    assert not [name for name in names if name.startswith("tests/") or "__pycache__" in name]


def test_list_and_run_work_without_the_checkout(python: Python, installed: Path, tmp_path: Path) -> None:
    where = python("-c", "import conformance, model_impl; print(conformance.__file__, model_impl.__file__)")
    assert all(Path(file).is_relative_to(installed) for file in where.stdout.split()), where
    listed = python("-m", "conformance", "list", "--json")
    assert listed.returncode == 0, listed.stderr
    suites = json.loads(listed.stdout)["suites"]
    assert all(Path(suite["path"]).is_relative_to(installed) for suite in suites)
    smallest = min(suites, key=lambda suite: suite["cases"])
    ran = python("-m", "conformance", "run", smallest["id"], "--target", "reference", "--json")
    assert ran.returncode == 0, ran.stderr
    summary = json.loads(ran.stdout)
    assert summary["complete"]
    assert summary["planned"] == smallest["cases"]
    assert (tmp_path / summary["site"]).is_file()
    header = json.loads((tmp_path / summary["run_file"]).read_text().splitlines()[0])
    assert header["commit"] is None


def test_the_worker_side_needs_the_standard_library_only(installed: Path, tmp_path: Path) -> None:
    modules = ("", ".adapter", ".guardian", ".search", ".__main__")
    code = "".join(f"import conformance.worker{name}\n" for name in modules)
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
