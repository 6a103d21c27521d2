"""The mask check: each of its rules, on targets that break it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from conformance.checks import CheckOutcome, judge
from conformance.checks import mask as mask_check
from conformance.checks.visibility import FULL, SLIDING, Visibility
from conformance.errors import EngineError
from conformance.oracles import Oracles
from conformance.suites import MaskCase, MaskSuite
from conformance.targets.protocol import Feature, ForwardRequest, ForwardResult, TargetInfo
from tests import lying_masks as liars
from tests.lying_masks import Honest

torch.set_num_threads(1)

IDS = {
    "image_token_id": 90,
    "video_token_id": 91,
    "audio_token_id": 92,
    "boi_token_id": 93,
    "eoi_token_id": 94,
    "boa_token_id": 95,
    "eoa_token_id": 96,
}

_VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_TEXT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "layer_types": [SLIDING, FULL, SLIDING, FULL],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


def config(window: int, attention: str | None = "vision") -> dict[str, Any]:
    text = {**_TEXT, "sliding_window": window, "use_bidirectional_attention": attention}
    audio = {"model_type": "gemma4_audio"}
    return {
        **IDS,
        "model_type": "gemma4",
        "vision_config": _VISION,
        "audio_config": audio,
        "text_config": text,
    }


CONFIGS = {
    "fits": config(40),
    "edge": config(34),
    "short": config(12),
    "causal": config(40, None),
    "causal-short": config(12, None),
    "text": {**_TEXT, "sliding_window": 12},
}
WIDE = {"image": {"width": 900, "height": 50}}
"""35 soft tokens."""
ONE_IMAGE = {"image_budget": 70, "pieces": [[{"text": 4}, WIDE, {"text": 3}]]}
"""Tokens 5 to 39 are the image's."""
NEXT = {"image_budget": 70, "pieces": [[{"text": 4}, WIDE, WIDE, {"text": 3}]]}
SOUND = {"pieces": [[{"text": 4}, {"audio": {"samples": 7000}}, {"text": 3}]]}
ROWS = {"image_budget": 70, "pieces": [[{"text": 20}], [{"text": 4}, WIDE, {"text": 3}], [{"text": 30}]]}


@pytest.fixture(scope="module")
def oracles() -> Iterator[Oracles]:
    def write(config: dict[str, Any], folder: Path, seed: int) -> None:
        (folder / "config.json").write_text(json.dumps(config))

    def nobody(spec: str) -> Any:
        raise AssertionError(f"no other engine may be asked, not {spec}")

    made = Oracles(nobody, write)
    yield made
    made.close()


def run(oracles: Oracles, target: Any, config: str, rows: dict[str, Any], **changes: Any) -> CheckOutcome:
    values = {
        "id": "demo",
        "title": "A case of this test.",
        "source": ["spec 3.6"],
        "config": config,
        "rows": rows,
        **changes,
    }
    case = MaskCase.model_validate(values)
    suite = MaskSuite(
        kind="mask",
        id="mask/demo",
        title="Demo",
        description="Made by a test.",
        area="demo",
        configs=CONFIGS,
        cases=(case,),
    )
    return judge(case, suite, target, oracles=oracles)


@pytest.mark.parametrize("rows", [ONE_IMAGE, NEXT, SOUND, ROWS], ids=["one-image", "next", "sound", "rows"])
@pytest.mark.parametrize("name", ["fits", "edge", "short", "causal"])
@pytest.mark.parametrize("mode", [None, "drop", "clamp_past", "clamp_both"])
def test_an_honest_target_passes(oracles: Oracles, name: str, rows: dict[str, Any], mode: str | None) -> None:
    """The bundled implementation's masks are those of the rule."""
    outcome = run(oracles, Honest(), name, rows, long_blocks=mode)
    assert (outcome.verdict, outcome.problems) == ("pass", ())


