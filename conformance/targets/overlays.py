"""Lock files of overlays: other releases of an engine, laid over the environment of one that is locked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from packaging.version import InvalidVersion, Version

from conformance.errors import TargetError
from conformance.targets import environments, registry
from conformance.targets.lockfile import Lock, overlay_digest
from conformance.targets.packages import Progress

_TEXT = """\
# Overlay of target {spec}: this release of the engine over the packages of another.
# overlay-of: {base}
{adapter}# size: {megabytes} MB
# time: {seconds} s

{pins}
"""
_EXTRA = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*==[^\s;=]+$")


def add(
    spec: str, *, extra: Sequence[str] = (), adapter: str = "", progress: Progress = lambda line: None
) -> Path:
    """Install a release as an overlay, and write the lock file of what was installed.

    The base is the newest environment of the target that stands alone. Nothing is written if the
    installation fails.

    Args:
        spec: `target@version`.
        extra: Further pins, `name==version`, for what this release imports and the base lacks.
        adapter: Module in `conformance.worker.adapters`, where the engine's usual one does not fit.
        progress: Called with one line at a time.

    Raises:
        TargetError: the release is locked already, does not exist, or cannot be installed.
    """
    lock = _overlay(spec, extra, adapter)
    found = environments.install_lock(lock, progress)
    lock.path.write_text(
        _TEXT.format(
            spec=spec,
            base=lock.overlay_of,
            adapter=f"# adapter: {adapter}\n" if adapter else "",
            megabytes=max(found.megabytes, 1),
            seconds=max(found.seconds, 1),
            pins="\n".join(f"{name}=={version}" for name, version in lock.pins),
        ),
        encoding="utf-8",
    )
    return lock.path


def _overlay(spec: str, extra: Sequence[str], adapter: str) -> Lock:
    name, _, version = spec.partition("@")
    known = registry.releases(name)
    try:
        Version(version)
    except InvalidVersion:
        raise TargetError(f"{spec!r}: expected a target and a version, such as {known[-1]}") from None
    if spec in known:
        raise TargetError(f"{spec} is locked already; install it by `conformance targets install {spec}`")
    wrong = [pin for pin in extra if not _EXTRA.match(pin)]
    if wrong:
        raise TargetError(f"{wrong[0]!r}: expected a pin `name==version`")
    base = environments.find_lock(registry.resolve(name))
    # The first pin of a lock file is the engine's own package.
    pins = [(base.pins[0][0], version), *((pin.partition("==")[0], pin.partition("==")[2]) for pin in extra)]
    return Lock(
        target=name,
        version=version,
        path=environments.LOCKS / f"{name}-{version}.txt",
        digest=overlay_digest(base.spec, pins),
        pins=tuple(pins),
        pythons=base.pythons,
        platform=base.platform,
        overlay_of=base.spec,
        adapter=adapter,
    )
