"""The targets that can be named, and how each is opened.

To add a target: an entry in `_ENGINES`, an adapter in `conformance/worker/adapters`, and a lock file in
`conformance/targets/locks` for each version. `conformance targets lock` adds an older or newer version.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from packaging.version import Version

import conformance
from conformance.errors import ConformanceError, TargetError
from conformance.targets import bundled, endpoint, environments, health, installed, replay
from conformance.targets.environments import EnvironmentStatus, State
from conformance.targets.health import Check
from conformance.targets.lockfile import Lock
from conformance.targets.process import REQUEST_TIMEOUT, WorkerTarget
from conformance.targets.protocol import Target, TargetInfo
from conformance.tokenization import tokenizer_files


@dataclass(frozen=True)
class Engine:
    """An engine that runs in a worker."""

    adapter: str
    """Module in `conformance.worker.adapters`."""
    description: str


@dataclass(frozen=True)
class EngineServer:
    """A server that an engine brings, in that engine's environment."""

    engine: str
    """Its registry name; versions are those of the engine that have the part."""
    part: str
    """Of the environment, which must be installed."""
    description: str


_ENGINES: dict[str, Engine] = {
    "transformers": Engine(
        "transformers", "Hugging Face transformers: response parser of its server, chat template, text model"
    ),
    "vllm": Engine(
        "vllm",
        "vLLM: reasoning and tool-call parsers of its OpenAI server; with its part `engine`, the engine too",
    ),
    "sglang-parsers": Engine(
        "sglang_parsers", "SGLang: reasoning and tool-call parsers of its OpenAI server"
    ),
}
_SERVERS: dict[str, EngineServer] = {
    "vllm-server": EngineServer(
        "vllm", "engine", "vLLM: its real OpenAI server, which serves the scripted checkpoint"
    ),
}
FORMS = {
    "openai@URL#MODEL": "a live server with OpenAI's chat completions",
    "replay@PATH": "answers that were recorded, here or elsewhere",
    "vllm@installed": "vLLM of the harness's own interpreter",
    "package.module:function": "a Python function that makes a target",
}
"""Targets that are named with what they need."""

_NEEDED = ("spec", "describe", "close")
"""What every target has, whatever its capabilities."""
_BUNDLED = "conformance.targets.reference:ReferenceTarget"
"""Opened by its name, as targets of others are: its scoring asks targets in its turn."""
_REFERENCE = "the bundled implementation"


@dataclass(frozen=True)
class TargetSummary:
    """One target and version, for lists."""

    spec: str
    description: str
    state: State
    """Of its environment; `ready` for the bundled target, which needs none."""
    reason: str
    """Why it cannot be used, and what to do; empty when it can."""
    megabytes: int
    """Size of its environment, as measured or expected."""
    seconds: int
    """Time to install it, as measured or expected."""
    default: bool
    parts: str = ""
    """Which parts its environment has, and how to install the others; empty where it can have none."""


def default_targets() -> tuple[str, ...]:
    """Canonical specs of the targets of a run that names none."""
    return ("reference", *(resolve(name) for name in _ENGINES))


def known_targets() -> tuple[str, ...]:
    """Canonical specs of all targets and versions."""
    names = (*_ENGINES, *_SERVERS)
    beside = (f"{name}@{installed.VERSION}" for name in installed.DISTRIBUTIONS if installed.version_of(name))
    return ("reference", *(f"{name}@{version}" for name in names for version in _versions(name)), *beside)


def releases(name: str) -> tuple[str, ...]:
    """Canonical specs of every known version of a target, oldest first.

    Raises:
        TargetError: no such target, or one without versions.
    """
    if name not in _ENGINES:
        raise TargetError(f"{name!r} is no target with versions; those are {', '.join(_ENGINES)}")
    return tuple(f"{name}@{version}" for version in _versions(name))


def summaries() -> tuple[TargetSummary, ...]:
    """All targets with their state."""
    return tuple(summary(spec) for spec in known_targets())


def summary(spec: str) -> TargetSummary:
    """One target with its state.

    Raises:
        TargetError: no such target.
    """
    canonical = resolve(spec)
    default = canonical in default_targets()
    if installed.is_installed(canonical):
        name = canonical.partition("@")[0]
        description = f"{_ENGINES[name].description}, as installed beside the harness"
        lacking = installed.reason(name)
        return TargetSummary(
            canonical, description, "missing" if lacking else "ready", lacking, 0, 0, default
        )
    if not _has_environment(canonical):
        description = _REFERENCE if canonical == "reference" else f"made by {canonical}"
        if endpoint.is_endpoint(canonical):
            description = "a live server with OpenAI's chat completions"
        if replay.is_replay(canonical):
            return TargetSummary(canonical, "recorded answers", *_recording_state(canonical), 0, 0, default)
        return TargetSummary(canonical, description, "ready", "", 0, 0, default)
    found = environments.status(environment_of(canonical))
    name = canonical.partition("@")[0]
    if (server := _SERVERS.get(name)) is not None:
        state, reason = _server_state(server, found)
        return TargetSummary(
            canonical, server.description, state, reason, found.megabytes, found.seconds, default
        )
    return TargetSummary(
        canonical,
        _ENGINES[name].description,
        found.state,
        found.reason,
        found.megabytes,
        found.seconds,
        default,
        _parts(found) if found.state == "ready" else "",
    )