@pytest.mark.parametrize(
    ("lie", "name", "rows", "rules"),
    [
        (liars.OpensFullLayers, "fits", ONE_IMAGE, {"full-layer"}),
        (liars.NeverOpens, "fits", ONE_IMAGE, {"block-closed"}),
        (liars.NeverOpens, "edge", ONE_IMAGE, {"long-block"}),
        (liars.DropsLongImages, "edge", ONE_IMAGE, {"long-block"}),
        (liars.DropsLongImages, "short", NEXT, {"long-block"}),
        (liars.ClampsTheFuture, "edge", ONE_IMAGE, {"future-clamp"}),
        (liars.ClampsTheFuture, "short", NEXT, {"future-clamp"}),
        (liars.ClampsFullLayers, "short", ONE_IMAGE, {"full-window"}),
        (liars.OpensFullLayersUpToTheWindow, "fits", ONE_IMAGE, {"full-layer"}),
        (liars.OpensFullLayersUpToTheWindow, "edge", ONE_IMAGE, set()),
        (liars.CrossesTheWindow, "edge", ONE_IMAGE, {"block-window"}),
        (liars.CrossesTheWindow, "fits", ONE_IMAGE, set()),
        (liars.MergesNeighbours, "fits", NEXT, {"merged-blocks"}),
        (liars.MergesNeighbours, "fits", ONE_IMAGE, set()),
        (liars.OpensEverywhere, "causal", ONE_IMAGE, {"causal-model"}),
        (liars.OpensEverywhere, "fits", ONE_IMAGE, set()),
        (liars.OpensSounds, "fits", SOUND, {"sound"}),
        (liars.OpensSounds, "causal", SOUND, {"sound"}),
        (liars.OpensSounds, "fits", ONE_IMAGE, set()),
        (liars.OpensDelimiters, "fits", ONE_IMAGE, {"future"}),
        (liars.WindowTooLong, "text", {"random": [13]}, {"window"}),
        (liars.WindowTooLong, "text", {"random": [12]}, set()),
        (liars.WindowTooLong, "causal-short", ONE_IMAGE, {"window"}),
        (liars.WindowTooLong, "short", ONE_IMAGE, {"window", "block-window"}),
        (liars.WindowTooShort, "short", ONE_IMAGE, {"window"}),
        (liars.WindowTooShort, "text", {"random": [12]}, {"window"}),
        (liars.WindowTooShort, "text", {"random": [11]}, set()),
        (liars.ForgetsTheWindow, "short", ONE_IMAGE, {"window"}),
        (liars.LastLayerSlides, "text", {"random": [13]}, {"full-window"}),
        (liars.SeesPadding, "text", {"random": [5, 13]}, {"padding", "future"}),
    ],
)
def test_a_lie_breaks_the_rules_of_its_own(
    oracles: Oracles, lie: type[Honest], name: str, rows: dict[str, Any], rules: set[str]
) -> None:
    outcome = run(oracles, lie(), name, rows)
    assert {problem.rule for problem in outcome.problems} == rules
    assert outcome.verdict == ("fail" if rules else "pass")


@pytest.mark.parametrize(
    ("lie", "mode", "rule"),
    [
        (liars.ClampsDropped, "drop", "long-block"),
        (liars.NeverClampsTheFuture, "clamp_both", "future-clamp"),
        (liars.ClampsTheFuture, "clamp_past", "future-clamp"),
        (liars.DropsLongImages, "clamp_past", "long-block"),
    ],
)
def test_a_target_does_what_is_asked_with_long_images(
    oracles: Oracles, lie: type[Honest], mode: str, rule: str
) -> None:
    for name in ("edge", "short"):
        [problem] = run(oracles, lie(), name, ONE_IMAGE, long_blocks=mode).problems
        assert problem.rule == rule


class Changed(Honest):
    """Changes the tensors as it is told."""

    def __init__(self, change: Any) -> None:
        self.told = change

    def change(self, made: dict[str, Tensor], request: ForwardRequest) -> None:
        self.told(made)


def put(value: float, *places: tuple[int, int, int]) -> Changed:
    """A target with another value at places: layer, token of all rows together, key."""

    def change(made: dict[str, Tensor]) -> None:
        for layer, token, key in places:
            made[f"layers.{layer}.self_attn.mask"][token, key] = value

    return Changed(change)


def test_a_problem_names_layer_row_and_tokens_and_counts_pairs(oracles: Oracles) -> None:
    target = put(0.0, (0, 20 + 12, 30), (0, 20 + 12, 31), (2, 20 + 13, 30))
    [problem] = run(oracles, target, "fits", ROWS).problems
    assert problem.rule == "block-closed"
    assert problem.message == (
        "layer 0 (sliding_attention, window 40), row 1: token 12 (image 1, place 8) does not see token 30 "
        "(image 1, place 26) and must; in this layer 2 pairs are wrong like that, and some in layer 2"
    )
    target = put(1.0, (0, 20 + 4, 5), (2, 20 + 4, 5), (3, 20 + 1, 3))
    [problem] = run(oracles, target, "fits", ROWS).problems
    assert problem.rule == "future"
    assert problem.message == (
        "layer 0 (sliding_attention, window 40), row 1: token 4 (marker) sees token 5 (image 1, place 1) and "
        "must not; in this layer 1 pair is wrong like that, and some in layers 2, 3"
    )
    [problem] = run(oracles, put(1.0, (3, 0, 1)), "fits", ROWS).problems
    assert problem.message == (
        "layer 3 (full_attention), row 0: token 0 (text) sees token 1 (text) and must not; in this layer 1 "
        "pair is wrong like that"
    )
    [problem] = run(oracles, put(1.0, (0, 3, 22)), "fits", ROWS).problems
    assert (
        problem.rule,
        "token 3 (text) sees key 22 (the row has 20 tokens) and must not" in problem.message,
    ) == (
        "padding",
        True,
    )


