"""The client and the target `openai`: limits, redirects, the budget, and where the key may go."""

from __future__ import annotations

import json

import pytest

from conformance.errors import TargetError
from conformance.http import Answer, Client, HttpError, Limits
from conformance.replies import MalformedReplyError, read_stream, read_whole, strings
from conformance.targets import registry
from conformance.targets.endpoint import KEY_SETTING, KEY_VARIABLE, Endpoint, checked_endpoint, key_of
from conformance.targets.openai import OpenAITarget, open_endpoint
from conformance.targets.protocol import ServeRequest
from tests.lying_server import LyingServer
from tests.server_answers import MODEL
from tests.server_lies import LIES

KEY = "sk-test-0123456789"
HELLO = {"model": MODEL, "messages": [{"role": "user", "content": "#plain"}], "stream": True}


def post(server: LyingServer, limits: Limits) -> Answer | HttpError:
    return Client(server.url, {}, limits).post("/chat/completions", [HELLO])[0]


def failure(answer: Answer | HttpError) -> tuple[str, str]:
    assert isinstance(answer, HttpError), answer
    return answer.failure, str(answer)


def test_a_stream_is_read_to_its_end() -> None:
    with LyingServer() as server:
        answer = post(server, Limits())
    assert isinstance(answer, Answer)
    assert answer.done
    assert read_stream(answer.events or (), done=True).content == "The lamp is on."


@pytest.mark.parametrize(
    ("lie", "limits", "expected"),
    [
        ("stalled-stream", Limits(idle=0.2), ("timeout", "no byte for 0.2 s")),
        ("endless-stream", Limits(total=0.3), ("timeout", "no whole answer within 0.3 s")),
        ("drip", Limits(total=0.3), ("timeout", "no whole answer within 0.3 s")),
        ("endless-stream", Limits(max_events=20), ("too-large", "the stream has more than 20 events")),
        ("flood", Limits(max_bytes=300_000), ("too-large", "the answer has more than 300000 bytes")),
    ],
)
def test_an_answer_without_end_meets_a_limit(lie: str, limits: Limits, expected: tuple[str, str]) -> None:
    with LyingServer(lie) as server:
        assert failure(post(server, limits)) == expected


def test_no_more_requests_than_the_budget() -> None:
    with LyingServer() as server:
        client = Client(server.url, {}, Limits(max_requests=2))
        answers = client.post("/chat/completions", [HELLO, HELLO, HELLO])
        assert sorted(isinstance(answer, Answer) for answer in answers) == [False, True, True]
        assert failure(client.get("/models"))[0] == "budget"
        assert len(server.seen) == 2


def test_a_port_where_nobody_listens() -> None:
    with LyingServer() as server:
        url = server.url
    assert failure(Client(url, {}, Limits(connect=1)).get("/models"))[0] == "connection"


def test_a_redirect_is_told_and_never_followed() -> None:
    with (
        LyingServer() as elsewhere,
        LyingServer("redirect", elsewhere=elsewhere.url) as server,
    ):
        target = OpenAITarget(Endpoint(server.url, MODEL), key=KEY)
        answer = target.serve(ServeRequest(bodies=(HELLO,)))[0]
        assert (answer.status, answer.failure) == (307, "redirect")
        assert elsewhere.url in answer.detail
        assert server.seen[0][1]["Authorization"] == f"Bearer {KEY}"
        assert not elsewhere.seen


def test_proxies_and_netrc_of_the_machine_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with LyingServer() as proxy, LyingServer() as server:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("http_proxy", proxy.url)
        assert isinstance(post(server, Limits()), Answer)
        assert not proxy.seen


def test_without_a_key_none_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with LyingServer() as server:
        target = open_endpoint(f"openai@{server.url}#{MODEL}", timeout=5)
        assert target.models().status == 200
        assert "Authorization" not in server.seen[0][1]


@pytest.mark.parametrize("lie", [name for name in LIES if name.startswith("key-echoed")])
@pytest.mark.parametrize("key", [KEY, 'sk-"quoted"-012', "sk-back\\slash\\0", "sk-it's-'it'-\\'"])
def test_an_answer_with_the_key_in_it_is_thrown_away(lie: str, key: str) -> None:
    with LyingServer(lie) as server:
        target = OpenAITarget(Endpoint(server.url, MODEL), key=key)
        answers = target.serve(ServeRequest(bodies=(HELLO, HELLO | {"stream": False})))
    assert "key-echoed" in [answer.failure for answer in answers]
    said = [answer.detail for answer in answers] + [text for a in answers for text in strings(a.body)]
    assert not any(part in text for text in said for part in (key, key[:6], key[-6:], repr(key)[1:-1]))


@pytest.mark.parametrize("place", [KEY, KEY.replace("-", "%2D"), f"host/{KEY}"])
def test_a_redirect_with_the_key_in_it_is_not_told(place: str) -> None:
    with LyingServer("redirect", elsewhere=f"http://127.0.0.1:9/?key={place}") as server:
        target = OpenAITarget(Endpoint(server.url, MODEL), key=KEY)
        answer = target.serve(ServeRequest(bodies=(HELLO,)))[0]
    assert (answer.status, answer.failure) == (307, "key-echoed")
    assert "0123456789" not in answer.detail


