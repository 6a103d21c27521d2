"""The rules of docs/parsing.md, sentence by sentence, on the reference parser.

Each row is one sentence, with the inputs that obey it and those it must leave alone. Every row is read
whole and streamed (character by character, and cut once at every place), as plain text and by tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from model_impl.chat.markers import Tokens
from model_impl.chat.parser import PromptState, parse, prompt_state
from tests.test_parser_properties import DRIFTED, Q, Runs, check_spans, stream, text_of, token_runs

CONTENT, CLOSED, OPEN = PromptState.CONTENT, PromptState.CLOSED_CHANNEL, PromptState.OPEN_CHANNEL
C, C_, T, T_ = "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>"


@dataclass
class Row:
    """An input and what comes of it; `calls` maps are compared as JSON text, in order."""

    id: str
    output: str | Runs
    reasoning: str = ""
    content: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    prompt: PromptState = CONTENT
    tools: tuple[dict[str, Any], ...] = ()
    calls_allowed: bool = True
    incomplete: tuple[int, ...] = ()
    kinds: str = "text tokens"

    def inputs(self) -> list[Runs]:
        """The output as plain text, and as runs of ordinary and control tokens."""
        if not isinstance(self.output, str):
            return [self.output]
        both: dict[str, Runs] = {"text": ((self.output, "unknown"),), "tokens": token_runs(self.output)}
        return [both[kind] for kind in self.kinds.split()]

    def check(self) -> None:
        request = {"prompt": self.prompt, "tools": self.tools, "calls_allowed": self.calls_allowed}
        for runs in self.inputs():
            text = text_of(runs)
            whole = parse(runs, **request)
            assert whole.reasoning == self.reasoning
            assert whole.content == self.content
            assert [(c.name, c.arguments) for c in whole.tool_calls] == self.calls
            assert tuple(i for i, c in enumerate(whole.tool_calls) if not c.complete) == self.incomplete
            check_spans(text, whole)
            for cuts in [range(len(text)), *([k] for k in range(len(text)))]:
                assert stream(runs, cuts, request).message == whole


def run(row: Row) -> None:
    row.check()


def table(*rows: Row) -> pytest.MarkDecorator:
    """The rows as parameters, under their ids."""
    assert len({row.id for row in rows}) == len(rows)
    return pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in rows])


def call(inside: str) -> str:
    return f"{T}call:f{{{inside}}}{T_}"


def arguments(name: str, inside: str, expected: str, **options: Any) -> Row:
    """A row for what stands between a call's brackets."""
    return Row(name, call(inside), calls=[("f", expected)], **options)


def declare(*names: str, **properties: Any) -> tuple[dict[str, Any], ...]:
    parameters = {"type": "object", "properties": properties}
    return tuple({"type": "function", "function": {"name": n, "parameters": parameters}} for n in names)


F = [("f", "{}")]

# ---------------------------------------------------------------------------------------- 1. first state

USER = "<bos><|turn>user\nHi<turn|>\n<|turn>model\n"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", CONTENT),
        ("plain text", CONTENT),
        (USER, CONTENT),
        (USER + C + "thought\n", OPEN),
        (USER + C + "thought\nhalf of it", OPEN),
        (USER + C + "thought\n" + C_, CLOSED),
        (USER + C + "thought\nwhole" + C_ + C + "thought\n", OPEN),
        # Only the last turn counts.
        (f"<|turn>model\n{C}thought\nx<turn|>\n" + USER, CONTENT),
        (f"<|turn>model\n{C}thought\n{C_}x<turn|>\n" + USER, CONTENT),
        # Channels before calls and responses are over.
        (
            USER
            + C
            + "thought\nx"
            + C_
            + T
            + "call:f{}"
            + T_
            + "<|tool_response>response:f{}<tool_response|>",
            CONTENT,
        ),
        (USER + C + "thought\nx" + T + "call:f{}", CONTENT),
        (USER + C + "thought\nx<|tool_response>", CONTENT),
        (USER + C + "thought\nx<tool_response|>", CONTENT),
        (USER + T + "call:f{}" + T_ + "<|tool_response>response:f{}<tool_response|>" + C + "thought\n", OPEN),
        # A turn marker alone, or a channel outside any turn.
        ("<|turn>", CONTENT),
        (C + "thought\n", OPEN),
    ],
)
def test_prompt_state(prompt: str, expected: PromptState) -> None:
    assert prompt_state(prompt) is expected
    turn = prompt[prompt.rfind("<|turn>") :] if "<|turn>" in prompt else prompt
    assert prompt_state(turn) is expected, "the tail from the last turn on is enough"
    assert parse("a", prompt) == parse("a", expected)


