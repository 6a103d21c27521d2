"""Which process holds which part of a model (fact sheet, section 8)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from model_impl.config import TextConfig
from model_impl.errors import ModelError

MOST_PROCESSES = 4


class LayoutError(ModelError):
    """A model cannot be divided as a layout says: which size does not fit, and what would."""


@dataclass(frozen=True)
class Layout:
    """How a model is divided: into stages of layers, and each stage over several ranks.

    Rank `stage · tensor + t` holds the t-th shard of a stage.
    """

    pipeline: int | tuple[int, ...] = 1
    """Layers of each stage; or the number of stages, whose sizes then differ by one at most, the larger ones
    first."""
    tensor: int = 1
    """Ranks that share the heads, the width of MLPs and the rows of tables."""
    expert: bool = False
    """The ranks of a stage share the experts whole; else each has a part of every expert."""

    def __str__(self) -> str:
        stages = self.pipeline if isinstance(self.pipeline, int) else "+".join(map(str, self.pipeline))
        experts = " x experts" if self.expert else ""
        return f"pipeline {stages} x tensor {self.tensor}{experts}"

    @property
    def stages(self) -> int:
        """Number of stages."""
        return self.pipeline if isinstance(self.pipeline, int) else len(self.pipeline)

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return self.stages * self.tensor

    def place(self, rank: int) -> Place:
        """Where a rank stands."""
        return Place(*divmod(rank, self.tensor))

    def rank(self, place: Place) -> int:
        """The rank that stands there."""
        return place.stage * self.tensor + place.shard

    def spans(self, layers: int) -> tuple[range, ...]:
        """Indices of the layers of each stage.

        Raises:
            LayoutError: a stage would be empty, or the stages do not add up to `layers`.
        """
        sizes = self.pipeline
        if isinstance(sizes, int):
            if not 1 <= sizes <= layers:
                raise LayoutError(
                    f"{layers} layers cannot be divided into {sizes} stages; name from 1 to {layers}"
                )
            sizes = tuple(layers // sizes + (stage < layers % sizes) for stage in range(sizes))
        if sum(sizes) != layers or not all(size > 0 for size in sizes):
            raise LayoutError(
                f"stages of {list(sizes)} layers do not fit a model of {layers}; each needs one at least, "
                f"and all together {layers}"
            )
        ends = list(itertools.accumulate(sizes, initial=0))
        return tuple(range(start, stop) for start, stop in itertools.pairwise(ends))

    def check(self, config: TextConfig) -> None:
        """Refuse a model that cannot be divided this way.

        Raises:
            LayoutError: as `spans`; there are too many processes; or a size does not divide: which one.
        """
        self.spans(len(config.layers))
        if self.tensor < 1:
            raise LayoutError(f"tensor parallel {self.tensor} must be 1 or above")
        if self.ranks > MOST_PROCESSES:
            raise LayoutError(f"{self} takes {self.ranks} processes; {MOST_PROCESSES} at most are started")
        if self.expert and (config.moe is None or self.tensor == 1):
            reason = "the model has no experts" if config.moe is None else "tensor parallel is 1"
            raise LayoutError(
                f"experts cannot be divided over the ranks of a stage: {reason}; leave `expert` out"
            )
        for name, size in self._divided(config).items():
            if size % self.tensor:
                raise LayoutError(f"{name} is {size}, which does not divide by tensor parallel {self.tensor}")
        for layer in config.layers:
            heads = layer.num_kv_heads
            if heads % self.tensor and self.tensor % heads:
                raise LayoutError(
                    f"layer {layer.index} has {heads} key-value heads, which neither divide by tensor "
                    f"parallel {self.tensor} nor divide it"
                )

    def _divided(self, config: TextConfig) -> dict[str, int]:
        """Sizes that every rank of a stage gets an equal part of, by name."""
        sizes = {"num_attention_heads": config.num_heads}
        sizes |= {f"intermediate_size of layer {x.index}": x.intermediate_size for x in config.layers}
        if config.moe is not None and self.expert:
            sizes["num_experts"] = config.moe.num_experts
        elif config.moe is not None:
            sizes["moe_intermediate_size"] = config.moe.intermediate_size
        return sizes

    def local(self, config: TextConfig) -> TextConfig:
        """The configuration with the sizes that one rank holds; the same for all ranks.

        Where there are fewer key-value heads than ranks, a rank holds the one that its query heads read, and
        neighbours hold it too. Experts that are divided whole are all still counted, as the router chooses
        among all.
        """
        moe = config.moe
        if moe is not None and not self.expert:
            moe = replace(moe, intermediate_size=moe.intermediate_size // self.tensor)
        layers = tuple(
            replace(
                layer,
                num_kv_heads=max(1, layer.num_kv_heads // self.tensor),
                intermediate_size=layer.intermediate_size // self.tensor,
            )
            for layer in config.layers
        )
        return replace(config, num_heads=config.num_heads // self.tensor, layers=layers, moe=moe)


@dataclass(frozen=True)
class Place:
    """Of one process."""

    stage: int
    shard: int
    """Which of the ranks of its stage."""

    def beside(self, stages: int) -> Place:
        """The same shard so many stages further on."""
        return Place(self.stage + stages, self.shard)
