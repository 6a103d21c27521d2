"""The scripted checkpoint's tokenizer.

The published vocabulary cannot be used: an embedding table that reaches its image tokens (id 258884) takes
8 MB at a width of 16. What matters of the published ids is kept: control tokens up to 106, so that the
stop ids are 1, 50 and 106, and the newline, 107. The image and audio markers, which engines look up by
name, move to free ids below; the bytes follow from 238, as published tables have it, then words and keys.

As Gemma's, the tokenizer is a BPE without pre-tokenization that falls back to UTF-8 bytes; every character
outside ASCII is written in bytes. Keys are added tokens, so that one is the same token in any text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from model_impl.chat.render import render
from model_impl.nano.script import Script

BOS, END_OF_SEQUENCE, END_OF_TURN, TOOL_RESPONSE = 2, 1, 106, 50

CONTROL_IDS: dict[str, int] = {
    "<pad>": 0,
    "<eos>": END_OF_SEQUENCE,
    "<bos>": BOS,
    "<unk>": 3,
    "<mask>": 4,
    "<|tool>": 46,
    "<tool|>": 47,
    "<|tool_call>": 48,
    "<tool_call|>": 49,
    "<|tool_response>": TOOL_RESPONSE,
    "<tool_response|>": 51,
    '<|"|>': 52,
    "<|image>": 53,
    "<|audio>": 54,
    "<|image|>": 55,
    "<|audio|>": 56,
    "<image|>": 57,
    "<audio|>": 58,
    "<|video|>": 59,
    "<|think|>": 98,
    "<|channel>": 100,
    "<channel|>": 101,
    "<|turn>": 105,
    "<turn|>": END_OF_TURN,
}
"""Control tokens; those of images, audio and video are not at their published ids."""

STOP_IDS = (END_OF_SEQUENCE, END_OF_TURN, TOOL_RESPONSE)
"""As published `generation_config.json` files have them."""

_NEWLINE = 107
_FIRST_BYTE = 238
_FIRST_WORD = _FIRST_BYTE + 256
_WORDS = 640
"""Characters and merged tokens of the BPE."""
_PIECES = Regex(r" ?\p{L}+|[^\p{L}]")


def build_tokenizer(script: Script) -> Tokenizer:
    """The tokenizer of a script; the same for the same script."""
    return learned_tokenizer(_corpus(script), _WORDS, script.keys)


def learned_tokenizer(corpus: Iterable[str], words: int, keys: Iterable[str] = ()) -> Tokenizer:
    """A tokenizer whose words are learned from texts; the same for the same texts.

    Args:
        corpus: ASCII texts; markers in them are left out.
        words: How many characters and merged tokens to have at most.
        keys: Tokens of their own, wherever they stand in a text.
    """
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Split(_PIECES, behavior="isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=words,
        min_frequency=1,
        initial_alphabet=["\t", *map(chr, range(ord(" "), ord("~") + 1))],
        show_progress=False,
    )
    learner.train_from_iterator(_plain(corpus), trainer)
    learned = json.loads(learner.to_str())["model"]

    vocabulary = CONTROL_IDS | {"\n": _NEWLINE}
    vocabulary |= {f"<0x{byte:02X}>": _FIRST_BYTE + byte for byte in range(256)}
    found = sorted(learned["vocab"].keys() - {"\n"}, key=learned["vocab"].__getitem__)
    keys = list(keys)
    vocabulary |= {token: _FIRST_WORD + number for number, token in enumerate([*found, *keys])}

    merges = [(left, right) for left, right in learned["merges"]]
    bpe = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)  # noqa: S106
    tokenizer = Tokenizer(bpe)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in CONTROL_IDS])
    tokenizer.add_tokens([AddedToken(key, normalized=False) for key in keys])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", BOS)]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Rows of the embedding table: every id, rounded up to what engines pad to."""
    return -(-(max(tokenizer.get_vocab().values()) + 1) // 64) * 64


def tokenizer_config(*, processor: bool = False) -> dict[str, Any]:
    """The content of `tokenizer_config.json`, with the names that Gemma 4's file gives its markers.

    Args:
        processor: The tokenizer belongs to a checkpoint with a processor for media.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({"processor_class": "Gemma4Processor"} if processor else {}),
        "model_max_length": 131072,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
        "image_token": "<|image|>",
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "audio_token": "<|audio|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
        "sot_token": "<|turn>",
        "eot_token": "<turn|>",
        "soc_token": "<|channel>",
        "eoc_token": "<channel|>",
        "think_token": "<|think|>",
        "escape_token": '<|"|>',
        "std_token": "<|tool>",
        "etd_token": "<tool|>",
        "stc_token": "<|tool_call>",
        "etc_token": "<tool_call|>",
        "str_token": "<|tool_response>",
        "etr_token": "<tool_response|>",
        "extra_special_tokens": ["<|video|>"],
    }


def _corpus(script: Script) -> Iterable[str]:
    """The texts that words are learned from: what the model reads and says, without other characters."""
    texts = [line.output for line in (script.default, *script.lines)]
    texts += [script.after_results.output(thinking=True), *script.phrases, "Say value response unknown"]
    pictures = script.pictures
    colours = [*pictures.colours, pictures.motley]
    texts += [pictures.output(line, colours, causal=i) for line in pictures.lines for i in (False, True)]
    texts += [pictures.without, *(pictures.output(line, [c]) for line in pictures.lines for c in colours)]
    texts.append(render([{"role": "user", "content": "Say"}], tools=script.tools, thinking=True, family="e"))
    yield from texts


def _plain(texts: Iterable[str]) -> Iterable[str]:
    """Without markers, and without characters that are written in bytes."""
    markers = re.compile("|".join(map(re.escape, CONTROL_IDS)))
    for text in texts:
        yield "".join(character for character in markers.sub(" ", text) if character.isascii())
