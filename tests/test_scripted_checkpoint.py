"""The scripted checkpoint says its lines: verbatim, with its own stop tokens, and by a wide margin."""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from conformance.checks.pictures import soft_tokens
from conformance.media import Picture
from conformance.media_files import picture_bytes
from conformance.targets import environments, registry
from model_impl.chat.render import render
from model_impl.media_config import MultimodalConfig, VisionConfig
from model_impl.multimodal import Gemma4ForConditionalGeneration, load_multimodal_model
from model_impl.nano import scripted, settings
from model_impl.nano.conversations import (
    FAMILY,
    Example,
    picture_message,
    plain_examples,
    random_examples,
    with_one_key,
)
from model_impl.nano.gallery import Gallery, draw, show
from model_impl.nano.pictured import plain_picture_examples, random_picture_examples
from model_impl.nano.script import Line, Script, checkpoint_folder, load_script
from model_impl.nano.scripted import MARGIN, PLAIN_PICTURES, SEED
from model_impl.nano.settings import SOFT_TOKENS
from model_impl.nano.training import smallest_gaps
from model_impl.nano.vocabulary import vocabulary_size
from model_impl.preprocess.prompt import expand
from model_impl.runtime.generate import GenerationConfig, generate
from model_impl.text import TextModel
from tests.media_oracle import ask

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
def whole(dtype: torch.dtype = torch.float32) -> Gemma4ForConditionalGeneration:
    return load_multimodal_model(FOLDER, dtype=dtype)


def model(dtype: torch.dtype = torch.float32) -> TextModel:
    return whole(dtype).language_model


@functools.cache
def gallery(dtype: torch.dtype = torch.float32, count: int = PLAIN_PICTURES, seed: int = SEED) -> Gallery:
    return show(whole(dtype), *draw(SCRIPT.pictures, count, seed), SOFT_TOKENS)


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
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_text_files_are_what_the_recipe_writes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = settings.config(vocabulary_size(tokenizer))
    settings.write_texts(tmp_path, tokenizer, config, FAMILY)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (FOLDER / file.name).read_bytes(), file.name


def test_it_is_small_and_was_made_in_time() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= MOST_BYTES
    assert MANIFEST["processor_seconds"] <= 300


