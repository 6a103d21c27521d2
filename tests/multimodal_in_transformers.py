"""Runs under the interpreter of a transformers environment: whole models on prompts with media.

Reads a folder: `request.json`, which names checkpoint folders, and `input.safetensors`; writes `answer.json`
and `output.safetensors` there. Prefill as `generate` does it, because a direct forward pass refuses videos.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def by_the_rule() -> None:
    """Have the unified model mask images as the other models do, by the function that it has for that.

    No way through `generate` reaches it: see docs/findings.md.
    """
    from transformers.models.gemma4_unified import modeling_gemma4_unified as unified

    usual = unified.create_masks_for_generate

    def masks(**kwargs: Any) -> Any:
        if "block_sequence_ids" in kwargs:
            return unified.create_masks_for_vision_model(**kwargs)
        return usual(**kwargs)

    unified.create_masks_for_generate = masks


def prefill(model: Any, given: dict[str, Tensor], row: dict[str, Any]) -> Tensor:
    """Hidden states [T, H] after the final norm."""
    inputs = {name: given[key] for name, key in row["tensors"].items()}
    ids = inputs["input_ids"]
    with torch.inference_mode():
        made = model.generate(
            **inputs,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=1,
            do_sample=False,
            output_hidden_states=True,
            return_dict_in_generate=True,
        )
    return made.hidden_states[0][-1][0]


def main() -> None:
    torch.set_num_threads(1)
    from transformers import AutoModelForMultimodalLM

    by_the_rule()
    folder = Path(sys.argv[1])
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    given = load_file(folder / "input.safetensors")
    answers: dict[str, Any] = {}
    made = {}
    for name, asked in request.items():
        model, report = AutoModelForMultimodalLM.from_pretrained(
            asked["checkpoint"], dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
        )
        answers[name] = {key: sorted(map(str, report[key])) for key in ("missing_keys", "unexpected_keys")}
        for row in asked["rows"]:
            made[row["key"]] = prefill(model.eval(), given, row).contiguous()
    save_file(made, folder / "output.safetensors")
    (folder / "answer.json").write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
