"""Recipe of the harness's tokenizer: `python -m conformance.tokenizer.build`.

1. A BPE is trained on `corpus.txt`, on pieces that never mix letters, digits, marks and newlines.
2. Its tokens are numbered: published ids where Gemma 4's id of a token is known, free ones otherwise.
   So the vocabulary is sparse, and no id in it contradicts the published tokenizer as far as known.
3. As Gemma's, the tokenizer splits nothing before the BPE, writes a character that is no token as its
   UTF-8 bytes, and begins a text with `<bos>` unless told not to. Unlike Gemma's, it keeps a space as
   a space instead of writing U+2581 for it, so that every text comes back as it was.

The result depends on nothing but the corpus, this module and the trainer in `tokenizers`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from model_impl.nano.vocabulary import tokenizer_config

FOLDER = Path(__file__).parent
TRAINED_TOKENS = 2600
"""Characters and merged tokens of the BPE."""

CONTROL_IDS: dict[str, int] = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<mask>": 4,
    "<|tool>": 46,
    "<tool|>": 47,
    "<|tool_call>": 48,
    "<tool_call|>": 49,
    "<|tool_response>": 50,
    "<tool_response|>": 51,
    '<|"|>': 52,
    "<|think|>": 98,
    "<|channel>": 100,
    "<channel|>": 101,
    "<|turn>": 105,
    "<turn|>": 106,
    "<|image>": 255999,
    "<|audio>": 256000,
    "<|image|>": 258880,
    "<|audio|>": 258881,
    "<image|>": 258882,
    "<audio|>": 258883,
    "<|video|>": 258884,
}
"""Control tokens with their published ids."""

UNUSED_IDS: dict[str, int] = {f"<unused{number}>": 6 + number for number in range(40)}
"""Some of the vocabulary's unused tokens, which a broken model emits. Their ids are not published; these
lie in the gap below the tool tokens."""

PUBLISHED_IDS: dict[str, int] = {
    "\n": 107,
    "user": 2364,
    "model": 4368,
    "call": 6639,
    "thought": 45518,
    "Tokyo": 89265,
    "_": 236779,
    "{": 236782,
    "}": 236783,
    ":": 236787,
}
"""Plain tokens with their published ids."""

FIRST_BYTE_ID = 238
FIRST_WORD_ID = 1000
FIRST_CHARACTER_ID = 236800
"""Where the free ids of byte tokens, merged tokens and characters begin."""

_TRAINING_PIECES = Regex(r"\n+| ?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s")


def _train() -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens of the BPE in the order of their training, and its merges."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Split(_TRAINING_PIECES, behavior="isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=TRAINED_TOKENS,
        min_frequency=1,
        initial_alphabet=[*map(chr, range(ord(" "), ord("~") + 1)), "\t", "\n"],
        show_progress=False,
    )
    learner.train_from_iterator([(FOLDER / "corpus.txt").read_text(encoding="utf-8")], trainer)
    learned = json.loads(learner.to_str())["model"]
    tokens = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    return tokens, [(left, right) for left, right in learned["merges"]]


def _number(tokens: list[str]) -> dict[str, int]:
    """Every token with its id: published, or the next free one of its range."""
    vocabulary = CONTROL_IDS | UNUSED_IDS
    vocabulary |= {f"<0x{byte:02X}>": FIRST_BYTE_ID + byte for byte in range(256)}
    missing = PUBLISHED_IDS.keys() - set(tokens)
    if missing:
        raise ValueError(f"the corpus must make tokens of {sorted(missing)}: repeat them in corpus.txt")
    taken = set(chain(vocabulary.values(), PUBLISHED_IDS.values()))
    words, characters = _free(FIRST_WORD_ID, taken), _free(FIRST_CHARACTER_ID, taken)
    for token in tokens:
        vocabulary[token] = PUBLISHED_IDS.get(token) or next(characters if len(token) == 1 else words)
    return dict(sorted(vocabulary.items(), key=lambda item: item[1]))


def _free(start: int, taken: set[int]) -> Iterator[int]:
    return (number for number in count(start) if number not in taken)


def tokenizer_json() -> dict[str, Any]:
    """The content of `tokenizer.json`."""
    tokens, merges = _train()
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": kind}} for name, kind in (("A", 0), ("B", 1)))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token, number in sorted((CONTROL_IDS | UNUSED_IDS).items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, bos, second],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [CONTROL_IDS["<bos>"]], "tokens": ["<bos>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": _number(tokens),
            "merges": [list(pair) for pair in merges],
        },
    }


def files() -> dict[str, str]:
    """Name and text of each file that the recipe makes."""
    return {
        "tokenizer.json": _one_entry_a_line(tokenizer_json()),
        "tokenizer_config.json": json.dumps(tokenizer_config(), ensure_ascii=False, indent=2) + "\n",
    }


def _one_entry_a_line(content: dict[str, Any]) -> str:
    """JSON text in which each member, merge and added token stands on a line of its own."""

    def lines(value: Any, depth: int) -> str:
        if depth and isinstance(value, dict) and value:
            return "{\n" + ",\n".join(f"{dump(k)}:{lines(v, depth - 1)}" for k, v in value.items()) + "\n}"
        if depth and isinstance(value, list) and value:
            return "[\n" + ",\n".join(lines(item, 0) for item in value) + "\n]"
        return dump(value)

    def dump(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    return lines(content, 3) + "\n"


def main() -> None:
    """Write the files next to this module."""
    for name, text in files().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
