"""Environments of engines: made from lock files, interrupted, repeated, replaced. Packages are local."""

from __future__ import annotations

import json
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

from conformance.errors import TargetError, UsageError
from conformance.targets import environments, health
from conformance.targets.lockfile import Lock

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
    _wheel(folder, "toy_part", "1.0", requires=("no-such-package",))
    _wheel(folder, "toy_part", "1.1")
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
    assert all(check.ok for check in health.doctor(SPEC)), health.doctor(SPEC)
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
    assert not health.doctor(SPEC)[0].ok
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
    (check,) = health.doctor(SPEC)
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
    found = {check.name: check for check in health.doctor(SPEC)}
    assert found["interpreter"].ok
    assert not found["packages"].ok
    assert found["packages"].detail == "toy-engine: 1.1, not 1.0; toy-base: absent, not 2.0"


def test_doctor_of_an_interpreter_that_does_not_run(installed: Place) -> None:
    python = environments.status(SPEC).python
    python.unlink()
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    found = {check.name: check for check in health.doctor(SPEC)}
    assert not found["interpreter"].ok


def test_remove(installed: Place) -> None:
    assert environments.remove(SPEC)
    assert environments.status(SPEC).state == "missing"
    assert installed.left_behind() == []
    assert not environments.remove(SPEC)


def test_remove_takes_what_a_killed_installer_left(place: Place) -> None:
    assert not environments.remove(SPEC), "there is not even a folder"
    folder = place.home / "environments"
    (folder / ".toy-1.0.77.partial" / "bin").mkdir(parents=True)
    (folder / ".toy-1.0.77-old.partial").mkdir()
    assert not environments.remove(SPEC)
    assert place.left_behind() == []


def test_what_another_version_is_being_made_in_stays(installed: Place) -> None:
    others = [".toy-1.0.1.77.partial", ".toy-1.0.post1.77-old.partial"]
    for name in others:
        (installed.home / "environments" / name).mkdir()
    environments.install(SPEC)
    assert environments.remove(SPEC)
    assert installed.left_behind() == others


# ------------------------------------------------------------------------------------------------- parts

PARTS = f"{LOCK}\n# part: engine\n# size: 2 MB\n# time: 3 s\n\ntoy-part==1.0\n"


