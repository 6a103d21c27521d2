"""Where each fault is, as it was set down before the fault's first recorded run (`places.yaml`).

An entry says what would be right to find: the class of the catalogue, the area of the dashboard, the part and
the module of the bundled implementation, and the lowest level at which a case must notice it.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, StringConstraints, model_validator

from conformance import yamlfile
from conformance.faults.base import Fault
from conformance.suitebase import CaseId, Strict

Level = Literal["unit", "layer", "model", "score"]
"""How much of an implementation a case runs, the least first."""
LEVELS: tuple[Level, ...] = get_args(Level)
LEVEL_OF_KIND: dict[str, Level] = {
    "parser": "unit",
    "template": "unit",
    "processor": "unit",
    "mask": "layer",
    "parity": "layer",
    "contract": "layer",
    "lora": "model",
    "generation": "model",
    "invariance": "model",
    "server": "model",
    "scoring": "score",
    "accuracy": "score",
}
"""By the kind of a suite: one function; single modules of a model; a model's answers; the scores of many."""

Class = Literal[
    "reasoning-parser",
    "tool-call-parser",
    "template",
    "architecture",
    "multimodal",
    "parallelism",
    "speculation",
    "lora",
    "caches",
    "evaluation",
]
"""The classes of the fault catalogue."""
CLASSES: tuple[Class, ...] = get_args(Class)

Layer = Literal[
    "chat",
    "preprocess",
    "layers",
    "text",
    "towers",
    "lora",
    "parallel",
    "runtime",
    "speculative",
    "evaluation",
]
"""Part of the bundled implementation, or the evaluation, which is the harness's own."""

_PACKAGE = "model_impl."
_HARNESS = "conformance."
_Module = Annotated[str, StringConstraints(pattern=r"^[a-z_]+(\.[a-z_]+|\.\*)*$")]


def full_module(name: str) -> str:
    """`chat.parser` as `model_impl.chat.parser`; modules of the harness have their full names."""
    return name if name.startswith(_HARNESS) else _PACKAGE + name


class Place(Strict):
    """Where some faults are."""

    class_: Class = Field(alias="class")
    area: CaseId
    layer: Layer
    level: Level
    module: _Module
    """Without the name of the package, where it is the implementation's."""
    faults: tuple[CaseId, ...] = Field(min_length=1)

    @property
    def full_module(self) -> str:
        """`model_impl.chat.parser`."""
        return full_module(self.module)


class Places(Strict):
    """What `places.yaml` holds."""

    title: str
    points_at: dict[CaseId, tuple[_Module, ...]]
    places: tuple[Place, ...]

    @model_validator(mode="after")
    def _areas_and_faults(self) -> Self:
        unknown = {place.area for place in self.places} - self.points_at.keys()
        if unknown:
            raise ValueError(f"points_at lacks the areas {', '.join(sorted(unknown))}")
        counts = Counter(fault for place in self.places for fault in place.faults)
        twice = [name for name, count in counts.items() if count > 1]
        if twice:
            raise ValueError(f"these faults stand in two places: {', '.join(sorted(twice))}")
        return self

    @cached_property
    def by_fault(self) -> dict[str, Place]:
        """The place of each fault."""
        return {fault: place for place in self.places for fault in place.faults}

    def points_to(self, area: str, module: str) -> bool:
        """Whether a failing case of an area points at a module, by its full name."""
        short = module.removeprefix(_PACKAGE)
        return any(fnmatch.fnmatchcase(short, pattern) for pattern in self.points_at.get(area, ()))


@cache
def places() -> Places:
    """The places of all faults.

    Raises:
        SuiteError: the file is wrong.
    """
    return yamlfile.read(Path(__file__).with_name("places.yaml")).validate(Places)


def misplaced(fault: Fault) -> str:
    """What is wrong with the entry of a fault; empty if nothing is."""
    place = places().by_fault.get(fault.id)
    if place is None:
        return "has no entry in conformance/faults/places.yaml; add it before the fault is first run"
    for name, written, found in (
        ("area", place.area, fault.area),
        ("module", place.full_module, fault.module),
        ("level", place.level, LEVEL_OF_KIND[fault.kind]),
    ):
        if written != found:
            return f"is of the {name} {found}, and places.yaml says {written}"
    return ""
