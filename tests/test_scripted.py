"""The script and its tokenizer: what the scripted checkpoint is to say, before any weight is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer

from model_impl.chat.parser import Message, parse
from model_impl.chat.render import render
from model_impl.nano import script as script_module
from model_impl.nano.script import Line, PictureLine, ScriptError, checkpoint_folder, load_script, read_script
from model_impl.nano.vocabulary import CONTROL_IDS, STOP_IDS, build_tokenizer, vocabulary_size

SCRIPT = load_script()
LINES = {line.id: line for line in SCRIPT.lines}
PICTURES = SCRIPT.pictures
FOLDER = checkpoint_folder()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def parsed(name: str) -> Message:
    return parse(LINES[name].output + LINES[name].stop, tools=SCRIPT.tools)


# ------------------------------------------------------------------------------------------- the script


def test_it_has_the_constructs_that_suites_assert_on() -> None:
    assert len(SCRIPT.lines) >= 30
    thought = parsed("thought")
    assert (thought.reasoning.strip(), thought.content) == ("Two and two is four.", "The sum is four.")
    assert parsed("thought-open").reasoning
    assert not parsed("thought-open").content
    assert "<channel|>" not in LINES["thought-open"].output
    (call,) = parsed("call").tool_calls
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris", "unit": "celsius"})
    assert [c.name for c in parsed("call-two").tool_calls] == ["get_weather", "get_weather"]
    assert [c.name for c in parsed("call-three").tool_calls] == ["get_time", "get_weather", "set_lamp"]
    (nested,) = parsed("call-nested").tool_calls
    assert json.loads(nested.arguments)["stops"][1] == {"city": "Bari", "nights": 1}
    (types,) = parsed("call-types").tool_calls
    assert json.loads(types.arguments) == {
        "color": None, "level": -2.5, "on": True, "repeat": False, "seconds": 90,
    }  # fmt: skip
    after = parsed("call-text")
    assert after.tool_calls
    assert after.content == "I have asked for the weather."
    for cut in ("cut-string", "cut-key", "cut-name", "cut-second"):
        output = LINES[cut].output
        assert output.count("<|tool_call>") == output.count("<tool_call|>") + 1
    assert len({line.output for line in SCRIPT.lines}) >= len(SCRIPT.lines)
    assert {line.stop for line in SCRIPT.lines} == {"<turn|>", "<|tool_response>", "<eos>"}


def test_all_calls_but_one_are_declared() -> None:
    declared = {tool["function"]["name"] for tool in SCRIPT.tools}
    called = {c.name for line in SCRIPT.lines for c in parsed(line.id).tool_calls if c.complete}
    assert called - declared == {"open_door"}


def write(tmp_path: Path, **changes: Any) -> Path:
    content = yaml.safe_load(
        Path(script_module.__file__).with_name("script.yaml").read_text(encoding="utf-8")
    )
    path = tmp_path / "script.yaml"
    path.write_text(yaml.safe_dump(content | changes, allow_unicode=True), encoding="utf-8")
    return path


def test_a_script_comes_back_as_it_was_written(tmp_path: Path) -> None:
    assert read_script(write(tmp_path)) == SCRIPT


LINE = {"id": "a", "shows": "b", "output": "c"}
SEEN = {"id": "a", "shows": "b"}
ABOUT = PICTURES.model_dump(exclude_defaults=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lines": [LINE, LINE]}, r"there twice: a"),
        ({"lines": [LINE | {"id": "default"}]}, r"there twice: default"),
        ({"lines": []}, r"lines: .*at least 1"),
        ({"lines": [LINE | {"outputs": "d"}]}, r"lines\.0\.outputs: Extra inputs"),
        ({"lines": [LINE | {"id": "A b"}]}, r"lines\.0\.id: .*pattern"),
        ({"lines": [LINE | {"stop": "<pad>"}]}, r"lines\.0\.stop: "),
        ({"lines": [LINE | {"output": 3}]}, r"lines\.0\.output: .*string"),
        ({"extra": 1}, r"extra: Extra inputs"),
        ({"pictures": ABOUT | {"ordinals": []}}, r"pictures\.ordinals: .*at least 1"),
        ({"pictures": ABOUT | {"lines": [LINE]}}, r"pictures\.lines\.0\.output: Extra inputs"),
        ({"pictures": ABOUT | {"lines": [SEEN]}}, r"pictures\.lines\.0: .*exactly one of `each` and `sight`"),
        ({"pictures": ABOUT | {"lines": [SEEN | {"each": "x", "id": "call"}]}}, r"there twice: call"),
        ({"pictures": ABOUT | {"colours": {"red": [255, 0]}}}, r"pictures\.colours\.red"),
    ],
)
def test_a_bad_script_is_refused_with_the_field(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(ScriptError, match=message):
        read_script(write(tmp_path, **changes))


def test_a_script_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("lines: [", encoding="utf-8")
    with pytest.raises(ScriptError, match=r"broken\.yaml: cannot be read as YAML"):
        read_script(tmp_path / "broken.yaml")
    with pytest.raises(ScriptError, match="cannot be read"):
        read_script(tmp_path / "absent.yaml")


def test_lines_are_found_by_id() -> None:
    assert SCRIPT.line("call") is LINES["call"]
    with pytest.raises(ScriptError, match=r"no line 'cal'; the lines are plain, "):
        SCRIPT.line("cal")
    assert PICTURES.line("colours").key == "#colours"
    with pytest.raises(ScriptError, match=r"no line 'plain'; the lines are colour, colours, sight"):
        PICTURES.line("plain")


@pytest.mark.parametrize(
    ("line", "colours", "said"),
    [
        ("colour", [], "There is no picture."),
        ("colour", ["red"], "The picture is red."),
        ("colour", ["red", "motley"], "The picture is motley."),
        ("colours", ["red"], "The first is red."),
        ("colours", ["red", "blue", "red"], "The first is red, the second is blue, the third is red."),
        ("sight", [], "There is no picture."),
        ("sight", ["white"], "I see all of it at once."),
    ],
)
def test_what_is_said_about_pictures(line: str, colours: list[str], said: str) -> None:
    assert PICTURES.output(PICTURES.line(line), colours) == said
    causal = PICTURES.output(PICTURES.line(line), colours, causal=True)
    assert causal == ("I see one part after the other." if colours and line == "sight" else said)


# ---------------------------------------------------------------------------------------- the tokenizer


def test_the_committed_tokenizer_is_the_recipes(tokenizer: Tokenizer) -> None:
    assert tokenizer.to_str() == build_tokenizer(SCRIPT).to_str()


def test_control_tokens_up_to_the_newline_have_published_ids(tokenizer: Tokenizer) -> None:
    from conformance.tokenizer.build import CONTROL_IDS as PUBLISHED

    assert {name: tokenizer.token_to_id(name) for name in PUBLISHED} == CONTROL_IDS
    low = {name: number for name, number in PUBLISHED.items() if number < 108}
    assert {name: CONTROL_IDS[name] for name in low} == low
    assert ids(tokenizer, "\n") == [107]
    assert sorted(tokenizer.token_to_id(name) for name in ("<eos>", "<turn|>", "<|tool_response>")) == sorted(
        STOP_IDS
    )


@pytest.mark.parametrize("name", SCRIPT.keys)
def test_a_key_is_one_token_that_no_other_text_has(tokenizer: Tokenizer, name: str) -> None:
    key = tokenizer.token_to_id(name)
    for text in (name, f"Say {name}.", f"x{name}\n", f"{name}{name}"):
        assert ids(tokenizer, text).count(key) == text.count(name)
    others = [*SCRIPT.phrases, *(other.output for other in SCRIPT.lines)]
    others.append(render([{"role": "user", "content": "Hello!"}], tools=SCRIPT.tools, family="e"))
    others += [key for key in SCRIPT.keys if key != name]
    assert not [text for text in others if key in ids(tokenizer, text)]


@pytest.mark.parametrize("line", SCRIPT.lines, ids=lambda line: line.id)
def test_outputs_come_back_as_they_were(tokenizer: Tokenizer, line: Line) -> None:
    text = line.output + line.stop
    assert tokenizer.decode(ids(tokenizer, text), skip_special_tokens=False) == text


@pytest.mark.parametrize("line", PICTURES.lines, ids=lambda line: line.id)
def test_words_about_pictures_are_whole_tokens(tokenizer: Tokenizer, line: PictureLine) -> None:
    for colour in (*PICTURES.colours, PICTURES.motley):
        for causal in (False, True):
            text = PICTURES.output(line, [colour] * len(PICTURES.ordinals), causal=causal)
            assert tokenizer.decode(ids(tokenizer, text), skip_special_tokens=False) == text
            assert f" {colour}" not in text or ids(tokenizer, f" {colour}")[0] in ids(tokenizer, text)


def test_characters_outside_ascii_take_several_tokens(tokenizer: Tokenizer) -> None:
    for character in "éß東Ω🚀":
        assert len(ids(tokenizer, character)) == len(character.encode()) > 1
    for name in ("unicode", "thought-unicode", "call-unicode"):
        assert any(not character.isascii() for character in LINES[name].output)


def test_the_embedding_table_has_a_row_for_every_token(tokenizer: Tokenizer) -> None:
    rows = vocabulary_size(tokenizer)
    assert rows % 64 == 0
    assert max(tokenizer.get_vocab().values()) < rows
    assert (
        json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))["text_config"]["vocab_size"] == rows
    )
