"""Engine environments: one virtual environment per target and version, made from a lock file.

`<home>/environments/<target>-<version>/` where home is `CONFORMANCE_HOME` or the user's cache folder.

1. A lock file pins every package. It is installed without dependencies, except what its header names
   (torch), whose own dependencies depend on the build that the machine's index offers.
2. An environment is built in a sibling folder and renamed when complete, so one that is there is whole.
   Renaming breaks only the scripts in `bin/`, which nothing here uses: engines run as
   `bin/python -m …`, and that the interpreter works is checked after the rename.
3. A stamp holds the digest of the lock. When the lock changes, the environment is stale and is made anew.
4. An older release is an overlay: its lock file names the environment it is laid over and pins the engine's
   own package, which is installed without dependencies into a folder of its own. It is imported before
   what the base environment holds.
5. A lock file may have parts: what follows a line `# part: NAME` is pinned beside the rest, and installed,
   without dependencies, into a folder of its own inside the environment. A part comes and goes without
   touching what is there: an environment is ready without its parts.
6. One installer at a time per environment, by a file lock. What an interrupted one left is swept away.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import filelock
import platformdirs

import conformance
from conformance.errors import TargetError
from conformance.targets.lockfile import Lock, Part, read_lock
from conformance.targets.packages import Progress, pip_install, run

LOCKS = Path(__file__).with_name("locks")
_STAMP = "conformance-environment.json"
_PACKAGES = "packages"
"""Folder of an overlay that is imported from."""
_PARTS = "parts"
"""Folder of an environment that holds those of its parts."""
_HOOKS = Path(conformance.__file__).parent / "worker" / "hooks"
"""Imported from together with a part: what mends its packages in every process of the engine."""
_SPACE_MARGIN = 1.3
"""Free space asked for, relative to the environment's size: pip unpacks before it installs."""

State = Literal["missing", "ready", "stale", "broken"]


@dataclass(frozen=True)
class EnvironmentStatus:
    """One environment, installed or not."""

    lock: Lock
    state: State
    path: Path
    reason: str
    """Why it is not ready, and what to do; empty when it is."""
    megabytes: int
    """As measured at its installation, with its parts; from the lock file when it is not installed."""
    seconds: int
    parts: tuple[str, ...] = ()
    """Those that are installed."""

    @property
    def spec(self) -> str:
        """`vllm@0.32.0`."""
        return self.lock.spec

    @property
    def python(self) -> Path:
        """Its interpreter; that of the base for an overlay."""
        return _python(_path(self.lock.overlay_of) if self.lock.overlay_of else self.path)

    @property
    def import_paths(self) -> tuple[Path, ...]:
        """Folders to import from before all that the interpreter knows of."""
        if self.lock.overlay_of:
            return (self.path / _PACKAGES,)
        parts = [self.part_path(part.name) for part in self.lock.parts if part.name in self.parts]
        return (_HOOKS, *parts) if parts else ()

    def part_path(self, name: str) -> Path:
        """Folder of one of its parts, installed or not."""
        return _part_path(self.path, name)

    @property
    def lacking(self) -> dict[str, str]:
        """Parts that are not installed, each with what to do about it."""
        command = f"conformance targets install {self.spec}"
        return {
            part.name: f"part `{part.name}` of its environment is not installed; run `{command}` "
            f"({_cost(part)})"
            for part in self.lock.parts
            if part.name not in self.parts
        }


def home() -> Path:
    """Where environments live.

    Raises:
        TargetError: `CONFORMANCE_HOME` is relative.
    """
    named = os.environ.get("CONFORMANCE_HOME")
    if not named:
        return platformdirs.user_cache_path("gemma4-conformance", appauthor=False)
    path = Path(named).expanduser()
    if not path.is_absolute():
        raise TargetError(f"CONFORMANCE_HOME is {named!r}, a relative path; give an absolute one")
    return path


# ------------------------------------------------------------------------------------------- lock files


