"""Judge what a processor makes of a prompt and its media.

1. Files of the pieces are made, and the target is asked for the prompt with a placeholder for each soft token
   and for the tensors that a model reads. These must fit together, and be what the case says.
2. They must be what the suite's oracle makes of the same pieces: the prompt, the positions and the masks
   exactly, pixels and features within the case's tolerance. Pieces may be padded behind to any length. The
   first place that differs is named. The oracle gets the same bytes, but sounds always in WAV, as not every
   oracle decodes more; other formats of sounds lose nothing.
3. What is `refused` must raise an error that names the input, by its file or by its number among those of its
   kind, and the next request must be answered. Videos are handed over as frames, so that an engine need not
   know their files: of one video by itself any error will do. No oracle is asked about what is refused.
4. A processor that exits has refused nothing. Where no refusal is asked for, that judges nothing either: the
   case is an error.
5. A target whose adapter cannot hand a piece to its engine is not judged: the case is skipped. What the
   adapter says is no refusal of the engine's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from conformance.checks.base import CheckOutcome
from conformance.errors import EngineError, NotAskedError
from conformance.media import (
    Budget,
    Clip,
    ImagePiece,
    MediaPiece,
    Picture,
    Sound,
    SoundPiece,
    VideoPiece,
    kind_of,
    what,
)
from conformance.oracles import Oracles
from conformance.results import Evidence, Problem
from conformance.suites import ProcessorCase, ProcessorSuite
from conformance.targets.protocol import MediaFile, MediaKind, PreprocessRequest, PreprocessResult, Target

if TYPE_CHECKING:
    from conformance.checks.media_tensors import Layout, Tensors

_PLACEHOLDERS: dict[MediaKind, str] = {"image": "<|image|>", "video": "<|video|>", "audio": "<|audio|>"}
_SOFT = re.compile(
    r"<\|image>(?P<seen>(?:<\|image\|>)*|(?:<\|video\|>)*)<image\|>"
    r"|<\|audio>(?P<heard>(?:<\|audio\|>)*)<audio\|>"
)
"""The soft tokens of an image, a frame or a sound, between their markers."""
_RUN = re.compile("|".join(rf"(?:{re.escape(token)}){{4,}}" for token in _PLACEHOLDERS.values()))
_INCOMPARABLE = ("missing-tensor", "shape", "not-finite")
"""Rules without which values cannot be compared."""
_WORDS: dict[MediaKind, tuple[str, ...]] = {
    "image": ("image",),
    "video": ("video",),
    "audio": ("audio", "sound"),
}
"""What an error may call a piece, with its number behind."""
_PART = "images"
"""Part of an oracle's environment that processes images and videos; a default installation lacks it."""
_SAMPLED = 32
"""Frames that are taken of a video."""
_RATE = 16_000
"""Samples a second that the models take."""

_GOOD: dict[MediaKind, tuple[MediaPiece, str]] = {
    "image": (
        ImagePiece(image=Picture(width=48, height=48)),
        f"<|image>{'<|image|>' * 64}<image|>",
    ),
    "video": (
        VideoPiece(video=Clip(frames=2, width=48, height=48, fps=1)),
        " ".join(f"00:0{second} <|image>{'<|video|>' * 64}<image|>" for second in range(2)),
    ),
    "audio": (
        SoundPiece(audio=Sound(samples=1600)),
        f"<|audio>{'<|audio|>' * 3}<audio|>",
    ),
}
"""What is asked after a refusal, with a budget of 70, and what must stand for it in the prompt."""


@dataclass(frozen=True)
class _Answer:
    """What came back, read."""

    prompt: str
    tensors: Tensors
    problems: tuple[Problem, ...]
    """Rules that are broken whatever the values should be."""

    @property
    def shown(self) -> dict[str, Any]:
        """For people."""
        from conformance.checks import media_tensors

        return {"prompt": _short(self.prompt), "tensors": media_tensors.shapes(self.tensors)}


def judge(case: ProcessorCase, suite: ProcessorSuite, target: Target, oracles: Oracles) -> CheckOutcome:
    """Ask once, or twice where the case is to be refused.

    Raises:
        EngineError: the oracle raised, could not be asked, or gave what contradicts the case; or the target's
            processor exited where it need not refuse.
        WorkerDiedError, TargetTimeoutError: from the target or the oracle.
    """
    try:
        return _judge(case, suite, target, oracles)
    except NotAskedError as error:
        return CheckOutcome("skip", reason=f"{target.spec} cannot be asked: {error}")


