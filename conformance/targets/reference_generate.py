"""Generation by the bundled model, from text and pictures, and what it thinks of given answers.

Kept from `reference`, because importing it loads torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from conformance.errors import EngineError
from conformance.targets.protocol import GenerateRequest, GenerateResult, Generation
from conformance.targets.reference_forward import DTYPES, dtype_of
from conformance.targets.reference_model import _engine as engine
from model_impl.checkpoint import load_text_model
from model_impl.errors import MediaError
from model_impl.media_config import PatchConfig
from model_impl.multimodal import Gemma4ForConditionalGeneration, Media, load_multimodal_model
from model_impl.preprocess.images import ImageBatch, load_image, prepare_images
from model_impl.runtime import generate as runtime
from model_impl.text import SoftTokens, TextModel

Ids = Sequence[int]
Files = Sequence[str]
_PADDING = 0


def generate(request: GenerateRequest) -> GenerateResult:
    """Answer a `GenerateRequest`: all prompts as one ragged batch, all pictures as another.

    Raises:
        EngineError: the model refuses the request or one of its options, or a computation in it fails.
    """
    with engine():
        return _generate(request)


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
        reader = _Reader(checkpoint, dtype, None, images)
        found = []
        for prompt, files, answer in zip(prompts, images or [()] * len(prompts), answers, strict=True):
            (row,), soft = reader.read([prompt], [files], answer[:-1])
            hidden = reader.text(torch.tensor([[*row, *answer[:-1]]]), soft=soft)
            found.append(reader.text.logits(hidden[0, len(row) - 1 :]).float().log_softmax(dim=-1))
        return found


def _generate(request: GenerateRequest) -> GenerateResult:
    options = request.options
    asked = [*options.features, *(["lora"] if request.adapter is not None else [])]
    if asked:
        raise EngineError(f"the bundled implementation cannot generate with {', '.join(asked)}")
    reader = _Reader(Path(request.checkpoint), options.dtype, options.attention, request.images)
    with torch.inference_mode():
        rows, soft = reader.read(request.prompts, request.images)
    longest = max(map(len, rows)) + request.max_new_tokens
    if longest > options.max_model_len:
        raise EngineError(f"prompt and answer take {longest} tokens, above max_model_len")
    made = runtime.generate(
        reader.text,
        rows,
        max_new_tokens=request.max_new_tokens,
        stop_ids=request.stop_ids,
        logprobs=True,
        top_logprobs=request.top_logprobs,
        soft=soft,
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
        effective={
            "attention": reader.text.attention_backend,
            "dtype": dtype_of(reader.text),
            "tensor_parallel": "1",
            "pipeline_parallel": "1",
            "speculation": "none",
            "adapter": "none",
        },
    )


class _Reader:
    """A model that reads prompts; the whole one where there are pictures."""

    def __init__(self, checkpoint: Path, dtype: str, attention: str | None, images: Sequence[Files]) -> None:
        self._whole: Gemma4ForConditionalGeneration | None = None
        if any(images):
            self._whole = load_multimodal_model(checkpoint, dtype=DTYPES[dtype], attention=attention)
            self.text: TextModel = self._whole.language_model
        else:
            self.text = load_text_model(checkpoint, dtype=DTYPES[dtype], attention=attention)

    def read(
        self, prompts: Sequence[Ids], images: Sequence[Files], behind: Ids = ()
    ) -> tuple[list[list[int]], SoftTokens | None]:
        """Prompts with a placeholder for each soft token, and what stands there.

        Args:
            prompts: Token ids, with one placeholder for each picture.
            images: Files of each prompt's pictures; empty: no prompt has any.
            behind: More tokens for which there must be room in `SoftTokens`.

        Raises:
            MediaError: placeholders and pictures do not match, or a file is no picture.
        """
        if self._whole is None:
            return [list(prompt) for prompt in prompts], None
        tokens = self._whole.config.tokens
        for number, (prompt, files) in enumerate(zip(prompts, images, strict=True)):
            found = list(prompt).count(tokens.image)
            if found != len(files):
                raise MediaError(f"prompt {number} has {found} placeholders and {len(files)} pictures")
        batch = _batch(self._whole, [file for files in images for file in files])
        counts = iter(batch.soft_tokens if batch is not None else ())
        rows: list[list[int]] = []
        for prompt in prompts:
            rows.append([])
            for token in prompt:
                if token == tokens.image:
                    rows[-1] += [tokens.image_begin, *[token] * next(counts), tokens.image_end]
                else:
                    rows[-1].append(token)
        width = max(map(len, rows)) + len(behind)
        ids = torch.tensor([[*row, *[_PADDING] * (width - len(row))] for row in rows])
        return rows, self._whole.soft_tokens(ids, Media(images=batch))


def _batch(model: Gemma4ForConditionalGeneration, files: Files) -> ImageBatch | None:
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