def test_it_is_a_real_checkpoint_with_nothing_neutral() -> None:
    tensors = load_file(FOLDER / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    config = MultimodalConfig.from_file(FOLDER / "config.json")
    assert config.text.per_layer_inputs is not None
    assert {layer.kind for layer in config.text.layers} == {"sliding_attention", "full_attention"}
    assert len(set(config.text.head_dims)) == 2
    assert config.text.bidirectional_images
    assert isinstance(config.vision, VisionConfig)
    assert config.vision.standardize
    assert config.vision.clipped_linears
    scalars = [tensor for name, tensor in tensors.items() if name.endswith("layer_scalar")]
    norms = [tensor for name, tensor in tensors.items() if "norm" in name]
    assert len(scalars) == len(config.text.layers)
    for tensor in (*scalars, *norms, tensors["model.vision_tower.std_scale"]):
        # Most entries stray from one by more than rounding could hide.
        assert (tensor.float() - 1).abs().median() > 0.02
    assert tensors["model.vision_tower.std_bias"].abs().median() > 0.02
    bounds = [tensor for name, tensor in tensors.items() if name.endswith(("_min", "_max"))]
    assert len(bounds) == 4 * 7 * config.vision.num_layers
    assert all(tensor.isfinite() for tensor in bounds)


def test_every_picture_is_longer_than_the_window() -> None:
    assert min(shown.soft_tokens for shown in gallery(count=96)) > model().config.sliding_window


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
    gaps = smallest_gaps(whole(dtype), examples)
    short = {e.name: round(gap, 2) for e, gap in zip(examples, gaps, strict=True) if gap < MARGIN}
    assert not short


def test_conversations_that_no_training_has_seen_mostly_go_well(tokenizer: Tokenizer) -> None:
    unseen = with_one_key(SCRIPT, tokenizer, random_examples(SCRIPT, tokenizer, 200, seed=77))
    assert len(unseen) > 150
    right = sum(gap > 0 for gap in smallest_gaps(whole(), unseen))
    assert right >= 0.95 * len(unseen)


def test_a_gap_is_that_of_the_closest_token(tokenizer: Tokenizer) -> None:
    example = next(plain_examples(SCRIPT, tokenizer))
    (gap,) = smallest_gaps(whole(), [example])
    with torch.inference_mode():
        logits = model().logits(model()(torch.tensor([[*example.prompt, *example.output]])))[0]
    best = []
    for number, token in enumerate(example.output):
        row = logits[len(example.prompt) - 1 + number].clone()
        right, row[token] = row[token].item(), float("-inf")
        best.append(right - row.max().item())
    assert gap == pytest.approx(min(best), abs=1e-3)
    wrong = Example("wrong", example.prompt, (*example.output[:-1], example.output[-1] + 1))
    assert smallest_gaps(whole(), [wrong])[0] < -MARGIN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_token_about_a_picture_wins_by_the_margin(tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    examples = list(plain_picture_examples(SCRIPT, tokenizer, gallery(dtype)))
    assert {example.causal for example in examples} == {False, True}
    gaps = smallest_gaps(whole(dtype), examples, gallery(dtype))
    short = {e.name: round(gap, 2) for e, gap in zip(examples, gaps, strict=True) if gap < MARGIN}
    assert not short


def test_pictures_and_conversations_that_no_training_has_seen_mostly_go_well(tokenizer: Tokenizer) -> None:
    other = gallery(count=60, seed=1234)
    unseen = with_one_key(SCRIPT, tokenizer, random_picture_examples(SCRIPT, tokenizer, other, 200, seed=77))
    assert len(unseen) > 150
    right = sum(gap > 0 for gap in smallest_gaps(whole(), unseen, other))
    assert right >= 0.95 * len(unseen)


def test_neutral_buffers_of_the_tower_would_be_noticed(tokenizer: Tokenizer) -> None:
    broken = load_multimodal_model(FOLDER)
    broken.vision_tower.std_scale.fill_(1.0)
    broken.vision_tower.std_bias.zero_()
    shown = show(broken, *draw(SCRIPT.pictures, PLAIN_PICTURES, SEED), SOFT_TOKENS)
    assert min(smallest_gaps(broken, list(plain_picture_examples(SCRIPT, tokenizer, shown)), shown)) < 0


def test_neutral_norms_would_be_noticed(tokenizer: Tokenizer) -> None:
    broken = load_multimodal_model(FOLDER)
    for name, weight in broken.named_parameters():
        if "norm" in name:
            weight.fill_(1.0)
    assert min(smallest_gaps(broken, list(plain_examples(SCRIPT, tokenizer)))) < 0


# ------------------------------------------------------------------------------------------- the recipe


SHORT = Script(
    default=Line(id="default", shows="x", output="No."),
    after_results=SCRIPT.after_results,
    lines=tuple(SCRIPT.line(name) for name in ("plain", "call")),
    pictures=SCRIPT.pictures.model_copy(
        update={"lines": (SCRIPT.pictures.line("colour"),), "ordinals": ("first",)}
    ),
    tools=SCRIPT.tools,
    phrases=SCRIPT.phrases,
)


FEW = scripted.Amounts(steps=(1, 1, 2), conversations=20, picture_conversations=10, pictures=6, held_out=4)


def test_the_recipe_makes_the_same_twice(tmp_path: Path) -> None:
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        made.append(scripted.make(tmp_path / name, SHORT, FEW))
    assert made[0]["sha256"] == made[1]["sha256"]
    assert made[0] | {"processor_seconds": 0} == made[1] | {"processor_seconds": 0}


def test_the_recipe_learns(tmp_path: Path) -> None:
    manifest = scripted.make(tmp_path, SHORT, replace(FEW, steps=(1, 1, 170), conversations=120))
    assert manifest["smallest_gap_plain_float32"] > 0
    assert manifest["smallest_gap_plain_pictures_float32"] > 0


def test_conversations_about_pictures_repeat_and_vary(tokenizer: Tokenizer) -> None:
    shown = gallery()
    first = list(random_picture_examples(SCRIPT, tokenizer, shown, 80, seed=1))
    assert first == list(random_picture_examples(SCRIPT, tokenizer, shown, 80, seed=1))
    assert first != list(random_picture_examples(SCRIPT, tokenizer, shown, 80, seed=2))
    assert {len(example.pictures) for example in first} == {0, 1, 2, 3, 4}
    assert {example.causal for example in first} == {False, True}
    image = tokenizer.token_to_id("<|image|>")
    for example in first:
        counts = [shown[place].soft_tokens for place in example.pictures]
        assert example.prompt.count(image) == sum(counts)
    names = {example.name.partition(",")[0] for example in first}
    assert names >= {"colour", "colours", "sight"}
    assert len(names) > 5, "other lines are said beside pictures"


def test_drawn_pictures_have_the_colours_that_are_said_of_them() -> None:
    colours, drawn = draw(SCRIPT.pictures, 60, seed=9)
    assert set(colours) == {*SCRIPT.pictures.colours, SCRIPT.pictures.motley}
    assert len({picture.shape for picture in drawn}) > 40
    for name, picture in zip(colours, drawn, strict=True):
        if name != SCRIPT.pictures.motley:
            wanted = torch.tensor(SCRIPT.pictures.colours[name])[:, None, None]
            assert (picture.int() - wanted).abs().max() <= 24


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


def test_transformers_says_the_same_of_pictures(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shown = [
        ("colour", [Picture(width=96, height=96, colour="red")]),
        ("colour", [Picture(width=300, height=40, seed=3)]),
        (
            "colours",
            [Picture(width=200, height=90, colour="blue"), Picture(width=60, height=60, colour="white")],
        ),
        ("sight", [Picture(width=96, height=96, colour="green")]),
        ("colours", []),
    ]
    files: dict[str, bytes] = {}
    conversations = []
    for line, pictures in shown:
        names = [f"{len(files) + number}.png" for number in range(len(pictures))]
        files |= {name: picture_bytes(picture) for name, picture in zip(names, pictures, strict=True)}
        messages = [picture_message(SCRIPT.pictures.line(line), len(pictures))]
        conversations.append({"messages": messages, "images": names})
    request = {"checkpoint": str(FOLDER), "conversations": conversations}
    got, _ = ask(tmp_path_factory, "scripted_pictures", "lines", request, files=files, processors=True)
    assert got["unfit"] == []
    for (line, pictures), conversation, answer in zip(shown, conversations, got["answers"], strict=True):
        colours = [picture.colour or SCRIPT.pictures.motley for picture in pictures]
        assert answer["text"] == SCRIPT.pictures.output(SCRIPT.pictures.line(line), colours) + "<turn|>"
        counts = [soft_tokens(picture, SOFT_TOKENS) for picture in pictures]
        text = expand(render(conversation["messages"], family=FAMILY), images=counts)  # type: ignore[arg-type]
        assert answer["prompt"] == list(tokenizer.encode(text, add_special_tokens=False).ids)
