"""Stages of the bundled model, one after the other in this process. Importing it loads torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from safetensors.torch import save_file
from torch import Tensor

from conformance.targets.reference_forward import DTYPES
from conformance.targets.stages import Boundary, Crossed, StagesRequest, StagesResult
from conformance.worker.adapters.recording import spans
from model_impl.parallel import wire
from model_impl.parallel.layout import Layout, Place
from model_impl.parallel.loading import Weights, load_stage
from model_impl.parallel.payload import Payload
from model_impl.parallel.stage import Pass, Stage
from model_impl.text import States

_NAMES = {"hidden": "hidden_states"}
"""Where ours are not the protocol's."""


def stages(request: StagesRequest) -> StagesResult:
    """Answer a `StagesRequest`: the code of the ranks, with hands in the place of the wire.

    Raises:
        ModelError: the model refuses the request.
    """
    layout = Layout(request.pipeline)
    weights = Weights(request.checkpoint, DTYPES[request.dtype])
    ranks = [load_stage(weights, layout, Place(stage, 0)) for stage in range(layout.stages)]
    crossed, states = _run(ranks, request)
    given = [_states_of(one) for one in states]
    made = {
        f"stream.{stage}": torch.cat([payloads[stage - 1].hidden for payloads in crossed], dim=1)
        for stage in range(1, layout.stages)
    }
    made["hidden"] = torch.cat([one.hidden for one in states], dim=1)
    for number in range(len(given[0])):
        made[f"aux.{number}"] = torch.cat([own[number] for own in given], dim=1)
    # Two names may stand for one tensor, which a file does not hold.
    save_file({name: tensor.clone().contiguous() for name, tensor in made.items()}, request.output)
    rows = len(request.input_ids)
    boundaries = [
        Boundary(
            first_pass=_crossed(payload),
            empty=_crossed(stage.empty(rows, 0, request.aux_layers)),
        )
        for payload, stage in zip(crossed[0], ranks[1:], strict=True)
    ]
    return StagesResult(
        path=request.output,
        held=tuple(tuple(map(int, stage.layers)) for stage in ranks),
        boundaries=tuple(boundaries),
        aux=len(given[0]),
        form=type(states[0].aux).__name__,
        effective={
            "pipeline": "+".join(str(len(stage.layers)) for stage in ranks),
            "dtype": str(ranks[0].dtype).removeprefix("torch."),
        },
    )


def _run(ranks: list[Stage], request: StagesRequest) -> tuple[list[list[Payload]], list[States]]:
    """What crosses at each boundary, and what the last stage gives, of each pass."""
    ids = torch.tensor(request.input_ids)
    calls = list(spans(ids.shape[1], request.prefill))
    caches = [stage.new_cache(len(ids)) if len(calls) > 1 else None for stage in ranks]
    crossed: list[list[Payload]] = []
    states: list[States] = []
    with torch.inference_mode():
        for start, stop in calls:
            work = Pass(ids[:, start:stop], aux_layers=request.aux_layers)
            payload: Payload | None = None
            payloads: list[Payload] = []
            for stage, cache in zip(ranks, caches, strict=True):
                result = stage.run(work, payload, cache)
                if isinstance(result, Payload):
                    # As on the wire: what arrives has the names of a payload, and nothing else has a place.
                    # It is a copy, so that no later stage writes into what an earlier one has given.
                    payload = Payload.of({name: sent.clone() for name, sent in result.named().items()})
                    payloads.append(result)
                else:
                    states.append(result)
            crossed.append(payloads)
    return crossed, states


def _states_of(states: States) -> tuple[Tensor, ...]:
    """The states that were given, in whatever form."""
    given: object = states.aux
    return (given,) if isinstance(given, Tensor) else tuple(_tensors(given))


def _tensors(given: object) -> Iterator[Tensor]:
    assert isinstance(given, tuple | list)
    yield from given


def _crossed(payload: Payload) -> dict[str, Crossed]:
    """The form of what a stage hands over, with the bytes that the wire would send of it."""
    sent = {name: tensor.nbytes for name, tensor in wire.outgoing(payload).items()}
    return {
        _NAMES.get(name, name): Crossed(
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            nbytes=sent.get(name, 0),
        )
        for name, tensor in payload.named().items()
    }
