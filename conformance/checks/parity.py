"""Judge the tensors inside a target's model against those of an oracle.

1. The same tiny checkpoint and token ids go to both. The outputs of all modules are compared in the order
   in which they came about in the oracle; the first one that differs is named, because what comes after
   it differs as a consequence.
2. In float32 the limits are the case's. In bfloat16 the oracle runs twice, and a tensor may be `factor`
   times as far from the float32 oracle as the oracle's own bfloat16 tensor is, by its norm; by its largest
   difference twice that, as the largest of many varies more. Where rounding alone makes the oracle choose
   other experts, that distance says nothing, and the case is inconclusive.
3. What the target says it ran must be what was asked for, and a tower must run once for all images, once for
   all frames and once for all sounds, or so for each row where the target runs rows one by one: images
   encoded one by one are a fault that no number shows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conformance.checks.base import CheckOutcome
from conformance.errors import EngineError
from conformance.media import TextPiece, kind_of
from conformance.oracles import Oracles, Wanted
from conformance.results import Evidence, ModuleError, ParityEvidence, Problem
from conformance.suites import MixedRows, ParityCase, ParitySuite, Rows, Tolerance
from conformance.targets.protocol import ForwardRequest, ForwardResult, MediaKind, Target
from conformance.worker.modules import LOGITS, outside_text

if TYPE_CHECKING:
    from torch import Tensor

_ORACLE_BACKENDS = {"attention": "sdpa", "experts": "eager"}
EXTREMES = 2.0
"""In bfloat16, how much more the largest difference may be above the oracle's than the norm of all.

Backends that are all right are up to 2.6 times as far from float32 as the oracle by the one, and up to 1.5
times by the other: `bench/rounding.py`."""


def judge(case: ParityCase, suite: ParitySuite, target: Target, oracles: Oracles) -> CheckOutcome:
    """Compare one forward pass.

    Raises:
        EngineError: the oracle raised, or what it gave is no oracle's answer.
        WorkerDiedError, TargetTimeoutError: from the target or the oracle.
    """
    oracle = suite.oracle
    if target.spec == oracle:
        return CheckOutcome("skip", reason=f"{target.spec} is the oracle of this suite")
    info = target.describe()
    if "forward" not in info.capabilities:
        return CheckOutcome("skip", reason=f"{target.spec} has no capability `forward`")
    kinds = _kinds(case.rows)
    if any(kinds) and "media" not in info.features:
        return CheckOutcome("skip", reason=f"{target.spec} runs no forward passes with media")
    reason = oracles.unavailable(oracle)
    if reason:
        return CheckOutcome("skip", reason=f"the oracle {oracle} cannot be used: {reason}")

    config = suite.configs[case.config]
    prompts = oracles.prompts(case.rows, config)
    wanted = Wanted(
        config=config,
        seed=case.weights,
        rows=prompts.rows,
        prefill=case.prefill,
        capture=case.modules or module_names(config, [kind for row in kinds for kind in row]),
        media=prompts.media,
    )
    truth = oracles.ask(oracle, wanted, "float32")
    own = oracles.ask(oracle, wanted, case.dtype)
    for answer in (truth, own):
        _check_oracle(answer, oracle)
    routed = _routed_apart(truth, own)
    if routed:
        reason = (
            f"in {case.dtype} the oracle itself chooses other experts at {routed}: near ties; use other rows"
        )
        return CheckOutcome("inconclusive", reason=reason)
    request = oracles.request(wanted, dtype=case.dtype, attention=case.attention)
    try:
        result = target.forward(request)
    except EngineError as error:
        problem = Problem(rule="raised", message=f"the forward pass raised {error}", got=str(error))
        return CheckOutcome.from_problems([problem], _evidence(case, oracle, wanted, truth, None, ()))

    modules = tuple(_compare(case, wanted, result, truth, own))
    Path(request.output).unlink(missing_ok=True)
    problems = [
        *_setting_problems(request, result),
        *_module_problems(modules),
        *_call_problems(kinds, result),
    ]
    return CheckOutcome.from_problems(problems, _evidence(case, oracle, wanted, truth, result, modules))


def module_names(config: dict[str, Any], kinds: Collection[MediaKind] = ()) -> tuple[str, ...]:
    """Every module that the configuration has and whose output is compared, and the logits.

    Args:
        config: Of a text model, or of a whole one.
        kinds: Of the media that are there: modules of towers that have nothing to do are left out.
    """
    return (*_tower_names(config, kinds), *_text_names(config.get("text_config", config)), LOGITS)


def _tower_names(config: dict[str, Any], kinds: Collection[MediaKind]) -> Iterator[str]:
    vision, audio = config.get("vision_config") or {}, config.get("audio_config") or {}
    if not {"image", "video"}.isdisjoint(kinds):
        for layer in range(vision.get("num_hidden_layers", 0)):
            if layer == 0:
                yield "vision_tower.patch_embedder"
            for part in (".input_layernorm", ".self_attn", ".mlp", ""):
                yield f"vision_tower.encoder.layers.{layer}{part}"
        yield "vision_tower" if "num_hidden_layers" in vision else "vision_embedder"
        yield "embed_vision"
    if "audio" in kinds:
        for layer in range(audio.get("num_hidden_layers", 0)):
            if layer == 0:
                yield "audio_tower.subsample_conv_projection"
            for part in (".feed_forward1", ".self_attn", ".lconv1d", ".feed_forward2", ""):
                yield f"audio_tower.layers.{layer}{part}"
        if "num_hidden_layers" in audio:
            yield "audio_tower"
        yield "embed_audio"


def _text_names(config: dict[str, Any]) -> Iterator[str]:
    layers = config["num_hidden_layers"]
    first_shared = layers - (config.get("num_kv_shared_layers") or 0)
    per_layer_inputs = bool(config.get("hidden_size_per_layer_input"))
    yield "embed_tokens"
    if per_layer_inputs:
        yield from ("per_layer_model_projection", "per_layer_projection_norm")
    parts = ["input_layernorm", "self_attn.q_norm", "self_attn.k_norm", "self_attn"]
    parts += ["post_attention_layernorm", "pre_feedforward_layernorm", "mlp"]
    if config.get("enable_moe_block"):
        parts += ["post_feedforward_layernorm_1", "router", "pre_feedforward_layernorm_2", "experts"]
        parts += ["post_feedforward_layernorm_2"]
    parts += ["post_feedforward_layernorm"]
    if per_layer_inputs:
        parts += ["per_layer_input_gate", "per_layer_projection", "post_per_layer_input_norm"]
    for layer in range(layers):
        own = [part for part in parts if part != "self_attn.k_norm" or layer < first_shared]
        yield from (*(f"layers.{layer}.{part}" for part in own), f"layers.{layer}")
    yield "norm"


def _kinds(rows: Rows) -> list[set[MediaKind]]:
    """The kinds of media in each row."""
    if not isinstance(rows, MixedRows):
        return []
    return [{kind_of(piece) for piece in row if not isinstance(piece, TextPiece)} for row in rows.pieces]


def _check_oracle(answer: ForwardResult, oracle: str) -> None:
    """Refuse an oracle that ran with other parts than an oracle must."""
    for part, name in _ORACLE_BACKENDS.items():
        if answer.effective.get(part, name) != name:
            raise EngineError(
                f"the oracle {oracle} ran {part} {answer.effective[part]!r}; an oracle runs {name!r}"
            )


def _routed_apart(truth: ForwardResult, own: ForwardResult) -> str:
    """The first router that chooses other experts in the oracle's two runs; empty if none does."""
    from conformance.checks import tensors

    if truth.path == own.path:
        return ""
    theirs, theirs_own = _oracle_tensors(truth), _oracle_tensors(own)
    routers = (name for name in truth.order if name.endswith(".router"))
    return next((name for name in routers if not tensors.same_experts(theirs[name], theirs_own[name])), "")


