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
from conformance.errors import EngineError
from conformance.expectations import Expectations
from conformance.loading import LoadedCase, load_suites
from conformance.media import MARKERS, MediaPiece
from conformance.runner import TargetPool, run_case
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
    "video": {"pieces": [*CLIPS, {"video": {"frames": 0, "width": 9, "height": 9}}]},
    "short video": {"pieces": CLIPS[:1], "sample_frames": True},
    "bomb": {"pieces": [{"image": {"width": 9, "height": 9, "claimed": [9000, 9000]}}]},
    "image budget": {"image_budget": 71},
    "frame budget": {"pieces": CLIPS, "frame_budget": 72},
    "placeholders": {"extra_placeholders": 1},
    "placeholders of sounds": {"pieces": SOUNDS, "extra_placeholders": -1},
    "unified": {"pieces": [BAD], "form": "unified"},
}
NAMES = {
    "image": "image-2.png",
    "sound": "audio-3.wav",
    "NaN": "audio-1.wav",
    "video": "video-3.safetensors",
    "short video": "video-1.safetensors",
    "bomb": "image-1.png",
    "image budget": "71",
    "frame budget": "72",
    "placeholders": "<|image|>",
    "placeholders of sounds": "<|audio|>",
    "unified": "image-1.png",
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
    assert (
        outcome.evidence.expected == f"An error that names {NAMES[what]}, and an answer to the next request."
    )
    assert NAMES[what] in outcome.evidence.got["error"]
    assert "/" not in outcome.evidence.got["error"].replace("</", "").replace("or/", "")


@pytest.mark.parametrize("what", REFUSED)
def test_an_error_that_names_nothing(setting: Setting, what: str) -> None:
    target = Fake(fails=fails_at(0, error=EngineError("ValueError: bad input")))
    outcome = setting.run(target, refused=True, **REFUSED[what])
    assert rules(outcome) == ["unnamed-input"]
    assert outcome.problems[0].message == f"the error does not name {NAMES[what]}"


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


@pytest.mark.parametrize("changes", [{}, {"pieces": [BAD], "refused": True}])
@pytest.mark.parametrize("text", ["SystemExit: 1", "SystemExit: ", "KeyboardInterrupt: "])
def test_a_processor_that_exits_has_not_refused(setting: Setting, changes: dict[str, Any], text: str) -> None:
    target = Fake(fails=fails_at(0, error=EngineError(text)))
    with pytest.raises(EngineError, match=f"^{text}$"):
        setting.run(target, **changes)


def test_a_processor_that_exits_after_a_refusal(setting: Setting) -> None:
    target = Fake(fails=fails_at(1, error=EngineError("SystemExit: 1")))
    with pytest.raises(EngineError, match="SystemExit"):
        setting.run(target, pieces=[BAD], refused=True)


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
    assert (first.verdict, first.reason) == ("error", f"SystemExit: {code}")
    assert "exits_once" in first.stderr
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