def _judge(case: ProcessorCase, suite: ProcessorSuite, target: Target, oracles: Oracles) -> CheckOutcome:
    info = target.describe()
    if "preprocess" not in info.capabilities:
        why = info.unavailable.get("preprocess")
        return CheckOutcome(
            "skip", reason=f"{target.spec} has no capability `preprocess`{f': {why}' if why else ''}"
        )
    if case.refused:
        return _judge_refusal(case, target, oracles)
    is_oracle = target.spec == suite.oracle
    lacking = "" if is_oracle else oracles.unavailable(suite.oracle, _PART)
    if case.soft_tokens is None and (is_oracle or lacking):
        return CheckOutcome("skip", reason=_without_oracle(suite.oracle, lacking))

    request = _request(case, oracles)
    truth = None
    if not (is_oracle or lacking):
        truth = _oracle_answer(case, suite.oracle, oracles)
    expected = _expected(case, suite.oracle, truth)
    try:
        answer = _ask(case, target, request)
    except EngineError as error:
        told = _told(error, request)
        problem = Problem(rule="raised", message=f"the processor raised {told}", got=told)
        return CheckOutcome.from_problems([problem], _evidence(case, request, expected, {"error": told}))
    problems = [*answer.problems]
    if truth is not None:
        problems += _oracle_problems(case, answer, truth)
    outcome = CheckOutcome.from_problems(problems, _evidence(case, request, expected, answer.shown))
    if lacking and not problems:
        # Without the oracle, a case can be seen to fail, and not to pass.
        return CheckOutcome("skip", evidence=outcome.evidence, reason=_without_oracle(suite.oracle, lacking))
    return outcome


def _without_oracle(oracle: str, lacking: str) -> str:
    """Why there is nothing to compare with."""
    return (
        f"the oracle {oracle} cannot be used: {lacking}"
        if lacking
        else f"{oracle} is the oracle of this suite"
    )


def _judge_refusal(case: ProcessorCase, target: Target, oracles: Oracles) -> CheckOutcome:
    request = _request(case, oracles)
    names = _culprits(case, request.media)
    named = " or ".join(names)
    wanted = f"An error that names {named}" if names else "An error"
    expected = f"{wanted}, and an answer to the next request."
    problems = []
    got: dict[str, Any]
    try:
        answer = _ask(case, target, request)
    except EngineError as error:
        told = _words(error, request)
        got = {"error": told}
        if error.exited:
            message = "the processor meant to end its process, which is no refusal"
            problems.append(Problem(rule="exits", message=message, expected=wanted, got=told))
        elif names and not any(re.search(rf"(?i)(?<!\w){re.escape(name)}(?!\d)", told) for name in names):
            problems.append(
                Problem(
                    rule="unnamed-input", message=f"the error does not name {named}", expected=named, got=told
                )
            )
    else:
        got = answer.shown
        problems.append(
            Problem(
                rule="accepted",
                message=f"{named or 'the video'} must be refused, and was answered",
                got=answer.shown,
            )
        )
    problems += _next_problems(case, target, oracles)
    return CheckOutcome.from_problems(problems, _evidence(case, request, expected, got))


def _culprits(case: ProcessorCase, files: Sequence[MediaFile]) -> tuple[str, ...]:
    """What an error has to name, any one of these: a budget, a placeholder, or a bad file or its number.

    Nothing where the video that is bad is the only one.
    """
    kinds = {file.kind for file in files}
    for kind, budget in (("image", case.image_budget), ("video", case.frame_budget)):
        if kind in kinds and budget not in get_args(Budget):
            return (str(budget),)
    if case.extra_placeholders:
        return (_PLACEHOLDERS[kind_of(case.pieces[0])],)
    bad = [n for n, piece in enumerate(case.pieces) if _is_bad(piece, case.sample_frames)]
    told = []
    for n in bad or range(len(files)):
        kind = files[n].kind
        alike = [place for place, file in enumerate(files) if file.kind == kind]
        if kind == "video" and len(alike) == 1:
            return ()
        told.append(Path(files[n].path).name)
        told += [f"{word} {alike.index(n) + 1}" for word in _WORDS[kind]]
    return tuple(told)


def _is_bad(piece: MediaPiece, sample_frames: bool) -> bool:
    """Whether a piece by itself is a reason to refuse."""
    if isinstance(piece, VideoPiece):
        return piece.video.frames < (_SAMPLED if sample_frames else 1)
    if isinstance(piece, SoundPiece) and piece.audio.rate != _RATE:
        return True
    return not what(piece).whole