def _part_version() -> str:
    found = environments.status(SPEC)
    paths = os.pathsep.join(map(str, found.import_paths))
    return subprocess.run(
        [found.python, "-c", "import toy_part; print(toy_part.VERSION)"],
        env={"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def _parts_left() -> list[str]:
    return sorted(path.name for path in (environments.status(SPEC).path / "parts").glob("*"))


def test_a_part_is_added_to_what_is_there(installed: Place) -> None:
    installed.write(PARTS)
    before = environments.status(SPEC)
    assert (before.state, before.parts, before.import_paths) == ("ready", (), ())
    assert before.lacking == {
        "engine": "part `engine` of its environment is not installed; "
        "run `conformance targets install toy@1.0` (about 2 MB and 3 s)"
    }
    unchanged = before.python.lstat()
    lines: list[str] = []
    environments.install(SPEC, lines.append, parts=False)
    assert [line.partition(" at ")[0] for line in lines] == ["toy@1.0 is installed"]
    found = environments.install(SPEC, lines.append)
    assert (found.state, found.parts, found.lacking) == ("ready", ("engine",), {})
    assert _part_version() == "1.0"
    assert found.python.lstat() == unchanged, "the environment is not made anew"
    assert lines[1] == "adding part 'engine' to toy@1.0 (about 2 MB and 3 s)"
    assert lines[-1].startswith("part 'engine' of toy@1.0 is ready: ")
    assert (installed.left_behind(), _parts_left()) == (["toy-1.0"], ["engine"])
    for parts in (True, False):
        again: list[str] = []
        environments.install(SPEC, again.append, parts=parts)
        assert [line.partition(" at ")[0] for line in again] == ["toy@1.0 is installed"]
    assert _part_version() == "1.0"


def test_a_part_comes_with_an_environment_asked_for_by_name(place: Place) -> None:
    place.write(PARTS)
    assert environments.install(SPEC).parts == ("engine",)
    assert (_versions()["engine"], _part_version()) == ("1.0", "1.0")
    checks = {check.name: check for check in health.doctor(SPEC)}
    assert all(check.ok for check in checks.values())
    assert checks["packages"].detail == "3 packages as pinned"
    assert checks["part engine"].detail == "installed"


def test_a_changed_part_is_replaced_and_nothing_else(installed: Place) -> None:
    installed.write(PARTS)
    environments.install(SPEC)
    before = environments.status(SPEC).python.lstat()
    installed.write(PARTS.replace("toy-part==1.0", "toy-part==1.1").replace("2 MB", "9 MB"))
    found = environments.install(SPEC, parts=False)
    assert (found.state, found.parts, [*found.lacking]) == ("ready", (), ["engine"])
    assert environments.install(SPEC).parts == ("engine",)
    assert _part_version() == "1.1"
    assert environments.status(SPEC).python.lstat() == before
    assert _parts_left() == ["engine"]


def test_size_and_time_of_a_part_say_nothing_about_what_is_installed(installed: Place) -> None:
    installed.write(PARTS)
    environments.install(SPEC)
    installed.write(PARTS.replace("2 MB", "9 MB").replace("# time: 3 s", "# a comment"))
    assert environments.status(SPEC).parts == ("engine",)


@pytest.mark.parametrize("parts", [True, False])
def test_an_environment_that_is_made_anew_keeps_its_part(installed: Place, parts: bool) -> None:
    installed.write(PARTS)
    environments.install(SPEC)
    installed.write(PARTS.replace("toy-engine==1.0", "toy-engine==1.1"))
    assert environments.status(SPEC).state == "stale"
    assert environments.install(SPEC, parts=parts).parts == ("engine",)
    assert (_versions()["engine"], _part_version()) == ("1.1", "1.0")


def test_an_environment_that_is_made_anew_never_lacks_its_part(installed: Place) -> None:
    """Its part is not made anew, so an interruption cannot come between the two."""
    installed.write(PARTS)
    part = environments.install(SPEC).path / "parts" / "engine"
    before = part.stat().st_ino
    installed.write(PARTS.replace("toy-engine==1.0", "toy-engine==1.1"))
    lines: list[str] = []
    environments.install(SPEC, lines.append, parts=False)
    assert not [line for line in lines if line.startswith("adding part")]
    assert (part.stat().st_ino, _versions()["engine"], _part_version()) == (before, "1.1", "1.0")


def test_a_part_of_another_python_is_made_anew(installed: Place) -> None:
    installed.write(PARTS)
    stamp = environments.install(SPEC).path / "conformance-environment.json"
    made = json.loads(stamp.read_text())
    minor = ".".join(platform.python_version_tuple()[:2])
    assert made["python"].startswith(f"{minor}.")
    stamp.write_text(json.dumps(made | {"python": f"{minor}0.1"}))
    installed.write(PARTS.replace("toy-engine==1.0", "toy-engine==1.1"))
    lines: list[str] = []
    assert environments.install(SPEC, lines.append, parts=False).parts == ("engine",)
    assert [line for line in lines if line.startswith("adding part 'engine'")]


def test_an_interrupted_deletion_of_the_old_leaves_the_new(
    installed: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path, **_: object) -> None:
        if path.name.endswith("-old.partial"):
            raise KeyboardInterrupt

    installed.write(PARTS)
    environments.install(SPEC)
    installed.write(PARTS.replace("toy-engine==1.0", "toy-engine==1.1"))
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            environments.install(SPEC, parts=False)
    found = environments.status(SPEC)
    assert (found.state, found.parts, _versions()["engine"]) == ("ready", ("engine",), "1.1")
    assert len(installed.left_behind()) == 2
    environments.install(SPEC)
    assert installed.left_behind() == ["toy-1.0"]


def test_a_killed_addition_leaves_a_ready_environment(installed: Place) -> None:
    installed.write(PARTS)
    code = f"""
        def progress(line):
            if line.startswith("Installing collected"):
                os.kill(os.getpid(), signal.SIGKILL)
        environments.install({SPEC!r}, progress)
    """
    with installed.start(code) as process:
        assert process.wait(60) == -signal.SIGKILL
    found = environments.status(SPEC)
    assert (found.state, found.parts) == ("ready", ())
    assert [name.endswith(".partial") for name in _parts_left()] == [True]
    environments.install(SPEC)
    assert (_part_version(), _parts_left()) == ("1.0", ["engine"])


def test_an_interrupted_addition_cleans_up(installed: Place) -> None:
    def progress(line: str) -> None:
        if line.startswith("Installing collected"):
            raise KeyboardInterrupt

    installed.write(PARTS)
    with pytest.raises(KeyboardInterrupt):
        environments.install(SPEC, progress)
    assert (environments.status(SPEC).state, _parts_left()) == ("ready", [])


def test_a_failed_addition_leaves_the_rest(installed: Place) -> None:
    installed.write(PARTS.replace("toy-part==1.0", "toy-part==7.0"))
    with pytest.raises(TargetError, match=r"(?s)toy@1\.0, part 'engine': pip.*toy-part==7\.0"):
        environments.install(SPEC)
    assert (environments.status(SPEC).state, _parts_left()) == ("ready", [])


def test_two_installers_add_one_part(installed: Place) -> None:
    installed.write(PARTS)
    code = f"environments.install({SPEC!r}, lambda line: print(line, flush=True))"
    with installed.start(code) as first, installed.start(code) as second:
        printed = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert sum("adding part" in text for text in printed) == 1
    assert sum("is installed at" in text for text in printed) == 1
    assert _part_version() == "1.0"


def test_doctor_finds_a_part_that_was_changed(installed: Place) -> None:
    installed.write(PARTS)
    absent = {check.name: check for check in health.doctor(SPEC)}
    assert absent["part engine"].ok, "an environment is whole without its parts"
    assert "conformance targets install toy@1.0" in absent["part engine"].detail
    folder = environments.install(SPEC).path / "parts" / "engine"
    (folder / "toy_part-1.0.dist-info").rename(folder / "gone")
    found = {check.name: check for check in health.doctor(SPEC)}
    assert not found["packages"].ok
    assert found["packages"].detail == "toy-part: absent, not 1.0"


IMPORTING = PARTS.replace("\n\ntoy-part", "\n# imports: json\n# imports: toy_part json.tool\n\ntoy-part")


def _part_check(place: Place, code: str = "") -> health.Check:
    """What doctor says of the part, once its module has some more code."""
    place.write(IMPORTING)
    module = environments.install(SPEC).part_path("engine") / "toy_part.py"
    with module.open("a", encoding="utf-8") as file:
        file.write(code)
    (check,) = (check for check in health.doctor(SPEC) if check.name == "part engine")
    return check


def test_doctor_imports_a_part(installed: Place) -> None:
    installed.write(IMPORTING)
    (part,) = environments.find_lock(SPEC).parts
    assert part.imports == ("json", "toy_part", "json.tool")
    (absent,) = (check for check in health.doctor(SPEC) if check.name == "part engine")
    assert absent.ok
    assert "is not installed" in absent.detail
    hooked = (
        "import sys\nassert '_BeforeTorchvision' in [type(finder).__name__ for finder in sys.meta_path]\n"
    )
    assert _part_check(installed, hooked) == health.Check(
        "part engine", ok=True, detail="installed; 3 modules of it can be imported"
    )


def test_doctor_tells_how_to_mend_a_part(installed: Place) -> None:
    broken = "raise RuntimeError('operator torchvision::nms\\n does not exist')\n"
    check = _part_check(installed, broken)
    assert not check.ok
    folder = environments.status(SPEC).part_path("engine")
    assert check.detail.startswith(
        "toy_part cannot be imported: RuntimeError: operator torchvision::nms does not exist; "
        f"delete {folder} and run `conformance targets install toy@1.0`, which installs the part anew; "
    )
    shutil.rmtree(folder)
    environments.install(SPEC)
    assert all(check.ok for check in health.doctor(SPEC))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit('no GPU')", "toy_part cannot be imported: SystemExit: no GPU"),
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("import os; os._exit(7)", "importing toy_part: toy@1.0: the worker ended with exit code 7"),
    ],
)
def test_doctor_survives_what_a_part_does(installed: Place, code: str, message: str) -> None:
    check = _part_check(installed, f"{code}\n")
    assert not check.ok
    assert message in check.detail


