"""vLLM's real engine behind `generate`: what it says, what it ran with, and that nothing of it is left.

The tests that start an engine need the engine's part of vLLM's environment. They are ordered so that few
engines start: one answers all requests that can share it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from conformance.errors import EngineError, TargetTimeoutError
from conformance.targets import bundled, environments, process, reference_model, registry
from conformance.targets.bundled import Dialogue
from conformance.targets.process import WorkerTarget
from conformance.targets.protocol import (
    GenerateRequest,
    GenerateResult,
    Generation,
    LoglikelihoodRequest,
)
from conformance.targets.reference import ReferenceTarget
from conformance.worker.adapters import vllm_engine
from model_impl.checkpoint import load_text_model
from tests.processes import children

SPEC = "vllm@0.32.0"
LONGEST = 160
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PLAIN = {
    "attention": "CPU_ATTN",
    "dtype": "float32",
    "tensor_parallel": "1",
    "pipeline_parallel": "1",
    "speculation": "none",
    "adapter": "none",
}


def request(**changes: Any) -> GenerateRequest:
    """All lines as one batch, unless a test asks for something else."""
    values: dict[str, Any] = {
        "checkpoint": str(bundled.checkpoint()),
        "prompts": tuple(dialogue.prompt for dialogue in dialogues()),
        "max_new_tokens": LONGEST,
        "stop_ids": bundled.STOP_IDS,
        "top_logprobs": 3,
    }
    return GenerateRequest.model_validate(values | changes)


@cache
def dialogues() -> tuple[Dialogue, ...]:
    return (*bundled.dialogues("alone"), *bundled.dialogues("tools"), *bundled.dialogues("thinking"))


# --------------------------------------------------------------------------------------- without an engine


def payload(**changes: Any) -> dict[str, Any]:
    return cast(dict[str, Any], request(prompts=((2, 105), (2,)), **changes).model_dump())


def setup(**changes: Any) -> dict[str, Any]:
    return vllm_engine.engine_setup(payload(**changes))


def test_requests_that_can_share_an_engine(tmp_path: Path) -> None:
    plain = setup()
    assert setup(max_new_tokens=3, stop_ids=(), top_logprobs=0) == plain
    assert setup(images=((), ())) == plain
    assert setup(images=(("one.png",), ())) == setup(images=((), ("one.png", "two.png", "three.png")))
    for rank, folder in ((4, tmp_path / "one"), (4, tmp_path / "two"), (9, tmp_path / "three")):
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    adapted = setup(adapter=str(tmp_path / "one"))
    assert adapted == setup(adapter=str(tmp_path / "two"))
    others = [
        setup(options={"dtype": "bfloat16"}),
        setup(options={"attention": "CPU_ATTN"}),
        setup(options={"max_model_len": 99}),
        setup(options={"tensor_parallel": 2}),
        setup(options={"pipeline_parallel": 2}),
        setup(images=(("one.png",), ())),
        setup(images=(("one.png",) * 5, ())),
        setup(images=(("one.png",) * 17, ())),
        setup(sounds=(("one.wav",), ())),
        adapted,
        setup(adapter=str(tmp_path / "three")),
    ]
    for number, other in enumerate(others):
        assert other not in [plain, *others[:number]]


def test_a_checkpoint_that_was_written_anew_needs_another_engine(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = setup(checkpoint=str(tmp_path))
    assert setup(checkpoint=str(tmp_path)) == before
    os.utime(tmp_path / "config.json", ns=(1, 1))
    assert setup(checkpoint=str(tmp_path)) != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "adapter_config.json cannot be read"),
        ("{", "adapter_config.json cannot be read"),
        ("{}", "has no `r`: 'r'"),
        ("[]", "has no `r`"),
        ('{"r": 0}', "`r` 0; expected a positive number"),
        ('{"r": "8"}', "`r` '8'; expected a positive number"),
    ],
)
def test_an_adapter_that_cannot_be_read(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(vllm_engine.RequestError, match=message):
        setup(adapter=str(tmp_path))


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(vllm_engine.RequestError, match="gone: cannot be read: No such file"):
        setup(checkpoint=str(tmp_path / "gone"))


def test_options_become_arguments_of_the_engine(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 9}')
    draft = {"method": "eagle3", "checkpoint": str(tmp_path), "tokens": 2}
    options = {
        "dtype": "bfloat16",
        "attention": "CPU_ATTN",
        "tensor_parallel": 2,
        "pipeline_parallel": 3,
        "speculation": draft,
        "max_model_len": 77,
    }
    asked = setup(options=options, adapter=str(tmp_path), images=(("a.png", "b.png"), ()))
    made = vllm_engine.llm_arguments(asked, (1, 8, 16, 32))
    assert {
        "model": str(bundled.checkpoint()),
        "dtype": "bfloat16",
        "max_model_len": 77,
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 3,
        "distributed_executor_backend": "mp",
        "attention_config": {"backend": "CPU_ATTN"},
        "speculative_config": {"method": "eagle3", "model": str(tmp_path), "num_speculative_tokens": 2},
        "enable_lora": True,
        "max_lora_rank": 16,
        "limit_mm_per_prompt": {"image": 4, "audio": 0, "video": 0},
        "skip_tokenizer_init": False,
    }.items() <= made.items()
    plain = vllm_engine.llm_arguments(setup(), (1, 8))
    assert plain["distributed_executor_backend"] == "uni"
    assert plain["skip_tokenizer_init"]
    assert not {"attention_config", "speculative_config", "enable_lora", "max_lora_rank"} & plain.keys()
    assert vllm_engine.llm_arguments(asked, (1, 8))["max_lora_rank"] == 9, "vLLM itself says what it can do"


def test_an_assistant_is_what_vllm_calls_mtp(tmp_path: Path) -> None:
    draft = {"method": "assistant", "checkpoint": str(tmp_path), "tokens": 2}
    made = vllm_engine.llm_arguments(setup(options={"speculation": draft}), ())
    assert made["speculative_config"]["method"] == "mtp"
    assert "assistant" in vllm_engine.FEATURES
    assert [vllm_engine._known(method) for method in ("mtp", "eagle3", "ngram")] == [
        "assistant",
        "eagle3",
        "ngram",
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {}),
        ({"prefix_cache": False}, {"enable_prefix_caching": False}),
        ({"prefix_cache": True}, {"enable_prefix_caching": True, "block_size": 32}),
        ({"prefix_cache": True, "block_size": 64}, {"enable_prefix_caching": True, "block_size": 64}),
        ({"block_size": 64}, {"block_size": 64}),
        ({"max_sequences": 2}, {"max_num_seqs": 2}),
        ({"expert_parallel": True}, {"enable_expert_parallel": True}),
        ({"prefill_chunk": 7}, {"max_num_batched_tokens": 7, "max_num_seqs": 7}),
        ({"prefill_chunk": 7, "max_sequences": 2}, {"max_num_batched_tokens": 7, "max_num_seqs": 2}),
    ],
)
def test_a_schedule_becomes_arguments_of_the_engine(
    options: dict[str, Any], expected: dict[str, Any]
) -> None:
    made = vllm_engine.llm_arguments(setup(options=options), ())
    plain = vllm_engine.llm_arguments(setup(), ())
    if "prefill_chunk" in options:
        expected = {"enable_chunked_prefill": True, **expected}
    assert {name: value for name, value in made.items() if name not in plain} == expected


@pytest.mark.parametrize(("chunk", "sequences"), [(7, 1), (8, 2), (16, 4), (2, 1)])
def test_a_step_has_tokens_for_the_drafts_of_each_sequence(
    chunk: int, sequences: int, tmp_path: Path
) -> None:
    draft = {"method": "eagle3", "checkpoint": str(tmp_path), "tokens": 3}
    asked = setup(options={"prefill_chunk": chunk, "speculation": draft})
    made = vllm_engine.llm_arguments(asked, ())
    assert (made["max_num_batched_tokens"], made["max_num_seqs"]) == (chunk, sequences)
    assert made["per_request_spec_decode_metrics"] == "detailed"
    assert "per_request_spec_decode_metrics" not in vllm_engine.llm_arguments(setup(), ())


def test_an_engine_that_does_not_start_leaves_no_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_arguments: Any) -> None:
        raise AttributeError("drafter")

    forgotten: list[bool] = []
    monkeypatch.setitem(sys.modules, "vllm", cast(Any, SimpleNamespace(LLM=refuse)))
    monkeypatch.setitem(sys.modules, "vllm.config.lora", cast(Any, SimpleNamespace(MaxLoRARanks=None)))
    monkeypatch.setattr(vllm_engine, "_forget_shared_memory", lambda: forgotten.append(True))
    with pytest.raises(AttributeError, match="drafter"):
        vllm_engine._LlmEngine(setup())
    assert forgotten == [True]


def test_an_answer_of_the_engine_becomes_a_generation() -> None:
    at = [{5: SimpleNamespace(logprob=-0.5), 7: SimpleNamespace(logprob=-1.5)}] * 2
    output = SimpleNamespace(token_ids=[5, 7], finish_reason="length", logprobs=at)
    top = [{5: -0.5, 7: -1.5}] * 2
    expected = {"token_ids": [5, 7], "finish_reason": "length", "logprobs": [-0.5, -1.5]}
    untold = {"accepted": None, "drafted": []}
    made = vllm_engine.generation(output, top=True)
    assert made == expected | untold | {"top": top, "cached_tokens": None}
    made = vllm_engine.generation(output, top=False, cached=16)
    assert made == expected | untold | {"top": [], "cached_tokens": 16}
    output.spec_decode_metrics = SimpleNamespace(per_step_accepted=[3, 0], per_step_drafted=[3, 1])
    made = vllm_engine.generation(output, top=False)
    assert (made["accepted"], made["drafted"]) == ([3, 0], [3, 1])


def test_likelihoods_are_of_the_end_of_a_prompt() -> None:
    def at(**found: tuple[float, int]) -> dict[int, SimpleNamespace]:
        return {
            int(name[1:]): SimpleNamespace(logprob=value, rank=rank) for name, (value, rank) in found.items()
        }

    said = [None, at(t5=(-9.0, 7), t6=(-0.1, 1)), at(t6=(-0.5, 1)), at(t7=(-2.0, 2), t8=(-0.2, 1))]
    assert vllm_engine.likelihood(said, [8]) == {"logprob": -0.2, "greedy": True}
    assert vllm_engine.likelihood(said, [6, 8]) == {"logprob": -0.7, "greedy": True}
    assert vllm_engine.likelihood(said, [6, 7]) == {"logprob": -2.5, "greedy": False}


def test_what_ranks_disagree_about_is_said() -> None:
    ranks = [
        {name: [value] for name, value in PLAIN.items() if value != "none"}
        | {"speculation": [], "adapter": []},
        {name: [value] for name, value in PLAIN.items() if value != "none"}
        | {"dtype": ["bfloat16"], "speculation": ["eagle3"], "adapter": ["layers.1", "layers.0"]},
    ]
    assert vllm_engine.agreed(ranks[:1]) == PLAIN
    assert vllm_engine.agreed(ranks) == PLAIN | {
        "dtype": "bfloat16, float32",
        "speculation": "eagle3",
        "adapter": "layers.0, layers.1",
    }


def test_what_the_scheduler_goes_by_is_read_from_it() -> None:
    scheduler = SimpleNamespace(
        kv_cache_manager=SimpleNamespace(enable_caching=False),
        max_num_scheduled_tokens=7,
        max_num_running_reqs=2,
    )
    ranks = [{"block_size": ["32"], "expert_parallel": ["on"], "stage": [(0, 2)]}, {"stage": [(2, 3)]}]
    none = dict.fromkeys(("attention", "dtype", "tensor_parallel", "pipeline_parallel"), "none")
    assert vllm_engine.agreed([*ranks, vllm_engine.scheduled(scheduler)]) == none | {
        "speculation": "none",
        "adapter": "none",
        "expert_parallel": "on",
        "prefix_cache": "off",
        "block_size": "32",
        "prefill_chunk": "7",
        "max_sequences": "2",
        "pipeline_split": "2,1",
    }


def test_without_the_engine_part_the_target_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = environments.status(SPEC)
    if found.state != "ready":
        pytest.skip(f"{SPEC} is not installed: {found.reason}")
    monkeypatch.setattr(environments, "_installed_parts", lambda path, lock: {})
    target = registry.open_target(SPEC)
    try:
        info = registry.describe(target)
    finally:
        target.close()
    assert "generate" not in info.capabilities
    assert info.features == ()
    for name in ("generate", "loglikelihood"):
        assert name not in info.capabilities
        assert "run `conformance targets install vllm@0.32.0`" in info.unavailable[name]  # type: ignore[index]


# --------------------------------------------------------------------------------------------- the engine


@pytest.fixture(scope="module")
def engine() -> Iterator[WorkerTarget]:
    found = environments.status(SPEC)
    lacking = found.reason or found.lacking.get("engine", "")
    if lacking:
        pytest.skip(f"the engine of {SPEC} is not installed: {lacking}")
    target = cast(WorkerTarget, registry.open_target(SPEC))
    yield target
    target.close()


def engines(target: WorkerTarget) -> list[int]:
    """Processes of the engines that a target's worker holds; the worker is its guardian's only child."""
    (worker,) = children(target.pid)
    found = children(worker)
    assert found
    return found


def answered(result: GenerateResult) -> list[tuple[int, ...]]:
    assert {answer.finish_reason for answer in result.generations} == {"stop"}
    return [answer.token_ids for answer in result.generations]


def lines() -> list[tuple[int, ...]]:
    return [dialogue.answer for dialogue in dialogues()]


def forward_logprobs(prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """Of every token at each position of the answer, by the bundled implementation."""
    model = load_text_model(bundled.checkpoint(), dtype=torch.float32)
    with torch.inference_mode():
        logits = model.logits(model(torch.tensor([[*prompt, *answer]])))[0]
    return logits[len(prompt) - 1 : -1].float().log_softmax(dim=-1)


def assert_logprobs(dialogue: Dialogue, answer: Generation) -> None:
    expected = forward_logprobs(dialogue.prompt, answer.token_ids)
    ids = torch.tensor(answer.token_ids)
    chosen = expected.gather(1, ids[:, None])[:, 0]
    assert torch.allclose(torch.tensor(answer.logprobs), chosen, rtol=0, atol=1e-3)
    assert len(answer.top) == len(ids)
    for found, row in zip(answer.top, expected, strict=True):
        assert 3 <= len(found) <= 4
        values, places = row.topk(3)
        assert {int(place) for place in places} <= set(found) or values[2] - min(found.values()) < 1e-3
        for token, logprob in found.items():
            assert math.isclose(logprob, float(row[token]), abs_tol=1e-3)


def test_the_engine_says_every_line_verbatim(engine: WorkerTarget) -> None:
    info = registry.describe(engine)
    assert "generate" in info.capabilities
    assert set(info.features) >= {"tensor-parallel", "eagle3", "lora", "images"}
    result = engine.generate(request())
    assert result.effective.items() >= PLAIN.items()  # how it schedules is its own choice
    assert answered(result) == lines()
    for dialogue, answer in list(zip(dialogues(), result.generations, strict=True))[::9]:
        assert_logprobs(dialogue, answer)


def test_only_the_stop_ids_end_an_answer(engine: WorkerTarget) -> None:
    first = dialogues()[0]
    engine.generate(request(prompts=(first.prompt,), max_new_tokens=1))
    before = engines(engine)
    result = engine.generate(
        request(prompts=(first.prompt,), stop_ids=(), max_new_tokens=len(first.answer) + 3, top_logprobs=0)
    )
    (answer,) = result.generations
    assert answer.token_ids[: len(first.answer)] == first.answer
    assert (answer.finish_reason, len(answer.token_ids)) == ("length", len(first.answer) + 3)
    assert answer.top == ()
    stop = first.answer[1]
    (answer,) = engine.generate(request(prompts=(first.prompt,), stop_ids=(stop,))).generations
    assert (answer.token_ids, answer.finish_reason) == (first.answer[:2], "stop")
    assert engines(engine) == before, "the engine of the first request answers these too"


def test_what_the_engine_refuses_is_an_engine_error(engine: WorkerTarget) -> None:
    with pytest.raises(EngineError, match=r"maximum context length is 1024 tokens.*1100 input tokens"):
        engine.generate(request(prompts=((2,) * 1100,)))
    with pytest.raises(EngineError, match=r"ValidationError.*(?s:.*)no-such-backend"):
        engine.generate(request(options={"attention": "no-such-backend"}))


def test_likelihoods_are_those_of_its_answers(engine: WorkerTarget) -> None:
    asked = dialogues()[:6]
    request = LoglikelihoodRequest(
        checkpoint=str(bundled.checkpoint()),
        contexts=tuple(dialogue.prompt for dialogue in asked) * 2,
        continuations=(*(dialogue.answer for dialogue in asked), *((9, 10, 11),) * len(asked)),
    )
    result = engine.loglikelihood(request)
    assert result.effective.items() >= PLAIN.items()  # how it schedules is its own choice
    expected = ReferenceTarget().loglikelihood(request)
    for mine, theirs in zip(result.likelihoods, expected.likelihoods, strict=True):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-2)
        assert mine.greedy == theirs.greedy
    assert [each.greedy for each in result.likelihoods] == [True] * len(asked) + [False] * len(asked)


def test_another_dtype_is_another_engine(engine: WorkerTarget) -> None:
    result = engine.generate(request(options={"dtype": "bfloat16"}))
    assert result.effective.items() >= (PLAIN | {"dtype": "bfloat16"}).items()
    assert answered(result) == lines()


def test_a_lora_adapter_equals_merged_weights(engine: WorkerTarget, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    asked = []
    for seed in (1, 2):
        adapter = tmp_path / f"adapter-{seed}"
        adapter.mkdir()
        reference_model.write_adapter(
            bundled.checkpoint(), adapter, seed=seed, rank=4, scale=0.5, modules=PROJECTIONS
        )
        asked.append(request(adapter=str(adapter), max_new_tokens=24))
    merged.mkdir()
    reference_model.merge_adapter(bundled.checkpoint(), Path(str(asked[0].adapter)), merged)
    oracle = registry.open_target("reference")
    expected = oracle.generate(request(checkpoint=str(merged), max_new_tokens=24))
    first, other, again = (engine.generate(asked[number]) for number in (0, 1, 0))
    adapted = first.effective["adapter"].split(", ")
    assert len(adapted) == 4 * 7, "four layers, each with the seven parts of its fused and single projections"
    assert adapted[0] == "language_model.model.layers.0.mlp.down_proj"
    assert first.effective.items() >= (PLAIN | {"adapter": first.effective["adapter"]}).items()
    for result in (first, again):
        assert [a.token_ids for a in result.generations] == [a.token_ids for a in expected.generations]
        for mine, theirs in zip(result.generations, expected.generations, strict=True):
            assert mine.logprobs == pytest.approx(theirs.logprobs, abs=2e-3)
    plain = [line[:24] for line in lines()]
    assert [a.token_ids for a in expected.generations] != plain, "the adapter changes what is said"
    assert [a.token_ids for a in other.generations] != [a.token_ids for a in first.generations]


def test_a_draft_head_changes_nothing(engine: WorkerTarget, tmp_path: Path) -> None:
    reference_model.write_draft(bundled.checkpoint(), tmp_path, seed=1, layers=(0, 1, 2))
    draft = {"method": "eagle3", "checkpoint": str(tmp_path), "tokens": 3}
    result = engine.generate(request(options={"speculation": draft}))
    assert result.effective.items() >= (PLAIN | {"speculation": "eagle3"}).items()
    assert answered(result) == lines()
    for answer in result.generations:
        assert answer.accepted is not None, "vLLM tells of every round"
        assert sum(answer.accepted) + len(answer.accepted) + 1 >= len(answer.token_ids)
        rounds = list(zip(answer.accepted, answer.drafted, strict=True))
        assert all(0 <= accepted <= drafted <= 3 for accepted, drafted in rounds)


@pytest.fixture(scope="module")
def seeing(engine: WorkerTarget, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint that sees, images, and what transformers says to them."""
    found = environments.status(SPEC)
    folder = tmp_path_factory.mktemp("seeing")
    subprocess.run(
        [found.python, Path(__file__).with_name("images_in_transformers.py"), folder, bundled.checkpoint()],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, found.import_paths)),
            "OMP_NUM_THREADS": "1",
        },
        check=True,
    )
    return folder


