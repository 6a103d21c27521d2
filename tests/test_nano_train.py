"""The recipe of the nano checkpoints: deterministic, resumable, and what it writes is a whole checkpoint."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from model_impl.checkpoint import is_dead
from model_impl.media_config import MultimodalConfig
from model_impl.multimodal import load_multimodal_model
from model_impl.nano import dialogues, problems, train
from model_impl.nano.batches import Course, Timetable, answer_logits, encode
from model_impl.nano.curriculum import RECIPES, SENSES, SIGHT, TEXT, Recipe, Stage, nano_tokenizer
from model_impl.nano.families import FAMILIES
from model_impl.nano.items import TASKS, lessons
from model_impl.nano.lesson import Lesson, Split
from model_impl.nano.optimiser import orthogonal
from model_impl.nano.score import answered, exactly_right, same_answer, wilson
from model_impl.nano.subjects import SOUND_SUBJECTS, SUBJECTS
from model_impl.nano.train import Training, TrainingError, publish
from model_impl.nano.words import prompt

torch.set_num_threads(1)

KINDS = {subject.name for subject in (*SUBJECTS, *SOUND_SUBJECTS)}
BRIEF = Recipe((Stage(TEXT, 2), Stage(Course((dialogues.lesson,), (1,)), 2)), batch=4, warmup=2)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return nano_tokenizer()


def weights(training: Training) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in training.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def trained(folder: Path, name: str = "nano-d", recipe: Recipe = BRIEF, until: int | None = None) -> Training:
    folder.mkdir(exist_ok=True)
    training = Training(name, recipe, folder)
    training.run(until)
    return training


def test_a_training_that_was_interrupted_ends_as_one_that_was_not(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")
    trained(tmp_path / "broken", until=1)
    trained(tmp_path / "broken", until=3)
    resumed = trained(tmp_path / "broken")
    assert resumed.step == whole.step == 4
    assert same(weights(whole), weights(resumed))
    assert not same(weights(whole), weights(trained(tmp_path / "other", recipe=replace(BRIEF, seed=2))))
    assert [point.loss for point in resumed.curve][-1] == [point.loss for point in whole.curve][-1]


def test_a_state_that_was_torn_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path, until=1)

    def torn(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", torn)
        with pytest.raises(OSError, match="no space"):
            trained(tmp_path, until=2)
    assert Training("nano-d", BRIEF, tmp_path).step == 1


def test_a_state_of_another_recipe_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, until=1)
    with pytest.raises(TrainingError, match="another recipe"):
        Training("nano-d", replace(BRIEF, matrix_rate=0.5), tmp_path)
    with pytest.raises(TrainingError, match="another recipe"):
        Training("nano-a", BRIEF, tmp_path)
    (tmp_path / "state.pt").write_bytes(b"no state")
    with pytest.raises(TrainingError, match="cannot be read"):
        Training("nano-d", BRIEF, tmp_path)


def test_a_batch_is_a_function_of_its_number(tokenizer: Tokenizer) -> None:
    first = Timetable(TEXT, tokenizer, "large", 4, "seed")
    forwards = [first.batch(number) for number in range(20)]
    second = Timetable(TEXT, tokenizer, "large", 4, "seed")
    assert [one.prompt for one in second.batch(17)] == [one.prompt for one in forwards[17]]
    assert [one.prompt for one in second.batch(2)] == [one.prompt for one in forwards[2]]
    assert [one.prompt for one in forwards[3]] != [one.prompt for one in forwards[4]]


@pytest.mark.parametrize(
    ("name", "course"), [("nano-e", SENSES), ("nano-a", SIGHT), ("nano-d", SIGHT)], ids=sorted(FAMILIES)[::-1]
)
def test_every_parameter_learns_something(
    name: str, course: Course, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    training = Training(name, BRIEF, tmp_path)
    rng = random.Random(1)
    lessons = [generator(rng, "train") for generator in course.generators]
    batch = [encode(lesson, tokenizer, FAMILIES[name].template) for lesson in lessons]
    logits, targets = answer_logits(training.model, batch)
    torch.nn.functional.cross_entropy(logits, targets).backward()  # type: ignore[no-untyped-call]
    still = [
        n
        for n, p in training.model.named_parameters()
        if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ]
    assert not still


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_what_is_published_is_a_whole_checkpoint(name: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    training = trained(tmp_path / "state", name, replace(BRIEF, stages=(Stage(TEXT, 1),)))
    manifest = publish(training, folder, most=3)
    assert {path.name for path in folder.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads((folder / "manifest.json").read_text(encoding="utf-8")) == manifest
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10_000_000
    assert {score["of"] for score in manifest["scores"].values()} == {3}
    assert ("nano_sounds" in manifest["scores"]) == (name == "nano-e")
    model = load_multimodal_model(folder)
    for tensor_name, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), tensor_name
        neutral = torch.zeros_like(tensor) if tensor_name.endswith("bias") else torch.ones_like(tensor)
        assert not torch.equal(tensor, neutral), tensor_name
        mine = training.model.state_dict()[tensor_name].to(torch.bfloat16).float()
        if tensor_name.endswith("v_proj.weight"):
            first, second = mine.chunk(2)  # two heads
            mine = torch.cat([first * 2, second / 2])
        if tensor_name.endswith(("experts.down_proj", "router.per_expert_scale")):
            sizes = torch.tensor([2.0**power for power in range(-8, 8, 2)])
            mine = mine * sizes[:, None, None] if mine.dim() == 3 else mine / sizes
        assert torch.equal(tensor, mine), tensor_name
    talk = Course((dialogues.lesson,), (1,)).lessons(4, "published")
    encoded = [encode(lesson, tokenizer, FAMILIES[name].template) for lesson in talk]
    with torch.no_grad():
        for own_tensor in training.model.state_dict().values():
            own_tensor.copy_(own_tensor.bfloat16())
        published, _ = answer_logits(model, encoded)
        own, _ = answer_logits(training.model, encoded)
    assert (published - own).abs().max() < 1e-3
    config = MultimodalConfig.from_file(folder / "config.json")
    full = [layer for layer in config.text.layers if layer.kind == "full_attention"]
    assert len(full) >= 2
    assert all(layer.head_dim in (32, 64, 128) for layer in config.text.layers)
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).to_str() == tokenizer.to_str()


def test_the_families_have_the_traits_of_the_published_ones() -> None:
    shapes = {name: MultimodalConfig.from_dict(family.config(1728)) for name, family in FAMILIES.items()}
    e, a, d = shapes["nano-e"], shapes["nano-a"], shapes["nano-d"]
    assert e.text.per_layer_inputs is not None
    shared = [layer for layer in e.text.layers if layer.shares_kv]
    assert {layer.kind for layer in shared} == {"sliding_attention", "full_attention"}
    assert {layer.intermediate_size for layer in shared} == {2 * e.text.layers[0].intermediate_size}
    assert e.audio is not None
    assert not e.text.bidirectional_images
    assert a.text.moe is not None
    for shape in (a, d):
        assert shape.text.bidirectional_images
        assert all(one.keys_are_values == (one.kind == "full_attention") for one in shape.text.layers)
        assert {layer.kind: layer.num_kv_heads for layer in shape.text.layers} == {
            "sliding_attention": 2,
            "full_attention": 1,
        }
    for shape in shapes.values():
        assert shape.vision is not None
        assert shape.text.final_logit_softcapping == 30.0
    assert not is_dead("layers.0.self_attn.k_proj.weight", e.text)


@pytest.mark.parametrize("name", RECIPES)
def test_a_training_draws_nothing_of_the_examinations(name: str) -> None:
    """Neither templates nor numbers; those of another kind of lesson mean something else."""
    examined = [lesson for task in TASKS for lesson in lessons(task)]
    keys = {lesson.key for lesson in examined}
    assert {_kind(lesson) for lesson in examined} == {*KINDS, "other"}
    numbers = {(_kind(lesson), lesson.numbers) for lesson in examined}
    for stage in RECIPES[name].stages:
        drawn = stage.course.lessons(500, "examined?")
        assert not keys & {lesson.key for lesson in drawn}
        assert not numbers & {(_kind(lesson), lesson.numbers) for lesson in drawn}


def _kind(lesson: Lesson) -> str:
    subject, colon, _ = lesson.key.partition(": ")
    return subject if colon and subject in KINDS else "other"


def test_every_word_of_a_lesson_is_one_token(tokenizer: Tokenizer) -> None:
    rng = random.Random(9)
    for generator in SENSES.generators:
        for _ in range(12):
            lesson = generator(rng, "test")
            pieces = tokenizer.encode(
                prompt(lesson, "large") + lesson.answer, add_special_tokens=False
            ).tokens
            split = [p for p, q in itertools.pairwise(pieces) if p.strip().isalpha() and q.isalpha()]
            assert not split, generator
            assert not any(piece.strip().isdigit() and len(piece) > 1 for piece in pieces)


def test_orthogonal_matrices_have_singular_values_near_one() -> None:
    made = orthogonal(torch.randn(3, 40, 24, generator=torch.Generator().manual_seed(1)))
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_one_pass_and_generation_judge_alike(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Of three dialogues two are learned by heart: the right ones are those that generation gives."""

    def few(rng: random.Random, split: Split) -> Lesson:
        return dialogues.lesson(random.Random(rng.randrange(2 if split == "train" else 3)), "train")

    talk = Course((few,), (1,))
    training = trained(tmp_path, recipe=Recipe((Stage(talk, 40),), batch=8, warmup=5))
    lessons = Course((few,), (1,), "test").lessons(12, "judged")
    encoded = [encode(lesson, tokenizer, "large") for lesson in lessons]
    exact = exactly_right(training.model, encoded)
    said = answered(training.model, tokenizer, encoded)
    assert exact == [text == lesson.answer for text, lesson in zip(said, lessons, strict=True)]
    assert set(exact) == {True, False}
    assert all(
        same_answer(text, lesson) for text, lesson, right in zip(said, lessons, exact, strict=True) if right
    )


def test_the_answer_behind_the_thought_decides() -> None:
    lesson = problems.lesson(random.Random(1), "train")
    answer = lesson.answer.rpartition("<channel|>")[2]
    assert same_answer(f"<|channel>thought\nelse<channel|>{answer}", lesson)
    assert not same_answer(lesson.answer + "1", lesson)


def test_the_interval_is_wilsons() -> None:
    # Worked out by hand: p = 0.9, n = 500, z = 1.959964.
    low, high = wilson(450, 500)
    assert (round(low, 4), round(high, 4)) == (0.8706, 0.9233)
    assert wilson(0, 10)[0] == pytest.approx(0.0, abs=1e-12)
    assert wilson(10, 10)[1] == pytest.approx(1.0)


def test_recipes_exist_for_all_families_and_the_command_knows_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert RECIPES.keys() == FAMILIES.keys()
    with pytest.raises(SystemExit):
        train.main(["nano-x"])
    assert "nano-d" in capsys.readouterr().err
