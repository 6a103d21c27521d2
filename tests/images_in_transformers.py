"""Runs under the interpreter of vLLM's environment: makes a tiny checkpoint that sees, and answers for it.

Arguments: a folder to write to, and the folder of a tokenizer. There it leaves `checkpoint`, images, and
`answers.json`: prompts with their images, and what transformers generates for them in float32.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4VideoProcessor,
)

NEW_TOKENS = 12
SOFT_TOKENS = 70
SIZES = ((96, 144), (240, 96), (48, 48))
PROMPTS = (("a",), ("b", "c"), (), ("c",))
"""Images of each prompt."""


def config(tokenizer: Any) -> Gemma4Config:
    ids = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in {
            "image_token_id": "<|image|>",
            "boi_token_id": "<|image>",
            "eoi_token_id": "<image|>",
            "audio_token_id": "<|audio|>",
            "boa_token_id": "<|audio>",
            "eoa_token_id": "<audio|>",
            "video_token_id": "<|video|>",
        }.items()
    }
    layers = ["sliding_attention", "full_attention"] * 2
    return Gemma4Config(
        text_config={
            "vocab_size": len(tokenizer),
            "vocab_size_per_layer_input": len(tokenizer),
            "hidden_size": 64,
            "hidden_size_per_layer_input": 8,
            "intermediate_size": 96,
            "num_hidden_layers": len(layers),
            "layer_types": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "global_head_dim": 64,
            "sliding_window": 64,
            "num_kv_shared_layers": 0,
            "final_logit_softcapping": 30.0,
            "max_position_embeddings": 2048,
        },
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "global_head_dim": 24,
            "default_output_length": SOFT_TOKENS,
            "position_embedding_size": 64,
            "standardize": True,
        },
        audio_config=None,
        **ids,
    )


def write(folder: Path, tokenizer: Any, tokenizer_folder: Path) -> tuple[Any, Any]:
    torch.manual_seed(5)
    model = Gemma4ForConditionalGeneration(config(tokenizer)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith(("layer_scalar", "std_scale")):
                buffer.uniform_(0.8, 1.2)
            if name.endswith("std_bias"):
                buffer.uniform_(-0.2, 0.2)
    model.save_pretrained(folder)
    processor = Gemma4Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=Gemma4ImageProcessor(max_soft_tokens=SOFT_TOKENS),
        tokenizer=tokenizer,
        video_processor=Gemma4VideoProcessor(),
        image_seq_length=SOFT_TOKENS,
    )
    processor.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_folder / name, folder / name)
    return model, processor


def main() -> None:
    folder, tokenizer_folder = map(Path, sys.argv[1:])
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    model, processor = write(folder / "checkpoint", tokenizer, tokenizer_folder)
    generator = torch.Generator().manual_seed(1)
    for name, (height, width) in zip("abc", SIZES, strict=True):
        pixels = torch.randint(0, 256, (height // 24, width // 24, 3), generator=generator, dtype=torch.uint8)
        small = Image.fromarray(pixels.numpy())
        small.resize((width, height), Image.Resampling.NEAREST).save(folder / f"{name}.png")
    answers = []
    for number, names in enumerate(PROMPTS):
        text = "<bos><|turn>user\n" + "<|image|>" * len(names) + f"question {number}<turn|>\n<|turn>model\n"
        images = [Image.open(folder / f"{name}.png").convert("RGB") for name in names]
        inputs = processor(
            text=[text], images=[images] if images else None, return_tensors="pt", add_special_tokens=False
        )
        with torch.inference_mode():
            made = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                eos_token_id=None,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
        new = made.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        logprobs = [float(row[0].log_softmax(-1)[token]) for row, token in zip(made.logits, new, strict=True)]
        answers.append(
            {
                "prompt": tokenizer(text, add_special_tokens=False)["input_ids"],
                "expanded": inputs["input_ids"][0].tolist(),
                "images": [str(folder / f"{name}.png") for name in names],
                "tokens": new,
                "logprobs": logprobs,
            }
        )
    (folder / "answers.json").write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
