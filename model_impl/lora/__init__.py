"""LoRA adapters in PEFT's form: W + (alpha / r) B A in the place of W (Hu et al. 2021, equation 3).

`sites` says where a model can be adapted; `config` and `adapter` read an adapter and give every tensor its
place; `apply` lets rows of a batch use adapters; `media` encodes the pictures of such rows; `files` merges
one into a checkpoint.
"""

from __future__ import annotations

from model_impl.lora.adapter import Adapter, LowRank, Parts, names
from model_impl.lora.apply import AdapterError, Adapters
from model_impl.lora.config import AdapterConfig
from model_impl.lora.files import merge_adapter, write_random_adapter
from model_impl.lora.sites import MediaMapping, Site, Sites, TokenCounts, token_counts

__all__ = [
    "Adapter",
    "AdapterConfig",
    "AdapterError",
    "Adapters",
    "LowRank",
    "MediaMapping",
    "Parts",
    "Site",
    "Sites",
    "TokenCounts",
    "merge_adapter",
    "names",
    "token_counts",
    "write_random_adapter",
]
