"""What each attention backend can compute and where: our own, and those of vLLM 0.32.

Head sizes, mixes of them and image masks come from section 10 of the fact sheet. The sheet gives no devices;
those of vLLM's backends come from what the release's own backend classes and platforms declare.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Engine = Literal["reference", "vllm"]
Device = Literal["cpu", "cuda", "rocm"]
ComputeCapability = tuple[int, int]
"""Major and minor version of an NVIDIA GPU, as (9, 0)."""

ImageMasks = Literal["none", "clamped", "unclamped"]
"""Masks under which the tokens of one image see each other: none at all, with the past bounded by the sliding
window (Gemma 4's rule), or without that bound, which differs for images of more tokens than the window."""


@dataclass(frozen=True)
class HeadSizes:
    """The head dimensions that a backend has kernels for; `dimension in sizes` asks for one of them."""

    smallest: int = 1
    largest: int | None = None
    multiple_of: int = 1
    only: tuple[int, ...] | None = None
    """A closed list, in place of a range."""

    def __contains__(self, head_dim: int) -> bool:
        if self.only is not None:
            return head_dim in self.only
        bounded = self.smallest <= head_dim and (self.largest is None or head_dim <= self.largest)
        return bounded and head_dim % self.multiple_of == 0

    def __str__(self) -> str:
        if self.only is not None:
            return ", ".join(map(str, self.only))
        text = f"{self.smallest} and more" if self.largest is None else f"{self.smallest} to {self.largest}"
        return text if self.multiple_of == 1 else f"{text} in steps of {self.multiple_of}"


@dataclass(frozen=True)
class Reach:
    """What a backend can compute."""

    head_sizes: HeadSizes
    mixed_head_sizes: bool
    """It may serve layers of different head sizes in one model."""
    image_masks: ImageMasks


@dataclass(frozen=True)
class Capability:
    """One row of the table."""

    name: str
    engine: Engine
    reach: Reach
    devices: tuple[Device, ...]
    source: str
    oldest_gpu: ComputeCapability = (0, 0)
    newest_gpu: ComputeCapability = (999, 9)
    """The NVIDIA GPUs that it runs on, both ends included."""
    needs_fa4: bool = False
    """It is there only where FlashAttention 4 is installed."""
    automatic: bool = False
    """Chosen without being asked for, in the order of the table."""
    hopper_fp8: Reach | None = None
    """What is left of `reach` with an fp8 KV cache on compute capability 9.x, where layers of different head
    sizes may then be shared out among the rows that have this; None: nothing changes."""

    def reach_when(self, *, hopper_fp8: bool) -> Reach:
        """What it can compute, with an fp8 KV cache on compute capability 9.x or without."""
        return self.hopper_fp8 if hopper_fp8 and self.hopper_fp8 is not None else self.reach


_SHEET = "fact sheet section 10"
_OWN = f"{_SHEET}, PyTorch reference"
_TABLE = f"{_SHEET}, table, row {{}}; devices: vLLM 0.32.0, {{}}"

_ANY = HeadSizes()
_FA2_OR_FA3 = Reach(
    HeadSizes(smallest=8, largest=256, multiple_of=8), mixed_head_sizes=False, image_masks="none"
)

CAPABILITY_TABLE: tuple[Capability, ...] = (
    Capability(
        "sdpa",
        "reference",
        Reach(_ANY, mixed_head_sizes=True, image_masks="clamped"),
        devices=("cpu", "cuda"),
        source=_OWN,
        automatic=True,
    ),
    Capability(
        "eager",
        "reference",
        Reach(_ANY, mixed_head_sizes=True, image_masks="clamped"),
        devices=("cpu", "cuda"),
        source=_OWN,
    ),
    Capability(
        "flex",
        "reference",
        Reach(_ANY, mixed_head_sizes=True, image_masks="clamped"),
        devices=("cpu", "cuda"),
        source=_OWN,
    ),
    # vLLM calls this row and the next FLASH_ATTN and tells them apart by `flash_attn_version`.
    Capability(
        "FLASH_ATTN",
        "vllm",
        _FA2_OR_FA3,
        devices=("cuda",),
        source=_TABLE.format("FLASH_ATTN (FA2/FA3)", "flash_attn.py"),
        oldest_gpu=(8, 0),
        automatic=True,
        hopper_fp8=_FA2_OR_FA3,
    ),
    Capability(
        "FLASH_ATTN_FA4",
        "vllm",
        Reach(HeadSizes(largest=512), mixed_head_sizes=True, image_masks="clamped"),
        devices=("cuda",),
        source=_TABLE.format("FLASH_ATTN (FA4)", "flash_attn_interface.py; fp8: flash_attn.py"),
        oldest_gpu=(9, 0),
        newest_gpu=(11, 9),
        needs_fa4=True,
        automatic=True,
        hopper_fp8=Reach(HeadSizes(smallest=257, largest=512), mixed_head_sizes=True, image_masks="none"),
    ),
    Capability(
        "TRITON_ATTN",
        "vllm",
        Reach(HeadSizes(smallest=32), mixed_head_sizes=True, image_masks="clamped"),
        devices=("cuda", "rocm"),
        source=_TABLE.format("TRITON_ATTN", "triton_attn.py, platforms/rocm.py"),
        automatic=True,
    ),
    Capability(
        "FLASHINFER",
        "vllm",
        Reach(HeadSizes(only=(64, 128, 256, 512)), mixed_head_sizes=True, image_masks="none"),
        devices=("cuda",),
        source=_TABLE.format("FLASHINFER", "flashinfer.py"),
        oldest_gpu=(8, 0),
        newest_gpu=(12, 1),
    ),
    Capability(
        "FLEX_ATTENTION",
        "vllm",
        Reach(_ANY, mixed_head_sizes=True, image_masks="unclamped"),
        devices=("cuda",),
        source=_TABLE.format("FLEX_ATTENTION", "platforms/cuda.py"),
    ),
    Capability(
        "CPU_ATTN",
        "vllm",
        Reach(
            HeadSizes(only=(32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)),
            mixed_head_sizes=True,
            image_masks="none",
        ),
        devices=("cpu",),
        source=_TABLE.format("CPU_ATTN", "platforms/cpu.py"),
        automatic=True,
    ),
    Capability(
        "ROCM_ATTN",
        "vllm",
        Reach(HeadSizes(largest=256), mixed_head_sizes=False, image_masks="none"),
        devices=("rocm",),
        source=_TABLE.format("ROCM_ATTN", "platforms/rocm.py"),
    ),
    Capability(
        "ROCM_AITER_UNIFIED_ATTN",
        "vllm",
        Reach(HeadSizes(smallest=32), mixed_head_sizes=True, image_masks="none"),
        devices=("rocm",),
        source=_TABLE.format("AITER unified", "platforms/rocm.py"),
    ),
    Capability(
        "HPC_ATTN",
        "vllm",
        Reach(HeadSizes(only=(128,)), mixed_head_sizes=False, image_masks="none"),
        devices=("cuda",),
        source=_TABLE.format("hpc / b12x", "hpc_attn.py"),
        oldest_gpu=(9, 0),
        newest_gpu=(9, 0),
    ),
    Capability(
        "B12X",
        "vllm",
        Reach(HeadSizes(largest=256), mixed_head_sizes=False, image_masks="none"),
        devices=("cuda",),
        source=_TABLE.format("hpc / b12x", "b12x.py"),
        oldest_gpu=(12, 0),
        newest_gpu=(12, 1),
    ),
)
