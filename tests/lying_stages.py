"""Targets that run a model in stages and lie about it, each in one way: the bundled stages, changed."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file, save_file

from conformance.errors import EngineError
from conformance.targets import reference_model
from conformance.targets.protocol import TargetInfo
from conformance.targets.stages import Boundary, Crossed, StagesRequest, StagesResult


class Honest:
    """The bundled stages; subclasses change one thing in what several stages answer."""

    spec = "stages"
    rules: frozenset[str] = frozenset()
    """What the lie breaks."""

    def describe(self) -> TargetInfo:
        return TargetInfo(name="stages", version="1", capabilities=("stages",))

    def close(self) -> None:
        pass

    def stages(self, request: StagesRequest) -> StagesResult:
        result = reference_model.stages(request)
        return self.change(result, request) if len(request.pipeline) > 1 else result

    def change(self, result: StagesResult, request: StagesRequest) -> StagesResult:
        return result


class _Handed(Honest):
    """Changes what the last stage is handed."""

    def change(self, result: StagesResult, request: StagesRequest) -> StagesResult:
        *others, last = result.boundaries
        changed = Boundary(first_pass=self.handed(dict(last.first_pass)), empty=self.empty(dict(last.empty)))
        return result.model_copy(update={"boundaries": (*others, changed)})

    def handed(self, found: dict[str, Crossed]) -> dict[str, Crossed]:
        return found

    def empty(self, found: dict[str, Crossed]) -> dict[str, Crossed]:
        return found


class _HandedAlways(_Handed):
    """In real payloads and in the one before any request alike."""

    def empty(self, found: dict[str, Crossed]) -> dict[str, Crossed]:
        return self.handed(found)


class Residual(_HandedAlways):
    rules = frozenset({"residual"})

    def handed(self, found: dict[str, Crossed]) -> dict[str, Crossed]:
        return {**found, "residual": found["hidden_states"]}


class Unasked(_HandedAlways):
    rules = frozenset({"unexpected"})

    def handed(self, found: dict[str, Crossed]) -> dict[str, Crossed]:
        return {**found, "input_ids": found["hidden_states"]}


class NothingButHidden(_HandedAlways):
    rules = frozenset({"missing"})

    def handed(self, found: dict[str, Crossed]) -> dict[str, Crossed]:
        return {"hidden_states": found["hidden_states"]}


class Flat(_Handed):
    rules = frozenset({"shape"})

    def handed(self, found: dict[str, Crossed]) -> dict[str, Crossed]:
        rows, tokens, width = found["hidden_states"].shape
        flat = found["hidden_states"].model_copy(update={"shape": (rows * tokens, width)})
        return {**found, "hidden_states": flat}


class Doubled(_Handed):
    """Sends the padding of a buffer with it."""

    rules = frozenset({"bytes"})

    def handed(self, found: dict[str, Crossed]) -> dict[str, Crossed]:
        hidden = found["hidden_states"]
        return {**found, "hidden_states": hidden.model_copy(update={"nbytes": 2 * hidden.nbytes})}


class Widened(_Handed):
    rules = frozenset({"dtype"})

    def handed(self, found: dict[str, Crossed]) -> dict[str, Crossed]:
        hidden = found["hidden_states"]
        wide = hidden.model_copy(update={"dtype": "float64", "nbytes": hidden.nbytes * 2})
        return {**found, "hidden_states": wide}


class EmptyOfOneToken(_Handed):
    rules = frozenset({"empty"})

    def empty(self, found: dict[str, Crossed]) -> dict[str, Crossed]:
        rows, _, width = found["hidden_states"].shape
        one = Crossed(shape=(rows, 1, width), dtype="float32", nbytes=rows * width * 4)
        return {**found, "hidden_states": one}


class EmptyWithoutKeys(_Handed):
    rules = frozenset({"empty"})

    def empty(self, found: dict[str, Crossed]) -> dict[str, Crossed]:
        return {name: crossed for name, crossed in found.items() if not name.startswith("keys")}


class HoldsAll(Honest):
    rules = frozenset({"held"})

    def change(self, result: StagesResult, request: StagesRequest) -> StagesResult:
        everything = tuple(range(sum(request.pipeline)))
        return result.model_copy(update={"held": (everything,) * len(request.pipeline)})


class RanOtherwise(Honest):
    rules = frozenset({"setting"})

    def change(self, result: StagesResult, request: StagesRequest) -> StagesResult:
        return result.model_copy(update={"effective": {"pipeline": "10", "dtype": request.dtype}})


class _Numbers(Honest):
    """Changes the tensors of the file."""

    def change(self, result: StagesResult, request: StagesRequest) -> StagesResult:
        made = load_file(request.output)
        self.spoil(made)
        save_file({name: tensor.contiguous() for name, tensor in made.items()}, request.output)
        return result

    def spoil(self, made: dict[str, torch.Tensor]) -> None:
        raise AssertionError


class StreamOff(_Numbers):
    rules = frozenset({"stream"})

    def spoil(self, made: dict[str, torch.Tensor]) -> None:
        made["stream.1"][0, -1] *= 1.001


class OutputOff(_Numbers):
    rules = frozenset({"output"})

    def spoil(self, made: dict[str, torch.Tensor]) -> None:
        made["hidden"][-1, -1] *= 1.001


class OutputNotFinite(_Numbers):
    rules = frozenset({"output"})

    def spoil(self, made: dict[str, torch.Tensor]) -> None:
        made["hidden"][0, 0, 0] = torch.nan


class NoOutput(_Numbers):
    rules = frozenset({"missing"})

    def spoil(self, made: dict[str, torch.Tensor]) -> None:
        del made["hidden"]


class StatesSwapped(_Numbers):
    rules = frozenset({"draft-states"})

    def spoil(self, made: dict[str, torch.Tensor]) -> None:
        if "aux.1" in made:
            made["aux.0"], made["aux.1"] = made["aux.1"], made["aux.0"]


class OneStateTooFew(Honest):
    rules = frozenset({"draft-count"})

    def change(self, result: StagesResult, request: StagesRequest) -> StagesResult:
        return result.model_copy(update={"aux": result.aux - 1})


class Bare(Honest):
    rules = frozenset({"draft-form"})

    def change(self, result: StagesResult, request: StagesRequest) -> StagesResult:
        return result.model_copy(update={"form": "Tensor"})


class Raises(Honest):
    rules = frozenset({"raised"})

    def change(self, result: StagesResult, request: StagesRequest) -> StagesResult:
        raise EngineError("AssertionError: intermediate tensors are None")


class Refuses(Honest):
    rules = frozenset({"raised"})

    def change(self, result: StagesResult, request: StagesRequest) -> StagesResult:
        raise EngineError("ValueError: layers that share keys and values must be in one stage with these")


class Exits(Honest):
    rules = frozenset({"raised"})

    def change(self, result: StagesResult, request: StagesRequest) -> StagesResult:
        raise EngineError("SystemExit: layers share keys across stages", exited=True)


class TakesAnything(Honest):
    """Drops what it does not understand."""

    rules = frozenset({"accepted"})

    def stages(self, request: StagesRequest) -> StagesResult:
        known = tuple(sorted({index for index in request.aux_layers if index <= sum(request.pipeline)}))
        return super().stages(request.model_copy(update={"aux_layers": known}))


LIARS: tuple[type[Any], ...] = (
    Residual, Unasked, NothingButHidden, Flat, Doubled, Widened, EmptyOfOneToken, EmptyWithoutKeys, HoldsAll,
    RanOtherwise, StreamOff, OutputOff, OutputNotFinite, NoOutput, StatesSwapped, OneStateTooFew, Bare,
    Raises, Refuses, Exits, TakesAnything,
)  # fmt: skip
