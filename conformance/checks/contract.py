"""Judge what crosses between the stages of a pipeline.

1. What a stage must be handed follows from the configuration and the split alone (`Expected`).
2. Numbers are compared with the same target's own run of the whole model in one stage.
3. What stands in for a payload before any request must have the form of a real one, with no token.

Rules of what is handed over:
  residual       there is a residual beside the hidden states, which hold it already
  missing        something is not there that layers still to come, or a draft, need
  unexpected     there is something that no layer still to come reads
  shape          a tensor has another shape
  dtype          a tensor has another dtype than the computation
  bytes          other bytes cross than the shape and the dtype say
  empty          the payload before any request differs from a real one in more than its tokens
Rules of what comes out:
  held           a stage holds other layers than those of its place
  setting        another split or dtype ran than was asked for
  stream         what a stage is handed is not the residual stream of one process
  output         the hidden states after the final norm are not those of one process
  draft-count    there are more or fewer states for a draft than were asked for
  draft-states   the states for a draft are not those after so many layers of the whole model
  draft-same     states for a draft after different numbers of layers are the same numbers
  draft-form     the states for a draft come in another form than when more are asked for
  accepted       a request was answered that must be refused
  raised         an error that is not the refusal that the case allows or wants
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conformance.checks.base import CheckOutcome, no_refusal, refuses
from conformance.contract_suite import ContractCase, ContractSuite
from conformance.errors import EngineError
from conformance.oracles import Oracles
from conformance.results import Evidence, Problem
from conformance.targets.protocol import Target
from conformance.targets.stages import Boundary, Crossed, StagesRequest, StagesResult

if TYPE_CHECKING:
    from torch import Tensor

_BYTES = {"float32": 4, "bfloat16": 2}
_FULL = "full_attention"


def judge(case: ContractCase, suite: ContractSuite, target: Target, oracles: Oracles) -> CheckOutcome:
    """Run the stages, and the whole model beside them.

    Raises:
        WorkerDiedError, TargetTimeoutError: from the target.
    """
    if "stages" not in target.describe().capabilities:
        return CheckOutcome("skip", reason=f"{target.spec} has no capability `stages`")
    config = suite.configs[case.config]
    request = _request(case, config, oracles)
    expected = Expected(config, case)
    evidence = Evidence(
        input=json.dumps(
            {"config": config, "pipeline": case.pipeline, "rows": request.input_ids, "prefill": case.prefill}
            | {"aux_layers": case.aux_layers}
        ),
        expected=expected.summary(),
    )
    try:
        result = target.stages(request)
    except EngineError as error:
        evidence = evidence.model_copy(update={"got": {"refused": str(error)}})
        wanted = case.refused or case.may_refuse
        if wanted is not None and refuses(error, wanted):
            return CheckOutcome.from_problems([], evidence)
        message = f"the stages raised {error}{no_refusal(error, wanted)}"
        problem = Problem(rule="raised", message=message, expected=wanted, got=str(error))
        return CheckOutcome.from_problems([problem], evidence)
    if case.refused is not None:
        Path(result.path).unlink(missing_ok=True)
        message = f"states after {list(case.aux_layers)} layers were asked for and {result.aux} were given"
        return CheckOutcome.from_problems([Problem(rule="accepted", message=message)], evidence)
    problems = [
        *_form_problems(case, expected, result),
        *_number_problems(case, request, result, target, oracles),
    ]
    Path(result.path).unlink(missing_ok=True)
    return CheckOutcome.from_problems(problems, evidence)


def _request(case: ContractCase, config: Mapping[str, Any], oracles: Oracles) -> StagesRequest:
    draw = random.Random(case.seed)  # noqa: S311 - token ids
    ids = tuple(
        tuple(draw.randrange(config["vocab_size"]) for _ in range(case.tokens)) for _ in range(case.rows)
    )
    return StagesRequest(
        checkpoint=str(oracles.checkpoint(dict(config), case.seed)),
        dtype=case.dtype,
        pipeline=case.pipeline,
        input_ids=ids,
        prefill=case.prefill,
        aux_layers=case.aux_layers,
        output=str(oracles.output()),
    )


# ------------------------------------------------------------------------------------------ what is right


@dataclass(frozen=True)
class Expected:
    """What each stage must be handed, worked out from the published keys."""

    config: Mapping[str, Any]
    case: ContractCase

    @property
    def spans(self) -> list[range]:
        """Layers of each stage."""
        ends = list(itertools.accumulate(self.case.pipeline, initial=0))
        return [range(start, stop) for start, stop in itertools.pairwise(ends)]

    def payload(self, start: int, tokens: int) -> dict[str, tuple[int, ...]]:
        """Shapes by name, in front of the stage that begins with layer `start`."""
        rows, layers = self.case.rows, self.config["num_hidden_layers"]
        stream = (rows, tokens, self.config["hidden_size"])
        shapes: dict[str, tuple[int, ...]] = {"hidden_states": stream}
        if width := self.config.get("hidden_size_per_layer_input"):
            shapes["per_layer_inputs"] = (rows, tokens, layers - start, width)
        for source in sorted({self._source(layer) for layer in range(start, layers)}):
            if source < start:
                heads, d = self._geometry(source)
                shapes |= {f"{part}.{source}": (rows, heads, tokens, d) for part in ("keys", "values")}
        return shapes | {f"aux.{index}": stream for index in self.case.aux_layers if index <= start}

    def _source(self, layer: int) -> int:
        """The layer whose keys and values a layer reads: the last of its type that has its own."""
        types = self.config["layer_types"]
        own = self.config["num_hidden_layers"] - (self.config.get("num_kv_shared_layers") or 0)
        if layer < own:
            return layer
        return max((other for other in range(own) if types[other] == types[layer]), default=layer)

    def _geometry(self, layer: int) -> tuple[int, int]:
        """Key-value heads and head dimension of a layer."""
        heads, d = self.config["num_key_value_heads"], self.config["head_dim"]
        if self.config["layer_types"][layer] == _FULL:
            few = self.config.get("num_global_key_value_heads") if self.config.get("attention_k_eq_v") else 0
            return few or heads, self.config.get("global_head_dim") or d
        return heads, d

    def summary(self) -> str:
        """For people."""
        first = self.case.prefill or self.case.tokens
        lines = [
            f"stage {stage}, layers {span.start} to {span.stop - 1}: "
            + ", ".join(f"{name} {list(shape)}" for name, shape in self.payload(span.start, first).items())
            for stage, span in enumerate(self.spans)
            if stage
        ]
        return "\n".join([f"all in {self.case.dtype}", *lines])


# ------------------------------------------------------------------------------------------ form


def _form_problems(case: ContractCase, expected: Expected, result: StagesResult) -> Iterator[Problem]:
    held = [tuple(span) for span in expected.spans]
    if list(result.held) != held:
        yield Problem(
            rule="held",
            message="stages hold other layers than asked for",
            expected=held,
            got=list(result.held),
        )
    asked = {"pipeline": "+".join(map(str, case.pipeline)), "dtype": case.dtype}
    for name, value in asked.items():
        if result.effective.get(name) != value:
            yield Problem(
                rule="setting",
                message=f"{name} {value!r} was asked for and {result.effective.get(name)!r} ran",
                expected=value,
                got=result.effective.get(name),
            )
    if len(result.boundaries) != len(expected.spans) - 1:
        message = f"{len(expected.spans)} stages have {len(result.boundaries)} boundaries"
        yield Problem(rule="missing", message=message)
        return
    for stage, (span, boundary) in enumerate(
        zip(expected.spans[1:], result.boundaries, strict=True), start=1
    ):
        tokens = case.prefill or case.tokens
        yield from _payload_problems(
            f"stage {stage}", expected.payload(span.start, tokens), boundary.first_pass, case.dtype
        )
        yield from _empty_problems(stage, expected.payload(span.start, 0), boundary, case.dtype)


def _payload_problems(
    where: str, shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, Crossed], dtype: str
) -> Iterator[Problem]:
    absent = [name for name in shapes if name not in found]
    if absent:
        yield Problem(
            rule="missing",
            message=f"{where} is not handed {', '.join(absent)}",
            expected=list(shapes),
            got=list(found),
        )
    for name in found:
        if name not in shapes:
            residual = "residual" in name
            yield Problem(
                rule="residual" if residual else "unexpected",
                message=f"{where} is handed {name}, "
                + ("and the hidden states hold it already" if residual else "which no later layer reads"),
                expected=list(shapes),
                got=list(found),
            )
    for name, shape in shapes.items():
        if name in found:
            yield from _tensor_problems(f"{where}: {name}", shape, found[name], dtype)


def _tensor_problems(where: str, shape: tuple[int, ...], crossed: Crossed, dtype: str) -> Iterator[Problem]:
    if crossed.shape != shape:
        yield Problem(
            rule="shape",
            message=f"{where} is {list(crossed.shape)} and must be {list(shape)}",
            expected=list(shape),
            got=list(crossed.shape),
        )
    if crossed.dtype != dtype:
        yield Problem(rule="dtype", message=f"{where} is {crossed.dtype}", expected=dtype, got=crossed.dtype)
    size = math.prod(crossed.shape) * _BYTES.get(crossed.dtype, 0)
    if crossed.dtype in _BYTES and crossed.nbytes != size:
        yield Problem(
            rule="bytes",
            message=f"{where} crosses in {crossed.nbytes} bytes and has {size}",
            expected=size,
            got=crossed.nbytes,
        )


def _empty_problems(
    stage: int, shapes: Mapping[str, tuple[int, ...]], boundary: Boundary, dtype: str
) -> Iterator[Problem]:
    """All that is wrong with the payload of no request, as one problem; what a real one has wrong too is not.

    `shapes` are those that it must have, without a token.
    """
    real, found = boundary.first_pass, boundary.empty
    details = [f"it lacks {name}" for name in real if name not in found]
    details += [f"it holds {name}" for name in found if name not in real]
    for name, shape in shapes.items():
        if name in real and name in found and real[name].dtype == dtype:
            details += [problem.message for problem in _tensor_problems(name, shape, found[name], dtype)]
    if details:
        yield Problem(
            rule="empty",
            message=f"the payload of stage {stage} before any request differs from a real one: "
            + "; ".join(details),
            expected={name: list(shape) for name, shape in shapes.items()},
            got={name: list(crossed.shape) for name, crossed in found.items()},
        )


# ------------------------------------------------------------------------------------------ numbers


def _number_problems(
    case: ContractCase, request: StagesRequest, result: StagesResult, target: Target, oracles: Oracles
) -> Iterator[Problem]:
    from conformance.checks import tensors

    layers = sum(case.pipeline)
    whole = request.model_copy(
        update={
            "pipeline": (layers,),
            "aux_layers": tuple(range(layers + 1)),
            "output": str(oracles.output()),
        }
    )
    try:
        one = target.stages(whole)
        streams = tensors.read(one.path)
        found = tensors.read(result.path)
    except EngineError as error:
        yield Problem(rule="raised", message=f"the model in one stage raised {error}", got=str(error))
        return
    except tensors.TensorFileError as error:
        yield Problem(rule="missing", message=f"the target's file cannot be read: {error}")
        return
    Path(one.path).unlink(missing_ok=True)
    starts = list(itertools.accumulate(case.pipeline))[:-1]
    for stage, start in enumerate(starts, start=1):
        yield from _compared(
            "stream", f"the hidden states handed to stage {stage}", found, f"stream.{stage}", streams,
            start, case.tolerance,
        )  # fmt: skip
    yield from _compared(
        "output", "the hidden states after the final norm", found, "hidden", streams, None, case.tolerance
    )
    if result.aux != len(case.aux_layers):
        yield Problem(
            rule="draft-count",
            message=f"states after {list(case.aux_layers)} layers were asked for and {result.aux} were given",
            expected=len(case.aux_layers),
            got=result.aux,
        )
    for number, index in enumerate(case.aux_layers[: result.aux]):
        yield from _compared(
            "draft-states",
            f"the states after {index} layers",
            found,
            f"aux.{number}",
            streams,
            index,
            case.tolerance,
        )
    yield from _same_problems(case, result, found)
    if result.form != one.form:
        yield Problem(
            rule="draft-form",
            message=f"{len(case.aux_layers)} states come in a {result.form}, and {one.aux} in a {one.form}",
            expected=one.form,
            got=result.form,
        )


def _same_problems(
    case: ContractCase, result: StagesResult, found: Mapping[str, Tensor]
) -> Iterator[Problem]:
    """The stream is another one behind each layer: equal states are one memory, written over later."""
    import torch

    given = [(index, found.get(f"aux.{n}")) for n, index in enumerate(case.aux_layers[: result.aux])]
    for (early, one), (late, other) in itertools.combinations(given, 2):
        if one is not None and other is not None and torch.equal(one, other):
            yield Problem(
                rule="draft-same",
                message=f"the states after {early} layers are the very numbers of those after {late}: the "
                "two share memory that a layer has written over",
                expected="two states",
                got="one state",
            )
            return


def _compared(
    rule: str,
    what: str,
    found: Mapping[str, Tensor],
    name: str,
    streams: Mapping[str, Tensor],
    index: int | None,
    tolerance: float,
) -> Iterator[Problem]:
    """A tensor against one process's: its stream after `index` layers, or its output."""
    from conformance.checks import tensors

    wanted = streams.get("hidden" if index is None else f"aux.{index}")
    tensor = found.get(name)
    if tensor is None or wanted is None:
        yield Problem(rule="missing", message=f"no {name} in the target's file")
        return
    if tensor.shape != wanted.shape:
        yield Problem(
            rule=rule,
            message=f"{what} are {list(tensor.shape)}, in one process {list(wanted.shape)}",
            expected=list(wanted.shape),
            got=list(tensor.shape),
        )
        return
    if not tensors.finite(tensor):
        yield Problem(rule=rule, message=f"{what} are not finite")
        return
    far = tensors.distance(tensor.flatten(0, 1), wanted.flatten(0, 1)).maximum
    if far > tolerance:
        yield Problem(
            rule=rule,
            message=f"{what} are {far:.2g} from those of one process, above {tolerance:g}"
            + _nearest(tensor, streams, index),
            expected=tolerance,
            got=far,
        )


def _nearest(tensor: Tensor, streams: Mapping[str, Tensor], index: int | None) -> str:
    """Which point of the stream a tensor is, where it is one."""
    import torch

    if index is None:
        return ""
    same = [
        int(name.partition(".")[2])
        for name, state in streams.items()
        if name.startswith("aux.") and state.shape == tensor.shape and torch.allclose(state, tensor)
    ]
    return f"; they are those after {same[0]} layers" if same else ""
