"""Judging the tensors that a processor makes of media. Needs torch, so it is imported where it is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from conformance.results import Problem
from conformance.targets.protocol import MediaForm, MediaKind

Tensors = Mapping[str, Tensor]

_VALUES: dict[MediaForm, dict[MediaKind, int]] = {
    "tower": {"image": 16 * 16 * 3, "video": 16 * 16 * 3, "audio": 128},
    "unified": {"image": 48 * 48 * 3, "video": 48 * 48 * 3, "audio": 640},
}
"""Of a patch, a tile, a frame of mel features, a stretch of waveform."""
_UNITS: dict[MediaForm, dict[MediaKind, tuple[str, str]]] = {
    "tower": {"image": ("patch", "value"), "video": ("patch", "value"), "audio": ("mel frame", "bin")},
    "unified": {"image": ("tile", "value"), "video": ("tile", "value"), "audio": ("stretch", "sample")},
}
"""What the second and the third axis count."""
_PER_TOKEN = {"tower": 9, "unified": 1}
"""Squares of an image, or (about) the frames of a sound, that one soft token stands for."""
_VALUES_OF: dict[MediaKind, str] = {
    "image": "image.pixels",
    "video": "video.pixels",
    "audio": "audio.features",
}
_PLACES_OF: dict[MediaKind, str] = {
    "image": "image.positions",
    "video": "video.positions",
    "audio": "audio.mask",
}
FRAMES = "video.frames"


@dataclass(frozen=True)
class Layout:
    """What the tensors for a request look like, whoever makes them."""

    form: MediaForm
    pieces: Mapping[MediaKind, int]
    """Images, frames of all videos together, sounds; only kinds of which there are any."""
    frames: Sequence[int]
    """Of each video."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor there must be."""
        names = [name for kind in self.pieces for name in (_VALUES_OF[kind], _PLACES_OF[kind])]
        return (*names, *([FRAMES] if "video" in self.pieces else []))

    def problems(self, tensors: Tensors) -> Iterator[Problem]:
        """Where tensors are not of this layout."""
        for name in self.names:
            if name not in tensors:
                yield Problem(
                    rule="missing-tensor", message=f"there is no tensor {name}", got=sorted(tensors)
                )
        extra = sorted(set(tensors) - set(self.names))
        if extra:
            yield Problem(
                rule="extra-tensor", message=f"{', '.join(extra)}: there is no such media", got=extra
            )
        for kind, number in self.pieces.items():
            yield from self._shape_problems(kind, number, tensors)
        if FRAMES in self.names and FRAMES in tensors:
            yield from _frame_problem(tensors[FRAMES], self.frames)

    def _shape_problems(self, kind: MediaKind, number: int, tensors: Tensors) -> Iterator[Problem]:
        values, places = tensors.get(_VALUES_OF[kind]), tensors.get(_PLACES_OF[kind])
        wanted = (number, "length", _VALUES[self.form][kind])
        places_wanted = (number, "length") if kind == "audio" else (number, "length", 2)
        places_dtype = torch.bool if kind == "audio" else torch.int64
        found = [
            *_shape_problem(_VALUES_OF[kind], values, torch.float32, wanted),
            *_shape_problem(_PLACES_OF[kind], places, places_dtype, places_wanted),
        ]
        yield from found
        if values is None:
            return
        if not found and places is not None and values.shape[1] != places.shape[1]:
            yield Problem(
                rule="shape",
                message=f"{_VALUES_OF[kind]} {list(values.shape)} and {_PLACES_OF[kind]} "
                f"{list(places.shape)} differ in length",
            )
        if not _finite(values):
            where = self.place(kind, (~values.isfinite()).nonzero()[0].tolist())
            yield Problem(
                rule="not-finite", message=f"{_VALUES_OF[kind]} holds NaN or infinity, first in {where}"
            )

    def soft_tokens(self, kind: MediaKind, tensors: Tensors) -> list[int]:
        """Of each image, frame or sound, as a tower makes them of tensors of this layout."""
        places = tensors[_PLACES_OF[kind]]
        if kind != "audio":
            return ((places >= 0).all(dim=-1).sum(dim=1) // _PER_TOKEN[self.form]).tolist()
        # Two convolutions of stride two each leave a fourth of the frames, rounded up.
        return [-(-valid // (4 if self.form == "tower" else 1)) for valid in places.sum(dim=1).tolist()]

    def differences(self, tensors: Tensors, oracle: Tensors, tolerance: float) -> Iterator[Problem]:
        """Where tensors of this layout differ from an oracle's, which may be padded to another length."""
        for kind in self.pieces:
            padding = 0 if kind == "audio" else -1
            ours, theirs = _alike(tensors[_PLACES_OF[kind]], oracle[_PLACES_OF[kind]], padding)
            wrong = ours != theirs
            if kind != "audio":
                wrong = wrong.any(dim=-1)
            if wrong.any():
                index = wrong.nonzero()[0].tolist()
                got, expected = (side[tuple(index)].tolist() for side in (ours, theirs))
                yield Problem(
                    rule="mask" if kind == "audio" else "positions",
                    message=f"{_PLACES_OF[kind]}: {self.place(kind, index)} is {got} and not {expected}; "
                    f"{int(wrong.sum())} are wrong",
                    expected=expected,
                    got=got,
                )
            yield from self._value_problem(kind, tensors, oracle, tolerance)

    def _value_problem(
        self, kind: MediaKind, tensors: Tensors, oracle: Tensors, tolerance: float
    ) -> Iterator[Problem]:
        ours, theirs = _alike(tensors[_VALUES_OF[kind]], oracle[_VALUES_OF[kind]], 0)
        apart = (ours - theirs).abs_()
        if apart.numel() and apart.max() > tolerance:
            wrong = apart > tolerance
            index = wrong.nonzero()[0].tolist()
            got, expected = (round(float(side[tuple(index)]), 7) for side in (ours, theirs))
            yield Problem(
                rule="features" if kind == "audio" else "pixels",
                message=f"{_VALUES_OF[kind]}: {self.place(kind, index)} is {got:g} and not {expected:g} "
                f"(limit {tolerance:g}); {int(wrong.sum())} of {wrong.numel()} are wrong, by "
                f"{float(apart.max()):.3g} at most",
                expected=expected,
                got=got,
            )

    def place(self, kind: MediaKind, index: Sequence[int]) -> str:
        """A place in a tensor in words, counted from one: `video 1, frame 2, patch 17, value 3`."""
        first = index[0]
        if kind == "video":
            ends = list(accumulate(self.frames))
            video = next((n for n, end in enumerate(ends) if first < end), len(ends) - 1)
            words = [f"video {video + 1}", f"frame {first - ends[video] + self.frames[video] + 1}"]
        else:
            words = [f"{'sound' if kind == 'audio' else kind} {first + 1}"]
        units = _UNITS[self.form][kind]
        return ", ".join([*words, *(f"{unit} {at + 1}" for unit, at in zip(units, index[1:], strict=False))])


def shapes(tensors: Tensors) -> dict[str, str]:
    """Dtype and shape of each, for people."""
    return {
        name: f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        for name, tensor in sorted(tensors.items())
    }


def _shape_problem(
    name: str, tensor: Tensor | None, dtype: torch.dtype, wanted: Sequence[int | str]
) -> Iterator[Problem]:
    """`length` stands for any; a tensor that is missing has no shape."""
    if tensor is None:
        return
    agrees = len(wanted) == tensor.ndim and all(
        size in ("length", found) for size, found in zip(wanted, tensor.shape, strict=True)
    )
    if tensor.dtype != dtype or not agrees:
        expected = f"{str(dtype).removeprefix('torch.')} [{', '.join(map(str, wanted))}]"
        got = shapes({name: tensor})[name]
        yield Problem(rule="shape", message=f"{name} is {got} and not {expected}", expected=expected, got=got)


def _finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity; without a second tensor of its size, as some are large."""
    return tensor.numel() == 0 or all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))


def _frame_problem(frames: Tensor, wanted: Sequence[int]) -> Iterator[Problem]:
    if frames.tolist() != list(wanted):
        yield Problem(
            rule="frames",
            message=f"{FRAMES} is {frames.tolist()} and not {list(wanted)}",
            expected=list(wanted),
            got=frames.tolist(),
        )


def _alike(tensor: Tensor, other: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """Both, padded behind to one length along the second axis."""
    length = max(tensor.shape[1], other.shape[1])
    return _to_length(tensor, length, padding), _to_length(other, length, padding)


def _to_length(tensor: Tensor, length: int, padding: int) -> Tensor:
    missing = length - tensor.shape[1]
    return F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, missing), value=padding) if missing else tensor