def test_doctor_ends_an_import_that_hangs(installed: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_IMPORT_TIMEOUT", 2.0)
    check = _part_check(installed, "import time; time.sleep(60)\n")
    assert not check.ok
    assert "importing toy_part: toy@1.0: it did not answer 'describe' within 2 s" in check.detail


def test_remove_takes_the_parts_along(installed: Place) -> None:
    installed.write(PARTS)
    environments.install(SPEC)
    assert environments.remove(SPEC)
    assert installed.left_behind() == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# part: engine\n", "part 'engine' has no pin"),
        ("# part: engine\n# python: 3.11\nx==1\n", "part 'engine' has fields besides `size`, `time` and"),
        ("# part: engine\nx==1\n# part: engine\ny==1\n", r"toy-1\.0\.txt:10: a second part 'engine'"),
        ("# part: engine\ntoy-base==2.0\n", r"toy-1\.0\.txt:9: toy-base is pinned twice"),
        ("# part: engine\n# imports: toy-part\nx==1\n", "names of modules under `imports`, found 'toy-part'"),
        ("# imports: toy_engine\n", "only a part has `imports`; move the line behind"),
    ],
)
def test_a_bad_part(place: Place, text: str, message: str) -> None:
    place.write(LOCK + text)
    with pytest.raises(TargetError, match=message):
        environments.locks()


