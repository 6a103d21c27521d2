"""The parity suites with media say something: float32 is well inside their limits, and every tensor shows."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from conformance.checks import tensors
from conformance.checks.parity import module_names
from conformance.loading import load_suites
from conformance.media import TextPiece, kind_of
from conformance.oracles import Oracles, Wanted
from conformance.suites import MixedRows, ParityCase, ParitySuite
from conformance.targets import reference_forward
from conformance.targets.protocol import ForwardRequest
from model_impl.multimodal import Gemma4ForConditionalGeneration, load_multimodal_model
from tests.model_configs import jittered
from tests.test_conditioning import SHARE

SUITES = [
    loaded.suite
    for loaded in load_suites()
    if isinstance(loaded.suite, ParitySuite) and loaded.suite.area == "media"
]
CASES = [(suite, case) for suite in SUITES for case in suite.cases]
FLOAT32 = [(suite, case) for suite, case in CASES if case.dtype == "float32"]
BOUND = 1e-3
"""How far a tensor that is some ten per cent off must move the soft tokens."""

torch.set_num_threads(1)


def name_of(pair: tuple[ParitySuite, ParityCase]) -> str:
    return f"{pair[0].id.removeprefix('parity/')}-{pair[1].id}"


@pytest.fixture(scope="module")
def oracles() -> Iterator[Oracles]:
    with contextlib.closing(Oracles(lambda spec: pytest.fail(f"{spec} is not asked here"))) as opened:
        yield opened


def wanted(suite: ParitySuite, case: ParityCase, oracles: Oracles) -> Wanted:
    assert isinstance(case.rows, MixedRows)
    config = suite.configs[case.config]
    prompts = oracles.prompts(case.rows, config)
    kinds = {kind_of(piece) for row in case.rows.pieces for piece in row if not isinstance(piece, TextPiece)}
    names = module_names(config, kinds)
    return Wanted(config, case.weights, prompts.rows, case.prefill, names, prompts.media)


def test_all_published_families_are_there() -> None:
    assert [suite.id for suite in SUITES] == ["parity/12b-media", "parity/26b-a4b-media", "parity/e2b-media"]
    for suite in SUITES:
        assert any(case.rows.pieces and len(case.rows.pieces) == 10 for case in suite.cases)  # type: ignore[union-attr]


@pytest.mark.parametrize("pair", FLOAT32, ids=name_of)
def test_float32_is_well_inside_the_limits(
    pair: tuple[ParitySuite, ParityCase], oracles: Oracles, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, case = pair
    request = oracles.request(wanted(suite, case, oracles), dtype="float32")
    monkeypatch.setitem(reference_forward.DTYPES, "float64", torch.float64)
    exact = ForwardRequest.model_construct(
        **{**dict(request), "dtype": "float64", "output": str(oracles.output())}
    )
    single, truth = (load_file(reference_forward.forward(asked).path) for asked in (request, exact))
    assert set(single) == set(request.capture)
    apart = {name: tensors.distance(single[name], truth[name]) for name in request.capture}
    limits = case.tolerance
    assert {
        name: found
        for name, found in apart.items()
        if found.relative >= SHARE * limits.relative or found.maximum >= SHARE * limits.maximum
    } == {}


CHECKPOINTS = sorted({(suite.id, case.config) for suite, case in CASES})


@pytest.mark.parametrize("key", CHECKPOINTS, ids=lambda key: "-".join(key).removeprefix("parity/"))
def test_every_kind_of_tensor_in_towers_shows(key: tuple[str, str], oracles: Oracles) -> None:
    """With the weights of one case, and what little media shows them all; tensor by tensor.

    Of two bounds around a monotonous function only one can cut something off, so that those of all layers
    and of both feed-forward networks of a layer count as one.
    """
    suite, cases = next(
        (suite, [case for case in suite.cases if case.config == key[1]])
        for suite in SUITES
        if suite.id == key[0]
    )
    few = sorted(cases, key=lambda case: sum(map(len, wanted(suite, case, oracles).rows)))[:3]
    asked = [oracles.request(wanted(suite, case, oracles)) for case in few]
    model = load_multimodal_model(Path(asked[0].checkpoint))
    media = [reference_forward.media_of(Path(request.media), model.config) for request in asked]
    before = [features(model, given) for given in media]
    shown: dict[str, float] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("language_model."):
            continue
        kept = tensor.clone()
        tensor.copy_(tensor * 0.7 if tensor.ndim == 0 else jittered(tensor, name))
        moved = max(
            tensors.distance(found, first[kind]).relative
            for given, first in zip(media, before, strict=True)
            for kind, found in features(model, given).items()
        )
        kind = re.sub(r"(layers\.|feed_forward)\d+", r"\1*", name)
        shown[kind] = max(moved, shown.get(kind, 0.0))
        tensor.copy_(kept)
    assert {kind: moved for kind, moved in shown.items() if moved < BOUND} == {}


def features(model: Gemma4ForConditionalGeneration, given: reference_forward.Media) -> dict[str, Tensor]:
    """Soft tokens by kind."""
    found = {}
    with torch.inference_mode():
        if given.images is not None:
            found["images"] = model.image_features(given.images)
        if given.videos is not None:
            found["videos"] = model.image_features(given.videos.images)
        if given.audio is not None:
            found["audio"] = model.audio_features(given.audio)
    return found
