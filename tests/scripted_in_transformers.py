"""Runs under the interpreter of a transformers environment: generates from the scripted checkpoint.

Everything goes through the front door: AutoTokenizer with the folder's template, AutoModelForCausalLM,
`generate` with the folder's own generation settings. Reads JSON on standard input, writes JSON on standard
output.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def main() -> None:
    asked: dict[str, Any] = json.load(sys.stdin)
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(asked["folder"])
    model, report = AutoModelForCausalLM.from_pretrained(
        asked["folder"], dtype=getattr(torch, asked["dtype"]), output_loading_info=True, local_files_only=True
    )
    answers = []
    for conversation in asked["conversations"]:
        prompt = tokenizer.apply_chat_template(
            conversation["messages"],
            tools=conversation["tools"],
            enable_thinking=conversation["thinking"],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        made = model.generate(**prompt, max_new_tokens=asked["max_new_tokens"])
        ids = made[0, prompt["input_ids"].shape[1] :]
        answers.append(
            {
                "prompt": prompt["input_ids"][0].tolist(),
                "text": tokenizer.decode(ids, skip_special_tokens=False),
            }
        )
    settings = GenerationConfig.from_pretrained(asked["folder"])
    json.dump(
        {
            "answers": answers,
            "eos": settings.eos_token_id,
            "unfit": sorted(
                name for kind, names in report.items() if kind != "unexpected_keys" for name in names
            ),
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
