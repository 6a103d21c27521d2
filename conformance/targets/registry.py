"""The targets that can be named, and how each is opened.

To add a target: an entry in `_ENGINES`, an adapter in `conformance/worker/adapters`, and a lock file in
`conformance/targets/locks` for each version. `conformance targets lock` adds an older or newer version.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from packaging.version import Version

import conformance
from conformance.errors import ConformanceError, TargetError
from conformance.targets import endpoint, environments
from conformance.targets.environments import Check, State
from conformance.targets.process import REQUEST_TIMEOUT, WorkerTarget
from conformance.targets.protocol import Target, TargetInfo
from conformance.targets.reference import ReferenceTarget
from conformance.tokenization import tokenizer_files


@dataclass(frozen=True)
class Engine:
    """An engine that runs in a worker."""

    adapter: str
    """Module in `conformance.worker.adapters`."""
    description: str


_ENGINES: dict[str, Engine] = {
    "transformers": Engine(
        "transformers", "Hugging Face transformers: response parser of its server, chat template, text model"
    ),
    "vllm": Engine("vllm", "vLLM: reasoning and tool-call parsers of its OpenAI server"),
    "sglang-parsers": Engine(
        "sglang_parsers", "SGLang: reasoning and tool-call parsers of its OpenAI server"
    ),
}
_NEEDED = ("spec", "describe", "close")
"""What every target has, whatever its capabilities."""
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


def default_targets() -> tuple[str, ...]:
    """Canonical specs of the targets of a run that names none."""
    return ("reference", *(resolve(name) for name in _ENGINES))


def known_targets() -> tuple[str, ...]:
    """Canonical specs of all targets and versions."""
    return ("reference", *(f"{name}@{version}" for name in _ENGINES for version in _versions(name)))


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
    if not _has_environment(canonical):
        description = _REFERENCE if canonical == "reference" else f"made by {canonical}"
        if endpoint.is_endpoint(canonical):
            description = "a live server with OpenAI's chat completions"
        return TargetSummary(canonical, description, "ready", "", 0, 0, default)
    found = environments.status(canonical)
    engine = _ENGINES[found.lock.target]
    return TargetSummary(
        canonical, engine.description, found.state, found.reason, found.megabytes, found.seconds, default
    )


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
    name, at, version = spec.partition("@")
    if name == "reference":
        if at:
            raise TargetError(f"{spec}: the bundled implementation has no versions; say `reference`")
        return name
    if name not in _ENGINES:
        raise TargetError(
            f"there is no target {name!r}; targets are {', '.join(['reference', *_ENGINES])}, "
            "a server `openai@URL#MODEL`, or a Python factory `package.module:function`"
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
    return not (is_factory(canonical) or endpoint.is_endpoint(canonical) or canonical == "reference")


def unavailable(spec: str) -> str:
    """Why a target cannot be used here and what to do about it; empty if it can.

    Raises:
        TargetError: no such target.
    """
    return summary(spec).reason


def open_target(spec: str, *, timeout: float = REQUEST_TIMEOUT) -> Target:
    """Open a target; engines start at their first request.

    Args:
        spec: `reference`, `name`, `name@version`, `openai@URL#MODEL`, or `package.module:function`.
        timeout: Seconds for one request.

    Raises:
        TargetError: no such target, or its environment is missing; says how to install it.
    """
    canonical = resolve(spec)
    if canonical == "reference":
        return ReferenceTarget()
    if is_factory(canonical):
        return _from_factory(canonical)
    if endpoint.is_endpoint(canonical):
        # It loads the HTTP client, which other targets need not spend time on.
        from conformance.targets.openai import open_endpoint

        # A server has none of the methods that its description does not name.
        return cast(Target, open_endpoint(canonical, timeout=timeout))
    found = environments.status(canonical)
    if found.state != "ready":
        raise TargetError(f"{canonical} cannot be used: {found.reason}")
    return WorkerTarget(
        canonical,
        python=found.python,
        adapter=found.lock.adapter or _ENGINES[found.lock.target].adapter,
        timeout=timeout,
        import_paths=found.import_paths,
        environment={
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
        checks = environments.doctor(canonical)
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
    """Versions with a lock file, oldest first."""
    found = (lock for lock in environments.locks() if lock.target == name)
    return tuple(sorted((lock.version for lock in found if overlays or not lock.overlay_of), key=Version))


def _chat_template() -> Path:
    return Path(conformance.__file__).parents[1] / "model_impl" / "chat" / "chat_template.jinja"
