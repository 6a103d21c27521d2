"""The rule of masks, against drawings by hand, and what tokens are called."""

from __future__ import annotations

from typing import Any

import pytest

from conformance.checks.visibility import FULL, SLIDING, LayerType, Token, Visibility, outline, tokens_of
from conformance.errors import EngineError
from conformance.media import TEXT
from conformance.targets.protocol import LongBlocks

TEXT_TOKEN = Token("text")


def image(number: int, length: int) -> list[Token]:
    return [Token("image", number, number + 1, place) for place in range(1, length + 1)]


LONG = [TEXT_TOKEN, TEXT_TOKEN, *image(0, 4), TEXT_TOKEN, TEXT_TOKEN]
"""An image of four tokens after two of text."""
NEIGHBOURS = [*image(0, 3), *image(1, 3)]

CAUSAL_WINDOW_3 = """
#.......
##......
###.....
.###....
..###...
...###..
....###.
.....###
"""


@pytest.mark.parametrize(
    ("layer", "window", "mode", "image_attention", "row", "drawing"),
    [
        pytest.param(SLIDING, 3, "drop", True, LONG, CAUSAL_WINDOW_3, id="dropped"),
        pytest.param(SLIDING, 3, "clamp_past", False, LONG, CAUSAL_WINDOW_3, id="no-image-attention"),
        pytest.param(
            SLIDING,
            3,
            "clamp_past",
            True,
            LONG,
            """
            #.......
            ##......
            ######..
            .#####..
            ..####..
            ...###..
            ....###.
            .....###
            """,
            id="clamped-in-the-past",
        ),
        pytest.param(
            SLIDING,
            3,
            "clamp_both",
            True,
            LONG,
            """
            #.......
            ##......
            #####...
            .#####..
            ..####..
            ...###..
            ....###.
            .....###
            """,
            id="clamped-on-both-sides",
        ),
        *(
            pytest.param(
                SLIDING,
                4,
                mode,
                True,
                LONG,
                """
                #.......
                ##......
                ######..
                ######..
                .#####..
                ..####..
                ...####.
                ....####
                """,
                id=f"of-the-window-{mode}",
            )
            for mode in ("drop", "clamp_past", "clamp_both")
        ),
        pytest.param(
            SLIDING,
            5,
            "clamp_past",
            True,
            NEIGHBOURS,
            """
            ###...
            ###...
            ###...
            ######
            ######
            .#####
            """,
            id="neighbours",
        ),
        *(
            pytest.param(
                FULL,
                2,
                mode,
                True,
                NEIGHBOURS,
                """
                #.....
                ##....
                ###...
                ####..
                #####.
                ######
                """,
                id=f"full-{mode}",
            )
            for mode in ("drop", "clamp_past", "clamp_both")
        ),
    ],
)
def test_the_rule_is_what_is_drawn(
    layer: LayerType, window: int, mode: LongBlocks, image_attention: bool, row: list[Token], drawing: str
) -> None:
    grid = Visibility((layer,), window, image_attention, mode).grid(layer, row)
    assert ["".join(".#"[seen] for seen in line) for line in grid] == drawing.split()


TEXT_CONFIG = {"num_hidden_layers": 3, "sliding_window": 4}


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({}, [SLIDING, SLIDING, FULL]),
        ({"layer_types": None, "num_hidden_layers": 8}, [*[SLIDING] * 5, FULL, SLIDING, FULL]),
        ({"layer_types": [FULL, SLIDING, FULL]}, [FULL, SLIDING, FULL]),
        ({"layer_types": [SLIDING, FULL, SLIDING]}, [SLIDING, FULL, FULL]),
    ],
)
def test_layer_types_are_listed_or_every_sixth_is_full_and_so_is_the_last(
    config: dict[str, Any], layers: list[str]
) -> None:
    text = {**TEXT_CONFIG, **config}
    for whole in (text, {"text_config": text, "num_hidden_layers": 99}):
        assert list(Visibility.of(whole).layers) == layers


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ({}, False),
        ({"use_bidirectional_attention": None}, False),
        ({"use_bidirectional_attention": "vision"}, True),
    ],
)
def test_image_attention_is_what_the_text_configuration_says(text: dict[str, Any], found: bool) -> None:
    whole = {"text_config": {**TEXT_CONFIG, **text}, "use_bidirectional_attention": "vision"}
    assert Visibility.of(whole).image_attention == found


@pytest.mark.parametrize("other", ["all", "", False, True, "audio"])
def test_image_attention_that_the_rule_does_not_know_is_refused(other: object) -> None:
    """`all` is another rule: nothing is causal, and the window reaches half as far on either side."""
    with pytest.raises(EngineError, match=f"`use_bidirectional_attention: {other}`"):
        Visibility.of({**TEXT_CONFIG, "use_bidirectional_attention": other})


@pytest.mark.parametrize("window", [None, 0, -1, True, "12"])
def test_a_configuration_without_a_window_is_refused(window: object) -> None:
    with pytest.raises(EngineError, match="sliding_window"):
        Visibility.of({**TEXT_CONFIG, "sliding_window": window})


IDS = {
    "image_token_id": 90,
    "video_token_id": 91,
    "audio_token_id": 92,
    "boi_token_id": 93,
    "eoi_token_id": 94,
    "boa_token_id": 95,
    "eoa_token_id": 96,
}


def test_tokens_are_called_what_they_stand_for() -> None:
    ids = [5, 93, 90, 90, 94, 93, 90, 94, 7, 93, 91, 91, 94, 95, 92, 92, 96, 95, 92, 96, 3]
    blocks = [-1, -1, 4, 4, -1, -1, 5, -1, -1, -1, 6, 6, *[-1] * 9]
    row = tokens_of(ids, blocks, IDS)
    assert outline(row) == [
        *["1 text", "1 marker", "2 of image 1", "2 marker", "1 of image 2", "1 marker", "1 text", "1 marker"],
        *["2 of frame 1", "2 marker", "2 of sound 1", "2 marker", "1 of sound 2", "1 marker", "1 text"],
    ]
    assert [str(row[at]) for at in (0, 1, 3, 11, 15)] == [
        *["text", "marker", "image 1, place 2", "frame 1, place 2", "sound 1, place 2"]
    ]
    assert [row[at].block for at in (2, 6, 10, 14)] == [4, 5, 6, TEXT]
    assert row[14].shares_piece(row[15])
    assert not row[15].shares_piece(row[18])
    assert not row[0].shares_piece(row[8])


def test_images_that_touch_are_two() -> None:
    assert outline(tokens_of([90, 90, 90], [0, 1, 1], IDS)) == ["1 of image 1", "2 of image 2"]


def test_numbers_of_media_are_text_to_a_text_model() -> None:
    assert outline(tokens_of([90, 93, 5], [TEXT] * 3, {})) == ["3 text"]
