"""The scripted checkpoint's adapter: what it is made of, and what is said with it, by a wide margin."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer

from conformance.targets.bundled import adapter, checkpoint, dialogues, tokenizer
from conformance.targets.protocol import GenerateRequest
from conformance.targets.reference import ReferenceTarget
from model_impl.lora import Adapter, Sites
from model_impl.nano import adapted
from model_impl.nano.script import ADAPTER_SAYS, checkpoint_folder, load_script
from model_impl.nano.scripted import MARGIN, digests

torch.set_num_threads(1)

MANIFEST = json.loads((adapter() / "manifest.json").read_text(encoding="utf-8"))


def test_the_files_are_those_of_the_manifest() -> None:
    assert digests(adapter()) == MANIFEST["sha256"]
    assert sum(path.stat().st_size for path in adapter().iterdir()) < 100_000


def test_every_tensor_has_its_place_in_the_text_model_alone() -> None:
    found = Adapter.load(adapter(), Sites.of_checkpoint(checkpoint()))
    layers = load_layers()
    assert len(found.changes) == 7 * layers
    assert all(name.startswith("language_model.layers.") for name in found.changes)
    assert not found.dead


def load_layers() -> int:
    raw = json.loads((checkpoint() / "config.json").read_text(encoding="utf-8"))
    return int(raw["text_config"]["num_hidden_layers"])


def test_it_says_the_other_line_and_all_lines_by_the_margin() -> None:
    found = adapted.measure(
        adapter(),
        load_script(),
        Tokenizer.from_file(str(checkpoint_folder() / "tokenizer.json")),
        held_out=45,
    )
    assert found["smallest_gap_other"] > MARGIN
    assert found["smallest_gap_lines"] > MARGIN
    assert found["right_unseen"] > 0.8


def test_the_reference_says_it_row_by_row() -> None:
    default, plain = dialogues("alone", ("default",))[0], dialogues("alone", ("plain",))[0]
    prompts = (default.prompt, default.prompt, plain.prompt)
    result = ReferenceTarget().generate(
        GenerateRequest(
            checkpoint=str(checkpoint()),
            prompts=prompts,
            adapters=(None, str(adapter()), str(adapter())),
            max_new_tokens=12,
            stop_ids=(106,),
        )
    )
    said = [made.token_ids for made in result.generations]
    other = tuple(tokenizer().encode(f"{ADAPTER_SAYS}<turn|>", add_special_tokens=False).ids)
    assert said == [default.answer, other, plain.answer]


def test_the_recipe_makes_an_adapter_of_its_own(tmp_path: Path) -> None:
    """A few steps: the same seed gives the same bytes, and a model that is left alone."""
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        made.append(adapted.make(tmp_path / name, load_script(), steps=2, conversations=5))
    assert made[0]["sha256"] == made[1]["sha256"] != MANIFEST["sha256"]
    assert made[0]["smallest_gap_other"] < 0 < made[0]["smallest_gap_lines"]
