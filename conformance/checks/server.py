"""Check of kind `server`: a live OpenAI-compatible server, asked whole and streamed at temperature 0.

Rules, by the names that problems carry:

* `http-status`: a good request is answered with 200. `redirect`: the server sends the client elsewhere.
* `malformed-response`, `response-size`: no chat completion, or more than any answer can be.
* `key-echoed`: the key is in an answer.
* `stream-equals-whole`: content, reasoning, calls, finish_reason and usage of the streamed answer are those
  of the whole one. Where the server does not even repeat itself, the case is inconclusive.
* `stream-end`, `stream-id`, `indices`, `call-start`: the form of a stream: one finish_reason, nothing after
  it but usage and `[DONE]`, one id, calls numbered 0, 1, 2, … that begin with id, type and name.
* `marker-leak`, `unicode`, `nothing-lost`: no control token's text, no half character, no empty answer of
  many tokens. `call-ids`, `arguments-json`: every call has an id of its own and a JSON object.
* `finish-reason`: `tool_calls` with calls, `stop` without, `length` only at the limit.
* `truncation-hidden`: an answer cut by `max_tokens` says `length`. `truncated-text`: it begins as the uncut
  one does.
* `tool-choice`, `json-schema`, `stop-string`, `logprobs`, `usage`: what was asked for is what came.
* `requests-mixed`: an answer given beside others holds no text of theirs.
* `bad-request-accepted`, `bad-request-status`, `error-object`: a bad request gets a 4xx that says why, where
  the same request without its fault gets an answer. `next-request`: it does so afterwards too.
* `picture-ignored`, `stale-picture`: another picture, or a later one, has another answer. `picture-tokens`:
  the prompt's tokens are as many as the pictures' sizes make.
* `adapter-ignored`: asked for an adapter, the server answers as without it.
* `expected`: the scripted checkpoint's answer is the script's.

A case whose construct never appeared, a server that takes no pictures, a 429, and an exhausted budget are
`inconclusive`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from conformance.checks import pictures
from conformance.checks.base import CheckOutcome
from conformance.checks.server_rules import (
    Asked,
    completion_tokens,
    constructs,
    difference,
    exact_problem,
    logprobs_difference,
    lost,
    prompt_tokens,
    reply_problems,
)
from conformance.compare import same_text
from conformance.errors import EngineError, NotRecordedError, TargetTimeoutError
from conformance.loading import resolve_tools
from conformance.replies import MalformedReplyError, Reply, read_stream, read_whole
from conformance.results import Evidence, Problem
from conformance.suites import Neighbour, ServerCase, ServerSuite
from conformance.targets.bundled import ADAPTER
from conformance.targets.protocol import ServeAnswer, Server, ServeRequest, Target, TargetInfo

SCRIPTED = "scripted"
"""Name of the model whose answers are known to the letter."""

_RULE_OF_FAILURE = {
    "redirect": "redirect",
    "too-large": "response-size",
    "malformed": "malformed-response",
    "key-echoed": "key-echoed",
}
_TOO_MANY = 429
_NOT_SUPPORTED = {*range(400, 500), 501} - {_TOO_MANY}
"""How a server that reads no pictures answers a request that has some."""
_WORD = re.compile(r"\w{4,}|\d+")


class _BrokenError(Exception):
    """An answer that leaves nothing to judge."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


class _InconclusiveError(Exception):
    """The server did not get as far as what the case is about."""


def judge(case: ServerCase, suite: ServerSuite, target: Target) -> CheckOutcome:
    """Judge one case on a server.

    Raises:
        EngineError: the connection broke.
        TargetTimeoutError: the server did not answer in time.
    """
    info = target.describe()
    if "serve" not in info.capabilities or not isinstance(target, Server):
        return CheckOutcome("skip", reason=f"{target.spec} has no capability `serve`")
    if case.adapter and "lora" not in info.features:
        return CheckOutcome("skip", reason=f"no adapter {ADAPTER!r} is served")
    judgement = _Judgement(case, suite, target, info)
    reason = ""
    try:
        judgement.run()
    except _BrokenError as broken:
        judgement.problems.append(broken.problem)
    except _InconclusiveError as unsure:
        reason = str(unsure)
    except NotRecordedError:
        if not judgement.problems:
            raise
    evidence = judgement.evidence()
    problems = [problem.model_copy(update=_printable_problem(problem)) for problem in judgement.problems]
    if problems or not reason:
        return CheckOutcome.from_problems(problems, evidence)
    return CheckOutcome("inconclusive", (), evidence, reason)


