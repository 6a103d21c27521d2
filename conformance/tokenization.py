"""Outputs cut into tokens, under the harness's own tokenizer (`conformance.tokenizer`)."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from pathlib import Path

from tokenizers import Tokenizer

from conformance import tokenizer as tokenizer_package
from conformance.errors import ConformanceError
from conformance.suites import PlainText
from conformance.targets.protocol import Piece


class EncodingError(ConformanceError):
    """A text holds lone surrogates, which have no UTF-8 form and so no tokens."""


def tokenizer_files() -> Path:
    """The folder with `tokenizer.json` and `tokenizer_config.json`, for those who load it themselves."""
    return Path(tokenizer_package.__path__[0])


@cache
def load_tokenizer() -> Tokenizer:
    """The harness's tokenizer. Control tokens in a text become single tokens. Do not change it."""
    return Tokenizer.from_file(str(tokenizer_files() / "tokenizer.json"))


@cache
def _plain_tokenizer() -> Tokenizer:
    """The same, but blind to control tokens: a text that spells one becomes ordinary tokens."""
    plain = Tokenizer.from_file(str(tokenizer_files() / "tokenizer.json"))
    plain.encode_special_tokens = True
    return plain


@cache
def _control_ids() -> frozenset[int]:
    added = load_tokenizer().get_added_tokens_decoder()
    return frozenset(number for number, token in added.items() if token.special)


@cache
def _bytes_of() -> dict[int, bytes]:
    """What each token adds to the text, as UTF-8. A byte token adds a byte, often part of a character."""
    vocabulary = load_tokenizer().get_vocab(with_added_tokens=True)
    single_bytes = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
    return {number: single_bytes.get(token, token.encode("utf-8")) for token, number in vocabulary.items()}


def _ids(tokenizer: Tokenizer, text: str) -> Sequence[int]:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise EncodingError(
            f"the text holds {text[error.start]!r} at character {error.start}, half of a surrogate pair; "
            "write the whole character"
        ) from error
    ids: Sequence[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def encode(text: str) -> tuple[int, ...]:
    """Token ids of a text. Control tokens are recognised; none is added.

    Raises:
        EncodingError: The text holds lone surrogates.
    """
    return tuple(_ids(load_tokenizer(), text))


def pieces(output: str | Sequence[str | PlainText]) -> tuple[Piece, ...]:
    """Cut an output into tokens, each with the text that it adds when the output is decoded bit by bit.

    A token that holds part of a character has no text; the token that completes the character brings
    it. So the texts concatenate to the output.

    Args:
        output: A text, or stretches of text. Control tokens are recognised in a string. A `PlainText`
            stretch is made of ordinary tokens, even where it spells a control token.

    Raises:
        EncodingError: The output holds lone surrogates.
    """
    stretches: Sequence[str | PlainText] = (output,) if isinstance(output, str) else output
    return tuple(piece for stretch in stretches for piece in _stretch_pieces(stretch))


def _stretch_pieces(stretch: str | PlainText) -> Iterator[Piece]:
    if isinstance(stretch, PlainText):
        ids, control = _ids(_plain_tokenizer(), stretch.plain), frozenset[int]()
    else:
        ids, control = _ids(load_tokenizer(), stretch), _control_ids()
    decoder = codecs.getincrementaldecoder("utf-8")()
    bytes_of = _bytes_of()
    for number in ids:
        yield Piece(text=decoder.decode(bytes_of[number]), ids=(number,), special=number in control)


@lru_cache(maxsize=16)
def characters(text: str) -> tuple[Piece, ...]:
    """Cut a text into characters, for engines whose parsers see no tokens."""
    return tuple(Piece(text=character) for character in text)