def _parts(found: EnvironmentStatus) -> str:
    return "; ".join([*(f"with part `{part}`" for part in found.parts), *found.lacking.values()])


def resolve(spec: str) -> str:
    """Canonical form of a spec: with the version.

    Where none is given, it is the newest that has an environment of its own, and is no overlay.

    Raises:
        TargetError: no such target, or no such version.
    """
    if is_factory(spec):
        return spec
    if endpoint.is_endpoint(spec):
        return endpoint.endpoint(spec).spec
    if replay.is_replay(spec):
        return f"{replay.NAME}@{replay.path_of(spec)}"
    if installed.is_installed(spec):
        return spec
    name, at, version = spec.partition("@")
    if name == "reference":
        if at:
            raise TargetError(f"{spec}: the bundled implementation has no versions; say `reference`")
        return name
    if name not in _ENGINES and name not in _SERVERS:
        known = ", ".join(["reference", *_ENGINES, *_SERVERS])
        raise TargetError(
            f"there is no target {name!r}; targets are {known}, "
            "a server `openai@URL#MODEL`, a recording `replay@PATH`, "
            "or a Python factory `package.module:function`"
        )
    versions = _versions(name)
    if not versions:
        raise TargetError(f"{name}: this installation has no lock file for it; install the harness again")
    if at and version not in versions:
        raise TargetError(f"{spec}: unknown version; versions of {name} are {', '.join(versions)}")
    return f"{name}@{version or _versions(name, overlays=False)[-1]}"


def is_factory(spec: str) -> bool:
    """Whether a spec names a Python function that makes a target: `package.module:function`."""
    module, colon, function = spec.partition(":")
    return bool(colon) and function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def _has_environment(canonical: str) -> bool:
    return not (
        is_factory(canonical)
        or endpoint.is_endpoint(canonical)
        or replay.is_replay(canonical)
        or installed.is_installed(canonical)
        or canonical == "reference"
    )


def _recording_state(canonical: str) -> tuple[State, str]:
    try:
        replay.open_replay(canonical).close()
    except TargetError as error:
        return "broken", str(error)
    return "ready", ""


def environment_of(canonical: str) -> str:
    """The environment that a target with one runs in: its own, or that of the engine whose server it is."""
    name, _, version = canonical.partition("@")
    return f"{_SERVERS[name].engine}@{version}" if name in _SERVERS else canonical


def _server_state(server: EngineServer, found: EnvironmentStatus) -> tuple[State, str]:
    if found.state != "ready":
        return found.state, found.reason
    lacking = found.lacking.get(server.part, "")
    return ("missing" if lacking else "ready"), lacking


def unavailable(spec: str) -> str:
    """Why a target cannot be used here and what to do about it; empty if it can.

    Raises:
        TargetError: no such target.
    """
    return summary(spec).reason


def open_target(spec: str, *, timeout: float = REQUEST_TIMEOUT) -> Target:
    """Open a target; engines start at their first request.

    Args:
        spec: `reference`, `name`, `name@version`, `vllm@installed`, `openai@URL#MODEL`, `replay@PATH`,
            or `package.module:function`.
        timeout: Seconds for one request.

    Raises:
        TargetError: no such target, or its environment is missing; says how to install it.
    """
    canonical = resolve(spec)
    if canonical == "reference":
        return _from_factory(_BUNDLED)
    if is_factory(canonical):
        return _from_factory(canonical)
    if endpoint.is_endpoint(canonical):
        # It loads the HTTP client, which other targets need not spend time on.
        from conformance.targets.openai import open_endpoint

        # A server has none of the methods that its description does not name.
        return cast(Target, open_endpoint(canonical, timeout=timeout))
    if replay.is_replay(canonical):
        # As with a server: what the recording's header names is all that it has.
        return cast(Target, replay.open_replay(canonical))
    if reason := unavailable(canonical):
        raise TargetError(f"{canonical} cannot be used: {reason}")
    if installed.is_installed(canonical):
        adapter = _ENGINES[canonical.partition("@")[0]].adapter
        return _worker(canonical, installed.python(), adapter, timeout=timeout)
    found = environments.status(environment_of(canonical))
    if canonical.partition("@")[0] in _SERVERS:
        from conformance.targets.vllm_server import VllmServer

        server = VllmServer(
            canonical,
            python=found.python,
            checkpoint=bundled.checkpoint(),
            adapter=bundled.adapter(),
            timeout=timeout,
            import_paths=found.import_paths,
        )
        return cast(Target, server)
    return _worker(
        canonical,
        found.python,
        found.lock.adapter or _ENGINES[found.lock.target].adapter,
        timeout=timeout,
        import_paths=found.import_paths,
        without_engine=found.lacking.get("engine", ""),
        parts=found.parts,
    )


