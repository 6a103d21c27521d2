"""Forward passes through targets: the request's way to a worker, recorded modules, the two real models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conformance.errors import EngineError, WorkerDiedError
from conformance.targets import reference_model, registry
from conformance.targets.process import WorkerTarget
from conformance.targets.protocol import ForwardRequest, Target
from conformance.targets.reference import ReferenceTarget
from conformance.worker.adapters.recording import Recorder, expert_weights, spans

ORACLE = "transformers@5.19.0"
CONFIG: dict[str, Any] = {
    "model_type": "gemma4_text",
    "vocab_size": 40,
    "vocab_size_per_layer_input": 40,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 4,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 6,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 8,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
}
CAPTURE = ("embed_tokens", "layers.0.self_attn", "layers.0.router", "layers.3", "norm", "logits")
ROWS = ((1, 2, 3, 4, 5, 6, 7, 8, 9), (10, 11, 12), (13,))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    reference_model.write_checkpoint(CONFIG, folder, seed=3)
    return folder


def request(folder: Path, **changes: Any) -> ForwardRequest:
    values = {
        "checkpoint": str(folder),
        "input_ids": ROWS,
        "capture": CAPTURE,
        "output": str(folder.parent / "out.safetensors"),
    }
    return ForwardRequest.model_validate(values | changes)


def forward(target: Target, asked: ForwardRequest) -> dict[str, Tensor]:
    result = target.forward(asked)
    assert result.order == CAPTURE
    return load_file(result.path)


# ------------------------------------------------------------------------------------------ the pipe


@pytest.fixture
def liar() -> Iterator[WorkerTarget]:
    import sys

    target = WorkerTarget(
        "liar@1",
        python=Path(sys.executable),
        adapter="adapters.lying_adapter",
        timeout=20.0,
        import_paths=[Path(__file__).parent],
    )
    yield target
    target.close()


def test_a_worker_gets_the_whole_request(liar: WorkerTarget, tmp_path: Path) -> None:
    asked = request(tmp_path, capture=("layers.0",), prefill=2, attention="flex", dtype="bfloat16")
    result = liar.forward(asked)
    assert json.loads(Path(result.path).read_text()) == json.loads(asked.model_dump_json())
    assert (result.order, result.effective) == (("layers.0",), {"dtype": "bfloat16"})


def test_a_worker_that_writes_elsewhere_breaks_the_protocol(liar: WorkerTarget, tmp_path: Path) -> None:
    with pytest.raises(WorkerDiedError, match="/nowhere"):
        liar.forward(request(tmp_path, capture=("elsewhere",)))


@pytest.mark.parametrize("changes", [{"input_ids": ()}, {"input_ids": ((1,), ())}, {"prefill": 0}])
def test_requests_that_make_no_sense(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        request(tmp_path, **changes)


# ---------------------------------------------------------------------------------------- recording


@pytest.mark.parametrize(
    ("length", "prefill", "calls"),
    [
        (4, None, [(0, 4)]),
        (4, 4, [(0, 4)]),
        (4, 9, [(0, 4)]),
        (4, 2, [(0, 2), (2, 3), (3, 4)]),
        (1, 1, [(0, 1)]),
    ],
)
def test_spans(length: int, prefill: int | None, calls: list[tuple[int, int]]) -> None:
    assert list(spans(length, prefill)) == calls


class Doubling(nn.Module):
    """Its inner module sees all tokens in one dimension, as experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Identity()
        self.pair = Pair()

    def forward(self, x: Tensor) -> Tensor:
        flat: Tensor = self.flat(x.flatten(0, 1))
        self.pair(x)
        return flat.view_as(x) * 2


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x + 1, "ignored"


def tokens(*values: list[float]) -> Tensor:
    """[rows, tokens, 2], the second channel negated."""
    x = torch.tensor(values)
    return torch.stack([x, -x], dim=-1)


