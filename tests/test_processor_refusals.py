"""The processor check on what must be refused: named, answered after, and never an exit."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.checks import processor as check
from conformance.errors import EngineError, NotAskedError
from conformance.expectations import Expectations
from conformance.loading import LoadedCase, load_suites
from conformance.media import MARKERS, MediaPiece
from conformance.runner import TargetPool, run_case
from conformance.targets.process import WorkerTarget
from conformance.targets.protocol import PreprocessRequest, PreprocessResult
from model_impl.preprocess import images
from tests.lying_processors import BAD, CLIPS, SOUNDS, TWO, Fake, Setting, Tensors, fails_at, rules

torch.set_num_threads(1)


@pytest.fixture
def setting() -> Iterator[Setting]:
    made = Setting()
    yield made
    made.oracles.close()


REFUSED: dict[str, dict[str, Any]] = {
    "image": {"pieces": [TWO[0], BAD]},
    "sound": {"pieces": [*SOUNDS, {"audio": {"samples": 0}}]},
    "NaN": {"pieces": [{"audio": {"samples": 100, "wave": "nan"}}]},
    "rate": {"pieces": [SOUNDS[0], {"audio": {"samples": 100, "rate": 8000}}]},
    "video": {"pieces": [*CLIPS, {"video": {"frames": 0, "width": 9, "height": 9}}]},
    "bomb": {"pieces": [{"image": {"width": 9, "height": 9, "claimed": [9000, 9000]}}]},
    "image budget": {"image_budget": 71},
    "frame budget": {"pieces": CLIPS, "frame_budget": 72},
    "placeholders": {"extra_placeholders": 1},
    "placeholders of sounds": {"pieces": SOUNDS, "extra_placeholders": -1},
    "unified": {"pieces": [BAD], "form": "unified"},
}
NAMES: dict[str, tuple[str, ...]] = {
    "image": ("image-2.png", "image 2"),
    "sound": ("audio-3.wav", "audio 3", "sound 3"),
    "NaN": ("audio-1.wav", "audio 1", "sound 1"),
    "rate": ("audio-2.wav", "audio 2", "sound 2"),
    "video": ("video-3.safetensors", "video 3"),
    "bomb": ("image-1.png", "image 1"),
    "image budget": ("71",),
    "frame budget": ("72",),
    "placeholders": ("<|image|>",),
    "placeholders of sounds": ("<|audio|>",),
    "unified": ("image-1.png", "image 1"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_refusal_passes(setting: Setting, what: str) -> None:
    target = Fake()
    outcome = setting.run(target, refused=True, **REFUSED[what])
    assert (outcome.verdict, outcome.problems) == ("pass", ())
    assert len(target.requests) == 2
    assert target.requests[1].form == target.requests[0].form
    assert [file.kind for file in target.requests[1].media] == [target.requests[0].media[0].kind]
    assert setting.oracle.requests == []
    named = " or ".join(NAMES[what])
    assert outcome.evidence.expected == f"An error that names {named}, and an answer to the next request."
    assert NAMES[what][0] in outcome.evidence.got["error"]
    assert "/" not in outcome.evidence.got["error"].replace("</", "").replace("or/", "")


@pytest.mark.parametrize("what", REFUSED)
def test_an_error_that_names_nothing(setting: Setting, what: str) -> None:
    target = Fake(fails=fails_at(0, error=EngineError("ValueError: bad input")))
    outcome = setting.run(target, refused=True, **REFUSED[what])
    assert rules(outcome) == ["unnamed-input"]
    assert outcome.problems[0].message == f"the error does not name {' or '.join(NAMES[what])}"


@pytest.mark.parametrize("what", NAMES)
def test_a_file_or_its_number_is_a_name(setting: Setting, what: str) -> None:
    for name in NAMES[what]:
        target = Fake(fails=fails_at(0, error=EngineError(f"ValueError: {name} is bad")))
        assert setting.run(target, refused=True, **REFUSED[what]).verdict == "pass"


@pytest.mark.parametrize("text", ["Image 2 is bad", "bad: image 2"])
def test_a_number_is_of_its_kind(setting: Setting, text: str) -> None:
    """The second image, which is the third piece."""
    pieces = [TWO[0], SOUNDS[0], BAD]
    assert rules(setting.run(fails_first(text), pieces=pieces, refused=True)) == []


@pytest.mark.parametrize("text", ["image 1", "image 3", "image 22", "video 2", "2", "image-1.png"])
def test_another_number_is_none(setting: Setting, text: str) -> None:
    pieces = [TWO[0], SOUNDS[0], BAD]
    assert rules(setting.run(fails_first(text), pieces=pieces, refused=True)) == ["unnamed-input"]


def fails_first(text: str) -> Fake:
    return Fake(fails=fails_at(0, error=EngineError(text)))


SHORT: dict[str, dict[str, Any]] = {
    "sampled": {"pieces": CLIPS[:1], "sample_frames": True},
    "without a frame": {"pieces": [{"video": {"frames": 0, "width": 9, "height": 9}}]},
    "beside an image": {"pieces": [CLIPS[0], TWO[0]], "sample_frames": True},
}


@pytest.mark.parametrize("what", SHORT)
def test_frames_of_one_video_need_no_name(setting: Setting, what: str) -> None:
    outcome = setting.run(fails_first("ValueError: 5 frames"), refused=True, **SHORT[what])
    assert outcome.verdict == "pass"
    assert outcome.evidence.expected == "An error, and an answer to the next request."


@pytest.mark.parametrize("what", SHORT)
def test_one_video_must_be_refused_all_the_same(setting: Setting, what: str) -> None:
    pieces = [*SHORT[what]["pieces"]]
    changes = SHORT[what] | {"pieces": [CLIPS[0], *pieces[1:]], "sample_frames": False}
    # What the target is asked is fit to be answered, and the case says that it is not.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "_is_bad", lambda piece, sample_frames: not hasattr(piece, "image"))
        outcome = setting.run(Fake(), refused=True, **changes)
    assert rules(outcome) == ["accepted"]
    assert outcome.problems[0].message == "the video must be refused, and was answered"
    broken = Fake(fails=fails_at(0, 1, error=EngineError("broken for good")))
    assert rules(setting.run(broken, refused=True, **SHORT[what])) == ["next-request"]


def test_the_name_of_a_good_file_does_not_count(setting: Setting) -> None:
    target = Fake(fails=fails_at(0, error=EngineError("OSError: image-1.png")))
    assert rules(setting.run(target, pieces=[TWO[0], BAD], refused=True)) == ["unnamed-input"]


def test_a_longer_number_does_not_name_a_budget(setting: Setting) -> None:
    for text, broken in (
        ("got 71.", []),
        ("index 712", ["unnamed-input"]),
        ("17 and 171", ["unnamed-input"]),
    ):
        target = Fake(fails=fails_at(0, error=EngineError(f"ValueError: {text}")))
        assert rules(setting.run(target, image_budget=71, refused=True)) == broken


def test_any_file_may_be_named_where_none_is_known_to_be_bad(setting: Setting) -> None:
    for name, broken in (("image-1.png", []), ("image-2.png", []), ("image-3.png", ["unnamed-input"])):
        target = Fake(fails=fails_at(0, error=EngineError(f"OSError: {name}")))
        assert rules(setting.run(target, refused=True)) == broken


@pytest.mark.parametrize("kind", MARKERS)
def test_what_is_answered_is_accepted(setting: Setting, kind: str) -> None:
    pieces = {"image": TWO, "video": CLIPS, "audio": SOUNDS}[kind]
    outcome = setting.run(Fake(), pieces=pieces, refused=True)
    assert rules(outcome) == ["accepted"]
    assert "must be refused, and was answered" in outcome.problems[0].message
    assert f"{kind}-1" in outcome.problems[0].message


@pytest.mark.parametrize("form", ["tower", "unified"])
@pytest.mark.parametrize("what", ["image", "sound", "video"])
def test_the_next_request_must_be_answered_rightly(setting: Setting, form: str, what: str) -> None:
    pieces = REFUSED[what]["pieces"]

    def spoil(made: Tensors) -> None:
        name = next(name for name in made if name.endswith(("pixels", "features")))
        made[name][0, 0, 0] = float("nan")

    broken = {
        "the request after it raised": Fake(fails=fails_at(1, error=EngineError("still broken"))),
        "the request after it got another prompt": Fake(prompt=lambda prompt: prompt.replace("more", "mor")),
        "the request after it: ": Fake(spoil),
    }
    for message, target in broken.items():
        outcome = setting.run(target, form=form, pieces=pieces, refused=True)
        assert rules(outcome) == ["next-request"]
        assert outcome.problems[0].message.startswith(message)
    assert setting.run(Fake(), form=form, pieces=pieces, refused=True).verdict == "pass"


def test_both_can_be_wrong(setting: Setting) -> None:
    target = Fake(fails=fails_at(0, 1, error=EngineError("broken for good")))
    assert rules(setting.run(target, pieces=[BAD], refused=True)) == ["unnamed-input", "next-request"]


def test_a_processor_that_exits_has_not_refused(setting: Setting) -> None:
    """Also one that names the input before."""
    target = Fake(fails=fails_at(0, error=EngineError("image-1.png", exited=True)))
    outcome = setting.run(target, pieces=[BAD], refused=True)
    assert rules(outcome) == ["exits"]
    assert outcome.problems[0].got == "image-1.png"
    target = Fake(fails=fails_at(0, 1, error=EngineError("image-1.png", exited=True)))
    assert rules(setting.run(target, pieces=[BAD], refused=True)) == ["exits", "next-request"]


def test_an_exit_in_this_process_is_one_too(setting: Setting) -> None:
    class Exits(Fake):
        def preprocess(self, request: PreprocessRequest) -> PreprocessResult:
            raise SystemExit(1)

    assert rules(setting.run(Exits(), pieces=[BAD], refused=True)) == ["exits", "next-request"]


def test_a_processor_that_exits_where_it_need_not_refuse_judges_nothing(setting: Setting) -> None:
    target = Fake(fails=fails_at(0, error=EngineError("image-1.png", exited=True)))
    with pytest.raises(EngineError, match=r"^image-1\.png$"):
        setting.run(target)


def test_what_an_error_says_is_no_exit(setting: Setting) -> None:
    target = fails_first("SystemExit: 1")
    assert rules(setting.run(target, pieces=[BAD], refused=True)) == ["unnamed-input"]


@pytest.mark.parametrize("number", [0, 1])
def test_what_cannot_be_asked_is_skipped(setting: Setting, number: int) -> None:
    target = Fake(fails=fails_at(number, error=NotAskedError("image-1.png: no decoder")))
    outcome = setting.run(target, pieces=[BAD], refused=True)
    assert (outcome.verdict, outcome.problems) == ("skip", ())
    assert outcome.reason == "fake cannot be asked: image-1.png: no decoder"


def test_what_cannot_be_asked_is_no_failure(setting: Setting) -> None:
    target = Fake(fails=fails_at(0, error=NotAskedError("image-1.png: no decoder")))
    assert setting.run(target).verdict == "skip"


def test_an_oracle_that_cannot_be_asked_is_an_error(setting: Setting) -> None:
    setting.oracle.fails = fails_at(0, error=NotAskedError("audio-1.wav: no decoder"))
    with pytest.raises(EngineError, match=r"oracle .* cannot be asked: audio-1\.wav: no decoder"):
        setting.run(Fake())


def test_the_oracle_hears_sounds_in_wav(setting: Setting) -> None:
    flac = {"audio": {"samples": 1600, "format": "flac"}}
    target = Fake()
    assert setting.run(target, pieces=[flac, SOUNDS[1]]).verdict == "pass"
    assert [Path(file.path).name for file in target.requests[0].media] == ["audio-1.flac", "audio-2.wav"]
    assert [Path(file.path).name for file in setting.oracle.requests[0].media] == [
        "audio-1.wav",
        "audio-2.wav",
    ]
    louder = Fake(lambda made: made["audio.features"].mul_(1.01))
    assert rules(setting.run(louder, pieces=[flac])) == ["features"]


ADAPTER = """\
from conformance.errors import NotAskedError