# ---------------------------------------------------------------------------------------- 2. thought channel


@table(
    Row("nothing", ""),
    Row("opens-and-closes", f"{C}thought\nwhy{C_}so", "why", "so"),
    Row("blocks-joined", f"{C}thought\na{C_}x{C}thought\nb{C_}y", "ab", "xy"),
    Row("label-dropped", f"{C}thought\nwhy{C_}", "why"),
    Row("label-once-only", f"{C}thought\nthought\n{C_}", "thought\n"),
    Row("label-with-two-newlines", f"{C}thought\n\nwhy{C_}", "\nwhy"),
    Row("label-before-closer", f"{C}thought{C_}so", "", "so"),
    Row("label-at-end", f"{C}thought"),
    Row("label-before-call", f"{C}thought{T}call:f{{}}{T_}", calls=F),
    Row("label-before-other-marker", f"{C}thought<eos>why", "why"),
    Row("label-of-second-block", f"{C}thought\na{C_}{C}thought{C_}", "a"),
    Row("label-with-blank", f"{C}thought {C_}", "thought "),
    Row("label-after-blank", f"{C} thought\nwhy{C_}", " thought\nwhy"),
    Row("label-longer", f"{C}thoughtful\nwhy{C_}", "thoughtful\nwhy"),
    Row("label-shorter", f"{C}though\nwhy{C_}", "though\nwhy"),
    Row("label-prefix-at-end", f"{C}though", "though"),
    Row("label-capital", f"{C}Thought\nwhy{C_}", "Thought\nwhy"),
    Row("label-missing", f"{C}why{C_}so", "why", "so"),
    Row("label-carriage-return", f"{C}thought\r\nwhy{C_}", "thought\r\nwhy"),
    Row("opener-inside-swallowed", f"{C}thought\na{C}thought\nb{C_}so", "ab", "so"),
    Row("opener-inside-without-label", f"{C}a{C}b{C_}so", "ab", "so"),
    Row("opener-twice", f"{C}{C}thought\na{C_}so", "a", "so"),
    Row("opener-inside-open-prompt", f"a{C}thought\nb{C_}so", "ab", "so", prompt=OPEN),
    Row("closer-in-content", f"before{C_}after", "", "beforeafter"),
    Row("closer-twice", f"{C}thought\na{C_}x{C_}y", "a", "xy"),
    Row("label-without-opener", f"thought\nwhy{C_}so", "why", "so"),
    Row("label-without-opener-open-end", "thought\nwhy", "why"),
    Row("label-without-opener-nor-newline", f"thought{C_}so", "", "so"),
    Row("label-word-alone-is-content", "thought", "", "thought"),
    Row("label-word-then-text", "thoughtful", "", "thoughtful"),
    Row("label-not-at-start", "so thought\nwhy", "", "so thought\nwhy"),
    Row("label-after-blank-is-content", "\nthought\nwhy", "", "\nthought\nwhy"),
    Row("label-in-closed-channel", "thought\nwhy", "", "thought\nwhy", prompt=CLOSED),
    Row("label-in-open-channel", f"thought\nwhy{C_}so", "thought\nwhy", "so", prompt=OPEN),
    Row("label-after-a-channel", f"{C}a{C_}thought\nso", "a", "thought\nso"),
    Row("label-after-a-marker", "<pad>thought\nso", "", "thought\nso"),
    Row("open-prompt", f"why{C_}so", "why", "so", prompt=OPEN),
    Row("closed-prompt", "so", "", "so", prompt=CLOSED),
    Row("closed-prompt-reopened", f"{C}thought\nwhy{C_}so", "why", "so", prompt=CLOSED),
    Row("left-open", f"{C}thought\nwhy and so", "why and so"),
    Row("left-open-in-prompt", "why and so", "why and so", prompt=OPEN),
    Row("before-opener", f"before{C}thought\nwhy{C_}after", "why", "beforeafter"),
    Row("call-ends-reasoning", f"{C}thought\nwhy{T}call:f{{}}{T_}so", "why", "so", F),
    Row("call-ends-open-prompt", f"why{T}call:f{{}}{T_}so", "why", "so", F, prompt=OPEN),
    Row("non-call-ends-reasoning", f"{C}why{T}?{T_}so", "why", "?so"),
    Row("reasoning-after-call", f"{T}call:f{{}}{T_}{C}thought\nwhy{C_}so", "why", "so", F),
    Row("call-text-in-content", "call:f{a:1}", "", "call:f{a:1}"),
    Row("call-text-in-reasoning", f"{C}thought\ncall:f{{a:1}}{C_}so", "call:f{a:1}", "so"),
    Row("call-text-with-closer", f"call:f{{a:1}}{T_}so", "", "call:f{a:1}so"),
    Row("spelled-markers-are-text", ((f"{C}thought\nwhy{C_}", "ordinary"),), "", f"{C}thought\nwhy{C_}"),
    Row(
        "spelled-closer-inside-reasoning",
        ((C, "control"), (f"thought\nuse {C_} to", "ordinary"), (C_, "control")),
        f"use {C_} to",
    ),
)  # fmt: skip
def test_thought_channel(row: Row) -> None:
    run(row)


