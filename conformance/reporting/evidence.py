"""The parts of a case page: differences, chunks, annotated input, answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, get_args

from markupsafe import Markup

from conformance.loading import resolve_tools
from conformance.reporting.diff import Sides, compare
from conformance.reporting.signs import Status
from conformance.reporting.text import HUGE_TEXT, shorten, visible
from conformance.reporting.values import Field, as_text, fields, is_empty, laid_out
from conformance.reporting.view import Case, Entry
from conformance.results import ModuleError, ParityEvidence, Problem, StreamEvidence
from conformance.suites import ParserCase
from conformance.targets.protocol import Chunking, Span

_MANY_CHUNKS = 400
_ALIKE = 0.3
_ROLES: tuple[str, ...] = get_args(Span.model_fields["role"].annotation)


@dataclass(frozen=True)
class Comparison:
    """One field of what was expected against the same field of what came."""

    name: str
    sides: Sides


@dataclass(frozen=True)
class Chunks:
    """A chunking, drawn."""

    caption: str
    parts: tuple[Markup, ...]
    hidden: int


@dataclass(frozen=True)
class ProblemView:
    """A broken rule, drawn."""

    problem: Problem
    comparisons: list[Comparison]
    agreeing: list[str]
    expected: list[Field]
    got: list[Field]
    """Only where the two cannot be compared field by field."""
    chunks: Chunks | None


def problem_view(problem: Problem) -> ProblemView:
    """Draw a problem: a comparison where both sides are of one shape, else one after the other."""
    expected, got = problem.expected, problem.got
    comparisons: list[Comparison] = []
    agreeing: list[str] = []
    apart = False
    if isinstance(expected, dict) and isinstance(got, dict):
        for name in [*expected, *(key for key in got if key not in expected)]:
            left, right = expected.get(name), got.get(name)
            if is_empty(left) and is_empty(right):
                continue
            if as_text(left) == as_text(right):
                agreeing.append(str(name))
            else:
                comparisons.append(_compared(str(name), left, right))
    elif _comparable(expected, got) and _alike(whole := _compared("", expected, got), expected, got):
        comparisons.append(whole)
    else:
        apart = not (is_empty(expected) and is_empty(got))
    return ProblemView(
        problem,
        comparisons,
        agreeing,
        fields(expected) if apart else [],
        fields(got) if apart else [],
        _chunks(problem),
    )


def _comparable(expected: Any, got: Any) -> bool:
    if expected is None or got is None:
        return False
    text = isinstance(expected, str) and isinstance(got, str)
    lists = isinstance(expected, list | tuple) and isinstance(got, list | tuple)
    return (text or lists) and as_text(expected) != as_text(got)


def _alike(comparison: Comparison, expected: Any, got: Any) -> bool:
    """Whether marking differences helps: a part that a longer text should hold is not like it."""
    return comparison.sides.shared >= _ALIKE * max(len(as_text(expected)), len(as_text(got)))


def _compared(name: str, left: Any, right: Any) -> Comparison:
    signs = isinstance(left, str) or isinstance(right, str)
    quarter = HUGE_TEXT // 4
    a, b = (shorten(as_text(value), quarter)[0] for value in (left, right))
    return Comparison(name, compare(a, b, signs=signs))


def _chunks(problem: Problem) -> Chunks | None:
    if problem.chunks is None and problem.chunking is None:
        return None
    texts = problem.chunks or ()
    parts = tuple(visible(shorten(text)[0]) for text in texts[:_MANY_CHUNKS])
    return Chunks(_chunk_caption(problem.chunking, len(texts)), parts, len(texts) - len(parts))


def _chunk_caption(chunking: Chunking | None, chunks: int) -> str:
    count = f"{chunks} {'chunk' if chunks == 1 else 'chunks'}"
    if chunking is None:
        return count
    number = len(chunking.cuts) + 1
    said = [chunking.name]
    if chunking.cuts:
        said.append(f"{number} chunks")
        shown = ", ".join(map(str, chunking.cuts[:12])) + (", …" if len(chunking.cuts) > 12 else "")
        said.append(f"cut after {chunking.unit.removesuffix('s')} {shown}")
    if chunking.lag:
        said.append(f"text {chunking.lag} characters behind its token ids")
    return "; ".join(said)


@dataclass(frozen=True)
class Stretch:
    """A part of the input with what became of it; `role` is empty where the target says nothing."""

    html: Markup
    role: str
    reason: str


@dataclass(frozen=True)
class Annotated:
    """The input cut into stretches, or why the target's spans could not be drawn."""

    stretches: list[Stretch]
    refused: str = ""