def test_two_rules_are_two_problems(oracles: Oracles) -> None:
    target = put(1.0, (1, 5, 39), (0, 3, 4))
    found = run(oracles, target, "fits", ONE_IMAGE).problems
    assert [problem.rule for problem in found] == ["future", "full-layer"]


def test_pictures_show_the_wrong_place(oracles: Oracles) -> None:
    [problem] = run(oracles, put(0.0, (1, 7, 2)), "text", {"random": [9]}).problems
    assert problem.expected == [
        "keys 0 to 8",
        *[f"query {at:>4}  {'#' * (at + 1)}{'.' * (8 - at)}" for at in range(9)],
    ]
    right, wrong = problem.expected, problem.got
    assert [(a, b) for a, b in zip(right, wrong, strict=True) if a != b] == [
        ("query    7  ########.", "query    7  ##.#####.")
    ]


@pytest.mark.parametrize(("query", "key"), [(0, 99), (99, 0), (50, 50), (99, 99), (3, 70)])
def test_pictures_of_long_rows_are_cut_around_the_wrong_place(oracles: Oracles, query: int, key: int) -> None:
    honest = 1.0 if key <= query else 0.0
    target = put(1 - honest, (1, query, key))
    [problem] = run(oracles, target, "text", {"random": [100]}).problems
    right, wrong = problem.expected, problem.got
    assert len(right) == len(wrong) == 1 + 24
    assert {len(line) for line in right[1:]} == {len("query    0  ") + 40}
    [(a, b)] = [pair for pair in zip(right, wrong, strict=True) if pair[0] != pair[1]]
    assert a.startswith(f"query {query:>4}  ")
    first = int(right[0].split()[1])
    [column] = [at for at, (one, other) in enumerate(zip(a, b, strict=True)) if one != other]
    assert first + column - len("query    0  ") == key


def test_the_evidence_says_what_was_asked_and_what_is_right(oracles: Oracles) -> None:
    evidence = run(oracles, Honest(), "edge", ROWS).evidence
    said = json.loads(evidence.input)
    assert said["config"] == CONFIGS["edge"]
    assert said["rows"] == [
        ["20 text"],
        ["4 text", "1 marker", "35 of image 1", "1 marker", "3 text"],
        ["30 text"],
    ]
    assert "less than 34 away" in evidence.expected
    assert "hides keys that are too far in the past, and none behind" in evidence.expected
    dropped = run(oracles, Honest(), "edge", ROWS, long_blocks="drop").evidence.expected
    assert "longer than the window are attended to causally" in dropped
    assert "like text" in run(oracles, Honest(), "causal", ROWS).evidence.expected


@pytest.mark.parametrize(
    ("change", "rule", "said"),
    [
        (lambda made: made.pop("layers.2.self_attn.mask"), "missing-tensor", "no layers.2.self_attn.mask"),
        (
            lambda made: made.update({"layers.2.self_attn.mask": torch.ones(13, 12)}),
            "shape",
            "has the shape [13, 12] and not [13, 13]",
        ),
        (
            lambda made: made["layers.2.self_attn.mask"].mul_(0.5),
            "shape",
            "holds 0.5, which is neither one nor zero",
        ),
        (
            lambda made: made["layers.2.self_attn.mask"].log_(),
            "shape",
            "layers.2.self_attn.mask holds -inf, which is neither one nor zero",
        ),
    ],
)
def test_what_is_no_mask_does_not_hide_the_others(
    oracles: Oracles, change: Any, rule: str, said: str
) -> None:
    def changed(made: dict[str, Tensor]) -> None:
        change(made)
        made["layers.3.self_attn.mask"][0, 1] = 1

    found = run(oracles, Changed(changed), "text", {"random": [13]}).problems
    assert [problem.rule for problem in found] == [rule, "future"]
    assert said in found[0].message


def test_nan_is_no_mask(oracles: Oracles) -> None:
    [problem] = run(oracles, put(float("nan"), (0, 3, 3)), "text", {"random": [13]}).problems
    assert (problem.rule, "holds nan" in problem.message) == ("shape", True)


