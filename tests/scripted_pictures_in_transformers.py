"""Runs under the interpreter of a transformers environment: asks the scripted checkpoint about pictures.

Everything goes through the front door: AutoProcessor with the folder's settings and template,
AutoModelForMultimodalLM, `generate` with the folder's own generation settings. Reads a folder: `request.json`
and pictures; writes `answer.json` and an empty `output.safetensors` there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def main() -> None:
    torch.set_num_threads(1)
    from transformers import AutoModelForMultimodalLM, AutoProcessor
    from transformers.image_utils import load_image

    folder = Path(sys.argv[1])
    asked: dict[str, Any] = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    processor = AutoProcessor.from_pretrained(asked["checkpoint"])
    model, report = AutoModelForMultimodalLM.from_pretrained(
        asked["checkpoint"], dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    answers = []
    for conversation in asked["conversations"]:
        prompt = processor.apply_chat_template(conversation["messages"], add_generation_prompt=True)
        images = [load_image(str(folder / name)) for name in conversation["images"]]
        inputs = processor(
            text=[prompt], images=[images] if images else None, add_special_tokens=False, return_tensors="pt"
        )
        made = model.generate(**inputs, max_new_tokens=60)
        ids = inputs["input_ids"][0].tolist()
        answers.append(
            {
                "prompt": ids,
                "text": processor.tokenizer.decode(made[0, len(ids) :], skip_special_tokens=False),
            }
        )
    unfit = sorted(str(name) for kind, names in report.items() if kind != "unexpected_keys" for name in names)
    (folder / "answer.json").write_text(json.dumps({"answers": answers, "unfit": unfit}), encoding="utf-8")
    save_file({"nothing": torch.zeros(1)}, folder / "output.safetensors")


if __name__ == "__main__":
    main()