def _worker(
    canonical: str,
    python: Path,
    adapter: str,
    *,
    timeout: float,
    import_paths: Sequence[Path] = (),
    without_engine: str = "",
    parts: Sequence[str] = (),
) -> Target:
    return WorkerTarget(
        canonical,
        python=python,
        adapter=adapter,
        timeout=timeout,
        import_paths=import_paths,
        environment={
            "CONFORMANCE_PARTS": " ".join(parts),
            "CONFORMANCE_WITHOUT_ENGINE": without_engine,
            "CONFORMANCE_TOKENIZER": str(tokenizer_files()),
            "CONFORMANCE_CHAT_TEMPLATE": str(_chat_template()),
        },
    )


def describe(target: Target) -> TargetInfo:
    """What a target says of itself, once it is sure that it has the methods which that promises.

    Raises:
        TargetError: it names a capability and lacks the method, or describes itself in another type.
        ConformanceError: as `Target.describe`.
    """
    info = target.describe()
    if not isinstance(info, TargetInfo):
        raise TargetError(f"{_name(target)}: `describe` returned {type(info).__name__}, not a TargetInfo")
    lacking = [capability for capability in info.capabilities if not _has(target, capability)]
    if lacking:
        raise TargetError(
            f"{_name(target)}: `describe` names the capability {_listed(lacking)} and "
            f"{type(target).__name__} has no such method; write it, or leave it out of the capabilities"
        )
    return info


def doctor(spec: str) -> tuple[Check, ...]:
    """Examine a target: its environment, and whether its engine starts and answers.

    Raises:
        TargetError: no such target.
    """
    canonical = resolve(spec)
    checks: tuple[Check, ...] = ()
    if _has_environment(canonical):
        checks = health.doctor(environment_of(canonical))
        if not all(check.ok for check in checks):
            return checks
    return (*checks, _answers(canonical))


def _answers(spec: str) -> Check:
    try:
        target = open_target(spec)
    except TargetError as error:
        return Check("engine", ok=False, detail=str(error))
    try:
        info = describe(target)
    except ConformanceError as error:
        return Check("engine", ok=False, detail=str(error))
    finally:
        target.close()
    return Check("engine", ok=True, detail=f"{info.name} {info.version}: {', '.join(info.capabilities)}")


def _from_factory(spec: str) -> Target:
    module_name, _, function = spec.partition(":")
    try:
        make = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise TargetError(f"{spec}: cannot be imported: {error}") from error
    try:
        target = make()
    except ConformanceError:
        raise
    except Exception as error:
        raise TargetError(f"{spec}: raised {type(error).__name__}: {error}") from error
    lacking = [name for name in _NEEDED if not _has(target, name)]
    if lacking:
        raise TargetError(
            f"{spec}: returned {type(target).__name__}, which is not a target: it has no {_listed(lacking)}"
        )
    made: Target = target
    return made


def _has(target: object, name: str) -> bool:
    """Whether a target has a member of its own: one inherited from the protocol's class does nothing."""
    if name == "spec":
        return isinstance(getattr(target, name, None), str)
    method = getattr(target, name, None)
    inherited = getattr(type(target), name, None) is getattr(Target, name, None)
    return callable(method) and (name == "close" or not inherited)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _name(target: Target) -> str:
    return target.spec or type(target).__name__


def _versions(name: str, *, overlays: bool = True) -> tuple[str, ...]:
    """Versions with a lock file, oldest first; of a server those whose lock file has the part."""
    server = _SERVERS.get(name)
    found: Iterable[Lock] = environments.locks()
    if server is not None:
        found = (lock for lock in found if any(part.name == server.part for part in lock.parts))
    name = name if server is None else server.engine
    found = (lock for lock in found if lock.target == name)
    return tuple(sorted((lock.version for lock in found if overlays or not lock.overlay_of), key=Version))


def _chat_template() -> Path:
    return Path(conformance.__file__).parents[1] / "model_impl" / "chat" / "chat_template.jinja"
