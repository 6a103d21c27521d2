"""The processor check: each rule, on targets that lie about one thing."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.checks import judge
from conformance.errors import EngineError
from conformance.oracles import Oracles
from conformance.targets import environments, registry
from conformance.targets.protocol import PreprocessRequest, PreprocessResult
from tests.lying_processors import (
    ALL,
    BAD,
    CLIPS,
    ORACLE,
    SOUNDS,
    TWO,
    Change,
    Fake,
    Rewrite,
    Setting,
    Tensors,
    fails_at,
    processor_case,
    processor_suite,
    rules,
)

torch.set_num_threads(1)


@pytest.fixture
def setting() -> Iterator[Setting]:
    made = Setting()
    yield made
    made.oracles.close()


def put(name: str, place: tuple[int, ...], value: object) -> Change:
    def change(made: Tensors) -> None:
        made[name][place] = value

    return change


def add(name: str, place: tuple[int, ...], value: float) -> Change:
    def change(made: Tensors) -> None:
        made[name][place] += value

    return change


def replace(name: str, by: Callable[[Tensor], Tensor]) -> Change:
    return lambda made: made.update({name: by(made[name])})


def pad(name: str, length: int, value: float) -> Change:
    """Padded behind along the second axis; cut where the length is negative."""
    return replace(
        name,
        lambda old: (
            old[:, :length]
            if length < 0
            else torch.cat([old, torch.full_like(old[:, :1], value).repeat_interleave(length, 1)], dim=1)
        ),
    )


def both(*changes: Change) -> Change:
    return lambda made: [change(made) for change in changes]


def fewer(token: str) -> Rewrite:
    return lambda prompt: prompt.replace(token, "", 1)


# -------------------------------------------------------------------------------------------- the truth


@pytest.mark.parametrize("form", ["tower", "unified"])
def test_the_truth_passes(setting: Setting, form: str) -> None:
    outcome = setting.run(Fake(), form=form, pieces=ALL)
    assert (outcome.verdict, outcome.problems) == ("pass", ())


def test_what_is_asked_is_in_the_evidence(setting: Setting) -> None:
    target = Fake()
    outcome = setting.run(target, soft_tokens=[63, 63])
    [request] = target.requests
    assert request.prompt == (
        "<bos><|turn>user\n<|image|> and <|image|> and more: compare.<turn|>\n<|turn>model\n"
    )
    assert [Path(file.path).name for file in request.media] == ["image-1.png", "image-2.png"]
    evidence = outcome.evidence
    assert json.loads(evidence.input) == {
        "form": "tower",
        "prompt": request.prompt,
        "image budget": 70,
        "pieces": TWO,
    }
    seen = "<|image>63x<|image|><image|>"
    assert evidence.got == {
        "prompt": f"<bos><|turn>user\n{seen} and {seen} and more: compare.<turn|>\n<|turn>model\n",
        "tensors": {"image.pixels": "float32 [2, 630, 768]", "image.positions": "int64 [2, 630, 2]"},
    }
    assert evidence.expected == evidence.got | {
        "soft tokens": [63, 63],
        "as": f"{ORACLE}, pixels and features within 1e-05",
    }


def test_only_settings_that_matter_are_in_the_evidence(setting: Setting) -> None:
    videos = json.loads(setting.run(Fake(), pieces=CLIPS).evidence.input)
    assert (videos["frame budget"], videos["frames"]) == (70, "all")
    assert "image budget" not in videos
    assert set(json.loads(setting.run(Fake(), pieces=SOUNDS).evidence.input)) == {"form", "prompt", "pieces"}


def test_the_oracle_gets_the_same_request_and_is_asked_once(setting: Setting) -> None:
    targets = [Fake(), Fake(spec="other")]
    for target in targets:
        assert setting.run(target, pieces=ALL).verdict == "pass"
    asked = [request for target in (setting.oracle, *targets) for request in target.requests]
    assert len(asked) == 3
    assert len({request.output for request in asked}) == 3
    assert len({request.model_copy(update={"output": ""}).model_dump_json() for request in asked}) == 1


def test_a_targets_tensors_are_deleted(setting: Setting) -> None:
    target = Fake()
    setting.run(target)
    setting.run(target, pieces=[BAD], refused=True)
    assert [Path(request.output).exists() for request in target.requests] == [False, False, False]
    assert Path(setting.oracle.requests[0].output).exists()


@pytest.mark.parametrize(
    ("pieces", "extra", "placeholders"),
    [
        (TWO, 1, "<|image|> and <|image|> and <|image|>"),
        (TWO, -1, "<|image|>"),
        (TWO, -2, ""),
        ([TWO[0], SOUNDS[0], TWO[1], SOUNDS[1]], -1, "<|image|> and <|audio|> and <|audio|>"),
        (
            [SOUNDS[0], TWO[0], CLIPS[0]],
            2,
            "<|audio|> and <|image|> and <|video|> and <|audio|> and <|audio|>",
        ),
    ],
)
def test_placeholders_too_many_or_too_few(
    setting: Setting, pieces: list[Any], extra: int, placeholders: str
) -> None:
    target = Fake()
    setting.run(target, pieces=pieces, extra_placeholders=extra, refused=True)
    assert re.findall(r"<\|\w+\|>", target.requests[0].prompt) == re.findall(r"<\|\w+\|>", placeholders)


# ---------------------------------------------------------------------------------------------- the lies

LIES: dict[str, tuple[list[Any], Fake, list[str], str]] = {
    # what: pieces, who lies, the rules it breaks, what the first one says
    "a timestamp": (
        CLIPS,
        Fake(prompt=lambda prompt: prompt.replace("00:01", "00:02", 1)),
        ["prompt"],
        r"the prompt differs behind '.*64x<\|video\|><image\|> 00:0': '2 <\|image>.*' and not '1 <\|image>",
    ),
    "a blank": (
        TWO,
        Fake(prompt=lambda prompt: prompt.replace(" and", "", 1)),
        ["prompt"],
        "the prompt differs behind",
    ),
    "what is behind": (
        TWO,
        Fake(prompt=lambda prompt: prompt + "!"),
        ["prompt"],
        r"'!' and not ''",
    ),
    "a soft token": (
        TWO,
        Fake(prompt=fewer("<|image|>")),
        ["soft-tokens", "prompt"],
        r"image: the prompt has \[62, 63\] soft tokens, and the tensors make \[63, 63\]",
    ),
    "a soft token of a sound": (
        SOUNDS,
        Fake(prompt=lambda prompt: prompt.replace("<|audio|>", "<|audio|>" * 4, 1)),
        ["soft-tokens", "prompt"],
        r"audio: the prompt has \[6, 1\] soft tokens, and the tensors make \[3, 1\]",
    ),
    "markers left out": (
        TWO,
        Fake(prompt=lambda prompt: prompt.replace("<|image>", "")),
        ["soft-tokens", "prompt"],
        r"image: the prompt has \[\] soft tokens",
    ),
    "frames with the tokens of images": (
        CLIPS,
        Fake(prompt=lambda prompt: prompt.replace("<|video|>", "<|image|>")),
        ["soft-tokens", "prompt"],
        r"video: the prompt has \[\] soft tokens",
    ),
    "columns for rows": (
        TWO,
        Fake(replace("image.positions", lambda old: old.flip(-1))),
        ["positions"],
        r"image\.positions: image 1, patch 2 is \[0, 1\] and not \[1, 0\]; \d+ are wrong",
    ),
    "one position": (
        TWO,
        Fake(put("image.positions", (1, 16), torch.tensor([3, 4]))),
        ["positions"],
        r"image 2, patch 17 is \[3, 4\] and not \[16, 0\]; 1 are wrong",
    ),
    "a position of a frame": (
        CLIPS,
        Fake(put("video.positions", (3, 0), torch.tensor([1, 1]))),
        ["positions"],
        r"video\.positions: video 2, frame 2, patch 1 is",
    ),
    "padding that is none": (
        TWO,
        Fake(put("image.positions", (0, 629), torch.tensor([1, 1]))),
        ["positions"],
        r"image 1, patch 630 is \[1, 1\] and not \[-1, -1\]",
    ),
    "nine patches taken for padding": (
        TWO,
        Fake(put("image.positions", (0, slice(0, 9)), -1)),
        ["soft-tokens", "positions"],
        r"the prompt has \[63, 63\] soft tokens, and the tensors make \[62, 63\]",
    ),
    "a value": (
        TWO,
        Fake(add("image.pixels", (1, 16, 2), 1 / 255)),
        ["pixels"],
        r"image\.pixels: image 2, patch 17, value 3 is 0\.\d+ and not 0\.\d+ \(limit 1e-05\); 1 of 967680",
    ),
    "a value of a frame": (
        CLIPS,
        Fake(add("video.pixels", (4, 1, 0), 0.5)),
        ["pixels"],
        r"video\.pixels: video 2, frame 3, patch 2, value 1 is",
    ),
    "pictures in each other's place": (
        TWO,
        Fake(replace("image.pixels", lambda old: old.flip(0))),
        ["pixels"],
        r"image 1, patch 1, value 1 is",
    ),
    "garbage in the padding": (
        TWO,
        Fake(put("image.pixels", (0, 629, 767), 0.1)),
        ["pixels"],
        r"image 1, patch 630, value 768 is 0\.1 and not 0",
    ),
    "a bin": (
        SOUNDS,
        Fake(add("audio.features", (1, 2, 127), 2e-5)),
        ["features"],
        r"audio\.features: sound 2, mel frame 3, bin 128 is",
    ),
    "a frame of padding that counts": (
        SOUNDS,
        Fake(put("audio.mask", (1, 4), True)),
        ["soft-tokens", "mask"],
        r"audio: the prompt has \[3, 1\] soft tokens, and the tensors make \[3, 2\]",
    ),
    "a frame that does not count": (
        SOUNDS,
        Fake(put("audio.mask", (1, 3), False)),
        ["mask"],
        r"audio\.mask: sound 2, mel frame 4 is False and not True; 1 are wrong",
    ),
    "NaN": (
        TWO,
        Fake(put("image.pixels", (1, 16, 2), float("nan"))),
        ["not-finite"],
        r"image\.pixels holds NaN or infinity, first in image 2, patch 17, value 3",
    ),
    "infinity": (
        SOUNDS,
        Fake(put("audio.features", (0, 1, 5), float("-inf"))),
        ["not-finite"],
        r"audio\.features holds NaN or infinity, first in sound 1, mel frame 2, bin 6",
    ),
    "one picture of two": (
        TWO,
        Fake(both(*(replace(f"image.{name}", lambda old: old[:1]) for name in ("pixels", "positions")))),
        ["shape", "shape"],
        r"image\.pixels is float32 \[1, 630, 768\] and not float32 \[2, length, 768\]",
    ),
    "half the values": (
        TWO,
        Fake(replace("image.pixels", lambda old: old[..., :384])),
        ["shape"],
        r"float32 \[2, 630, 384\]",
    ),
    "no batch": (
        TWO,
        Fake(replace("image.pixels", lambda old: old.flatten(0, 1))),
        ["shape"],
        r"float32 \[1260, 768\]",
    ),
    "other lengths": (
        TWO,
        Fake(pad("image.pixels", 9, 0)),
        ["shape"],
        r"image\.pixels \[2, 639, 768\] and image\.positions \[2, 630, 2\] differ in length",
    ),
    "half precision": (
        TWO,
        Fake(replace("image.pixels", lambda old: old.half())),
        ["shape"],
        r"image\.pixels is float16 \[2, 630, 768\] and not float32",
    ),
    "a mask of numbers": (
        SOUNDS,
        Fake(replace("audio.mask", lambda old: old.long())),
        ["shape"],
        r"audio\.mask is int64 \[2, 10\] and not bool \[2, length\]",
    ),
    "frames of other videos": (
        CLIPS,
        Fake(put("video.frames", (0,), 3)),
        ["frames"],
        r"video\.frames is \[3, 3\] and not \[2, 3\]",
    ),
    "no positions": (
        TWO,
        Fake(lambda made: made.pop("image.positions")),
        ["missing-tensor"],
        r"there is no tensor image\.positions",
    ),
    "a sound nobody gave": (
        TWO,
        Fake(lambda made: made.update({"audio.mask": torch.ones(1, 1, dtype=torch.bool)})),
        ["extra-tensor"],
        r"audio\.mask: there is no such media",
    ),
}


@pytest.mark.parametrize("what", LIES)
def test_each_lie_breaks_its_rule(setting: Setting, what: str) -> None:
    pieces, target, broken, message = LIES[what]
    outcome = setting.run(target, pieces=pieces)
    assert (outcome.verdict, rules(outcome)) == ("fail", broken)
    assert re.search(message, outcome.problems[0].message), outcome.problems[0].message
    assert setting.run(Fake(), pieces=pieces).verdict == "pass"


UNIFIED: dict[str, tuple[list[Any], Fake, list[str], str]] = {
    "a value of a tile": (
        TWO,
        Fake(add("image.pixels", (1, 3, 5), 0.1)),
        ["pixels"],
        r"image 2, tile 4, value 6 is .* by 0\.1 at most",
    ),
    "a sample": (
        SOUNDS,
        Fake(add("audio.features", (0, 1, 5), 1e-4)),
        ["features"],
        r"sound 1, stretch 2, sample 6 is",
    ),
    "what a tower reads": (
        TWO,
        Fake(replace("image.pixels", lambda old: old[..., :768])),
        ["shape"],
        r"not float32 \[2, length, 6912\]",
    ),
    "tokens by a tower's count": (
        SOUNDS[:1],
        Fake(prompt=fewer("<|audio|>")),
        ["soft-tokens", "prompt"],
        r"audio: the prompt has \[2\] soft tokens, and the tensors make \[3\]",
    ),
}


@pytest.mark.parametrize("what", UNIFIED)
def test_lies_about_the_unified_model(setting: Setting, what: str) -> None:
    pieces, target, broken, message = UNIFIED[what]
    outcome = setting.run(target, form="unified", pieces=pieces)
    assert (outcome.verdict, rules(outcome)) == ("fail", broken)
    assert re.search(message, outcome.problems[0].message), outcome.problems[0].message


def test_counts_of_the_case_hold_besides_the_oracles(setting: Setting) -> None:
    assert setting.run(Fake(), pieces=ALL, soft_tokens=[3, 63, 64, 64, 63, 1]).verdict == "pass"
    outcome = setting.run(Fake(prompt=fewer("<|image|>")), pieces=ALL, soft_tokens=[3, 63, 64, 64, 63, 1])
    assert rules(outcome) == ["soft-tokens", "soft-tokens", "prompt"]
    assert outcome.problems[0].got == [3, 62, 64, 64, 63, 1]


@pytest.mark.parametrize(("value", "verdict"), [(5e-6, "pass"), (2e-5, "fail")])
def test_pixels_have_the_cases_tolerance(setting: Setting, value: float, verdict: str) -> None:
    target = Fake(add("image.pixels", (0, 0, 0), value))
    assert setting.run(target).verdict == verdict
    assert setting.run(target, tolerance=1e-4).verdict == "pass"
    assert setting.run(target, tolerance=1e-6).verdict == "fail"


@pytest.mark.parametrize("length", [9, -63])
def test_padding_may_be_of_any_length(setting: Setting, length: int) -> None:
    target = Fake(both(pad("image.pixels", length, 0), pad("image.positions", length, -1)))
    assert setting.run(target).verdict == "pass"
    target = Fake(both(pad("audio.features", 9, 0), pad("audio.mask", 9, False)))
    assert setting.run(target, pieces=SOUNDS).verdict == "pass"


def test_padding_longer_than_the_oracles_is_padding(setting: Setting) -> None:
    seen = Fake(both(pad("image.pixels", 3, 0), pad("image.positions", 3, 1)))
    assert rules(setting.run(seen)) == ["positions"]
    heard = Fake(both(pad("audio.features", 1, 0), pad("audio.mask", 1, True)))
    assert rules(setting.run(heard, pieces=SOUNDS[:1])) == ["mask"]


def test_tensors_that_are_not_there(setting: Setting) -> None:
    class Writeless(Fake):
        def preprocess(self, request: PreprocessRequest) -> PreprocessResult:
            made = super().preprocess(request)
            Path(made.path).unlink()
            return made

    [problem] = setting.run(Writeless()).problems
    assert problem.rule == "missing-tensor"
    assert "cannot be read" in problem.message


def test_an_error_is_told_without_the_folder_of_the_files(setting: Setting) -> None:
    def fails(request: PreprocessRequest) -> None:
        raise EngineError(f"OSError: cannot identify {request.media[1].path!r}")

    [problem] = setting.run(Fake(fails=fails)).problems
    assert problem.rule == "raised"
    assert problem.message == "the processor raised OSError: cannot identify 'image-2.png'"


# ------------------------------------------------------------------------------------------------- skips


def test_a_target_without_processors_is_skipped(setting: Setting) -> None:
    outcome = setting.run(Fake(capabilities=("parse",), unavailable="install the part `images`"))
    assert outcome.verdict == "skip"
    assert outcome.reason == "fake has no capability `preprocess`: install the part `images`"
    assert setting.run(Fake(capabilities=("parse",))).reason == "fake has no capability `preprocess`"


def test_the_oracle_is_judged_by_what_the_case_says(setting: Setting) -> None:
    assert setting.run(setting.oracle).verdict == "skip"
    assert setting.oracle.requests == []
    assert setting.run(setting.oracle, soft_tokens=[63, 63]).verdict == "pass"
    assert rules(setting.run(setting.oracle, soft_tokens=[63, 64])) == ["soft-tokens"]
    assert setting.run(setting.oracle, pieces=[BAD], refused=True).verdict == "pass"
    assert len(setting.oracle.requests) == 4


def test_without_the_oracle_a_case_fails_or_says_nothing(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setting.oracles, "unavailable", lambda spec, part: f"{spec} is not installed")
    reason = f"the oracle {ORACLE} cannot be used: {ORACLE} is not installed"
    unasked = Fake()
    assert (setting.run(unasked).verdict, setting.run(unasked).reason) == ("skip", reason)
    assert unasked.requests == []
    right = setting.run(Fake(), soft_tokens=[63, 63])
    assert (right.verdict, right.reason) == ("skip", reason)
    assert setting.run(Fake(), soft_tokens=[63, 62]).verdict == "fail"
    assert setting.run(Fake(), pieces=[BAD], refused=True).verdict == "pass"
    assert setting.oracle.requests == []


def test_an_oracle_without_what_processes_images_is_none(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = "transformers@5.19.0"
    lacking = {"images": "its part `images` is not installed; run `install`", "other": "no matter"}
    monkeypatch.setattr(registry, "unavailable", lambda spec: "")
    monkeypatch.setattr(environments, "status", lambda spec: SimpleNamespace(lacking=lacking))
    case = processor_case()
    suite = processor_suite(case).model_copy(update={"oracle": spec})
    outcome = judge(case, suite, Fake(), oracles=setting.oracles)  # type: ignore[arg-type]
    assert (outcome.verdict, setting.oracle.requests) == ("skip", [])
    assert outcome.reason == f"the oracle {spec} cannot be used: {lacking['images']}"

    del lacking["images"]
    with contextlib.closing(Oracles(lambda spec: setting.oracle)) as later:  # type: ignore[arg-type, return-value]
        assert judge(case, suite, Fake(), oracles=later).verdict == "pass"  # type: ignore[arg-type]


def test_what_the_oracle_raises_is_no_fault_of_the_target(setting: Setting) -> None:
    setting.oracle.fails = fails_at(0, error=EngineError("it fell over"))
    with pytest.raises(EngineError, match=rf"^the oracle {ORACLE}: it fell over"):
        setting.run(Fake())


def test_an_oracle_that_contradicts_the_case_is_none(setting: Setting) -> None:
    with pytest.raises(
        EngineError, match=rf"^the oracle {ORACLE} breaks `soft-tokens`: the prompt has \[63, 63\]"
    ):
        setting.run(Fake(), soft_tokens=[64, 64])
    setting.oracle.change = put("image.pixels", (0, 0, 0), float("inf"))
    with pytest.raises(EngineError, match="breaks `not-finite`"):
        setting.run(Fake(), pieces=TWO[:1])
