"""Mask suites: an honest target passes all, and each fails the liars that its subject should expose."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance import resources
from conformance.checks import judge
from conformance.checks.visibility import Visibility
from conformance.loading import LoadedCase, load_suites
from conformance.oracles import Oracles
from conformance.suites import MaskCase, MaskSuite
from tests import lying_masks as liars
from tests.lying_masks import LIARS, Honest

torch.set_num_threads(1)

SUITES = {
    suite.suite.id: suite
    for suite in load_suites([resources.suites_dir()])
    if isinstance(suite.suite, MaskSuite)
}

OPEN: set[type[Honest]] = {
    liars.OpensFullLayers,
    liars.NeverOpens,
    liars.OpensDelimiters,
    liars.CrossesTheWindow,
    liars.WindowTooLong,
    liars.WindowTooShort,
}
MODES: set[type[Honest]] = {liars.DropsLongImages, liars.ClampsTheFuture}
ASKED: set[type[Honest]] = {liars.ClampsDropped, liars.NeverClampsTheFuture}

# Lies that a suite must notice, by its subject.
SUITABLE: dict[str, set[type[Honest]]] = {
    "mask/text": {liars.WindowTooLong, liars.WindowTooShort, liars.LastLayerSlides, liars.SeesPadding},
    "mask/images": {
        *(OPEN - {liars.CrossesTheWindow}),
        liars.OpensFullLayersUpToTheWindow,
        liars.ClampsFullLayers,
        liars.MergesNeighbours,
        liars.ForgetsTheWindow,
        liars.LastLayerSlides,
        liars.SeesPadding,
    },
    "mask/long-images": {*OPEN, *MODES, *ASKED, liars.ClampsFullLayers, liars.MergesNeighbours},
    "mask/videos-and-sounds": {
        *OPEN,
        *MODES,
        liars.ClampsDropped,
        liars.OpensSounds,
        liars.MergesNeighbours,
        liars.ClampsFullLayers,
    },
    "mask/causal-images": {
        liars.OpensEverywhere,
        liars.OpensSounds,
        liars.WindowTooLong,
        liars.WindowTooShort,
        liars.ForgetsTheWindow,
    },
    "mask/unified": {
        *OPEN,
        *MODES,
        *ASKED,
        liars.OpensSounds,
        liars.MergesNeighbours,
        liars.OpensFullLayersUpToTheWindow,
        liars.ClampsFullLayers,
    },
}


@pytest.fixture(scope="module")
def oracles() -> Iterator[Oracles]:
    """The liars read nothing of a checkpoint but its configuration."""

    def write(config: dict[str, Any], folder: Path, seed: int) -> None:
        (folder / "config.json").write_text(json.dumps(config))

    def nobody(spec: str) -> Any:
        raise AssertionError(f"no other engine may be asked, not {spec}")

    made = Oracles(nobody, write)
    yield made
    made.close()


def longest(case: LoadedCase, oracles: Oracles) -> int:
    """Tokens of its longest row."""
    assert isinstance(case.suite.suite, MaskSuite)
    assert isinstance(case.case, MaskCase)
    config = case.suite.suite.configs[case.case.config]
    return max(map(len, oracles.prompts(case.case.rows, config).rows))


def test_every_suite_is_listed() -> None:
    assert set(SUITABLE) == set(SUITES)
    assert set().union(*SUITABLE.values()) == set(LIARS), "a lie that no suite has to notice"


@pytest.mark.parametrize("suite", SUITES)
def test_an_honest_target_passes(suite: str, oracles: Oracles) -> None:
    for case in SUITES[suite].cases:
        outcome = judge(case.case, SUITES[suite].suite, Honest(), oracles=oracles)
        assert outcome.verdict == "pass", (case.address, outcome.problems)


@pytest.mark.parametrize("suite", SUITES)
def test_liars_are_caught_by_the_rules_of_their_lies(suite: str, oracles: Oracles) -> None:
    broken: dict[type[Honest], set[str]] = {liar: set() for liar in LIARS}
    for case in SUITES[suite].cases:
        if longest(case, oracles) > 250:
            continue  # takes long; what a lie does with large images it also does with small ones
        for liar in LIARS:
            found = judge(case.case, SUITES[suite].suite, liar(), oracles=oracles)
            broken[liar] |= {problem.rule for problem in found.problems}
    for liar, rules in broken.items():
        assert rules <= liar.rules, liar.__name__
        assert rules or liar not in SUITABLE[suite], f"{liar.__name__} should fail {suite}"


def cites(source: str) -> list[LoadedCase]:
    """Cases that name a source, but for those that only show where the bug does no harm."""
    return [
        case
        for case in load_suites([resources.suites_dir()]).cases
        if isinstance(case.case, MaskCase) and source in case.case.source and not case.case.control_of
    ]


@pytest.mark.parametrize(
    ("source", "liar"),
    [
        ("M05", liars.NeverOpens),
        ("M06", liars.DropsLongImages),
        ("M07", liars.CrossesTheWindow),
        ("huggingface/transformers#46711", liars.CrossesTheWindow),
        ("vllm-project/vllm#47217", liars.DropsLongImages),
        ("M10", liars.OpensEverywhere),
        ("spec 12.10", liars.WindowTooLong),
    ],
)
def test_a_case_that_cites_a_bug_fails_by_it(source: str, liar: type[Honest], oracles: Oracles) -> None:
    found = cites(source)
    assert found
    for case in found:
        outcome = judge(case.case, case.suite.suite, liar(), oracles=oracles)
        assert {problem.rule for problem in outcome.problems} & liar.rules, case.address


def test_every_backend_is_asked_for_and_others_than_the_usual_one_for_long_images_too() -> None:
    def asked(*suites: str) -> set[str | None]:
        cases = [case for suite in suites for case in SUITES[suite].suite.cases]
        return {case.attention for case in cases if isinstance(case, MaskCase)}

    assert asked(*SUITES) == {None, "eager", "sdpa", "flex"}
    assert asked("mask/long-images") >= {"eager", "flex"}


def test_the_lies_of_the_catalogue_have_a_rule_of_their_own() -> None:
    """What breaks a rule first is not taken for something else."""
    own = {
        liars.OpensFullLayers: "full-layer",
        liars.ClampsFullLayers: "full-window",
        liars.DropsLongImages: "long-block",
        liars.ClampsTheFuture: "future-clamp",
        liars.CrossesTheWindow: "block-window",
        liars.MergesNeighbours: "merged-blocks",
        liars.OpensEverywhere: "causal-model",
        liars.OpensSounds: "sound",
        liars.WindowTooShort: "window",
    }
    assert len(set(own.values())) == len(own)
    for liar, rule in own.items():
        assert liar.rules == {rule}


def test_images_are_as_long_as_the_cases_say(oracles: Oracles) -> None:
    """Else a case about an image that just fits the window is about something else."""
    suite = SUITES["mask/long-images"].suite
    assert isinstance(suite, MaskSuite)
    for case in suite.cases:
        rule = Visibility.of(suite.configs[case.config])
        row = oracles.prompts(case.rows, suite.configs[case.config]).blocks[0]
        lengths = [row.count(block) for block in sorted(set(row) - {-1})]
        if case.id.endswith("one-token-more"):
            assert lengths == [rule.window + 1]
        elif case.id.endswith("as-long-as-the-window"):
            assert lengths == [rule.window]
        elif case.id.endswith("many-windows"):
            assert lengths[0] > 5 * rule.window
        elif case.id.endswith(("beside-one-that-fits", "flex-attention")):
            assert lengths[0] > rule.window >= lengths[1]
