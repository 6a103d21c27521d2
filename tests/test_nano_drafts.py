"""The recipe of Eagle3 heads: what is trained is what a head does when it drafts; what is written loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn.functional import one_hot, pad

from model_impl.errors import CheckpointError
from model_impl.multimodal import Gemma4ForConditionalGeneration, Media, load_multimodal_model
from model_impl.nano import accepted, drafts, problems
from model_impl.nano.batches import Course, encode
from model_impl.nano.curriculum import nano_tokenizer
from model_impl.nano.drafts import RECIPES, DraftRecipe, fresh_head, loss, publish, said, train
from model_impl.nano.scripted import digests
from model_impl.nano.train import Training
from model_impl.nano.unrolled import unrolled
from model_impl.speculative.eagle3 import Eagle3, load_eagle3
from model_impl.speculative.verify import Acceptance
from model_impl.text import States
from tests.model_configs import distance, random_ids
from tests.test_eagle3 import draft
from tests.test_nano_train import BRIEF
from tests.text_rules import SAME

torch.set_num_threads(1)
CHECKPOINTS = Path(drafts.__file__).parent / "checkpoints"
PASSES = 3
BRIEFLY = replace(RECIPES["nano-d"], steps=2, batch=2, warmup=1)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return nano_tokenizer()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Gemma4ForConditionalGeneration:
    model = Training("nano-d", BRIEF, tmp_path_factory.mktemp("state")).model
    return model.eval().requires_grad_(False)


def drafted(head: Eagle3, tokens: torch.Tensor, features: torch.Tensor, place: int) -> list[torch.Tensor]:
    """Logits of a draft that begins at a place, as one makes it: with a cache, pass by pass."""
    cache = head.make_cache(len(tokens))
    hidden, out = head(tokens[:, : place + 1], features[:, : place + 1], cache=cache)
    found = [head.logits(hidden[:, -1])]
    for number in range(1, PASSES):
        token = tokens[:, place + number : place + number + 1]
        hidden, out = head(token, out[:, -1:], cache=cache)
        found.append(head.logits(hidden[:, -1]))
    return found


def test_passes_side_by_side_are_those_of_drafts_that_begin_at_each_place() -> None:
    head = draft()
    width = 7
    tokens = random_ids(2, width + PASSES - 1)
    features = torch.randn(
        2, width, head.config.decoder.hidden_size, generator=torch.Generator().manual_seed(1)
    )
    together = list(unrolled(head, tokens, features, PASSES))
    assert len(together) == PASSES
    for place in range(width):
        for one, all_places in zip(drafted(head, tokens, features, place), together, strict=True):
            assert distance(all_places[:, place], one) < SAME


class Echo(torch.nn.Module):
    """A target that says the lesson's own tokens, whatever it is."""

    def __init__(self, target: Gemma4ForConditionalGeneration) -> None:
        super().__init__()
        self.config = target.config
        self.language_model = self

    def soft_tokens(self, ids: torch.Tensor, media: Media) -> None:
        """There are none."""

    def states(self, ids: torch.Tensor, *, aux_layers: Sequence[int], **_rest: object) -> States:
        """Each place says the token behind it."""
        size = self.config.text.vocab_size
        says = one_hot(pad(ids[:, 1:], (0, 1)), size).float()
        return States(says, (torch.zeros(*ids.shape, self.config.text.hidden_size),) * len(aux_layers))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """They are the states."""
        return hidden


