"""Tensors between processes: over `torch.distributed`, with gloo, on this machine.

Both sides know from the layout what crosses, so nothing but the numbers is sent.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist

from model_impl.errors import ModelError
from model_impl.parallel.layout import Layout
from model_impl.parallel.payload import Payload, Slot

_IDLE, _WORKING, _WAITING = 0, 1, 2


class PeerError(ModelError):
    """Another rank is gone, or did not answer in time: what happened there is told by that rank."""


class Board:
    """What each rank is doing, for the process that has to say which of them hangs.

    Args:
        file: Shared by all; one byte a rank.
        ranks: How many.
    """

    def __init__(self, file: Path, ranks: int) -> None:
        if not file.exists():
            file.write_bytes(bytes(ranks))
        with file.open("r+b") as opened:
            self._bytes = mmap.mmap(opened.fileno(), ranks)

    @contextmanager
    def working(self, rank: int) -> Iterator[None]:
        """A rank works on a request."""
        self._bytes[rank] = _WORKING
        yield
        self._bytes[rank] = _IDLE

    @contextmanager
    def waiting(self, rank: int, peers: Sequence[int]) -> Iterator[None]:
        """A rank waits for others.

        Raises:
            PeerError: they are gone, or did not come in time.
        """
        self._bytes[rank] = _WAITING
        try:
            yield
        except RuntimeError as error:
            named = " and ".join(str(peer) for peer in peers if peer != rank)
            raise PeerError(f"rank {rank} lost touch with rank {named}: {error}") from error
        self._bytes[rank] = _WORKING

    def waits(self, rank: int) -> bool:
        """Whether a rank waits for others."""
        return self._bytes[rank] == _WAITING


def outgoing(payload: Payload) -> dict[str, Tensor]:
    """What is sent of a payload, by name: each tensor in one piece; one without elements is not."""
    return {name: tensor.contiguous() for name, tensor in payload.named().items() if tensor.numel()}


class Wire:
    """One rank's connections: to the ranks of its stage, and to the stages before and behind.

    Args:
        layout: Of all ranks.
        rank: This one.
        board: Where it says what it waits for.
        meeting: A file that does not exist yet, where all ranks find each other.
        deadline: Seconds to wait for another rank.

    Raises:
        PeerError: the others did not come.
    """

    def __init__(self, layout: Layout, rank: int, board: Board, meeting: Path, deadline: float) -> None:
        self.size = layout.tensor
        self._layout, self._rank, self._board = layout, rank, board
        stages = [[layout.tensor * stage + t for t in range(layout.tensor)] for stage in range(layout.stages)]
        self._beside = stages[layout.place(rank).stage]
        if layout.ranks == 1:
            return
        limit = timedelta(seconds=deadline)
        with board.waiting(rank, range(layout.ranks)):
            dist.init_process_group(
                "gloo",
                init_method=meeting.as_uri(),
                world_size=layout.ranks,
                rank=rank,
                timeout=limit,
            )
            groups = [dist.new_group(ranks, timeout=limit) for ranks in stages] if self.size > 1 else []
        if groups:
            self._group = groups[layout.place(rank).stage]

    def sum(self, x: Tensor) -> Tensor:
        """See `Ranks`."""
        if self.size == 1:
            return x
        x = x.contiguous()
        with self._board.waiting(self._rank, self._beside):
            dist.all_reduce(x, group=self._group)
        return x

    def gather(self, x: Tensor, total: int) -> Tensor:
        """See `Ranks`."""
        if self.size == 1:
            return x
        widest = -(-total // self.size)
        padded = torch.nn.functional.pad(x, (0, widest - x.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        with self._board.waiting(self._rank, self._beside):
            dist.all_gather(parts, padded, group=self._group)
        return torch.cat(parts, dim=-1)[..., :total]

    def send(self, payload: Payload, spec: Mapping[str, Slot]) -> None:
        """Send to the next stage what it expects.

        Raises:
            ModelError: the payload is something else.
            PeerError: the other rank is gone.
        """
        payload.check(spec)
        to = self._neighbour(1)
        for tensor in outgoing(payload).values():
            with self._board.waiting(self._rank, [to]):
                dist.send(tensor, to)

    def receive(self, spec: Mapping[str, Slot]) -> Payload:
        """Receive what the stage before sends.

        Raises:
            PeerError: the other rank is gone, or did not send in time.
        """
        source = self._neighbour(-1)
        tensors = {name: torch.empty(slot.shape, dtype=slot.dtype) for name, slot in spec.items()}
        for tensor in tensors.values():
            if tensor.numel():
                with self._board.waiting(self._rank, [source]):
                    dist.recv(tensor, source)
        return Payload.of(tensors)

    def _neighbour(self, stages: int) -> int:
        return self._layout.rank(self._layout.place(self._rank).beside(stages))
