"""The vision tower, the tile embedder and their projectors, beside transformers and by their equations."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from model_impl.errors import MediaError
from model_impl.layers import rope
from model_impl.layers.clipped import ClippedLinear
from model_impl.layers.norm import RMSNorm
from model_impl.layers.projector import Projector
from model_impl.media_config import MultimodalConfig
from model_impl.preprocess.images import ImageBatch, prepare_images
from model_impl.preprocess.video import prepare_videos, video_from_frames
from model_impl.unified import TileEmbedder
from model_impl.vision import VisionTower, pool
from tests.media_oracle import ask, assert_parity

pytestmark = pytest.mark.xdist_group("vision")  # its fixtures take long: one process makes them

torch.set_num_threads(1)

TEXT_WIDTH = 40

# -------------------------------------------------------------------------------------- configurations

_TOWER: dict[str, Any] = {
    "model_type": "gemma4_vision",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "global_head_dim": 16,
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "position_embedding_size": 1024,
    "default_output_length": 280,
    "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_dropout": 0.0,
}
CLIPPED = {**_TOWER, "rms_norm_eps": 0.01, "use_clipped_linears": True, "standardize": False}
"""Like the tower of E2B and E4B; an epsilon that shows wherever it is used."""
STANDARDIZED = {**_TOWER, "head_dim": 20, "use_clipped_linears": False, "standardize": True}
"""Like the tower of 26B-A4B and 31B, whose heads also are no power of two."""
TOWERS = {"clipped": CLIPPED, "standardized": STANDARDIZED}
TILES: dict[str, Any] = {
    "model_type": "gemma4_unified_vision",
    "mm_embed_dim": 32,
    "mm_posemb_size": 300,
    "model_patch_size": 48,
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "num_soft_tokens": 280,
    "output_proj_dims": 32,
    "rms_norm_eps": 0.01,
}
_TEXT: dict[str, Any] = {
    "model_type": "gemma4_text",
    "vocab_size": 64,
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "global_head_dim": 16,
    "sliding_window": 8,
}
_TOKENS = {"image_token_id": 5, "boi_token_id": 6, "eoi_token_id": 7}


def config(vision: Mapping[str, Any]) -> Any:
    return MultimodalConfig.from_dict({"text_config": _TEXT, "vision_config": dict(vision), **_TOKENS}).vision


def tower(vision: Mapping[str, Any]) -> VisionTower:
    return fill(VisionTower(config(vision)))


# --------------------------------------------------------------------------------------------- weights


M = TypeVar("M", bound=nn.Module)


def fill(module: M) -> M:
    """Seeded weights by name: nothing is neutral, and every clip bound cuts something off."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.copy_(weight(name, tuple(tensor.shape)))
    return module.eval().requires_grad_(False)


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    if name.startswith(("patch_dense", "patch_ln2", "pos_embedding")):
        return 0.01 * _weight(name, shape)  # so small that the epsilon of the norm behind it shows
    return _weight(name, shape)


def _weight(name: str, shape: tuple[int, ...]) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    made = torch.Generator().manual_seed(seed)
    uniform = torch.rand(shape, generator=made)
    normal = torch.randn(shape, generator=made)
    if name.endswith(("_min", "_max")):
        # Gated products are small, and negative ones smaller still.
        bound = (0.4 + 0.5 * uniform) * (0.1 if "down_proj" in name else 1.0)
        return -bound if name.endswith("_min") else bound
    if name == "std_scale":
        return 0.2 + uniform
    if name == "std_bias":
        return 3 * normal
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return 0.5 + 0.6 * uniform
    if name.endswith(("norm.weight", "ln1.weight", "ln2.weight")):
        return 0.5 + uniform
    if name.endswith("bias"):
        return 0.3 * normal
    if "embedding" in name:
        return 0.4 * normal
    return normal * shape[-1] ** -0.5


# ---------------------------------------------------------------------------------------------- images

SHAPES = [
    (1, 1),
    (20_000, 100),
    (100, 20_000),
    (20_000, 1),
    (1, 20_000),
    (3, 900),
    (48, 48),
    (512, 512),
    (1920, 1080),
    (671, 483),
]
"""Width and height."""


