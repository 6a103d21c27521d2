"""A model over several processes: answers, what ranks hold, and what becomes of them when one goes wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch

from model_impl.checkpoint import load_text_model
from model_impl.errors import CacheError, ModelError
from model_impl.parallel.layout import Layout
from model_impl.parallel.model import ParallelError, ParallelModel
from model_impl.parallel.runner import ParallelRunner
from model_impl.random_weights import write_checkpoint
from model_impl.runtime.generate import generate
from model_impl.runtime.masks import NO_BLOCK
from model_impl.runtime.paged import CacheSizes
from model_impl.runtime.runner import Batch, LocalRunner, Piece
from model_impl.runtime.sampling import Sampling
from model_impl.text import SoftTokens, TextModel
from tests.model_configs import TINY, random_ids
from tests.processes import survivors

PROMPTS = [[2, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37], [2, 3, 4]]
LAYOUTS = {
    "e2b": (Layout((4, 3, 3)), Layout((7, 3), tensor=2)),
    "dense": (Layout(tensor=4),),
    "moe": (Layout(2, tensor=2, expert=True),),
}
CASES = [(name, layout) for name, layouts in LAYOUTS.items() for layout in layouts]

Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Writes the checkpoint of a configuration."""

    def write(name: str) -> Path:
        path = tmp_path_factory.mktemp(name)
        write_checkpoint(TINY[name], path, seed=7)
        return path

    return write


@pytest.fixture(scope="module", params=CASES, ids=str)
def pair(request: pytest.FixtureRequest, folder: Folder) -> Iterator[tuple[TextModel, ParallelModel]]:
    """The model in one process, and in several."""
    name, layout = request.param
    path = folder(name)
    with ParallelModel(path, layout) as model:
        yield load_text_model(path), model
    assert not any(Path(f"/proc/{pid}").exists() for pid in model.group.process_ids)


def test_the_same_is_generated_with_the_same_log_probabilities(pair: tuple[TextModel, ParallelModel]) -> None:
    one, several = pair
    options: dict[str, Any] = {"max_new_tokens": 12, "logprobs": True, "top_logprobs": 3, "prefill_chunk": 5}
    for expected, found in zip(
        generate(one, PROMPTS, **options), several.generate(PROMPTS, **options), strict=True
    ):
        assert found.ids == expected.ids
        assert found.finish_reason == expected.finish_reason
        assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
        assert found.top is not None
        assert expected.top is not None
        for own, other in zip(found.top, expected.top, strict=True):
            assert own == pytest.approx(other, abs=1e-5)


def test_sampled_tokens_follow_the_seed(pair: tuple[TextModel, ParallelModel]) -> None:
    one, several = pair
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "sampling": Sampling(temperature=1.0, top_p=0.9),
        "seed": 5,
    }
    found = several.generate(PROMPTS, **options)
    assert [row.ids for row in found] == [row.ids for row in generate(one, PROMPTS, **options)]


def test_states_for_a_draft_come_back_in_order(pair: tuple[TextModel, ParallelModel]) -> None:
    one, several = pair
    ids, wanted = random_ids(2, 9), (0, 2, len(one.config.layers))
    with torch.inference_mode():
        expected = one.states(ids, aux_layers=wanted)
    found = several.states(ids, aux_layers=wanted)
    assert len(found.aux) == len(wanted)
    for own, other in zip((found.hidden, *found.aux), (expected.hidden, *expected.aux), strict=True):
        assert torch.allclose(own, other, atol=1e-4)


def test_soft_tokens_are_given_to_the_first_stage(pair: tuple[TextModel, ParallelModel]) -> None:
    one, several = pair
    where = torch.zeros(2, len(PROMPTS[0]), dtype=torch.bool)
    where[0, 3:7] = True
    blocks = torch.where(where, 0, NO_BLOCK)
    soft = SoftTokens(where, torch.randn(4, 48, generator=torch.Generator().manual_seed(2)), blocks)
    options: dict[str, Any] = {"max_new_tokens": 4, "logprobs": True, "soft": soft}
    expected, found = generate(one, PROMPTS, **options), several.generate(PROMPTS, **options)
    assert [row.ids for row in found] == [row.ids for row in expected]
    assert found[0].logprobs == pytest.approx(expected[0].logprobs, abs=1e-5)
    plain = several.generate(PROMPTS, max_new_tokens=4, logprobs=True)
    assert plain[0].logprobs != pytest.approx(expected[0].logprobs, abs=1e-3)


