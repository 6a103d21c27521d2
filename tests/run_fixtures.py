"""Synthetic runs for the tests of the dashboard. Nothing here was measured on an engine."""

from __future__ import annotations

from conformance.results import (
    Evidence,
    PlannedCase,
    Problem,
    Result,
    Run,
    StreamEvidence,
    Verdict,
)
from conformance.targets.protocol import Chunking, TargetInfo
from tests.run_parts import TARGETS, finished, header, result
from tests.run_realistic import realistic_run, realistic_suites

__all__ = [
    "big_run",
    "empty_run",
    "hostile_run",
    "killed_run",
    "realistic_run",
    "realistic_suites",
    "wide_run",
]

HOSTILE = [
    "<script>document.title='owned'</script>",
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    '"><svg onload="document.title=\'owned\'">',
    "' onmouseover='document.title=1' x='",
    "</pre></details></section><style>body{display:none}</style>",
    "{{ 7 * 7 }} {% raw %} &lt;b&gt;",
    "javascript:document.title='owned'",
    "\u202egnp.exe \u2066isolate\u2069 zero\u200bwidth",
    "nul\x00 bell\x07 escape\x1b[31mred\x1b[0m c1\x85 del\x7f",
    "lone \ud83d surrogate, nonchar \ufffe, line\u2028separator",
    "<!-- --> ]]> <![CDATA[",
]


def killed_run() -> Run:
    """The realistic run, ended after 300 results in the middle of a line."""
    run = realistic_run()
    return Run(header=run.header, results=run.results[:300], footer=None, torn="line 302 ends in the middle")


def empty_run() -> Run:
    """Nothing was planned and no target was usable."""
    return finished(
        header((), targets={}, unavailable={"vllm@0.32.0": "its environment is not installed"}), []
    )


def wide_run(targets: int) -> Run:
    """The same few cases on any number of targets."""
    base = realistic_run()
    specs = [f"engine-{n}@1.{n}.0" for n in range(targets)]
    infos = {
        spec: TargetInfo(name=spec.split("@")[0], version=spec.split("@")[1], capabilities=("parse",))
        for spec in specs
    }
    source = [r for r in base.results if r.target == "vllm@0.32.0"][:60]
    plans = {(p.suite, p.case, p.target): p for p in base.header.manifest}
    manifest, results = [], []
    for number, spec in enumerate(specs):
        for old in source:
            manifest.append(plans[old.key].model_copy(update={"target": spec}))
            if number < 7 or old.case.endswith("1"):
                results.append(old.model_copy(update={"target": spec}))
    return finished(header(tuple(manifest), targets=infos), results)


def big_run(cases: int, targets: int) -> Run:
    """Many cases with evidence, problems and chunkings."""
    base = realistic_run()
    specs = list(TARGETS)[:targets]
    plans = {(p.suite, p.case, p.target): p for p in base.header.manifest}
    by_target = {spec: [r for r in base.results if r.target == spec] for spec in specs}
    manifest, results = [], []
    for number in range(cases):
        for spec in specs:
            old = by_target[spec][number % len(by_target[spec])]
            changes = {"case": f"{old.case}-{number}"}
            manifest.append(plans[old.key].model_copy(update=changes))
            results.append(old.model_copy(update=changes))
    return finished(header(tuple(manifest)), results)


def hostile_run() -> Run:
    """Hostile text in every field that a target, a suite or an environment can fill."""
    everything = "\n".join(HOSTILE)
    specs = ["../../evil@<b>", "<script>document.title='owned'</script>", "..", "a b"]
    infos = {
        spec: TargetInfo(
            name=everything,
            version=everything,
            capabilities=("parse",),
            environment={everything: everything},
            note=everything,
        )
        for spec in specs
    }
    manifest: list[PlannedCase] = []
    results: list[Result] = []
    verdicts: list[Verdict] = ["pass", "fail", "xfail", "error"]
    for number, text in enumerate([*HOSTILE, everything * 40, "x" * 300_000]):
        for spec, verdict in zip(specs, verdicts, strict=True):
            plan = PlannedCase(
                suite="../" * 3 + text[:60],
                case=f"../../{number}{text[:40]}",
                target=spec,
                kind="parser",
                area=f"{text[:50]}",
                title=text[:500],
                source=(text[:200], "javascript:alert(1)", 'https://x.example/"onclick=1'),
                digest="0",
            )
            manifest.append(plan)
            results.append(_hostile_result(plan, verdict, text))
    head = header(
        tuple(manifest),
        run_id=everything,
        started=everything,
        harness=everything,
        commit=everything,
        argv=tuple(HOSTILE),
        targets=infos,
        unavailable={everything: everything, "a@b; rm -rf ~": "x"},
        environment={everything: everything},
        suites={plan.suite: everything for plan in manifest},
        resumed_from=everything,
    )
    done = finished(head, results)
    assert done.footer is not None
    footer = done.footer.model_copy(update={"finished": everything})
    return done.model_copy(update={"footer": footer, "torn": everything})


def _hostile_result(plan: PlannedCase, verdict: Verdict, text: str) -> Result:
    problem = Problem(
        rule=text[:60],
        message=text,
        expected={"content": text, text[:80]: [text]},
        got={"content": text[::-1], "tool_calls": [{"name": text, "arguments": text}]},
        chunking=Chunking(name=text[:80], cuts=(1,)),
        chunks=(text, text[::-1]),
    )
    evidence = Evidence(
        input=text,
        prompt=text,
        expected={text[:80]: text},
        got={"content": text, "tool_calls": text},
        stream=StreamEvidence(kind="sampled", chunkings=text[:50], reason=text),
        policy=text if verdict == "pass" else None,
        spans=[{"start": 0, "end": 1, "role": text[:60], "reason": text}],
    )
    return result(
        plan,
        verdict,
        reason=text,
        problems=() if verdict == "pass" else (problem, problem),
        evidence=evidence,
        expectation=text,
        stderr=text,
        repeat=text,
    )