def noise(width: int, height: int) -> Tensor:
    """Few large fields, so that a resized image still has contrast: uint8 [3, height, width]."""
    made = torch.Generator().manual_seed(width * 31 + height)
    coarse = torch.rand(1, 3, min(height, 9), min(width, 9), generator=made)
    full = nn.functional.interpolate(coarse, size=(height, width), mode="nearest")[0]
    return (full * 255).to(torch.uint8)


def images(*sizes: tuple[int, int], budget: int = 70, **options: Any) -> ImageBatch:
    return prepare_images([noise(*size) for size in sizes], budget, **options)


def frames() -> ImageBatch:
    clip = torch.stack([noise(96, 64).roll(7 * i, dims=2) for i in range(33)])
    return prepare_videos([video_from_frames(clip, "clip", fps=10)]).images


BATCHES = {
    "ten shapes": images(*SHAPES),
    "the default budget": images((671, 483), (20_000, 1), (48, 48), budget=280),
    "alone": images((20_000, 1)),
    "unpadded": images((7 * 48, 10 * 48)),
    "a video": frames(),
}
"""`unpadded` has patches up to the budget, and no mask."""

# ---------------------------------------------------------------------------------------- transformers

Said = dict[str, Tensor]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Said:
    """What transformers makes of all batches with both towers, and of tiles."""
    given: dict[str, Tensor] = {}
    runs = []
    for name, vision in TOWERS.items():
        given |= named(f"{name}.tower.", tower(vision)) | named(f"{name}.projector.", projector(vision))
        runs += [
            {"key": f"{name}.{b}", "config": vision, "weights": name, "batch": b, "text_width": TEXT_WIDTH}
            for b in BATCHES
        ]
    for name, batch in BATCHES.items():
        given |= {f"{name}.pixels": batch.pixels, f"{name}.positions": batch.positions}
    tiles = images(*SHAPES, budget=140, cut="tiles")
    given |= named("unified.tower.", fill(TileEmbedder(config(TILES))))
    given |= named("unified.projector.", projector(TILES))
    given |= {"unified.pixels": tiles.pixels, "unified.positions": tiles.positions}
    asked = {"towers": runs, "unified": {"config": TILES, "text_width": TEXT_WIDTH}}
    return ask(tmp_path_factory, "vision", "towers", asked, tensors=given)[1]


def named(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {prefix + name: tensor.clone() for name, tensor in module.state_dict().items()}


def projector(vision: Mapping[str, Any]) -> Projector:
    width = vision.get("output_proj_dims", vision.get("hidden_size"))
    assert isinstance(width, int)
    return fill(Projector(width, TEXT_WIDTH, vision["rms_norm_eps"]))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_gives_what_transformers_gives(said: Said, name: str, batch: str) -> None:
    given = BATCHES[batch]
    features = tower(TOWERS[name])(given.pixels, given.positions)
    assert len(features) == sum(given.soft_tokens)
    assert_parity(features, said[f"{name}.{batch}.features"])
    assert_parity(projector(TOWERS[name])(features), said[f"{name}.{batch}.soft"])


def test_the_tile_embedder_gives_what_transformers_gives(said: Said) -> None:
    given = images(*SHAPES, budget=140, cut="tiles")
    features = fill(TileEmbedder(config(TILES)))(given.pixels, given.positions)
    assert len(features) == sum(given.soft_tokens)
    assert_parity(features, said["unified.features"])
    assert_parity(projector(TILES)(features), said["unified.soft"])


# ---------------------------------------------------------------------------------------- its own rules


def test_clip_bounds_bite_everywhere() -> None:
    """Else the comparison says nothing about them."""
    model = tower(CLIPPED)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, ClippedLinear)}
    assert len(linears) == 3 * 7
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with watched(linears, seen):
        model(BATCHES["ten shapes"].pixels, BATCHES["ten shapes"].positions)
    for name, (given, raw) in seen.items():
        for x, low, high in (
            (given, linears[name].input_min, linears[name].input_max),
            (raw, linears[name].output_min, linears[name].output_max),
        ):
            for part in ((x < low), (x > high)):
                assert 0.0005 < part.float().mean() < 0.5, name


