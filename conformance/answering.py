"""Questions to a target, and the answers that came: what scoring needs to know of either.

Targets that generate are given token ids, rendered and read with the checkpoint's own tokenizer and template.
Servers are given conversations. An answer that did not come is one too: it says why. Nothing is asked twice
because of what came, but for one case: a target refuses a batch as a whole, so the prompts of a refused batch
are asked one by one, to find those that it refuses.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import ValidationError

from conformance.errors import ConformanceError, EngineError, TargetTimeoutError, WorkerDiedError
from conformance.records import Record
from conformance.replies import MalformedReplyError, Reply, read_whole
from conformance.scoring import Failure
from conformance.targets.protocol import (
    EngineOptions,
    Feature,
    GenerateRequest,
    Generation,
    ServeAnswer,
    Server,
    ServeRequest,
    Target,
)
from conformance.targets.reference_chat import Chat

Message = Mapping[str, Any]
Progress = Callable[[int, int], None]
"""Told after each batch how many questions of how many are answered."""

REFUSALS = (400, 413, 422)
"""HTTP statuses that say that the server understood and will not."""
_STEP = 256
"""Longest sequences are rounded up to a multiple, so that an engine serves several tasks."""
_MEDIA = {"image": "<|image|>", "audio": "<|audio|>"}


class EvaluationError(ConformanceError):
    """A task cannot be evaluated as asked: says why, and what to do."""


class UnavailableError(EvaluationError):
    """The target cannot do what the task needs; it says nothing of the target's quality."""


@dataclass(frozen=True)
class Medium:
    """A picture or a sound."""

    kind: Literal["image", "audio"]
    sha256: str
    """Of its pixels or samples, however they are encoded."""
    path: Path
    """A PNG, or a WAV file of 16 000 samples a second."""


def picture_sha256(picture: Any) -> str:
    """Digest of a Pillow image's pixels."""
    seen = picture.convert("RGB")
    return hashlib.sha256(f"{seen.size} ".encode() + seen.tobytes()).hexdigest()


def sound_sha256(samples: Any) -> str:
    """Digest of the samples of a NumPy array."""
    return hashlib.sha256(samples.astype("<f4").tobytes()).hexdigest()


