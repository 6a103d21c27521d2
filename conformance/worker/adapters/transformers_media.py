"""Images, videos and sounds in the rows that transformers' models are fed.

Each row gets its own media, and its first call is a `generate` of one token: a direct forward pass refuses
videos, because it does not hand `num_frames_per_video` on. What `generate` makes of the soft tokens, and the
masks it chooses, are the answer; those of the unified model are another thing than its own rule for images
(F-322 in docs/findings.md).

Published checkpoints name the parts of the unified model as its authors do; its class here names them anew.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GenerationConfig  # type: ignore[import-not-found]

from conformance.worker.adapters.recording_media import MediaRecorder

KINDS = ("image", "video", "audio")
"""Also the order of what is recorded; the type of a soft token is its place here, counted from one."""


class RequestError(Exception):
    """The request asks for what this adapter cannot do."""


class MediaRows:
    """Feeds rows with their media, and records what towers give.

    Args:
        model: The whole model.
        path: File of the media of all rows.
        rows: Token ids of all rows.
        names: Modules outside the text model that are to be recorded, by their published names.
        order: As in `MediaRecorder`.

    Raises:
        RequestError: the placeholders of a row do not match its media.
        ValueError: the model has no module of such a name.
    """

    def __init__(
        self, model: Any, path: Path, rows: Sequence[Sequence[int]], names: Sequence[str], order: list[str]
    ) -> None:
        self.calls: dict[str, int] = {}
        self._model = model
        self._media = cut(load_file(path), rows, model.config)
        self._recorder = _RowRecorder(model.model, names, order, unified=is_unified(model.config))
        self._valid: Mapping[str, Tensor] = {}
        self._kind = ""
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        inner = self._model.model
        self._stack.enter_context(self._recorder)
        for kind in KINDS:
            name = f"get_{kind}_features"
            self._stack.enter_context(
                mock.patch.object(inner, name, self._announcing(kind, getattr(inner, name)))
            )
        towers = (
            ("embed_vision", "embed_audio") if is_unified(inner.config) else ("vision_tower", "audio_tower")
        )
        for tower in towers:
            if (module := getattr(inner, tower)) is not None:
                self._stack.callback(module.register_forward_pre_hook(self._count).remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def prefill(self, number: int, ids: Tensor) -> Any:
        """Feed a row's first tokens; returns the cache.

        Args:
            number: Of the row.
            ids: [1, tokens].

        Raises:
            RequestError: soft tokens stand behind them, or this release cannot take these videos in one row.
        """
        media = self._media[number]
        if media.end > ids.shape[1]:
            raise RequestError(
                f"row {number}: `prefill` is {ids.shape[1]}, and the soft tokens end at {media.end}; media "
                "are read in the first call, so it must not be less"
            )
        self._valid = media.valid
        made = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=self._types(ids),
            logits_to_keep=0,  # of all tokens
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=1, pad_token_id=0, return_dict_in_generate=True
            ),
            **media.arguments(self._model),
        )
        return made.past_key_values

    def tensors(self) -> dict[str, Tensor]:
        """What each recorded module gave."""
        return self._recorder.tensors()

    def _types(self, ids: Tensor) -> Tensor:
        types = torch.zeros_like(ids)
        for number, kind in enumerate(KINDS, 1):
            types[is_placeholder(ids, self._model.config, kind)] = number
        return types

    def _announcing(self, kind: str, encode: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(encode)  # `generate` looks for the names of its parameters
        def announced(*arguments: Any, **options: Any) -> Any:
            self._kind = kind
            self._recorder.begin(kind, self._valid[kind])
            return encode(*arguments, **options)

        return announced

    def _count(self, _module: nn.Module, _inputs: Any) -> None:
        self.calls[self._kind] = self.calls.get(self._kind, 0) + 1


class _RowRecorder(MediaRecorder):
    """Sorts by kind what the rows bring one after the other."""

    def __init__(self, root: nn.Module, names: Sequence[str], order: list[str], *, unified: bool) -> None:
        self._published: dict[str, list[str]] = {}
        for name in names:
            self._published.setdefault(unified_place(name) if unified else name, []).append(name)
        super().__init__(root, list(self._published), order)
        self._kinds: dict[str, dict[str, list[Tensor]]] = {kind: {} for kind in KINDS}

    def begin(self, kind: str, valid: Tensor) -> None:
        """Announce what a tower is about to read: bool [pieces, places], false at padding."""
        self._found = self._kinds[kind]
        self.call(valid)

    def tensors(self) -> dict[str, Tensor]:
        names = {name: None for found in self._kinds.values() for name in found}
        return {
            name: torch.cat([part for found in self._kinds.values() for part in found.get(name, ())])
            for name in names
        }

    def ended(self, name: str, output: Tensor) -> None:
        for published in self._published[name]:
            super().ended(published, output)


def is_unified(config: Any) -> bool:
    """Whether a model has embedders where others have towers."""
    return bool(config.model_type == "gemma4_unified")


def unified_place(name: str) -> str:
    """Where the class of the unified model has a module that checkpoints name so."""
    if name == "vision_embedder":
        return "embed_vision.pos_norm"  # its end: what has its name there holds the projector too
    first, dot, rest = name.partition(".")
    moved = {"vision_embedder": "embed_vision", "embed_vision": "embed_vision.multimodal_embedder"}
    return moved.get(first, first) + dot + rest


def is_placeholder(ids: Tensor, config: Any, kind: str) -> Tensor:
    """Where soft tokens of a kind stand."""
    token = getattr(config, f"{kind}_token_id", None)
    return torch.zeros_like(ids, dtype=torch.bool) if token is None else ids == token


# ------------------------------------------------------------------------------------------ media of each row


class RowMedia:
    """The media of one row.

    Args:
        tensors: As a `PreprocessResult` names them, of this row's pieces alone.
        end: How many of the row's tokens there are up to its last soft token.
    """

    def __init__(self, tensors: Mapping[str, Tensor], end: int) -> None:
        self.end = end
        self._tensors = tensors

    @property
    def valid(self) -> dict[str, Tensor]:
        """By kind: bool [pieces, places], false at padding."""
        valid = {
            kind: (self._tensors[f"{kind}.positions"] >= 0).all(dim=-1)
            for kind in ("image", "video")
            if f"{kind}.positions" in self._tensors
        }
        return valid | ({"audio": self._tensors["audio.mask"]} if "audio.mask" in self._tensors else {})

    def arguments(self, model: Any) -> dict[str, Tensor]:
        """As transformers' processors name them.

        Raises:
            RequestError: this release takes only videos of one length together, and these are of several.
        """
        tensors = self._tensors
        made: dict[str, Tensor] = {}
        if "image.pixels" in tensors:
            made |= {
                "pixel_values": tensors["image.pixels"],
                "image_position_ids": tensors["image.positions"],
            }
        if "video.pixels" in tensors:
            made |= _video_arguments(tensors, model)
        if "audio.features" in tensors:
            made |= {
                "input_features": tensors["audio.features"],
                "input_features_mask": tensors["audio.mask"],
            }
        return made


def _video_arguments(tensors: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    pixels, positions, frames = (tensors[f"video.{part}"] for part in ("pixels", "positions", "frames"))
    if "num_frames_per_video" in inspect.signature(model.model.get_video_features).parameters:
        return {
            "pixel_values_videos": pixels,
            "video_position_ids": positions,
            "num_frames_per_video": frames,
        }
    # Before 5.19 videos had a dimension of their own.
    if len(set(frames.tolist())) > 1:
        raise RequestError(
            f"a row with videos of {', '.join(map(str, frames.tolist()))} frames: this release of "
            "transformers takes only videos of one length together"
        )
    return {
        "pixel_values_videos": pixels.reshape(len(frames), -1, *pixels.shape[1:]),
        "video_position_ids": positions.reshape(len(frames), -1, *positions.shape[1:]),
    }


def cut(tensors: Mapping[str, Tensor], rows: Sequence[Sequence[int]], config: Any) -> list[RowMedia]:
    """The media of each row: as many pieces of each kind as its placeholders are soft tokens of.

    Raises:
        RequestError: a row's placeholders end within a piece, or there are more or fewer than pieces.
    """
    shares = [_Share(tensors, kind, soft_tokens(tensors, kind, config)) for kind in KINDS]
    made = []
    for number, row in enumerate(rows):
        ids = torch.tensor(row)
        own: dict[str, Tensor] = {}
        end = 0
        for share in shares:
            places = is_placeholder(ids, config, share.kind).nonzero()
            own |= share.take(number, len(places))
            end = max(end, int(places.max()) + 1 if len(places) else 0)
        made.append(RowMedia(own, end))
    for share in shares:
        share.check_empty()
    return made


def soft_tokens(tensors: Mapping[str, Tensor], kind: str, config: Any) -> list[int]:
    """Of each image, video or sound."""
    if kind == "audio":
        if "audio.mask" not in tensors:
            return []
        # Two convolutions of the tower each halve the frames; the unified model takes them one by one.
        counts = tensors["audio.mask"][:, :: 1 if is_unified(config) else 4].sum(dim=1)
        return [int(count) for count in counts]
    if f"{kind}.positions" not in tensors:
        return []
    squares = (tensors[f"{kind}.positions"] >= 0).all(dim=-1).sum(dim=1)
    if not is_unified(config):
        squares = squares // config.vision_config.pooling_kernel_size**2
    if kind == "video":
        ends = tensors["video.frames"].cumsum(0).tolist()
        return [int(squares[start:end].sum()) for start, end in zip([0, *ends], ends, strict=False)]
    return [int(count) for count in squares]


class _Share:
    """Hands out the pieces of a kind, in their order."""

    def __init__(self, tensors: Mapping[str, Tensor], kind: str, counts: Sequence[int]) -> None:
        self.kind = kind
        self._tensors = tensors
        self._counts = counts
        self._next = 0

    def take(self, row: int, wanted: int) -> dict[str, Tensor]:
        """Tensors of the next pieces, of so many soft tokens; one without any goes with that before it."""
        start, found = self._next, 0
        while self._next < len(self._counts) and (found < wanted or not self._counts[self._next]):
            found += self._counts[self._next]
            self._next += 1
        if found != wanted:
            raise RequestError(
                f"row {row} has {wanted} placeholders of kind {self.kind!r}, and the pieces from number "
                f"{start + 1} on have {list(self._counts[start:])} soft tokens"
            )
        return self._between(start, self._next) if self._next > start else {}

    def check_empty(self) -> None:
        """All pieces must have found a row."""
        if left := len(self._counts) - self._next:
            raise RequestError(
                f"{left} of {len(self._counts)} pieces of kind {self.kind!r} have no placeholders in any row"
            )

    def _between(self, start: int, stop: int) -> dict[str, Tensor]:
        names = {"image": ("pixels", "positions"), "audio": ("features", "mask")}
        if self.kind != "video":
            return {
                f"{self.kind}.{name}": self._tensors[f"{self.kind}.{name}"][start:stop]
                for name in names[self.kind]
            }
        frames = self._tensors["video.frames"]
        first, last = int(frames[:start].sum()), int(frames[:stop].sum())
        return {
            "video.pixels": self._tensors["video.pixels"][first:last],
            "video.positions": self._tensors["video.positions"][first:last],
            "video.frames": frames[start:stop],
        }