def test_recorded_rows_have_no_padding_and_their_steps_in_time(tmp_path: Path) -> None:
    model = Doubling()
    with Recorder(model, ["flat", "pair", "logits"], rows=2) as recorder:
        recorder.call([0, 1], [3, 1])
        recorder.ended("logits", model(tokens([1.0, 2.0, 3.0], [7.0, 99.0, 99.0])))
        recorder.call([0, 1], [1, 0])
        recorder.ended("logits", model(tokens([4.0], [99.0])))
    model(tokens([5.0]))  # the hooks are gone
    recorder.save(tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert recorder.order == ["flat", "pair", "logits"]
    assert found["flat"].tolist() == [[1, -1], [2, -2], [3, -3], [4, -4], [7, -7]]
    assert found["pair"].tolist() == [[2, 0], [3, -1], [4, -2], [5, -3], [8, -6]]
    assert found["logits"][:, 0].tolist() == [2, 4, 6, 8, 14]


def test_unknown_modules_are_named() -> None:
    with pytest.raises(ValueError, match="Doubling has no module nose, mouth"):
        Recorder(Doubling(), ["flat", "nose", "mouth"], rows=1)


def test_expert_weights_do_not_depend_on_the_order_of_the_chosen() -> None:
    one = expert_weights(torch.zeros(1, 3), torch.tensor([[0.7, 0.3]]), torch.tensor([[2, 0]]))
    other = expert_weights(torch.zeros(1, 3), torch.tensor([[0.3, 0.7]]), torch.tensor([[0, 2]]))
    assert one.tolist() == other.tolist() == [pytest.approx([0.3, 0.0, 0.7])]


# --------------------------------------------------------------------------------------- real models


def test_the_reference_answers(checkpoint: Path) -> None:
    result = ReferenceTarget().forward(request(checkpoint, attention="eager"))
    assert result.effective == {"attention": "eager", "dtype": "float32"}
    found = load_file(result.path)
    assert {name: tuple(t.shape) for name, t in found.items()} == {
        "embed_tokens": (13, 24),
        "layers.0.self_attn": (13, 24),
        "layers.0.router": (13, 4),
        "layers.3": (13, 24),
        "norm": (13, 24),
        "logits": (13, 40),
    }
    assert ((found["layers.0.router"] != 0).sum(dim=1) == 2).all()


@pytest.mark.parametrize("prefill", [1, 3, 8])
def test_the_reference_agrees_with_itself_in_steps(checkpoint: Path, prefill: int) -> None:
    target = ReferenceTarget()
    whole = forward(target, request(checkpoint))
    steps = forward(target, request(checkpoint, prefill=prefill))
    for name, tensor in whole.items():
        torch.testing.assert_close(steps[name], tensor, rtol=1e-4, atol=1e-4)


def test_the_reference_says_what_it_refuses(checkpoint: Path) -> None:
    with pytest.raises(EngineError, match=r"no module layers\.9"):
        ReferenceTarget().forward(request(checkpoint, capture=("layers.9",)))
    with pytest.raises(EngineError, match="ConfigError"):
        reference_model.write_checkpoint({"vocab_size": 3}, checkpoint, seed=0)


@pytest.fixture(scope="module")
def oracle() -> Iterator[Target]:
    if reason := registry.unavailable(ORACLE):
        pytest.skip(f"{ORACLE}: {reason}")
    target = registry.open_target(ORACLE)
    yield target
    target.close()


@pytest.mark.parametrize("prefill", [None, 2])
@pytest.mark.parametrize("attention", [None, "eager"])
def test_transformers_answers_as_the_reference(
    checkpoint: Path, oracle: Target, prefill: int | None, attention: str | None
) -> None:
    asked = request(checkpoint, prefill=prefill, attention=attention)
    result = oracle.forward(asked)
    assert result.effective == {"attention": attention or "sdpa", "dtype": "float32", "experts": "eager"}
    theirs = load_file(result.path)
    for name, tensor in forward(ReferenceTarget(), asked).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-4)


def test_transformers_reads_the_text_part_of_a_whole_configuration(checkpoint: Path, oracle: Target) -> None:
    plain = load_file(oracle.forward(request(checkpoint)).path)
    whole = {"model_type": "gemma4", "text_config": CONFIG, "vision_config": None, "audio_config": None}
    (checkpoint / "config.json").write_text(json.dumps(whole))
    again = load_file(oracle.forward(request(checkpoint)).path)
    assert all(torch.equal(again[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("layers.1.layer_scalar", None, "missing_keys: model.layers.1.layer_scalar"),
        ("layers.1.extra", torch.ones(1), "unexpected_keys: model.layers.1.extra"),
        ("norm.weight", torch.ones(23), "mismatch"),
    ],
)
def test_transformers_is_strict_about_tensors(
    checkpoint: Path, oracle: Target, name: str, tensor: Tensor | None, message: str
) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    dead = "model.language_model.layers.3.self_attn.k_proj.weight"
    assert dead in tensors, "what shared layers ship and do not use is no error"
    tensors.pop(f"model.language_model.{name}", None)
    if tensor is not None:
        tensors[f"model.language_model.{name}"] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(EngineError, match=message):
        oracle.forward(request(checkpoint))