def locks() -> tuple[Lock, ...]:
    """Every lock file of the package, by target and version.

    Raises:
        TargetError: one is broken, or laid over something that is no environment of the same target.
    """
    found = tuple(read_lock(path) for path in sorted(LOCKS.glob("*.txt")))
    alone = {(lock.target, lock.spec) for lock in found if not lock.overlay_of}
    for lock in found:
        if lock.overlay_of and (lock.target, lock.overlay_of) not in alone:
            raise TargetError(
                f"{lock.path}: overlay-of names {lock.overlay_of!r}, which must be another environment of "
                f"{lock.target} and no overlay itself"
            )
    return found


def find_lock(spec: str) -> Lock:
    """The lock file for `target@version`.

    Raises:
        TargetError: there is none.
    """
    known = locks()
    for lock in known:
        if lock.spec == spec:
            return lock
    names = ", ".join(lock.spec for lock in known) or "none"
    raise TargetError(f"there is no environment for {spec!r}; environments exist for: {names}")


# ----------------------------------------------------------------------------------------------- status


def environments() -> tuple[EnvironmentStatus, ...]:
    """Every environment there is a lock for."""
    return tuple(_status(lock) for lock in locks())


def status(spec: str) -> EnvironmentStatus:
    """State of one environment.

    Raises:
        TargetError: there is no lock for it.
    """
    return _status(find_lock(spec))


def _path(spec: str) -> Path:
    return home() / "environments" / spec.replace("@", "-")


def _status(lock: Lock) -> EnvironmentStatus:
    path = _path(lock.spec)
    stamp = _read_stamp(path)
    command = f"conformance targets install {lock.spec}"
    state: State = "ready"
    reason = ""
    if not path.exists():
        state = "missing"
        reason = f"its environment is not installed; run `{command}` ({_cost(lock)})"
    elif stamp is None or not (path / _PACKAGES if lock.overlay_of else _python(path)).exists():
        state = "broken"
        reason = f"its environment at {path} is incomplete or lost its interpreter; run `{command}`"
    elif stamp["digest"] != lock.digest:
        state = "stale"
        reason = f"its environment was made from another lock file; run `{command}` ({_cost(lock)})"
    elif lock.overlay_of and (base := status(lock.overlay_of)).state != "ready":
        state = base.state
        reason = f"it is laid over {base.spec}, and {base.reason}"
    measured = stamp or {"megabytes": lock.megabytes, "seconds": lock.seconds}
    parts = _installed_parts(path, lock)
    return EnvironmentStatus(
        lock=lock,
        state=state,
        path=path,
        reason=reason,
        megabytes=int(measured["megabytes"]) + sum(int(part["megabytes"]) for part in parts.values()),
        seconds=int(measured["seconds"]) + sum(int(part["seconds"]) for part in parts.values()),
        parts=tuple(parts),
    )


def _installed_parts(path: Path, lock: Lock) -> dict[str, dict[str, str | int]]:
    """The stamps of those that are there and up to date."""
    stamps = ((part, _read_stamp(_part_path(path, part.name))) for part in lock.parts)
    return {part.name: stamp for part, stamp in stamps if stamp and stamp["digest"] == part.digest}


def _part_path(environment: Path, name: str) -> Path:
    return environment / _PARTS / name


def _cost(of: Lock | Part) -> str:
    return f"about {of.megabytes} MB and {of.seconds} s"


