"""Trained checkpoints in suites of invariance: the gates' own questions, the checkpoint's own head."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from conformance import resources
from conformance.answering import picture_sha256
from conformance.errors import SuiteError
from conformance.invariance.asking import Asker
from conformance.invariance.models import HEADED, TrainedModel
from conformance.invariance.prompting import checkpoint_of, prompts_of
from conformance.invariance_suite import DrawnPrompts, ExamPrompts, Way
from conformance.loading import case_digest, load_suite
from conformance.oracles import Oracles
from conformance.scoring import Sheet
from conformance.targets import bundled
from conformance.targets.reference_chat import Chat, checkpoint_folder
from model_impl.speculative.eagle3 import load_eagle3
from tests.invariance_cases import case_of, judged, suite_of
from tests.lying_engines import Engine

PROBLEMS = {"model": "nano-d", "prompts": {"task": "nano_gsm8k", "items": 5}}
PICTURES = {"model": "nano-d", "prompts": {"task": "nano_mmmu", "items": 12}}


@pytest.fixture(scope="module")
def oracles() -> Iterator[Oracles]:
    made = Oracles(lambda spec: pytest.fail(f"{spec} was opened"))
    yield made
    made.close()


@pytest.mark.parametrize(("name", "fields"), [("gsm8k", PROBLEMS), ("mmmu", PICTURES)])
def test_prompts_are_those_of_the_gate(name: str, fields: dict[str, Any], oracles: Oracles) -> None:
    from PIL import Image

    case = case_of(**fields)
    assert isinstance(case.prompts, ExamPrompts)
    prompts = prompts_of(case, oracles)
    sheet = Sheet.read(resources.suites_dir() / "accuracy" / "references" / f"{name}-nano-d.jsonl")
    items = sheet.items[: case.prompts.items]
    chat = Chat(checkpoint_folder("nano-d"))
    assert prompts.names == tuple(item.doc_id for item in items)
    assert prompts.ids == tuple(chat.ids(item.prompt) for item in items)
    assert prompts.stop_ids == chat.stop_ids
    shown = [[picture_sha256(Image.open(path)) for path in files] for files in prompts.images]
    assert shown == [list(item.media) for item in items]
    assert prompts_of(case, oracles) == prompts


def test_the_model_is_the_bundled_one_and_so_is_its_head(oracles: Oracles) -> None:
    folder = checkpoint_of(case_of(**PROBLEMS), oracles)
    assert folder == checkpoint_folder("nano-d")
    head = bundled.trained_draft(folder)
    assert head is not None
    assert head.name == "nano-d-eagle3"
    assert oracles.speaking_draft(folder, Way(eagle3={})) == head
    assert bundled.trained_draft(Path("elsewhere/nano-d")) is None
    assert bundled.trained_draft(bundled.checkpoint()) is None


def test_a_model_without_a_trained_head_has_a_random_one(oracles: Oracles) -> None:
    for name in get_args(TrainedModel):
        assert (bundled.trained_draft(checkpoint_folder(name)) is not None) == (name in HEADED), name
    case = case_of(**PROBLEMS | {"model": "nano-a", "change": {"eagle3": {"guesses": False}}})
    folder = oracles.speaking_draft(checkpoint_of(case, oracles), case.changed)
    assert folder.parent != checkpoint_folder("nano-a").parent
    assert load_eagle3(folder, target_layers=6).config.decoder.vocab_size > 0
    assert case_digest(case, suite_of(case))


def test_the_control_keeps_the_head_of_the_model_that_it_copies(oracles: Oracles, tmp_path: Path) -> None:
    engine = Engine()
    folder = checkpoint_folder("nano-d")
    way = Way(eagle3={})
    prompts = prompts_of(case_of(), oracles)
    Asker(engine, oracles, tmp_path, drafted_for=folder).greedy(way, prompts, 2)
    (request,) = engine.requests
    assert request.options.speculation is not None
    assert request.options.speculation.checkpoint == str(bundled.trained_draft(folder))


def test_of_many_prompts_few_are_asked_alone_for_the_noise(oracles: Oracles) -> None:
    engine = Engine()
    outcome = judged(engine, oracles, prompts=DrawnPrompts(lengths=tuple(range(3, 60))), max_new_tokens=2)
    assert outcome.verdict == "pass"
    alone = [request for request in engine.requests if len(request.prompts) == 1]
    # One more with either number of threads, for the same measure.
    assert len(alone) == 24 + 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "nano-d"}, "`task` and `items` are for trained models"),
        ({"prompts": PROBLEMS["prompts"]}, "`task` and `items` are for trained models"),
        ({**PROBLEMS, "weights": 2}, "`weights` is the seed of a drawn model"),
        ({**PROBLEMS, "change": {"assistant": {}}}, "have no `assistant`"),
        ({**PROBLEMS, "change": {"eagle3": {"guesses": False}}}, "has its own `guesses`"),
        ({**PROBLEMS, "base": {"eagle3": {"layers": [1], "seed": 2}}}, "has its own `layers`, `seed`"),
        ({**PROBLEMS, "model": "nano-a", "change": {"eagle3": {}}}, "no head of nano-a is trained"),
    ],
)
def test_what_a_trained_model_brings_cannot_be_chosen(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        case_of(**fields)


def test_a_head_that_is_not_bundled_is_an_error_of_the_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "suites" / "invariance" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(
        "kind: invariance\nid: invariance/mine\ntitle: Mine\ndescription: Mine.\narea: invariance-caches\n"
        "cases:\n  - {id: one, title: A head that is not there, source: [spec 1.6], model: nano-d,\n"
        "     prompts: {task: nano_gsm8k, items: 2}, change: {eagle3: {}}}\n"
    )
    has = bundled.has
    monkeypatch.setattr(bundled, "has", lambda name: has(name) and "eagle3" not in name)
    with pytest.raises(SuiteError, match=r"mine\.yaml:7.*no checkpoint 'nano-d-eagle3' is bundled"):
        load_suite(file)


def test_the_digest_holds_weights_questions_and_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    def digest() -> str:
        case = case_of(**PROBLEMS | {"change": {"eagle3": {}}})
        suite = suite_of(case)
        return case_digest(case, suite)

    before, digests = digest(), bundled.digests
    for part in ("nano-d", "nano-d-eagle3"):
        with monkeypatch.context() as patch:
            patch.setattr(bundled, "digests", lambda name, part=part: digests(name) | {"other": name == part})
            changed = digest()
            patch.setattr(bundled, "digests", lambda name: digests(name) | {"other": False})
            assert changed != digest(), part
    with monkeypatch.context() as patch:
        other = resources.task_data("nano_mmmu")
        patch.setattr(resources, "task_data", lambda _task: other)
        assert digest() != before
