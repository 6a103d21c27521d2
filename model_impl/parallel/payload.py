"""What crosses from one stage to the next (fact sheet, section 8.1).

There is no residual beside the hidden states: a Gemma 4 layer has added everything when it ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model_impl.config import LayerConfig, TextConfig
from model_impl.errors import ModelError
from model_impl.parallel.layout import Layout
from model_impl.text import check_aux_layers


@dataclass(frozen=True)
class Slot:
    """What one tensor of a payload must be."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that cross."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Payload:
    """All that a stage needs of those before it, and what it has to hand on."""

    hidden: Tensor
    """The residual stream, [B, T, H]."""
    per_layer_inputs: Tensor | None = None
    """Of the layers still to come, [B, T, layers to come, width]; None where the model has no such inputs."""
    keys_values: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Of this pass's tokens, each [B, g, T, d], by the absolute index of an earlier layer whose keys and
    values a layer still to come reads. Each stage that reads them keeps its own cache of them."""
    aux: Mapping[int, Tensor] = field(default_factory=dict)
    """The residual stream [B, T, H] after so many layers of the whole model, as far as it was asked for and
    has been passed."""

    @classmethod
    def spec(
        cls,
        config: TextConfig,
        layout: Layout,
        stage: int,
        *,
        rows: int,
        tokens: int,
        dtype: torch.dtype = torch.float32,
        aux_layers: Sequence[int] = (),
    ) -> dict[str, Slot]:
        """What a stage receives, by name: the same names and dtypes whatever the number of tokens.

        Args:
            config: Of the whole model.
            layout: Fits it. Of key-value heads a rank receives those that it holds.
            stage: The receiving one; the first receives nothing.
            rows: B.
            tokens: T; 0 is allowed.
            dtype: Of the computation.
            aux_layers: As in `TextModel.states`.

        Raises:
            LayoutError: the layout does not fit the model.
            ModelError: as `TextModel.states`, or there is no such stage.
        """
        layout.check(config)
        check_aux_layers(aux_layers, len(config.layers))
        if not 0 <= stage < layout.stages:
            raise ModelError(f"there is no stage {stage}; {layout} has {layout.stages}, from 0")
        if stage == 0:
            return {}
        start = layout.spans(len(config.layers))[stage].start
        local = layout.local(config)
        stream = Slot((rows, tokens, config.hidden_size), dtype)
        slots = {"hidden": stream}
        if (ple := config.per_layer_inputs) is not None:
            to_come = len(config.layers) - start
            slots["per_layer_inputs"] = Slot((rows, tokens, to_come, ple.width), dtype)
        for layer in read_later(local, start):
            own = Slot((rows, layer.num_kv_heads, tokens, layer.head_dim), dtype)
            slots |= {f"keys.{layer.index}": own, f"values.{layer.index}": own}
        return slots | {f"aux.{index}": stream for index in aux_layers if index <= start}

    @classmethod
    def empty(cls, spec: Mapping[str, Slot]) -> Payload:
        """Zeros where the tensors of a spec would be: what a stage runs on before there is a request."""
        return cls.of({name: torch.zeros(slot.shape, dtype=slot.dtype) for name, slot in spec.items()})

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Payload:
        """From tensors by the names of a spec."""
        keys_values, aux = {}, {}
        for name, tensor in tensors.items():
            part, _, index = name.partition(".")
            if part == "keys":
                keys_values[int(index)] = (tensor, tensors[f"values.{index}"])
            elif part == "aux":
                aux[int(index)] = tensor
        return cls(tensors["hidden"], tensors.get("per_layer_inputs"), keys_values, aux)

    def named(self) -> dict[str, Tensor]:
        """The tensors by the names of a spec, in its order."""
        named = {"hidden": self.hidden}
        if self.per_layer_inputs is not None:
            named["per_layer_inputs"] = self.per_layer_inputs
        for index, (keys, values) in sorted(self.keys_values.items()):
            named |= {f"keys.{index}": keys, f"values.{index}": values}
        return named | {f"aux.{index}": state for index, state in sorted(self.aux.items())}

    def check(self, spec: Mapping[str, Slot]) -> None:
        """Refuse what is not as the receiving stage expects it.

        Raises:
            ModelError: names, a shape or a dtype differ: which.
        """
        named = self.named()
        if list(named) != list(spec):
            raise ModelError(f"a payload holds {list(named)}; the next stage expects {list(spec)}")
        for name, slot in spec.items():
            found = Slot(tuple(named[name].shape), named[name].dtype)
            if found != slot:
                raise ModelError(
                    f"{name} of a payload is {list(found.shape)} of {found.dtype}; the next stage expects "
                    f"{list(slot.shape)} of {slot.dtype}"
                )


def read_later(config: TextConfig, start: int) -> list[LayerConfig]:
    """Layers before `start` whose keys and values are read by layers from `start` on."""
    readers = config.layers[start:]
    sources = sorted({x.kv_source for x in readers if x.kv_source is not None and x.kv_source < start})
    return [config.layers[source] for source in sources]
