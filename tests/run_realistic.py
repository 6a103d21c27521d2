"""A synthetic run that looks like a real one: four targets, five suites, every verdict."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from conformance.loading import LoadedSuite
from conformance.results import (
    Evidence,
    PlannedCase,
    Problem,
    Result,
    Run,
    StreamEvidence,
)
from conformance.suites import PROMPTS, ParserSuite, TemplateSuite
from conformance.targets.protocol import Chunking, TargetInfo
from tests.run_parts import TARGETS, finished, header, result

_CITIES = ["Paris", "São Paulo", "Tokyo", "Zürich", "Nairobi", "Reykjavík", "Osaka", "Lima", "Tromsø", "Pune"]


def _reasoning(city: str, n: int) -> dict[str, Any]:
    variants = [
        (
            f"label-is-dropped-{n}",
            f"The label `thought` is dropped and the rest kept ({city})",
            f"<|channel>thought\nThe user asks about {city}.<channel|>It is sunny in {city}.",
            {"reasoning": f"The user asks about {city}.", "content": f"It is sunny in {city}."},
        ),
        (
            f"prefix-of-label-is-kept-{n}",
            "Text that only begins like the label stays in the reasoning",
            f"<|channel>thousand reasons to visit {city}<channel|>Done",
            {"reasoning": f"thousand reasons to visit {city}", "content": "Done"},
        ),
        (
            f"direct-answer-is-content-{n}",
            "With thinking on, an answer without a channel is content in both modes",
            f"The answer for {city} is 42.\n\n- one\n\t- two  \n- three",
            {"content": f"The answer for {city} is 42.\n\n- one\n\t- two  \n- three"},
        ),
    ]
    case_id, title, output, expect = variants[n % 3]
    return {"id": case_id, "title": title, "output": output, "expect": expect, "prompt": "thinking"}


def _calls(city: str, n: int) -> dict[str, Any]:
    output = (
        "<|channel>thought\nI need the weather.<channel|>Let me check."
        f'<|tool_call>call:get_weather{{city:<|"|>{city}<|"|>,days:{n}}}<tool_call|>'
    )
    call = {"name": "get_weather", "arguments": {"city": city, "days": n}}
    case: dict[str, Any] = {
        "id": f"call-after-text-{n}",
        "title": f"A call after text leaves the text as content ({city}, {n} days)",
        "output": output,
        "expect": {"reasoning": "I need the weather.", "content": "Let me check.", "tool_calls": [call]},
    }
    if n % 5 == 4:
        case |= {
            "id": f"call-after-text-{n}-control",
            "title": "Prose that mentions a call without its opener is not a call",
            "output": f"To ask for {city}, write call:get_weather{{}} in the box.",
            "expect": {"content": f"To ask for {city}, write call:get_weather{{}} in the box."},
            "control_of": f"call-after-text-{n - 1}",
        }
    return case


def _typing(city: str, n: int) -> dict[str, Any]:
    return {
        "id": f"declared-integer-{n}",
        "title": f"A declared integer comes out as a number, {n} and not its text",
        "output": f"<|tool_call>call:get_weather{{days:{n},city:{city}}}<tool_call|>",
        "expect": {"tool_calls": [{"name": "get_weather", "arguments": {"days": n, "city": city}}]},
        "tools": "weather",
    }


def _recovery(city: str, n: int) -> dict[str, Any]:
    return {
        "id": f"unclosed-call-{n}",
        "title": f"A call that is never closed loses nothing ({city})",
        "output": f'<|tool_call>call:get_weather{{city:<|"|>{city}',
        "keep": [city],
        "policy": [
            {
                "name": "partial-call",
                "who": "the reference, vLLM's engine parser",
                "tool_calls": [{"name": "get_weather", "arguments": {"city": city}}],
            },
            {
                "name": "raw-text",
                "who": "vLLM's older parser",
                "content": f"call:get_weather{{city:{city}",
            },
        ],
    }


def _template(city: str, n: int) -> dict[str, Any]:
    return {
        "id": f"system-turn-{n}",
        "title": f"A system message becomes a turn of its own, trimmed ({city})",
        "messages": [
            {"role": "system", "content": f" You live in {city}. "},
            {"role": "user", "content": "Hello"},
        ],
        "expect": {"contains": [f"<|turn>system\nYou live in {city}.<turn|>\n"]},
    }


_TOOLS = {
    "weather": [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "parameters": {
                    "type": "object",
                    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                },
            },
        }
    ]
}

_SUITES: list[tuple[str, str, str, Any, int]] = [
    ("parser/reasoning", "reasoning", "What goes into the thought, and what does not.", _reasoning, 48),
    ("parser/tool-calls", "tool-calls", "Calls, their names and their place among text.", _calls, 50),
    ("parser/typing", "typing", "A declared type wins over what the text looks like.", _typing, 40),
    ("parser/recovery", "recovery", "Outputs a model should not have written, but does.", _recovery, 24),
    ("template/turns", "template", "How messages become turns of the prompt.", _template, 40),
]


def realistic_suites() -> tuple[LoadedSuite, ...]:
    """Five suites of about 200 cases."""
    suites = []
    for suite_id, area, description, make, size in _SUITES:
        values: dict[str, Any] = {
            "id": suite_id,
            "kind": suite_id.split("/")[0],
            "title": suite_id.split("/")[1].replace("-", " ").capitalize(),
            "description": description,
            "area": area,
            "toolsets": _TOOLS,
            "cases": [{"source": _sources(n), **make(_CITIES[n % len(_CITIES)], n)} for n in range(size)],
        }
        model = ParserSuite if values["kind"] == "parser" else TemplateSuite
        suite = model.model_validate(values)
        digest = hashlib.sha256(suite_id.encode()).hexdigest()
        suites.append(LoadedSuite(suite, Path(f"suites/{suite_id}.yaml"), digest, tuple(range(1, size + 1))))
    return tuple(suites)


def _sources(n: int) -> list[str]:
    return [["R02"], ["T13", "check 7"], ["vllm-project/vllm#39027", "spec 6.5"], ["X05"]][n % 4]


def realistic_run(suites: tuple[LoadedSuite, ...] | None = None, seed: int = 7) -> Run:
    """Four targets on all suites, with every verdict in it."""
    suites = realistic_suites() if suites is None else suites
    rng = random.Random(seed)
    manifest: list[PlannedCase] = []
    results: list[Result] = []
    for loaded in suites:
        for case in loaded.cases:
            for spec, info in TARGETS.items():
                plan = PlannedCase(
                    suite=loaded.suite.id,
                    case=case.case.id,
                    target=spec,
                    kind=loaded.suite.kind,
                    area=loaded.suite.area,
                    title=case.case.title,
                    source=case.case.source,
                    digest=case.digest,
                )
                manifest.append(plan)
                results.append(_judged(plan, case.case.model_dump(mode="json"), info, rng))
    head = header(
        tuple(manifest),
        suites={loaded.suite.id: loaded.digest for loaded in suites},
        unavailable={
            "vllm@0.21.0": "its environment is not installed",
            "openai": "no address was given; set CONFORMANCE_OPENAI_URL",
        },
    )
    return finished(head, results)


def _judged(plan: PlannedCase, case: dict[str, Any], info: TargetInfo, rng: random.Random) -> Result:
    needed = "parse" if plan.kind == "parser" else "render"
    if needed not in info.capabilities:
        return result(plan, "skip", reason=f"{plan.target} cannot {needed}", duration=0.0)
    if plan.kind == "template":
        return _judged_template(plan, case, rng)
    return _judged_parser(plan, case, info, rng)


def _judged_template(plan: PlannedCase, case: dict[str, Any], rng: random.Random) -> Result:
    want = case["expect"]["contains"][0]
    prompt = f"<bos>{want}<|turn>user\nHello<turn|>\n<|turn>model\n"
    both = {"large": {"contains": [want]}, "e": {"contains": [want]}}
    evidence = Evidence(
        input=json.dumps(case["messages"], ensure_ascii=False, indent=2),
        prompt=prompt,
        expected=both,
        got={"large": {"prompt": prompt}, "e": {"prompt": prompt}},
    )
    if plan.target != "reference" and rng.random() < 0.06:
        got = prompt.replace("system\n", "system\n ")
        problem = Problem(
            rule="prompt", message="large: the text is not in the prompt", expected=prompt, got=got
        )
        answer = {"large": {"prompt": got}, "e": {"prompt": prompt}}
        return result(plan, "fail", problems=(problem,), evidence=evidence.model_copy(update={"got": answer}))
    return result(plan, "pass", evidence=evidence)


def _judged_parser(plan: PlannedCase, case: dict[str, Any], info: TargetInfo, rng: random.Random) -> Result:
    output = case["output"]
    pieces = max(2, len(output) // 4)
    stream = _stream(info, pieces, rng)
    prompt = PROMPTS.get(case["prompt"], case["prompt"])
    spans = _spans(output) if info.name == "reference" else None
    if case["policy"]:
        answer = case["policy"][1 if info.name == "sglang-parsers" else 0]
        got = {key: answer.get(key) for key in ("reasoning", "content", "tool_calls")}
        evidence = Evidence(
            input=output,
            prompt=prompt,
            expected=case["policy"],
            got=got,
            stream=stream,
            policy=answer["name"],
            spans=spans,
        )
        return result(plan, "pass", evidence=evidence)
    evidence = Evidence(
        input=output,
        prompt=prompt,
        expected=case["expect"],
        got=_got(case["expect"]),
        stream=stream,
        spans=spans,
    )
    if info.name == "reference":
        return result(plan, "pass", evidence=evidence)
    roll = rng.random()
    if roll < 0.88:
        return result(plan, "pass", evidence=evidence)
    return _broken(plan, case, evidence, roll)


def _broken(plan: PlannedCase, case: dict[str, Any], evidence: Evidence, roll: float) -> Result:
    got = dict(evidence.got)
    got["content"] = (got["content"] or "") + "<channel|> "
    got["reasoning"] = (got["reasoning"] or "").replace("user", "usr")
    wrong = evidence.model_copy(update={"got": got})
    problem = Problem(
        rule="expected", message="The answer is not the expected one.", expected=evidence.expected, got=got
    )
    cut = max(1, evidence.stream.pieces - 3) if evidence.stream else 1
    third = len(case["output"]) // 3
    streamed = Problem(
        rule="stream-equals-whole",
        message="The stream reassembles to something else than the whole output.",
        expected=evidence.got,
        got=got,
        chunking=Chunking(name="minimal", unit="tokens", cuts=(1, cut + 1), lag=2),
        chunks=(case["output"][:third], case["output"][third : 2 * third], case["output"][2 * third :]),
    )
    if roll < 0.91:
        return result(plan, "fail", problems=(problem,), evidence=wrong)
    if roll < 0.925:
        return result(plan, "fail", problems=(streamed, problem), evidence=wrong)
    if roll < 0.96:
        return result(
            plan,
            "xfail",
            problems=(problem,),
            evidence=wrong,
            reason="The closer is left in the content; reported as vllm-project/vllm#39027.",
            expectation="suites/expectations/vllm.yaml:14",
        )
    if roll < 0.968:
        return result(
            plan,
            "xpass",
            evidence=evidence,
            reason="Expected to fail up to 0.31, and passed.",
            expectation="suites/expectations/vllm.yaml:22",
        )
    if roll < 0.978:
        return result(
            plan,
            "error",
            evidence=Evidence(input=evidence.input, prompt=evidence.prompt, expected=evidence.expected),
            reason="worker died: exit status -11",
            stderr='INFO loading\n\x1b[31mERROR\x1b[0m Segmentation fault\n  File "parser.py", line 12\n',
            problems=(Problem(rule="raised", message="The worker ended while it was asked."),),
        )
    if roll < 0.988:
        return result(
            plan,
            "timeout",
            evidence=Evidence(input=evidence.input, prompt=evidence.prompt, expected=evidence.expected),
            reason="no answer within 20 s",
            duration=20.0,
        )
    return result(plan, "inconclusive", evidence=evidence, reason="Two of 60 prompts ended in near ties.")


def _got(expect: dict[str, Any]) -> dict[str, Any]:
    calls = [{"name": c["name"], "arguments": json.dumps(c["arguments"])} for c in expect["tool_calls"]]
    return {
        "reasoning": expect["reasoning"] or None,
        "content": expect["content"] or None,
        "tool_calls": calls,
    }


def _stream(info: TargetInfo, pieces: int, rng: random.Random) -> StreamEvidence:
    if "certify" in info.capabilities and rng.random() < 0.9:
        return StreamEvidence(
            kind="certified",
            unit="tokens",
            pieces=pieces,
            chunkings=str(2 ** (pieces - 1)),
            states=pieces * 7,
        )
    if "certify" in info.capabilities:
        reason = "The search met its limit of 100 000 states."
    else:
        reason = "The parser's state cannot be copied."
    return StreamEvidence(
        kind="sampled", unit=info.stream_unit, pieces=pieces, chunkings="148", reason=reason
    )


def _spans(output: str) -> list[dict[str, Any]]:
    spans: list[dict[str, Any]] = []
    role, at = "content", 0
    for marker in sorted(
        ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>"), key=lambda m: output.find(m)
    ):
        start = output.find(marker, at)
        if start < 0:
            continue
        if start > at:
            spans.append({"start": at, "end": start, "role": role, "reason": ""})
        spans.append({"start": start, "end": start + len(marker), "role": "marker", "reason": ""})
        at = start + len(marker)
        role = {"<|channel>": "reasoning", "<|tool_call>": "call_arguments"}.get(marker, "content")
        if output.startswith("thought\n", at):
            spans.append({"start": at, "end": at + 8, "role": "dropped", "reason": "label of the channel"})
            at += 8
    if at < len(output):
        spans.append({"start": at, "end": len(output), "role": role, "reason": ""})
    return spans
