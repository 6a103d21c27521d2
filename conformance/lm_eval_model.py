"""Any target as a model of lm-eval, also for lm-eval's own command line.

    python -m conformance.lm_eval_model run --model conformance \
      --model_args target=reference,checkpoint=scripted --include_path conformance/tasks --tasks nano_gsm8k \
      --apply_chat_template

takes the arguments of lm-eval's command `lm_eval` and knows the model by its name. So does `lm_eval` itself
where `--tasks` names a file in `conformance/tasks`, because it imports what that file names.

1. `generate_until` answers without the thought. Stop strings and filters see what the model says at last.
2. With `--apply_chat_template`, conversations go to the target as such; without it, the text is the prompt.
3. Targets decode greedily: a task that samples is refused.
4. Under lm-eval's command line a question without an answer ends the run, as lm-eval knows no such thing; in
   `conformance.evaluation.evaluate` it becomes an item of its own class.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import soundfile  # type: ignore[import-untyped]
from lm_eval.api.model import TemplateLM  # type: ignore[import-untyped]
from lm_eval.utils import (  # type: ignore[import-untyped]
    get_rolling_token_windows,
    make_disjoint_window,
)
from tqdm import tqdm  # type: ignore[import-untyped]

from conformance.answering import (
    Answer,
    Answerer,
    Cache,
    EvaluationError,
    Generating,
    Medium,
    Progress,
    Question,
    Serving,
    UnavailableError,
    answer_all,
    picture_sha256,
    sound_sha256,
)
from conformance.targets import registry
from conformance.targets.protocol import DType, EngineOptions, LoglikelihoodRequest, Server, Target
from conformance.targets.reference_chat import Chat, checkpoint_folder

RATE = 16_000
"""Samples a second that the models take."""
MAX_NEW_TOKENS = 256
"""Where a task says nothing, as in lm-eval's own models."""
BATCH_SIZE = 32
"""Questions at once, unless told otherwise."""
_KINDS: tuple[tuple[Literal["image", "audio"], str, str], ...] = (
    ("image", "visual", "<image>"),
    ("audio", "audio", "<audio>"),
)
"""Kinds of media, lm-eval's names for them, and what stands in their place in a task's text."""


class Conversation(str):
    """Messages as JSON, where lm-eval expects the text of a prompt."""

    __slots__ = ()


@dataclass(frozen=True)
class Asked:
    """One of lm-eval's requests, and what came of it."""

    task: str
    place: int
    """Number of the document among those that were asked about."""
    document: Mapping[str, Any]
    question: Question
    answer: Answer
    """Cut at the first stop string."""


class ConformanceLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """A target.

    lm-eval's command line makes it from `--model_args`.

    Args:
        target: A target, or its spec.
        checkpoint: A bundled one's name or a folder; not needed for a server.
        thinking: Ask for a thought.
        batch_size: Questions at once; "auto" leaves it to us.
        max_new_tokens: Instead of what tasks say.
        dtype: Of the engine's weights and activations.
        attention: Its backend, by its own name for it.
        engine: All of its options, in place of the two before.
        max_length: Tokens of the longest stretch that is scored at once.
        cache: Answers of an earlier run.
        progress: Told after each batch; without it a bar is drawn.
        keep_failures: Questions without an answer are kept in `asked`; else they end the run.
        max_batch_size: lm-eval's; means nothing here.
        device: Likewise: targets choose their own.

    Raises:
        TargetError, CheckpointError: there is no such target or checkpoint.
        UnavailableError: the target neither generates nor serves.
    """

    MULTIMODAL = True

    def __init__(
        self,
        target: str | Target,
        checkpoint: str | Path = "",
        *,
        thinking: bool = False,
        batch_size: int | str | None = None,
        max_new_tokens: int | None = None,
        dtype: DType = "float32",
        attention: str | None = None,
        engine: EngineOptions | None = None,
        max_length: int = 2048,
        cache: Cache | None = None,
        progress: Progress | None = None,
        keep_failures: bool = False,
        max_batch_size: object = None,
        device: object = None,
    ) -> None:
        super().__init__()
        del max_batch_size, device
        self.max_length = int(max_length)
        self.asked: list[Asked] = []
        self._thinking = bool(thinking)
        self._limit = max_new_tokens
        self._batch_size = BATCH_SIZE if batch_size in (None, "auto") else int(batch_size)
        self._engine = engine or EngineOptions(dtype=dtype, attention=attention)
        self._cache = cache
        self._progress = progress
        self._keep_failures = keep_failures
        self._target = registry.open_target(registry.resolve(target)) if isinstance(target, str) else target
        if isinstance(target, str):
            atexit.register(self._target.close)
        self._folder = tempfile.TemporaryDirectory(prefix="conformance-media-")
        self.chat: Chat | None = None
        info = self._target.describe()
        if "generate" in info.capabilities:
            self.chat = Chat(checkpoint_folder(checkpoint))
            self.answerer: Answerer = Generating(self._target, self.chat, self._engine)
        elif "serve" in info.capabilities:
            self.answerer = Serving(cast(Server, self._target))
        else:
            why = info.unavailable.get("generate", "")
            raise UnavailableError(
                f"{self._target.spec} can neither generate nor serve{f': {why}' if why else ''}"
            )

    # -------------------------------------------------------------------------- generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, without thoughts, up to the first stop string.

        Raises:
            EvaluationError: a request asks for what targets cannot do, or a question has no answer.
            UnavailableError: the target cannot be asked this.
        """
        questions = [self._question(request.args) for request in requests]
        with _told(self._progress, disable=disable_tqdm) as progress:
            answers = answer_all(
                self.answerer,
                questions,
                batch_size=self._batch_size,
                cache=self._cache,
                progress=progress,
            )
        said = []
        for request, question, came in zip(requests, questions, answers, strict=True):
            if came.failure and not self._keep_failures:
                raise EvaluationError(f"{self._target.spec}: {came.failure}: {came.error}")
            answer = _cut(came, _until(request.args[1]))
            self.asked.append(Asked(request.task_name, request.doc_id, request.doc, question, answer))
            self.cache_hook.add_partial("generate_until", request.args, answer.content)
            said.append(answer.content)
        return said

    def _question(self, arguments: Sequence[Any]) -> Question:
        context, options = arguments[0], arguments[1]
        if options.get("do_sample") or (options.get("temperature") or 0) > 0:
            raise EvaluationError(
                "the task samples (do_sample, or a temperature above 0), and targets decode greedily; "
                "set `do_sample: false` in its generation_kwargs"
            )
        media = self._media(arguments[2] if len(arguments) > 2 else {})
        limit = self._limit or int(options.get("max_gen_toks", MAX_NEW_TOKENS))
        if not isinstance(context, Conversation):
            if any(media.values()):
                raise EvaluationError("pictures and sounds need the chat template: --apply_chat_template")
            return Question((), text=context, max_new_tokens=limit)
        messages, ordered = _with_parts(json.loads(context), media)
        return Question(messages, media=ordered, thinking=self._thinking, max_new_tokens=limit)

    def _media(self, found: Mapping[str, Any]) -> dict[str, list[Medium]]:
        writers: dict[str, Callable[[Any], Medium]] = {"image": self._image, "audio": self._sound}
        return {kind: [writers[kind](piece) for piece in found.get(name) or ()] for kind, name, _ in _KINDS}

    def _image(self, picture: Any) -> Medium:
        digest = picture_sha256(picture)
        path = Path(self._folder.name) / f"{digest}.png"
        if not path.exists():
            picture.convert("RGB").save(path)
        return Medium("image", digest, path)

    def _sound(self, sound: Any) -> Medium:
        """From the bytes of a file, or from samples with their rate."""
        if isinstance(sound, bytes):
            samples, rate = soundfile.read(io.BytesIO(sound), dtype="float32", always_2d=True)
            samples = samples.mean(axis=1)
        else:
            samples, rate = np.asarray(sound["array"], dtype=np.float32), sound["sampling_rate"]
        if rate != RATE:
            raise EvaluationError(f"a sound of {rate} samples a second; the models take {RATE}")
        digest = sound_sha256(samples)
        path = Path(self._folder.name) / f"{digest}.wav"
        if not path.exists():
            soundfile.write(path, samples, RATE, subtype="FLOAT")
        return Medium("audio", digest, path)

    # -------------------------------------------------------------------------- likelihoods

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether it is the greedy one.

        Raises:
            EvaluationError: a request has pictures or sounds, or places for them.
            UnavailableError: the target tells no likelihoods.
        """
        found: list[tuple[float, bool]] = super().loglikelihood(
            list(map(_text_only, requests)), disable_tqdm=disable_tqdm
        )
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **unused: Any
    ) -> list[tuple[float, bool]]:
        del unused
        if "loglikelihood" not in self._target.describe().capabilities:
            raise UnavailableError(
                f"{self._target.spec} says nothing of the likelihood of given texts; choose a task whose "
                "answers are generated"
            )
        # An engine may have to make a token of its own besides.
        longest = max((len(context) + len(rest) + 1 for _, context, rest in requests), default=1)
        engine = self._engine
        engine = engine.model_copy(update={"max_model_len": max(longest, engine.max_model_len)})
        found: list[tuple[float, bool]] = []
        size = self._batch_size
        with _told(self._progress, disable=disable_tqdm) as progress:
            for start in range(0, len(requests), size):
                batch = requests[start : start + size]
                result = self._target.loglikelihood(
                    LoglikelihoodRequest(
                        checkpoint=str(self._expect_chat().folder),
                        contexts=tuple(tuple(context) for _, context, _ in batch),
                        continuations=tuple(tuple(rest) for _, _, rest in batch),
                        options=engine,
                    )
                )
                self.answerer.effective = dict(result.effective)
                for (arguments, _, _), made in zip(batch, result.likelihoods, strict=True):
                    found.append((made.logprob, made.greedy))
                    if arguments is not None:
                        self.cache_hook.add_partial("loglikelihood", arguments, found[-1])
                progress(len(found), len(requests))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in stretches of at most `max_length` tokens."""
        found = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            scored = self._loglikelihood_tokens(pairs, disable_tqdm=True)
            found.append(sum(value for value, _ in scored))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not isinstance(context, Conversation):
            pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
            return pair
        chat = self._expect_chat()
        prompt = chat.prompt(json.loads(context), thinking=self._thinking)
        return list(chat.ids(prompt)), list(chat.ids(continuation))

    # -------------------------------------------------------------------------- what lm-eval asks for

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Keep the conversation: the target or this model renders it.

        Raises:
            EvaluationError: the task begins the answer itself.
        """
        if not add_generation_prompt:
            raise EvaluationError(
                "the task begins the answer (`gen_prefix`), which targets cannot go on with"
            )
        return Conversation(json.dumps(list(chat_history), ensure_ascii=False))

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The checkpoint's; empty for a server, which has its own."""
        return self.chat.template if self.chat is not None and chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return str(self.chat.folder) if self.chat is not None else str(self._target.spec)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with the one that every prompt begins with unless told otherwise."""
        chat = self._expect_chat()
        return list(chat.ids(string) if add_special_tokens is False else chat.bare_ids(string))

    @property
    def eot_token_id(self) -> int:
        """The first of the tokens that end an answer."""
        return self._expect_chat().stop_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """Stands before a text that has nothing before it."""
        return self._expect_chat().bos_id

    def _expect_chat(self) -> Chat:
        if self.chat is None:
            raise UnavailableError(
                f"{self._target.spec} takes no token ids; choose a task whose answers are generated"
            )
        return self.chat


def _text_only(request: Any) -> Any:
    """A request for a likelihood, without what lm-eval adds to those of tasks with media.

    Raises:
        EvaluationError: it has media, or a text with places for some. A task that has none of its own may
            well speak of `<audio>` in a text.
    """
    if len(request.args) < 3:
        return request
    context, continuation, media = request.args[:3]
    if any(media.get(name) for _, name, _ in _KINDS) or any(mark in context for *_, mark in _KINDS):
        task = getattr(request, "task_name", None) or "the task"
        raise EvaluationError(
            f"{task}: asks how likely answers to a question with pictures or sounds are, and targets tell "
            "that of texts only; choose a task whose answers are generated (`output_type: generate_until`), "
            "such as mmmu_val or nano_mmmu"
        )
    return _TextOnly((context, continuation))


@dataclass(frozen=True)
class _TextOnly:
    """What is asked for the likelihood of a continuation."""

    args: tuple[str, str]


def _with_parts(
    messages: Sequence[Mapping[str, Any]], media: Mapping[str, Sequence[Medium]]
) -> tuple[tuple[dict[str, Any], ...], tuple[Medium, ...]]:
    """Messages whose last one has a part for each piece of media, and the media in that order.

    Raises:
        EvaluationError: the text does not have a place for each.
    """
    if not any(media.values()):
        return tuple(map(dict, messages)), ()
    left = {kind: list(pieces) for kind, pieces in media.items()}
    marks = {mark: kind for kind, _, mark in _KINDS if left[kind]}
    parts: list[dict[str, Any]] = []
    ordered: list[Medium] = []
    text = messages[-1]["content"]
    while text:
        place, mark = min(
            ((text.find(mark), mark) for mark in marks if mark in text), default=(len(text), "")
        )
        if before := text[:place].strip():
            parts.append({"type": "text", "text": before})
        text = text[place + len(mark) :]
        if not mark:
            continue
        kind = marks[mark]
        if not left[kind]:
            raise EvaluationError(f"the task's text has more places {mark} than the document has media")
        ordered.append(left[kind].pop(0))
        parts.append({"type": kind})
    for kind, _, mark in _KINDS:
        if left[kind]:
            raise EvaluationError(f"the task's text has no place {mark} for {len(left[kind])} of its media")
    return (*map(dict, messages[:-1]), {**messages[-1], "content": parts}), tuple(ordered)


def _until(options: Mapping[str, Any]) -> list[str]:
    found = options.get("until") or []
    return [stop for stop in ([found] if isinstance(found, str) else found) if stop]


def _cut(answer: Answer, until: Sequence[str]) -> Answer:
    """The answer up to the first stop string; it is whole then."""
    places = [place for stop in until if (place := answer.content.find(stop)) >= 0]
    if not places:
        return answer
    return answer.model_copy(update={"content": answer.content[: min(places)], "finish_reason": "stop"})


@contextlib.contextmanager
def _told(progress: Progress | None, *, disable: bool) -> Iterator[Progress]:
    """What is told of progress: the given function, or one that draws a bar."""
    if progress is not None:
        yield progress
        return
    with tqdm(desc="Asking the target", disable=disable) as bar:

        def draw(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield draw


def main() -> None:
    """Run lm-eval's own command line, which then knows the model."""
    from lm_eval.__main__ import cli_evaluate  # type: ignore[import-untyped]

    import conformance.tasks  # registers it

    assert conformance.tasks.MODEL
    cli_evaluate()


if __name__ == "__main__":
    main()
