"""What vLLM makes of adapters, read back from its engine, and which of them share a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def rounds(wanted: Sequence[str | None], most: int) -> list[list[int]]:
    """Places of prompts that are answered together, with so many different adapters at most."""
    folders = list(dict.fromkeys(wanted))
    return [
        [place for place, folder in enumerate(wanted) if folder in folders[start : start + most]]
        for start in range(0, len(folders), most)
    ]


def adapted_modules(runner: Any, adapter: int) -> list[str]:
    """Modules in whose buffers an adapter stands and is not zero; of a fused one its parts, `qkv_proj[0]`."""
    manager = runner.lora_manager._adapter_manager
    if adapter not in manager.lora_index_to_id:
        return []
    slot = manager.lora_index_to_id.index(adapter)
    found = []
    for name, module in manager.modules.items():
        parts = list(zip(module.lora_a_stacked, module.lora_b_stacked, strict=True))
        live = [number for number, (a, b) in enumerate(parts) if a[slot].any() and b[slot].any()]
        if name.endswith(".experts") or len(parts) == 1:
            found += [name] if live else []
        else:
            found += [f"{name}[{number}]" for number in live]
    return found


def media_parts(worker: Any) -> dict[str, list[str]] | None:
    """What the model takes to be there besides its language model; called in the process of a rank.

    Args:
        worker: vLLM's worker.

    Returns:
        The `connectors` and `towers` of `Parts`; None where the model does not tell.
    """
    model = worker.model_runner.get_model()
    if not hasattr(model, "get_mm_mapping"):
        return None
    mapping = model.get_mm_mapping()
    found = {"connectors": mapping.connector, "towers": mapping.tower_model}
    return {part: [name.rstrip(".") for name in names] for part, names in found.items()}
