"""Lock files: what the environment of an engine is made of.

`<target>-<version>.txt` has a pin `name==version` on a line, and fields in comments (`# size: 100 MB`).
After a line `# part: NAME` follow the pins of something that the environment can have besides, with a size
and a time of their own, and in lines `# imports: NAME NAME` the modules that show that it works.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from conformance.errors import TargetError

_PIN = re.compile(r"^(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[^\s;]+)$")
_FIELD = re.compile(
    r"^# (?P<key>with-dependencies|overlay-of|adapter|python|platform|size|time|imports): (?P<value>.+)$"
)
_PART = re.compile(r"^# part: (?P<name>[a-z][a-z0-9-]*)$")


@dataclass(frozen=True)
class Part:
    """What an environment can have besides."""

    name: str
    digest: str
    pins: tuple[tuple[str, str], ...]
    megabytes: int = 0
    """Size on disk, roughly."""
    seconds: int = 0
    """Time to install, roughly."""
    imports: tuple[str, ...] = ()
    """Modules that can be imported where it works."""


@dataclass(frozen=True)
class Lock:
    """What an environment is made of."""

    target: str
    version: str
    path: Path
    digest: str
    pins: tuple[tuple[str, str], ...]
    """Package names with their versions."""
    with_dependencies: tuple[str, ...] = ()
    """Packages installed with their own dependencies."""
    pythons: tuple[str, ...] = ()
    """Minor versions of CPython it is known to work on; empty: any."""
    platform: str = ""
    """`linux-x86_64`, when it works nowhere else."""
    megabytes: int = 0
    """Size on disk, roughly."""
    seconds: int = 0
    """Time to install, roughly; mostly that of the download."""
    overlay_of: str = ""
    """Spec of the environment that this one is laid over; empty for one that stands alone."""
    adapter: str = ""
    """Module in `conformance.worker.adapters` that drives this release; empty for the engine's usual one."""
    parts: tuple[Part, ...] = ()
    """Of which its digest, size and time know nothing."""

    @property
    def spec(self) -> str:
        """`vllm@0.32.0`."""
        return f"{self.target}@{self.version}"


class _Section(NamedTuple):
    """A stretch of a lock file: its text, fields and pins."""

    lines: list[str]
    fields: dict[str, str]
    pins: list[tuple[str, str]]

    @property
    def text(self) -> str:
        return "\n".join(self.lines).rstrip() + "\n"


def read_lock(path: Path) -> Lock:
    """Read one.

    Raises:
        TargetError: it is broken; says where.
    """
    target, _, version = path.stem.rpartition("-")
    sections = _sections(path)
    (_, main), *parts = sections.items()
    free = tuple(main.fields.get("with-dependencies", "").replace(",", " ").split())
    if not target or not main.pins or not set(free) <= {name for name, _ in main.pins}:
        raise TargetError(
            f"{path}: expected a file `<target>-<version>.txt` with at least one pin, and pins for every "
            "package under `with-dependencies`"
        )
    base = main.fields.get("overlay-of", "")
    if base and parts:
        raise TargetError(f"{path}: an overlay has no parts; pin its packages with the rest")
    return Lock(
        target=target,
        version=version,
        path=path,
        digest=overlay_digest(base, main.pins) if base else _digest(main.text),
        pins=tuple(main.pins),
        with_dependencies=free,
        pythons=tuple(main.fields.get("python", "").split()),
        platform=main.fields.get("platform", ""),
        megabytes=_number(path, main.fields.get("size", "0 MB")),
        seconds=_number(path, main.fields.get("time", "0 s")),
        overlay_of=base,
        adapter=main.fields.get("adapter", ""),
        parts=tuple(
            Part(
                name=name,
                digest=_digest("\n".join(f"{package}=={version}" for package, version in part.pins)),
                pins=tuple(part.pins),
                megabytes=_number(path, part.fields.get("size", "0 MB")),
                seconds=_number(path, part.fields.get("time", "0 s")),
                imports=_modules(path, part.fields.get("imports", "")),
            )
            for name, part in parts
        ),
    )


def _sections(path: Path) -> dict[str, _Section]:
    """What stands before the first part, under an empty name, and each part under its own.

    Raises:
        TargetError: a line, or a part, is no good.
    """
    section = _Section([], {}, [])
    sections = {"": section}
    pinned: set[str] = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        part, field, pin = _PART.match(line), _FIELD.match(line), _PIN.match(line)
        if part:
            if part["name"] in sections:
                raise TargetError(f"{path}:{number}: a second part {part['name']!r}; give it another name")
            section = sections[part["name"]] = _Section([], {}, [])
        elif field:
            earlier = section.fields.get("imports", "") if field["key"] == "imports" else ""
            section.fields[field["key"]] = f"{earlier} {field['value']}".strip()
        elif pin:
            if pin["name"] in pinned:
                raise TargetError(f"{path}:{number}: {pin['name']} is pinned twice; leave one out")
            pinned.add(pin["name"])
            section.pins.append((pin["name"], pin["version"]))
        elif line.strip() and not line.startswith("#"):
            raise TargetError(f"{path}:{number}: expected `name==version` or a comment, found {line!r}")
        section.lines.append(line)
    for name, section in sections.items():
        if name and not section.pins:
            raise TargetError(f"{path}: part {name!r} has no pin; add one, or leave the part out")
        if name and not section.fields.keys() <= {"size", "time", "imports"}:
            raise TargetError(
                f"{path}: part {name!r} has fields besides `size`, `time` and `imports`; leave them out"
            )
        if not name and "imports" in section.fields:
            raise TargetError(f"{path}: only a part has `imports`; move the line behind one's `# part: NAME`")
    return sections


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def overlay_digest(base: str, pins: Sequence[tuple[str, str]]) -> str:
    """Digest of what the installation of an overlay depends on; it tells whether it is up to date."""
    return _digest("\n".join([base, *(f"{name}=={version}" for name, version in pins)]))


def _modules(path: Path, field: str) -> tuple[str, ...]:
    names = tuple(field.split())
    for name in names:
        if not all(piece.isidentifier() for piece in name.split(".")):
            raise TargetError(f"{path}: expected names of modules under `imports`, found {name!r}")
    return names


def _number(path: Path, field: str) -> int:
    head = field.split()[0]
    if not head.isdecimal():
        raise TargetError(f"{path}: expected a number with its unit, found {field!r}")
    return int(head)