def annotate(text: str, spans: Any) -> Annotated | None:
    """Cut the input along a target's spans; None if it gave none."""
    if spans is None:
        return None
    if not isinstance(spans, list | tuple):
        return Annotated([], "they are not a list")
    stretches: list[Stretch] = []
    at = 0
    for number, span in enumerate(spans):
        bounds = _bounds(span, at, len(text))
        if isinstance(bounds, str):
            return Annotated([], f"span {number} {bounds}")
        start, end = bounds
        if start > at:
            stretches.append(Stretch(visible(text[at:start], ends=False), "", ""))
        role = str(span.get("role"))
        html = visible(text[start:end], starts=start == 0 or text[start - 1] == "\n", ends=end == len(text))
        stretches.append(Stretch(html, role if role in _ROLES else "other", str(span.get("reason") or "")))
        at = end
    if at < len(text):
        stretches.append(Stretch(visible(text[at:]), "", ""))
    return Annotated(stretches)


def _bounds(span: Any, at: int, length: int) -> tuple[int, int] | str:
    if not isinstance(span, dict):
        return "is not a mapping"
    start, end = span.get("start"), span.get("end")
    if not (type(start) is int and type(end) is int):
        return "has no integer start and end"
    if not at <= start < end <= length:
        return f"covers [{start}, {end}), which is empty, overlaps the one before, or leaves the input"
    return start, end


@dataclass(frozen=True)
class StreamView:
    """How far streaming was explored, in words."""

    evidence: StreamEvidence
    exponent: int | None
    """The number of chunkings is 2 to this power."""
    chunkings: str


def stream_view(evidence: StreamEvidence | None) -> StreamView | None:
    """Put a stream's evidence into words."""
    if evidence is None:
        return None
    digits = evidence.chunkings
    exponent = evidence.pieces - 1
    # Past this the decimal form is too long to print, and Python refuses to make it.
    power = 0 <= exponent <= 4_000 and digits == str(2**exponent)
    if len(digits) > 30:
        number = f"a number of {len(digits)} digits"
    else:
        number = (
            f"{int(digits):,}".replace(",", "\u2009") if digits.isascii() and digits.isdigit() else digits
        )
    return StreamView(evidence, exponent if power else None, number)


@dataclass(frozen=True)
class ModuleRow:
    """One module's distance from the oracle's, drawn."""

    error: ModuleError
    sign: Status
    first: bool
    """It is the first one that differs."""
    relative: str
    maximum: str


@dataclass(frozen=True)
class ParityView:
    """A comparison with an oracle, drawn."""

    evidence: ParityEvidence
    passes: str
    """How the tokens were fed."""
    settings: list[tuple[str, str, str]]
    """Setting, what the target ran, what the oracle ran."""
    rows: list[ModuleRow]
    differing: int


def parity_view(evidence: ParityEvidence | None) -> ParityView | None:
    """Put a comparison with an oracle into words and rows."""
    if evidence is None:
        return None
    first = evidence.first
    rows = [
        ModuleRow(
            error,
            "fail" if error.rule else "pass",
            error is first,
            *("" if value is None else f"{value:.2e}" for value in (error.relative, error.maximum)),
        )
        for error in evidence.modules
    ]
    mine, theirs = evidence.effective, evidence.oracle_effective
    settings = [(name, mine.get(name, ""), theirs.get(name, "")) for name in sorted({*mine, *theirs})]
    return ParityView(
        evidence,
        _passes(evidence),
        settings,
        rows,
        sum(error.rule != "" for error in evidence.modules),
    )