def test_a_file_that_is_no_tensor_file(oracles: Oracles) -> None:
    class Rubbish(Honest):
        def forward(self, request: ForwardRequest) -> ForwardResult:
            Path(request.output).write_bytes(b"rubbish")
            return ForwardResult(path=request.output)

    [problem] = run(oracles, Rubbish(), "text", {"random": [13]}).problems
    assert problem.rule == "missing-tensor"
    assert "cannot be read" in problem.message


def test_a_target_that_raises(oracles: Oracles) -> None:
    class Raises(Honest):
        def forward(self, request: ForwardRequest) -> ForwardResult:
            raise EngineError("ValueError: no")

    outcome = run(oracles, Raises(), "text", {"random": [13]})
    assert [(problem.rule, problem.got) for problem in outcome.problems] == [("raised", "ValueError: no")]
    assert json.loads(outcome.evidence.input)["rows"] == [["13 text"]]


def test_the_backend_that_was_asked_for_is_the_one_that_ran(oracles: Oracles) -> None:
    class Eager(Honest):
        def forward(self, request: ForwardRequest) -> ForwardResult:
            return super().forward(request).model_copy(update={"effective": {"attention": "eager"}})

    assert run(oracles, Honest(), "text", {"random": [3]}, attention="flex").verdict == "pass"
    assert run(oracles, Eager(), "text", {"random": [3]}).verdict == "pass"
    [problem] = run(oracles, Eager(), "text", {"random": [3]}, attention="sdpa").problems
    assert (problem.rule, problem.expected, problem.got) == ("wrong-backend", "sdpa", "eager")


@pytest.mark.parametrize(
    ("features", "rows", "changes", "reason"),
    [
        ((), {"random": [3]}, {}, ""),
        ((), SOUND, {}, "masks cannot run forward passes with media"),
        (("media",), SOUND, {}, ""),
        (("media",), ONE_IMAGE, {"long_blocks": "drop"}, "masks cannot run forward passes with long-blocks"),
        (("long-blocks",), ONE_IMAGE, {"long_blocks": "drop"}, "masks cannot run forward passes with media"),
        ((), ONE_IMAGE, {"long_blocks": "drop"}, "masks cannot run forward passes with media, long-blocks"),
    ],
)
def test_a_target_is_asked_for_what_it_can_do(
    oracles: Oracles,
    features: tuple[Feature, ...],
    rows: dict[str, Any],
    changes: dict[str, Any],
    reason: str,
) -> None:
    class Able(Honest):
        def describe(self) -> TargetInfo:
            return super().describe().model_copy(update={"features": features})

    outcome = run(oracles, Able(), "fits" if "pieces" in rows else "text", rows, **changes)
    assert (outcome.verdict, outcome.reason) == ("skip" if reason else "pass", reason)


def test_a_target_without_forward_passes_is_skipped(oracles: Oracles) -> None:
    class Parser(Honest):
        def describe(self) -> TargetInfo:
            return TargetInfo(name="masks", version="1", capabilities=("parse",))

    outcome = run(oracles, Parser(), "text", {"random": [3]})
    assert (outcome.verdict, outcome.reason) == ("skip", "masks has no capability `forward`")


def test_the_target_is_asked_once_for_every_layer_in_one_call(oracles: Oracles) -> None:
    requests: list[ForwardRequest] = []

    class Listening(Honest):
        def forward(self, request: ForwardRequest) -> ForwardResult:
            requests.append(request)
            return super().forward(request)

    assert (
        run(oracles, Listening(), "edge", ROWS, long_blocks="clamp_both", attention="eager").verdict == "pass"
    )
    [request] = requests
    assert request.capture == tuple(f"layers.{layer}.self_attn.mask" for layer in range(4))
    assert (request.prefill, request.long_blocks, request.attention) == (None, "clamp_both", "eager")
    assert [len(row) for row in request.input_ids] == [20, 44, 30]
    assert Path(request.media).suffix == ".safetensors"
    assert not Path(request.output).exists()


def test_what_is_right_is_worked_out_once_for_each_type_of_layer(oracles: Oracles) -> None:
    mask_check._row.cache_clear()
    with mock.patch.object(Visibility, "grid", autospec=True, side_effect=Visibility.grid) as grid:
        for _ in range(2):
            run(oracles, Honest(), "fits", ROWS)
    asked = [(call.args[1], len(call.args[2])) for call in grid.call_args_list]
    assert sorted(asked) == sorted((kind, length) for kind in (SLIDING, FULL) for length in (20, 44, 30))
