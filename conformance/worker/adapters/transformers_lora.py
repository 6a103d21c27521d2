"""LoRA adapters on a transformers model, by PEFT, as its users load them: `PeftModel.from_pretrained`.

PEFT matches names of modules and of tensors; what matches nothing it warns of and leaves out. Which modules
an adapter really changes is read back from the model. One adapter is loaded at a time, and unloaded again: of
adapters for experts PEFT takes several only if they are for the same parameters. Where a batch of several is
asked for, `PeftModel.generate` is told each row's (`adapter_names`); for parameters of experts it refuses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft import PeftModel  # type: ignore[import-not-found]
from peft.tuners.lora.layer import LoraLayer, ParamWrapper  # type: ignore[import-not-found]
from peft.utils.other import ModulesToSaveWrapper  # type: ignore[import-not-found]

_BASE = "base_layer"
_NAME = "default"
_PLAIN = "__base__"
"""PEFT's name for no adapter."""
_TEXT = ("model.language_model.", "model.layers.", "model.embed_tokens", "model.per_layer_", "lm_head")
"""Beginnings of the names of what works on rows, in either class."""


@contextmanager
def adapted(model: Any, folder: str) -> Iterator[list[str]]:
    """Let an adapter act on a model; gives the modules that it changes."""
    peft = PeftModel.from_pretrained(model, folder).eval()
    yield list(_changed(peft.get_base_model()))
    peft.unload()


class Mixed:
    """Several adapters on a model, each for the rows that name it."""

    def __init__(self, model: Any, folders: Sequence[str]) -> None:
        self._names = {folder: f"adapter-{number}" for number, folder in enumerate(folders, 1)}
        first, *others = self._names.items()
        peft = PeftModel.from_pretrained(model, first[0], adapter_name=first[1])
        for folder, name in others:
            peft.load_adapter(folder, adapter_name=name)
        self._peft = peft.eval()
        base = peft.get_base_model()
        self.modules = {folder: list(_changed(base, name)) for folder, name in self._names.items()}
        """By folder, those that an adapter changes."""
        self.in_towers = any(
            isinstance(module, LoraLayer) and not name.startswith(_TEXT)
            for name, module in base.named_modules()
        )
        """Whether one is for a tower or a connector, which work on pieces of media and not on rows."""

    def generate(self, folders: Sequence[str | None]) -> Any:
        """The model's `generate` for rows with these adapters."""
        names = [_PLAIN if folder is None else self._names[folder] for folder in folders]
        return partial(self._peft.generate, adapter_names=names)

    def unload(self) -> None:
        """Take all of them away."""
        self._peft.unload()


def _changed(model: Any, adapter: str = _NAME) -> Iterator[str]:
    """Modules in which the adapter stands and is not zero; parameters of experts by their own names."""
    for path, module in model.named_modules():
        name = ".".join(part for part in path.split(".") if part != _BASE)
        if isinstance(module, ModulesToSaveWrapper):
            if adapter in module.modules_to_save:
                yield name
        elif isinstance(module, LoraLayer) and _is_live(module, adapter):
            yield f"{name}.{module.parameter_name}" if isinstance(module, ParamWrapper) else name


def _is_live(module: Any, adapter: str) -> bool:
    for first, second in ((module.lora_A, module.lora_B), (module.lora_embedding_A, module.lora_embedding_B)):
        if adapter in first:
            parts = (getattr(half[adapter], "weight", half[adapter]) for half in (first, second))
            return all(bool(part.any()) for part in parts)
    return False