def test_labels_stand_where_drafted_tokens_are_verified(
    target: Gemma4ForConditionalGeneration, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that knows the text agrees with a target that says it, up to what lies behind its end."""
    size = target.config.text.vocab_size
    head = fresh_head(target, BRIEFLY, torch.arange(size))
    lessons = Course((problems.lesson,), (1,)).lessons(2, "labels")
    batch = [encode(lesson, tokenizer, "large") for lesson in lessons]

    def knows(
        _head: Eagle3, tokens: torch.Tensor, features: torch.Tensor, passes: int
    ) -> Iterator[torch.Tensor]:
        for number in range(passes):
            following = pad(tokens, (0, 1))[:, number + 1 : number + 1 + features.shape[1]]
            yield one_hot(following, size).float()

    monkeypatch.setattr(drafts, "unrolled", knows)
    echo: Any = Echo(target)
    _, agreed = loss(head, echo, batch, BRIEFLY)
    # The last token of the longest answer is not fed, so that its target says nothing right there.
    drafted_first = sum(len(one.answer) - 1 for one in batch)
    for share in agreed:
        assert 1 - 3 * len(batch) / drafted_first < share <= 1


def test_training_lowers_the_loss_and_leaves_target_and_embeddings_alone(
    target: Gemma4ForConditionalGeneration, tokenizer: Tokenizer
) -> None:
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    recipe = replace(BRIEFLY, steps=6, batch=4)
    batch = [
        encode(lesson, tokenizer, "large") for lesson in Course((problems.lesson,), (1,)).lessons(4, "s")
    ]
    fresh = fresh_head(target, recipe, said(drafts.COURSE, tokenizer, "nano-d"))
    head = train(target, tokenizer, "nano-d", recipe)
    assert loss(head, target, batch, recipe)[0] < loss(fresh, target, batch, recipe)[0]
    assert torch.equal(head.embed_tokens.weight, target.language_model.embed_tokens.weight)
    after = target.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_written_head_is_read_back_as_it_was(
    target: Gemma4ForConditionalGeneration, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    head = fresh_head(target, BRIEFLY, said(drafts.COURSE, tokenizer, "nano-d"))
    manifest = publish(head, target, tmp_path, "nano-d", BRIEFLY)
    assert json.loads((tmp_path / "manifest.json").read_text()) == json.loads(json.dumps(manifest))
    read = load_eagle3(tmp_path, target_layers=6)
    assert read.config == head.config
    for (name, one), other in zip(head.state_dict().items(), read.state_dict().values(), strict=True):
        expected = one if name in ("d2t", "t2d") else one.bfloat16().float()
        assert torch.equal(other, expected), name
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["d2t"].dtype == torch.int64
    assert stored["t2d"].dtype == torch.bool


def test_every_recipe_names_layers_that_its_target_has() -> None:
    for recipe in RECIPES.values():
        assert isinstance(recipe, DraftRecipe)
        assert 0 <= min(recipe.layers) < max(recipe.layers) <= 6


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_bundled_head_is_the_one_that_its_recipe_made(name: str) -> None:
    folder = CHECKPOINTS / f"{name}-eagle3"
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    recipe = json.loads(json.dumps(asdict(RECIPES[name])))
    assert {field: manifest[field] for field in recipe} == recipe
    assert manifest["recipe"] == f"python -m model_impl.nano.drafts {name}"
    assert manifest["sha256"] == digests(folder)
    head = load_eagle3(folder, target_layers=6)
    own = load_file(CHECKPOINTS / name / "model.safetensors")["model.language_model.embed_tokens.weight"]
    assert torch.equal(head.embed_tokens.weight, own.float())
    assert head.embed_tokens.weight.shape[0] > len(head.d2t)
    acceptance = manifest["acceptance"]
    assert (acceptance["task"], acceptance["prompts"], acceptance["drafted"]) == ("nano_gsm8k", 500, 3)
    low, high = acceptance["interval"]
    assert 2.5 <= low < acceptance["tokens_a_round"] < high < 4
    assert acceptance["tokens_a_round"] == pytest.approx(1 + sum(acceptance["by_place"]), abs=0.05)


def test_a_bundled_head_is_measured_without_being_trained(tmp_path: Path) -> None:
    """Of some problems, and by the command's own function, on a copy."""
    folder = shutil.copytree(CHECKPOINTS / "nano-d-eagle3", tmp_path / "head")
    before = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    target = load_multimodal_model(CHECKPOINTS / "nano-d")
    tokenizer = Tokenizer.from_file(str(CHECKPOINTS / "nano-d" / "tokenizer.json"))
    manifest = drafts.score(target, tokenizer, folder, "nano-d", most=12)
    assert json.loads((folder / "manifest.json").read_text(encoding="utf-8")) == manifest
    whole, part = before.pop("acceptance"), manifest.pop("acceptance")
    assert manifest == before
    assert digests(folder) == before["sha256"]
    assert part["prompts"] == 12
    assert part["tokens_a_round"] == pytest.approx(whole["tokens_a_round"], abs=0.25)


def test_a_head_whose_files_are_others_is_not_measured(
    target: Gemma4ForConditionalGeneration, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = shutil.copytree(CHECKPOINTS / "nano-d-eagle3", tmp_path / "head")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"not those of manifest\.json"):
        drafts.score(target, tokenizer, folder, "nano-d")


def test_the_command_scores_and_does_not_train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[Path, str]] = []
    monkeypatch.setattr(drafts, "train", lambda *_rest: pytest.fail("a head was trained"))
    monkeypatch.setattr(drafts, "score", lambda _t, _k, folder, name: asked.append((folder, name)) or {})
    drafts.main(["nano-d", str(tmp_path), "--score", "--threads", "1", "--device", "cpu"])
    assert asked == [(tmp_path, "nano-d")]


def test_what_is_told_of_rounds() -> None:
    told = accepted.summary([Acceptance((3, 3), (3, 1)), Acceptance(), Acceptance((3,), (0,))])
    assert (told.prompts, told.rounds) == (2, 3)
    assert told.tokens_a_round == pytest.approx(1 + 4 / 3)
    assert told.by_place == pytest.approx((2 / 3, 1 / 3, 1 / 3))
    # Two prompts: resamples are of one of them, of both, or of the other one.
    assert told.interval == pytest.approx((1.0, 3.0))
    with pytest.raises(ValueError, match="1 of 2 answers had a draft"):
        accepted.summary([Acceptance((3,), (1,)), Acceptance()])