def _oracle_tensors(answer: ForwardResult) -> dict[str, Tensor]:
    from conformance.checks import tensors

    try:
        return tensors.read(answer.path)
    except tensors.TensorFileError as error:
        raise EngineError(f"the oracle's tensors cannot be read: {error}") from error


def _compare(
    case: ParityCase, wanted: Wanted, result: ForwardResult, truth: ForwardResult, own: ForwardResult
) -> Iterator[ModuleError]:
    """Each module's distance from the oracle's, in the oracle's order."""
    from conformance.checks import tensors

    theirs, theirs_own = _oracle_tensors(truth), _oracle_tensors(own)
    absent = [name for name in wanted.capture if name not in truth.order or name not in theirs]
    if absent:
        raise EngineError(f"the oracle gave nothing for {', '.join(absent)}")
    try:
        ours, unread = tensors.read(result.path), "the target gave no such tensor"
    except tensors.TensorFileError as error:
        ours, unread = {}, f"the target's tensors cannot be read: {error}"
    lengths = [len(row) for row in wanted.rows]
    # An oracle that runs row by row meets towers again after it has met the text model.
    for name in sorted(truth.order, key=lambda name: not outside_text(name)):
        if not (tensors.finite(theirs[name]) and tensors.finite(theirs_own[name])):
            raise EngineError(f"the oracle's {name} is not finite")
        limits = case.tolerance
        if case.dtype != "float32":
            apart = tensors.distance(theirs_own[name], theirs[name])
            limits = Tolerance(
                relative=max(limits.relative, case.factor * apart.relative),
                maximum=max(limits.maximum, EXTREMES * case.factor * apart.maximum),
            )
        common = ModuleError(
            module=name,
            relative=None,
            maximum=None,
            relative_limit=_rounded(limits.relative),
            maximum_limit=_rounded(limits.maximum),
        )
        within = [] if outside_text(name) else lengths
        yield common.model_copy(update=_finding(ours.get(name), theirs[name], limits, unread, within, case))


