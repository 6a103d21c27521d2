"""The bundled model as a reader of prompts: with pictures and sounds where there are some.

Kept from `reference`, because importing it loads torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from conformance.targets import reference_lora
from conformance.targets.protocol import KVDType
from conformance.targets.reference_forward import DTYPES, dtype_of
from model_impl.checkpoint import load_text_model
from model_impl.config import LayerConfig
from model_impl.errors import MediaError
from model_impl.media_config import FrameConfig, PatchConfig
from model_impl.multimodal import Gemma4ForConditionalGeneration, Media, load_multimodal_model
from model_impl.preprocess.audio import AudioBatch, load_audio, prepare_audio, prepare_waves
from model_impl.preprocess.images import ImageBatch, load_image, prepare_images
from model_impl.runtime.cache import KVCache
from model_impl.text import SoftTokens, TextModel

Ids = Sequence[int]
Files = Sequence[str]
_PADDING = 0
_FORMATS: dict[KVDType, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


class Reader:
    """A model that reads prompts; the whole one where there are media."""

    def __init__(self, checkpoint: Path, dtype: str, attention: str | None, *, media: bool = False) -> None:
        self._whole: Gemma4ForConditionalGeneration | None = None
        if media and reference_lora.is_whole(checkpoint):
            self._whole = load_multimodal_model(checkpoint, dtype=DTYPES[dtype], attention=attention)
            self.text: TextModel = self._whole.language_model
        else:
            self.text = load_text_model(checkpoint, dtype=DTYPES[dtype], attention=attention)

    @property
    def model(self) -> TextModel | Gemma4ForConditionalGeneration:
        """All that is loaded."""
        return self._whole or self.text

    def effective(self) -> dict[str, str]:
        """What runs."""
        return {
            "attention": self.text.attention_backend,
            "dtype": dtype_of(self.text),
            "tensor_parallel": "1",
            "pipeline_parallel": "1",
            "speculation": "none",
            "adapter": "none",
        }

    def logprobs(
        self,
        prompt: Ids,
        answer: Ids,
        images: Files = (),
        sounds: Files = (),
        kv_dtype: KVDType | None = None,
    ) -> Tensor:
        """Of every token where the answer's tokens stand: float32 [tokens of the answer, vocabulary]."""
        (row,), soft = self.read([prompt], [images], [sounds], answer[:-1])
        cache = _Rounded(self.text, _FORMATS[kv_dtype]) if kv_dtype is not None else None
        hidden = self.text(torch.tensor([[*row, *answer[:-1]]]), soft=soft, cache=cache)
        return self.text.logits(hidden[0, len(row) - 1 :]).float().log_softmax(dim=-1)

    def read(
        self,
        prompts: Sequence[Ids],
        images: Sequence[Files],
        sounds: Sequence[Files] = (),
        behind: Ids = (),
        encode: reference_lora.Encode | None = None,
    ) -> tuple[list[list[int]], SoftTokens | None]:
        """Prompts with a placeholder for each soft token, and what stands there.

        Args:
            prompts: Token ids, with one placeholder for each picture and each sound.
            images: Files of each prompt's pictures; empty: no prompt has any.
            sounds: Files of each prompt's sounds likewise.
            behind: More tokens for which there must be room in `SoftTokens`.
            encode: Makes soft tokens of token ids and media; the model's own way if left out.

        Raises:
            MediaError: placeholders and media do not match, or a file is none.
        """
        if self._whole is None:
            return [list(prompt) for prompt in prompts], None
        tokens = self._whole.config.tokens
        pictures, clips = (files or [()] * len(prompts) for files in (images, sounds))
        _check_counts(prompts, pictures, tokens.image, "pictures")
        _check_counts(prompts, clips, tokens.audio, "sounds")
        media = Media(
            images=_images(self._whole, [file for files in pictures for file in files]),
            audio=_sounds(self._whole, [file for files in clips for file in files]),
        )
        image_counts = iter(media.images.soft_tokens if media.images is not None else ())
        sound_counts = iter(media.audio.soft_tokens if media.audio is not None else ())
        around = {
            tokens.image: (tokens.image_begin, tokens.image_end, image_counts),
            tokens.audio: (tokens.audio_begin, tokens.audio_end, sound_counts),
        }
        rows: list[list[int]] = []
        for prompt in prompts:
            rows.append([])
            for token in prompt:
                begin, end, counts = around.get(token, (None, None, iter(())))
                count = next(counts, None)
                if count is None:
                    rows[-1].append(token)
                else:
                    rows[-1] += [part for part in (begin, *[token] * count, end) if part is not None]
        width = max(map(len, rows)) + len(behind)
        ids = torch.tensor([[*row, *[_PADDING] * (width - len(row))] for row in rows])
        return rows, (encode or self._whole.soft_tokens)(ids, media)


class _Rounded(KVCache):
    """Lets the only pass over one row attend to rounded keys and values.

    It is what engines with a cache of another dtype are judged by, so it does not use what the bundled engine
    stores with (`model_impl.runtime.stored`). Positions and masks are the plain cache's, which parity judges.
    """

    def __init__(self, model: TextModel, dtype: torch.dtype) -> None:
        super().__init__(model.config, 1, dtype=model.dtype)
        self._format = dtype

    def extend(self, layer: LayerConfig, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As `KVCache.extend`, of what is left of keys and values."""
        return super().extend(layer, self._left(k), self._left(v))

    def _left(self, x: Tensor) -> Tensor:
        end = torch.finfo(self._format).max
        return x.float().clamp(-end, end).to(self._format).to(x.dtype)


def _check_counts(prompts: Sequence[Ids], files: Sequence[Files], token: int | None, what: str) -> None:
    for number, (prompt, own) in enumerate(zip(prompts, files, strict=True)):
        found = 0 if token is None else list(prompt).count(token)
        if found != len(own):
            raise MediaError(f"prompt {number} has {found} placeholders and {len(own)} {what}")


def _images(model: Gemma4ForConditionalGeneration, files: Files) -> ImageBatch | None:
    vision = model.config.vision
    if not files or vision is None:
        return None
    return prepare_images(
        [load_image(Path(file), Path(file).name) for file in files],
        vision.soft_tokens,
        cut="tiles" if isinstance(vision, PatchConfig) else "patches",
        patch_size=vision.patch_size,
        pooling=vision.pooling,
    )


def _sounds(model: Gemma4ForConditionalGeneration, files: Files) -> AudioBatch | None:
    audio = model.config.audio
    if not files:
        return None
    if audio is None:
        raise MediaError("this model has no audio tower; leave sounds out, or load one that has")
    names = [Path(file).name for file in files]
    clips = [load_audio(Path(file), name) for file, name in zip(files, names, strict=True)]
    if isinstance(audio, FrameConfig):
        return prepare_waves(clips, audio.samples, names=names)
    return prepare_audio(clips, names=names)