def test_an_answer_that_is_no_json_is_quoted() -> None:
    with LyingServer("html") as server:
        target = OpenAITarget(Endpoint(server.url, MODEL), key=KEY)
        answer = target.serve(ServeRequest(bodies=(HELLO | {"stream": False},)))[0]
    assert answer.failure == "malformed"
    assert answer.detail == "not JSON (JSONDecodeError): '<html>It works!</html>'"


def test_the_key_of_another_call_does_not_hide_the_key() -> None:
    """Parts of two calls alternate in a stream that is no chat completion."""

    def event(index: int, text: str) -> dict[str, object]:
        call = {"index": index, "function": {"arguments": text}}
        return {"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]}

    events = [event(index, text) for char in KEY for index, text in ((0, char), (1, "x"))]
    target = OpenAITarget(Endpoint("http://127.0.0.1:9/v1", MODEL), key=KEY)
    safe = target._safe(Answer(200, events=(*events, {"choices": "none"}), done=True))
    assert (safe.failure, safe.events) == ("key-echoed", None)


def test_the_key_is_read_from_the_variable_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    monkeypatch.setenv("OTHER_KEY", f"{KEY}-other")
    assert key_of() == KEY
    assert key_of("OTHER_KEY") == f"{KEY}-other"
    monkeypatch.setenv(KEY_SETTING, "OTHER_KEY")
    assert key_of() == f"{KEY}-other"


@pytest.mark.parametrize(
    "key", ["", "short", "two words of a key", "sk-ключ-0123456789", "sk-0123456789\nX: y"]
)
def test_a_key_that_cannot_be_one_is_refused_without_showing_it(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTHER_KEY", key)
    with pytest.raises(TargetError) as caught:
        key_of("OTHER_KEY")
    assert "OTHER_KEY" in str(caught.value)
    assert not key or key not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "model"),
    [
        ("ftp://host/v1", "m"),
        ("host:8000/v1", "m"),
        ("http://user:secret@host/v1", "m"),
        ("http://host/v1?key=secret", "m"),
        ("http://host:port/v1", "m"),
        ("http://host/v1", ""),
        ("http://host/v1", "two words"),
    ],
)
def test_a_url_that_cannot_be_one_is_refused_without_its_secrets(url: str, model: str) -> None:
    with pytest.raises(TargetError) as caught:
        checked_endpoint(url, model)
    assert "secret" not in str(caught.value)


def test_a_server_is_a_target_that_can_be_named() -> None:
    spec = registry.resolve("openai@http://127.0.0.1:8000/v1/#google/gemma-4-31B-it")
    assert spec == "openai@http://127.0.0.1:8000/v1#google/gemma-4-31B-it"
    assert registry.unavailable(spec) == ""
    info = registry.describe(registry.open_target(spec))
    assert info.capabilities == ("serve",)
    assert info.environment == {"url": "http://127.0.0.1:8000/v1", "model": "google/gemma-4-31B-it"}
    with pytest.raises(TargetError, match="openai@"):
        registry.resolve("openai")


# ---------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        {},
        {"choices": [{"message": {"content": 7}}]},
        {"choices": [{"message": {"tool_calls": {}}}]},
        {"choices": [{"index": 1, "message": {}}]},
        {"choices": [{"message": {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}}]},
    ],
)
def test_an_answer_that_no_client_can_read(body: object) -> None:
    with pytest.raises(MalformedReplyError):
        read_whole(body)


def test_both_names_of_reasoning_are_read() -> None:
    for name in ("reasoning", "reasoning_content"):
        assert read_whole({"choices": [{"message": {name: "Hm."}}]}).reasoning == "Hm."
        events = [{"choices": [{"delta": {name: part}}]} for part in ("H", "m.")]
        assert read_stream(events, done=True).reasoning == "Hm."


def test_parts_of_calls_are_put_together_by_index() -> None:
    def event(*parts: dict[str, object]) -> dict[str, object]:
        return {"choices": [{"delta": {"tool_calls": list(parts)}}]}

    def begin(index: int, name: str) -> dict[str, object]:
        head = {"index": index, "id": f"id-{index}", "type": "function"}
        return head | {"function": {"name": name, "arguments": ""}}

    events = [
        event(begin(0, "f")),
        event({"index": 0, "function": {"arguments": '{"a"'}}),
        event(begin(1, "g"), {"index": 0, "function": {"arguments": ": 1}"}}),
        event({"index": 1, "function": {"arguments": "{}"}}),
        {"choices": [{"delta": {}, "finish_reason": "tool_calls"}]},
    ]
    reply = read_stream(events, done=True)
    assert [(call.id, call.name, call.arguments) for call in reply.calls] == [
        ("id-0", "f", '{"a": 1}'),
        ("id-1", "g", "{}"),
    ]
    assert reply.faults == []
    assert json.dumps(reply.shown())
