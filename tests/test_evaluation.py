"""A target's answers become a sheet: classes of answers, and scores that depend on nothing but the item."""

from __future__ import annotations

import json
import random
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks.mmmu import utils as lm_eval_mmmu  # type: ignore[import-untyped]

from conformance import resources
from conformance.answering import EvaluationError, UnavailableError
from conformance.evaluation import EvaluationOptions, evaluate
from conformance.scoring import Sheet
from conformance.targets import bundled, reference_chat, registry
from conformance.targets.protocol import EngineOptions
from conformance.targets.reference_chat import CheckpointError
from conformance.tasks import mmmu
from conformance.tasks.sources import DataError
from tests.miniature_mmmu import BUSINESS, EACH, write_mmmu, write_mmmu_pro
from tests.speaking_targets import Generates, Serves, refuses

COMMITTED = resources.task_data
"""The package's own, before tests put theirs in its place."""
QUESTIONS = [
    {
        "id": f"q{number}",
        "question": f"How many are {number} and {number}?",
        "answer": f"so\n#### {2 * number}",
    }
    for number in range(8)
]
PERFECT = {f"How many are {n} and {n}?": f"It is {2 * n}, I think.\n#### {2 * n}<turn|>" for n in range(8)}


@pytest.fixture(autouse=True)
def few_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`nano_gsm8k` with a few hand-made documents."""
    lines = [json.dumps(doc) + "\n" for doc in QUESTIONS]
    (tmp_path / "nano_gsm8k.jsonl").write_text("".join(lines), encoding="utf-8")
    monkeypatch.setattr(resources, "task_data", lambda task: tmp_path / f"{task}.jsonl")
    monkeypatch.setenv("CONFORMANCE_DATA_DIR", str(tmp_path))


def perfect(prompt: str) -> str:
    return next(said for question, said in PERFECT.items() if question in prompt)


def ask(target: Any, task: str = "nano_gsm8k", **options: Any) -> Sheet:
    limit, seed = options.pop("limit", None), options.pop("seed", 0)
    return evaluate(
        target, task, checkpoint="scripted", limit=limit, seed=seed, options=EvaluationOptions(**options)
    )


# ------------------------------------------------------------------------------------------ classes


def test_right_answers_are_right_under_both_filters() -> None:
    for scheme in ("strict-match", "flexible-extract"):
        sheet = ask(Generates(perfect), filter=scheme)
        assert sheet.counts()["correct"] == len(QUESTIONS)
        assert {item.extracted for item in sheet.items} == {str(2 * n) for n in range(8)}
        assert all(item.expected == item.extracted for item in sheet.items), "not the worked solution"
        assert sheet.header.filter == scheme


@pytest.mark.parametrize(
    ("said", "outcome", "extracted"),
    [
        ("#### 7<turn|>", "wrong", "7"),
        ("I do not know.<turn|>", "unparsable", None),
        ("<turn|>", "empty", None),
        ("<|channel>thought\n#### 6<channel|><turn|>", "empty", None),
        ("<|channel>thought\nlet me think", "truncated", None),
        ("#### 7, or is it " + "7 " * 300, "truncated", "7,"),
    ],
)
def test_wrong_answers_by_class(said: str, outcome: str, extracted: str | None) -> None:
    sheet = ask(Generates(lambda prompt: said), limit=1)
    (item,) = sheet.items
    assert (item.outcome, item.extracted) == (outcome, extracted)


def test_thoughts_are_no_answers() -> None:
    said = "<|channel>thought\n6+1=7 #### 99<channel|>Hence #### {}<turn|>"
    sheet = ask(Generates(lambda prompt: said.format(perfect(prompt).split("#### ")[1][:-7])), thinking=True)
    assert sheet.counts()["correct"] == len(QUESTIONS)
    assert all("#### 99" in item.answer for item in sheet.items), "they are kept to be looked at"
    assert all("<|think|>" in item.prompt for item in sheet.items)


def test_a_refused_prompt_costs_no_other() -> None:
    sheet = ask(Generates(refuses("are 3 and 3", perfect)))
    found = {item.doc_id: item for item in sheet.items}
    assert found["q3"].outcome == "refused"
    assert (found["q3"].error, found["q3"].extracted) == ("no such prompts", None)
    assert sheet.counts()["correct"] == 7


def test_a_dead_target_is_no_wrong_answer_and_is_not_asked_again() -> None:
    target = Generates(refuses("are 3 and 3", perfect, dies=True))
    sheet = ask(target, batch_size=4)
    assert sheet.counts()["transport-error"] == 4
    assert sheet.counts()["correct"] == 4
    assert len(target.asked) == 2


def test_what_did_not_run_as_asked_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="dtype 'float32' was asked for and 'bfloat16' ran"):
        ask(Generates(perfect, dtype="bfloat16"))


@pytest.mark.parametrize(
    ("silent", "engine", "named"),
    [
        (("dtype", "attention"), {}, "dtype"),
        (("dtype",), {"dtype": "bfloat16"}, "dtype"),
        (("attention",), {"attention": "eager"}, "attention"),
        ((), {"tensor_parallel": 2, "attention": "mouth"}, "tensor_parallel"),
        ((), {"pipeline_parallel": 2}, "pipeline_parallel"),
    ],
)
def test_a_target_that_does_not_tell_what_ran_is_not_believed(
    silent: tuple[str, ...], engine: dict[str, Any], named: str
) -> None:
    target = Generates(perfect, silent=silent, features=("tensor-parallel", "pipeline-parallel"))
    with pytest.raises(EvaluationError, match=f"generates: does not tell which {named} ran"):
        ask(target, engine=EngineOptions(**engine), limit=1)


def test_who_never_answered_has_nothing_to_tell() -> None:
    sheet = ask(Generates(refuses("How many", perfect)), limit=2)
    assert sheet.counts()["refused"] == 2
    assert (sheet.header.dtype, sheet.header.effective) == ("unknown", {})


# ------------------------------------------------------------------------------------------ the item alone


def test_items_depend_on_neither_order_nor_subset() -> None:
    every = {item.doc_id: item for item in ask(Generates(perfect)).items}
    orders = set()
    for order_seed in range(3):
        part = ask(Generates(perfect), limit=5, order_seed=order_seed)
        assert len(part.items) == 5
        assert part.header.order_seed == order_seed
        orders.add(tuple(item.doc_id for item in part.items))
        assert all(item == every[item.doc_id] for item in part.items)
    assert len(orders) == 3


def examples_of(sheet: Sheet) -> dict[str, str]:
    return {item.doc_id: item.prompt for item in sheet.items}


def test_solved_examples_depend_on_the_seed_and_the_document_alone(tmp_path: Path) -> None:
    for split, count in (("train", 40), ("test", 10)):
        rows = [{"question": f"{split} {n}?", "answer": f"#### {n}"} for n in range(count)]
        (tmp_path / "gsm8k").mkdir(exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text(text, encoding="utf-8")
    whole = ask(Generates(lambda prompt: "#### 1<turn|>"), "gsm8k")
    assert whole.header.shots == 5
    assert all(prompt.count("<|turn>model") == 6 for prompt in examples_of(whole).values())
    assert len({prompt.split("Question: test")[0] for prompt in examples_of(whole).values()}) > 5
    part = ask(Generates(lambda prompt: "#### 1<turn|>"), "gsm8k", limit=4, order_seed=9)
    assert examples_of(part).items() <= examples_of(whole).items()
    other = ask(Generates(lambda prompt: "#### 1<turn|>"), "gsm8k", seed=1)
    assert examples_of(other).items().isdisjoint(examples_of(whole).items())
    assert set(whole.header.data) == {"gsm8k/test.jsonl", "gsm8k/train.jsonl"}


def replies(text: str) -> str:
    """Letters, words, numbers, and every third time nothing that could be read."""
    number = sum(map(ord, text)) % 7
    return ("(A)", "a fig, that is what I see here", "I cannot say", "B", "12.5", "hm, hm", "Answer: D")[
        number
    ]


def test_mmmu_items_depend_on_neither_order_nor_subset_nor_chance(tmp_path: Path) -> None:
    write_mmmu(tmp_path)
    random.seed(1)
    whole = ask(Serves(replies), "mmmu_val_business")
    every = {item.doc_id: item for item in whole.items}
    assert len(every) == len(BUSINESS) * EACH == whole.header.available
    assert {"correct", "wrong", "unparsable"} <= {item.outcome for item in whole.items}
    assert Counter(item.cluster for item in whole.items) == {
        f"mmmu_val_{subject.lower()}": EACH for subject in BUSINESS
    }
    for order_seed in (1, 2):
        random.seed(order_seed)
        part = ask(Serves(replies), "mmmu_val_business", limit=17, order_seed=order_seed)
        assert all(item == every[item.doc_id] for item in part.items)


def test_lm_eval_s_own_reader_draws_where_ours_says_unparsable() -> None:
    """The control of the test before: chance would show."""
    doc = {"question_type": "multiple-choice", "options": "['a', 'b', 'c', 'd']", "answer": "A"}
    assert mmmu.process_results(doc, mmmu.Choice().apply([["hm"]], [doc])[0]) == {"acc": 0.0}
    scores = set()
    for seed in range(20):
        random.seed(seed)
        scores.add(lm_eval_mmmu.process_results(doc, ["hm"])["acc"])
    assert scores == {0.0, 1.0}


# ------------------------------------------------------------------------------------------ servers


def test_a_server_gets_conversations_and_its_thoughts_are_kept() -> None:
    target = Serves(lambda text: perfect(text).removesuffix("<turn|>"), reasoning="adding up")
    sheet = ask(target, thinking=True, limit=3)
    assert sheet.counts()["correct"] == 3
    assert all(item.answer.startswith("<|channel>thought\nadding up<channel|>It is") for item in sheet.items)
    assert {item.tokens for item in sheet.items} == {3}
    assert target.bodies[0]["chat_template_kwargs"] == {"enable_thinking": True}
    assert target.bodies[0]["max_tokens"] == 192
    assert (sheet.header.template_sha256, sheet.header.checkpoint_sha256) == ("", "")
    assert sheet.header.dtype == "unknown"


def test_prompt_hashes_are_the_same_for_every_target() -> None:
    one = {item.doc_id: item.prompt_hash for item in ask(Generates(perfect), thinking=True).items}
    other = {item.doc_id: item.prompt_hash for item in ask(Serves(perfect), thinking=True).items}
    without = {item.doc_id: item.prompt_hash for item in ask(Serves(perfect)).items}
    assert one == other
    assert one.items().isdisjoint(without.items()), "with a thought it is another question"
    assert len(set(one.values())) == len(one)


def test_pictures_reach_a_server_in_the_order_of_the_text(tmp_path: Path) -> None:
    write_mmmu(tmp_path)
    target = Serves(replies)
    sheet = ask(target, "mmmu_val_accounting")
    body = next(body for body in target.bodies if "beside" in str(body))
    kinds = [part["type"] for part in body["messages"][-1]["content"]]
    assert kinds == ["text", "image_url", "text", "image_url", "text", "image_url", "text"]
    (item,) = (item for item in sheet.items if len(item.media) == 3)
    assert item.media[0] == item.media[2] != item.media[1]
    urls = [p["image_url"]["url"] for p in body["messages"][-1]["content"] if p["type"] == "image_url"]
    assert urls[0] == urls[2] != urls[1]


def test_mmmu_pro_from_parts_of_the_hub_s_files(tmp_path: Path) -> None:
    write_mmmu_pro(tmp_path)
    target = Serves(lambda text: "Answer: J" if "10 options" in text or "picture shows" in text else "(J)")
    standard = ask(target, "mmmu_pro_standard")
    assert [item.doc_id for item in standard.items if item.outcome == "correct"] == ["test_9"]
    assert {item.cluster for item in standard.items} == {"Art", "Music"}
    assert "(J) the number 9" in standard.items[0].prompt
    assert len(standard.header.data) == 2
    seen = ask(target, "mmmu_pro_vision")
    assert seen.counts()["correct"] == 4
    assert "the number" not in seen.items[0].prompt


# ------------------------------------------------------------------------------------------ wrong use


def test_a_target_that_cannot_see_is_not_asked(tmp_path: Path) -> None:
    write_mmmu(tmp_path)
    target = Generates(perfect)
    with pytest.raises(UnavailableError, match="generates cannot generate with images"):
        ask(target, "mmmu_val_accounting")
    assert target.asked == []


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("nano_gsm9k", {}, "there is no task 'nano_gsm9k'"),
        ("nano_gsm8k", {"filter": "loose"}, "no filter 'loose'; it has strict-match, flexible-extract"),
        ("nano_gsm8k", {"limit": 0}, "a limit of 0"),
        ("nano_gsm8k", {"chat_template": False, "thinking": True}, "leave it on, or thinking off"),
    ],
)
def test_wrong_use_says_what_is_wrong(task: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        ask(Generates(perfect), task, **options)


def test_data_that_is_not_at_hand_says_where_it_could_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        DataError, match=r"MMMU/MMMU_Pro \(vision\): not in .* name it in CONFORMANCE_DATA_DIR"
    ):
        ask(Serves(replies), "mmmu_pro_vision")


def test_a_checkpoint_is_a_folder_or_a_name(tmp_path: Path) -> None:
    assert reference_chat.checkpoint_folder("scripted") == bundled.checkpoint()
    assert reference_chat.checkpoint_folder(bundled.checkpoint()) == bundled.checkpoint()
    for name in ("scribbled", "", tmp_path):
        with pytest.raises(CheckpointError):
            reference_chat.checkpoint_folder(name)


# ------------------------------------------------------------------------------------------ going on


def test_an_interrupted_evaluation_goes_on(tmp_path: Path) -> None:
    said = iter(range(100))

    def breaks(prompt: str) -> str:
        if next(said) == 3:
            raise KeyboardInterrupt
        return perfect(prompt)

    cache = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        ask(Generates(breaks), batch_size=1, cache=cache)
    assert len(cache.read_text().splitlines()) == 3
    with cache.open("a") as file:
        file.write('{"key": "torn')
    target, told = Generates(perfect), []
    sheet = evaluate(
        target,
        "nano_gsm8k",
        checkpoint="scripted",
        options=EvaluationOptions(batch_size=1, cache=cache),
        progress=lambda done, total: told.append((done, total)),
    )
    assert sheet.counts()["correct"] == 8
    assert len(target.asked) == 5
    assert told == [(done, 8) for done in range(3, 9)]


def test_failures_are_asked_again_by_another_evaluation(tmp_path: Path) -> None:
    cache = tmp_path / "answers.jsonl"
    ask(Generates(refuses("are 3 and 3", perfect)), cache=cache)
    target = Generates(perfect)
    assert ask(target, cache=cache).counts()["correct"] == 8
    assert [len(request.prompts) for request in target.asked] == [1]


def test_kept_answers_tell_what_ran(tmp_path: Path) -> None:
    """All of them are there, so that the target says nothing any more."""
    cache = tmp_path / "answers.jsonl"
    ask(Generates(perfect), cache=cache)
    target = Generates(perfect)
    sheet = ask(target, cache=cache)
    assert target.asked == []
    assert sheet.header.effective == {"dtype": "float32", "attention": "mouth"}
    lines = [json.loads(line) for line in cache.read_text().splitlines()]
    cache.write_text("".join(json.dumps(line | {"effective": {}}) + "\n" for line in lines))
    with pytest.raises(EvaluationError, match="does not tell which dtype ran"):
        ask(target, cache=cache)


def test_answers_of_another_setting_are_not_taken(tmp_path: Path) -> None:
    cache = tmp_path / "answers.jsonl"
    ask(Generates(perfect), cache=cache)
    target = Generates(perfect)
    ask(target, cache=cache, max_new_tokens=100)
    assert len(target.asked[0].prompts) == 8


# ------------------------------------------------------------------------------------------ the real thing


def test_the_committed_task_is_answered_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "task_data", COMMITTED)
    target = registry.open_target("reference")
    sheet = ask(target, limit=3, thinking=True, max_new_tokens=24)
    assert sheet.header.available >= 500
    assert sheet.header.checkpoint_sha256 == reference_chat.checkpoint_sha256(bundled.checkpoint())
    assert sheet.header.effective["dtype"] == sheet.header.dtype == "float32"
    assert sheet.header.torch == metadata.version("torch")
    assert {item.outcome for item in sheet.items} <= {"unparsable", "wrong", "truncated"}
    assert all(item.answer for item in sheet.items)
