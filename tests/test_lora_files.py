"""LoRA adapters: what merging one gives, against the definition."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_impl.checkpoint import load_draft, load_text_model
from model_impl.config import TextConfig
from model_impl.errors import CheckpointError, ConfigError
from model_impl.lora import LowRank, merge_adapter, write_random_adapter
from model_impl.random_weights import write_checkpoint, write_eagle3
from model_impl.speculative.eagle3 import Eagle3
from model_impl.speculative.eagle3_config import Eagle3Config
from tests.model_configs import E2B, random_ids

MODULES = ("q_proj", "down_proj")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    write_checkpoint(E2B, folder, seed=1)
    return folder


@pytest.fixture
def adapter(checkpoint: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_random_adapter(checkpoint, folder, seed=2, rank=3, scale=0.2, modules=MODULES)
    return folder


def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "merged"
    folder.mkdir()
    return folder


def test_merging_adds_the_scaled_product_to_every_adapted_weight(
    checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = empty(tmp_path)
    merge_adapter(checkpoint, adapter, folder)
    before, after = (load_file(path / "model.safetensors") for path in (checkpoint, folder))
    parts = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 6)
    adapted = {name for name in before if name.removesuffix(".weight").endswith(MODULES)}
    assert len(parts) == 2 * len(adapted) > 0
    for name, weight in before.items():
        if name not in adapted:
            assert torch.equal(after[name], weight)
            continue
        a, b = (parts[f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(after[name], weight + 2 * b @ a)
        added = after[name] - weight
        assert float(added.norm() / weight.norm()) == pytest.approx(0.2, rel=1e-3)
        assert torch.linalg.matrix_rank(added) == 3


def test_the_merged_checkpoint_computes_what_the_adapter_adds(
    checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    """The adapter as hooks on the modules' outputs, against the merged weights."""
    folder = empty(tmp_path)
    merge_adapter(checkpoint, adapter, folder)
    ids = random_ids(1, 20)
    merged = load_text_model(folder)(ids)
    model = load_text_model(checkpoint)
    plain = model(ids)
    parts = load_file(adapter / "adapter_model.safetensors")
    for name, module in model.named_modules():
        key = f"base_model.model.model.language_model.{name}.lora_"
        if f"{key}A.weight" not in parts:
            continue
        a, b = parts[f"{key}A.weight"], parts[f"{key}B.weight"]

        def add(
            module: object, inputs: tuple[Tensor, ...], output: Tensor, a: Tensor = a, b: Tensor = b
        ) -> Tensor:
            return output + 2 * (inputs[0] @ a.T) @ b.T

        module.register_forward_hook(add)
    torch.testing.assert_close(model(ids), merged, rtol=1e-4, atol=1e-5)
    assert (plain - merged).norm() / plain.norm() > 0.05


def test_each_product_is_made_once(
    checkpoint: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    original = LowRank.product

    def product(self: LowRank, *, embedding: bool = False) -> Tensor:
        made.append(self)
        return original(self, embedding=embedding)

    monkeypatch.setattr(LowRank, "product", product)
    merge_adapter(checkpoint, adapter, empty(tmp_path))
    assert len(made) == len(load_file(adapter / "adapter_model.safetensors")) // 2


def test_a_checkpoint_without_what_the_adapter_changes(
    checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.language_model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"no tensor language_model\.layers\.1\.self_attn\.q_proj"):
        merge_adapter(checkpoint, adapter, empty(tmp_path))


def test_a_module_that_is_not_there(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no module qkv_proj"):
        write_random_adapter(
            checkpoint, empty(tmp_path), seed=0, rank=2, scale=0.1, modules=("qkv_proj", "q_proj")
        )


@pytest.mark.parametrize("damage", ["half", "foreign"])
def test_tensors_that_fit_nothing(damage: str, checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    parts = load_file(file)
    first = min(parts)
    if damage == "half":
        parts.pop(first)
    else:
        for part in "AB":
            module = "base_model.model.model.language_model.layers.77.self_attn.q_proj"
            parts[f"{module}.lora_{part}.weight"] = parts[first].clone()
    save_file(parts, file)
    message = "expected lora_A and lora_B" if damage == "half" else "for no module of this model"
    with pytest.raises(CheckpointError, match=message):
        merge_adapter(checkpoint, adapter, empty(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("{}", "r: Field required"),
        ('{"r": 2, "lora_alpha": 4, "use_dora": true}', "use_dora"),
    ],
)
def test_a_configuration_that_is_none(
    text: str, message: str, checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        merge_adapter(checkpoint, adapter, empty(tmp_path))


def test_a_random_draft_head_loads_and_drafts_tokens_of_the_target(tmp_path: Path) -> None:
    target = TextConfig.from_dict(E2B)
    folder = empty(tmp_path)
    write_eagle3(target, folder, seed=5, layers=(1, 2, 4))
    config = Eagle3Config.from_file(folder / "config.json", target_layers=len(target.layers))
    head = Eagle3(config)
    load_draft(head, folder, torch.float32)
    assert config.aux_layers == (1, 2, 4)
    tokens = torch.arange(config.draft_vocab_size) + head.d2t
    assert torch.equal(tokens, head.t2d.nonzero()[:, 0])
    assert not torch.equal(tokens, torch.arange(len(tokens)))