@contextmanager
def watched(linears: Mapping[str, ClippedLinear], seen: dict[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Record what each linear is given, and what its matrix makes of that before the outer clamp."""
    hooks = []
    for name, linear in linears.items():

        def record(module: nn.Module, given: tuple[Tensor], name: str = name) -> None:
            assert isinstance(module, ClippedLinear)
            inside = given[0].clamp(module.input_min, module.input_max)
            seen[name] = (given[0], nn.functional.linear(inside, module.linear.weight))

        hooks.append(linear.register_forward_pre_hook(record))
    yield
    for hook in hooks:
        hook.remove()


def test_a_clipped_linear_is_a_matrix_between_two_clamps() -> None:
    linear = fill(ClippedLinear(6, 4, clipped=True))
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)) * 2
    bounded = torch.minimum(torch.maximum(x, linear.input_min), linear.input_max)
    y = bounded @ linear.linear.weight.T
    expected = torch.minimum(torch.maximum(y, linear.output_min), linear.output_max)
    torch.testing.assert_close(linear(x), expected)
    assert not torch.allclose(linear(x), x @ linear.linear.weight.T)
    plain = ClippedLinear(6, 4, clipped=False)
    assert list(plain.state_dict()) == ["linear.weight"]
    plain.linear.weight.data = linear.linear.weight
    torch.testing.assert_close(plain(x), x @ linear.linear.weight.T)
    unloaded = ClippedLinear(6, 4, clipped=True)
    torch.testing.assert_close(unloaded(1e9 * x), 1e9 * x @ unloaded.linear.weight.T)


@pytest.mark.parametrize("name", TOWERS)
def test_an_image_gives_the_same_alone_and_in_a_batch(name: str) -> None:
    model = tower(TOWERS[name])
    together = BATCHES["ten shapes"]
    parts = model(together.pixels, together.positions).split(together.soft_tokens)
    for size, part in zip(SHAPES, parts, strict=True):
        for padded in (True, False):
            alone = images(size, pad_to_budget=padded)
            assert_parity(model(alone.pixels, alone.positions), part)


def test_a_tile_gives_the_same_alone_and_in_a_batch() -> None:
    model = fill(TileEmbedder(config(TILES)))
    together = images(*SHAPES, cut="tiles")
    parts = model(together.pixels, together.positions).split(together.soft_tokens)
    for size, part in zip(SHAPES, parts, strict=True):
        alone = images(size, cut="tiles", pad_to_budget=False)
        assert_parity(model(alone.pixels, alone.positions), part)


def test_padding_is_nowhere_and_its_content_means_nothing() -> None:
    model, batch = tower(STANDARDIZED), BATCHES["ten shapes"]
    noisy = batch.pixels.masked_fill((batch.positions < 0).all(-1, keepdim=True), 100.0)
    assert not torch.equal(noisy, batch.pixels)
    expected = model(batch.pixels, batch.positions)
    assert_parity(model(noisy, batch.positions), expected)


def test_the_order_of_patches_means_nothing() -> None:
    model, batch = tower(CLIPPED), images((671, 483), (48, 48), (3, 900))
    order = torch.randperm(batch.pixels.shape[1], generator=torch.Generator().manual_seed(3))
    shuffled = model(batch.pixels[:, order], batch.positions[:, order])
    assert_parity(shuffled, model(batch.pixels, batch.positions))


def test_every_patch_reaches_every_soft_token_of_its_image_and_no_other() -> None:
    model, batch = tower(CLIPPED), images((671, 483), (48, 48))
    changed = batch.pixels.clone()
    changed[0, 5] = 1 - changed[0, 5]
    before = model(batch.pixels, batch.positions).split(batch.soft_tokens)
    after = model(changed, batch.positions).split(batch.soft_tokens)
    assert ((before[0] - after[0]).abs().amax(dim=1) > 1e-6).all()
    assert_parity(before[1], after[1])


def test_pooling_is_the_mean_of_three_by_three_row_by_row() -> None:
    sizes = [(2, 4), (5, 1), (1, 1)]  # rows and columns of soft tokens
    grids = [torch.randn(3 * h, 3 * w, 6) for h, w in sizes]
    places = [[[c, r] for r in range(3 * h) for c in range(3 * w)] for h, w in sizes]
    x = torch.cat([grid.flatten(0, 1) for grid in grids])
    positions = torch.cat([torch.tensor(own) for own in places])
    lengths = torch.tensor([len(own) for own in places])
    expected = [
        g.view(h, 3, w, 3, 6).mean(dim=(1, 3)).flatten(0, 1) for g, (h, w) in zip(grids, sizes, strict=True)
    ]
    torch.testing.assert_close(pool(x, positions, lengths, 3), torch.cat(expected))


def test_half_of_a_head_turns_with_the_column_and_half_with_the_row() -> None:
    attention = tower(CLIPPED).encoder.layers[0].self_attn
    frequencies = tower(CLIPPED)._frequencies(torch.device("cpu"))
    torch.testing.assert_close(frequencies, torch.tensor([100 ** (-2 * j / 8) for j in range(4)]))
    cosines, sines = rope.angles(torch.tensor([[[5, 0], [0, 7], [5, 7]]]), frequencies, torch.float32)
    column, row, both = attention._rotate(torch.ones(3, 1, 16), (cosines[0], sines[0]))[:, 0]
    assert torch.equal(column[8:], torch.ones(8))
    assert torch.equal(row[:8], torch.ones(8))
    torch.testing.assert_close(both, torch.cat([column[:8], row[8:]]))
    t = 5 * frequencies
    torch.testing.assert_close(column[:8], torch.cat([t.cos() - t.sin(), t.cos() + t.sin()]))


def test_standardised_features_are_finite_in_float16() -> None:
    """The statistics of real checkpoints are beyond float16 before they meet (catalogue M01)."""
    model = tower(STANDARDIZED)
    model.std_bias.copy_(model.std_bias.sign() * 54_000)
    model.std_scale.fill_(2e-5)
    for layer in model.encoder.layers:
        layer.post_feedforward_layernorm.weight.mul_(3000)
    batch = images((671, 483))
    exact = model(batch.pixels, batch.positions)
    half = model.half()(batch.pixels, batch.positions)
    assert half.dtype == torch.float16
    assert torch.isfinite(half).all()
    torch.testing.assert_close(half.float(), exact, rtol=0.05, atol=0.05)


def test_zero_norms_leave_the_embedding_alone() -> None:
    """A norm multiplies by its weight, not by one more: no branch adds anything."""
    model = tower(CLIPPED)
    for module in model.encoder.modules():
        if isinstance(module, RMSNorm) and module.weight is not None:
            module.weight.zero_()
    batch = images((7 * 48, 10 * 48))
    pixels, positions = batch.pixels[0], batch.positions[0]
    embedded = model.patch_embedder(pixels, positions)
    expected = pool(embedded, positions, torch.tensor([len(pixels)]), 3) * 48**0.5
    torch.testing.assert_close(model(batch.pixels, batch.positions), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TOWERS)
def test_features_have_the_dtype_of_the_weights(name: str, dtype: torch.dtype) -> None:
    batch = images((671, 483), (48, 48))
    exact = tower(TOWERS[name])(batch.pixels, batch.positions)
    rounded = tower(TOWERS[name]).to(dtype)(batch.pixels, batch.positions)
    assert rounded.dtype == dtype
    assert (rounded.float() - exact).norm() < 0.1 * exact.norm()


# ------------------------------------------------------------------------------------------------ sizes

PUBLISHED_SMALL = {
    **_TOWER,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "position_embedding_size": 10_240,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "use_clipped_linears": True,
    "standardize": False,
}
PUBLISHED_LARGE = {
    **PUBLISHED_SMALL,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 72,
    "use_clipped_linears": False,
    "standardize": True,
}
PUBLISHED_TILES = {**TILES, "mm_embed_dim": 3840, "mm_posemb_size": 1120, "output_proj_dims": 3840}


@pytest.mark.parametrize(
    ("vision", "text_width", "millions"),
    [
        pytest.param(PUBLISHED_SMALL, 1536, 168.5, id="E2B"),
        pytest.param(PUBLISHED_SMALL, 2560, 169.3, id="E4B"),
        pytest.param(PUBLISHED_LARGE, 2816, 572.8, id="26B-A4B"),
        pytest.param(PUBLISHED_LARGE, 5376, 575.7, id="31B"),
    ],
)
def test_published_towers_have_the_published_sizes(
    vision: dict[str, Any], text_width: int, millions: float
) -> None:
    with torch.device("meta"):
        model = nn.ModuleList(
            [VisionTower(config(vision)), Projector(vision["hidden_size"], text_width, 1e-6)]
        )
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_published_names() -> None:
    """Those of the fact sheet, section 5.1, with their shapes."""
    with torch.device("meta"):
        small = {n: tuple(t.shape) for n, t in VisionTower(config(PUBLISHED_SMALL)).state_dict().items()}
        large = {n: tuple(t.shape) for n, t in VisionTower(config(PUBLISHED_LARGE)).state_dict().items()}
        tiles = {n: tuple(t.shape) for n, t in TileEmbedder(config(PUBLISHED_TILES)).state_dict().items()}
    layer = "encoder.layers.15."
    bounds = {"input_min", "input_max", "output_min", "output_max"}
    assert small["patch_embedder.input_proj.weight"] == (768, 768)
    assert small["patch_embedder.position_embedding_table"] == (2, 10_240, 768)
    assert small[layer + "self_attn.q_proj.linear.weight"] == (768, 768)
    assert small[layer + "self_attn.k_norm.weight"] == (64,)
    assert small[layer + "mlp.gate_proj.linear.weight"] == (3072, 768)
    for linear in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        assert {small[f"{layer}{linear}.{bound}"] for bound in bounds} == {()}
    assert len(small) == 2 + 16 * (7 * 5 + 2 + 4)
    assert large["std_bias"] == large["std_scale"] == (1152,)
    assert len(large) == 2 + 2 + 27 * (7 + 2 + 4)
    assert tiles == {
        "patch_ln1.weight": (6912,),
        "patch_ln1.bias": (6912,),
        "patch_dense.weight": (3840, 6912),
        "patch_dense.bias": (3840,),
        "patch_ln2.weight": (3840,),
        "patch_ln2.bias": (3840,),
        "pos_embedding": (1120, 2, 3840),
        "pos_norm.weight": (3840,),
        "pos_norm.bias": (3840,),
    }


# ----------------------------------------------------------------------------------------------- errors


def test_patches_that_do_not_fit_are_refused() -> None:
    batch = images((48, 48))
    tiles = images((48, 48), cut="tiles")
    with pytest.raises(MediaError, match=r"do not fit this model: they must be \[images, squares, 768\]"):
        tower(CLIPPED)(tiles.pixels, tiles.positions)
    with pytest.raises(MediaError, match=r"they must be \[images, squares, 6912\]"):
        fill(TileEmbedder(config(TILES)))(batch.pixels, batch.positions)
    with pytest.raises(MediaError, match="do not fit"):
        tower(CLIPPED)(batch.pixels, batch.positions[:, :-1])
    small = VisionTower(replace(config(CLIPPED), positions=200))
    with pytest.raises(MediaError, match="column 209, and the position table ends at 199"):
        small(*(lambda b: (b.pixels, b.positions))(images((20_000, 1))))


def test_patches_that_are_no_grid_are_refused() -> None:
    batch = images((512, 512))
    model = tower(CLIPPED)
    wider = batch.positions.clone()
    wider[..., 0] += wider[..., 0] >= 0
    missing = batch.positions.clone()
    missing[0, 4] = -1
    for wrong in (wider, missing):
        with pytest.raises(MediaError, match="no grid of whole squares of 3 x 3"):
            model(batch.pixels, wrong)