def test_an_overlay_has_no_parts(place: Place) -> None:
    place.write("# overlay-of: toy@1.0\ntoy-engine==0.9\n# part: engine\nx==1\n", "toy-0.9.txt")
    with pytest.raises(TargetError, match="an overlay has no parts"):
        environments.locks()


def test_default_installs_no_parts_and_a_name_does(installed: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from conformance.commands import targets as commands

    asked: list[tuple[str, bool]] = []
    monkeypatch.setattr(environments, "install", lambda spec, progress, *, parts: asked.append((spec, parts)))
    monkeypatch.setattr(environments, "environments", lambda: [environments.status(SPEC)])
    monkeypatch.setattr(commands.registry, "default_targets", lambda: ("reference", SPEC))
    monkeypatch.setattr(commands.registry, "resolve", lambda spec: spec)
    monkeypatch.setattr(commands, "_print", lambda as_json: None)
    for arguments in (["--default"], [SPEC], ["--default", SPEC]):
        result = CliRunner().invoke(commands.install_targets, arguments)
        assert result.exit_code == 0, result.output
    assert asked == [(SPEC, False), (SPEC, True), (SPEC, True)]


def test_a_server_is_not_removed_with_its_engine_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from conformance.commands import targets as commands

    removed: list[str] = []
    monkeypatch.setattr(environments, "remove", lambda spec: bool(removed.append(spec)) or True)
    monkeypatch.setattr(commands, "_print", lambda as_json: None)
    result = CliRunner().invoke(commands.remove_targets, ["transformers@5.18.0", "vllm-server@0.32.0"])
    assert isinstance(result.exception, UsageError)
    assert str(result.exception) == (
        "vllm-server@0.32.0 runs in the environment of vllm@0.32.0; to remove both, name vllm@0.32.0"
    )
    assert removed == [], "nothing is removed where one of the names is no good"
    assert CliRunner().invoke(commands.remove_targets, ["vllm@0.32.0"]).exit_code == 0
    assert removed == ["vllm@0.32.0"]


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
def test_the_lock_files_of_the_package(lock: Lock) -> None:
    names = [name for name, _ in lock.pins]
    assert len(set(names)) == len(names)
    assert set(lock.with_dependencies) <= {"torch"}
    assert ("torch" in names) == bool(lock.with_dependencies), "torch is installed with its dependencies"
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(names), "parsers need none of them"
    assert lock.megabytes > 0
    assert lock.seconds > 0
    base = environments.find_lock(lock.overlay_of) if lock.overlay_of else lock
    assert "3.11" in base.pythons
    assert names[0] == base.pins[0][0], "the engine's own package comes first"
    assert all(part.imports for part in lock.parts), "doctor sees whether a part works"
