"""The bundled model spread over several processes.

Kept from `reference`, because importing it loads torch.
"""

from __future__ import annotations

import re
from pathlib import Path

from conformance.targets.protocol import GenerateRequest
from conformance.targets.reference_forward import DTYPES
from model_impl.parallel.model import Layout, ParallelModel

_LAYER = re.compile(r"layers\.(\d+)\.")


def spread(request: GenerateRequest) -> ParallelModel | None:
    """The model in as many processes as are asked for; None if that is one.

    Raises:
        ModelError: the layout does not fit the model, or a process could not start.
    """
    options = request.options
    if options.tensor_parallel == 1 and options.pipeline_parallel == 1 and not options.expert_parallel:
        return None
    return ParallelModel(
        Path(request.checkpoint),
        Layout(
            options.pipeline_split or options.pipeline_parallel,
            options.tensor_parallel,
            options.expert_parallel,
        ),
        dtype=DTYPES[options.dtype],
        attention=options.attention,
        threads=options.threads or 1,
    )


def layout_of(model: ParallelModel) -> dict[str, str]:
    """How a model is divided and runs, as its ranks say, of themselves and by what they hold."""
    held: dict[tuple[int, ...], int] = {}
    experts = set()
    for loaded in model.loaded.values():
        layers = {int(found[1]) for name in loaded.parameters if (found := _LAYER.search(name))}
        held[tuple(sorted(layers))] = held.get(tuple(sorted(layers)), 0) + 1
        experts |= {
            shape[0] for name, shape in loaded.parameters.items() if name.endswith("experts.down_proj")
        }
    moe = model.config.moe
    whole = moe is not None and experts == {moe.num_experts}
    return {
        "attention": model.attention_backend,
        "dtype": ", ".join(sorted({loaded.dtype for loaded in model.loaded.values()})),
        "threads": ", ".join(sorted({str(loaded.threads) for loaded in model.loaded.values()})),
        "tensor_parallel": ", ".join(sorted({str(ranks) for ranks in held.values()})),
        "pipeline_parallel": str(len(held)),
        "pipeline_split": ",".join(str(len(layers)) for layers in sorted(held)),
        "expert_parallel": "on" if experts and not whole else "off",
    }