# ---------------------------------------------------------------------------------------- 3. tool calls

DASHED = declare("f")
DECLARED_DASHED = declare("f", "-f")


@table(
    Row("call", f"{T}call:f{{}}{T_}", calls=F),
    Row("blanks-before-call", f"{T} \n call:f{{}}{T_}", calls=F),
    Row("blanks-around-parts", f"{T}call : f {{}}{T_}", calls=F),
    Row("unusual-blanks", f"{T}\x1c\u00a0call:\x1df\x85{{}}{T_}", calls=F),
    Row("bare-colon", f"{T}:f{{}}{T_}", calls=F),
    Row("no-call-word", f"{T}f{{}}{T_}", calls=F),
    Row("name-is-call", f"{T}call{{}}{T_}", calls=[("call", "{}")]),
    Row("name-begins-with-call", f"{T}caller{{}}{T_}", calls=[("caller", "{}")]),
    Row("parentheses", f"{T}call:f(){T_}", calls=F),
    Row("parentheses-bare-colon", f"{T}:f(){T_}", calls=F),
    Row("parentheses-without-call", f"{T}f(x){T_}", content="f(x)"),
    Row("parentheses-without-call-declared", f"{T}f(a=1){T_}", calls=[("f", '{"a":1}')], tools=declare("f")),
    Row("parentheses-closed-by-brace-text", f"{T}call:f(a=x}}y){T_}", calls=[("f", '{"a":"x}y"}')]),
    Row("brace-not-closed-by-parenthesis", f"{T}call:f{{a:x)y}}{T_}", calls=[("f", '{"a":"x)y"}')]),
    Row("equals-in-parentheses", f"{T}call:f(a=1,b=x){T_}", calls=[("f", '{"a":1,"b":"x"}')]),
    Row("colon-in-parentheses", f"{T}call:f(a:1,b=x){T_}", calls=[("f", '{"a":1,"b":"x"}')]),
    Row("equals-in-braces-is-text", f"{T}call:f{{a=1:x}}{T_}", calls=[("f", '{"a=1":"x"}')]),
    Row("equals-in-nested-braces-is-text", f"{T}call:f(a={{b=c:1}}){T_}", calls=[("f", '{"a":{"b=c":1}}')]),
    Row("nested-parentheses", f"{T}call:f(a=g(x),b=1){T_}", calls=[("f", '{"a":"g(x)","b":1}')]),
    Row("wrapped", f"{T}call:f({{a:1}}){T_}", calls=[("f", '{"a":1}')]),
    Row("wrapped-with-blanks", f"{T}call:f( {{a:1}} ){T_}", calls=[("f", '{"a":1}')]),
    Row("wrapped-empty", f"{T}call:f({{}}){T_}", calls=F),
    Row("wrapped-cut-before-parenthesis", f"{T}call:f({{a:1}}{T_}", calls=[("f", '{"a":1}')]),
    Row("dash-kept", f"{T}call:-f{{}}{T_}", calls=[("-f", "{}")]),
    Row("dash-dropped", f"{T}-f{{}}{T_}", calls=F, tools=DASHED),
    Row("dash-dropped-after-call", f"{T}call:-f{{}}{T_}", calls=F, tools=DASHED),
    Row("dash-declared", f"{T}-f{{}}{T_}", calls=[("-f", "{}")], tools=DECLARED_DASHED),
    Row("dash-of-undeclared", f"{T}-g{{}}{T_}", calls=[("-g", "{}")], tools=DASHED),
    Row("drifted-opener", f"{DRIFTED}call:f{{}}{T_}", calls=F),
    Row("drifted-opener-blanks", f"{DRIFTED} call : f {{}}{T_}", calls=F),
    Row("drifted-opener-ordinary", ((f"x{DRIFTED}call:f{{}}", "ordinary"), (T_, "control")), content="x",
        calls=F),
    Row("drifted-without-call", f"{DRIFTED}f{{}}{T_}", content=f"{DRIFTED}f{{}}"),
    Row("drifted-text", f"the {DRIFTED} marker", content=f"the {DRIFTED} marker"),
    Row("drifted-at-end", f"the {DRIFTED}", content=f"the {DRIFTED}"),
    Row("drifted-cut-head", f"{DRIFTED}call:f", content=f"{DRIFTED}call:f"),
    Row("drifted-in-reasoning", f"{C}a{DRIFTED}b{C_}c", f"a{DRIFTED}b", "c"),
    Row("drifted-in-reasoning-before-marker", f"{C}a{DRIFTED}<eos>b{C_}c", f"a{DRIFTED}b", "c"),
    Row("drifted-call-ends-reasoning", f"{C}a{DRIFTED}call:f{{}}{T_}c", "a", "c", F),
    Row("drifted-twice", f"{DRIFTED}{DRIFTED}call:f{{}}{T_}", content=DRIFTED, calls=F),
    Row("name-characters", f"{T}call:ns:a.b-c/d_9{{}}{T_}", calls=[("ns:a.b-c/d_9", "{}")]),
    Row("name-letters", f"{T}call:größe東{{}}{T_}", calls=[("größe東", "{}")]),
    Row("name-with-other-character", f"{T}call:a+b{{}}{T_}x", content="call:a+b{}x"),
    Row("name-with-blank", f"{T}call:a b{{}}{T_}x", content="call:a b{}x"),
    Row("name-empty", f"{T}call:{{}}{T_}x", content="call:{}x"),
    Row("not-a-call", f"{T}hello!{T_}x", content="hello!x"),
    Row("not-a-call-json", f'{T}{{"name":"f"}}{T_}', content='{"name":"f"}'),
    Row("opener-alone", T),
    Row("opener-and-closer", f"{T}{T_}x", content="x"),
    Row("opener-twice", f"{T}{T}call:f{{}}{T_}", calls=F),
    Row("opener-spelled", ((f"{T}call:f{{}}", "ordinary"),), content=f"{T}call:f{{}}"),
    Row("opener-spelled-not-a-call", ((f"{T}hello", "ordinary"),), content=f"{T}hello"),
    Row("two-in-one-wrapper", f"{T}call:f{{}}call:g{{a:1}}{T_}", calls=[("f", "{}"), ("g", '{"a":1}')]),
    Row("two-in-one-wrapper-blanks", f"{T}call:f{{}} \n call:g{{}}{T_}", calls=[("f", "{}"), ("g", "{}")]),
    Row("second-in-wrapper-needs-call", f"{T}call:f{{}}g{{}}{T_}", content="g{}", calls=F),
    Row("second-after-closer-is-text", f"{T}call:f{{}}{T_}call:g{{}}", content="call:g{}", calls=F),
    Row("closer-missing-at-end", f"{T}call:f{{}}", calls=F),
    Row("closer-missing-at-opener", f"{T}call:f{{}}{T}call:g{{}}{T_}", calls=[("f", "{}"), ("g", "{}")]),
    Row("closer-missing-at-turn", f"{T}call:f{{}}<turn|>", calls=F),
    Row("brace-missing-at-closer", f"{T}call:f{{a:1{T_}x", content="x", calls=[("f", '{"a":1}')],
        incomplete=(0,)),
    Row(
        "brace-missing-at-opener", f"{T}call:f{{a:1{T}call:g{{}}{T_}",
        calls=[("f", '{"a":1}'), ("g", "{}")], incomplete=(0,),
    ),
    Row("brace-missing-at-turn", f"{T}call:f{{a:1<turn|>", calls=[("f", '{"a":1}')], incomplete=(0,)),
    Row("closing-brackets-dropped", f"{T}call:f{{a:1}}}}]){T_}x", content="x", calls=[("f", '{"a":1}')]),
    Row("closing-brackets-and-blanks-dropped", f"{T}call:f{{a:1}}\n }}\n]{T_}x", content="x",
        calls=[("f", '{"a":1}')]),
    Row("closing-brackets-before-call", f"{T}call:f{{}} }} call:g{{}}{T_}", calls=[("f", "{}"), ("g", "{}")]),
    Row("opening-brackets-kept", f"{T}call:f{{}}{{{T_}", content="{", calls=F),
    Row("closing-brackets-after-closer-kept", f"{T}call:f{{}}{T_}}}", content="}", calls=F),
    Row("blanks-after-call-dropped", f"{T}call:f{{}} \n{T_}x", content="x", calls=F),
    Row("text-after-bracket", f"{T}call:f{{}} text{T_}x", content=" textx", calls=F),
    Row("equal-calls", f"{T}call:f{{}}{T_}{T}call:f{{}}{T_}", calls=F * 2),
    Row("undeclared", f"{T}call:g{{}}{T_}", calls=[("g", "{}")], tools=DASHED),
    Row("text-around-calls", f"a{T}call:f{{}}{T_}b{T}call:g{{}}{T_}c", content="abc",
        calls=[("f", "{}"), ("g", "{}")]),
    *(
        Row(f"stray-{number}-in-content", f"a{marker}b", content="ab")
        for number,
        marker in enumerate((T_, "<|tool_response>", "<turn|>", "<eos>", "<pad>", "<unused0>", "<unused6241>",
            Q))
    ),
    *(
        Row(f"stray-{number}-in-reasoning", f"{C}a{marker}b{C_}c", "ab", "c")
        for number, marker in enumerate((T_, "<|tool_response>", "<turn|>", "<eos>", "<pad>", "<unused0>", Q))
    ),
    Row("almost-unused", "<unused> <unusedx> <unused12345>", content="<unused> <unusedx> <unused12345>"),
    Row("almost-markers", "<|tool_call <|channel <| turn|> <eos <bo>",
        content="<|tool_call <|channel <| turn|> <eos <bo>"),
    Row("other-tags", "<b>1 < 2</b> <|im_end|>", content="<b>1 < 2</b> <|im_end|>"),
    Row("choice-none", f"a{T}call:f{{b:{Q}c{Q}}}{T_}d", content="acall:f{b:c}d", calls_allowed=False),
    Row("choice-none-ends-reasoning", f"{C}a{T}call:f{{}}{T_}d", "a", "call:f{}d", calls_allowed=False),
    Row("choice-none-two-in-wrapper", f"{T}call:f{{}}call:g{{}}{T_}", content="call:f{}call:g{}",
        calls_allowed=False),
    Row("choice-none-drifted", f"{DRIFTED}call:f{{}}{T_}", content="call:f{}", calls_allowed=False),
    Row("choice-none-drifted-text", f"a {DRIFTED} b", content=f"a {DRIFTED} b", calls_allowed=False),
    Row("choice-none-cut", f"{T}call:f", content="call:f", calls_allowed=False),
    Row("cut-in-name", f"{T}call:f", content="call:f"),
    Row("cut-before-brace", f"{T}call:f ", content="call:f "),
    Row("cut-after-brace", f"{T}call:f{{", calls=F, incomplete=(0,)),
    Row("cut-in-key", f"{T}call:f{{ab", calls=[("f", '{"ab":""}')], incomplete=(0,)),
    Row("cut-after-colon", f"{T}call:f{{a:", calls=[("f", '{"a":""}')], incomplete=(0,)),
    Row("cut-in-bare", f"{T}call:f{{a:1", calls=[("f", '{"a":1}')], incomplete=(0,)),
    Row("cut-in-string", f"{T}call:f{{a:{Q}b", calls=[("f", '{"a":"b"}')], incomplete=(0,)),
    Row("cut-in-quotes", f"{T}call:f{{a:'b", calls=[("f", '{"a":"\'b"}')], incomplete=(0,)),
    Row("cut-in-delimited-key", f"{T}call:f{{{Q}a", calls=[("f", '{"a":""}')], incomplete=(0,)),
    Row("cut-after-delimited-key", f"{T}call:f{{{Q}a{Q}", calls=[("f", '{"a":""}')], incomplete=(0,)),
    Row("cut-after-comma", f"{T}call:f{{a:[1,", calls=[("f", '{"a":[1]}')], incomplete=(0,)),
    Row("cut-in-nested", f"{T}call:f{{a:[{{b:1", calls=[("f", '{"a":[{"b":1}]}')], incomplete=(0,)),
    Row("cut-second-call", f"{T}call:f{{}}{T_}{T}call:g{{a:", calls=[("f", "{}"), ("g", '{"a":""}')],
        incomplete=(1,)),
)  # fmt: skip
def test_tool_calls(row: Row) -> None:
    run(row)