class Adapter:
    def describe(self):
        return {"name": "exits", "version": "1", "capabilities": ["preprocess"]}

    def preprocess(self, request):
        kind = request["prompt"]
        if kind == "exit":
            raise SystemExit(1)
        if kind == "interrupt":
            raise KeyboardInterrupt
        if kind == "cannot":
            raise NotAskedError("no decoder")
        raise ValueError("SystemExit: 1")

def create():
    return Adapter()
"""


def test_a_worker_tells_exits_from_what_is_said(tmp_path: Path) -> None:
    (tmp_path / "adapters_that_exit").mkdir()
    (tmp_path / "adapters_that_exit" / "__init__.py").touch()
    (tmp_path / "adapters_that_exit" / "one.py").write_text(ADAPTER, encoding="utf-8")
    target = WorkerTarget(
        "exits@1", python=Path(sys.executable), adapter="adapters_that_exit.one", import_paths=[tmp_path]
    )

    def raised(prompt: str) -> EngineError:
        with pytest.raises(EngineError) as caught:
            target.preprocess(PreprocessRequest(form="tower", prompt=prompt, media=(), output="unused"))
        return caught.value

    with contextlib.closing(target):
        assert [raised(prompt).exited for prompt in ("exit", "interrupt", "value")] == [True, True, False]
        worker = target._worker
        with pytest.raises(NotAskedError, match=r"^no decoder$"):
            target.preprocess(PreprocessRequest(form="tower", prompt="cannot", media=(), output="unused"))
        assert target._worker is worker, "a request that was not asked has ended the worker"


def test_a_processor_that_exits_after_a_refusal(setting: Setting) -> None:
    target = Fake(fails=fails_at(1, error=EngineError("SystemExit: 1", exited=True)))
    outcome = setting.run(target, pieces=[BAD], refused=True)
    assert "next-request" in rules(outcome)
    assert "SystemExit" in outcome.problems[-1].message


SUITE = """\
kind: processor
id: processor/demo
title: Demo
description: Made by a test.
area: demo
oracle: lying_targets:Oracle
cases:
  - id: first
    title: A case of this test.
    source: [spec 3.1]
    pieces: [{image: {width: 8, height: 8, damage: empty}}]
    refused: true
  - id: second
    title: Another case of this test.
    source: [spec 3.1]
    pieces: [{image: {width: 9, height: 9, damage: empty}}]
    refused: true
