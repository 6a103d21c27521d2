"""Whether an installed environment is whole, holds what its lock says, and can import its parts."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass

from conformance.errors import ConformanceError, TargetTimeoutError, WorkerDiedError
from conformance.targets import environments
from conformance.targets.environments import EnvironmentStatus
from conformance.targets.lockfile import Part
from conformance.targets.process import WorkerTarget
from conformance.worker import imports

_IMPORT_TIMEOUT = 300.0
"""Seconds for all modules of a part: an engine's take a minute on a slow disk."""
_SHOWN = 300
"""Characters of what an import raised."""

_VERSIONS = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
sys.path[:0] = json.loads(sys.argv[1])
found = {}
for name in sys.argv[2:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Check:
    """One finding of `doctor`."""

    name: str
    ok: bool
    detail: str


def doctor(spec: str) -> tuple[Check, ...]:
    """Examine an installed environment: is it whole, does it run, does it hold what the lock says?

    The modules that a part's header names are imported, in a worker as an engine's is.

    Raises:
        TargetError: there is no lock for it.
    """
    found = environments.status(spec)
    whole = Check("environment", found.state == "ready", found.reason or str(found.path))
    if found.state in ("missing", "broken"):
        return (whole,)
    pins = [
        *found.lock.pins,
        *(pin for part in found.lock.parts if part.name in found.parts for pin in part.pins),
    ]
    try:
        answer = subprocess.run(  # noqa: S603 - the environment's own interpreter
            [
                *(str(found.python), "-I", "-c", _VERSIONS, json.dumps([*map(str, found.import_paths)])),
                *(name for name, _ in pins),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        versions: dict[str, str | None] = json.loads(answer.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return (whole, Check("interpreter", ok=False, detail=f"{found.python} does not run: {error}"))
    wrong = [
        f"{name}: {versions[name] or 'absent'}, not {version}"
        for name, version in pins
        if (versions[name] or "").partition("+")[0] != version
    ]
    return (
        whole,
        Check("interpreter", ok=True, detail=str(found.python)),
        Check("packages", not wrong, "; ".join(wrong) or f"{len(versions)} packages as pinned"),
        *(_examine(found, part) for part in found.lock.parts),
    )


def _examine(found: EnvironmentStatus, part: Part) -> Check:
    name = f"part {part.name}"
    if part.name in found.lacking:
        return Check(name, ok=True, detail=found.lacking[part.name])
    if not part.imports:
        return Check(name, ok=True, detail="installed")
    if wrong := _not_importable(found, part):
        mend = (
            f"delete {found.part_path(part.name)} and run `conformance targets install {found.spec}`, which "
            "installs the part anew; if it stays, the part needs something that this machine lacks"
        )
        return Check(name, ok=False, detail=f"{wrong}; {mend}")
    return Check(name, ok=True, detail=f"installed; {len(part.imports)} modules of it can be imported")


def _not_importable(found: EnvironmentStatus, part: Part) -> str:
    """What goes wrong where the modules of a part are imported; empty if nothing does."""
    worker = WorkerTarget(
        found.spec,
        python=found.python,
        adapter=imports.__name__,
        timeout=_IMPORT_TIMEOUT,
        environment={imports.VARIABLE: " ".join(part.imports)},
        import_paths=found.import_paths,
    )
    try:
        raised = worker.describe().environment
    except (WorkerDiedError, TargetTimeoutError) as error:
        begun = [line for line in error.stderr_tail.splitlines() if line.startswith(imports.BEGINNING)]
        return f"{begun[-1] if begun else 'importing its modules'}: {error}"
    except ConformanceError as error:
        return str(error)
    finally:
        worker.close()
    failed = {name: " ".join(what.split())[:_SHOWN] for name, what in raised.items() if what}
    return "; ".join(f"{name} cannot be imported: {what}" for name, what in failed.items())
