"""Suite files: what is accepted, and that every error names file, line and field."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from conformance import resources, yamlfile
from conformance.commands.schema import schema_text, schemas
from conformance.discovery import looks_like_suite
from conformance.errors import SuiteError, UsageError
from conformance.loading import load_suite, load_suites, resolve_prompt, resolve_tools
from conformance.suites import PROMPTS

GOOD = """\
id: parser/demo
kind: parser
title: Demo
description: A demo.
area: reasoning
toolsets:
  weather:
    - {type: function, function: {name: get_weather}}
cases:
  - id: first-case
    title: The first rule holds.
    source: [R02, spec 6.5, check 7]
    output: "<|channel>thought\\nplan<channel|>answer"
    expect: {reasoning: plan, content: answer}
  - id: second-case
    title: The second rule holds.
    source: [vllm-project/vllm#38855]
    control_of: first-case
    tools: weather
    prompt: thinking
    output: hello
    expect: {content: hello}
"""


def write(tmp_path: Path, text: str | bytes, name: str = "parser/demo.yaml") -> Path:
    path = tmp_path / "suites" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_good_suite_is_loaded_with_lines_and_addresses(tmp_path: Path) -> None:
    suite = load_suite(write(tmp_path, GOOD))
    assert [(c.address, c.line) for c in suite.cases] == [
        ("parser/demo::first-case", 10),
        ("parser/demo::second-case", 15),
    ]
    assert suite.root == tmp_path / "suites"
    second = suite.case("second-case").case
    assert resolve_tools(second, suite.suite)[0]["function"]["name"] == "get_weather"
    assert resolve_prompt(second) == PROMPTS["thinking"]


BROKEN = {
    "unknown key": (
        "    expect: {content",
        "    expcet: {content",
        r":22: cases\[1\]\.expcet: unknown key; did",
    ),
    "kind": (
        "kind: parser",
        "kind: parsr",
        r':2: kind: expected one of parser, template, parity, mask, [a-z, ]+, accuracy, got "parsr"',
    ),
    "no kind": ("kind: parser\n", "", r":1: kind: expected one of parser, template"),
    "no title": ("title: Demo\n", "", r":1: the key `title` is required and missing"),
    "duplicate key": (
        "title: Demo",
        "title: Demo\ntitle: Two",
        r":4: title: duplicate key, first given on line 3",
    ),
    "duplicate id": (
        "second-case\n    t",
        "first-case\n    t",
        r":15: cases\[1\]\.id: duplicate case id .* line 10",
    ),
    "control": (
        "first-case\n    tools",
        "third-case\n    tools",
        r":18: cases\[1\]\.control_of: 'third-case' is no",
    ),
    "own control": ("first-case\n    tools", "second-case\n    tools", r":18: cases\[1\]\.control_of"),
    "toolset": ("tools: weather", "tools: wether", r":19: cases\[1\]\.tools: no toolset 'wether'.*: weather"),
    "prompt": (
        "prompt: thinking",
        "prompt: thinkin",
        r":20: cases\[1\]\.prompt: .* closed-channel, open-channel",
    ),
    "file id": ("id: parser/demo", "id: parser/other", r":1: id: 'parser/other' must equal .* 'parser/demo'"),
    "source": ("[vllm-project/vllm#38855]", "R02", r':17: cases\[1\]\.source: expected a list, got "R02"'),
    "bad source": (
        "[vllm-project/vllm#38855]",
        "[nowhere]",
        r":17: cases\[1\]\.source\[0\]: .*got \"nowhere\"",
    ),
    "no verdict": (
        "expect: {reasoning: plan, content: answer}",
        "keep: []",
        r":10: .*exactly one of `expect`",
    ),
    "number": ("output: hello", "output: 5", r":21: cases\[1\]\.output: expected text"),
    "not a boolean": (
        "tools: weather",
        'thinking: "true"',
        r":19: cases\[1\]\.thinking: expected true or false",
    ),
    "norway": ("{content: hello}", "{content: no}", r":22: cases\[1\]\.expect\.content: no means different"),
    "octal": ("{content: hello}", "{content: 007}", r":22: .*quote it"),
    "base 60": ("{content: hello}", "{content: 12:30}", r":22: .*quote it"),
    "infinity": ("{content: hello}", "{content: 1e999}", r":22: .*too large"),
    "tag": ("title: Demo", "title: !!python/name:os.system x", r":3: title: the tag .* is not allowed"),
    "syntax": ("output: hello", 'output: "hello', r":\d+: not valid YAML"),
    "second document": ("id: parser/demo", "---\nid: parser/demo\n---\nid: x", r": a second YAML document"),
    "unclosed": ("title: Demo", "title: [", r":\d+: not valid YAML"),
    "complex key": ("title: Demo", "? [a]\n: b", r":3: a mapping key must be plain text"),
    "unknown alias": ("title: Demo", "title: *nowhere", r":3: title: alias \*nowhere"),
    "no cases": (GOOD[GOOD.index("  - id: first") :], "", r":9: cases: expected a list"),
    "empty cases": (
        GOOD[GOOD.index("\n  - id: first") :],
        " []",
        r":9: cases: the list should have at least 1",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_suite_names_file_line_and_field(tmp_path: Path, name: str) -> None:
    old, new, message = BROKEN[name]
    assert old in GOOD
    head, _, tail = GOOD.rpartition(old)
    path = write(tmp_path, f"{head}{new}{tail}")
    with pytest.raises(SuiteError, match=message) as caught:
        load_suite(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"# only a comment\n", "the file is empty"),
        (b"- a\n- b\n", "a suite is a mapping"),
        (b"id: parser/demo\ntitle: \xff\n", ":2: byte 0xff is not UTF-8"),
        (b"a: 1\n" + b"#" * yamlfile.MAX_BYTES, "larger than 4 MiB"),
        (b"[" * 100_000, "nested deeper than"),
        (b"a: " + b"{b: " * yamlfile.MAX_DEPTH + b"1" + b"}" * yamlfile.MAX_DEPTH, "nested deeper than"),
        (b"a: &a [*a]\n", r"alias \*a has no complete anchor"),
        (b"a: " + b"9" * 5000, "quote it"),
    ],
)
def test_hostile_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(SuiteError, match=message):
        load_suite(write(tmp_path, content))


def test_an_alias_bomb_is_refused_quickly(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    with pytest.raises(SuiteError, match="values with aliases expanded"):
        load_suite(write(tmp_path, "\n".join(lines)))


def test_aliases_cannot_nest_deeper_than_the_limit(tmp_path: Path) -> None:
    half = yamlfile.MAX_DEPTH // 2
    lines = ["a0: &a0 " + "[" * half + "]" * half]
    lines += [f"a{n}: &a{n} " + "[" * half + f"*a{n - 1}" + "]" * half for n in range(1, 12)]
    with pytest.raises(SuiteError, match=r":2: a1.* nested deeper than"):
        load_suite(write(tmp_path, "\n".join(lines)))


def test_aliases_within_the_limit_are_expanded(tmp_path: Path) -> None:
    text = GOOD.replace("  weather:\n", "  weather: &w\n").replace("tools: weather", "tools: *w")
    suite = load_suite(write(tmp_path, text))
    assert suite.case("second-case").case.tools[0]["function"]["name"] == "get_weather"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=r"nothing\.yaml: cannot be read"):
        load_suite(tmp_path / "nothing.yaml")
    with pytest.raises(UsageError, match="no such file or folder"):
        load_suites([tmp_path / "nothing"])


def test_discovery_leaves_expectations_out_and_refuses_yml(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    write(tmp_path, "target: vllm\n", "expectations/vllm.yaml")
    assert [s.suite.id for s in load_suites([tmp_path / "suites"])] == ["parser/demo"]
    write(tmp_path, GOOD, "parser/forgotten.yml")
    with pytest.raises(SuiteError, match=r"forgotten\.yml: suite files end in \.yaml"):
        load_suites([tmp_path / "suites"])


def test_an_empty_folder_is_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no suite files"):
        load_suites([tmp_path])


def test_two_files_with_one_id_are_refused(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a", GOOD), write(tmp_path / "b", GOOD)
    with pytest.raises(SuiteError, match=r"'parser/demo' is also the id of"):
        load_suites([one, two])


def test_digest_changes_with_whatever_can_change_a_verdict(tmp_path: Path) -> None:
    def digests(text: str) -> list[str]:
        return [case.digest for case in load_suite(write(tmp_path, text)).cases]

    before = digests(GOOD)
    assert len(set(before)) == 2
    assert digests(GOOD.replace("A demo.", "Another description.") + "# a comment\n") == before
    changed_case = digests(GOOD.replace("content: answer", "content: other"))
    assert changed_case[0] != before[0]
    assert changed_case[1] == before[1]
    changed_tools = digests(GOOD.replace("name: get_weather", "name: get_news"))
    assert changed_tools[0] == before[0]
    assert changed_tools[1] != before[1]


def test_what_looks_like_a_suite(tmp_path: Path) -> None:
    for name, text, expected in [
        ("a.yaml", "id: a/b\nkind: parser\n", True),
        ("b.yaml", "kind: Deployment\napiVersion: v1\n", False),
        ("c.yaml", "kind: parser\ncases:\n  - id: x\n", True),
        ("d.yaml", "  id: x\n  kind: y\n", False),
        ("e.yml", "id: a/b\nkind: parser\n", False),
    ]:
        (tmp_path / name).write_text(text)
        assert looks_like_suite(tmp_path / name) is expected, name
    assert not looks_like_suite(resources.suites_dir() / "expectations" / "vllm.yaml")


def test_bundled_suites_load_and_no_case_is_there_twice() -> None:
    suites = load_suites()
    kinds = {
        "parser",
        "template",
        "parity",
        "mask",
        "contract",
        "processor",
        "server",
        "generation",
        "invariance",
        "lora",
        "accuracy",
        "scoring",
    }
    assert {s.suite.kind for s in suites} == kinds
    assert len({c.digest for c in suites.cases}) == len(suites.cases)
    for suite in suites:
        assert suite.root == resources.suites_dir()


@pytest.mark.parametrize("name", sorted(schemas()))
def test_committed_schemas_are_current(name: str) -> None:
    path = resources.schemas_dir() / f"{name}.schema.json"
    assert path.read_text(encoding="utf-8") == schema_text(name), "run `make schemas`"
    jsonschema.Draft202012Validator.check_schema(json.loads(path.read_text(encoding="utf-8")))


def test_no_schema_file_without_a_schema() -> None:
    files = {path.name.removesuffix(".schema.json") for path in resources.schemas_dir().iterdir()}
    assert files == set(schemas())


def test_schema_accepts_every_bundled_suite_and_rejects_a_typo() -> None:
    validator = jsonschema.Draft202012Validator(schemas()["suite"]())
    for suite in load_suites():
        value = yamlfile.read(suite.path).value
        validator.validate(value)
        value["cases"][0]["expcet"] = {}
        assert not validator.is_valid(value)


# JSON may write twelve characters for one, and YAML takes no key of more than 1024.
KEYS = st.text(max_size=80)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(value=st.dictionaries(KEYS, JSON, min_size=1, max_size=4))
def test_json_is_read_back_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.mktemp("yaml") / "x.yaml"
    text = yaml.safe_dump(value, default_style='"', allow_unicode=True)
    # The quoting style also quotes numbers and puts a tag before them, which is refused by design.
    if "!!" in text:
        path.write_text(text, encoding="utf-8")
        with pytest.raises(SuiteError, match="is not allowed"):
            yamlfile.read(path)
    path.write_text(json.dumps(value), encoding="utf-8")
    if all(ord(char) < 0x10000 for char in json.dumps(value, ensure_ascii=False)):
        assert yamlfile.read(path).value == value