def test_images_are_seen_as_transformers_sees_them(engine: WorkerTarget, seeing: Path) -> None:
    expected = json.loads((seeing / "answers.json").read_text())
    assert {len(answer["images"]) for answer in expected} == {0, 1, 2}
    asked = {
        "checkpoint": str(seeing / "checkpoint"),
        "prompts": [answer["prompt"] for answer in expected],
        "stop_ids": (),
        "max_new_tokens": len(expected[0]["tokens"]),
    }
    images = [answer["images"] for answer in expected]
    result = engine.generate(request(**asked, images=images))
    assert result.effective.items() >= PLAIN.items()  # how it schedules is its own choice
    for mine, theirs in zip(result.generations, expected, strict=True):
        assert list(mine.token_ids) == theirs["tokens"]
        assert mine.logprobs == pytest.approx(theirs["logprobs"], abs=1e-3)
    other = engine.generate(request(**asked, images=[images[3], images[1][::-1], *images[2:]]))
    for number, changed in enumerate((True, True, False, False)):
        distance = abs(other.generations[number].logprobs[0] - result.generations[number].logprobs[0])
        assert (distance > 0.01) == changed, f"prompt {number}: which images, and in which order"


def descendants(root: int) -> dict[int, str]:
    """Processes below one, with their names. Any of them may end while they are listed."""
    parents, names = {}, {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            head, _, tail = entry.read_text().rpartition(")")
            pid = int(entry.parent.name)
            parents[pid], names[pid] = int(tail.split()[1]), head.partition("(")[2]
    found = {root}
    while new := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= new
    return {pid: names[pid] for pid in found - {root}}


def left(processes: dict[int, str]) -> dict[int, str]:
    """Those that still run, after a moment."""
    still: dict[int, str] = {}
    for _ in range(50):
        still = {pid: name for pid, name in processes.items() if Path(f"/proc/{pid}").exists()}
        if not still:
            break
        time.sleep(0.1)
    return still


def test_two_ranks_say_the_same_and_leave_nothing(engine: WorkerTarget) -> None:
    shared = set(Path("/dev/shm").iterdir())
    few = dialogues()[::6]
    prompts = tuple(dialogue.prompt for dialogue in few)
    result = engine.generate(request(prompts=prompts, options={"tensor_parallel": 2}))
    assert result.effective.items() >= (PLAIN | {"tensor_parallel": "2"}).items()
    assert answered(result) == [dialogue.answer for dialogue in few]
    assert engine.pid is not None
    running = descendants(engine.pid)
    assert len(running) >= 4, f"worker, engine and two ranks: {running}"
    engine.generate(request(prompts=((2, 105),), max_new_tokens=1))
    now = descendants(engine.pid)
    assert left({pid: name for pid, name in running.items() if pid not in now}) == {}
    assert len(now) == 2, f"worker and engine: {now}"
    assert not [file for file in set(Path("/dev/shm").iterdir()) - shared if "vllm" in file.name]


def test_a_failure_of_a_rank_is_told_with_its_cause(engine: WorkerTarget) -> None:
    with pytest.raises(EngineError) as caught:
        engine.generate(request(options={"pipeline_parallel": 2}))
    assert "AssertionError: at `assert self.intermediate_tensors is not None`" in str(caught.value)
    assert "sync_and_gather_intermediate_tensors" in caught.value.traceback


def test_an_engine_that_is_too_slow_is_ended(engine: WorkerTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.describe(engine)
    assert engine.pid is not None
    running = descendants(engine.pid)
    monkeypatch.setattr(process, "ENGINE_TIMEOUT", 3.0)
    monkeypatch.setattr(engine, "timeout", 1.0)
    with pytest.raises(TargetTimeoutError):
        engine.generate(request(options={"dtype": "bfloat16", "max_model_len": 512}))
    assert left(running) == {}
