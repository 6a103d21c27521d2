"""What the synthetic runs are put together from. Nothing here was measured on an engine."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

from conformance.results import (
    Evidence,
    Footer,
    Header,
    PlannedCase,
    Problem,
    Result,
    Run,
    Verdict,
)
from conformance.targets.protocol import TargetInfo

STARTED = "2026-11-21T03:44:10+00:00"

TARGETS = {
    "reference": TargetInfo(
        name="reference",
        version="0.1.0",
        capabilities=("parse", "parse_stream", "certify", "render"),
        environment={"python": "3.11.9", "tokenizers": "0.22.1"},
        note="model_impl.chat.parser, in process",
    ),
    "vllm@0.32.0": TargetInfo(
        name="vllm",
        version="0.32.0",
        capabilities=("parse", "parse_stream", "certify"),
        environment={"python": "3.11.9", "torch": "2.13.0", "transformers": "5.19.0"},
        note="vllm.parser.gemma4.Gemma4Parser",
    ),
    "sglang-parsers@0.8.1": TargetInfo(
        name="sglang-parsers",
        version="0.8.1",
        capabilities=("parse", "parse_stream"),
        stream_unit="characters",
        environment={"python": "3.11.9", "llm-router-utils": "0.8.1"},
        note="Gemma4Detector and ReasoningParser",
    ),
    "transformers@5.19.0": TargetInfo(
        name="transformers",
        version="5.19.0",
        capabilities=("render",),
        environment={"python": "3.11.9", "transformers": "5.19.0", "jinja2": "3.1.6"},
        note="AutoTokenizer.apply_chat_template",
    ),
}


def result(
    plan: PlannedCase,
    verdict: Verdict,
    *,
    reason: str = "",
    problems: tuple[Problem, ...] = (),
    evidence: Evidence | None = None,
    expectation: str | None = None,
    stderr: str = "",
    duration: float = 0.012,
    repeat: str | None = None,
) -> Result:
    """A result of a planned case."""
    return Result(
        suite=plan.suite,
        case=plan.case,
        target=plan.target,
        kind=plan.kind,
        area=plan.area,
        verdict=verdict,
        reason=reason,
        problems=problems,
        evidence=evidence or Evidence(),
        expectation=expectation,
        stderr=stderr,
        duration=duration,
        digest=plan.digest,
        repeat=repeat or f"conformance run --target {plan.target} --case '{plan.suite}::{plan.case}'",
    )


def header(manifest: tuple[PlannedCase, ...], **changes: Any) -> Header:
    """A header; anything can be changed."""
    values: dict[str, Any] = {
        "run_id": "20261121-034410-5f2c",
        "started": STARTED,
        "harness": "0.1.0",
        "commit": "4d1a9c07e2b1+dirty",
        "argv": ("conformance", "run", "--target", "reference", "--target", "vllm@0.32.0"),
        "targets": TARGETS,
        "environment": {
            "python": "3.11.9",
            "platform": "Linux-6.8-x86_64",
            "cpu_count": "2",
            "pydantic": "2.14.3",
        },
        "manifest": manifest,
    }
    return Header(**{**values, **changes})


def finished(head: Header, results: list[Result], duration: float = 48.2) -> Run:
    """A run with a footer that agrees with its results."""
    counts: dict[str, dict[str, int]] = {}
    for spec, group in itertools.groupby(sorted(results, key=lambda r: r.target), key=lambda r: r.target):
        counts[spec] = dict(Counter(r.verdict for r in group))
    footer = Footer(finished="2026-11-21T03:44:58+00:00", duration=duration, counts=counts, exit_code=1)
    return Run(header=head, results=tuple(results), footer=footer)