"""


@pytest.fixture
def loaded(tmp_path: Path) -> Sequence[LoadedCase]:
    path = tmp_path / "suites" / "processor" / "demo.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(SUITE, encoding="utf-8")
    [suite] = load_suites([path])
    return suite.cases


@pytest.mark.parametrize("code", [0, 1, "no torchvision"])
def test_an_exit_inside_a_processor_costs_one_case(
    loaded: Sequence[LoadedCase], monkeypatch: pytest.MonkeyPatch, code: object
) -> None:
    load_image = images.load_image

    def exits_once(*arguments: Any, **options: Any) -> Tensor:
        monkeypatch.setattr(images, "load_image", load_image)
        sys.exit(code)  # type: ignore[arg-type]

    monkeypatch.setattr(images, "load_image", exits_once)
    with contextlib.closing(TargetPool()) as pool:
        first, second = (run_case(case, "reference", pool, Expectations(())) for case in loaded)
    assert [(problem.rule, problem.got) for problem in first.problems] == [("exits", f"SystemExit: {code}")]
    assert second.verdict == "pass"


def test_an_interrupt_ends_the_run(loaded: Sequence[LoadedCase], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **options: Any) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(images, "load_image", interrupted)
    with contextlib.closing(TargetPool()) as pool, pytest.raises(KeyboardInterrupt):
        run_case(loaded[0], "reference", pool, Expectations(()))


def test_every_kind_has_a_good_piece() -> None:
    assert set(check._GOOD) == set(check._PLACEHOLDERS) == set(MARKERS)
    assert all(isinstance(piece, MediaPiece) for piece, _ in check._GOOD.values())