def _read_stamp(path: Path) -> dict[str, str | int] | None:
    try:
        stamp = json.loads((path / _STAMP).read_text(encoding="utf-8"))
        known = {key: stamp[key] for key in ("digest", "megabytes", "seconds")}
        return known | {"python": stamp.get("python", "")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _python(path: Path) -> Path:
    return path / "bin" / "python"


# -------------------------------------------------------------------------------------------- installing


def install(spec: str, progress: Progress = lambda line: None, *, parts: bool = True) -> EnvironmentStatus:
    """Make an environment, unless it is there and up to date. Safe to interrupt and to repeat.

    Args:
        spec: `target@version`.
        progress: Called with one line at a time.
        parts: Install its parts too. Otherwise those that are there stay, also when it is made anew.

    Raises:
        TargetError: no lock, a platform it does not support, too little space, or pip failed.
    """
    return install_lock(find_lock(spec), progress, parts=parts)


def install_lock(lock: Lock, progress: Progress, *, parts: bool = True) -> EnvironmentStatus:
    """As `install`, from a lock that need not be one of the package's files."""
    _check_platform(lock)
    if lock.overlay_of:
        install(lock.overlay_of, progress, parts=False)
    folder = home() / "environments"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TargetError(
            f"{folder}: cannot be created ({error.strerror}); set CONFORMANCE_HOME to a folder of yours"
        ) from error
    with _installer_lock(folder, lock, progress):
        _sweep(folder, lock)
        found = _status(lock)
        wanted = [part for part in lock.parts if parts or part.name in found.parts]
        if found.state == "ready" and len(found.parts) == len(wanted):
            progress(f"{lock.spec} is installed at {found.path}")
            return found
        if found.state != "ready":
            _check_space(folder, lock.spec, lock.megabytes + sum(part.megabytes for part in wanted))
            _build(found.path, lock, progress)
        for part in wanted:
            if part.name not in _status(lock).parts:
                _check_space(folder, f"part {part.name!r} of {lock.spec}", part.megabytes)
                _add_part(found.path, lock, part, progress)
    return _status(lock)


def remove(spec: str) -> bool:
    """Delete an environment, and what interrupted installers of it left; tell whether there was one.

    Raises:
        TargetError: there is no lock for it.
    """
    lock = find_lock(spec)
    path = _status(lock).path
    if not path.parent.exists():
        return False
    with _installer_lock(path.parent, lock, lambda line: None):
        _sweep(path.parent, lock)
        there = path.exists()
        _discard(path)
    return there


@contextlib.contextmanager
def _installer_lock(folder: Path, lock: Lock, progress: Progress) -> Iterator[None]:
    held = filelock.FileLock(folder / f".{lock.target}-{lock.version}.lock")
    try:
        held.acquire(timeout=0)
    except filelock.Timeout:
        progress(f"waiting for another process that installs or removes {lock.spec}")
        held.acquire()
    try:
        yield
    finally:
        held.release()


def _check_platform(lock: Lock) -> None:
    here = f"{platform.system().lower()}-{platform.machine().lower()}"
    if lock.platform and lock.platform != here:
        raise TargetError(f"{lock.spec} runs on {lock.platform} only; this is {here}")
    minor = f"{sys.version_info.major}.{sys.version_info.minor}"
    if lock.pythons and minor not in lock.pythons:
        raise TargetError(
            f"{lock.spec} has packages for Python {', '.join(lock.pythons)}; this is {minor}: "
            "install the harness under one of those"
        )


def _check_space(folder: Path, what: str, megabytes: int) -> None:
    needed = int(megabytes * _SPACE_MARGIN)
    free = shutil.disk_usage(folder).free // 1_000_000
    if free < needed:
        raise TargetError(
            f"{folder}: {what} needs {needed} MB of free space and there are {free} MB; "
            "make room, or set CONFORMANCE_HOME to a folder on another disk"
        )


def _sweep(folder: Path, lock: Lock) -> None:
    """Delete what interrupted installers left; the installer lock is held."""
    # Of this version alone: what follows 0.19 in the name of 0.19.1's is no process id.
    name = re.compile(re.escape(f".{lock.target}-{lock.version}.") + r"\d+(-old)?\.partial")
    lefts = [
        *(left for left in folder.glob(".*.partial") if name.fullmatch(left.name)),
        *(_path(lock.spec) / _PARTS).glob(".*.partial"),
    ]
    for left in lefts:
        _discard(left)


def _discard(path: Path) -> None:
    """Delete a folder; rename it first, so that a half-deleted environment never bears its name."""
    if path.exists():
        shutil.rmtree(path if path.name.endswith(".partial") else _set_aside(path))


def _set_aside(path: Path) -> Path:
    return path.rename(path.with_name(f".{path.name}.{os.getpid()}-old.partial"))


def _keep_parts(old: Path, new: Path, lock: Lock) -> None:
    """Move the parts of an environment that is made anew; what is in them depends on the Python alone."""
    stamp = _read_stamp(old)
    minor = f"{sys.version_info.major}.{sys.version_info.minor}."
    if stamp is not None and str(stamp["python"]).startswith(minor):
        for name in _installed_parts(old, lock):
            (new / _PARTS).mkdir(exist_ok=True)
            _part_path(old, name).rename(_part_path(new, name))


def _build(path: Path, lock: Lock, progress: Progress) -> None:
    started = time.monotonic()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    progress(f"making the environment of {lock.spec} at {path} ({_cost(lock)})")
    try:
        if lock.overlay_of:
            _install_overlay(partial / _PACKAGES, lock, progress)
        else:
            run(
                [sys.executable, "-m", "venv", str(partial)],
                f"{lock.spec}: making a virtual environment",
                progress,
            )
            _install_packages(_python(partial), partial, lock, progress)
        stamp = _write_stamp(partial, lock.digest, started)
        _keep_parts(path, partial, lock)
        # It takes the old one's place before that is deleted, which is slow and can be interrupted.
        old = _set_aside(path) if path.exists() else None
        partial.rename(path)
        if old is not None:
            shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    try:
        python = str(_status(lock).python)
        run([python, "-c", "import sys"], f"{lock.spec}: starting its interpreter", progress)
    except BaseException:
        _discard(path)
        raise
    progress(f"{lock.spec} is ready: {stamp['megabytes']} MB in {stamp['seconds']} s")


def _add_part(path: Path, lock: Lock, part: Part, progress: Progress) -> None:
    """Install a part of an environment that is ready."""
    started = time.monotonic()
    place = _part_path(path, part.name)
    partial = place.with_name(f".{part.name}.{os.getpid()}.partial")
    progress(f"adding part {part.name!r} to {lock.spec} ({_cost(part)})")
    try:
        partial.mkdir(parents=True)
        pins = [f"{name}=={version}" for name, version in part.pins]
        what = f"{lock.spec}, part {part.name!r}"
        pip_install(_python(path), ["--no-deps", "--target", str(partial), *pins], what, progress)
        stamp = _write_stamp(partial, part.digest, started)
        _discard(place)
        partial.rename(place)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    progress(f"part {part.name!r} of {lock.spec} is ready: {stamp['megabytes']} MB in {stamp['seconds']} s")


def _write_stamp(folder: Path, digest: str, started: float) -> dict[str, str | int]:
    stamp: dict[str, str | int] = {
        "digest": digest,
        "python": platform.python_version(),
        "megabytes": _size(folder) // 1_000_000,
        "seconds": round(time.monotonic() - started),
    }
    (folder / _STAMP).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
    return stamp


def _install_packages(python: Path, scratch: Path, lock: Lock, progress: Progress) -> None:
    free = [f"{name}=={version}" for name, version in lock.pins if name in lock.with_dependencies]
    rest = scratch / "requirements.txt"
    rest.write_text(
        "".join(f"{name}=={version}\n" for name, version in lock.pins if name not in lock.with_dependencies),
        encoding="utf-8",
    )
    if free:
        progress(f"installing {', '.join(free)} with dependencies")
        pip_install(python, ["--constraint", str(lock.path), *free], lock.spec, progress)
    progress(f"installing {len(lock.pins) - len(free)} pinned packages")
    pip_install(python, ["--no-deps", "--requirement", str(rest)], lock.spec, progress)
    rest.unlink()


def _install_overlay(folder: Path, lock: Lock, progress: Progress) -> None:
    pins = [f"{name}=={version}" for name, version in lock.pins]
    progress(f"installing {', '.join(pins)} over {lock.overlay_of}")
    python = _python(_path(lock.overlay_of))
    pip_install(python, ["--no-deps", "--target", str(folder), *pins], lock.spec, progress)


def _size(folder: Path) -> int:
    return sum(entry.lstat().st_size for entry in folder.rglob("*") if not entry.is_dir())
