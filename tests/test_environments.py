"""Environments of engines: made from lock files, interrupted, repeated, replaced. Packages are local."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from conformance.errors import TargetError
from conformance.targets import environments

SPEC = "toy@1.0"
LOCK = """\
# Environment of target toy@1.0
# with-dependencies: toy-base
# size: 1 MB
# time: 5 s

toy-engine==1.0
toy-base==2.0
"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of wheels: the engine asks for something that does not exist, the base for a helper."""
    folder = tmp_path_factory.mktemp("wheels")
    _wheel(folder, "toy_engine", "1.0", requires=("no-such-package",))
    _wheel(folder, "toy_engine", "1.1", requires=("no-such-package",))
    _wheel(folder, "toy_base", "2.0", requires=("toy-helper",))
    _wheel(folder, "toy_helper", "3.0")
    return folder


def _wheel(folder: Path, name: str, version: str, requires: Sequence[str] = ()) -> None:
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {other}\n" for other in requires)
    files = {
        f"{name}.py": f"VERSION = {version!r}\n",
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


class Place:
    """A home for environments with lock files of its own."""

    def __init__(self, root: Path, wheels: Path) -> None:
        self.home = root / "home"
        self.locks = root / "locks"
        self.locks.mkdir()
        self.variables = {
            "CONFORMANCE_HOME": str(self.home),
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(wheels),
            "PIP_CONFIG_FILE": os.devnull,
        }
        self.write()

    def write(self, text: str = LOCK, name: str = "toy-1.0.txt") -> None:
        (self.locks / name).write_text(text, encoding="utf-8")

    def left_behind(self) -> list[str]:
        return sorted(path.name for path in (self.home / "environments").glob("*") if path.suffix != ".lock")

    def start(self, code: str) -> subprocess.Popen[str]:
        """Run code in another process, with `environments` set up as here."""
        head = f"""
            import os, signal
            from pathlib import Path
            from conformance.targets import environments
            environments.LOCKS = Path({str(self.locks)!r})
        """
        return subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(code)],
            env={**os.environ, **self.variables},
            stdout=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def place(tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    made = Place(tmp_path, wheels)
    monkeypatch.setattr(environments, "LOCKS", made.locks)
    for name, value in made.variables.items():
        monkeypatch.setenv(name, value)
    return made


@pytest.fixture(scope="module")
def installed_once(tmp_path_factory: pytest.TempPathFactory, wheels: Path) -> Path:
    """The home of an environment that was installed, to be copied."""
    made = Place(tmp_path_factory.mktemp("installed"), wheels)
    with made.start(f"environments.install({SPEC!r})") as process:
        assert process.wait(60) == 0
    return made.home


@pytest.fixture
def installed(place: Place, installed_once: Path) -> Place:
    shutil.copytree(installed_once, place.home, symlinks=True)
    assert environments.status(SPEC).state == "ready"
    return place


def _versions(spec: str = SPEC) -> dict[str, str]:
    code = (
        "import toy_base, toy_engine, toy_helper as h; print(toy_base.VERSION, toy_engine.VERSION, h.VERSION)"
    )
    python = environments.status(spec).python
    printed = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True).stdout
    return dict(zip(("base", "engine", "helper"), printed.split(), strict=True))


# ------------------------------------------------------------------------------------------- installing