LIMIT = 300


@pytest.mark.parametrize("opener", [T, DRIFTED])
@pytest.mark.parametrize("excess", [0, 1])
def test_a_head_has_a_longest_length(opener: str, excess: int) -> None:
    """A name that never reaches its bracket is not held for ever."""
    head = "call:" + "n" * (LIMIT - len("call:{") + excess) + "{"
    row = Row("head", f"{opener}{head}a:1}}{T_}")
    if excess:
        row.content = ("" if opener == T else DRIFTED) + head + "a:1}"
    else:
        row.calls = [(head[5:-1], '{"a":1}')]
    row.check()


@pytest.mark.parametrize("blanks", [LIMIT - 1, LIMIT, LIMIT + 1])
def test_blanks_before_a_stray_bracket_have_a_longest_length(blanks: int) -> None:
    row = Row("blanks", f"{T}call:f{{}}{' ' * blanks}}}x{T_}", calls=F)
    kept = blanks >= LIMIT
    row.content = (" " * (blanks - LIMIT) + "}" if kept else "") + "x"
    row.check()


# ---------------------------------------------------------------------------------------- 4. arguments


@table(
    arguments("empty", "", "{}"),
    arguments("string", f"a:{Q}b{Q}", '{"a":"b"}'),
    arguments("string-empty", f"a:{Q}{Q}", '{"a":""}'),
    arguments("string-verbatim", f'a:{Q} \\n "x\' }}],:=( {Q}', '{"a":" \\\\n \\"x\' }],:=( "}'),
    arguments("string-newlines", f"a:{Q}x\n\ty{Q}", '{"a":"x\\n\\ty"}'),
    arguments("string-unicode", f"a:{Q}Ü👩‍🚀\x00\ud83d{Q}", '{"a":"Ü👩‍🚀\\u0000\ud83d"}'),
    arguments("string-blanks-kept", f"a: {Q}  b  {Q} ", '{"a":"  b  "}'),
    arguments("string-like-call", f"a:{Q}call:g{{}}{Q}", '{"a":"call:g{}"}'),
    arguments("string-with-closers", f"a:{Q}x}}}}{Q}", '{"a":"x}}"}'),
    arguments("string-marker-text", f"a:{Q}x<|channel>y{Q}", '{"a":"x<|channel>y"}'),
    Row(
        "string-spelled-closer",
        ((f"{T}", "control"), ("call:f{a:", "ordinary"), (Q, "control"), (f"}}{T_}", "ordinary"),
            (Q, "control"), ("}", "ordinary")),
        calls=[("f", f'{{"a":"}}{T_}"}}')],
    ),
    arguments("key-delimited", f"{Q}a{Q}:1", '{"a":1}'),
    arguments("key-delimited-verbatim", f"{Q} a:b,{{ {Q}:1", '{" a:b,{ ":1}'),
    arguments("key-delimited-empty", f"{Q}{Q}:1", '{"":1}'),
    arguments("key-delimited-nested", f"a:{{{Q}b c{Q}:1}}", '{"a":{"b c":1}}'),
    arguments("key-delimited-after-bare", f"a:1,{Q}b{Q}:2", '{"a":1,"b":2}'),
    arguments("key-delimited-after-string", f"a:{Q}x{Q},{Q}b{Q}:2", '{"a":"x","b":2}'),
    arguments("key-delimited-without-value", f"{Q}a{Q},b:1", '{"a":"","b":1}'),
    arguments("key-trimmed", " a :1, b\n:2", '{"a":1,"b":2}'),
    arguments("key-spaces-unicode-dash-dot", "my schlüssel-1.b:1", '{"my schlüssel-1.b":1}'),
    arguments("key-twice", "a:1,a:2", '{"a":1,"a":2}'),
    arguments("separators-with-blanks", "a : 1 ,\n b : [ 1 , 2 ] , c : { d : 3 }",
        '{"a":1,"b":[1,2],"c":{"d":3}}'),
    arguments("trailing-comma", f"a:{Q}x{Q},", '{"a":"x"}'),
    arguments("trailing-comma-bare", "a:1,", '{"a":1}'),
    arguments("trailing-comma-bare-blank", "a:1, ", '{"a":1}'),
    arguments("trailing-comma-array", "a:[1,2,]", '{"a":[1,2]}'),
    arguments("trailing-comma-object", "a:{b:1,}", '{"a":{"b":1}}'),
    arguments("leading-comma", ",a:1", '{"a":1}'),
    arguments("value-missing", "a:", '{"a":""}'),
    arguments("value-missing-then-member", "a:,b:1", '{"a":"","b":1}'),
    arguments("value-missing-nested", "a:{b:},c:1", '{"a":{"b":""},"c":1}'),
    arguments("value-missing-array", "a:[,1,,2]", '{"a":[1,2]}'),
    arguments("key-alone", "a", '{"a":""}'),
    arguments("containers", "a:[],b:{},c:[[1],{d:[]}]", '{"a":[],"b":{},"c":[[1],{"d":[]}]}'),
    arguments("array-of-strings", f"a:[{Q}x]{Q},{Q},{Q}]", '{"a":["x]",","]}'),
    # ASCII quotes
    arguments("double-quotes", 'a:"x, y",b:1', '{"a":"x, y","b":1}'),
    arguments("single-quotes", "a:'x, y',b:1", '{"a":"x, y","b":1}'),
    arguments("double-quotes-escapes", r'a:"x\n\"\u00e9\\"', r'{"a":"x\n\"é\\"}'),
    arguments("single-quotes-no-escapes", r"a:'x\n'", r'{"a":"x\\n"}'),
    arguments("double-quotes-bad-escape", r'a:"x\q"', r'{"a":"x\\q"}'),
    arguments("quotes-in-array", """a:["x","y",'z']""", '{"a":["x","y","z"]}'),
    Row("quotes-in-parentheses", f"{T}call:f(a=\"x\",b='y'){T_}", calls=[("f", '{"a":"x","b":"y"}')]),
    arguments("quotes-before-blank-separator", 'a:"x" ,b:1', '{"a":"x","b":1}'),
    arguments("quotes-at-end", 'a:"x"', '{"a":"x"}'),
    arguments("quotes-inside", "a:'it's, ok'", '{"a":"it\'s, ok"}'),
    arguments("quotes-not-closed", "a:'twas,b:1", '{"a":"\'twas","b":1}'),
    arguments("quotes-followed-by-text", 'a:"x" y,b:1', '{"a":"\\"x\\" y","b":1}'),
    arguments("quotes-after-text", 'a:x "y",b:1', '{"a":"x \\"y\\"","b":1}'),
    arguments("quotes-not-closed-with-brackets", "a:['x,y],b:1", '{"a":["\'x","y"],"b":1}'),
    arguments("quotes-not-closed-double", 'a:"x,b:1', '{"a":"\\"x","b":1}'),
    arguments("quotes-both-unclosed", "a:'x,b:\"y", '{"a":"\'x","b":"\\"y"}'),
    arguments("quotes-unclosed-then-delimiter", f"a:'x,b:{Q}y{Q},c:'z'", '{"a":"\'x","b":"y","c":"z"}'),
    arguments("quotes-empty", "a:\"\",b:''", '{"a":"","b":""}'),
    arguments("quoted-key", "\"a\":1,'b':2", '{"a":1,"b":2}'),
    arguments("quoted-key-escape", r'"a\"b":1', r'{"a\"b":1}'),
    # missing delimiters
    arguments("missing-opener", f"a:x{Q},b:1", '{"a":"x","b":1}'),
    arguments("missing-opener-number", f"a:5{Q}", '{"a":"5"}'),
    arguments("missing-opener-commas", f"a:x, y, z{Q},b:1", '{"a":"x, y, z","b":1}'),
    arguments("bare-comma", "a:San Francisco, CA", '{"a":"San Francisco, CA"}'),
    arguments("bare-comma-then-member", "a:San Francisco, CA,b:1", '{"a":"San Francisco, CA","b":1}'),
    arguments("bare-commas", "a:x, y, z", '{"a":"x, y, z"}'),
    arguments("bare-comma-with-colon", "a:x, y:z", '{"a":"x","y":"z"}'),
    arguments("bare-comma-in-array", "a:[x, y]", '{"a":["x","y"]}'),
    arguments("bare-brackets", "a:g{h}[1],b:1", '{"a":"g{h}[1]","b":1}'),
    arguments("bare-colon", "a:http://x.org:80/y", '{"a":"http://x.org:80/y"}'),
    Row("missing-closer-token", f"{T}call:f{{a:{Q}x}}{T_}y", content="y", calls=[("f", '{"a":"x"}')]),
    Row("missing-closer-nested", f"{T}call:f{{a:[{{b:{Q}x}}]}}{T_}", calls=[("f", '{"a":[{"b":"x"}]}')]),
    Row("missing-closer-some", f"{T}call:f{{a:{{b:{Q}x}}{T_}", calls=[("f", '{"a":{"b":"x"}}')],
        incomplete=(0,)),
    Row("missing-closer-more", f"{T}call:f{{a:{Q}x}}}}{T_}", calls=[("f", '{"a":"x}"}')]),
    Row("missing-closer-blanks", f"{T}call:f{{a:{Q}x\n}}\n{T_}", calls=[("f", '{"a":"x\\n"}')]),
    Row("missing-closer-parenthesis", f"{T}call:f(a={Q}x){T_}", calls=[("f", '{"a":"x"}')]),
    Row("missing-closer-wrapped", f"{T}call:f({{a:{Q}x}}){T_}", calls=[("f", '{"a":"x"}')]),
    Row("missing-closer-no-brace", f"{T}call:f{{a:{Q}x{T_}y", content="y", calls=[("f", '{"a":"x"}')],
        incomplete=(0,), kinds="tokens"),
    Row(
        "missing-closer-no-brace-in-text", f"{T}call:f{{a:{Q}x{T_}y{Q}}}",
        calls=[("f", f'{{"a":"x{T_}y"}}')], kinds="text",
    ),
    Row("missing-closer-at-opener", f"{T}call:f{{a:{Q}x}}{T}call:f{{}}{T_}", calls=[("f", '{"a":"x"}'), *F]),
    Row("missing-closer-at-end", f"{T}call:f{{a:{Q}x}}", calls=[("f", '{"a":"x"}')]),
    arguments("missing-colon", f"a{Q}x{Q},b:1", '{"a":"x","b":1}'),
    arguments("missing-colon-blank", f"a {Q} x{Q}", '{"a":" x"}'),
    arguments("missing-colon-empty-string", f"a{Q}{Q},b:1", '{"a":"","b":1}'),
    arguments("missing-key-opener", f"a{Q}:x", '{"a":"x"}'),
    arguments("missing-key-opener-comma", f"a{Q},b:1", '{"a":"","b":1}'),
    # what follows a value
    arguments("text-after-string", f"a:{Q}x{Q} junk,b:1", '{"a":"x","b":1}'),
    arguments("text-after-string-at-end", f"a:{Q}x{Q}junk", '{"a":"x"}'),
    arguments("text-after-container", "a:[1]junk,b:1", '{"a":[1],"b":1}'),
    arguments("text-after-delimited-key", f"{Q}a{Q}junk:1", '{"a":1}'),
    arguments("missing-comma", f"a:{Q}x{Q}b:1", '{"a":"x","b":1}'),
    arguments("missing-comma-blank", f"a:{Q}x{Q} b:1", '{"a":"x","b":1}'),
    arguments("missing-comma-container", "a:[1] b:{c:1}d:2", '{"a":[1],"b":{"c":1},"d":2}'),
    arguments("missing-comma-in-array", f"a:[{Q}x{Q} b:1,2]", '{"a":["x",2]}'),
    arguments("quoted-key-colon", '"a:b":1', '{"a:b":1}'),
    arguments("quoted-key-colon-after-bare", "a:1,'b:c':2", '{"a":1,"b:c":2}'),
    arguments("quoted-key-open", '"a:b,c:1', '{"\\"a":"b","c":1}'),
    # brackets
    arguments("array-left-open", "a:[1,2", '{"a":[1,2]}'),
    arguments("closer-of-outer-bracket", "a:[{b:[1}],c:2", '{"a":[{"b":[1]}],"c":2}'),
    arguments("closer-of-nothing", "a:x],b:1", '{"a":"x]","b":1}'),
    arguments("closer-of-nothing-before-key", "]a:1", '{"a":1}'),
    arguments("doubled-braces", "{a:1}", '{"a":1}'),
    # other markers
    arguments("stray-marker", "a:x<pad>y", '{"a":"xy"}'),
    arguments("stray-marker-in-key", "a<pad>b:1", '{"ab":1}'),
    arguments("stray-marker-in-unclosed-quotes", "a:'x<pad>y", '{"a":"\'xy"}'),
    arguments("stray-marker-in-quotes", "a:'x<pad>y'", '{"a":"x<pad>y"}'),
    Row(
        "channel-after-unclosed-quote", f"{T}call:f{{a:'x}}{C}thought\nwhy{C_}so", "why", "so",
        calls=[("f", '{"a":"\'x"}')],
    ),
    Row(
        "calls-after-unclosed-quote", f"{T}call:f{{a:'x}} call:g{{b:'y}} call:h{{c:\"z}}{T_}so", content="so",
        calls=[("f", '{"a":"\'x"}'), ("g", '{"b":"\'y"}'), ("h", '{"c":"\\"z"}')],
    ),
)  # fmt: skip
def test_arguments(row: Row) -> None:
    run(row)


@pytest.mark.parametrize("marker", ["<turn|>", "<|turn>", "<|tool_response>", "<eos>", T, T_])
@pytest.mark.parametrize("inside", ["a:1", f"a:{Q}x", f"{Q}a", "a:'x", "a:x, y", "a:[{b:"])
def test_markers_that_end_a_call_end_it_anywhere(marker: str, inside: str) -> None:
    """By tokens; in plain text a string that is open may hold the marker's text."""
    runs: Runs = ((T, "control"), *token_runs(f"call:f{{{inside}"), (marker, "control"), ("so", "ordinary"))
    whole = parse(runs)
    assert (whole.content, [c.complete for c in whole.tool_calls]) == ("so", [False])
    assert isinstance(json.loads(whole.tool_calls[0].arguments), dict)


@pytest.mark.parametrize("kind", ["unknown", "ordinary"])
def test_text_is_a_run_of_unknown_origin(kind: Tokens) -> None:
    text = f"a{T}call:f{{}}{T_}"
    assert (parse([(text, kind)]) == parse(text)) is (kind == "unknown")
