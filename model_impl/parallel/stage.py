"""One stage of a model, as one rank holds it: some layers, and of each layer a shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from model_impl.config import LayerConfig, TextConfig
from model_impl.errors import ModelError
from model_impl.layers.backend_table import Device
from model_impl.layers.norm import RMSNorm
from model_impl.parallel.divided import (
    DividedEmbedding,
    GatheredLinear,
    SummedExperts,
    SummedLinear,
    WholeExperts,
)
from model_impl.parallel.layout import Layout, Place
from model_impl.parallel.payload import Payload, Slot, read_later
from model_impl.parallel.ranks import Alone, Ranks, even_part
from model_impl.runtime.cache import KVCache
from model_impl.runtime.masks import BlockMode
from model_impl.runtime.paged import CacheSizes, PagedCache
from model_impl.runtime.step import Cache, Step
from model_impl.text import DecoderLayer, SoftTokens, States, TextPart, TiedHead, check_aux_layers


@dataclass(frozen=True)
class Pass:
    """What every rank knows of one pass over new tokens."""

    ids: Tensor
    """int [B, T], right-padded."""
    lengths: Sequence[int] | None = None
    """Valid tokens of each row; all T if left out."""
    soft: SoftTokens | None = None
    """As in `TextModel.states`; the features are looked at in the first stage only."""
    aux_layers: tuple[int, ...] = ()
    """As in `TextModel.states`."""


class Stage(TextPart):
    """The layers of one stage, with their absolute indices, and what stands before or after all layers.

    The tables of per-layer inputs are in the first stage, which makes those of all layers; the head is in the
    last, with a copy of the token embedding where the two are tied.

    Args:
        config: Of the whole model.
        layout: How it is divided.
        place: Of this rank.
        ranks: Those that share the stage's layers; left out, it is one.
        attention: As in `TextModel`.
        device: As in `TextModel`.
        long_blocks: As in `TextModel`.

    Raises:
        LayoutError: the layout does not fit the model.
        BackendError: as `TextModel`.
    """

    def __init__(
        self,
        config: TextConfig,
        layout: Layout,
        place: Place,
        ranks: Ranks | None = None,
        attention: str | None = None,
        device: Device = "cpu",
        long_blocks: BlockMode = "clamp_past",
    ) -> None:
        layout.check(config)
        super().__init__(layout.local(config), attention, device, long_blocks)
        self.whole = config
        """The configuration with the sizes of all ranks together."""
        self.layout = layout
        self.place = place
        self.span = layout.spans(len(config.layers))[place.stage]
        self.begins, self.ends = place.stage == 0, place.stage == layout.stages - 1
        self._ranks = ranks or Alone()
        if self._ranks.size != layout.tensor:
            raise ModelError(f"{layout} needs {layout.tensor} connected ranks; there are {self._ranks.size}")
        hidden = config.hidden_size
        if self.begins or (self.ends and config.tie_word_embeddings):
            self.embed_tokens = self._table(config.vocab_size, hidden, hidden)
        if self.begins and (ple := config.per_layer_inputs) is not None:
            packed = len(config.layers) * ple.width
            self.embed_tokens_per_layer = self._table(ple.vocab_size, packed, ple.width)
            self.per_layer_model_projection = GatheredLinear(hidden, packed, self._ranks, place.shard)
            self.per_layer_projection_norm = RMSNorm(ple.width, config.rms_norm_eps)
        self.layers = nn.ModuleDict({str(index): self._layer(index) for index in self.span})
        if self.ends:
            self.norm = RMSNorm(hidden, config.rms_norm_eps)
            self.lm_head = TiedHead()
        if self.ends and not config.tie_word_embeddings:
            start, stop = even_part(config.vocab_size, self._ranks.size, place.shard)
            self.lm_head = nn.Linear(hidden, stop - start, bias=False)

    def _table(self, rows: int, width: int, scaled_width: int) -> DividedEmbedding:
        return DividedEmbedding(rows, width, scaled_width, self._ranks, self.place.shard)

    def _layer(self, index: int) -> DecoderLayer:
        layer = DecoderLayer(self.config, self.config.layers[index], self.backend)
        if self._ranks.size > 1:
            attention, mlp = layer.self_attn, layer.mlp
            attention.o_proj = SummedLinear(*_sizes(attention.o_proj), self._ranks)
            mlp.down_proj = SummedLinear(*_sizes(mlp.down_proj), self._ranks)
            if self.config.moe is not None:
                kind = WholeExperts if self.layout.expert else SummedExperts
                layer.experts = kind(self.config.hidden_size, self.config.moe, self._ranks, self.place.shard)
        return layer

    @property
    def kept_layers(self) -> tuple[LayerConfig, ...]:
        """Layers whose keys and values this rank keeps: its own, and earlier ones that its own read."""
        read = {self.config.layers[index].kv_source for index in self.span}
        return tuple(layer for layer in self.config.layers if layer.index in read)

    def new_cache(self, rows: int) -> KVCache:
        """An empty cache of so many rows, for this stage."""
        return KVCache(self.config, rows, self.dtype, self.device)

    def new_pools(self, sizes: CacheSizes) -> PagedCache:
        """An empty paged cache, for this stage; its blocks have the same numbers on every rank."""
        return PagedCache(self.config, sizes, layers=self.kept_layers, dtype=self.dtype, device=self.device)

    def spec(
        self, rows: int, tokens: int, aux_layers: Sequence[int] = (), *, stages: int = 0
    ) -> dict[str, Slot]:
        """What this stage receives, or the one so many stages further on; see `Payload.spec`."""
        return Payload.spec(
            self.whole,
            self.layout,
            self.place.stage + stages,
            rows=rows,
            tokens=tokens,
            dtype=self.dtype,
            aux_layers=aux_layers,
        )

    def empty(self, rows: int, tokens: int, aux_layers: Sequence[int] = ()) -> Payload:
        """What stands in for a payload to warm this stage up; the first stage receives none."""
        return Payload.empty(self.spec(rows, tokens, aux_layers))

    def run(self, work: Pass, payload: Payload | None = None, cache: Cache | None = None) -> Payload | States:
        """One pass through this stage's layers.

        Args:
            work: The pass; the same for all stages.
            payload: Of the stage before; None in the first.
            cache: Made by `new_cache`, or a view of what `new_pools` made: holds the tokens before these, and
                receives these.

        Returns:
            What the next stage receives; in the last stage, what `TextModel.states` returns.

        Raises:
            CacheError: as `TextModel.states`.
            ModelError: as `TextModel.states`, or the payload is not what this stage receives.
        """
        check_aux_layers(work.aux_layers, len(self.config.layers))
        blocks = None if work.soft is None else work.soft.blocks
        step = Recording.of(self.begin(work.ids, work.lengths, cache, blocks))
        x, per_layer, aux = self._start(work, payload, step)
        for index in self.span:
            own = None if per_layer is None else per_layer[:, :, index - self.span.start]
            x = self.layers[str(index)](x, own, step)
            if self.layers_done(index) in work.aux_layers:
                aux[self.layers_done(index)] = x
        if cache is not None:
            cache.commit()
        if self.ends:
            return States(self.norm(x), in_order(aux))
        return Payload(x, self.still_to_come(per_layer), self.read_later(step, payload), aux)

    def _start(
        self, work: Pass, payload: Payload | None, step: Step
    ) -> tuple[Tensor, Tensor | None, dict[int, Tensor]]:
        """The residual stream, per-layer inputs from this stage's first layer on, and states so far."""
        if self.begins:
            x, per_layer = self.embed(work.ids, work.soft)
            return x, per_layer, {0: x} if 0 in work.aux_layers else {}
        if payload is None:
            raise ModelError(f"stage {self.place.stage} runs on what stage {self.place.stage - 1} hands over")
        rows, tokens = work.ids.shape
        payload.check(self.spec(rows, tokens, work.aux_layers))
        self.keep(step, payload)
        return payload.hidden, self.received_per_layer_inputs(payload), dict(payload.aux)

    def keep(self, step: Step, payload: Payload) -> None:
        """Put what crossed where the layers that share it look, and into this stage's own cache."""
        received = self.received_keys_values(payload)
        for layer in self.kept_layers:
            if layer.index < self.span.start:
                step.put(layer, *received[layer.index])

    def received_keys_values(self, payload: Payload) -> Mapping[int, tuple[Tensor, Tensor]]:
        """Of the new tokens, by the layers that have them."""
        return payload.keys_values

    def received_per_layer_inputs(self, payload: Payload) -> Tensor | None:
        """Those of this stage's layers and of later ones, [B, T, layers, width]."""
        return payload.per_layer_inputs

    def still_to_come(self, per_layer: Tensor | None) -> Tensor | None:
        """Per-layer inputs of the layers behind this stage's, of those from its first on."""
        return None if per_layer is None else per_layer[:, :, len(self.span) :]

    def read_later(self, step: Recording, payload: Payload | None) -> dict[int, tuple[Tensor, Tensor]]:
        """New keys and values that later stages read: of this stage's layers, and of those before it."""
        passed = {} if payload is None else payload.keys_values
        later = [layer.index for layer in read_later(self.config, self.span.stop)]
        return {index: passed[index] if index in passed else step.new[index] for index in later}

    def layers_done(self, index: int) -> int:
        """How many layers of the whole model the stream has passed, behind the layer of an absolute index."""
        return index + 1

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] to [..., vocabulary], soft-capped, on every rank of the last stage.

        Raises:
            ModelError: this is another stage.
        """
        if not self.ends:
            raise ModelError(f"stage {self.place.stage} has no head; ask stage {self.layout.stages - 1}")
        return self._ranks.gather(super().logits(hidden), self.config.vocab_size)


class Recording(Step):
    """A pass that remembers what its layers put in: new keys and values only, by layer."""

    new: dict[int, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, step: Step) -> Recording:
        """A pass with the same angles, masks and store."""
        made = cls(step.rope, step.masks, step.store)
        made.new = {}
        return made

    def put(self, layer: LayerConfig, k: Tensor, v: Tensor) -> None:
        """See `Step`."""
        self.new[layer.index] = (k, v)
        super().put(layer, k, v)


def in_order(aux: dict[int, Tensor]) -> tuple[Tensor, ...]:
    """States by ascending number of layers: as many as were asked for, always in a tuple."""
    return tuple(aux[index] for index in sorted(aux))


def _sizes(linear: nn.Linear) -> tuple[int, int]:
    return linear.in_features, linear.out_features
