"""Lies of a server: functions that change an honest exchange, or names of ways to spoil the transport."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Callable
from typing import Any

from model_impl.nano.script import ADAPTER
from tests.server_answers import MODEL, Exchange, answer, chunk, words
from tests.server_pictures import parts_of

Lie = Callable[[Exchange], None]
LIES: dict[str, Lie] = {}
TRANSPORT_LIES = ("redirect", "endless-stream", "flood", "stalled-stream", "drip", "compressed", "cut-off")


def lie(function: Lie) -> Lie:
    LIES[function.__name__.replace("_", "-")] = function
    return function


@lie
def marker_leaked(e: Exchange) -> None:
    e.say("<turn|>")


@lie
def marker_leaked_streamed(e: Exchange) -> None:
    e.say("<channel|>", whole=False)


@lie
def marker_in_arguments(e: Exchange) -> None:
    for call in e.message["tool_calls"]:
        call["function"]["arguments"] = '{"city": "\\u003c|\\"|\\u003eParis"}'


@lie
def streamed_differs(e: Exchange) -> None:
    texts = [delta for delta in e.deltas() if delta.get("content")]
    texts[-1]["content"] = texts[-1]["content"][:-1]


@lie
def thought_streamed_as_content(e: Exchange) -> None:
    for delta in e.deltas():
        if "reasoning" in delta:
            delta["content"] = delta.pop("reasoning")


@lie
def arguments_streamed_otherwise(e: Exchange) -> None:
    for call in e.calls():
        call["function"]["arguments"] = (
            call["function"]["arguments"].replace("Paris", "Rome").replace("P", "L")
        )


@lie
def call_lost_in_the_stream(e: Exchange) -> None:
    e.chunks = [c for c in e.chunks if not (c["choices"] and c["choices"][0]["delta"].get("tool_calls"))]


@lie
def finish_reason_streamed_otherwise(e: Exchange) -> None:
    e.finish("length" if e.choice["finish_reason"] == "stop" else "stop", whole=False)


@lie
def usage_streamed_otherwise(e: Exchange) -> None:
    if "usage" in e.chunks[-1]:
        e.chunks[-1]["usage"]["completion_tokens"] += 1
        e.chunks[-1]["usage"]["total_tokens"] += 1


@lie
def stop_with_calls(e: Exchange) -> None:
    e.finish("stop")


@lie
def tool_calls_without_calls(e: Exchange) -> None:
    e.finish("tool_calls")


@lie
def length_without_limit(e: Exchange) -> None:
    e.finish("length")


@lie
def unknown_finish_reason(e: Exchange) -> None:
    e.finish("eos")


@lie
def no_finish_reason(e: Exchange) -> None:
    e.choice["finish_reason"] = None


@lie
def truncation_hidden(e: Exchange) -> None:
    if e.choice["finish_reason"] == "length":
        e.finish("tool_calls" if e.message["tool_calls"] else "stop")


@lie
def truncation_hidden_streamed(e: Exchange) -> None:
    if e.choice["finish_reason"] == "length":
        e.finish("tool_calls" if e.message["tool_calls"] else "stop", whole=False)


@lie
def requests_mixed(e: Exchange) -> None:
    if e.beside:
        e.message["content"] = e.beside[0].message["content"]
        e.chunks = e.beside[0].chunks


@lie
def requests_interleaved(e: Exchange) -> None:
    if e.beside and e.beside[0].message["content"]:
        words = e.beside[0].message["content"].split()
        e.say(" " + " ".join(words[-4:]))


@lie
def same_for_everybody(e: Exchange) -> None:
    _replace(e, e.body | {"messages": [{"role": "user", "content": "#plain"}]})


@lie
def usage_missing(e: Exchange) -> None:
    e.whole.pop("usage")
    e.chunks.pop()


@lie
def usage_does_not_add_up(e: Exchange) -> None:
    for usage in (e.whole["usage"], e.chunks[-1].get("usage", {})):
        usage["total_tokens"] = 1


@lie
def everything_lost(e: Exchange) -> None:
    e.message.update({"content": None, "reasoning": None, "tool_calls": []})
    e.chunks = [c for c in e.chunks if not c["choices"] or c["choices"][0]["finish_reason"]]


def _each_logprob(e: Exchange, change: Callable[[dict[str, Any]], None]) -> None:
    for choice in (e.choice, e.chunks[0]["choices"][0]):
        for entry in choice["logprobs"]["content"]:
            change(entry)


@lie
def logprobs_above_zero(e: Exchange) -> None:
    _each_logprob(e, lambda entry: entry.update(logprob=0.7))


@lie
def logprobs_not_finite(e: Exchange) -> None:
    _each_logprob(e, lambda entry: entry.update(logprob=float("-inf")))


@lie
def logprobs_not_the_likeliest(e: Exchange) -> None:
    _each_logprob(e, lambda entry: entry.update(logprob=-5.0))


@lie
def logprobs_too_few(e: Exchange) -> None:
    for choice in (e.choice, e.chunks[0]["choices"][0]):
        del choice["logprobs"]["content"][2:]


@lie
def logprobs_missing(e: Exchange) -> None:
    e.choice["logprobs"] = e.chunks[0]["choices"][0]["logprobs"] = None


@lie
def logprobs_of_other_tokens(e: Exchange) -> None:
    _each_logprob(e, lambda entry: entry.update(token="z", bytes=[122]))


@lie
def logprobs_without_bytes_of_other_tokens(e: Exchange) -> None:
    _each_logprob(e, lambda entry: entry.update(token="\ufffd", bytes=None))


@lie
def logprobs_with_broken_bytes(e: Exchange) -> None:
    _each_logprob(e, lambda entry: entry.update(bytes=[300]))


@lie
def logprobs_streamed_otherwise(e: Exchange) -> None:
    for entry in e.chunks[0]["choices"][0]["logprobs"]["content"]:
        entry["logprob"] += 0.01


@lie
def tokens_streamed_otherwise(e: Exchange) -> None:
    e.chunks[0]["choices"][0]["logprobs"]["content"].pop()


@lie
def bad_request_500(e: Exchange) -> None:
    e.status = 500 if e.status >= 400 else e.status


@lie
def bad_request_accepted(e: Exchange) -> None:
    e.status = 200


@lie
def tools_refused(e: Exchange) -> None:
    if e.body.get("tools"):
        e.status, e.whole = 400, {"error": {"message": "no tools here"}}


@lie
def error_without_object(e: Exchange) -> None:
    if e.status >= 400:
        e.whole = {"detail": "no"}


@lie
def half_characters(e: Exchange) -> None:
    for delta in e.deltas():
        delta["content"] = re.sub(r"[^\x00-\x7f]", "\ufffd", delta.get("content") or "")


@lie
def half_surrogates(e: Exchange) -> None:
    halves = json.loads('"\\ud83d"'), json.loads('"\\ude80"')
    e.chunks[1:1] = [chunk(e, {"content": half}) for half in halves]


@lie
def indices_all_zero(e: Exchange) -> None:
    for call in e.calls():
        call["index"] = 0


@lie
def indices_by_tool(e: Exchange) -> None:
    for call in e.calls():
        call["index"] += 1


@lie
def ids_missing(e: Exchange) -> None:
    for call in [*e.message["tool_calls"], *e.calls()]:
        call.pop("id", None)


@lie
def ids_all_the_same(e: Exchange) -> None:
    for call in [*e.message["tool_calls"], *(c for c in e.calls() if "id" in c)]:
        call["id"] = "call-0"


@lie
def name_in_every_part(e: Exchange) -> None:
    for call in e.calls():
        call["function"].setdefault("name", "get_weather")


@lie
def arguments_no_json(e: Exchange) -> None:
    for call in e.message["tool_calls"]:
        call["function"]["arguments"] = call["function"]["arguments"][:-1]


@lie
def stop_string_kept(e: Exchange) -> None:
    if "stop" in e.body:
        e.say(e.body["stop"][0])


@lie
def stop_string_ignored(e: Exchange) -> None:
    if "stop" in e.body:
        _replace(e, {key: value for key, value in e.body.items() if key != "stop"})


@lie
def schema_ignored(e: Exchange) -> None:
    e.say(" I hope that helps.")


@lie
def other_schema(e: Exchange) -> None:
    e.message["content"] = e.message["content"].replace("days", "nights")
    e.chunks = [e.chunks[0], *e.chunks[-2:]]
    e.say(e.message["content"], whole=False)


@lie
def json_scalar(e: Exchange) -> None:
    e.message["content"] = "42"
    e.chunks = [e.chunks[0], *e.chunks[-2:]]
    e.say("42", whole=False)


@lie
def call_without_leave(e: Exchange) -> None:
    call = {"id": "call-9", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    e.message["tool_calls"] = [call]
    e.chunks.insert(1, chunk(e, {"tool_calls": [{"index": 0, **call}]}))
    e.finish("tool_calls")


@lie
def another_function(e: Exchange) -> None:
    for call in [*e.message["tool_calls"], *e.calls()]:
        if "name" in call["function"]:
            call["function"]["name"] = "open_door"


@lie
def never_calls(e: Exchange) -> None:
    if e.message["tool_calls"]:
        _replace(e, e.body | {"messages": [{"role": "user", "content": "#plain"}], "tool_choice": "auto"})


@lie
def choice_ignored(e: Exchange) -> None:
    _replace(e, {key: value for key, value in e.body.items() if key != "tool_choice"})


@lie
def format_ignored(e: Exchange) -> None:
    _replace(e, {key: value for key, value in e.body.items() if key != "response_format"})


def _replace(e: Exchange, body: dict[str, Any]) -> None:
    other = Exchange(body, "")
    answer(other, 0)
    e.whole, e.chunks = other.whole, other.chunks


@lie
def no_done(e: Exchange) -> None:
    e.done = False


@lie
def text_after_the_end(e: Exchange) -> None:
    e.chunks.insert(len(e.chunks) - 1, chunk(e, {"content": " And more."}))


@lie
def second_end(e: Exchange) -> None:
    e.chunks.insert(len(e.chunks) - 1, chunk(e, {}, "stop"))


@lie
def error_in_the_stream(e: Exchange) -> None:
    e.chunks.insert(2, {"error": {"message": "the engine died"}})


@lie
def two_stream_ids(e: Exchange) -> None:
    e.chunks[1]["id"] = "chatcmpl-other"


@lie
def whole_for_a_stream(e: Exchange) -> None:
    e.body.pop("stream", None)


@lie
def html(e: Exchange) -> None:
    e.raw, e.content_type = "<html>It works!</html>", "text/html"


@lie
def no_choice(e: Exchange) -> None:
    e.whole["choices"] = []


@lie
def unrepeatable(e: Exchange) -> None:
    e.say(f" {time.monotonic_ns()}")


@lie
def too_many_requests(e: Exchange) -> None:
    e.status, e.whole = 429, {"error": {"message": "slow down"}}


@lie
def broken(e: Exchange) -> None:
    e.status, e.whole = 503, {"error": {"message": "no worker is left"}}


@lie
def key_echoed(e: Exchange) -> None:
    e.say(e.authorization)


@lie
def key_echoed_in_parts(e: Exchange) -> None:
    for char in e.authorization:
        e.say(char, whole=False)


@lie
def key_echoed_in_a_broken_stream(e: Exchange) -> None:
    for char in e.authorization:
        e.say(char, whole=False)
    e.chunks.append({"choices": "none"})


@lie
def key_echoed_beyond_an_excerpt(e: Exchange) -> None:
    e.raw = "x" * (200 - len(e.authorization) // 2) + e.authorization


@lie
def key_echoed_in_broken_json(e: Exchange) -> None:
    e.raw = json.dumps({"said": e.authorization})[:-1]


@lie
def key_echoed_in_escapes(e: Exchange) -> None:
    e.raw = '{"said": ' + "".join(f"\\u{ord(char):04x}" for char in e.authorization)


@lie
def key_echoed_after_the_end(e: Exchange) -> None:
    e.trailer = "x" * (200 - len(e.authorization) // 2) + e.authorization


@lie
def key_echoed_in_an_error(e: Exchange) -> None:
    e.status, e.whole = 500, {"error": {"message": f"wrong: {e.authorization}"}}


def _answer_otherwise(e: Exchange, body: dict[str, Any]) -> None:
    """Answer another request, and count the tokens of this prompt all the same."""
    prompt = e.whole["usage"]["prompt_tokens"]
    _replace(e, body)
    for usage in (e.whole["usage"], e.chunks[-1].get("usage")):
        if usage is not None:
            usage.update(prompt_tokens=prompt, total_tokens=prompt + usage["completion_tokens"])


def _other_pictures(e: Exchange, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """Answer as though other pictures stood in the places of those in the request."""
    body = copy.deepcopy(e.body)
    pictures = copy.deepcopy(list(parts_of(body["messages"])))
    for part, other in zip(parts_of(body["messages"]), change(pictures), strict=True):
        part.update(other)
    _answer_otherwise(e, body)


@lie
def pictures_swapped(e: Exchange) -> None:
    _other_pictures(e, lambda pictures: pictures[::-1])


@lie
def first_picture_for_all(e: Exchange) -> None:
    _other_pictures(e, lambda pictures: pictures[:1] * len(pictures))


@lie
def pictures_ignored(e: Exchange) -> None:
    messages = [{**message, "content": words(message)} for message in e.body["messages"]]
    _answer_otherwise(e, {**e.body, "messages": messages})


@lie
def pictures_not_counted(e: Exchange) -> None:
    for usage in (e.whole["usage"], e.chunks[-1].get("usage")):
        if usage is not None:
            usage["prompt_tokens"] = 7
            usage["total_tokens"] = 7 + usage["completion_tokens"]


@lie
def pictures_refused(e: Exchange) -> None:
    if any(parts_of(e.body["messages"])):
        e.status, e.whole = 400, {"error": {"message": "this model reads text only"}}


@lie
def png_alone(e: Exchange) -> None:
    if any("image/png" not in part["image_url"]["url"] for part in parts_of(e.body["messages"])):
        e.status, e.whole = 400, {"error": {"message": "send a PNG"}}


@lie
def broken_by_a_bad_request(e: Exchange) -> None:
    if e.status == 200 and 400 in e.earlier:
        e.status, e.whole = 503, {"error": {"message": "no worker is left"}}


@lie
def adapter_not_used(e: Exchange) -> None:
    """Whoever asks for the adapter gets the model's own answer."""
    if e.body.get("model") == ADAPTER:
        answer(plain := Exchange(e.body | {"model": MODEL}, ""), 0)
        e.whole, e.chunks = plain.whole, plain.chunks


@lie
def requests_given_the_adapter(e: Exchange) -> None:
    """Beside a request for the adapter, the others are answered with it too."""
    adapted = any(other.body.get("model") == ADAPTER for other in e.beside)
    if adapted and e.body.get("model") != ADAPTER:
        answer(other := Exchange(e.body | {"model": ADAPTER}, ""), 0)
        e.whole, e.chunks = other.whole, other.chunks