def _next_problems(case: ProcessorCase, target: Target, oracles: Oracles) -> Iterator[Problem]:
    """A good request after one that was refused."""
    kind = kind_of(case.pieces[0])
    piece, expanded = _GOOD[kind]
    good = ProcessorCase(
        id="next-request",
        title="The request after one that is refused.",
        source=("spec 3.4",),
        form=case.form,
        pieces=(piece,),
        image_budget=70,
        sample_frames=False,
    )
    request = _request(good, oracles)
    try:
        answer = _ask(good, target, request)
    except EngineError as error:
        told = _words(error, request)
        yield Problem(rule="next-request", message=f"the request after it raised {told}", got=told)
        return
    wanted = request.prompt.replace(_PLACEHOLDERS[kind], expanded)
    if answer.prompt != wanted:
        yield Problem(
            rule="next-request",
            message="the request after it got another prompt",
            expected=_short(wanted),
            got=_short(answer.prompt),
        )
    for problem in answer.problems:
        yield problem.model_copy(
            update={"rule": "next-request", "message": f"the request after it: {problem.message}"}
        )


def _request(
    case: ProcessorCase, oracles: Oracles, pieces: Sequence[MediaPiece] | None = None
) -> PreprocessRequest:
    """Of the case, or of others in the place of its pieces."""
    return PreprocessRequest(
        form=case.form,
        prompt=_prompt(case),
        media=oracles.files(case.pieces if pieces is None else pieces),
        image_budget=case.image_budget,
        frame_budget=case.frame_budget,
        sample_frames=case.sample_frames,
        output=str(oracles.output()),
    )


def _prompt(case: ProcessorCase) -> str:
    """As the chat template renders a message of media and text: a placeholder alone stands for each piece."""
    each = [_PLACEHOLDERS[kind_of(piece)] for piece in case.pieces]
    own = each[0]
    left = each.count(own) + case.extra_placeholders
    written = [token for n, token in enumerate(each) if token != own or each[:n].count(own) < left]
    written += [own] * case.extra_placeholders
    return f"<bos><|turn>user\n{' and '.join([*written, 'more'])}: compare.<turn|>\n<|turn>model\n"


def _ask(case: ProcessorCase, target: Target, request: PreprocessRequest) -> _Answer:
    """The target's answer; its file of tensors is deleted, as some are large.

    Raises:
        EngineError: from the target, which may run in this process and exit.
    """
    try:
        return _read(case, target.preprocess(request))
    except SystemExit as error:
        raise EngineError(f"SystemExit: {error}", exited=True) from error
    finally:
        Path(request.output).unlink(missing_ok=True)


def _read(case: ProcessorCase, result: PreprocessResult) -> _Answer:
    """Read the tensors, and judge what needs no oracle."""
    from conformance.checks import tensors

    try:
        made = tensors.read(result.path)
    except tensors.TensorFileError as error:
        problem = Problem(rule="missing-tensor", message=f"the target's tensors cannot be read: {error}")
        return _Answer(result.prompt, {}, (problem,))
    layout = _layout(case)
    problems = list(layout.problems(made))
    counts = _soft_tokens(result.prompt)
    if case.soft_tokens is not None and [count for _, count in counts] != list(case.soft_tokens):
        got = [count for _, count in counts]
        problems.append(
            Problem(
                rule="soft-tokens",
                message=f"the prompt has {got} soft tokens for its pieces and not {list(case.soft_tokens)}",
                expected=list(case.soft_tokens),
                got=got,
            )
        )
    if not any(problem.rule in ("missing-tensor", "shape") for problem in problems):
        problems += _disagreements(layout, made, counts)
    return _Answer(result.prompt, made, tuple(problems))


def _disagreements(
    layout: Layout, made: Tensors, counts: Sequence[tuple[MediaKind, int]]
) -> Iterator[Problem]:
    """Where the prompt has other soft tokens than a tower makes of the tensors."""
    for kind in layout.pieces:
        placed = [count for owner, count in counts if owner == kind]
        found = layout.soft_tokens(kind, made)
        if placed != found:
            yield Problem(
                rule="soft-tokens",
                message=f"{kind}: the prompt has {placed} soft tokens, and the tensors make {found}",
                expected=found,
                got=placed,
            )


def _layout(case: ProcessorCase) -> Layout:
    from conformance.checks.media_tensors import Layout

    frames = [
        _SAMPLED if case.sample_frames else piece.video.frames
        for piece in case.pieces
        if isinstance(piece, VideoPiece)
    ]
    kinds = [kind_of(piece) for piece in case.pieces]
    numbers = {kind: sum(frames) if kind == "video" else kinds.count(kind) for kind in _PLACEHOLDERS}
    return Layout(case.form, {kind: numbers[kind] for kind in _PLACEHOLDERS if kind in kinds}, frames)


