"""The scripted checkpoint says its lines: verbatim, with its own stop tokens, and by a wide margin."""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from conformance.targets import environments, registry
from model_impl.chat.render import render
from model_impl.checkpoint import load_text_model
from model_impl.config import TextConfig
from model_impl.nano import scripted
from model_impl.nano.conversations import FAMILY, Example, plain_examples, random_examples, with_one_key
from model_impl.nano.script import Line, Script, checkpoint_folder, load_script
from model_impl.nano.scripted import MARGIN
from model_impl.nano.training import smallest_gaps
from model_impl.runtime.generate import GenerationConfig, generate
from model_impl.text import TextModel

# Threads that wait for each other cost these small tensors a hundredfold when several test processes run.
torch.set_num_threads(1)

SCRIPT = load_script()
FOLDER = checkpoint_folder()
MANIFEST = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))
MOST_BYTES = 5_000_000
LONGEST = 160
TRANSFORMERS = "transformers@5.19.0"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@functools.cache
def model(dtype: torch.dtype = torch.float32) -> TextModel:
    return load_text_model(FOLDER, dtype=dtype)


def answers(tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], **options: Any) -> list[str]:
    """What the model generates with the folder's own settings; every row must stop by itself."""
    settings = GenerationConfig.from_file(FOLDER / "generation_config.json")
    made = generate(
        model(),
        prompts,
        max_new_tokens=LONGEST,
        stop_ids=settings.stop_ids,
        sampling=settings.sampling,
        **options,
    )
    assert {row.finish_reason for row in made} == {"stop"}
    return [tokenizer.decode(list(row.ids), skip_special_tokens=False) for row in made]


def prompt(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], **options: Any) -> list[int]:
    text = render(messages, family=FAMILY, **options)
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


# -------------------------------------------------------------------------------------------- the files


def test_the_files_are_those_of_the_manifest() -> None:
    assert scripted.digests(FOLDER) == MANIFEST["sha256"]
    assert set(MANIFEST["sha256"]) == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_text_files_are_what_the_recipe_writes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    scripted.write_texts(tmp_path, tokenizer)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (FOLDER / file.name).read_bytes(), file.name


def test_it_is_small_and_was_made_in_time() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= MOST_BYTES
    assert MANIFEST["seconds"] <= 300


