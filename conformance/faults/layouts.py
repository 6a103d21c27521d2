"""Faults of pipelines (catalogue class 6): what crosses between stages, and what is made of it there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from conformance.faults.base import Collection, Patch, replace
from model_impl.parallel import payload as payloads
from model_impl.parallel import stage as stages
from model_impl.parallel import wire
from model_impl.parallel.payload import Payload, Slot
from model_impl.parallel.stage import Stage
from model_impl.text import DecoderLayer

faults = Collection("contract")
stage = partial(faults, area="stages")

_PULL = "vllm-project/vllm#40786"
_UNCHECKED = replace(Payload, "check", lambda _self, _spec: None)
"""The bundled stages refuse what they do not expect; engines take what comes."""


@stage("residual-in-payload", source=("P01", _PULL), module=payloads)
def _residual_in_payload() -> tuple[Patch, ...]:
    """A residual crosses beside the hidden states, which hold it already."""
    original = Payload.named

    def named(self: Payload) -> dict[str, Tensor]:
        tensors = original(self)
        return {"hidden": tensors.pop("hidden"), "residual": torch.zeros_like(self.hidden), **tensors}

    return replace(Payload, "named", named), _UNCHECKED


@stage("residual-added-again", source=("P01", _PULL), module=stages)
def _residual_added_again() -> tuple[Patch, ...]:
    """The stage behind a boundary adds a residual to hidden states that hold it already."""
    original = Stage._start

    def start(
        self: Stage, work: stages.Pass, payload: Payload | None, step: stages.Recording
    ) -> tuple[Tensor, Tensor | None, dict[int, Tensor]]:
        x, per_layer, aux = original(self, work, payload, step)
        return x if self.begins else x + x, per_layer, aux

    return (replace(Stage, "_start", start),)


@stage("per-layer-inputs-not-sent", source=("P01", "P03", _PULL), module=stages)
def _per_layer_inputs_not_sent() -> tuple[Patch, ...]:
    """Per-layer inputs stay in the first stage, and later layers do without."""
    return replace(Stage, "still_to_come", lambda _self, _per_layer: None), _UNCHECKED


@stage("per-layer-inputs-not-read", source=("P01", _PULL), module=stages)
def _per_layer_inputs_not_read() -> tuple[Patch, ...]:
    """Per-layer inputs reach a later stage, which looks for them elsewhere and goes on without."""
    return replace(Stage, "received_per_layer_inputs", lambda _self, _payload: None), _UNCHECKED


@stage("per-layer-inputs-from-the-first-layer", source=("P01", "P03"), module=stages)
def _per_layer_inputs_from_the_first_layer() -> tuple[Patch, ...]:
    """A later stage reads the per-layer inputs of the model's first layers."""
    return replace(Stage, "still_to_come", lambda _self, per_layer: per_layer), _UNCHECKED


@stage("empty-payload-without-layers", source=("P01", _PULL), module=stages)
def _empty_payload_of_another_shape() -> Patch:
    """The payload before any request holds per-layer inputs without the axis of layers."""
    original = Stage.empty

    def empty(self: Stage, rows: int, tokens: int, aux_layers: Sequence[int] = ()) -> Payload:
        made = original(self, rows, tokens, aux_layers)
        if made.per_layer_inputs is None:
            return made
        return Payload(made.hidden, made.per_layer_inputs.flatten(2), made.keys_values, made.aux)

    return replace(Stage, "empty", empty)


@stage("empty-payload-in-float32", source=("P02",), module=payloads)
def _empty_payload_of_another_dtype() -> Patch:
    """The payload before any request is float32, whatever the model computes in."""

    def empty(spec: Mapping[str, Slot]) -> Payload:
        return Payload.of({name: torch.zeros(slot.shape) for name, slot in spec.items()})

    return replace(Payload, "empty", empty)


@stage("payload-sent-in-float32", source=("P02",), module=wire)
def _sent_in_float32() -> Patch:
    """Whatever the model computes in, the wire carries float32."""

    def widened(payload: Payload) -> dict[str, Tensor]:
        return {name: tensor.float().contiguous() for name, tensor in payload.named().items()}

    return replace(wire, "outgoing", widened)


@stage("states-by-index-within-stage", source=("spec 8.2", "spec 9"), module=stages)
def _states_by_index_within_stage() -> tuple[Patch, ...]:
    """States for a draft are chosen by the number of layers that the stage itself has run."""
    return replace(Stage, "layers_done", lambda self, index: index + 1 - self.span.start), _UNCHECKED


@stage("states-left-behind", source=("spec 8.1", "spec 9"), module=stages)
def _states_left_behind() -> tuple[Patch, ...]:
    """States for a draft that an earlier stage has collected do not reach the last one."""
    original = Stage._start

    def start(
        self: Stage, work: stages.Pass, payload: Payload | None, step: stages.Recording
    ) -> tuple[Tensor, Tensor | None, dict[int, Tensor]]:
        x, per_layer, aux = original(self, work, payload, step)
        return x, per_layer, aux if self.begins else {}

    return replace(Stage, "_start", start), _UNCHECKED


@stage("states-share-memory", source=("S09",), module=stages)
def _states_share_memory() -> Patch:
    """States for a draft are the stream itself, which the next layer writes over, and no copies of it."""
    original = Stage._layer

    def layer(self: Stage, index: int) -> DecoderLayer:
        made = original(self, index)
        # What a hook returns takes the place of the output.
        made.register_forward_hook(lambda _layer, given, output: given[0].copy_(output))
        return made

    return replace(Stage, "_layer", layer)


@stage("one-state-bare", source=("spec 9", _PULL), module=stages)
def _one_state_bare() -> Patch:
    """A single state for a draft comes as it is, and several in a tuple."""
    original = stages.in_order

    def in_order(aux: dict[int, Tensor]) -> object:
        ordered = original(aux)
        return ordered[0] if len(ordered) == 1 else ordered

    return replace(stages, "in_order", in_order)


@stage("shared-keys-not-sent", source=("P03", "spec 2.5"), module=stages)
def _shared_keys_not_sent() -> tuple[Patch, ...]:
    """Keys and values that later stages share are not sent, and their layers read what was never written."""

    def unwritten(self: Stage, payload: Payload) -> dict[int, tuple[Tensor, Tensor]]:
        rows, tokens, _ = payload.hidden.shape
        empty = self.empty(rows, tokens)
        return dict(empty.keys_values)

    return (
        replace(Stage, "read_later", lambda _self, _step, _payload: {}),
        replace(Stage, "received_keys_values", unwritten),
        _UNCHECKED,
    )