def _passes(evidence: ParityEvidence) -> str:
    """`rows of 40 and 9 tokens, 5 at once and then one by one`."""
    lengths = [str(length) for length in evidence.rows]
    listed = " and ".join([", ".join(lengths[:-1]), lengths[-1]] if len(lengths) > 1 else lengths)
    rows = f"{'rows' if len(lengths) > 1 else 'a row'} of {listed} {'token' if listed == '1' else 'tokens'}"
    if evidence.prefill is None:
        return f"{rows}, each in one call"
    return f"{rows}, {evidence.prefill} at once and then one by one"


@dataclass(frozen=True)
class AnswerView:
    """An accepted answer of a contested case, and the targets that gave it."""

    name: str
    who: str
    fields: list[Field]
    given_by: list[Entry]


def answers(case: Case) -> list[AnswerView]:
    """The accepted answers of a contested case, from its suite or else from the evidence."""
    given: dict[str, list[Entry]] = {}
    for entry in case.entries:
        if entry.result is not None and entry.result.evidence.policy is not None:
            given.setdefault(entry.result.evidence.policy, []).append(entry)
    listed: list[dict[str, Any]] = []
    if case.loaded is not None and isinstance(case.loaded.case, ParserCase):
        listed = [answer.model_dump() for answer in case.loaded.case.policy or ()]
    else:
        recorded = first_evidence(case, "expected")
        if isinstance(recorded, list | tuple):
            listed = [answer for answer in recorded if isinstance(answer, dict) and "name" in answer]
    views = [
        AnswerView(
            str(answer["name"]),
            str(answer.get("who") or ""),
            fields(answer, skip=("name", "who")),
            given.pop(str(answer["name"]), []),
        )
        for answer in listed
    ]
    return views + [AnswerView(name, "", [], entries) for name, entries in given.items()]


def request(case: Case) -> list[Field]:
    """What a target is told beside the input: tools, switches, and what the case asks for beyond `expect`."""
    if case.loaded is None:
        return []
    given = case.loaded.case
    told: dict[str, Any] = {
        name: value
        for name in _REQUEST
        if name in given.model_fields_set and (value := getattr(given, name)) is not None
    }
    if tools := resolve_tools(given, case.loaded.suite.suite):
        # Every tool has the same wrapper, which says nothing.
        told["tools"] = [t.get("function", t) for t in tools]
    return fields(told)


_REQUEST = (
    "thinking",
    "preserve_thinking",
    "add_generation_prompt",
    "families",
    "tool_choice",
    "response_schema",
    "max_tokens",
    "stop",
    "top_logprobs",
    "cut",
    "beside",
    "copies",
    "override",
    "produces",
    "keep",
    "allow_markers",
    "stream_exempt",
    "attention",
    "long_blocks",
    "form",
    "image_budget",
    "frame_budget",
    "sample_frames",
    "extra_placeholders",
    "soft_tokens",
    "refused",
    "factor",
)


def first_evidence(case: Case, name: str) -> Any:
    """What the first target with a result recorded under this name; None if nobody did."""
    for entry in case.entries:
        if entry.result is not None:
            value = getattr(entry.result.evidence, name)
            if not is_empty(value):
                return value
    return None


def input_text(case: Case) -> str:
    """The input of a case; conversations are JSON and set out on lines."""
    text = str(first_evidence(case, "input") or "")
    if case.kind != "parser" and text[:1] in ("[", "{"):
        try:
            return laid_out(json.loads(text), fit=True, sort=False)
        except (ValueError, RecursionError):
            return text
    return text
