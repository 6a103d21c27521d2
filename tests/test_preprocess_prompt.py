"""Prompts with media, written out."""

from __future__ import annotations

import pytest
import torch

from model_impl.errors import MediaError
from model_impl.preprocess.images import ImageBatch
from model_impl.preprocess.prompt import expand
from model_impl.preprocess.video import VideoBatch


def video(*stamps: tuple[str, ...], counts: tuple[int, ...]) -> VideoBatch:
    empty = ImageBatch(torch.zeros(0, 0, 768), torch.zeros(0, 0, 2, dtype=torch.int64), counts)
    return VideoBatch(empty, tuple(map(len, stamps)), stamps)


def test_each_piece_is_written_out_in_its_place() -> None:
    prompt = "a<|image|>b<|audio|>c<|video|>d<|image|><|video|>"
    expanded = expand(
        prompt,
        images=(2, 1),
        sounds=(3,),
        videos=video(("00:00", "00:01"), ("61:07",), counts=(1, 2, 1)),
    )
    assert expanded == (
        "a<|image><|image|><|image|><image|>"
        "b<|audio><|audio|><|audio|><|audio|><audio|>"
        "c00:00 <|image><|video|><image|> 00:01 <|image><|video|><|video|><image|>"
        "d<|image><|image|><image|>"
        "61:07 <|image><|video|><image|>"
    )


def test_a_prompt_without_media_stays_as_it_is() -> None:
    assert expand("<bos>no pieces, <|image> alone is no placeholder") == (
        "<bos>no pieces, <|image> alone is no placeholder"
    )


def test_a_sound_too_short_for_a_token_has_its_markers() -> None:
    assert expand("<|audio|>", sounds=(0,)) == "<|audio><audio|>"


@pytest.mark.parametrize(
    ("prompt", "images", "message"),
    [
        ("<|image|>", (), r"1 placeholders <\|image\|>, and 0 pieces"),
        ("<|image|>", (1, 2), r"1 placeholders <\|image\|>, and 2 pieces"),
        ("<|audio|>", (), r"1 placeholders <\|audio\|>, and 0 pieces"),
        ("", (1,), r"0 placeholders <\|image\|>, and 1 pieces"),
    ],
)
def test_numbers_that_do_not_match(prompt: str, images: tuple[int, ...], message: str) -> None:
    with pytest.raises(MediaError, match=message):
        expand(prompt, images=images)
