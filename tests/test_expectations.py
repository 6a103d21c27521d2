"""Known failures: strict, sourced, and for a range of versions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from conformance import expectations, resources
from conformance.checks.base import CheckOutcome
from conformance.errors import SuiteError
from conformance.expectations import Expectation, Expectations, common_version
from conformance.loading import load_suites
from conformance.results import Problem, Verdict
from conformance.runner import apply_expectation
from tests.conftest import ROOT, Suites

ENTRY = """\
  - cases: [parser/demo::case-hello]
    versions: ">=0.24,<0.33"
    rules: [expected]
    reason: The label stays.
    source: R02
    repeat: conformance run parser/demo::case-hello
    review: 2099-01-01
"""


@pytest.fixture
def demo(suites: Suites) -> Suites:
    suites.write("hello", "hallo", "other")
    return suites


def load(suites: Suites, text: str, target: str = "vllm") -> Expectations:
    suites.expect(text, target)
    return expectations.load(load_suites([suites.root]))


@pytest.mark.parametrize(
    ("version", "holds"),
    [
        ("0.23.9", False),
        ("0.24", True),
        ("0.32.1", True),
        ("0.33.0rc1", False),
        ("0.33.0", False),
        ("?", False),
    ],
)
def test_holds_for_its_case_target_and_versions(demo: Suites, version: str, holds: bool) -> None:
    known = load(demo, ENTRY)
    assert (known.find("parser/demo::case-hello", "vllm", version) is not None) is holds
    assert known.find("parser/demo::case-hallo", "vllm", version) is None
    assert known.find("parser/demo::case-hello", "sglang-parsers", version) is None


def test_without_versions_it_holds_for_every_one(demo: Suites) -> None:
    known = load(demo, ENTRY.replace('    versions: ">=0.24,<0.33"\n', ""))
    assert known.find("parser/demo::case-hello", "vllm", "no version at all") is not None


def test_where_and_pattern(demo: Suites) -> None:
    known = load(demo, ENTRY.replace("case-hello]", "case-h*]"))
    assert known.all[0].where == "suites/expectations/vllm.yaml:3"
    assert known.all[0].addresses == {"parser/demo::case-hello", "parser/demo::case-hallo"}


BROKEN = {
    "unknown key": (
        ENTRY.replace("rules:", "rule:"),
        r":5: expectations\[0\]\.rule: unknown key; did you mean `rules`",
    ),
    "no such case": (
        ENTRY.replace("case-hello]", "case-gone]"),
        r":3: .*cases\[0\]: 'parser/demo::case-gone' matches no",
    ),
    "no such pattern": (ENTRY.replace("case-hello]", "nothing*]"), r":3: .* matches no case"),
    "needless pattern": (ENTRY.replace("case-hello]", "case-hel*]"), r":3: .*matches one case only; write"),
    "range": (
        ENTRY.replace(">=0.24,<0.33", "0.24-0.33"),
        r":4: expectations\[0\]\.versions: .*write a range like",
    ),
    "text equality": (ENTRY.replace(">=0.24,<0.33", "===0.24"), r":4: .*`===` compares text"),
    "no rules": (ENTRY.replace("[expected]", "[]"), r":5: expectations\[0\]\.rules: "),
    "no source": (ENTRY.replace("    source: R02\n", ""), r":3: .*`source` is required"),
    "source": (ENTRY.replace("R02", "somewhere"), r":7: expectations\[0\]\.source: "),
    "review": (ENTRY.replace("2099-01-01", "soon"), r":9: expectations\[0\]\.review: "),
    "finding": (ENTRY + "    finding: F1\n", r":10: expectations\[0\]\.finding: "),
    "overlap": (
        ENTRY + ENTRY.replace(">=0.24,<0.33", ">=0.32"),
        r":10: .*case-hello at version 0\.32 is also named by",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_names_file_line_and_field(demo: Suites, name: str) -> None:
    text, message = BROKEN[name]
    with pytest.raises(SuiteError, match=message) as caught:
        load(demo, text)
    assert "suites/expectations/vllm.yaml:" in str(caught.value)


def test_disjoint_ranges_of_one_case_are_fine(demo: Suites) -> None:
    known = load(demo, ENTRY + ENTRY.replace(">=0.24,<0.33", ">=0.33").replace("The label", "Its label"))
    found = known.find("parser/demo::case-hello", "vllm", "0.40")
    assert found is not None
    assert found.entry.reason == "Its label stays."


def test_file_name_and_target_must_agree(demo: Suites) -> None:
    demo.expect(ENTRY, "vllm").rename(demo.root / "expectations" / "sglang.yaml")
    with pytest.raises(SuiteError, match=r"sglang\.yaml:1: target: 'vllm' must equal"):
        expectations.load(load_suites([demo.root]))


def test_a_past_review_only_warns(demo: Suites) -> None:
    assert not load(demo, ENTRY).overdue()
    known = load(demo, ENTRY.replace("2099", "2020"))
    (note,) = known.overdue()
    assert note.startswith("suites/expectations/vllm.yaml:3: review was due on 2020-01-01")
    assert known.find("parser/demo::case-hello", "vllm", "0.25") is not None


def outcome(verdict: Verdict, *rules: str) -> CheckOutcome:
    problems = tuple(Problem(rule=rule, message="broken") for rule in rules)
    return CheckOutcome(verdict, problems)


@pytest.mark.parametrize(
    ("given_", "rules", "verdict", "reason"),
    [
        (outcome("fail", "expected"), "[expected]", "xfail", "The label stays."),
        (
            outcome("fail", "expected"),
            "[expected, indices]",
            "xpass",
            "no longer breaks what .* expects: indices",
        ),
        (outcome("fail", "expected", "indices"), "[expected]", "fail", "more than .*:3 expects: indices"),
        (outcome("pass"), "[expected]", "xpass", "passes, but .*vllm.yaml:3 expects it to fail"),
        (outcome("skip"), "[expected]", "skip", ""),
        (outcome("inconclusive"), "[expected]", "inconclusive", ""),
        (outcome("error"), "[expected]", "error", "breaks more than .* expects: error"),
        (outcome("error"), "[error]", "xfail", "The label stays."),
        (outcome("timeout"), "[error]", "timeout", "expects: timeout"),
    ],
)
def test_strictness(demo: Suites, given_: CheckOutcome, rules: str, verdict: str, reason: str) -> None:
    known = load(demo, ENTRY.replace("[expected]", rules)).all[0]
    result = apply_expectation(given_, known)
    assert result.verdict == verdict
    assert re.search(reason, result.reason)


VERSIONS = st.sampled_from(["0.19", "0.20.1", "0.24", "0.24.1", "0.32.0", "1.0"])
RANGES = st.lists(
    st.tuples(st.sampled_from(["<", "<=", ">", ">=", "==", "!=", "~="]), VERSIONS), max_size=3
).map(lambda parts: ",".join(operator + version for operator, version in parts))
PROBES = [Version(f"{a}.{b}.{c}") for a in (0, 1) for b in range(35) for c in range(3)]


@given(first=RANGES, second=RANGES)
def test_overlap_agrees_with_trying_every_version(first: str, second: str) -> None:
    sets = SpecifierSet(first), SpecifierSet(second)
    tried = [v for v in PROBES if all(s.contains(v, prereleases=True) for s in sets)]
    found = common_version(first, second)
    if found is not None:
        assert all(s.contains(found, prereleases=True) for s in sets)
    assert found is not None or not tried


def test_bundled_expectations_load_and_name_real_findings_and_targets() -> None:
    from conformance.targets import registry

    known = expectations.load(load_suites())
    names = {spec.partition("@")[0] for spec in registry.known_targets()}
    assert {entry.target for entry in known.all} <= names
    findings = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8") if any_finding(known.all) else ""
    for entry in known.all:
        if entry.entry.finding is not None:
            assert f"## {entry.entry.finding}" in findings, entry.where


def any_finding(known: tuple[Expectation, ...]) -> bool:
    return any(entry.entry.finding is not None for entry in known)


def test_the_bundled_folder_says_how_to_write_one() -> None:
    folder = resources.suites_dir() / "expectations"
    assert (folder / "README.md").is_file()
    assert all(path.suffix in (".yaml", ".md") for path in Path(folder).iterdir())
