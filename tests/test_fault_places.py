"""Where faults are is written down for each of them, and agrees with what they patch."""

from __future__ import annotations

import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from conformance import yamlfile
from conformance.errors import SuiteError
from conformance.faults import record, registry, written
from conformance.faults.places import (
    CLASSES,
    LEVEL_OF_KIND,
    LEVELS,
    Places,
    full_module,
    misplaced,
    places,
)
from conformance.faults.pointers import Pointer, Pointers, pointers
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


def test_every_class_has_five_faults() -> None:
    """A class with fewer stands here with the reason."""
    exempt: dict[str, str] = {}
    count = Counter(places().by_fault[name].class_ for name in registry())
    assert count.keys() == set(CLASSES)
    assert {name for name in CLASSES if count[name] < 5} == exempt.keys()
    assert len(CLASSES) == 10, "as many as the catalogue has"


def test_every_level_has_faults() -> None:
    assert {place.level for place in places().places} == set(LEVELS)


def test_every_module_that_a_case_points_at_belongs_to_some_fault() -> None:
    modules = {place.full_module for place in places().places}
    suites = load_suites()
    areas = {suite.suite.area for suite in suites}
    addresses = [(case.suite.suite.area, case.address) for case in suites.cases]
    for pointer in pointers().pointers:
        assert {full_module(name) for name in pointer.modules} <= modules, pointer
        assert set(pointer.areas) <= areas, pointer
        assert any(pointer.fits(area, case, pointer.rules) for area, case in addresses), f"{pointer}: no case"


def test_the_first_pointer_that_fits_counts() -> None:
    table = Pointers(
        title="demo",
        pointers=(
            Pointer(areas=("masks",), rules=("window",), modules=("runtime.masks",)),
            Pointer(areas=("masks",), cases="mask/images::*", modules=("config", "text")),
            Pointer(areas=("scoring-answers",), modules=("conformance.scoring",)),
        ),
    )
    assert table.modules("masks", "mask/images::one", ("window",)) == ("model_impl.runtime.masks",)
    assert table.modules("masks", "mask/images::one", ("future",)) == ("model_impl.config", "model_impl.text")
    assert table.modules("masks", "mask/text::one", ("future",)) == ()
    assert table.modules("scoring-answers", "scoring/answers::x", ()) == ("conformance.scoring",)
    with pytest.raises(ValidationError, match="at most 3"):
        Pointer(areas=("masks",), modules=("a", "b", "c", "d"))


# ----------------------------------------------------------------------------------- written down before


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=demo", "-c", "user.email=demo@example.invalid")
    return subprocess.run(
        ["git", *identity, "-C", str(folder), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_a_place_is_written_down_when_it_is_committed_as_it_is(tmp_path: Path) -> None:
    place = read(tmp_path, HEAD + PLACE).by_fault["one-fault"]
    file = tmp_path / "conformance" / "faults" / "places.yaml"
    file.parent.mkdir(parents=True)
    assert written.unwritten({"one-fault": place}, root=tmp_path) == [], "no checkout can be asked"
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", "none")
    first = git(tmp_path, "rev-parse", "HEAD")
    file.write_text(HEAD + PLACE)
    git(tmp_path, "add", "conformance")
    assert written.unwritten({"one-fault": place}, root=tmp_path) == ["one-fault"], "in the tree alone"
    git(tmp_path, "commit", "--quiet", "--message", "places")
    assert written.unwritten({"one-fault": place}, root=tmp_path) == []
    moved = place.model_copy(update={"level": "model"})
    assert written.unwritten({"one-fault": moved}, root=tmp_path) == ["one-fault"]
    assert written.at(first, tmp_path) == {}
    assert written.at("0" * 40, tmp_path) is None


def test_places_stood_in_the_commit_of_the_first_run() -> None:
    """As git has it, and as it is today: what was found has moved none that is not told of here."""
    mended: dict[str, str] = {}
    """Faults whose place was changed after their first run, and why."""
    known = record.read(record.default_path()).faults
    told = {}
    for found in known:
        if found.fault in places().by_fault and found.first.commit is not None:
            told[found.fault] = written.at(found.first.commit.removesuffix("+dirty"))
    if any(entries is None for entries in told.values()):
        pytest.skip("this clone lacks commits of first runs")
    assert told.keys() == {found.fault for found in known}
    assert all(name in (entries or {}) for name, entries in told.items())
    moved = {
        name
        for name, entries in told.items()
        if not written.agrees(places().by_fault[name], (entries or {}).get(name))
    }
    assert moved == mended.keys()


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
