"""Whole models: soft tokens in text, beside transformers and by their rules."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_impl.errors import CheckpointError, ConfigError, MediaError
from model_impl.media_config import FrameConfig, MultimodalConfig, PatchConfig
from model_impl.multimodal import Gemma4ForConditionalGeneration, Media, load_multimodal_model
from model_impl.preprocess.audio import AudioBatch, prepare_audio, prepare_waves
from model_impl.preprocess.images import ImageBatch, prepare_images
from model_impl.preprocess.video import VideoBatch, prepare_videos, video_from_frames
from model_impl.runtime.cache import KVCache
from model_impl.runtime.generate import generate
from model_impl.runtime.sampling import GenerationError, Sampling
from model_impl.vision import VisionTower
from tests import test_audio, test_vision
from tests.media_oracle import ask, assert_parity
from tests.media_oracle import noise as sound
from tests.model_configs import DENSE, E2B, FULL, SLIDING, WINDOW, distance, tensors

torch.set_num_threads(1)

IDS = {
    "image_token_id": 90,
    "video_token_id": 91,
    "audio_token_id": 92,
    "boi_token_id": 93,
    "eoi_token_id": 94,
    "boa_token_id": 95,
    "eoa_token_id": 89,
}
MARKERS = tuple(sorted(IDS.values()))
"""Never generated, as published settings suppress them."""
TEXT_IDS = 80
"""Ids below are text."""


def raw_config(
    text: dict[str, Any], vision: dict[str, Any] | None, audio: dict[str, Any] | None
) -> dict[str, Any]:
    unified = vision is not None and vision["model_type"] == "gemma4_unified_vision"
    kind = "gemma4_unified" if unified else "gemma4"
    return {
        **IDS,
        "architectures": [f"Gemma4{'Unified' if unified else ''}ForConditionalGeneration"],
        "model_type": kind,
        "tie_word_embeddings": True,
        "text_config": {**text, "model_type": f"{kind}_text"},
        "vision_config": vision,
        "audio_config": audio,
    }


CONFIGS = {
    "small": raw_config(E2B, test_vision.CLIPPED, test_audio.CLIPPED),
    "large": raw_config(DENSE, test_vision.STANDARDIZED, None),
    "unified": raw_config(
        DENSE,
        {**test_vision.TILES, "rms_norm_eps": 1e-6},
        {"model_type": "gemma4_unified_audio", "audio_embed_dim": 640, "audio_samples_per_token": 640},
    ),
}


def build(raw: dict[str, Any], **options: Any) -> Gemma4ForConditionalGeneration:
    """With weights that are decided by their names, and nothing neutral among them."""
    model = Gemma4ForConditionalGeneration(MultimodalConfig.from_dict(raw), **options)
    text = {
        name: tensor
        for name, tensor in tensors(raw["text_config"]).items()
        if name in model.language_model.state_dict()
    }
    model.language_model.load_state_dict(text, strict=True)
    for name, part in model.named_children():
        if name == "audio_tower":
            test_audio.filled(part)
        elif name != "language_model":
            test_vision.fill(part)
    return model.eval().requires_grad_(False)


MODELS = {name: build(raw) for name, raw in CONFIGS.items()}


@pytest.fixture(params=list(CONFIGS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# --------------------------------------------------------------------------------------------- prompts


@dataclass
class Row:
    """A prompt and its media, which come in the order of their placeholders."""

    ids: list[int]
    images: list[Tensor]
    frames: list[Tensor]
    sounds: list[Tensor]


def picture(width: int, height: int) -> Tensor:
    return test_vision.noise(width, height)


class Writer:
    """Writes prompts as processors expand them."""

    def __init__(self, name: str) -> None:
        config = MODELS[name].config
        self.cut: Any = "tiles" if isinstance(config.vision, PatchConfig) else "patches"
        self.waves = isinstance(config.audio, FrameConfig)

    def images(self, pictures: Sequence[Tensor]) -> ImageBatch:
        return prepare_images(pictures, 70, cut=self.cut)

    def videos(self, clips: Sequence[Tensor]) -> VideoBatch:
        videos = [video_from_frames(clip, "clip", fps=1.0, sample=False) for clip in clips]
        return prepare_videos(videos, cut=self.cut)

    def audio(self, clips: Sequence[Tensor]) -> AudioBatch:
        return prepare_waves(clips, 640) if self.waves else prepare_audio(clips)

    def row(self, *parts: int | tuple[str, Tensor]) -> Row:
        """Numbers of text tokens, and media."""
        row = Row([], [], [], [])
        for number, part in enumerate(parts):
            if isinstance(part, int):
                draw = torch.Generator().manual_seed(31 * number + part)
                row.ids += torch.randint(3, TEXT_IDS, (part,), generator=draw).tolist()
                continue
            kind, data = part
            if kind == "image":
                count = self.images([data]).soft_tokens[0]
                row.ids += [93, *[90] * count, 94]
                row.images.append(data)
            elif kind == "video":
                for frame_count in self.videos([data]).images.soft_tokens:
                    row.ids += [7, 93, *[91] * frame_count, 94]
                row.frames.append(data)
            else:
                count = self.audio([data]).soft_tokens[0]
                row.ids += [95, *[92] * count, 89]
                row.sounds.append(data)
        return row

    def media(self, rows: Sequence[Row]) -> Media:
        pictures = [image for row in rows for image in row.images]
        clips = [clip for row in rows for clip in row.frames]
        sounds = [clip for row in rows for clip in row.sounds]
        return Media(
            self.images(pictures) if pictures else None,
            self.videos(clips) if clips else None,
            self.audio(sounds) if sounds else None,
        )


CLIP = torch.stack([picture(96, 64).roll(9 * frame, dims=2) for frame in range(3)])


def rows_of(name: str) -> dict[str, Row]:
    """Images of several sizes, all longer than the window or not; a video; sounds; everything together."""
    write = Writer(name)
    rows = {
        "text": write.row(23),
        "one image": write.row(4, ("image", picture(90, 60)), 6),
        "two images": write.row(2, ("image", picture(600, 20)), ("image", picture(48, 300)), 5),
        "image first": write.row(("image", picture(20_000, 1)), 3),
        "a video": write.row(5, ("video", CLIP), 4),
    }
    if name != "large":
        rows["a sound"] = write.row(3, ("sound", sound(7_000)), 4)
        rows["everything"] = write.row(
            2, ("sound", sound(3_000)), 1, ("image", picture(64, 64)), 2, ("video", CLIP[:2]), 3
        )
    return rows


def padded(rows: Sequence[Row]) -> tuple[Tensor, list[int]]:
    lengths = [len(row.ids) for row in rows]
    return torch.tensor([row.ids + [0] * (max(lengths) - len(row.ids)) for row in rows]), lengths


def alone(name: str, row: Row, model: Gemma4ForConditionalGeneration | None = None) -> Tensor:
    hidden: Tensor = (model or MODELS[name])(torch.tensor([row.ids]), Writer(name).media([row]))
    return hidden[0]


# ---------------------------------------------------------------------------------------- transformers


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Hidden states of all rows of all models."""
    request: dict[str, Any] = {}
    given: dict[str, Tensor] = {}
    for model_name, raw in CONFIGS.items():
        folder = tmp_path_factory.mktemp("checkpoint") / model_name
        write_checkpoint(model_name, raw, folder)
        rows = request[model_name] = {"checkpoint": str(folder), "rows": []}
        for row_name, row in rows_of(model_name).items():
            key = f"{model_name}/{row_name}"
            inputs = inputs_of(model_name, row)
            given |= {f"{key}/{part}": tensor for part, tensor in inputs.items()}
            rows["rows"].append({"key": key, "tensors": {part: f"{key}/{part}" for part in inputs}})
    answers, made = ask(tmp_path_factory, "multimodal", "whole models", request, tensors=given)
    for report in answers.values():
        assert report == {"missing_keys": [], "unexpected_keys": []}
    return made


