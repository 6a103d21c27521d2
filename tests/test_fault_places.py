"""Where faults are is written down for each of them, and agrees with what they patch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from conformance import yamlfile
from conformance.errors import SuiteError
from conformance.faults import registry
from conformance.faults.places import LEVEL_OF_KIND, Places, misplaced, places
from conformance.loading import load_suites

HEAD = "title: demo title\npoints_at: {reasoning: [chat.parser]}\nplaces:\n"
PLACE = (
    "  - {class: lora, area: reasoning, layer: chat, level: unit, module: chat.parser, faults: [one-fault]}\n"
)


def read(folder: Path, text: str) -> Places:
    path = folder / "places.yaml"
    path.write_text(text, encoding="utf-8")
    return yamlfile.read(path).validate(Places)


def test_every_fault_has_an_entry_that_agrees_with_it_and_there_are_no_others() -> None:
    faults = registry()
    assert {name: misplaced(fault) for name, fault in faults.items() if misplaced(fault)} == {}
    assert places().by_fault.keys() == faults.keys()


def test_every_fault_can_be_pointed_at() -> None:
    known = places()
    for fault in registry().values():
        assert fault.where or known.points_to(fault.area, fault.module), fault.id


def test_every_module_that_is_pointed_at_belongs_to_some_fault() -> None:
    modules = {place.full_module for place in places().places}
    for area, patterns in places().points_at.items():
        for pattern in patterns:
            one = Places(title="demo", points_at={area: (pattern,)}, places=())
            assert any(one.points_to(area, name) for name in modules), f"{area}: {pattern}"


def test_every_kind_of_suite_has_a_level() -> None:
    assert {suite.suite.kind for suite in load_suites()} <= LEVEL_OF_KIND.keys()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"id": "never-written-down"}, "has no entry"),
        ({"area": "typing"}, "is of the area typing, and places.yaml says reasoning"),
        ({"module": "model_impl.text"}, "is of the module model_impl.text"),
        ({"kind": "parity"}, "is of the level layer"),
    ],
)
def test_an_entry_that_is_missing_or_wrong_is_told(change: dict[str, str], says: str) -> None:
    assert says in misplaced(replace(registry()["label-kept"], **change))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (HEAD + PLACE.replace("reasoning", "typing"), "points_at lacks the areas typing"),
        (HEAD + PLACE * 2, "these faults stand in two places: one-fault"),
        (HEAD + PLACE.replace("unit", "units"), "level"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, says: str) -> None:
    assert read(tmp_path, HEAD + PLACE).by_fault.keys() == {"one-fault"}
    with pytest.raises(SuiteError, match=says):
        read(tmp_path, text)


def test_modules_are_named_without_their_package() -> None:
    assert places().by_fault["label-kept"].full_module == "model_impl.chat.parser"
    assert places().points_to("template", "model_impl.chat.render")
    assert not places().points_to("template", "model_impl.chat.parser")
    assert not places().points_to("no-such-area", "model_impl.chat.parser")
