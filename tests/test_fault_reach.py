"""Which cases a fault can change: told from the functions that they run without it."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace as replaced_field
from unittest import mock

import pytest

from conformance import expectations
from conformance.commands.selection import select
from conformance.faults import evaluation, reach, registry
from conformance.faults.base import Fault, replace
from conformance.faults.cleanly import Clean
from conformance.faults.run import REQUEST_SECONDS, failures
from conformance.runner import TargetPool
from model_impl.chat import parser, render
from model_impl.chat.parser import Parser

pytestmark = pytest.mark.xdist_group("fault-reach")  # its fixtures take long: one process makes them

CASES = (
    "parser/reasoning::basic-block",
    "template/turns::one-user-turn",
    "template/turns::one-bos",
    "mask/text::*",
    "contract/stages::*",
    "processor/image-sizes::*-at-70",
    "lora/e2b::attention",
    "generation/scripted::batch",
    "generation/scripted::cut",
    "generation/scripted::tensor-parallel",
    "scoring/answers::letters",
    "scoring/answers::refused",
    "scoring/questions::bare",
)


def fault(*patches: object) -> Fault:
    return replaced_field(registry()["label-kept"], patches=patches)


@pytest.fixture(scope="module")
def clean() -> Clean:
    return Clean.of(select(CASES, quick=True).cases)


def names(clean: Clean, address: str) -> set[str]:
    return {clean.functions[place] for place in clean.passed[address]}


def test_a_case_runs_what_its_kind_asks_for(clean: Clean) -> None:
    parsing = names(clean, "parser/reasoning::basic-block")
    assert "model_impl.chat.parser:Parser.__init__" in parsing
    assert not any(name.startswith("model_impl.chat.render:") for name in parsing)
    assert clean.left_out == {}


def test_what_is_kept_between_calls_hides_nothing(clean: Clean) -> None:
    """The template is compiled once in a process, and yet each case that renders is known to need it."""
    kept = {
        f"{function.__module__}:{function.__qualname__}"
        for function in vars(render).values()
        if isinstance(function, functools._lru_cache_wrapper)
    }
    assert kept
    first, second = (names(clean, address) for address in CASES[1:3])
    assert first & kept == second & kept != set()
    # Nor what the harness keeps: prompts of the scripted checkpoint, which the template makes.
    first, second = (names(clean, f"generation/scripted::{case}") for case in ("batch", "cut"))
    assert first & kept == second & kept != set()


@pytest.mark.parametrize("fault", evaluation.faults.faults, ids=lambda fault: fault.id)
def test_faults_of_the_evaluation_are_asked_of_cases_that_evaluate(clean: Clean, fault: Fault) -> None:
    replaced = reach.replaced(fault)
    assert replaced is not None
    scores = names(clean, "scoring/answers::letters") | names(clean, "scoring/questions::bare")
    scores |= names(clean, "scoring/answers::refused")
    assert reach.can_reach(replaced, frozenset(scores))
    assert not reach.can_reach(replaced, frozenset(names(clean, "parser/reasoning::basic-block")))


def test_what_runs_in_other_processes_can_be_changed_by_anything(clean: Clean) -> None:
    some = frozenset({"model_impl.chat.parser:Parser.finish"})
    assert not reach.can_reach(some, frozenset({"model_impl.text:TextModel.forward"}))
    assert reach.can_reach(some, some)
    assert reach.can_reach(None, frozenset())
    ranks = frozenset(names(clean, "generation/scripted::tensor-parallel"))
    assert reach.can_reach(some, ranks)
    # Not by what it runs in this process.
    assert not reach.can_reach(
        some, frozenset(name for name in ranks if ".parallel.group:" not in name) - some
    )


def test_functions_are_told_whatever_stands_around_them() -> None:
    class Sub(Parser):
        pass

    feed = "model_impl.chat.parser:Parser.feed"
    assert reach.replaced(fault(replace(Parser, "feed", None))) == {feed}
    assert reach.replaced(fault(replace(Sub, "feed", None))) == {feed}
    both = reach.replaced(fault(replace(Parser, "feed", None), replace(parser, "parse", None)))
    assert both == {feed, "model_impl.chat.parser:parse"}


@pytest.mark.parametrize(
    "patch",
    [
        replace(parser, "Parser", None),  # a class
        replace(parser, "__doc__", None),  # a value
        replace(mock, "patch", None),  # somebody else's function
        lambda: mock.patch.object(parser, "not_there", None, create=True),
        lambda: mock.patch.dict(parser.__dict__, {}),
        lambda: contextlib.nullcontext(),
    ],
)
def test_of_anything_else_nothing_is_told(patch: object) -> None:
    assert reach.replaced(fault(patch)) is None
    assert reach.replaced(fault(replace(Parser, "feed", None), patch)) is None


def test_most_faults_replace_functions() -> None:
    unknown = [fault.id for fault in registry().values() if reach.replaced(fault) is None]
    assert len(unknown) <= len(registry()) / 10, unknown


@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("label-flushed-at-end", 1),
        ("double-bos", 2),
        ("window-one-more", 20),
        ("never-scaled-up", 3),
        ("residual-in-payload", 10),
        ("turn-closed-early", 3),
        ("alpha-ignored", 2),
    ],
)
def test_a_case_that_cannot_be_changed_is_not(clean: Clean, name: str, some: int) -> None:
    """The cases that are left out pass with the fault on, in an order and with caches of their own."""
    chosen = select(CASES, quick=True)
    asked = {case.address for case in clean.reaching(registry()[name], chosen.cases)}
    others = [case for case in chosen.cases if case.address not in asked]
    assert len(asked) >= some
    assert len(others) >= some
    known = expectations.beside(chosen.suites)
    reach.forget()
    with contextlib.closing(TargetPool(timeout=REQUEST_SECONDS)) as pool, registry()[name].applied():
        assert failures(others, known, pool) == []
    reach.forget()
