"""The audio tower and the audio projectors, beside transformers and by their equations."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from model_impl import audio
from model_impl.audio import AudioTower, LocalAttention, clamp, local_mask
from model_impl.errors import ConfigError, MediaError
from model_impl.layers.clipped import ClippedLinear
from model_impl.layers.projector import Projector
from model_impl.media_config import AudioConfig, FrameConfig, MultimodalConfig
from model_impl.preprocess.audio import AudioBatch, prepare_audio, prepare_waves, soft_token_count
from model_impl.unified_audio import StretchEmbedder
from tests.media_oracle import ask, assert_parity, noise, tone
from tests.model_configs import DENSE

pytestmark = pytest.mark.xdist_group("audio")  # its fixtures take long: one process makes them

torch.set_num_threads(1)

TEXT_WIDTH = 40

# -------------------------------------------------------------------------------------- configurations

CLIPPED: dict[str, Any] = {
    "model_type": "gemma4_audio",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "silu",
    "attention_chunk_size": 12,
    "attention_context_left": 13,
    "attention_context_right": 0,
    "attention_logit_cap": 50.0,
    "attention_invalid_logits_value": -1e9,
    "conv_kernel_size": 5,
    "gradient_clipping": 1e10,
    "residual_weight": 0.5,
    "rms_norm_eps": 1e-6,
    "subsampling_conv_channels": [128, 4],
    "output_proj_dims": 24,
    "use_clipped_linears": True,
}
"""Like the tower of E2B and E4B."""
PLAIN = {
    **CLIPPED,
    "hidden_size": 36,
    "num_attention_heads": 3,
    "attention_logit_cap": 2.0,
    "conv_kernel_size": 3,
    "gradient_clipping": 0.7,
    "residual_weight": 0.3,
    "use_clipped_linears": False,
}
"""Every number off the published one where nothing else forbids it; cap and limit are reached."""
SHORT = {**CLIPPED, "attention_chunk_size": 5, "attention_context_left": 5, "num_hidden_layers": 3}
"""Blocks one longer than what they see of the past, the other length that transformers' table allows."""
TOWERS = {"clipped": CLIPPED, "plain": PLAIN, "short": SHORT}

CLIPS = {
    "one token": noise(161),
    "a block": noise(160 * 48 + 1),  # twelve tokens
    "a block and a token": noise(160 * 49 + 1),
    "two seconds": noise(32_007),
    "tone": tone(9_000, 1000.0),
    "silence": torch.zeros(12_000),
    "no token": noise(160),
}


def audio_config(raw: Mapping[str, Any]) -> AudioConfig:
    tokens = {"image_token_id": 90, "boi_token_id": 91, "eoi_token_id": 92}
    sound = {"audio_token_id": 93, "boa_token_id": 94, "eoa_token_id": 95}
    whole = MultimodalConfig.from_dict({**tokens, **sound, "text_config": DENSE, "audio_config": raw})
    assert isinstance(whole.audio, AudioConfig)
    return whole.audio


# --------------------------------------------------------------------------------- weights off neutral

_RANGES = {
    # Bounds must bite: an average of values is below their bounds, what silu gives is never below -0.28.
    "post.input_min": (-0.2, -0.1),
    "post.input_max": (0.1, 0.2),
    "post.output_min": (-0.2, -0.1),
    "post.output_max": (0.1, 0.2),
    "linear_end.output_min": (-0.2, -0.1),
    "linear_end.output_max": (0.1, 0.2),
    "ffw_layer_2.input_min": (-0.2, -0.1),
    "linear_end.input_min": (-0.2, -0.1),
    "input_min": (-1.2, -0.6),
    "input_max": (0.6, 1.2),
    "output_min": (-0.8, -0.3),
    "output_max": (0.3, 0.8),
    "per_dim_scale": (-1.5, 0.5),
    "linear_end.linear.weight": (-0.1, 0.1),
    "post_layer_norm.weight": (0.2, 0.5),
    "norm_post_attn.weight": (0.2, 0.5),
    "norm.weight": (0.5, 1.7),
    "norm_pre_attn.weight": (0.5, 1.7),
    "norm_out.weight": (0.5, 1.7),
    "output_proj.bias": (-0.5, 0.5),
}
"""Uniform ranges by the end of a name. What a layer adds is kept low, or a random stack blows up rounding."""

