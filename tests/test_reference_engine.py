"""The bundled engine as a target: what it says of itself is read back from what runs."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest
import torch

from conformance.targets.generation import EngineOptions, Speculation
from conformance.targets.protocol import GenerateRequest
from conformance.targets.reference_engine import PagedEngine
from conformance.targets.reference_generate import _Measured, running
from conformance.targets.reference_reader import Reader
from model_impl.errors import ConfigError
from model_impl.random_weights import write_checkpoint
from model_impl.runtime import generate as runtime
from model_impl.runtime.masks import NO_BLOCK
from model_impl.speculative.proposer import AssistantProposer, Eagle3Proposer
from model_impl.text import SoftTokens
from tests.draft_models import (
    assistant_on_meta,
    eagle3_on_meta,
    random_weights,
    tiny_assistant,
    tiny_eagle3,
    write,
)
from tests.model_configs import TINY
from tests.processes import survivors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small target with two draft models beside it."""
    path = tmp_path_factory.mktemp("checkpoints")
    target = path / "target"
    target.mkdir()
    write_checkpoint(TINY["dense"], target, seed=7)
    head = tiny_eagle3(target_hidden_size=48, eagle_aux_hidden_state_layer_ids=[1, 2, 4], draft_vocab_size=60)
    write(head, random_weights(eagle3_on_meta(head)), path / "eagle3")
    assistant = tiny_assistant(ordered=False)
    write(assistant, random_weights(assistant_on_meta(assistant)), path / "assistant")
    return path


def asked(folder: Path, **options: object) -> GenerateRequest:
    return GenerateRequest(
        checkpoint=str(folder / "target"),
        prompts=((2, 5, 7, 11, 13, 17, 19, 23, 29), (2, 3)),
        max_new_tokens=4,
        options=EngineOptions(**options),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("method", "kind"), [("eagle3", Eagle3Proposer), ("assistant", AssistantProposer)])
def test_a_draft_model_runs_with_the_attention_that_is_asked_for_and_is_told(
    method: str, kind: type, attention: str, folder: Path
) -> None:
    speculation = Speculation(method=method, checkpoint=str(folder / method))  # type: ignore[arg-type]
    request = asked(folder, speculation=speculation, attention=attention)
    with running(request, Reader(Path(request.checkpoint), "float32", attention)) as engine:
        assert isinstance(engine, PagedEngine)
        assert engine.answers(request)[0].drafted
        proposer = engine._engine.proposer
        assert isinstance(proposer, kind)
        draft = proposer.head if isinstance(proposer, Eagle3Proposer) else proposer.assistant
        backends = {part.backend for part in draft.modules() if hasattr(part, "backend")}
        assert backends - {None} == {attention}
        assert engine.effective()["speculation"] == method
        engine._engine.proposer = None
        assert engine.effective()["speculation"] == "none"


def test_a_chunk_that_passes_did_not_keep_to_is_not_told(folder: Path) -> None:
    request = asked(folder, prefill_chunk=4)
    reader = Reader(Path(request.checkpoint), "float32", None)

    def said() -> str:
        with running(request, reader) as engine:
            engine.answers(request)
            return engine.effective()["prefill_chunk"]

    assert said() == "4"
    real = runtime.stream
    with mock.patch.object(runtime, "stream", lambda *a, **k: real(*a, **(k | {"prefill_chunk": None}))):
        assert said() == "9"


@pytest.mark.parametrize(("chunk", "most"), [(3, 3), (2, 7), (5, 7)])
def test_an_image_may_end_behind_a_chunk(chunk: int, most: int) -> None:
    where = torch.tensor([[False, False, True, True, True, False, False]])
    soft = SoftTokens(where, torch.zeros(3, 8), torch.where(where, 0, NO_BLOCK))
    model = mock.Mock()
    made = _Measured(model, chunk)
    made(torch.zeros(1, 7), soft=soft)
    assert made.most == most
    assert model.call_count == 1


@pytest.mark.parametrize("cache", ["paged", "contiguous"])
def test_a_layout_s_dtype_and_threads_are_its_ranks_own(cache: str, folder: Path) -> None:
    request = asked(folder, pipeline_parallel=2, dtype="bfloat16", cache=cache)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        # The driver's own model does not run.
        with running(request, Reader(Path(request.checkpoint), "float32", None)) as engine:
            said = engine.effective()
    finally:
        torch.set_num_threads(threads)
    assert (said["dtype"], said["threads"], said["pipeline_parallel"]) == ("bfloat16", "1", "2")


def test_an_engine_that_cannot_be_made_leaves_no_rank(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_MARK", mark := f"unmade-{os.getpid()}")
    request = asked(
        folder, pipeline_parallel=2, speculation=Speculation(method="eagle3", checkpoint=str(folder))
    )
    reader = Reader(Path(request.checkpoint), "float32", None)
    with pytest.raises(ConfigError) as caught:
        running(request, reader)
    assert not survivors(mark), caught
