"""Which layer is the first that differs between two ways of asking."""

from __future__ import annotations

from conformance.errors import EngineError
from conformance.invariance.asking import Asker, Prompts
from conformance.invariance_suite import Way
from conformance.targets.protocol import DType

_LIMIT: dict[DType, float] = {"float32": 1e-4, "bfloat16": 0.1}
"""Of ||a - b|| / ||b||: rounding is below it, in layers of small models."""


def first_layer(asker: Asker, base: Way, other: Way, prompt: Prompts) -> str:
    """Say it in words, by what each layer gives for the last token of a prompt.

    Args:
        asker: Its target has the feature `states`.
        base: The one way.
        other: The other.
        prompt: One.
    """
    from safetensors.torch import load_file  # with torch, which most suites do without

    once = {"repeat": 1, "given": "together"}
    try:
        paths = [asker.states(way.model_copy(update=once), prompt) for way in (base, other)]
        expected, got = (load_file(path)["states"][0].double() for path in paths)
    except EngineError as error:
        return f"no layer can be named: asking for states raised {error}"
    if expected.shape != got.shape:
        return f"states of {list(got.shape)} layers and features came, and {list(expected.shape)} before"
    distances = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    for layer, distance in enumerate(distances.tolist()):
        if not distance <= _LIMIT[base.rounded_to]:
            return f"layer {layer} is the first that differs, by {distance:.2g} of its norm"
    return "no layer differs for the last token before that place when it is asked for alone"
