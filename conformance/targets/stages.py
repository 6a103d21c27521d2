"""What the harness asks about the stages of a pipeline: request and answer of the capability `stages`."""

from __future__ import annotations

from pydantic import Field, model_validator

from conformance.targets.protocol import DType, Model


class StagesRequest(Model):
    """Rows of token ids through a model whose layers are divided into stages."""

    checkpoint: str
    """Folder with `config.json` and `model.safetensors`, under the published names."""
    dtype: DType = "float32"
    """Of weights and activations."""
    pipeline: tuple[int, ...] = Field(min_length=1)
    """Layers of each stage; one stage is the whole model in one process."""
    input_ids: tuple[tuple[int, ...], ...] = Field(min_length=1)
    """Rows of one length."""
    prefill: int | None = Field(default=None, ge=1)
    """Tokens of the first pass; every later one has one, and the cache of those before. None: one pass."""
    aux_layers: tuple[int, ...] = ()
    """After how many layers of the whole model the residual stream is wanted besides, as a draft reads it;
    0 is the scaled embedding. What is not distinct, ascending and within the model is to be refused."""
    output: str
    """Path of the safetensors file that the target writes."""

    @model_validator(mode="after")
    def _rows_are_of_one_length(self) -> StagesRequest:
        if len({len(row) for row in self.input_ids}) != 1 or not self.input_ids[0]:
            raise ValueError("rows of token ids must have one length, and a token at least")
        return self


class Crossed(Model):
    """One tensor that a stage is handed."""

    shape: tuple[int, ...]
    dtype: str
    """Such as `float32`."""
    nbytes: int
    """That cross."""


class Boundary(Model):
    """What the stage behind a boundary is handed, by name.

    Names: `hidden_states` [B, T, H]; `per_layer_inputs` [B, T, layers still to come, width]; `keys.N` and
    `values.N` [B, heads, T, d], of the new tokens, of layer N of the whole model; `aux.N` [B, T, H], the
    residual stream after N layers of the whole model. What has no place among them comes under the engine's
    own name.
    """

    first_pass: dict[str, Crossed]
    """In the first pass of the request."""
    empty: dict[str, Crossed]
    """What stands in for it before there is any request, with no token."""


class StagesResult(Model):
    """Tensors in a file, and what crossed.

    The file holds, in the dtype of the computation and joined in time over all passes: `stream.S` [B, T, H]
    for each stage S but the first, what it was handed as `hidden_states`; `hidden` [B, T, H], after the final
    norm; and `aux.K`, the K-th of the states that the last stage gave, in its order.
    """

    path: str
    held: tuple[tuple[int, ...], ...]
    """Indices of the layers whose weights each stage holds."""
    boundaries: tuple[Boundary, ...]
    """In order; the first is in front of stage 1."""
    aux: int = Field(ge=0)
    """How many states the last stage gave."""
    form: str
    """What it gave them in: the name of the type, such as `tuple`."""
    effective: dict[str, str] = Field(default_factory=dict)
    """`pipeline` (layers of each stage, such as `4+6`) and `dtype`, read back from the stages."""