class _Judgement:
    """One case on one server."""

    def __init__(self, case: ServerCase, suite: ServerSuite, server: Server, info: TargetInfo) -> None:
        self._case = case
        self._server = server
        self._tools = resolve_tools(case, suite)
        self._scripted = info.environment.get("model") == SCRIPTED
        self._got: dict[str, Any] = {}
        self.problems: list[Problem] = []

    def run(self) -> None:
        """Ask and judge; what is found is in `problems`."""
        if pictures.in_case(self._case) and not (self._scripted or self._case.refused):
            self._try_pictures()
        if self._case.refused:
            self._run_refused()
        elif self._case.cut is not None:
            self._run_cut(self._case.cut)
        elif self._case.stop:
            self._run_stop()
        elif self._case.beside:
            self._run_beside()
        elif self._case.instead:
            self._run_instead()
        elif self._case.turn_by_turn:
            self._run_turn_by_turn()
        else:
            self._run_plain()

    def evidence(self) -> Evidence:
        """What was sent and what came back."""
        exact = self._case.exact if self._scripted else None
        body = self._body()
        sent = body.pop("messages", None)
        shown = sent if "messages" in self._case.override else list(self._case.messages)  # without bytes
        return Evidence(
            input=json.dumps(shown, ensure_ascii=False, indent=2),
            expected=exact.model_dump(mode="json", exclude_unset=True) if exact is not None else None,
            got=_printable({"request": body, **self._got}),
        )

    # ------------------------------------------------------------------ modes

    def _try_pictures(self) -> None:
        """Whether the server takes pictures at all, or so many."""
        probe = pictures.sendable(pictures.plain(self._case.messages))
        answer = self._send([self._body(messages=probe, max_tokens=1)])[0]
        if answer.status in _NOT_SUPPORTED:
            self._got["plain pictures"] = {"status": answer.status, "body": answer.body}
            said = _printable(_error_message(answer)) or "no error message"
            raise _InconclusiveError(f"the server takes no such pictures: HTTP {answer.status}: {said}")

    def _run_plain(self) -> tuple[Reply, Reply]:
        whole, streamed = self._both(self._body())
        self._exact(whole, streamed)
        self._produced([whole, streamed])
        if self._case.adapter:
            plain = self._ask(self._body(model=None), "without the adapter", self._case.max_tokens)
            if not difference(whole, plain):
                message = f"the model {ADAPTER!r} answers as the one without the adapter does"
                self.problems.append(Problem(rule="adapter-ignored", message=message, got=whole.shown()))
        return whole, streamed

    def _run_instead(self) -> None:
        whole, _ = self._run_plain()
        changed = pictures.replaced(self._case.messages, self._case.instead)
        body = self._body(messages=pictures.sendable(changed))
        other = self._ask(body, "with other pictures", self._case.max_tokens)
        if same_text(other.content, whole.content):
            message = "other pictures have the same answer"
            self.problems.append(Problem(rule="picture-ignored", message=message, got=other.shown()))
        before, after = prompt_tokens(whole), prompt_tokens(other)
        if before is not None and after is not None:  # else `usage` says it
            budgets = pictures.BUDGETS[:1] if self._scripted else pictures.BUDGETS
            old = pictures.pictures_of(self._case.messages)
            if wrong := pictures.growth_problem(old, self._case.instead, budgets, after - before):
                self.problems.append(wrong)

    def _run_turn_by_turn(self) -> None:
        earlier = []
        for number, messages in enumerate(pictures.earlier_turns(self._case.messages), 1):
            body = self._body(messages=pictures.sendable(messages))
            earlier.append(self._ask(body, f"turn {number}", self._case.max_tokens))
        whole, streamed = self._run_plain()
        for way, reply in (("whole", whole), ("streamed", streamed)):
            if any(same_text(reply.content, before.content) for before in earlier):
                message = f"{way}: the answer is that of an earlier turn"
                self.problems.append(Problem(rule="stale-picture", message=message, got=reply.shown()))

    def _run_refused(self) -> None:
        sound = self._send([self._sound_body()])[0]
        if sound.status != 200:
            self._got["without its fault"] = {"status": sound.status, "body": sound.body}
            raise _InconclusiveError("the same request without its fault is refused too")
        for way, body in (("whole", self._body()), ("streamed", _streaming(self._body()))):
            answer = self._send([body])[0]
            self._got[way] = {"status": answer.status, "body": answer.body}
            for rule, message in _refusal_faults(answer):
                shown = self._got[way]
                self.problems.append(Problem(rule=rule, message=f"{way}: {message}", got=shown))
        again = self._send([self._sound_body()])[0]
        if again.status != 200:
            self._got["afterwards"] = {"status": again.status, "body": again.body}
            message = f"afterwards, the request without its fault gets HTTP {again.status}"
            self.problems.append(Problem(rule="next-request", message=message, got=self._got["afterwards"]))

    def _run_cut(self, part: float) -> None:
        full = self._ask(self._body(), "uncut", self._case.max_tokens)
        self._produced([full])
        taken = completion_tokens(full)
        if full.finish_reason == "length" or taken is None or int(taken * part) < 1:
            raise _InconclusiveError(f"the uncut answer, of {taken} tokens, ended with {full.finish_reason}")
        limit = int(taken * part)
        whole, streamed = self._both(self._body(max_tokens=limit), limit)
        for way, reply in (("whole", whole), ("streamed", streamed)):
            if reply.finish_reason != "length":
                message = (
                    f"{way}: the answer was cut after {limit} of {taken} tokens, "
                    f"and its finish_reason is {reply.finish_reason!r}, not 'length'"
                )
                self.problems.append(Problem(rule="truncation-hidden", message=message, got=reply.shown()))
            begins = full.content.strip().startswith(reply.content.strip())
            if "content" in self._case.produces and not begins:
                self.problems.append(
                    Problem(
                        rule="truncated-text",
                        message=f"{way}: the cut answer's content is no beginning of the uncut one's",
                        expected=full.content,
                        got=reply.content,
                    )
                )

    def _run_stop(self) -> None:
        free = self._ask(self._body(stop=None), "without stop", self._case.max_tokens)
        places = [place for text in self._case.stop if (place := free.content.find(text)) >= 0]
        if not places:
            raise _InconclusiveError(f"nothing to stop at: the answer has none of {list(self._case.stop)}")
        expected = free.content[: min(places)]
        whole, streamed = self._both(self._body())
        for way, reply in (("whole", whole), ("streamed", streamed)):
            kept = [text for text in self._case.stop if text in reply.content]
            if kept or not same_text(reply.content, expected):
                self.problems.append(
                    Problem(
                        rule="stop-string",
                        message=f"{way}: the content must end before {', '.join(map(repr, self._case.stop))}",
                        expected=expected,
                        got=reply.content,
                    )
                )
            if reply.finish_reason not in ("stop", None):
                message = f"{way}: a stop string ended the answer, not {reply.finish_reason!r}"
                self.problems.append(Problem(rule="finish-reason", message=message, got=reply.shown()))

    def _run_beside(self) -> None:
        bodies = [
            self._body(),
            *(self._body(messages=[_user(said)], model=None) for said in self._case.beside),
        ]
        limit = self._case.max_tokens
        alone = [self._ask(body, f"request {n} alone", limit) for n, body in enumerate(bodies)]
        self._produced(alone[:1])
        if not all(_own_words(number, alone) for number in range(len(alone))):
            raise _InconclusiveError(
                "an answer given alone has no word of its own, so a mix-up would not show"
            )
        many = [body for body in bodies for _ in range(self._case.copies)]
        differing: list[str] = []
        for way, at_once in (("whole", many), ("streamed", [_streaming(body) for body in many])):
            for number, answer in enumerate(self._send(at_once)):
                mine = number // self._case.copies
                name = f"{way}, request {mine} beside the others"
                reply = self._read(answer, name, streamed=way == "streamed")
                self._got[name] = reply.shown()
                self.problems += reply_problems(reply, self._asked(name))
                if not difference(reply, alone[mine]):
                    continue
                foreign = _foreign(reply, mine, alone)
                if foreign:
                    self.problems.append(
                        Problem(
                            rule="requests-mixed",
                            message=f"{name}: it holds text of another's answer: {', '.join(foreign[:5])}",
                            expected=alone[mine].shown(),
                            got=reply.shown(),
                        )
                    )
                else:
                    differing.append(f"{name}: {difference(reply, alone[mine])}")
        if differing:
            raise _InconclusiveError(f"answers differ from those given alone: {'; '.join(differing[:3])}")

    # ------------------------------------------------------------------ asking

    def _body(self, **changes: Any) -> dict[str, Any]:
        """The request in OpenAI's form; a change to None leaves the key out."""
        own = {"messages": pictures.sendable(self._case.messages)}
        body = self._sound_body() | own | self._case.override | changes
        return {key: value for key, value in body.items() if value is not None}

    def _sound_body(self) -> dict[str, Any]:
        """The request without the case's override."""
        case = self._case
        body: dict[str, Any] = {
            "messages": pictures.sendable(pictures.mended(case.messages)),
            "temperature": 0,
            "seed": 0,
            "max_tokens": case.max_tokens,
        }
        if case.adapter:
            body["model"] = ADAPTER
        if self._tools:
            body["tools"] = list(self._tools)
        if case.tool_choice in ("auto", "none", "required"):
            body["tool_choice"] = case.tool_choice
        elif case.tool_choice is not None:
            body["tool_choice"] = {"type": "function", "function": {"name": case.tool_choice}}
        if case.thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": case.thinking}
        if case.response_schema is not None:
            wanted = {"name": "answer", "schema": case.response_schema}
            body["response_format"] = {"type": "json_schema", "json_schema": wanted}
        if case.stop:
            body["stop"] = list(case.stop)
        if case.top_logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": case.top_logprobs}
        return body

    def _both(self, body: dict[str, Any], max_tokens: int | None = None) -> tuple[Reply, Reply]:
        """The whole answer and the streamed one, each judged, and compared."""
        limit = max_tokens or self._case.max_tokens
        whole = self._ask(body, "whole", limit)
        streamed = self._ask(body, "streamed", limit, streamed=True)
        for rule, differ in (("stream-equals-whole", difference), ("logprobs", logprobs_difference)):
            differs = differ(streamed, whole)
            if not differs:
                continue
            again = self._read(self._send([body])[0], "whole, again", streamed=False)
            if unlike := differ(again, whole):
                raise _InconclusiveError(
                    f"asked again at temperature 0, the server answers otherwise: {unlike}"
                )
            self.problems.append(
                Problem(
                    rule=rule,
                    message=f"streamed differs from whole: {differs}",
                    expected=whole.shown(),
                    got=streamed.shown(),
                )
            )
            break
        return whole, streamed

    def _ask(self, body: dict[str, Any], name: str, max_tokens: int, *, streamed: bool = False) -> Reply:
        answer = self._send([_streaming(body) if streamed else body])[0]
        reply = self._read(answer, name, streamed=streamed)
        self._got[name] = reply.shown()
        self.problems += reply_problems(reply, self._asked(name, max_tokens))
        return reply

    def _asked(self, name: str, max_tokens: int | None = None) -> Asked:
        return Asked(self._case, self._tools, max_tokens or self._case.max_tokens, name)

    def _send(self, bodies: list[dict[str, Any]]) -> list[ServeAnswer]:
        answers = list(self._server.serve(ServeRequest(bodies=tuple(bodies))))
        for answer in answers:
            if answer.failure in _RULE_OF_FAILURE:
                rule = _RULE_OF_FAILURE[answer.failure]
                raise _BrokenError(Problem(rule=rule, message=answer.detail, got=answer.status))
            if answer.failure == "timeout":
                raise TargetTimeoutError(answer.detail)
            if answer.failure == "connection":
                raise EngineError(answer.detail)
            if answer.failure == "budget":
                raise _InconclusiveError(answer.detail)
            if answer.status == _TOO_MANY:
                raise _InconclusiveError("the server answered 429 (too many requests); it is not asked again")
        return answers

    def _read(self, answer: ServeAnswer, name: str, *, streamed: bool) -> Reply:
        if answer.status != 200:
            said = _printable(_error_message(answer)) or "no error message"
            message = f"{name}: HTTP {answer.status}: {said}"
            raise _BrokenError(Problem(rule="http-status", message=message, expected=200, got=answer.status))
        if streamed is (answer.events is None):
            came = "a whole answer" if streamed else "a stream"
            message = f"{name}: {came} came, which was not asked for"
            raise _BrokenError(Problem(rule="malformed-response", message=message))
        try:
            if answer.events is not None:
                return read_stream(answer.events, done=answer.done)
            reply = read_whole(answer.body)
        except MalformedReplyError as error:
            problem = Problem(rule="malformed-response", message=f"{name}: {error}")
            raise _BrokenError(problem) from None
        if reply.finish_reason is None:
            reply.faults.append(("finish-reason", "there is none"))
        return reply

    # ------------------------------------------------------------------ verdict

    def _exact(self, whole: Reply, streamed: Reply) -> None:
        exact = self._case.exact
        if not self._scripted:
            return
        for way, reply in (("whole", whole), ("streamed", streamed)):
            if missing := lost(reply, self._case.keep):
                message = f"{way}: in no field: {', '.join(map(repr, missing))}"
                self.problems.append(Problem(rule="nothing-lost", message=message, got=reply.shown()))
            if exact is not None and (wrong := exact_problem(reply, exact)):
                self.problems.append(
                    Problem(
                        rule="expected",
                        message=f"{way}: {wrong}",
                        expected=exact.model_dump(mode="json"),
                        got=reply.shown(),
                    )
                )

    def _produced(self, replies: list[Reply]) -> None:
        missing = [name for name in self._case.produces if name not in constructs(replies)]
        if missing:
            raise _InconclusiveError(f"the model never produced what the case is about: {', '.join(missing)}")


