"""One rank: what runs in a process of its own."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor, nn

from model_impl.lora import Adapters
from model_impl.parallel.adapters import parts_of, shapes
from model_impl.parallel.loading import load_stage
from model_impl.parallel.messages import (
    Acted,
    AddAdapter,
    Close,
    Done,
    Embed,
    Failed,
    Forget,
    Forward,
    Head,
    Kept,
    Loaded,
    MakePools,
    RemoveAdapter,
    Reply,
    Request,
    Start,
    packed,
    unpacked,
    unpacked_soft,
)
from model_impl.parallel.payload import Payload
from model_impl.parallel.stage import Pass
from model_impl.parallel.wire import Board, PeerError, Wire
from model_impl.runtime.cache import KVCache
from model_impl.runtime.paged import PagedCache
from model_impl.runtime.step import Cache
from model_impl.text import States


class Rank:
    """A stage, or a shard of one, and the caches of its layers.

    Raises:
        ModelError: it cannot be loaded, or the other ranks did not come.
    """

    def __init__(self, start: Start) -> None:
        folder = Path(start.folder)
        self.number = start.rank
        self.board = Board(folder / "board", start.layout.ranks)
        self._wire = Wire(start.layout, start.rank, self.board, folder / "meeting", start.deadline)
        self._stage = load_stage(start.weights, start.layout, start.layout.place(start.rank), self._wire)
        self._caches: dict[int, KVCache | PagedCache] = {}
        self._adapters = Adapters(self._stage)
        self._adapter_names: set[str] = set()

    def loaded(self) -> Loaded:
        """Run once on an empty payload; say what is held."""
        stage = self._stage
        stage.run(Pass(torch.zeros(1, 1, dtype=torch.int64)), None if stage.begins else stage.empty(1, 1))
        held = stage.state_dict()
        return Loaded(
            {name: tuple(tensor.shape) for name, tensor in held.items()},
            sum(tensor.nbytes for tensor in held.values()),
            stage.attention_backend,
            str(stage.dtype).removeprefix("torch."),
            torch.get_num_threads(),
        )

    def answer(self, request: Request) -> bytes | None:
        """What a request asks for; None where there is nothing to send."""
        if isinstance(request, Forward):
            return self._forward(request)
        if isinstance(request, Head):
            with self._rows(request.adapters):
                return self._first({"logits": self._stage.logits(unpacked(request.hidden)["hidden"])})
        if isinstance(request, AddAdapter | RemoveAdapter | Acted):
            return json.dumps(self._adapter(request)).encode()
        if isinstance(request, Forget):
            for number in request.caches:
                self._caches.pop(number, None)
        if isinstance(request, MakePools):
            self._caches[request.cache] = pools = self._stage.new_pools(request.sizes)
            return (pools.stored or "").encode()
        if isinstance(request, Embed):
            table: nn.Module = self._stage.embed_tokens
            return self._first({"embedded": table(unpacked(request.ids)["ids"])})
        if isinstance(request, Kept):
            return self._kept(request)
        return None

    def _adapter(self, request: AddAdapter | RemoveAdapter | Acted) -> object:
        """Take or drop parts of an adapter; what the rank says of it."""
        if isinstance(request, Acted):
            return self._adapters.acted(request.name)
        if isinstance(request, RemoveAdapter):
            self._adapters.remove(request.name)
            self._adapter_names.discard(request.name)
            return None
        parts = parts_of(request.where, request.parts)
        self._adapters.add(request.name, parts)
        self._adapter_names.add(request.name)
        return shapes(parts)

    def _rows(self, wanted: Sequence[str | None]) -> AbstractContextManager[None]:
        """Lets rows use what this rank holds of their adapters, which may be nothing."""
        if not wanted:
            return nullcontext()
        return self._adapters.rows([name if name in self._adapter_names else None for name in wanted])

    def _kept(self, request: Kept) -> bytes | None:
        """Keys, values and positions of the layers that are in this stage."""
        pools = self._caches[request.cache]
        tensors: dict[str, Tensor] = {}
        assert isinstance(pools, PagedCache)
        for index in request.layers:
            if index in self._stage.span:
                k, v, positions = pools.kept(self._stage.config.layers[index], request.places)
                tensors |= {f"keys.{index}": k, f"values.{index}": v, f"positions.{index}": positions}
        return packed(tensors) if tensors else None

    def _cache(self, request: Forward) -> Cache | None:
        if request.cache is None:
            return None
        if request.cache not in self._caches:
            self._caches[request.cache] = self._stage.new_cache(len(request.ids))
        cache = self._caches[request.cache]
        if isinstance(cache, KVCache):
            return cache
        assert request.places is not None
        return cache.view(request.places)

    def _forward(self, request: Forward) -> bytes | None:
        stage = self._stage
        soft = None if request.soft is None else unpacked_soft(request.soft)
        work = Pass(torch.tensor(request.ids, dtype=torch.int64), request.lengths, soft, request.aux_layers)
        cache = self._cache(request)
        rows, tokens = work.ids.shape
        payload = None
        if not stage.begins:
            payload = self._wire.receive(stage.spec(rows, tokens, work.aux_layers))
        with self._rows(request.adapters):
            result = stage.run(work, payload, cache)
        if isinstance(result, Payload):
            self._wire.send(result, stage.spec(rows, tokens, work.aux_layers, stages=1))
            return None
        return self._first(_named(result))

    def _first(self, tensors: dict[str, Tensor]) -> bytes | None:
        """The tensors as bytes, from one of the ranks that have them."""
        return packed(tensors) if self._stage.place.shard == 0 else None


def _named(states: States) -> dict[str, Tensor]:
    return {"hidden": states.hidden} | {f"aux.{i}": state for i, state in enumerate(states.aux)}


def serve(connection: Connection[Reply, Start | Request]) -> None:
    """Answer requests until the last one, until one fails, or until the other end is closed."""
    try:
        start = connection.recv()
        assert isinstance(start, Start)
        torch.set_num_threads(start.threads)
        if (prepare := start.preparation) is not None:
            getattr(importlib.import_module(prepare.module), prepare.function)(prepare.argument)
        with torch.inference_mode():
            rank = Rank(start)
            with rank.board.working(rank.number):
                loaded = rank.loaded()
            connection.send(Done(loaded))
            while not isinstance(request := connection.recv(), Close | Start):
                with rank.board.working(rank.number):
                    answer = rank.answer(request)
                connection.send(Done(answer))
    except EOFError:
        return
    except Exception as error:  # noqa: BLE001 - whatever it is, the driver has to know
        connection.send(Failed(f"{type(error).__name__}: {error}", isinstance(error, PeerError)))