def test_install_from_a_lock(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    missing = environments.status(SPEC)
    assert missing.state == "missing"
    assert "conformance targets install toy@1.0" in missing.reason
    assert "about 1 MB and 5 s" in missing.reason
    lines: list[str] = []
    found = environments.install(SPEC, lines.append)
    assert found.state == "ready"
    assert found.reason == ""
    assert found.megabytes > 1, "as measured, not as the lock says"
    assert _versions() == {"base": "2.0", "engine": "1.0", "helper": "3.0"}
    assert place.left_behind() == ["toy-1.0"]
    assert lines[0].startswith("making the environment of toy@1.0 at ")
    assert "installing toy-base==2.0 with dependencies" in lines
    assert lines[-1].startswith("toy@1.0 is ready: ")
    assert all(check.ok for check in environments.doctor(SPEC)), environments.doctor(SPEC)
    assert not (tmp_path / "elsewhere").exists(), "the user's own pip settings must not lead elsewhere"


def test_install_again_does_nothing(installed: Place) -> None:
    before = environments.status(SPEC).python.lstat()
    lines: list[str] = []
    environments.install(SPEC, lines.append)
    assert [line.partition(" at ")[0] for line in lines] == ["toy@1.0 is installed"]
    assert environments.status(SPEC).python.lstat() == before


def test_a_changed_lock_replaces_the_environment(installed: Place) -> None:
    installed.write(LOCK.replace("toy-engine==1.0", "toy-engine==1.1"))
    stale = environments.status(SPEC)
    assert stale.state == "stale"
    assert "made from another lock file" in stale.reason
    assert not environments.doctor(SPEC)[0].ok
    environments.install(SPEC)
    assert environments.status(SPEC).state == "ready"
    assert _versions()["engine"] == "1.1"
    assert installed.left_behind() == ["toy-1.0"]


def test_a_failed_replacement_leaves_the_old_environment(installed: Place) -> None:
    installed.write(LOCK.replace("toy-engine==1.0", "toy-engine==7.0"))
    with pytest.raises(TargetError, match=r"No matching distribution found for toy-engine==7\.0") as caught:
        environments.install(SPEC)
    assert "nothing was installed" in str(caught.value)
    assert environments.status(SPEC).state == "stale"
    assert _versions()["engine"] == "1.0"
    assert installed.left_behind() == ["toy-1.0"]


def test_an_installer_that_is_killed_can_be_repeated(place: Place) -> None:
    code = f"""
        def progress(line):
            if line.startswith("installing 1 pinned"):
                os.kill(os.getpid(), signal.SIGKILL)
        environments.install({SPEC!r}, progress)
    """
    with place.start(code) as process:
        assert process.wait(60) == -signal.SIGKILL
    assert environments.status(SPEC).state == "missing"
    assert [name.endswith(".partial") for name in place.left_behind()] == [True]
    environments.install(SPEC)
    assert _versions()["engine"] == "1.0"
    assert place.left_behind() == ["toy-1.0"]


def test_an_interrupted_installer_cleans_up(place: Place) -> None:
    def progress(line: str) -> None:
        if line.startswith("installing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        environments.install(SPEC, progress)
    assert place.left_behind() == []


def test_two_installers_at_once_make_one_environment(place: Place) -> None:
    code = f"environments.install({SPEC!r}, lambda line: print(line, flush=True))"
    with place.start(code) as first, place.start(code) as second:
        printed = [process.communicate(timeout=60)[0] for process in (first, second)]
        assert (first.returncode, second.returncode) == (0, 0)
    assert sum("making the environment" in text for text in printed) == 1
    assert sum("is installed at" in text for text in printed) == 1
    assert sum("waiting for another process" in text for text in printed) == 1
    assert _versions()["engine"] == "1.0"


def test_too_little_space(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.write(LOCK.replace("size: 1 MB", "size: 1000 MB"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**10, 0, 1_299_000_000))
    with pytest.raises(
        TargetError, match=r"needs 1300 MB of free space and there are 1299 MB; make room, or"
    ):
        environments.install(SPEC)
    assert place.left_behind() == []


def test_a_home_that_cannot_be_written(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CONFORMANCE_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(TargetError, match=r"cannot be created .*set CONFORMANCE_HOME"):
        environments.install(SPEC)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("# platform: solaris-sparc\n", "runs on solaris-sparc only"),
        ("# python: 2.7 3.4\n", "has packages for Python 2.7, 3.4; this is"),
    ],
)
def test_a_platform_without_packages(place: Place, field: str, message: str) -> None:
    place.write(field + LOCK)
    with pytest.raises(TargetError, match=message):
        environments.install(SPEC)


def test_the_platform_of_this_machine_is_accepted(place: Place) -> None:
    minor = ".".join(platform.python_version_tuple()[:2])
    here = f"{platform.system().lower()}-{platform.machine().lower()}"
    place.write(f"# platform: {here}\n# python: {minor}\n{LOCK}")
    environments._check_platform(environments.find_lock(SPEC))


# ------------------------------------------------------------------------- broken, removed, examined


def test_an_environment_without_its_stamp_is_broken(installed: Place) -> None:
    (environments.status(SPEC).path / "conformance-environment.json").unlink()
    assert environments.status(SPEC).state == "broken"
    (check,) = environments.doctor(SPEC)
    assert not check.ok
    assert "run `conformance targets install toy@1.0`" in check.detail


def test_an_environment_whose_python_is_gone_is_broken(installed: Place) -> None:
    python = environments.status(SPEC).python
    python.unlink()
    python.symlink_to("/no/longer/here/python3")
    assert environments.status(SPEC).state == "broken"


def test_doctor_finds_what_was_changed(installed: Place) -> None:
    python = environments.status(SPEC).python
    for arguments in (["install", "--no-deps", "toy-engine==1.1"], ["uninstall", "-y", "toy-base"]):
        subprocess.run([python, "-m", "pip", "-q", *arguments], check=True)
    found = {check.name: check for check in environments.doctor(SPEC)}
    assert found["interpreter"].ok
    assert not found["packages"].ok
    assert found["packages"].detail == "toy-engine: 1.1, not 1.0; toy-base: absent, not 2.0"


def test_doctor_of_an_interpreter_that_does_not_run(installed: Place) -> None:
    python = environments.status(SPEC).python
    python.unlink()
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    found = {check.name: check for check in environments.doctor(SPEC)}
    assert not found["interpreter"].ok


def test_remove(installed: Place) -> None:
    assert environments.remove(SPEC)
    assert environments.status(SPEC).state == "missing"
    assert installed.left_behind() == []
    assert not environments.remove(SPEC)


# ---------------------------------------------------------------------------------------------- lock files


def test_no_such_environment(place: Place) -> None:
    with pytest.raises(TargetError, match=r"no environment for 'toy@9'; environments exist for: toy@1\.0"):
        environments.install("toy@9")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "toy-engine>=1.0\n",
            r"toy-1\.0\.txt:1: expected `name==version` or a comment, found 'toy-engine>=1",
        ),
        ("toy-engine==1.0\n--index-url x\n", r"toy-1\.0\.txt:2: expected"),
        ("# nothing\n", "at least one pin"),
        ("# with-dependencies: torch\ntoy-engine==1.0\n", "pins for every package under `with-dependencies`"),
        ("# size: big\ntoy-engine==1.0\n", "expected a number with its unit, found 'big'"),
    ],
)
def test_a_bad_lock_file(place: Place, text: str, message: str) -> None:
    place.write(text)
    with pytest.raises(TargetError, match=message):
        environments.locks()


def test_a_relative_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONFORMANCE_HOME", "somewhere")
    with pytest.raises(TargetError, match="'somewhere', a relative path; give an absolute one"):
        environments.home()


def test_the_home_is_the_users_cache_folder_by_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CONFORMANCE_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert environments.home() == tmp_path / "gemma4-conformance"


@pytest.mark.parametrize("lock", environments.locks(), ids=lambda lock: lock.spec)
def test_the_lock_files_of_the_package(lock: environments.Lock) -> None:
    names = [name for name, _ in lock.pins]
    assert len(set(names)) == len(names)
    assert set(lock.with_dependencies) <= {"torch"}
    assert ("torch" in names) == bool(lock.with_dependencies), "torch is installed with its dependencies"
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(names)
    assert lock.megabytes > 0
    assert lock.seconds > 0
    base = environments.find_lock(lock.overlay_of) if lock.overlay_of else lock
    assert "3.11" in base.pythons
    assert names[0] == base.pins[0][0], "the engine's own package comes first"