def test_it_is_a_real_checkpoint_with_nothing_neutral() -> None:
    tensors = load_file(FOLDER / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    config = TextConfig.from_file(FOLDER / "config.json")
    assert config.per_layer_inputs is not None
    assert {layer.kind for layer in config.layers} == {"sliding_attention", "full_attention"}
    assert len(set(config.head_dims)) == 2
    scalars = [tensor for name, tensor in tensors.items() if name.endswith("layer_scalar")]
    norms = [tensor for name, tensor in tensors.items() if "norm" in name]
    assert len(scalars) == len(config.layers)
    for tensor in (*scalars, *norms):
        # Most entries stray from one by more than rounding could hide.
        assert (tensor.float() - 1).abs().median() > 0.02


# ------------------------------------------------------------------------------------------ the answers


def test_each_line_is_said_alone(tokenizer: Tokenizer) -> None:
    for line in SCRIPT.lines:
        (said,) = answers(tokenizer, [prompt(tokenizer, [user(line.message)])])
        assert said == line.output + line.stop, line.id


@pytest.mark.parametrize("chunk", [None, 5])
def test_all_are_said_in_one_batch(tokenizer: Tokenizer, chunk: int | None) -> None:
    prompts = [
        prompt(tokenizer, [user(line.message)], thinking=number % 3 == 0, tools=SCRIPT.tools[: number % 4])
        for number, line in enumerate(SCRIPT.lines)
    ]
    assert len({len(row) for row in prompts}) > 3
    assert all(len(row) > model().config.sliding_window for row in prompts)
    expected = [line.output + line.stop for line in SCRIPT.lines]
    assert answers(tokenizer, prompts, prefill_chunk=chunk) == expected


@pytest.mark.parametrize("thinking", [False, True])
def test_all_tools_and_a_system_message_do_not_matter(tokenizer: Tokenizer, thinking: bool) -> None:
    system = {"role": "system", "content": " ".join(SCRIPT.phrases[1:4])}
    prompts = [
        prompt(tokenizer, [system, user(line.message)], tools=SCRIPT.tools, thinking=thinking)
        for line in SCRIPT.lines
    ]
    assert answers(tokenizer, prompts) == [line.output + line.stop for line in SCRIPT.lines]


def test_without_a_key_there_is_an_answer_too(tokenizer: Tokenizer) -> None:
    rows = [prompt(tokenizer, [user(text)]) for text in ("Hello!", "What is the capital of France?", "1")]
    assert answers(tokenizer, rows) == ["I only know my lines.<turn|>"] * 3


def test_results_of_tools_are_answered(tokenizer: Tokenizer) -> None:
    call = {"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}
    messages = [
        user("Say #call."),
        {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "1", "content": "rain, 7 degrees"},
    ]
    rows = [prompt(tokenizer, messages, thinking=t, tools=SCRIPT.tools[:1]) for t in (False, True)]
    assert answers(tokenizer, rows) == [
        "The tools have answered.<turn|>",
        "The results are here.\n<channel|>The tools have answered.<turn|>",
    ]


def test_sampling_as_the_folder_says_is_greedy() -> None:
    sampling = GenerationConfig.from_file(FOLDER / "generation_config.json").sampling
    assert sampling.top_k == 1


# ------------------------------------------------------------------------------------------ the margins


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_token_wins_by_the_margin(tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    examples = list(plain_examples(SCRIPT, tokenizer))
    gaps = smallest_gaps(model(dtype), examples)
    short = {e.name: round(gap, 2) for e, gap in zip(examples, gaps, strict=True) if gap < MARGIN}
    assert not short


def test_conversations_that_no_training_has_seen_mostly_go_well(tokenizer: Tokenizer) -> None:
    unseen = with_one_key(SCRIPT, tokenizer, random_examples(SCRIPT, tokenizer, 200, seed=77))
    assert len(unseen) > 150
    right = sum(gap > 0 for gap in smallest_gaps(model(), unseen))
    assert right >= 0.95 * len(unseen)


def test_a_gap_is_that_of_the_closest_token(tokenizer: Tokenizer) -> None:
    example = next(plain_examples(SCRIPT, tokenizer))
    (gap,) = smallest_gaps(model(), [example])
    with torch.inference_mode():
        logits = model().logits(model()(torch.tensor([[*example.prompt, *example.output]])))[0]
    best = []
    for number, token in enumerate(example.output):
        row = logits[len(example.prompt) - 1 + number].clone()
        right, row[token] = row[token].item(), float("-inf")
        best.append(right - row.max().item())
    assert gap == pytest.approx(min(best), abs=1e-3)
    wrong = Example("wrong", example.prompt, (*example.output[:-1], example.output[-1] + 1))
    assert smallest_gaps(model(), [wrong])[0] < -MARGIN


def test_neutral_norms_would_be_noticed(tokenizer: Tokenizer) -> None:
    broken = load_text_model(FOLDER)
    for name, weight in broken.named_parameters():
        if "norm" in name:
            weight.fill_(1.0)
    assert min(smallest_gaps(broken, list(plain_examples(SCRIPT, tokenizer)))) < 0


# ------------------------------------------------------------------------------------------- the recipe


SHORT = Script(
    default=Line(id="default", shows="x", output="No."),
    after_results=SCRIPT.after_results,
    lines=tuple(SCRIPT.line(name) for name in ("plain", "call")),
    tools=SCRIPT.tools,
    phrases=SCRIPT.phrases,
)


def test_the_recipe_makes_the_same_twice(tmp_path: Path) -> None:
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        made.append(scripted.make(tmp_path / name, SHORT, steps=3, examples=20, held_out=4))
    assert made[0]["sha256"] == made[1]["sha256"]
    assert made[0] | {"seconds": 0} == made[1] | {"seconds": 0}


def test_the_recipe_learns(tmp_path: Path) -> None:
    manifest = scripted.make(tmp_path, SHORT, steps=60, examples=60, held_out=4)
    assert manifest["smallest_gap_plain_float32"] > 0


def test_conversations_repeat_and_vary(tokenizer: Tokenizer) -> None:
    first = list(random_examples(SCRIPT, tokenizer, 80, seed=1))
    assert first == list(random_examples(SCRIPT, tokenizer, 80, seed=1))
    assert len({example.prompt for example in first}) == 80
    assert first != list(random_examples(SCRIPT, tokenizer, 80, seed=2))
    keys = {tokenizer.token_to_id(line.key): line.id for line in SCRIPT.lines}
    for example in first:
        held = [keys[token] for token in example.prompt if token in keys]
        if example.name in keys.values():
            assert held[-1] == example.name
        elif example.name == "default":
            assert not held


# ------------------------------------------------------------------------------------------ transformers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_says_the_same(tokenizer: Tokenizer, dtype: str) -> None:
    if reason := registry.unavailable(TRANSFORMERS):
        pytest.skip(reason)
    conversations = [
        {
            "messages": [user(line.message)],
            "thinking": number % 2 == 0,
            "tools": list(SCRIPT.tools[: number % 2]) or None,
        }
        for number, line in enumerate(SCRIPT.lines)
    ]
    asked = {"folder": str(FOLDER), "dtype": dtype, "max_new_tokens": LONGEST, "conversations": conversations}
    done = subprocess.run(
        [environments.status(TRANSFORMERS).python, Path(__file__).with_name("scripted_in_transformers.py")],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert got["unfit"] == []
    assert got["eos"] == [1, 106, 50]
    for line, conversation, answer in zip(SCRIPT.lines, conversations, got["answers"], strict=True):
        options = {"thinking": conversation["thinking"], "tools": conversation["tools"]}
        assert answer["prompt"] == prompt(tokenizer, conversation["messages"], **options)  # type: ignore[arg-type]
        assert answer["text"] == line.output + line.stop, line.id