def _soft_tokens(prompt: str) -> list[tuple[MediaKind, int]]:
    """Of each image, frame and sound in an expanded prompt, in its order."""
    found: list[tuple[MediaKind, int]] = []
    for match in _SOFT.finditer(prompt):
        kind: MediaKind = "image"
        if match["heard"] is not None:
            kind = "audio"
        elif match["seen"].startswith(_PLACEHOLDERS["video"]):
            kind = "video"
        soft = match["heard"] if match["seen"] is None else match["seen"]
        found.append((kind, len(soft) // len(_PLACEHOLDERS[kind])))
    return found


def _oracle_answer(case: ProcessorCase, oracle: str, oracles: Oracles) -> _Answer:
    """The oracle's answer, which must break no rule that needs none."""
    request = _request(case, oracles, [_as_wav(piece) for piece in case.pieces])
    try:
        result = oracles.preprocess(oracle, request)
    except NotAskedError as error:
        raise EngineError(f"the oracle {oracle} cannot be asked: {error}") from error
    answer = _read(case, result)
    if answer.problems:
        raise EngineError(
            f"the oracle {oracle} breaks `{answer.problems[0].rule}`: {answer.problems[0].message}"
        )
    return answer


def _as_wav(piece: MediaPiece) -> MediaPiece:
    if not isinstance(piece, SoundPiece):
        return piece
    return SoundPiece(audio=piece.audio.model_copy(update={"format": "wav"}))


def _oracle_problems(case: ProcessorCase, answer: _Answer, truth: _Answer) -> Iterator[Problem]:
    if answer.prompt != truth.prompt:
        yield Problem(
            rule="prompt",
            message=_first_difference(answer.prompt, truth.prompt),
            expected=_short(truth.prompt),
            got=_short(answer.prompt),
        )
    if not any(problem.rule in _INCOMPARABLE for problem in answer.problems):
        yield from _layout(case).differences(answer.tensors, truth.tensors, case.tolerance)


def _first_difference(ours: str, theirs: str) -> str:
    """Where two expanded prompts part, told by what stands before."""
    same = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    at = min(len(ours), len(theirs)) if same is None else same
    before, mine, right = (_short(text) for text in (ours[:at], ours[at:], theirs[at:]))
    return f"the prompt differs behind {before[-40:]!r}: {mine[:40]!r} and not {right[:40]!r}"


def _short(prompt: str) -> str:
    """With `256x<|image|>` for so many in a row."""

    def counted(match: re.Match[str]) -> str:
        token = next(token for token in _PLACEHOLDERS.values() if match[0].startswith(token))
        return f"{len(match[0]) // len(token)}x{token}"

    return _RUN.sub(counted, prompt)


def _told(error: EngineError, request: PreprocessRequest) -> str:
    """What an error says of a request that is not to be refused.

    Raises:
        EngineError: the engine meant to end its process.
    """
    if error.exited:
        raise error
    return _words(error, request)


def _words(error: EngineError, request: PreprocessRequest) -> str:
    """What an error says, without the folder of the files, which has another name in each run."""
    text = str(error)
    for folder in {str(Path(file.path).parent) for file in request.media}:
        text = text.replace(f"{folder}/", "")
    return text


def _expected(case: ProcessorCase, oracle: str, truth: _Answer | None) -> dict[str, Any]:
    told: dict[str, Any] = {}
    if case.soft_tokens is not None:
        told["soft tokens"] = list(case.soft_tokens)
    if truth is not None:
        told |= {"as": f"{oracle}, pixels and features within {case.tolerance:g}"} | truth.shown
    return told


def _evidence(case: ProcessorCase, request: PreprocessRequest, expected: Any, got: Any) -> Evidence:
    kinds = {kind_of(piece) for piece in case.pieces}
    asked: dict[str, Any] = {"form": case.form, "prompt": request.prompt}
    if "image" in kinds:
        asked["image budget"] = case.image_budget
    if "video" in kinds:
        asked["frame budget"] = case.frame_budget
        asked["frames"] = f"{_SAMPLED} of each video" if case.sample_frames else "all"
    asked["pieces"] = [piece.model_dump(exclude_defaults=True) for piece in case.pieces]
    return Evidence(input=json.dumps(asked), expected=expected, got=got)
