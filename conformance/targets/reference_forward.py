"""Forward passes of the bundled model, with what its modules give. Importing it loads torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from conformance.errors import EngineError
from conformance.targets import reference_media
from conformance.targets.protocol import ForwardRequest, ForwardResult
from conformance.worker.adapters.recording import Recorder, spans
from conformance.worker.adapters.recording_media import MediaRecorder
from conformance.worker.modules import LOGITS, MASK, outside_text
from model_impl.checkpoint import load_text_model
from model_impl.layers import backends
from model_impl.layers.attention import Attention
from model_impl.media_config import FrameConfig, MultimodalConfig, PatchConfig
from model_impl.multimodal import Gemma4ForConditionalGeneration, Media, load_multimodal_model
from model_impl.preprocess.images import ImageBatch
from model_impl.runtime.cache import KVCache
from model_impl.text import SoftTokens, TextModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PADDING = 0


def forward(request: ForwardRequest) -> ForwardResult:
    """Answer a `ForwardRequest`: all rows as one batch, padded on the right; all media of a kind as one too.

    Raises:
        EngineError: a mask is asked for of what is no attention, or the file of media cannot be read.
        ModelError: the model refuses the request.
    """
    whole = None
    if request.media:
        whole = load_multimodal_model(
            Path(request.checkpoint),
            dtype=DTYPES[request.dtype],
            attention=request.attention,
            long_blocks=request.long_blocks or "clamp_past",
        )
    text = whole.language_model if whole is not None else _text_model(request)
    inside = [name for name in request.capture if not outside_text(name) and not name.endswith(MASK)]
    masks = [name for name in request.capture if name.endswith(MASK)]
    rows = request.input_ids
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        recorder = stack.enter_context(Recorder(text, inside, len(rows)))
        calls: dict[str, str] = {}
        soft = None
        towers = None
        if whole is not None:
            names = [name for name in request.capture if outside_text(name)]
            towers = stack.enter_context(MediaRecorder(whole, names, recorder.order))
            soft, calls = _soft_tokens(whole, request, towers)
        seen = stack.enter_context(_masks(text, masks, recorder, rows))
        _run(text, recorder, request, soft)
        recorder.save(Path(request.output), {**(towers.tensors() if towers else {}), **seen})
    return ForwardResult(
        path=request.output,
        order=tuple(recorder.order),
        effective={"attention": text.attention_backend, "dtype": dtype_of(text), **calls},
    )


def dtype_of(model: TextModel) -> str:
    """As requests name it."""
    return str(model.embed_tokens.weight.dtype).removeprefix("torch.")


def _text_model(request: ForwardRequest) -> TextModel:
    return load_text_model(Path(request.checkpoint), dtype=DTYPES[request.dtype], attention=request.attention)


def _run(model: TextModel, recorder: Recorder, request: ForwardRequest, soft: SoftTokens | None) -> None:
    """Feed the batch: the first call's tokens of every row, then one token of every row that has one left."""
    rows = request.input_ids
    calls = list(spans(max(map(len, rows)), request.prefill))
    cache = None
    if len(calls) > 1:
        cache = KVCache(model.config, len(rows), dtype=DTYPES[request.dtype])
    for start, stop in calls:
        parts = [row[start:stop] for row in rows]
        lengths = [len(part) for part in parts]
        width = max(lengths)
        ids = torch.tensor([[*part, *[_PADDING] * (width - len(part))] for part in parts])
        ragged = min(lengths) < width
        recorder.call(range(len(rows)), lengths)
        own = None if soft is None else soft.columns(start, start + width)
        hidden = model(
            ids,
            cache=cache,
            lengths=lengths if ragged else None,
            soft=own if own is not None and own.where.any() else None,
        )
        recorder.ended(LOGITS, model.logits(hidden))


# ------------------------------------------------------------------------------------------------- media


def media_of(path: Path, config: MultimodalConfig) -> Media:
    """A request's media, as a model reads them.

    Raises:
        EngineError: the file cannot be read.
    """
    return reference_media.load(path, _per_token(config), _soft_frames(config))