def test_ranks_hold_their_own_layers_and_less_than_the_whole(pair: tuple[TextModel, ParallelModel]) -> None:
    one, several = pair
    layout = several.layout
    spans = layout.spans(len(one.config.layers))
    whole = one.state_dict()
    for rank, loaded in several.loaded.items():
        place = layout.place(rank)
        held = {int(name.split(".")[1]) for name in loaded.parameters if name.startswith("layers.")}
        assert held == set(spans[place.stage])
        bytes_of = [torch.Size(shape).numel() * 4 for shape in loaded.parameters.values()]
        assert loaded.nbytes == sum(bytes_of)
        assert all(loaded.parameters[n] == tuple(whole[n].shape) for n in loaded.parameters if "norm" in n)
    twice = whole["embed_tokens.weight"].nbytes if layout.stages > 1 else 0
    if layout.tensor == 1:
        assert sum(x.nbytes for x in several.loaded.values()) == sum(t.nbytes for t in whole.values()) + twice
    else:
        table = several.loaded[0].parameters["embed_tokens.weight"]
        assert table == (96 // layout.tensor, 48)
    assert several.attention_backend == one.attention_backend


def test_bad_requests_are_refused_and_ranks_go_on(pair: tuple[TextModel, ParallelModel]) -> None:
    _, several = pair
    ids = random_ids(1, 3)
    with pytest.raises(ModelError, match="distinct, ascending"):
        several.states(ids, aux_layers=(2, 1))
    with pytest.raises(CacheError, match="do not fit input_ids"):
        several.states(ids, lengths=[4])
    with pytest.raises(CacheError, match="2 rows"):
        several.states(ids, cache=several.new_cache(2))
    with pytest.raises(ModelError, match="do not fit a model of width 48"):
        several.logits(torch.zeros(1, 47))
    assert several.generate([[2]], max_new_tokens=1)[0].ids


def test_a_cache_of_another_model_is_refused(folder: Folder) -> None:
    path = folder("dense")
    with ParallelModel(path, Layout(2)) as one, ParallelModel(path, Layout(2)) as other:
        cache = one.new_cache(1)
        assert cache.number == other.new_cache(1).number  # type: ignore[attr-defined]
        with pytest.raises(CacheError, match="not of these processes"):
            other.states(random_ids(1, 3), cache=cache)
        assert one.states(random_ids(1, 3), cache=cache).hidden.shape == (1, 3, 48)


# ---------------------------------------------------------------------------- for an engine


def pieces(rows: list[list[int]], starts: list[int], tables: list[tuple[int, ...]]) -> Batch:
    return Batch(
        tuple(
            Piece(tuple(ids), start, {"sliding_attention": table, "full_attention": table})
            for ids, start, table in zip(rows, starts, tables, strict=True)
        )
    )


def test_a_runner_over_ranks_is_one_in_this_process(pair: tuple[TextModel, ParallelModel]) -> None:
    one, several = pair
    sizes = CacheSizes(
        {"sliding_attention": 4, "full_attention": 4}, {"sliding_attention": 16, "full_attention": 16}
    )
    aux = (0, 2, len(one.config.layers))
    local, spread = LocalRunner(one, sizes, aux), ParallelRunner(several, sizes, aux)
    tables = [(5, 3, 11, 0), (2, 9, 7, 4)]
    prompts = random_ids(2, 13).tolist()
    chunks = [
        ([row[:6] for row in prompts], [0, 0]),
        ([prompts[0][6:9], prompts[1][6:]], [6, 6]),
        ([[1], [2]], [9, 13]),
    ]
    for rows, starts in chunks:
        batch = pieces(rows, starts, tables)
        expected, found = local.run(batch), spread.run(batch)
        for row, ids in enumerate(rows):
            for own, other in zip((found.hidden, *found.aux), (expected.hidden, *expected.aux), strict=True):
                assert torch.allclose(own[row, : len(ids)], other[row, : len(ids)], atol=1e-4)
        places = [piece.place for piece in batch.pieces]
        kept, wanted = spread.kept(places), local.kept(places)
        assert kept.keys() == wanted.keys()
        for kind, other_kept in wanted.items():
            assert torch.equal(kept[kind].positions, other_kept.positions)
            seen = other_kept.positions[:, None, :, None] >= 0
            for own, other in ((kept[kind].k, other_kept.k), (kept[kind].v, other_kept.v)):
                assert torch.allclose(own * seen, other * seen, atol=1e-4)
    assert torch.allclose(spread.logits(found.hidden), local.logits(found.hidden), atol=1e-4)
    assert torch.equal(spread.embed(torch.tensor([3, 95, 0])), local.embed(torch.tensor([3, 95, 0])))
    with pytest.raises(CacheError, match="do not fit a table"):
        spread.run(pieces([[1]], [16], tables[:1]))
    spread.close()
    spread.close()
    assert several.generate([[2]], max_new_tokens=1)[0].ids, "the ranks go on"


# ---------------------------------------------------------------------------- when a rank goes wrong


KILLED = {
    "tensor": ("dense", Layout(tensor=2), r"stage 0, layers 0 to 5, shard 1 of 2"),
    "expert": ("moe", Layout(tensor=2, expert=True), r"stage 0, layers 0 to \d, shard 1 of 2"),
    "pipeline and tensor": ("dense", Layout(2, tensor=2), r"stage 0, layers 0 to 2, shard 1 of 2"),
}
"""Model, layout, and where rank 1 is in it."""


@pytest.mark.parametrize("divided", ["tensor", "expert", "pipeline and tensor"])
def test_a_rank_that_is_killed_amid_others_is_named_and_nothing_is_left(
    divided: str, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards wait for each other within each layer, so that all of them lose touch at once."""
    name, layout, place = KILLED[divided]
    monkeypatch.setenv("TEST_MARK", mark := f"killed-{os.getpid()}-{divided}")
    model = ParallelModel(folder(name), layout)
    monkeypatch.delenv("TEST_MARK")
    victim = model.group.process_ids[1]
    killed = threading.Event()

    def kill() -> None:
        os.kill(victim, signal.SIGKILL)
        killed.set()

    threading.Timer(0.5, kill).start()

    def ask_on() -> None:
        while True:
            model.generate([[2, 3]], max_new_tokens=500)

    with pytest.raises(ParallelError, match=rf"rank 1 \({place}\): was ended by SIGKILL"):
        ask_on()
    assert killed.is_set()
    assert not survivors(mark)
    with pytest.raises(ParallelError, match=r"these processes have ended: .*rank 1"):
        model.logits(torch.zeros(1, 48))
    model.close()


@pytest.mark.parametrize("when", ["idle", "in a request"])
def test_a_killed_rank_is_named_and_nothing_is_left(
    when: str, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = f"killed-{os.getpid()}-{when}"
    monkeypatch.setenv("TEST_MARK", mark)
    model = ParallelModel(folder("dense"), Layout((2, 4)))
    monkeypatch.delenv("TEST_MARK")
    victim = model.group.process_ids[1]
    if when == "idle":
        os.kill(victim, signal.SIGKILL)
        # The others end too, though nobody asks for anything.
        assert not survivors(mark)
    else:
        threading.Timer(0.5, os.kill, (victim, signal.SIGKILL)).start()
    started = time.monotonic()
    with pytest.raises(ParallelError, match=r"rank 1 \(stage 1, layers 2 to 5, .*was ended by SIGKILL"):
        model.generate([[2, 3]], max_new_tokens=500)
    assert time.monotonic() - started < 15
    assert not survivors(mark)
    with pytest.raises(ParallelError, match=r"these processes have ended: .*rank 1"):
        model.logits(torch.zeros(1, 48))
    model.close()


def test_a_hanging_rank_is_named_and_not_those_that_wait_for_it(folder: Folder) -> None:
    model = ParallelModel(folder("dense"), Layout(3), deadline=30.0)
    model.group._deadline = 3.0
    os.kill(model.group.process_ids[1], signal.SIGSTOP)
    with pytest.raises(ParallelError, match="no answer within 3 seconds: rank 1 ") as caught:
        model.generate([[2, 3]], max_new_tokens=4)
    assert "rank 2" not in str(caught.value)
    assert not any(Path(f"/proc/{pid}").exists() for pid in model.group.process_ids)


@pytest.mark.parametrize("way", ["sent", "answered"])
def test_a_message_that_a_hanging_rank_does_not_take_or_finish_has_a_deadline(
    way: str, folder: Folder
) -> None:
    model = ParallelModel(folder("dense"), Layout(2), deadline=30.0)
    group, victim = model.group, model.group.process_ids[1]
    group._deadline = 3.0
    if way == "sent":
        os.kill(victim, signal.SIGSTOP)
    else:
        # What the rank writes fills the socket, where nobody reads on until it stands still.
        real = group._processes.within

        def late(rank: int, until: float) -> Any:
            connection = real(rank, until)
            if connection.poll():
                os.kill(victim, signal.SIGSTOP)
            return connection

        group._processes.within = late  # type: ignore[method-assign]
    # Larger than any socket's buffer.
    with pytest.raises(ParallelError, match="no answer within 3 seconds: rank 1 "):
        model.logits(torch.zeros(20_000, 48))
    assert not any(Path(f"/proc/{pid}").exists() for pid in group.process_ids)


def test_a_rank_that_raises_is_named_with_what_it_said(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A file that is cut off behind its header fits by names and shapes, and fails in the ranks that read it.
    path = folder("dense") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    monkeypatch.setattr("model_impl.parallel.group.check_folder", lambda weights: None)
    monkeypatch.setenv("TEST_MARK", mark := f"raises-{os.getpid()}")
    with pytest.raises(ParallelError, match=r"rank \d \(stage \d, .*CheckpointError: .*incomplete metadata"):
        ParallelModel(path.parent, Layout(2))
    monkeypatch.delenv("TEST_MARK")
    assert not survivors(mark)


def test_ranks_end_with_the_process_that_started_them(folder: Folder) -> None:
    mark = f"orphans-{os.getpid()}"
    program = (
        "import sys, time; from pathlib import Path; from model_impl.parallel.model import *\n"
        "model = ParallelModel(Path(sys.argv[1]), Layout(2)); print(*model.group.process_ids, flush=True)\n"
        "time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(folder("dense"))],
        env=os.environ | {"TEST_MARK": mark, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
    ) as driver:
        assert driver.stdout is not None
        told = wait([driver.stdout], timeout=30)
        ids = driver.stdout.readline().split() if told else []
        driver.kill()
    assert len(ids) == 2, "ranks did not start"
    assert not survivors(mark)
