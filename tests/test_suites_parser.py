"""Every parser suite fails the liars that its subject should expose, and passes the reference."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from conformance import resources
from conformance.checks import judge
from conformance.loading import LoadedSuite, load_suites
from conformance.suites import ParserCase, ParserSuite
from tests import lying_parsers as liars
from tests.lying_parsers import WHOLE_LIARS, Liar, WholeLiar

SUITES = [suite for suite in load_suites([resources.suites_dir()]) if isinstance(suite.suite, ParserSuite)]

# Lies that a suite must notice by its subject; a new suite must be noticed by some lie at least.
SUITABLE: dict[str, set[type[WholeLiar]]] = defaultdict(
    set,
    {
        "parser/interleaving": {liars.DropsTextAfterCall, liars.ReasoningInContent, liars.FirstCallOnly},
        "parser/markers": {liars.LeaksMarker, liars.DropsTextAfterCall, liars.KeepsLabel},
        "parser/nesting": {liars.FlattensArguments},
        "parser/policies": {liars.LeaksMarker, liars.Silent},
        "parser/policies-calls": {liars.ArgumentsNotJson, liars.LeaksMarker, liars.Silent},
        "parser/policies-mentions": {liars.LeaksMarker, liars.Silent},
        "parser/prompt-state": {liars.IgnoresPrompt, liars.KeepsLabel},
        "parser/reasoning": {liars.ReasoningInContent, liars.KeepsLabel, liars.LosesLastCharacter},
        "parser/recovery": {liars.NotationOnly, liars.ArgumentsNotJson},
        "parser/recovery-cut": {liars.NotationOnly, liars.Silent},
        "parser/recovery-delimiters": {liars.NotationOnly, liars.CutsStrings},
        "parser/strings": {liars.CutsStrings},
        "parser/strings-keys": {liars.CutsKeys},
        "parser/tool-calls": {liars.FirstCallOnly, liars.DropsTextAfterCall},
        "parser/tool-calls-names": {liars.WordNamesOnly},
        "parser/typing": {liars.StringsOnly, liars.IgnoresTools},
        "parser/typing-composed": {liars.StringsOnly, liars.IgnoresTools, liars.FlattensArguments},
        "parser/typing-schema": {liars.StringsOnly, liars.IgnoresTools},
    },
)


def failing(suite: LoadedSuite, target: Any) -> list[str]:
    assert isinstance(suite.suite, ParserSuite)
    return [c.case.id for c in suite.cases if judge(c.case, suite.suite, target).verdict != "pass"]


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.suite.id)
def test_every_suite_catches_liars(suite: LoadedSuite) -> None:
    caught = {liar for liar in WHOLE_LIARS if failing(suite, liar(streams=False))}
    assert caught, "no lie fails this suite, so it tests nothing"
    missed = SUITABLE[suite.suite.id] - caught
    assert not missed, "these lies should fail it"


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.suite.id)
def test_every_suite_catches_a_liar_in_streams(suite: LoadedSuite) -> None:
    """Streams are explored in every suite, whatever it is about."""
    target = liars.RaisesAtBoundary(searchable=False)
    assert isinstance(suite.suite, ParserSuite)
    with_markers = [
        c.case for c in suite.cases if isinstance(c.case, ParserCase) and "<|" in str(c.case.output)
    ]
    assert with_markers
    for case in with_markers[:2]:
        assert "raised" in [p.rule for p in judge(case, suite.suite, target).problems]


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.suite.id)
def test_the_reference_passes_every_suite(suite: LoadedSuite) -> None:
    """Whole answers; `pytest suites/` checks its streams."""
    target = Liar(streams=False)
    assert failing(suite, target) == []