@dataclass(frozen=True)
class Question:
    """A conversation up to the model's turn, or a bare text to go on with."""

    messages: tuple[Message, ...]
    """In OpenAI's form; parts `{"type": "image"}` and `{"type": "audio"}` stand for the media in order. Empty
    where there is a bare text."""
    text: str = ""
    media: tuple[Medium, ...] = ()
    thinking: bool = False
    max_new_tokens: int = 256

    @cached_property
    def sha256(self) -> str:
        """Digest of what is asked, whoever is asked and however many tokens the answer may take."""
        asked = {
            "messages": self.messages,
            "text": self.text,
            "media": [[medium.kind, medium.sha256] for medium in self.media],
            "thinking": self.thinking,
        }
        text = json.dumps(asked, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def files(self, kind: str) -> tuple[str, ...]:
        """Paths of its media of a kind."""
        return tuple(str(medium.path) for medium in self.media if medium.kind == kind)


class Answer(Record):
    """What came back for one question."""

    prompt: str
    raw: str = ""
    """The whole text, thoughts and markers included."""
    content: str = ""
    tokens: int = 0
    finish_reason: str = ""
    failure: Failure = ""
    error: str = ""


class Answerer(Protocol):
    """Asks a target."""

    effective: dict[str, str]
    """What ran, as the target said last."""

    def begin(self, questions: Sequence[Question]) -> None:
        """Look at all that will be asked.

        Raises:
            UnavailableError: the target cannot be asked this.
        """
        ...

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Ask some of it at once; one answer for each."""
        ...


class Generating:
    """Asks a target that generates.

    Args:
        target: Has the capability `generate`.
        chat: The checkpoint's.
        options: How the engine is set up, but for the longest sequence.
    """

    def __init__(self, target: Target, chat: Chat, options: EngineOptions) -> None:
        self.effective: dict[str, str] = {}
        self._target = target
        self._chat = chat
        self._options = options
        self._prompts: dict[str, tuple[str, tuple[int, ...]]] = {}

    def begin(self, questions: Sequence[Question]) -> None:
        """Render all prompts, to know the longest sequence."""
        asked: set[Feature] = set(self._options.features)
        for kind, feature in _FEATURES.items():
            if any(question.files(kind) for question in questions):
                asked.add(feature)
        info = self._target.describe()
        lacking = sorted(asked - set(info.features))
        if lacking:
            raise UnavailableError(f"{self._target.spec} cannot generate with {', '.join(lacking)}")
        longest = max((self._longest(question) for question in questions), default=0)
        rounded = max(self._options.max_model_len, -(-longest // _STEP) * _STEP)
        length = max(longest, min(rounded, self._chat.positions))
        self._options = self._options.model_copy(update={"max_model_len": length})

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """One batch; where it is refused, each of its prompts alone."""
        try:
            generations = self._generate(questions)
        except EngineError as error:
            if len(questions) > 1:
                return [answer for question in questions for answer in self.ask([question])]
            return [self._failed(question, "refused", error) for question in questions]
        except (WorkerDiedError, TargetTimeoutError) as error:
            return [self._failed(question, "transport-error", error) for question in questions]
        return [self._read(*pair) for pair in zip(questions, generations, strict=True)]

    def _generate(self, questions: Sequence[Question]) -> Sequence[Generation]:
        images = tuple(question.files("image") for question in questions)
        sounds = tuple(question.files("audio") for question in questions)
        result = self._target.generate(
            GenerateRequest(
                checkpoint=str(self._chat.folder),
                prompts=tuple(self._prompt(question)[1] for question in questions),
                images=images if any(images) else (),
                sounds=sounds if any(sounds) else (),
                max_new_tokens=max(question.max_new_tokens for question in questions),
                stop_ids=self._chat.stop_ids,
                options=self._options,
            )
        )
        self.effective = dict(result.effective)
        return result.generations

    def _prompt(self, question: Question) -> tuple[str, tuple[int, ...]]:
        """Text and token ids."""
        key = question.sha256
        if key not in self._prompts:
            if question.messages:
                text = self._chat.prompt(question.messages, thinking=question.thinking)
                self._prompts[key] = (text, self._chat.ids(text))
            else:
                self._prompts[key] = (question.text, self._chat.bare_ids(question.text))
        return self._prompts[key]

    def _longest(self, question: Question) -> int:
        soft = self._chat.soft_tokens
        media = sum(soft[medium.kind] + 2 for medium in question.media)
        return len(self._prompt(question)[1]) + media + question.max_new_tokens

    def _read(self, question: Question, made: Generation) -> Answer:
        prompt = self._prompt(question)[0]
        # A batch has one limit: what a question would not have let through is cut off again.
        ids = made.token_ids[: question.max_new_tokens]
        cut = len(ids) < len(made.token_ids)
        said = self._chat.read(ids, prompt)
        return Answer(
            prompt=prompt,
            raw=said.raw,
            content=said.content,
            tokens=len(ids),
            finish_reason="length" if cut else made.finish_reason,
        )

    def _failed(self, question: Question, failure: Failure, error: Exception) -> Answer:
        return Answer(prompt=self._prompt(question)[0], failure=failure, error=str(error))


_FEATURES: dict[str, Feature] = {"image": "images", "audio": "sounds"}


class Serving:
    """Asks a server, whose own template renders and whose own parser splits the answer.

    Args:
        target: Has the capability `serve`.
    """

    def __init__(self, target: Server) -> None:
        self.effective: dict[str, str] = {}
        self._target = target

    def begin(self, questions: Sequence[Question]) -> None:
        """Chat completions take conversations only."""
        if not all(question.messages for question in questions):
            raise UnavailableError(
                "a server of chat completions takes conversations; ask with the chat template"
            )

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """All at the same time, each over a connection of its own."""
        shown = [json.dumps(question.messages, ensure_ascii=False) for question in questions]
        try:
            bodies = tuple(_body(question) for question in questions)
            answers = self._target.serve(ServeRequest(bodies=bodies))
        except (EngineError, WorkerDiedError, TargetTimeoutError) as error:
            return [Answer(prompt=text, failure="transport-error", error=str(error)) for text in shown]
        return [_read_served(text, answer) for text, answer in zip(shown, answers, strict=True)]


def _body(question: Question) -> dict[str, Any]:
    media = iter(question.media)
    body: dict[str, Any] = {
        "messages": [_with_media(message, media) for message in question.messages],
        "temperature": 0,
        "seed": 0,
        "max_tokens": question.max_new_tokens,
        # Stop strings are the scorer's: a server would find them in the thought too.
    }
    if question.thinking:
        body["chat_template_kwargs"] = {"enable_thinking": True}
    return body


def _with_media(message: Message, media: Iterator[Medium]) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        return dict(message)
    parts = [_encoded(next(media)) if part["type"] in _MEDIA else part for part in content]
    return {**message, "content": parts}


def _encoded(medium: Medium) -> dict[str, Any]:
    data = base64.b64encode(medium.path.read_bytes()).decode()
    if medium.kind == "image":
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def _read_served(prompt: str, answer: ServeAnswer) -> Answer:
    if answer.failure or answer.status != 200:
        refused = not answer.failure and answer.status in REFUSALS
        said = answer.detail or f"HTTP {answer.status}: {json.dumps(answer.body)[:200]}"
        return Answer(prompt=prompt, failure="refused" if refused else "transport-error", error=said)
    try:
        reply = read_whole(answer.body)
    except MalformedReplyError as error:
        return Answer(prompt=prompt, failure="transport-error", error=str(error))
    return Answer(
        prompt=prompt,
        raw=_raw(reply),
        content=reply.content,
        tokens=int((reply.usage or {}).get("completion_tokens") or 0),
        finish_reason=reply.finish_reason or "",
    )


def _raw(reply: Reply) -> str:
    """The text as the model may have written it: the server has taken it apart."""
    thought = f"<|channel>thought\n{reply.reasoning}<channel|>" if reply.reasoning else ""
    return thought + reply.content


class Cache:
    """Answers in a JSON Lines file, so that an interrupted evaluation goes on.

    Failures are not kept. A torn last line is left out.

    Args:
        path: The file; None: nothing is kept.
        identity: What answers depend on besides the question.
    """

    def __init__(self, path: Path | None, identity: str) -> None:
        self._path = path
        self._identity = identity
        self._known: dict[str, tuple[Answer, dict[str, str]]] = {}
        self._effective: dict[str, str] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n"):
                try:
                    found = json.loads(line)
                    self._known[found["key"]] = (
                        Answer.model_validate(found["answer"]),
                        {str(name): str(value) for name, value in dict(found["effective"]).items()},
                    )
                except (ValueError, KeyError, TypeError, ValidationError):
                    continue  # a line that a killed process left unfinished, or of an older form: asked anew

    def get(self, question: Question) -> Answer | None:
        """The answer that came earlier."""
        known = self._known.get(self._key(question))
        if known is None:
            return None
        self._effective = known[1]
        return known[0]

    def add(
        self, questions: Sequence[Question], answers: Sequence[Answer], effective: Mapping[str, str]
    ) -> None:
        """Keep what came, and what ran."""
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            for question, answer in zip(questions, answers, strict=True):
                if not answer.failure:
                    line = {
                        "key": self._key(question),
                        "answer": answer.model_dump(),
                        "effective": dict(effective),
                    }
                    file.write(json.dumps(line) + "\n")

    def _key(self, question: Question) -> str:
        text = f"{self._identity} {question.sha256} {question.max_new_tokens}"
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def effective(self) -> dict[str, str]:
        """What ran when the answers were made, of the last that was taken from here; empty: none was."""
        return dict(self._effective)


def answer_all(
    answerer: Answerer,
    questions: Sequence[Question],
    *,
    batch_size: int,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> list[Answer]:
    """Ask everything, long questions first, and give the answers in the order of the questions.

    Raises:
        UnavailableError: the target cannot be asked this.
    """
    answerer.begin(questions)
    known = {place: cache.get(question) if cache else None for place, question in enumerate(questions)}
    found = {place: answer for place, answer in known.items() if answer is not None}
    if cache is not None and found:
        answerer.effective = cache.effective  # until the target says something itself
    open_places = sorted(set(range(len(questions))) - set(found), key=lambda place: _order(questions[place]))
    if progress is not None:
        progress(len(found), len(questions))
    for start in range(0, len(open_places), batch_size):
        places = open_places[start : start + batch_size]
        batch = [questions[place] for place in places]
        answers = answerer.ask(batch)
        if cache is not None:
            cache.add(batch, answers, answerer.effective)
        found |= dict(zip(places, answers, strict=True))
        if progress is not None:
            progress(len(found), len(questions))
    return [found[place] for place in range(len(questions))]


def _order(question: Question) -> tuple[int, int, str]:
    """Like with like: prompts with media apart, then by length. It depends on the question alone."""
    length = len(question.text) + len(json.dumps(question.messages))
    return (-len(question.media), -length, question.sha256)