def _finding(
    ours: Tensor | None, theirs: Tensor, limits: Tolerance, unread: str, lengths: list[int], case: ParityCase
) -> dict[str, Any]:
    """The fields of a `ModuleError` that comparing two tensors gives; without lengths there are no rows."""
    from conformance.checks import tensors

    if ours is None:
        return {"rule": "missing-tensor", "note": unread}
    if ours.shape != theirs.shape:
        return {"rule": "shape", "note": f"shape {list(ours.shape)} and not {list(theirs.shape)}"}
    if not tensors.finite(ours):
        return {"rule": "not-finite", "note": "holds NaN or infinity"}
    found = tensors.distance(ours, theirs)
    agrees = found.relative <= limits.relative and found.maximum <= limits.maximum
    return {
        "relative": _rounded(found.relative),
        "maximum": _rounded(found.maximum),
        "rule": "" if agrees else "diverges",
        "worst": tensors.place(found.token, lengths, case.prefill) if lengths else f"place {found.token}",
    }


def _setting_problems(request: ForwardRequest, result: ForwardResult) -> Iterator[Problem]:
    """What was asked for and not used is a failure, even where the numbers agree."""
    for rule, name in (("wrong-backend", "attention"), ("wrong-dtype", "dtype")):
        asked, ran = getattr(request, name), result.effective.get(name)
        if asked is not None and ran != asked:
            yield Problem(
                rule=rule,
                message=f"{name} {asked!r} was asked for and {ran!r} ran",
                expected=asked,
                got=ran,
            )


def _call_problems(kinds: list[set[MediaKind]], result: ForwardResult) -> Iterator[Problem]:
    """A tower that ran more often than once, or once for each row with media for it where rows run alone.

    One that never ran has given no tensors, which says it better.
    """
    rows = Counter(kind for row in kinds for kind in row)
    alone = result.effective.get("rows") == "one by one"
    for kind, count in rows.items():
        most = count if alone else 1
        ran = result.effective.get(f"{kind}_calls", "0")
        if not ran.isdigit() or int(ran) > most:
            yield Problem(
                rule="one-by-one",
                message=f"the tower ran {ran} times, and not {most}, for all media of kind {kind!r}; "
                "encode all of them at once",
                expected=most,
                got=ran,
            )


def _module_problems(modules: tuple[ModuleError, ...]) -> Iterator[Problem]:
    """The first module that differs; besides, those whose output is not there."""
    absent = [m for m in modules if m.rule == "missing-tensor"]
    if absent:
        yield Problem(
            rule="missing-tensor",
            message=f"no output of {', '.join(m.module for m in absent)}: {absent[0].note}",
            got=[m.module for m in absent],
        )
    first = next((m for m in modules if m.rule and m not in absent), None)
    if first is None:
        return
    if first.relative is None or first.maximum is None:
        yield Problem(rule=first.rule, message=f"{first.module}: {first.note}", got=first.module)
        return
    yield Problem(
        rule=first.rule,
        message=f"{first.module} is the first module to differ: ||a-b||/||b|| is {first.relative:.3g} "
        f"(limit {first.relative_limit:.3g}), max|a-b|/max|b| is {first.maximum:.3g} "
        f"(limit {first.maximum_limit:.3g}); most at {first.worst}",
        got=first.module,
    )


def _evidence(
    case: ParityCase,
    oracle: str,
    wanted: Wanted,
    truth: ForwardResult,
    result: ForwardResult | None,
    modules: tuple[ModuleError, ...],
) -> Evidence:
    rows: Any = wanted.rows
    if isinstance(case.rows, MixedRows):
        rows = case.rows.model_dump(mode="json", exclude_defaults=True)
    return Evidence(
        input=json.dumps({"config": wanted.config, "weights seed": wanted.seed, "rows": rows}),
        expected=_expected(case, oracle),
        parity=ParityEvidence(
            oracle=oracle,
            config=case.config,
            dtype=case.dtype,
            rows=tuple(len(row) for row in wanted.rows),
            prefill=case.prefill,
            effective=result.effective if result is not None else {},
            oracle_effective=truth.effective,
            modules=modules,
        ),
    )


def _expected(case: ParityCase, oracle: str) -> str:
    limits = f"{case.tolerance.relative:g} of ||b|| and {case.tolerance.maximum:g} of max|b|"
    if case.dtype == "float32":
        return f"Every module's output is that of {oracle}, within {limits}."
    return (
        f"Every module's output is at most {case.factor:g} times as far from that of {oracle} in float32 as "
        f"that of {oracle} in {case.dtype} is ({EXTREMES * case.factor:g} times by the largest difference), "
        f"or within {limits}."
    )


def _rounded(value: float) -> float:
    """Three digits: more would make equal runs look different."""
    return float(f"{value:.3g}")
