"""What all request and answer types of the protocol share, and the words for what targets can do."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Capability = Literal[
    "parse",
    "parse_stream",
    "certify",
    "render",
    "preprocess",
    "forward",
    "generate",
    "loglikelihood",
    "stages",
    "serve",
    "score",
]
"""`parse`: whole output to fields. `parse_stream`: the same in chunks. `certify`: search over every
chunking, needs copyable parser state. `render`: messages to prompt text. `preprocess`: media to what towers
read. `forward`: token ids to the tensors inside a model. `generate`: token ids to those that follow.
`loglikelihood`: how likely given ids are to follow others. `stages`: what crosses between the stages of a
pipeline. `serve`: chat completions over HTTP. `score`: answers to a task to what becomes of them."""

Feature = Literal[
    "tensor-parallel",
    "pipeline-parallel",
    "pipeline-split",
    "expert-parallel",
    "eagle3",
    "assistant",
    "prefill-chunk",
    "prefix-cache",
    "block-size",
    "kv-dtype",
    "max-sequences",
    "threads",
    "sampling",
    "repeat",
    "states",
    "lora",
    "mixed-adapters",
    "images",
    "sounds",
    "media",
    "long-blocks",
]
"""What not every target that generates or runs forward passes can do. The first twelve are `EngineOptions`
(`eagle3` and `assistant`: drafts of that kind). `sampling` to `sounds`: generation with them
(`mixed-adapters`: with several adapters in one batch, `GenerateRequest.mixed`). `media`: forward passes with
images, videos and sounds. `long-blocks`: a choice of what becomes of images longer than the window."""

Choice = Literal["attention", "cache", "dtype"]
"""Options of which a target can have several kinds."""

DType = Literal["float32", "bfloat16"]

KVDType = Literal["float16", "bfloat16", "fp8_e4m3", "fp8_e5m2"]
"""Of stored keys and values: of eight bits without a scale, `fp8_e4m3` with a mantissa of three of them."""


class Model(BaseModel):
    """Base of all protocol types: immutable, and strict about unknown fields."""

    # Validators are built where one is first used, as a command needs few of them.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
