"""Forward passes with media in the transformers target, in its worker."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conformance import mixed_rows
from conformance.errors import EngineError
from conformance.media import (
    TEXT,
    Clip,
    ImagePiece,
    MediaPiece,
    Picture,
    Prompts,
    Sound,
    SoundPiece,
    TextPiece,
    VideoPiece,
)
from conformance.suites import MixedRows
from conformance.targets import environments, reference_model, registry
from conformance.targets.process import WorkerTarget
from conformance.targets.protocol import (
    ForwardRequest,
    ForwardResult,
    GenerateRequest,
    Target,
)
from conformance.targets.reference import ReferenceTarget
from conformance.tokenization import tokenizer_files
from conformance.worker.modules import outside_text
from model_impl.media_config import MultimodalConfig
from model_impl.multimodal import Gemma4ForConditionalGeneration
from tests.media_oracle import assert_parity
from tests.model_configs import FULL, MOE, WINDOW
from tests.test_multimodal import CONFIGS, raw_config
from tests.test_vision import STANDARDIZED

NEWEST = "transformers@5.19.0"
VERSIONS = (NEWEST, "transformers@5.18.0")

WHOLE = {**CONFIGS, "experts": raw_config(MOE, STANDARDIZED, None)}
"""As E2B, 31B, the unified 12B and 26B-A4B."""
PUBLISHED = ("small", "large", "experts")
"""Those that transformers masks by the rule; the unified model it does not (F-322)."""


@functools.cache
def opened(spec: str) -> Target:
    return registry.open_target(spec)


@pytest.fixture(scope="module", autouse=True)
def closed() -> Iterator[None]:
    yield
    for spec in VERSIONS:
        if not registry.unavailable(spec):
            opened(spec).close()
    opened.cache_clear()


@pytest.fixture(params=VERSIONS)
def target(request: pytest.FixtureRequest) -> Target:
    if reason := registry.unavailable(request.param):
        pytest.skip(reason)
    return opened(request.param)


@pytest.fixture
def newest() -> Target:
    if reason := registry.unavailable(NEWEST):
        pytest.skip(reason)
    return opened(NEWEST)


# ----------------------------------------------------------------------------------------- forward passes


def text(count: int) -> TextPiece:
    return TextPiece(text=count)


def image(width: int, height: int, seed: int = 0) -> ImagePiece:
    return ImagePiece(image=Picture(width=width, height=height, seed=seed))


def video(frames: int, seed: int = 0) -> VideoPiece:
    return VideoPiece(video=Clip(frames=frames, width=96, height=64, seed=seed))


def sound(samples: int) -> SoundPiece:
    return SoundPiece(audio=Sound(samples=samples))


ROWS: tuple[tuple[TextPiece | MediaPiece, ...], ...] = (
    (text(3), image(96, 64), text(2), image(20_000, 1, seed=1), text(3)),
    (text(11),),
    (text(1), video(2), text(1), image(40, 300, seed=2), text(2)),
    (image(48, 48, seed=3), text(5), video(2, seed=4), text(2)),
)
"""In every model; two rows with videos of one length, so that releases before 5.19 take each."""
SOUNDS: tuple[tuple[TextPiece | MediaPiece, ...], ...] = (
    (text(2), sound(7_000), text(2)),
    (sound(161), text(2), image(64, 64), sound(20_000), text(1)),
)
"""A clip of one token, and clips of several lengths in a row."""


def rows_of(name: str) -> tuple[tuple[TextPiece | MediaPiece, ...], ...]:
    return ROWS + SOUNDS if WHOLE[name]["audio_config"] else ROWS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @functools.cache
    def write(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        reference_model.write_checkpoint(WHOLE[name], folder, seed=11)
        return folder

    return write


def written(name: str, rows: Sequence[Any], folder: Path) -> Prompts:
    folder.mkdir(exist_ok=True)
    asked = MixedRows(pieces=tuple(rows), image_budget=70, frame_budget=70, seed=5)
    return mixed_rows.build(asked, WHOLE[name], folder)


def passed(
    target: Target, folder: Path, prompts: Prompts, capture: Sequence[str], output: Path, **changes: Any
) -> tuple[ForwardResult, dict[str, Tensor]]:
    values = {
        "checkpoint": str(folder),
        "input_ids": prompts.rows,
        "media": prompts.media,
        "capture": capture,
        "output": str(output),
    }
    result = target.forward(ForwardRequest.model_validate(values | changes))
    assert result.path == str(output)
    return result, load_file(output)


@functools.cache
def tower_modules(name: str) -> tuple[str, ...]:
    """Every module outside the text model that gives patches, frames or soft tokens."""
    with torch.device("meta"):
        model = Gemma4ForConditionalGeneration(MultimodalConfig.from_dict(WHOLE[name]))
    unlike = ("conv", "conv1d", "layer0", "layer1", "layers", "encoder", "relative_k_proj")
    bare = ("audio_embedder",)  # nothing is learnt there, so nothing is published
    return tuple(
        module
        for module, _ in model.named_modules()
        if outside_text(module)
        and not module.endswith(unlike)
        and module not in bare
        and ".norm" not in module
    )


def masks(name: str) -> tuple[str, ...]:
    return tuple(f"layers.{n}.self_attn.mask" for n in range(WHOLE[name]["text_config"]["num_hidden_layers"]))


def test_it_says_what_it_can_do(target: Target) -> None:
    info = registry.describe(target)
    assert "forward" in info.capabilities
    assert info.features[0] == "media"


@pytest.mark.parametrize("name", WHOLE)
def test_every_module_gives_what_the_bundled_model_s_gives(
    name: str, target: Target, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    capture = ["embed_tokens", *tower_modules(name)]
    capture += ["layers.0", "norm", "logits"] if name in PUBLISHED else []
    if name == "experts":
        capture.append("layers.1.router")
    assert len(capture) >= 10
    prompts = written(name, rows_of(name), tmp_path / "media")
    folder = checkpoint(name)
    result, theirs = passed(target, folder, prompts, capture, tmp_path / "theirs.safetensors")
    _, ours = passed(ReferenceTarget(), folder, prompts, capture, tmp_path / "ours.safetensors")
    assert set(theirs) == set(ours) == set(result.order) == set(capture)
    for module, tensor in ours.items():
        difference = (theirs[module] - tensor).double()
        assert theirs[module].shape == tensor.shape, module
        assert difference.norm() <= 3e-5 * tensor.double().norm(), module


def test_modules_of_the_unified_model_have_their_published_names(
    newest: Target, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """The class calls them otherwise: what a name gives is told apart by its width and its place."""
    names = ("vision_embedder.patch_dense", "vision_embedder", "embed_vision", "embed_audio")
    prompts = written("unified", rows_of("unified"), tmp_path / "media")
    result, made = passed(newest, checkpoint("unified"), prompts, names, tmp_path / "out.safetensors")
    visual = sum(number != TEXT for row in prompts.blocks for number in row)
    assert {name: tuple(made[name].shape) for name in names[:3]} == {
        "vision_embedder.patch_dense": (visual, 32),
        "vision_embedder": (visual, 32),
        "embed_vision": (visual, 48),
    }
    assert made["embed_audio"].shape == (11 + 1 + 32, 48)
    assert result.order[:3] == names[:3]


def test_images_of_all_rows_come_before_the_frames_of_all(
    newest: Target, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    first = (text(1), video(2), image(96, 64))
    second = (image(40, 300), video(1, seed=3), text(1))
    images, frames = [], []
    for rows in ((first,), (second,), (first, second)):
        prompts = written("large", rows, tmp_path / "media")
        result, made = passed(
            newest, checkpoint("large"), prompts, ("embed_vision",), tmp_path / "out.safetensors"
        )
        calls = {kind: result.effective.get(f"{kind}_calls") for kind in ("image", "video", "audio")}
        assert calls == {"image": str(len(rows)), "video": str(len(rows)), "audio": None}
        of_images = sum(row.count(90) for row in prompts.rows)
        images.append(made["embed_vision"][:of_images])
        frames.append(made["embed_vision"][of_images:])
    assert_parity(images[2], torch.cat(images[:2]))
    assert_parity(frames[2], torch.cat(frames[:2]))


def seen(blocks: Sequence[int], kind: str, *, image_attention: bool) -> Tensor:
    """Which keys each token of a row sees, by the fact sheet's sections 2.4 and 3.6."""
    block = torch.tensor(blocks)
    query, key = torch.arange(len(blocks))[:, None], torch.arange(len(blocks))
    if kind == FULL:
        return key <= query
    same = (block[:, None] == block) & (block != TEXT)
    return ((key <= query) | (same & image_attention)) & (query - key < WINDOW)


