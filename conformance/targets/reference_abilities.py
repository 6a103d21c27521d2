"""What the bundled implementation can be asked for when it generates. Importing it loads no torch."""

from __future__ import annotations

from conformance.targets.protocol import Feature

FEATURES: tuple[Feature, ...] = (
    *("tensor-parallel", "pipeline-parallel", "pipeline-split", "expert-parallel"),
    *("eagle3", "assistant", "prefill-chunk", "prefix-cache", "block-size", "kv-dtype"),
    *("max-sequences", "threads"),
    *("sampling", "repeat", "states", "images", "sounds", "lora", "mixed-adapters"),
)
CACHES = ("contiguous", "paged")
"""One batch whose rows each have a stretch of memory; an engine whose sequences come and go in blocks."""
