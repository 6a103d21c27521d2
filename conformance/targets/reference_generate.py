"""Generation by the bundled model, from text, pictures and sounds, and what it thinks of given answers.

Kept from `reference`, because importing it loads torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from conformance.errors import EngineError
from conformance.targets import reference_lora
from conformance.targets.protocol import (
    EngineOptions,
    GenerateRequest,
    GenerateResult,
    Generation,
    Loglikelihood,
    LoglikelihoodRequest,
    LoglikelihoodResult,
)
from conformance.targets.reference_forward import DTYPES, dtype_of
from conformance.targets.reference_model import engine
from model_impl.checkpoint import load_text_model
from model_impl.errors import MediaError
from model_impl.media_config import FrameConfig, PatchConfig
from model_impl.multimodal import Gemma4ForConditionalGeneration, Media, load_multimodal_model
from model_impl.preprocess.audio import AudioBatch, load_audio, prepare_audio, prepare_waves
from model_impl.preprocess.images import ImageBatch, load_image, prepare_images
from model_impl.runtime import generate as runtime
from model_impl.text import SoftTokens, TextModel

Ids = Sequence[int]
Files = Sequence[str]
FEATURES = ("images", "sounds", "lora", "mixed-adapters")
"""What it can generate with."""
_PADDING = 0


def generate(request: GenerateRequest) -> GenerateResult:
    """Answer a `GenerateRequest`: all prompts as one ragged batch, all pictures and all sounds as others.

    Raises:
        EngineError: the model refuses the request or one of its options, or a computation in it fails.
    """
    with engine():
        return _generate(request)


def loglikelihood(request: LoglikelihoodRequest) -> LoglikelihoodResult:
    """Answer a `LoglikelihoodRequest`: each pair in one pass without a cache.

    Raises:
        EngineError: as `generate`.
    """
    with engine(), torch.inference_mode():
        options = request.options
        _check_features(options.features)
        pairs = list(zip(request.contexts, request.continuations, strict=True))
        _check_length(max(len(context) + len(continuation) for context, continuation in pairs), options)
        reader = Reader(Path(request.checkpoint), options.dtype, options.attention)
        found = []
        for context, continuation in pairs:
            values = reader.logprobs(context, continuation)
            chosen = values.gather(1, torch.tensor(continuation)[:, None])[:, 0]
            found.append(
                Loglikelihood(
                    logprob=float(chosen.double().sum()),
                    greedy=values.argmax(dim=-1).tolist() == list(continuation),
                )
            )
        return LoglikelihoodResult(likelihoods=tuple(found), effective=reader.effective())


def logprobs(
    checkpoint: Path, prompts: Sequence[Ids], images: Sequence[Files], answers: Sequence[Ids], dtype: str
) -> list[Tensor]:
    """Log-probabilities of every token where the answers' tokens stand, by one pass without a cache.

    Args:
        checkpoint: Folder of the model.
        prompts: Token ids, with one placeholder for each picture.
        images: Files of each prompt's pictures; empty: no prompt has any.
        answers: Token ids of each answer.
        dtype: Of weights and activations.

    Returns:
        For each prompt, float32 [tokens of its answer, vocabulary].

    Raises:
        EngineError: as `generate`.
    """
    with engine(), torch.inference_mode():
        reader = Reader(checkpoint, dtype, None, media=any(images))
        rows = zip(prompts, images or [()] * len(prompts), answers, strict=True)
        return [reader.logprobs(prompt, answer, files) for prompt, files, answer in rows]


def _generate(request: GenerateRequest) -> GenerateResult:
    options = request.options
    _check_features(request.features)
    media = any(request.images) or any(request.sounds)
    adapted = request.adapter_of
    reader = Reader(Path(request.checkpoint), options.dtype, options.attention, media=media or any(adapted))
    adapters = reference_lora.attached(reader.model, Path(request.checkpoint), adapted)
    with torch.inference_mode():
        rows, soft = reader.read(
            request.prompts, request.images, request.sounds, encode=reference_lora.encoder(adapters, adapted)
        )
    _check_length(max(map(len, rows)) + request.max_new_tokens, options)
    made = runtime.generate(
        reader.text,
        rows,
        max_new_tokens=request.max_new_tokens,
        stop_ids=request.stop_ids,
        logprobs=True,
        top_logprobs=request.top_logprobs,
        soft=soft,
        adapt=reference_lora.rows_of(adapters, adapted),
    )
    return GenerateResult(
        generations=tuple(
            Generation(
                token_ids=row.ids,
                finish_reason=row.finish_reason,
                logprobs=row.logprobs or (),
                top=row.top or (),
            )
            for row in made
        ),
        effective={**reader.effective(), "adapter": reference_lora.summary(adapters, adapted)},
        adapted=reference_lora.acted(adapters, adapted),
    )


def _check_features(asked: Sequence[str]) -> None:
    absent = [feature for feature in asked if feature not in FEATURES]
    if absent:
        raise EngineError(f"the bundled implementation cannot generate with {', '.join(absent)}")


def _check_length(longest: int, options: EngineOptions) -> None:
    if longest > options.max_model_len:
        raise EngineError(f"prompt and answer take {longest} tokens, above max_model_len")


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

    def logprobs(self, prompt: Ids, answer: Ids, images: Files = (), sounds: Files = ()) -> Tensor:
        """Of every token where the answer's tokens stand: float32 [tokens of the answer, vocabulary]."""
        (row,), soft = self.read([prompt], [images], [sounds], answer[:-1])
        hidden = self.text(torch.tensor([[*row, *answer[:-1]]]), soft=soft)
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