@pytest.mark.parametrize(
    ("name", "attention"),
    [*((name, backend) for name in PUBLISHED for backend in ("sdpa", "eager")), ("experts", "flex")],
)
def test_masks_are_those_of_the_rule(
    name: str, attention: str, newest: Target, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = rows_of(name)[:1] if attention == "flex" else rows_of(name)  # it is compiled, which takes long
    prompts = written(name, rows, tmp_path / "media")
    _, made = passed(
        newest, checkpoint(name), prompts, masks(name), tmp_path / "out.safetensors", attention=attention
    )
    config = WHOLE[name]["text_config"]
    image_attention = config.get("use_bidirectional_attention") == "vision"
    width = max(map(len, prompts.rows))
    for number, kind in enumerate(config["layer_types"]):
        expected = []
        for blocks in prompts.blocks:
            row = torch.zeros(len(blocks), width)
            row[:, : len(blocks)] = seen(blocks, kind, image_attention=image_attention)
            expected.append(row)
        assert torch.equal(made[masks(name)[number]], torch.cat(expected)), (number, kind)


@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW])
def test_masks_of_text_alone(
    length: int, newest: Target, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Short rows need no mask, and none is then made; a whole checkpoint and its text model agree."""
    rows = (tuple(range(3, 3 + length)), (4, 5))
    prompts = Prompts(rows)
    _, made = passed(newest, checkpoint("large"), prompts, masks("large"), tmp_path / "out.safetensors")
    bare = tmp_path / "text"
    bare.mkdir()
    reference_model.write_checkpoint(WHOLE["large"]["text_config"], bare, seed=11)
    _, alone = passed(newest, bare, prompts, masks("large"), tmp_path / "alone.safetensors")
    for name, kind in zip(masks("large"), WHOLE["large"]["text_config"]["layer_types"], strict=True):
        expected = torch.zeros(length + 2, length)
        expected[:length] = seen([TEXT] * length, kind, image_attention=True)
        expected[length:, :2] = torch.ones(2, 2).tril()
        assert torch.equal(made[name], expected), name
        assert torch.equal(alone[name], expected), name


def test_the_unified_model_runs_as_it_is(
    newest: Target, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its masks are wrong (F-322), and this adapter leaves them so. When this fails, that was mended."""
    prompts = written("unified", [(text(3), image(600, 600), text(2))], tmp_path / "media")
    _, made = passed(newest, checkpoint("unified"), prompts, masks("unified"), tmp_path / "out.safetensors")
    block = torch.tensor(prompts.blocks[0])
    same = (block[:, None] == block) & (block != TEXT)
    assert int(same.sum()) > WINDOW**2
    for name, kind in zip(masks("unified"), WHOLE["unified"]["text_config"]["layer_types"], strict=True):
        causal = seen(prompts.blocks[0], kind, image_attention=False)
        assert torch.equal(made[name] > 0, causal | same), name


@pytest.mark.parametrize("name", ["small", "large", "unified"])
def test_steps_are_one_pass(
    name: str, target: Target, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """The second cut is right behind the last soft token."""
    prompts = written(
        name, [(text(4), image(96, 64), text(1), image(48, 48), text(WINDOW + 5))], tmp_path / "m"
    )
    end = len(prompts.rows[0]) - prompts.rows[0][::-1].index(90)
    folder = checkpoint(name)
    capture = ("embed_vision", "layers.1", "logits")
    _, whole = passed(target, folder, prompts, capture, tmp_path / "whole.safetensors")
    for prefill in (end + 3, end, len(prompts.rows[0])):
        result, steps = passed(
            target, folder, prompts, capture, tmp_path / "steps.safetensors", prefill=prefill
        )
        assert result.effective["image_calls"] == "1"
        for module in capture:
            assert_parity(steps[module], whole[module])


@pytest.mark.parametrize("piece", [image(48, 48), video(1), sound(3_000)])
def test_media_are_not_cut(
    piece: MediaPiece, newest: Target, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    prompts = written("small", [(text(2),), (text(2), piece, text(2))], tmp_path / "media")
    end = len(prompts.rows[1]) - 3
    with pytest.raises(
        EngineError, match=rf"row 1: `prefill` is {end - 1}, and the soft tokens end at {end}"
    ):
        passed(newest, checkpoint("small"), prompts, ("norm",), tmp_path / "out.safetensors", prefill=end - 1)
    passed(newest, checkpoint("small"), prompts, ("norm",), tmp_path / "out.safetensors", prefill=end)


def test_towers_keep_sdpa_whatever_the_text_model_runs_with(
    target: Target, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """With `eager` audio attention sees what it should not."""
    prompts = written("small", rows_of("small"), tmp_path / "media")
    capture = ("audio_tower.layers.1", "embed_vision", "layers.9", "logits")
    made = {}
    for attention in ("sdpa", "eager"):
        result, made[attention] = passed(
            target, checkpoint("small"), prompts, capture, tmp_path / "out.safetensors", attention=attention
        )
        assert (result.effective["attention"], result.effective["dtype"]) == (attention, "float32")
    for module in capture[:2]:
        assert torch.equal(made["sdpa"][module], made["eager"][module])
    for module in capture[2:]:
        assert_parity(made["eager"][module], made["sdpa"][module])


def test_bfloat16_is_what_runs(newest: Target, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    prompts = written("experts", ROWS[:1], tmp_path / "media")
    capture = ("vision_tower", "embed_vision", "norm")
    made = {}
    for dtype in ("float32", "bfloat16"):
        result, made[dtype] = passed(
            newest, checkpoint("experts"), prompts, capture, tmp_path / "out.safetensors", dtype=dtype
        )
        assert result.effective == {
            "attention": "sdpa",
            "dtype": dtype,
            "experts": "eager",
            "image_calls": "1",
            "rows": "one by one",
        }
    for module in capture[:2]:
        wide, narrow = made["float32"][module], made["bfloat16"][module]
        assert torch.equal(narrow, narrow.bfloat16().float())
        assert 1e-4 < float((narrow - wide).norm() / wide.norm()) < 0.1


def test_text_alone_runs_through_a_whole_checkpoint(
    target: Target, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """In one call, in steps and generated; what shared layers ship and do not use is no error."""
    prompts = Prompts(((5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16), (17, 18, 19)))
    for name in WHOLE:
        folder = checkpoint(name)
        _, ours = passed(ReferenceTarget(), folder, prompts, ("logits",), tmp_path / "ours.safetensors")
        for prefill in (None, 2):
            result, made = passed(
                target, folder, prompts, ("logits",), tmp_path / "out.safetensors", prefill=prefill
            )
            assert not any(key.endswith("_calls") for key in result.effective)
            assert_parity(made["logits"], ours["logits"])
        answer = target.generate(
            GenerateRequest(checkpoint=str(folder), prompts=prompts.rows, max_new_tokens=1)
        )
        best = ours["logits"][[11, 14]].argmax(dim=-1).tolist()
        assert [made.token_ids for made in answer.generations] == [(token,) for token in best]


# -------------------------------------------------------------------------------- forward passes: refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda row: row[:-1],
            "row 0 has 3 placeholders of kind 'image', and the pieces from number 1 on have",
        ),
        (lambda row: [90, *row], "row 0 has 5 placeholders of kind 'image'"),
        (lambda row: [91, *row], "row 0 has 1 placeholders of kind 'video', and .* have \\[\\] soft tokens"),
        (lambda row: [5, 6], "1 of 1 pieces of kind 'image' have no placeholders in any row"),
    ],
)
def test_placeholders_that_do_not_match_are_named(
    change: Callable[[list[int]], list[int]],
    message: str,
    newest: Target,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    prompts = written("large", [(image(48, 48),)], tmp_path / "media")
    count = prompts.rows[0].count(90)
    row = change([90] * count)
    expected = message.replace("3", str(count - 1)).replace("5", str(count + 1))
    with pytest.raises(EngineError, match=expected):
        passed(newest, checkpoint("large"), Prompts((tuple(row),), prompts.media), (), tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "capture", "changes", "message"),
    [
        ("large", "layers.0", {"long_blocks": "drop"}, "long_blocks 'drop': transformers does 'clamp_past'"),
        ("large", "vision_tower.nose", {}, "no module vision_tower.nose"),
        ("large", "vision_embedder", {}, "no module vision_embedder"),
        ("large", "layers.9.self_attn.mask", {}, "no module for layers.9.self_attn.mask"),
        ("large", "layers.9", {}, "no module layers.9"),
        ("unified", "vision_tower", {}, "no module vision_tower"),
        ("large", "layers.0", {"media": "/nowhere/x.safetensors"}, "No such file"),
    ],
)
def test_what_it_cannot_do_is_refused(
    name: str,
    capture: str,
    changes: dict[str, Any],
    message: str,
    newest: Target,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    prompts = written(name, [(image(48, 48),)], tmp_path / "media")
    output = tmp_path / "out.safetensors"
    with pytest.raises(EngineError, match=message):
        passed(newest, checkpoint(name), prompts, (capture,), output, **changes)
    passed(newest, checkpoint(name), prompts, ("norm",), output, long_blocks="clamp_past")


def test_a_text_model_takes_no_media(newest: Target, tmp_path: Path) -> None:
    prompts = written("large", [(image(48, 48),)], tmp_path / "media")
    bare = tmp_path / "text"
    bare.mkdir()
    reference_model.write_checkpoint(WHOLE["large"]["text_config"], bare, seed=11)
    with pytest.raises(EngineError, match="is a text model's checkpoint, and the rows have media"):
        passed(newest, bare, prompts, ("norm",), tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("name", "lost", "added"),
    [
        ("small", "audio_tower.layers.1.self_attn.per_dim_scale", ""),
        ("small", "vision_tower.encoder.layers.0.mlp.up_proj.input_max", ""),
        ("large", "vision_tower.std_scale", ""),
        ("unified", "vision_embedder.pos_embedding", ""),
        ("large", "", "vision_tower.encoder.layers.0.extra"),
    ],
)
def test_it_is_strict_about_the_tensors_of_towers(
    name: str, lost: str, added: str, newest: Target, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    reference_model.write_checkpoint(WHOLE[name], folder, seed=11)
    stored = load_file(folder / "model.safetensors")
    if lost:
        del stored[f"model.{lost}"]
    if added:
        stored[f"model.{added}"] = torch.ones(1)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    prompts = written(name, [(image(48, 48),)], tmp_path / "media")
    kind = "missing_keys" if lost else "unexpected_keys"
    end = (lost or added).rpartition(".")[2]
    with pytest.raises(EngineError, match=rf"the tensors do not fit the configuration: {kind}: \S*{end}"):
        passed(newest, folder, prompts, ("norm",), tmp_path / "out.safetensors")


def test_before_5_19_videos_of_a_row_have_one_length(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    spec = VERSIONS[1]
    if reason := registry.unavailable(spec):
        pytest.skip(reason)
    prompts = written("large", [(video(1), video(2), text(1))], tmp_path / "media")
    with pytest.raises(EngineError, match="a row with videos of 1, 2 frames: this release"):
        passed(opened(spec), checkpoint("large"), prompts, ("norm",), tmp_path / "out.safetensors")
    prompts = written("large", [(video(2), video(2, seed=1), text(1))], tmp_path / "media")
    passed(opened(spec), checkpoint("large"), prompts, ("norm",), tmp_path / "out.safetensors")


def test_without_what_processes_images(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Media that are prepared already need none of it."""
    if reason := registry.unavailable(NEWEST):
        pytest.skip(reason)
    bare = WorkerTarget(
        NEWEST,
        python=environments.status(NEWEST).python,
        adapter="transformers",
        environment={
            "CONFORMANCE_TOKENIZER": str(tokenizer_files()),
            "CONFORMANCE_CHAT_TEMPLATE": str(tokenizer_files() / "tokenizer.json"),
        },
    )
    with bare:
        info = registry.describe(bare)
        assert "preprocess" not in info.capabilities
        assert "conformance targets install transformers@5.19.0" in info.unavailable["preprocess"]
        assert "torchvision and pillow" in info.unavailable["preprocess"]
        prompts = written("large", [(image(48, 48), text(2))], tmp_path / "media")
        passed(bare, checkpoint("large"), prompts, ("norm",), tmp_path / "out.safetensors")