def write_checkpoint(model_name: str, raw: dict[str, Any], folder: Path) -> None:
    folder.mkdir()
    state = MODELS[model_name].state_dict()
    save_file(
        {f"model.{key}": tensor.contiguous() for key, tensor in state.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(raw))


def inputs_of(model_name: str, row: Row) -> dict[str, Tensor]:
    """As transformers' processors name them."""
    media = Writer(model_name).media([row])
    ids = torch.tensor([row.ids])
    kinds = torch.zeros_like(ids)
    for number, token in ((1, 90), (2, 91), (3, 92)):
        kinds[ids == token] = number
    inputs = {"input_ids": ids, "mm_token_type_ids": kinds}
    if media.images:
        inputs |= {"pixel_values": media.images.pixels, "image_position_ids": media.images.positions}
    if media.videos:
        inputs |= {
            "pixel_values_videos": media.videos.images.pixels,
            "video_position_ids": media.videos.images.positions,
            "num_frames_per_video": torch.tensor(media.videos.frames),
        }
    if media.audio:
        inputs |= {"input_features": media.audio.features, "input_features_mask": media.audio.mask}
    return inputs


def test_hidden_states_are_those_of_transformers(name: str, oracle: dict[str, Tensor]) -> None:
    for row_name, row in rows_of(name).items():
        assert_parity(alone(name, row), oracle[f"{name}/{row_name}"])


# ------------------------------------------------------------------------------------------ by the rules


def test_a_batch_gives_each_row_what_it_has_alone(name: str) -> None:
    rows = list(rows_of(name).values())
    ids, lengths = padded(rows)
    for order in (list(range(len(rows))), list(range(len(rows)))[::-1]):
        shuffled = [rows[index] for index in order]
        ids, lengths = padded(shuffled)
        hidden = MODELS[name](ids, Writer(name).media(shuffled), lengths=lengths)
        for row, length, found in zip(shuffled, lengths, hidden, strict=True):
            assert distance(found[:length], alone(name, row)) < 2e-5


def test_prefill_with_a_cache_and_decoding_are_one_pass(name: str) -> None:
    for row in rows_of(name).values():
        ids = torch.tensor([row.ids])
        cut = len(row.ids) - 2  # text is at the end of each row
        cache = KVCache(MODELS[name].config.text, 1)
        pieces = [MODELS[name](ids[:, :cut], Writer(name).media([row]), cache=cache)]
        pieces += [MODELS[name](ids[:, at : at + 1], cache=cache) for at in range(cut, len(row.ids))]
        assert distance(torch.cat(pieces, dim=1)[0], alone(name, row)) < 2e-5


@pytest.mark.parametrize("chunk", [None, 1, 5, 1000])
def test_generation_is_the_argmax_of_one_pass_however_prompts_are_cut(name: str, chunk: int | None) -> None:
    rows = list(rows_of(name).values())
    ids, _ = padded(rows)
    model = MODELS[name].language_model
    soft = MODELS[name].soft_tokens(ids, Writer(name).media(rows))
    with mock.patch.object(model, "forward", wraps=model.forward) as forward:
        made = generate(
            model,
            [row.ids for row in rows],
            max_new_tokens=4,
            prefill_chunk=chunk,
            soft=soft,
            sampling=Sampling.greedy(MARKERS),
        )
        passes = [call.args[0].shape[1] for call in forward.call_args_list]
    for row, found in zip(rows, made, strict=True):
        whole = replace(row, ids=[*row.ids, *found.ids[:-1]])
        logits = model.logits(alone(name, whole)[len(row.ids) - 1 :])
        logits[:, MARKERS] = float("-inf")
        best = logits.topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 1e-3, "a near tie; choose other prompts"
        assert found.ids == tuple(logits.argmax(dim=-1).tolist())
    prefill = passes[: len(passes) - 3]
    assert sum(prefill) == ids.shape[1]
    # Some row has an image at most columns, and a pass cannot end there.
    assert (len(prefill) > 1) == (chunk in (1, 5))
    assert max(prefill) > 5


def test_soft_tokens_of_another_batch_are_refused() -> None:
    rows = list(rows_of("large").values())
    ids, _ = padded(rows)
    soft = MODELS["large"].soft_tokens(ids, Writer("large").media(rows))
    with pytest.raises(GenerationError, match="soft tokens for"):
        generate(MODELS["large"].language_model, [rows[0].ids], max_new_tokens=1, soft=soft)


def test_all_images_of_a_batch_go_through_the_tower_in_one_call() -> None:
    rows = [row for row_name, row in rows_of("large").items() if "image" in row_name]
    calls = []
    forward = VisionTower.forward

    def counted(self: VisionTower, pixels: Tensor, positions: Tensor) -> Tensor:
        calls.append(len(pixels))
        return forward(self, pixels, positions)

    ids, lengths = padded(rows)
    with mock.patch.object(VisionTower, "forward", counted):
        MODELS["large"](ids, Writer("large").media(rows), lengths=lengths)
    assert calls == [sum(len(row.images) for row in rows)]


def test_every_soft_token_counts() -> None:
    """A change of one pixel field of either image moves what comes behind it, and nothing before it."""
    write = Writer("large")
    first, second = picture(90, 60), picture(60, 90)
    row = write.row(3, ("image", first), 2, ("image", second), 4)
    before = alone("large", row)
    start = row.ids.index(94)  # the first image's end
    changed = replace(row, images=[first, 255 - second])
    after = alone("large", changed)
    moved = (before - after).abs().amax(dim=-1) > 1e-5
    assert not moved[: start + 4].any()
    assert moved[-4:].all()


@pytest.mark.parametrize("kind", [SLIDING, FULL])
def test_images_are_read_in_both_directions_on_sliding_layers_only(kind: str) -> None:
    """The first soft token's state, in a model whose layers are all of one kind, sees the last one or not."""
    layers = [kind] * 3
    text = {**DENSE, "num_hidden_layers": 3, "layer_types": layers, "sliding_window": 100}
    raw = raw_config(text, test_vision.STANDARDIZED, None)
    model = build(raw)
    kinds = [layer.kind for layer in model.config.text.layers]
    assert kinds[:-1] == layers[:-1]  # the last layer is always a full one
    row = Writer("large").row(3, ("image", picture(90, 60)), 4)
    media = Writer("large").media([row])
    soft = model.soft_tokens(torch.tensor([row.ids]), media)
    assert soft is not None
    ids = torch.tensor([row.ids])
    features = soft.features.clone()
    features[-1] += 1
    moved = (
        (
            model.language_model(ids, soft=soft)
            - model.language_model(ids, soft=replace(soft, features=features))
        )
        .abs()
        .amax(dim=-1)[0]
    )
    assert bool(moved[4] > 1e-4) == (kind == SLIDING)
    assert not (moved[:4] > 1e-4).any()


def test_blocks_are_images_and_frames_and_not_sounds() -> None:
    write = Writer("small")
    row = write.row(
        1, ("image", picture(48, 48)), ("image", picture(90, 30)), ("video", CLIP), ("sound", sound(900))
    )
    soft = MODELS["small"].soft_tokens(torch.tensor([row.ids]), write.media([row]))
    assert soft is not None
    media = write.media([row])
    assert media.images is not None
    assert media.videos is not None
    expected = [*media.images.soft_tokens, *media.videos.images.soft_tokens]
    numbers = soft.blocks[soft.blocks >= 0]
    assert torch.bincount(numbers).tolist() == expected
    assert (soft.blocks[torch.tensor([row.ids]) == 92] == -1).all()


def test_adjacent_placeholders_of_two_images_stay_two_blocks() -> None:
    """Transformers would merge them; templates put delimiters between."""
    write = Writer("large")
    images = write.images([picture(48, 48), picture(90, 30)])
    ids = torch.tensor([[5, *[90] * sum(images.soft_tokens), 6]])
    soft = MODELS["large"].soft_tokens(ids, Media(images))
    assert soft is not None
    assert len(soft.blocks.unique()) == 3


# ---------------------------------------------------------------------------------------------- errors


def test_what_does_not_match_is_named(name: str) -> None:
    model, write = MODELS[name], Writer(name)
    row = write.row(3, ("image", picture(90, 60)), 4)
    media = write.media([row])
    few = torch.tensor([[token for index, token in enumerate(row.ids) if index != row.ids.index(90)]])
    with pytest.raises(MediaError, match=r"placeholders of images, and the 1 images take \d+ soft tokens"):
        model(few, media)
    with pytest.raises(MediaError, match="placeholders of images, and the 0 images take 0"):
        model(torch.tensor([row.ids]))
    with pytest.raises(MediaError, match="placeholders of images"):
        model(torch.tensor([[5, 6]]), media)
    torn = torch.tensor([row.ids])
    at = row.ids.index(90)
    torn[0, [0, at]] = torn[0, [at, 0]]
    with pytest.raises(MediaError, match="number 1 of the images do not stand side by side"):
        model(torn, media)
    assert torch.isfinite(alone(name, row)).all()  # the next request works


def test_a_missing_tower_is_named() -> None:
    write = Writer("large")
    row = write.row(3, ("image", picture(90, 60)))
    without = build(raw_config(DENSE, None, None))
    with pytest.raises(MediaError, match="no vision tower"):
        without(torch.tensor([row.ids]), write.media([row]))
    sounds = Writer("small").audio([sound(900)])
    ids = torch.tensor([[95, *[92] * sounds.soft_tokens[0], 89]])
    with pytest.raises(MediaError, match="no audio tower"):
        without(ids, Media(audio=sounds))
    assert without(torch.tensor([[5, 6, 7]])).shape == (1, 3, 48)


def test_ids_come_from_the_top_level_of_the_configuration() -> None:
    raw = CONFIGS["large"]
    inner = {**raw, "text_config": {**raw["text_config"], "image_token_id": 3}}
    assert MultimodalConfig.from_dict(inner).tokens.image == 90
    lacking = {key: value for key, value in raw.items() if key != "image_token_id"}
    with pytest.raises(ConfigError, match="image_token_id"):
        MultimodalConfig.from_dict({**lacking, "text_config": {**raw["text_config"], "image_token_id": 3}})


def test_a_checkpoint_folder_loads_whole_and_nothing_may_be_missing(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    write_checkpoint(name, CONFIGS[name], folder)
    loaded = load_multimodal_model(folder)
    row = rows_of(name)["one image"]
    assert distance(alone(name, row, loaded), alone(name, row)) < 1e-5
    stored = load_file(folder / "model.safetensors")
    lost = next(key for key in sorted(stored) if "vision" in key)
    save_file({key: tensor for key, tensor in stored.items() if key != lost}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=lost.removeprefix("model.")):
        load_multimodal_model(folder)


def test_the_window_is_shorter_than_some_image() -> None:
    """Otherwise none of these tests would tell what happens to longer ones."""
    assert max(row.ids.count(90) for row in rows_of("large").values()) > 2 * WINDOW


# ---------------------------------------------------------------------------------------- draft models


def test_a_draft_model_is_given_the_same_by_the_whole_model_and_by_its_decoder(name: str) -> None:
    model, row = MODELS[name], rows_of(name)["two images"]
    ids, media = torch.tensor([row.ids]), Writer(name).media([row])
    states = model.states(ids, media, aux_layers=(0, 2))
    soft = model.soft_tokens(ids, media)
    own = model.language_model.states(ids, aux_layers=(0, 2), soft=soft)
    assert torch.equal(states.hidden, own.hidden)
    assert all(torch.equal(a, b) for a, b in zip(states.aux, own.aux, strict=True))
    assert soft is not None
    assert torch.equal(states.aux[0][soft.where], soft.features)
    assert torch.equal(states.aux[0][~soft.where], model.embed(ids)[~soft.where])
    assert row.ids.count(model.image_token_id) == int(soft.where.sum())