def _soft_tokens(
    model: Gemma4ForConditionalGeneration, request: ForwardRequest, recorder: MediaRecorder
) -> tuple[SoftTokens | None, dict[str, str]]:
    """What stands in the place of the placeholders, and how many times towers ran for each kind."""
    media = media_of(Path(request.media), model.config)
    width = max(map(len, request.input_ids))
    ids = torch.tensor([[*row, *[_PADDING] * (width - len(row))] for row in request.input_ids])
    with _counting(model, media, recorder) as calls:
        soft = model.soft_tokens(ids, media)
    return soft, {f"{kind}_calls": str(count) for kind, count in calls.items()}


@contextlib.contextmanager
def _counting(
    model: Gemma4ForConditionalGeneration, media: Media, recorder: MediaRecorder
) -> Iterator[dict[str, int]]:
    """Counts the calls of towers, and tells the recorder where there is padding in each of them."""
    calls: dict[str, int] = {}
    kinds = {id(media.images): "image", id(media.videos.images) if media.videos else 0: "video"}
    kind = "audio"

    def count(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls[kind] = calls.get(kind, 0) + 1
        # Modules for images have those of a batch in one row, without padding.
        recorder.call(inputs[1].bool() if kind == "audio" else None)

    image_features = model.image_features

    def of_images(batch: ImageBatch) -> Tensor:
        nonlocal kind
        kind = kinds[id(batch)]
        try:
            return image_features(batch)
        finally:
            kind = "audio"

    names = ("vision_tower", "vision_embedder", "audio_tower", "audio_embedder")
    hooks = [getattr(model, name).register_forward_pre_hook(count) for name in names if hasattr(model, name)]
    try:
        with patch.object(model, "image_features", of_images):
            yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _per_token(config: MultimodalConfig) -> int:
    """Squares of an image that become one soft token."""
    vision = config.vision
    return 1 if vision is None or isinstance(vision, PatchConfig) else vision.pooling**2


def _soft_frames(config: MultimodalConfig) -> Callable[[int], int]:
    """Valid frames of a sound to its soft tokens: one by one, or by two convolutions that halve them."""
    stride = 1 if isinstance(config.audio, FrameConfig) else 4
    return lambda frames: -(-frames // stride)


# ------------------------------------------------------------------------------------------------- masks


@contextlib.contextmanager
def _masks(
    model: TextModel, names: Sequence[str], recorder: Recorder, rows: Sequence[Sequence[int]]
) -> Iterator[dict[str, Tensor]]:
    """Which keys each token sees, float32 [tokens, longest row], by what the attention backend goes by.

    Raises:
        EngineError: there is no attention of a name.
    """
    found: dict[str, Tensor] = {}
    running = ""

    def enter(name: str) -> Callable[[nn.Module, Any], None]:
        def remember(_module: nn.Module, _inputs: Any) -> None:
            nonlocal running
            running = name

        return remember

    def heard(backend: str, attend: backends.Attend) -> backends.Attend:
        def call(q: Tensor, k: Tensor, v: Tensor, mask: backends.Mask) -> Tensor:
            nonlocal running
            name, running = running, ""
            output = attend(q, k, v, mask)
            if name:
                seen = _seen(backend, q, k, mask).float().expand(len(rows), 1, -1, -1)[:, 0]
                found[name] = torch.cat([own[: len(row)] for own, row in zip(seen, rows, strict=True)])
                recorder.order.append(name)
            return output

        return call

    with ExitStack() as stack:
        for name in names:
            module = model.get_submodule(name.removesuffix(MASK))
            if not isinstance(module, Attention):
                raise EngineError(f"{name}: there is no attention of that name")
            stack.enter_context(module.register_forward_pre_hook(enter(name)))
        wrapped = {backend: heard(backend, attend) for backend, attend in backends.BACKENDS.items()}
        stack.enter_context(patch.object(backends, "BACKENDS", wrapped))
        yield found


def _seen(backend: str, q: Tensor, k: Tensor, mask: backends.Mask) -> Tensor:
    """What a mask let a backend see that has just run; it broadcasts to bool [rows, 1, queries, keys]."""
    queries, keys = q.shape[2], k.shape[2]
    if backend == "flex":
        # It makes its own form of the mask for the first layer, and reads nothing else from then on.
        from torch.nn.attention.flex_attention import create_mask

        blocks = mask.derived["blocks"]
        if blocks is not None:
            return create_mask(blocks.mask_mod, len(q), 1, queries, keys, device=q.device.type)
    elif (dense := mask.dense(queries, keys, q.device)) is not None:
        return dense
    return torch.ones(1, 1, queries, keys, dtype=torch.bool, device=q.device)
