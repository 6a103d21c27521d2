"""LoRA adapters on a transformers model, by PEFT, as its users load them: `PeftModel.from_pretrained`.

PEFT matches names of modules and of tensors; what matches nothing it warns of and leaves out. Which modules
an adapter really changes is read back from the model. One adapter is loaded at a time, and unloaded again: of
adapters for experts PEFT takes several only if they are for the same parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel  # type: ignore[import-not-found]
from peft.tuners.lora.layer import LoraLayer, ParamWrapper  # type: ignore[import-not-found]
from peft.utils.other import ModulesToSaveWrapper  # type: ignore[import-not-found]

_BASE = "base_layer"
_NAME = "default"


@contextmanager
def adapted(model: Any, folder: str) -> Iterator[list[str]]:
    """Let an adapter act on a model; gives the modules that it changes."""
    peft = PeftModel.from_pretrained(model, folder).eval()
    yield list(_changed(peft.get_base_model()))
    peft.unload()


def _changed(model: Any) -> Iterator[str]:
    """Modules in which the adapter stands and is not zero; parameters of experts by their own names."""
    for path, module in model.named_modules():
        name = ".".join(part for part in path.split(".") if part != _BASE)
        if isinstance(module, ModulesToSaveWrapper):
            yield name
        elif isinstance(module, LoraLayer) and _is_live(module):
            yield f"{name}.{module.parameter_name}" if isinstance(module, ParamWrapper) else name


def _is_live(module: Any) -> bool:
    for first, second in ((module.lora_A, module.lora_B), (module.lora_embedding_A, module.lora_embedding_B)):
        if _NAME in first:
            parts = (getattr(half[_NAME], "weight", half[_NAME]) for half in (first, second))
            return all(bool(part.any()) for part in parts)
    return False