Module = TypeVar("Module", bound=nn.Module)


def filled(module: Module, seed: int = 7) -> Module:
    """With weights that seed and name decide, and nothing neutral among them."""
    for name, tensor in module.state_dict().items():
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        for end, (low, high) in _RANGES.items():
            if name.endswith(end):
                tensor.uniform_(low, high, generator=generator)
                break
        else:
            tensor.normal_(0.0, (2.0 / tensor[0].numel()) ** 0.5, generator=generator)
    return module.eval().requires_grad_(False)


def tower(name: str, keys: int | None = None) -> AudioTower:
    return filled(AudioTower(audio_config(TOWERS[name]), keys))


def projector(width: int) -> Projector:
    return filled(Projector(width, TEXT_WIDTH, 1e-6))


def soft_tokens(made: Tensor, batch: AudioBatch) -> dict[str, Tensor]:
    """Those of each clip of the batch of all."""
    return dict(zip(CLIPS, made.split(list(batch.soft_tokens)), strict=True))


ALL = prepare_audio(list(CLIPS.values()))
STRETCHES = prepare_waves(list(CLIPS.values()), 640)

# --------------------------------------------------------------------------------------- transformers

RUNS: list[dict[str, Any]] = [
    {"key": "clipped", "weights": "clipped"},
    {"key": "plain", "weights": "plain"},
    {"key": "short", "weights": "short"},
    {"key": "clipped wider", "weights": "clipped", "wider_by": 1},
    {"key": "short wider", "weights": "short", "wider_by": 1},
    {"key": "clipped bfloat16", "weights": "clipped", "dtype": "bfloat16"},
    {"key": "clipped eager", "weights": "clipped", "attention": "eager"},
    *(
        {"key": f"clipped {name}", "weights": "clipped", "batch": name}
        for name in CLIPS
        if name != "no token"  # for which transformers' convolution is given no frame that counts
    ),
]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    default = {"wider_by": 0, "dtype": "float32", "attention": "sdpa", "batch": "all"}
    request = {
        "towers": [
            {**default, "config": TOWERS[run["weights"]], "text_width": TEXT_WIDTH, **run} for run in RUNS
        ],
        "unified": {"config": {"audio_embed_dim": 640}, "text_width": TEXT_WIDTH},
    }
    tensors = {"all.features": ALL.features, "all.mask": ALL.mask}
    tensors |= {"unified.features": STRETCHES.features, "unified.mask": STRETCHES.mask}
    for name, clip in CLIPS.items():
        alone = prepare_audio([clip])
        tensors |= {f"{name}.features": alone.features, f"{name}.mask": alone.mask}
    for name, raw in TOWERS.items():
        tensors |= weights(f"{name}.tower", tower(name))
        tensors |= weights(f"{name}.projector", projector(raw["output_proj_dims"]))
    tensors |= weights("unified.projector", projector(640))
    return ask(tmp_path_factory, "audio", "sound towers", request, tensors=tensors)[1]