def _streaming(body: dict[str, Any]) -> dict[str, Any]:
    return body | {"stream": True, "stream_options": {"include_usage": True}}


def _user(said: str | Neighbour) -> dict[str, Any]:
    content = said if isinstance(said, str) else pictures.content_sendable(said.content)
    return {"role": "user", "content": content}


def _foreign(reply: Reply, mine: int, alone: list[Reply]) -> list[str]:
    """Words of others' answers that are in this one, and would not be were it asked alone."""
    others = {word for n, other in enumerate(alone) if n != mine for word in _words(other)}
    return sorted((_words(reply) & others) - _words(alone[mine]))


def _own_words(number: int, replies: list[Reply]) -> set[str]:
    """Words of one answer that no other one has."""
    others = {word for n, other in enumerate(replies) if n != number for word in _words(other)}
    return _words(replies[number]) - others


def _words(reply: Reply) -> set[str]:
    return {word for text in reply.texts() for word in _WORD.findall(text)}


def _refusal_faults(answer: ServeAnswer) -> Iterator[tuple[str, str]]:
    status = answer.status or 0
    if 200 <= status < 300:
        yield "bad-request-accepted", f"the request is a bad one, and was answered with HTTP {status}"
    elif not 400 <= status < 500:
        yield "bad-request-status", f"the request is a bad one, which is no HTTP {status}"
    elif not _error_message(answer):
        yield "error-object", "the answer has no `error` object with a message"


def _error_message(answer: ServeAnswer) -> str:
    """`error.message` of an answer, where OpenAI's clients look for it."""
    error = answer.body.get("error") if isinstance(answer.body, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return message if isinstance(message, str) else ""


def _printable(value: Any) -> Any:
    """The value with what no JSON file can hold written out: lone surrogates and infinite numbers."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, dict):
        return {_printable(key): _printable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_printable(item) for item in value]
    return value


def _printable_problem(problem: Problem) -> dict[str, Any]:
    return {name: _printable(getattr(problem, name)) for name in ("message", "expected", "got")}
