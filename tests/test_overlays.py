"""Overlays: other releases of an engine over one environment. Packages are local."""

from __future__ import annotations

import json
import os
import signal
import subprocess

import pytest

from conformance.errors import TargetError
from conformance.targets import environments, health, overlays, registry
from tests.test_environments import (  # noqa: F401 - fixtures
    LOCK,
    SPEC,
    Place,
    installed,
    installed_once,
    place,
    wheels,
)

OLD = "toy@0.9"
OVERLAY = f"""\
# overlay-of: {SPEC}
# adapter: toy_older
# size: 1 MB
# time: 1 s

toy-engine==1.1
"""


@pytest.fixture
def overlaid(installed: Place, monkeypatch: pytest.MonkeyPatch) -> Place:  # noqa: F811
    """An installed base, a lock for an overlay, and an engine of that name."""
    installed.write(OVERLAY, "toy-0.9.txt")
    monkeypatch.setattr(registry, "_ENGINES", {"toy": registry.Engine("toy", "A toy.")})
    return installed


def imported(spec: str) -> dict[str, str]:
    """Versions as a worker of this release would import them."""
    found = environments.status(spec)
    code = (
        "import json, toy_base, toy_engine; from importlib.metadata import version; print(json.dumps("
        "{'base': toy_base.VERSION, 'engine': toy_engine.VERSION, 'metadata': version('toy-engine')}))"
    )
    paths = os.pathsep.join(map(str, found.import_paths))
    done = subprocess.run(
        [found.python, "-c", code],
        env={"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    versions: dict[str, str] = json.loads(done.stdout)
    return versions


def test_an_overlay_hides_one_package_of_its_base(overlaid: Place) -> None:
    missing = environments.status(OLD)
    assert missing.state == "missing"
    assert f"conformance targets install {OLD}" in missing.reason
    lines: list[str] = []
    found = environments.install(OLD, lines.append)
    assert found.state == "ready"
    assert f"installing toy-engine==1.1 over {SPEC}" in lines
    assert imported(OLD) == {"base": "2.0", "engine": "1.1", "metadata": "1.1"}
    assert imported(SPEC) == {"base": "2.0", "engine": "1.0", "metadata": "1.0"}
    assert overlaid.left_behind() == ["toy-0.9", "toy-1.0"]
    assert all(check.ok for check in health.doctor(OLD)), health.doctor(OLD)
    environments.install(OLD, lines.append)
    assert lines[-1].startswith(f"{OLD} is installed at ")


def test_an_overlay_brings_its_base(place: Place) -> None:  # noqa: F811
    place.write(OVERLAY, "toy-0.9.txt")
    environments.install(OLD)
    assert environments.status(SPEC).state == "ready"
    assert imported(OLD)["engine"] == "1.1"


def test_without_its_base_an_overlay_cannot_be_used(overlaid: Place) -> None:
    environments.install(OLD)
    environments.remove(SPEC)
    found = environments.status(OLD)
    assert found.state == "missing"
    assert found.reason.startswith(f"it is laid over {SPEC}, and its environment is not installed; run")
    environments.install(OLD)
    assert environments.status(OLD).state == "ready"


def test_an_interrupted_overlay_leaves_nothing(overlaid: Place) -> None:
    def progress(line: str) -> None:
        if line.startswith("installing toy-engine"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        environments.install(OLD, progress)
    assert overlaid.left_behind() == ["toy-1.0"]


def test_a_killed_installer_of_an_overlay_can_be_repeated(overlaid: Place) -> None:
    code = f"""
        def progress(line):
            if line.startswith("installing toy-engine"):
                (environments.home() / "environments" / f".toy-0.9.{{os.getpid()}}.partial").mkdir()
                os.kill(os.getpid(), signal.SIGKILL)
        environments.install({OLD!r}, progress)
    """
    with overlaid.start(code) as process:
        assert process.wait(60) == -signal.SIGKILL
    assert environments.status(OLD).state == "missing"
    assert any(name.endswith(".partial") for name in overlaid.left_behind())
    environments.install(OLD)
    assert imported(OLD)["engine"] == "1.1"
    assert overlaid.left_behind() == ["toy-0.9", "toy-1.0"]


def test_what_makes_an_overlay_stale(overlaid: Place) -> None:
    environments.install(OLD)
    overlaid.write(OVERLAY.replace("size: 1 MB", "size: 2 MB"), "toy-0.9.txt")
    assert environments.status(OLD).state == "ready", "its size says nothing about what is installed"
    overlaid.write(OVERLAY.replace("==1.1", "==1.0"), "toy-0.9.txt")
    assert environments.status(OLD).state == "stale"
    environments.install(OLD)
    assert imported(OLD)["engine"] == "1.0"


@pytest.mark.parametrize("base", ["toy@7", "other@1.0", OLD])
def test_an_overlay_of_something_else(overlaid: Place, base: str) -> None:
    overlaid.write(OVERLAY.replace(SPEC, base), "toy-0.9.txt")
    with pytest.raises(TargetError, match=f"overlay-of names '{base}', which must be another environment"):
        environments.locks()


def test_the_registry_prefers_what_stands_alone(overlaid: Place) -> None:
    overlaid.write(OVERLAY, "toy-2.0.txt")
    assert registry.releases("toy") == ("toy@0.9", "toy@1.0", "toy@2.0")
    assert registry.resolve("toy") == SPEC
    assert registry.resolve("toy@2.0") == "toy@2.0"
    with pytest.raises(TargetError, match="'reference' is no target with versions"):
        registry.releases("reference")


def test_a_worker_imports_from_the_overlay(overlaid: Place) -> None:
    environments.install(OLD)
    target = registry.open_target(OLD)
    with pytest.raises(Exception, match=r"conformance\.worker\.adapters\.toy_older"):
        target.describe()
    target.close()


# ------------------------------------------------------------------------------------ adding a release


def test_add_a_release(overlaid: Place) -> None:
    path = overlays.add("toy@1.1", extra=["toy-helper==3.0"], adapter="toy_older")
    lock = environments.find_lock("toy@1.1")
    assert lock.path == path == overlaid.locks / "toy-1.1.txt"
    assert (lock.overlay_of, lock.adapter) == (SPEC, "toy_older")
    assert lock.pins == (("toy-engine", "1.1"), ("toy-helper", "3.0"))
    assert lock.megabytes > 0
    assert lock.seconds > 0
    assert environments.status("toy@1.1").state == "ready", "what was installed to measure it is kept"
    assert imported("toy@1.1")["engine"] == "1.1"


@pytest.mark.parametrize(
    ("spec", "extra", "message"),
    [
        ("toy@3.0", (), "No matching distribution found for toy-engine==3.0"),
        ("toy@1.1", ("no-such==1",), "No matching distribution found for no-such==1"),
        ("toy@1.1", ("toy-helper>=3",), "'toy-helper>=3': expected a pin `name==version`"),
        (OLD, (), "is locked already"),
        ("toy", (), "expected a target and a version, such as toy@1.0"),
        ("toy@new", (), "expected a target and a version"),
        ("nothing@1", (), "'nothing' is no target with versions"),
    ],
)
def test_a_release_that_cannot_be_added(
    overlaid: Place, spec: str, extra: tuple[str, ...], message: str
) -> None:
    before = sorted(overlaid.locks.iterdir())
    with pytest.raises(TargetError, match=message.replace("==", r"\=\=")):
        overlays.add(spec, extra=extra)
    assert sorted(overlaid.locks.iterdir()) == before
    assert overlaid.left_behind() == ["toy-1.0"]


def test_the_lock_of_the_base_is_untouched(overlaid: Place) -> None:
    overlays.add("toy@1.1")
    assert (overlaid.locks / "toy-1.0.txt").read_text() == LOCK