def weights(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("name", TOWERS)
def test_tower_and_projector_are_transformers(oracle: dict[str, Tensor], name: str) -> None:
    features = tower(name)(ALL.features, ALL.mask)
    assert_parity(features, oracle[f"{name}.features"])
    assert_parity(projector(features.shape[-1])(features), oracle[f"{name}.soft"])


@pytest.mark.parametrize("name", ["clipped", "short"])
def test_one_key_more_is_transformers_with_a_wider_window(oracle: dict[str, Tensor], name: str) -> None:
    wider = tower(name, keys=TOWERS[name]["attention_context_left"])(ALL.features, ALL.mask)
    assert_parity(wider, oracle[f"{name} wider.features"])
    apart = (wider - oracle[f"{name}.features"]).norm() / wider.norm()
    assert apart > 1e-2


@pytest.mark.parametrize("name", [name for name in CLIPS if name != "no token"])
def test_single_clips_are_transformers(oracle: dict[str, Tensor], name: str) -> None:
    batch = prepare_audio([CLIPS[name]])
    assert_parity(tower("clipped")(batch.features, batch.mask), oracle[f"clipped {name}.features"])


def test_bfloat16_is_as_near_as_transformers(oracle: dict[str, Tensor]) -> None:
    exact = oracle["clipped.features"]
    made = tower("clipped").bfloat16()(ALL.features, ALL.mask)
    assert made.dtype == torch.bfloat16
    theirs = (oracle["clipped bfloat16.features"].float() - exact).norm()
    assert (made.float() - exact).norm() < 1.2 * theirs


def test_transformers_eager_attention_is_no_oracle(oracle: dict[str, Tensor]) -> None:
    """It inverts the mask (fact sheet, section 11): if this fails, it has been mended; tell findings.md."""
    exact, eager = oracle["clipped.features"], oracle["clipped eager.features"]
    assert (exact - eager).norm() > 0.1 * exact.norm()


def test_unified_audio_is_transformers(oracle: dict[str, Tensor]) -> None:
    frames = StretchEmbedder(FrameConfig(samples=640, rms_norm_eps=1e-6))(STRETCHES.features, STRETCHES.mask)
    assert_parity(projector(640)(frames), oracle["unified.soft"])


# ------------------------------------------------------------------------------------- batches, padding


@pytest.mark.parametrize("name", TOWERS)
def test_clips_do_not_depend_on_their_batch(name: str) -> None:
    model = tower(name)
    together = soft_tokens(model(ALL.features, ALL.mask), ALL)
    for clip_name, clip in CLIPS.items():
        alone = prepare_audio([clip])
        made = model(alone.features, alone.mask)
        assert len(made) == soft_token_count(len(clip)) == len(together[clip_name])
        torch.testing.assert_close(made, together[clip_name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keys", [12, 13])
def test_what_stands_at_padding_does_not_matter(keys: int) -> None:
    model = tower("clipped", keys)
    expected = model(ALL.features, ALL.mask)
    wider = torch.full((len(CLIPS), ALL.features.shape[1] + 61, 128), 1e3)
    wider[:, : ALL.features.shape[1]] = torch.where(ALL.mask[..., None], ALL.features, 1e3)
    mask = torch.zeros(wider.shape[:2], dtype=torch.bool)
    mask[:, : ALL.mask.shape[1]] = ALL.mask
    torch.testing.assert_close(model(wider, mask), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("samples", [1, 160, 161, 321, 479_999, 480_000, 480_001])
def test_as_many_tokens_as_were_counted(samples: int) -> None:
    batch = prepare_audio([noise(samples)])
    made = tower("clipped")(batch.features, batch.mask)
    assert made.shape == (soft_token_count(samples), 24)
    assert made.isfinite().all()


def test_only_clips_without_a_token() -> None:
    for clips in ([torch.ones(1)], [torch.ones(1), noise(160)]):
        batch = prepare_audio(clips)
        assert tower("clipped")(batch.features, batch.mask).shape == (0, 24)


# ------------------------------------------------------------------------------------------ attention


def by_definition(attention: LocalAttention, x: Tensor, valid: Tensor, keys: int) -> Tensor:
    """One query after the other, each with the valid keys at distances below `keys`."""
    config, d = attention.config, attention.head_dim
    q, k, v = (p(x).view(*x.shape[:2], -1, d) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    scale = d**-0.5 * torch.log2(1 + attention.per_dim_scale.exp())
    out = torch.zeros_like(x)
    periods = torch.logspace(0, 4, config.hidden_size // 2, dtype=torch.float64).float()
    for n in range(len(x)):
        for t in range(int(valid[n].sum())):
            seen = range(max(0, t - keys + 1), t + 1)
            for head in range(config.num_heads):
                logits = []
                for s in seen:
                    place = (t - s) / periods
                    r = attention.relative_k_proj(torch.cat([place.sin(), place.cos()])).view(-1, d)[head]
                    query = q[n, t, head] * scale
                    key = k[n, s, head] * torch.log2(torch.tensor(1 + torch.e))
                    logits.append(query @ key + query @ r)
                cap = config.logit_cap
                p = torch.softmax(cap * torch.tanh(torch.stack(logits) / cap), dim=0)
                out[n, t, head * d : (head + 1) * d] = p @ v[n, list(seen), head]
    return attention.post(out)


@pytest.mark.parametrize(("name", "keys"), [("clipped", 12), ("clipped", 13), ("plain", 12), ("short", 5)])
def test_attention_is_its_definition(name: str, keys: int) -> None:
    config = audio_config(TOWERS[name])
    attention = filled(LocalAttention(config))
    x = torch.randn(3, 27, config.hidden_size, generator=torch.Generator().manual_seed(1))
    valid = torch.arange(27) < torch.tensor([27, 12, 1])[:, None]
    got = attention(x, local_mask(valid, config.chunk_size, config.context_left - 1, keys))
    expected = by_definition(attention, x, valid, keys)
    torch.testing.assert_close(got[valid], expected[valid], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keys", [12, 13])
def test_window_edges(keys: int) -> None:
    """A changed frame changes itself and the `keys` - 1 after it, and none before."""
    config = audio_config(CLIPPED)
    attention = filled(LocalAttention(config))
    x = torch.randn(1, 40, config.hidden_size, generator=torch.Generator().manual_seed(2))
    allowed = local_mask(torch.ones(1, 40, dtype=torch.bool), 12, 12, keys)
    changed = x.clone()
    changed[:, 9] += 1.0
    apart = (attention(x, allowed) != attention(changed, allowed)).any(dim=-1)[0]
    assert apart.nonzero().flatten().tolist() == list(range(9, 9 + keys))


def test_the_default_is_transformers() -> None:
    assert tower("clipped").keys == 12
    assert tower("short").keys == 4


def test_other_windows_are_refused() -> None:
    config = audio_config(CLIPPED)
    for keys in (0, 11, 14):
        with pytest.raises(ConfigError, match=f"over {keys} keys.* transformers has 12"):
            AudioTower(config, keys)
    for chunk in (11, 14):
        with pytest.raises(ConfigError, match=f"attention_chunk_size {chunk} must be"):
            AudioTower(replace(config, chunk_size=chunk))


# ---------------------------------------------------------------------------------------- every weight


@pytest.mark.parametrize("name", ["clipped", "plain"])
def test_every_weight_and_bound_counts(name: str) -> None:
    model = tower(name)
    batch = prepare_audio([CLIPS["a block and a token"], CLIPS["tone"]])
    state = model.state_dict()
    before = {key: tensor.clone() for key, tensor in state.items()}
    expected = model(batch.features, batch.mask)
    moved = {}
    for key, tensor in state.items():
        reference = expected
        if (other := other_side(key)) in state:
            state[other].mul_(1000.0)
            reference = model(batch.features, batch.mask)
        if key.endswith(("_min", "_max")):
            tensor.mul_(1000.0)
        else:
            # A norm does not notice a factor that all of a vector have in common.
            tensor.view(-1)[: max(1, tensor.numel() // 2)].mul_(1.5)
        moved[key] = ((model(batch.features, batch.mask) - reference).norm() / reference.norm()).item()
        model.load_state_dict(before)
    assert not {key: by for key, by in moved.items() if by < 1e-5}


def other_side(bound: str) -> str:
    """Of the activation between two linears: the narrower of these two bounds hides the other."""
    if "ffw_layer_1.output" in bound:
        return bound.replace("ffw_layer_1.output", "ffw_layer_2.input")
    return bound.replace("ffw_layer_2.input", "ffw_layer_1.output") if "ffw_layer_2.input" in bound else ""


@pytest.mark.parametrize("number", ["clamp", "logit_cap", "residual_weight"])
def test_every_number_of_the_plain_tower_counts(number: str) -> None:
    config = audio_config(PLAIN)
    other = filled(AudioTower(replace(config, **{number: 10.0})))
    expected = tower("plain")(ALL.features, ALL.mask)
    assert (other(ALL.features, ALL.mask) - expected).norm() > 1e-4 * expected.norm()


def test_published_names_and_shapes() -> None:
    published = {
        **CLIPPED,
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "subsampling_conv_channels": [128, 32],
        "output_proj_dims": 1536,
    }
    with torch.device("meta"):
        state = AudioTower(audio_config(published)).state_dict()
        plain = AudioTower(audio_config({**published, "use_clipped_linears": False})).state_dict()
    shapes = {name: list(tensor.shape) for name, tensor in state.items()}
    expected = {
        "subsample_conv_projection.layer0.conv.weight": [128, 1, 3, 3],
        "subsample_conv_projection.layer1.conv.weight": [32, 128, 3, 3],
        "subsample_conv_projection.layer0.norm.weight": [128],
        "subsample_conv_projection.layer1.norm.weight": [32],
        "subsample_conv_projection.input_proj_linear.weight": [1024, 1024],
        "output_proj.weight": [1536, 1024],
        "output_proj.bias": [1536],
    }
    clipped = {
        "feed_forward1.ffw_layer_1": [4096, 1024],
        "feed_forward1.ffw_layer_2": [1024, 4096],
        "feed_forward2.ffw_layer_1": [4096, 1024],
        "feed_forward2.ffw_layer_2": [1024, 4096],
        **{f"self_attn.{part}": [1024, 1024] for part in ("q_proj", "k_proj", "v_proj", "post")},
        "lconv1d.linear_start": [2048, 1024],
        "lconv1d.linear_end": [1024, 1024],
    }
    norms = (
        *(f"feed_forward{n}.{end}_layer_norm" for n in (1, 2) for end in ("pre", "post")),
        "lconv1d.pre_layer_norm",
        "lconv1d.conv_norm",
        "norm_pre_attn",
        "norm_post_attn",
        "norm_out",
    )
    bounds = {}
    for layer in (f"layers.{number}." for number in range(12)):
        expected |= {f"{layer}{name}.linear.weight": shape for name, shape in clipped.items()}
        expected |= {f"{layer}{name}.weight": [1024] for name in norms}
        expected |= {
            f"{layer}self_attn.relative_k_proj.weight": [1024, 1024],
            f"{layer}self_attn.per_dim_scale": [128],
            f"{layer}lconv1d.depthwise_conv1d.weight": [1024, 1, 5],
        }
        for name in clipped:
            for side in ("input_min", "input_max", "output_min", "output_max"):
                bounds[f"{layer}{name}.{side}"] = list[int]()
    assert shapes == expected | bounds
    assert plain.keys() == expected.keys()
    assert list(projector(24).state_dict()) == ["embedding_projection.weight"]


def test_bounds_are_infinite_until_loaded() -> None:
    model = AudioTower(audio_config(CLIPPED))
    linears = [module for module in model.modules() if isinstance(module, ClippedLinear)]
    assert len(linears) == 2 * 10
    assert all(module.output_max == torch.inf and module.input_min == -torch.inf for module in linears)


# ------------------------------------------------------------------------------------- dtypes, bad input


def test_limits_fit_the_dtype() -> None:
    assert clamp(torch.tensor([torch.inf, -1.0]), 1e10).tolist() == [1e10, -1.0]
    assert clamp(torch.tensor([torch.inf], dtype=torch.float16), 1e10).tolist() == [65504.0]


def test_float16_is_finite_and_near() -> None:
    expected = tower("clipped")(ALL.features, ALL.mask)
    made = tower("clipped").half()(ALL.features, ALL.mask)
    assert made.dtype == torch.float16
    assert (made.float() - expected).norm() < 0.02 * expected.norm()


def test_an_inverted_mask_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch, oracle: dict[str, Tensor]
) -> None:
    right = audio.local_mask
    monkeypatch.setattr(audio, "local_mask", lambda *asked: ~right(*asked))
    broken = tower("clipped")(ALL.features, ALL.mask)
    with pytest.raises(AssertionError):
        assert_parity(broken, oracle["clipped.features"])


@pytest.mark.parametrize(
    ("features", "mask"), [((2, 40, 640), (2, 40)), ((2, 40, 128), (2, 39)), ((40, 128), (40,))]
)
def test_features_that_do_not_fit_are_refused(features: tuple[int, ...], mask: tuple[int, ...]) -> None:
    given = torch.zeros(features), torch.ones(mask, dtype=torch.bool)
    with pytest.raises(MediaError, match=r"do not fit this model: .*128\] .*`prepare_audio`"):
        tower("clipped")(*given)


def test_mel_features_are_refused_by_the_unified_model() -> None:
    embedder = StretchEmbedder(FrameConfig(samples=640, rms_norm_eps=1e-6))
    assert not embedder.state_dict()
    with pytest.raises(MediaError, match=r"do not fit this model: .*640\] .*`prepare_waves`"):
        embedder(ALL.features, ALL.mask)
