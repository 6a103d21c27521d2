"""The harness's tokenizer: its recipe, its published ids, and outputs cut into pieces."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.decoders import DecodeStream

from conformance.errors import ConformanceError
from conformance.suites import PlainText
from conformance.targets.protocol import Piece
from conformance.tokenization import (
    EncodingError,
    characters,
    encode,
    load_tokenizer,
    pieces,
    tokenizer_files,
)
from conformance.tokenizer import build
from tests.strategies_chat import MARKERS, texts

deterministic = settings(max_examples=400, derandomize=True, database=None, deadline=None)
any_text = st.one_of(
    texts,
    st.text(),
    st.lists(st.sampled_from(("👩‍👩‍👧", "e\u0301", "\ufffd", "▁", "<0x0A>", "\x00", "東", *MARKERS))).map(
        "".join
    ),
)


@pytest.mark.parametrize("name", sorted(build.files()))
def test_committed_files_are_what_the_recipe_makes(name: str) -> None:
    assert (tokenizer_files() / name).read_text(encoding="utf-8") == build.files()[name], (
        "run `python -m conformance.tokenizer.build` and commit the result"
    )


def test_the_files_stay_small() -> None:
    assert (tokenizer_files() / "tokenizer.json").stat().st_size < 400_000


@pytest.mark.parametrize(("token", "number"), [*build.CONTROL_IDS.items(), *build.PUBLISHED_IDS.items()])
def test_known_tokens_have_their_published_id(token: str, number: int) -> None:
    assert encode(token) == (number,)
    assert load_tokenizer().id_to_token(number) == token


def test_ids_are_unique_and_inside_the_published_vocabulary() -> None:
    vocabulary = json.loads((tokenizer_files() / "tokenizer.json").read_text(encoding="utf-8"))["model"][
        "vocab"
    ]
    assert len(set(vocabulary.values())) == len(vocabulary)
    assert max(vocabulary.values()) < 262_144


def test_a_prompt_has_the_published_ids() -> None:
    prompt = "<bos><|turn>user\nTokyo<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
    assert encode(prompt) == (2, 105, 2364, 107, 89265, 106, 107, 105, 4368, 107, 100, 45518, 107, 101)


def test_a_call_has_the_published_ids() -> None:
    text = '<|tool_call>call:_{user:<|"|>Tokyo<|"|>}<tool_call|>'
    ids = (48, 6639, 236787, 236779, 236782, 2364, 236787, 52, 89265, 52, 236783, 49)
    assert encode(text) == ids


def test_only_the_post_processor_adds_bos() -> None:
    assert encode("Tokyo") == (89265,)
    assert load_tokenizer().encode("Tokyo").ids == [2, 89265]


def test_words_are_tokens_of_several_characters() -> None:
    text = "Let me check the temperature in Paris first. The answer is"
    assert len(encode(text)) <= 14


def test_only_control_tokens_are_special() -> None:
    cut = pieces('a<|tool_call>call:f{k:<|"|>v<|"|>}<tool_call|>\n<unused7>')
    assert [piece.text for piece in cut if piece.special] == [
        "<|tool_call>",
        '<|"|>',
        '<|"|>',
        "<tool_call|>",
        "<unused7>",
    ]


def test_a_plain_stretch_has_no_control_tokens() -> None:
    marker = "<|tool_call>call:f{}<tool_call|>"
    cut = pieces(["Say ", PlainText(plain=marker), marker])
    assert "".join(piece.text for piece in cut) == "Say " + marker * 2
    assert [piece.ids for piece in cut if piece.special] == [(48,), (49,)]
    plain = pieces([PlainText(plain=marker)])
    assert len(plain) > 4
    assert not any(piece.special for piece in plain)


def test_a_character_comes_with_its_last_byte() -> None:
    cut = pieces("a😊b")
    assert [piece.text for piece in cut] == ["a", "", "", "", "😊", "b"]
    assert all(len(piece.ids) == 1 for piece in cut)


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(EncodingError, match="at character 2") as caught:
        pieces("ab\ud83d")
    assert isinstance(caught.value, ConformanceError)
    with pytest.raises(EncodingError):
        encode("\udc00")


def test_characters() -> None:
    assert characters("aé😊") == (Piece(text="a"), Piece(text="é"), Piece(text="😊"))
    assert characters("") == ()


@deterministic
@given(any_text)
def test_every_text_comes_back(text: str) -> None:
    assert load_tokenizer().decode(list(encode(text)), skip_special_tokens=False) == text


@deterministic
@given(st.lists(st.one_of(any_text, any_text.map(lambda text: PlainText(plain=text))), max_size=4))
def test_pieces_concatenate_to_the_output(output: list[str | PlainText]) -> None:
    text = "".join(stretch.plain if isinstance(stretch, PlainText) else stretch for stretch in output)
    cut = pieces(output)
    assert "".join(piece.text for piece in cut) == text
    control = set(build.CONTROL_IDS) | set(build.UNUSED_IDS)
    assert all(piece.text in control for piece in cut if piece.special)
    assert "".join(piece.text for piece in characters(text)) == text


@deterministic
@given(any_text)
def test_pieces_of_a_text_are_its_encoding(text: str) -> None:
    assert tuple(number for piece in pieces(text) for number in piece.ids) == encode(text)


@deterministic
@given(any_text.filter(lambda text: "\ufffd" not in text))
def test_pieces_are_what_the_library_streams(text: str) -> None:
    """The library holds back a text that ends in U+FFFD, so a text that really holds it is left out."""
    stream = DecodeStream(skip_special_tokens=False)
    streamed = [stream.step(load_tokenizer(), number) or "" for number in encode(text)]
    assert [piece.text for piece in pieces(text)] == streamed
