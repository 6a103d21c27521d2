"""vLLM's engine: `generate` and `loglikelihood` through `vllm.LLM`, its class for offline inference.

* One rank runs in the process that calls it; several are processes of vLLM's own ("mp").
* All prompts go to one call of `LLM.generate`, so that vLLM schedules them as a batch. Its cache of prefixes
  is emptied before each request, so that an answer does not depend on what was asked before, but not between
  the repetitions of one.
* The engine is kept while requests need the same one: `engine_setup` says what decides that.
* Likelihoods are those that it gives the tokens of a prompt, before a token that nobody wants.
* What really runs is read back inside each rank: from its attention layers, parameters, parallel groups,
  layers of experts and the buffers of its LoRA layers; and from the scheduler, of which there is one, as
  ranks have copies of what it was told.

`EngineProcess` holds it: each engine is a fork of the worker, in which vLLM is imported already.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conformance.worker.adapter import Json
from conformance.worker.adapters.vllm_lora import adapted_modules, media_parts, rounds
from conformance.worker.engine_process import EngineProcess

VARIABLES = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
"""For the engine, where the worker's environment says nothing else."""

_PRELOADED = (
    "vllm",
    "vllm.lora.model_manager",
    "vllm.model_executor.models.gemma4",
    "vllm.v1.engine.llm_engine",
)
"""What every engine imports."""
_ROOMS = (4, 16)
FEATURES = (
    "tensor-parallel",
    "pipeline-parallel",
    "pipeline-split",
    "expert-parallel",
    "eagle3",
    "assistant",
    "lora",
    "mixed-adapters",
    "prefill-chunk",
    "prefix-cache",
    "block-size",
    "kv-dtype",
    "max-sequences",
    "sampling",
    "repeat",
    "images",
    "sounds",
)
BACKENDS = {
    "vllm-cpu": ("CPU_ATTN",),
    "vllm": ("FLASH_ATTN", "TRITON_ATTN", "FLASHINFER", "FLEX_ATTENTION"),
}
"""Attention backends that each package can be asked for, by vLLM's names."""
_SCHEDULE = ("expert_parallel", "prefix_cache", "block_size", "kv_dtype", "prefill_chunk", "max_sequences")
_SMALL_BLOCK = 32
"""Tokens: the smallest block that the attention for CPUs takes."""
_METHODS = {"eagle3": "eagle3", "assistant": "mtp"}
"""vLLM's names for kinds of draft models."""
_ADAPTERS = 4
"""Different adapters in one batch."""
_USUAL_RANK = 8
_OUTSIDE_TEXT = ("vision_tower", "audio_tower", "embed_vision", "embed_audio")
_LONGEST_HEADER = 1 << 24
"""Bytes of an adapter's header that are read."""
_RATE = 16_000
"""Samples a second of every sound; the adapter converts none."""


class RequestError(Exception):
    """The request asks for something that cannot be read."""


class VllmEngines:
    """Answers requests; keeps one engine."""

    def __init__(self) -> None:
        self._setup: Json = {}
        self._process: EngineProcess | None = None

    def generate(self, request: Json) -> Json:
        """Answer a `GenerateRequest`."""
        return self._ask(request)

    def loglikelihood(self, request: Json) -> Json:
        """Answer a `LoglikelihoodRequest`."""
        media: Json = {"images": [], "sounds": []}
        return self._ask({**request, **media, "adapter": None})

    def _ask(self, request: Json) -> Json:
        setup = engine_setup(request)
        if self._process is None or setup != self._setup:
            self.close()
            _load()
            self._process, self._setup = EngineProcess(lambda: _LlmEngine(setup)), setup
        process, self._process = self._process, None
        answer = process.ask(request)
        self._process = process
        return answer

    def close(self) -> None:
        """End the engine."""
        if self._process is not None:
            process, self._process = self._process, None
            process.close()


def engine_setup(request: Json) -> Json:
    """What decides whether two requests need the same engine.

    A checkpoint that was written anew is another one, whatever its path.

    Raises:
        RequestError: a folder or a LoRA adapter's configuration cannot be read.
    """
    options = request["options"]
    draft = options["speculation"]
    folders = [request["checkpoint"], *([draft["checkpoint"]] if draft else [])]
    return {
        "checkpoint": request["checkpoint"],
        "options": options,
        **_room_for_adapters(request),
        "images": _room(max(map(len, request["images"]), default=0)),
        "sounds": _room(max(map(len, request["sounds"]), default=0)),
        "files": [_signature(Path(folder)) for folder in folders],
    }


def _room_for_adapters(request: Json) -> Json:
    """For which adapters an engine is set up: as many as prompts name, within limits that many share."""
    single = request["adapter"]
    if not request.get("adapters"):
        return {
            "rank": 0 if single is None else _rank(Path(single)),
            "adapters": 1,
            "towers": False,
            "stacked": False,
        }
    folders = [Path(folder) for folder in set(request["adapters"]) if folder is not None]
    keys = [key for folder in folders for key in _keys(folder)]
    return {
        "rank": max([_USUAL_RANK, *map(_rank, folders)]),
        "adapters": _ADAPTERS,
        "towers": any(part in key for key in keys for part in _OUTSIDE_TEXT),
        "stacked": any(".experts.lora_" in key or ".experts.base_layer." in key for key in keys),
    }


def _keys(adapter: Path) -> list[str]:
    """Names of an adapter's tensors; none where the file cannot be read, as the engine will say so."""
    try:
        with (adapter / "adapter_model.safetensors").open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return list(json.loads(file.read(min(size, _LONGEST_HEADER))))
    except (OSError, ValueError):
        return []


def _room(pieces: int) -> int:
    """For how many media of a prompt an engine is set up, so that not each number needs another one."""
    return next(room for room in (0, *_ROOMS, pieces) if room >= pieces)


def _signature(folder: Path) -> list[tuple[str, int, int]]:
    try:
        files = sorted(file for file in folder.iterdir() if file.is_file())
        return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except OSError as error:
        raise RequestError(f"{folder}: cannot be read: {error.strerror}") from error


def _rank(adapter: Path) -> int:
    try:
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        rank = config["r"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{adapter}: adapter_config.json cannot be read or has no `r`: {error}") from error
    if not isinstance(rank, int) or rank < 1:
        raise RequestError(f"{adapter}: adapter_config.json has `r` {rank!r}; expected a positive number")
    pattern = config.get("rank_pattern")
    own = pattern.values() if isinstance(pattern, dict) else ()
    return max([rank, *(each for each in own if isinstance(each, int))])


def llm_arguments(setup: Mapping[str, Any], ranks: Sequence[int]) -> Json:
    """Arguments of `vllm.LLM`.

    Args:
        setup: From `engine_setup`.
        ranks: Largest LoRA ranks that this release can be set up for.
    """
    options = setup["options"]
    parallel = options["tensor_parallel"] * options["pipeline_parallel"]
    arguments: Json = {
        "model": setup["checkpoint"],
        "dtype": options["dtype"],
        "max_model_len": options["max_model_len"],
        "tensor_parallel_size": options["tensor_parallel"],
        "pipeline_parallel_size": options["pipeline_parallel"],
        "distributed_executor_backend": "mp" if parallel > 1 else "uni",
        "enforce_eager": True,
        "generation_config": "vllm",
        "logprobs_mode": "raw_logprobs",
        "max_logprobs": 20,
        "seed": 0,
        "disable_log_stats": True,
        "limit_mm_per_prompt": {"image": setup["images"], "audio": setup["sounds"], "video": 0},
        # Prompts are token ids; with media, the processor of the model needs a tokenizer.
        "skip_tokenizer_init": not setup["images"] and not setup["sounds"],
    }
    if options["kv_dtype"] is not None:
        arguments["kv_cache_dtype"] = options["kv_dtype"]
    if options["attention"] is not None:
        arguments["attention_config"] = {"backend": options["attention"]}
    arguments |= _schedule_arguments(options)
    if options["speculation"] is not None:
        arguments["speculative_config"] = {
            "method": _METHODS[options["speculation"]["method"]],
            "model": options["speculation"]["checkpoint"],
            "num_speculative_tokens": options["speculation"]["tokens"],
        }
        arguments["per_request_spec_decode_metrics"] = "detailed"
    if setup["rank"]:
        fitting = [rank for rank in ranks if rank >= setup["rank"]]
        arguments["enable_lora"] = True
        arguments["max_lora_rank"] = min(fitting, default=setup["rank"])
        arguments["max_loras"] = setup["adapters"]
        if setup["towers"]:
            arguments["enable_tower_connector_lora"] = True
        if setup["stacked"]:
            arguments["enable_mixed_moe_lora_format"] = True
    return arguments


def _schedule_arguments(options: Json) -> Json:
    """Those of the scheduler and the cache, as far as they are asked for.

    Where prefixes are to be found and nothing is said of blocks, they are small: vLLM's own for a CPU have
    128 tokens, and of a prompt nothing but whole blocks can be found.
    """
    chunk, sequences = options["prefill_chunk"], options["max_sequences"]
    drafted = options["speculation"]["tokens"] if options["speculation"] is not None else 0
    arguments: Json = {"enable_expert_parallel": True} if options["expert_parallel"] else {}
    if options["prefix_cache"] is not None:
        arguments["enable_prefix_caching"] = options["prefix_cache"]
    block = options["block_size"] or (_SMALL_BLOCK if options["prefix_cache"] else None)
    if block is not None:
        arguments["block_size"] = block
    if chunk is not None:
        arguments["enable_chunked_prefill"] = True
        arguments["max_num_batched_tokens"] = chunk
        # vLLM wants a step to have a token for each sequence, and drops drafts for which it has none.
        sequences = sequences or max(1, chunk // (1 + drafted))
    if sequences is not None:
        arguments["max_num_seqs"] = sequences
    return arguments


def environment(options: Json) -> dict[str, str]:
    """Variables by which vLLM is told what has no argument.

    Raises:
        RequestError: what is asked for has neither.
    """
    for name in ("cache", "threads"):
        if options[name] is not None:
            raise RequestError(f"{name} {options[name]!r}: vLLM's adapter leaves that to vLLM")
    if options["pipeline_split"] is None:
        return {}
    return {"VLLM_PP_LAYER_PARTITION": ",".join(map(str, options["pipeline_split"]))}


def sampling_arguments(request: Json) -> Json:
    """Arguments of `vllm.SamplingParams`."""
    drawn: Json = {}
    if request["sampling"] is not None:
        drawn = {
            "temperature": request["sampling"]["temperature"],
            "top_k": request["sampling"]["top_k"] or 0,
            "top_p": request["sampling"]["top_p"],
            "seed": request["sampling"]["seed"],
            "n": request["samples"],
        }
    return {
        "temperature": 0.0,
        **drawn,
        "max_tokens": request["max_new_tokens"],
        "stop_token_ids": list(request["stop_ids"]),
        "ignore_eos": True,
        "logprobs": request["top_logprobs"],
        "detokenize": False,
    }


def scoring_arguments() -> Json:
    """Arguments of `vllm.SamplingParams` where a prompt is to be scored."""
    return {
        "temperature": 0.0,
        "max_tokens": 1,
        "ignore_eos": True,
        "prompt_logprobs": 1,
        "detokenize": False,
    }


def likelihood(prompt_logprobs: Sequence[Any], continuation: Sequence[int]) -> Json:
    """A `Loglikelihood` from what vLLM says of a prompt that ends with the continuation."""
    behind = prompt_logprobs[len(prompt_logprobs) - len(continuation) :]
    found = [at[token] for at, token in zip(behind, continuation, strict=True)]
    return {
        "logprob": sum(each.logprob for each in found),
        "greedy": all(each.rank == 1 for each in found),
    }


def generation(output: Any, *, top: bool, cached: int | None = None) -> Json:
    """A `Generation` from a `vllm.CompletionOutput`."""
    tokens = list(output.token_ids)
    rounds = getattr(output, "spec_decode_metrics", None)
    return {
        "token_ids": tokens,
        "finish_reason": output.finish_reason,
        "logprobs": [at[token].logprob for at, token in zip(output.logprobs, tokens, strict=True)],
        "top": [{token: found.logprob for token, found in at.items()} for at in output.logprobs]
        if top
        else [],
        "cached_tokens": cached,
        "accepted": list(rounds.per_step_accepted) if rounds is not None else None,
        "drafted": list(rounds.per_step_drafted) if rounds is not None else [],
    }


def agreed(ranks: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """`GenerateResult.effective` from what each rank, and the scheduler, says of itself."""
    effective = {}
    for key in ("attention", "dtype", "tensor_parallel", "pipeline_parallel", "speculation"):
        values = {value for rank in ranks for value in rank.get(key, ())}
        effective[key] = ", ".join(sorted(values)) or "none"
    for key in _SCHEDULE:
        values = {value for rank in ranks for value in rank.get(key, ())}
        if values:
            effective[key] = ", ".join(sorted(values))
    stages = sorted({tuple(stage) for rank in ranks for stage in rank.get("stage", ())})
    if stages:
        effective["pipeline_split"] = ",".join(str(stop - start) for start, stop in stages)
    modules = {module for rank in ranks for module in rank.get("adapter", ())}
    return {**effective, "adapter": ", ".join(sorted(modules)) or "none"}


# ------------------------------------------------------------------------------------ in the engine's process


def _load() -> None:
    """Import in the worker what its forks use."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the scheduler is read where this runs
    for module in _PRELOADED:
        importlib.import_module(module)
    if importlib.import_module("vllm.platforms").current_platform.is_cpu():
        importlib.import_module("vllm.v1.worker.cpu_worker")


class _LlmEngine:
    """Implements `conformance.worker.engine_process.Engine` with `vllm.LLM`."""

    def __init__(self, setup: Json) -> None:
        os.environ.update(environment(setup["options"]))  # of this process alone
        from vllm import LLM  # type: ignore[import-not-found]
        from vllm.config.lora import MaxLoRARanks  # type: ignore[import-not-found]

        try:
            self._llm = LLM(**llm_arguments(setup, typing.get_args(MaxLoRARanks)))
        finally:
            _forget_shared_memory()  # of an engine that did not start too
        self._adapters: dict[str, int] = {}

    def answer(self, request: Json) -> Json:
        self._llm.reset_prefix_cache()
        return self._generate(request) if "prompts" in request else self._score(request)

    def _score(self, request: Json) -> Json:
        from vllm import SamplingParams

        pairs = list(zip(request["contexts"], request["continuations"], strict=True))
        outputs = self._llm.generate(
            [{"prompt_token_ids": [*context, *rest]} for context, rest in pairs],
            SamplingParams(**scoring_arguments()),
            use_tqdm=False,
        )
        return {
            "likelihoods": [
                likelihood(output.prompt_logprobs, rest)
                for output, (_, rest) in zip(outputs, pairs, strict=True)
            ],
            "effective": self._effective(0),
        }

    def _generate(self, request: Json) -> Json:
        from vllm import SamplingParams

        prompts = _prompts(request)
        wanted = request.get("adapters") or [request["adapter"]] * len(prompts)
        top = request["top_logprobs"] > 0
        made: list[Json] = []
        generations: dict[int, list[Json]] = {}
        adapted: dict[str, list[str]] = {}
        effective: Json = {}
        together = rounds(wanted, _ADAPTERS)
        if request["mixed"] and len(together) > 1:
            raise RequestError(f"a batch has room for {_ADAPTERS} adapters, of which none may be one")
        for places in together * request["repeat"]:
            outputs = self._llm.generate(
                [prompts[place] for place in places],
                SamplingParams(**sampling_arguments(request)),
                use_tqdm=False,
                lora_request=[self._lora(wanted[place]) for place in places],
            )
            for place, output in zip(places, outputs, strict=True):
                cached = output.num_cached_tokens
                generations[place] = [generation(one, top=top, cached=cached) for one in output.outputs]
            # Only the adapters that were used last still have a place in the engine.
            for folder in dict.fromkeys(wanted[place] for place in places):
                number = 0 if folder is None else self._number(folder)
                effective = self._effective(number)
                if folder is not None:
                    found = effective["adapter"]
                    adapted[folder] = [] if found == "none" else found.split(", ")
            if len(generations) == len(prompts):
                made += [one for place in range(len(prompts)) for one in generations[place]]
                generations = {}
        modules = sorted({module for own in adapted.values() for module in own})
        return {
            "generations": made,
            "effective": {**effective, "adapter": ", ".join(modules) or "none"},
            "adapted": adapted,
            "batches": len(together),
            "parts": self._llm.collective_rpc(media_parts)[0] if adapted else None,
        }

    def _effective(self, adapter: int) -> dict[str, str]:
        """What runs, the LoRA adapter of this number (0 for none) with it."""
        scheduler = self._llm.llm_engine.engine_core.engine_core.scheduler
        return agreed([*self._llm.collective_rpc(read_back, args=(adapter,)), scheduled(scheduler)])

    def _number(self, folder: str) -> int:
        """An adapter's; one that was written anew is another one."""
        name = json.dumps([folder, _signature(Path(folder))])
        return self._adapters.setdefault(name, len(self._adapters) + 1)

    def _lora(self, folder: str | None) -> Any:
        """A prompt's `LoRARequest`."""
        from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

        if folder is None:
            return None
        number = self._number(folder)
        stacked = any(".experts.lora_" in key or ".experts.base_layer." in key for key in _keys(Path(folder)))
        more = {"is_3d_lora_weight": True} if stacked else {}
        return LoRARequest(f"adapter-{number}", number, folder, **more)

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()


def _forget_shared_memory() -> None:
    """Delete the names of the shared memory that ranks talk through, which vLLM leaves behind.

    All ranks have it by now. It is named after the file in which they met, which is in the folder for
    temporary files of this engine alone.
    """
    for file in Path(tempfile.gettempdir()).glob("vllm_dist_*"):
        for shared in Path("/dev/shm").glob(f"{file.name}*"):  # noqa: S108
            shared.unlink()


def _prompts(request: Json) -> list[Json]:
    prompts: list[Json] = [{"prompt_token_ids": list(ids)} for ids in request["prompts"]]
    for prompt, files in zip(prompts, request["images"], strict=False):
        if files:
            from PIL import Image

            media = prompt.setdefault("multi_modal_data", {})
            media["image"] = [Image.open(file).convert("RGB") for file in files]
    for prompt, files in zip(prompts, request["sounds"], strict=False):
        if files:
            from conformance.worker.adapters.wave import read_sound

            media = prompt.setdefault("multi_modal_data", {})
            media["audio"] = [(read_sound(Path(file)), _RATE) for file in files]
    return prompts


def read_back(worker: Any, adapter: int) -> dict[str, list[str]]:
    """What one rank runs with; called in its process.

    Args:
        worker: vLLM's worker.
        adapter: Number of the LoRA adapter of the last request, 0 for none.
    """
    from vllm.distributed import parallel_state  # type: ignore[import-not-found]

    runner = worker.model_runner
    layers = runner.vllm_config.compilation_config.static_forward_context.values()
    drafter = getattr(runner, "drafter", None)
    parameters = [parameter for parameter in runner.get_model().parameters() if parameter.is_floating_point()]
    attending = [layer for layer in layers if hasattr(layer, "attn_backend")]
    backends = {layer.attn_backend.get_name() for layer in attending}
    return {
        "attention": sorted(backends),
        "dtype": sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters}),
        "tensor_parallel": [str(parallel_state.get_tp_group().world_size)],
        "pipeline_parallel": [str(parallel_state.get_pp_group().world_size)],
        "speculation": [_known(drafter.method)] if drafter is not None else [],
        "kv_dtype": sorted({_stored(layer) for layer in attending}),
        "adapter": adapted_modules(runner, adapter) if adapter else [],
        **_layers(runner),
    }


def _stored(layer: Any) -> str:
    """The dtype of an attention layer's cache: that of its memory, or which one of eight bits that holds."""
    held = layer.kv_cache.dtype
    return str(layer.kv_cache_dtype) if held.itemsize == 1 else str(held).removeprefix("torch.")


def _known(method: str) -> str:
    """The protocol's name for a kind of draft model; vLLM's own where it has none."""
    return next((name for name, known in _METHODS.items() if known == method), method)


def scheduled(scheduler: Any) -> dict[str, list[str]]:
    """What vLLM's scheduler goes by, as it stands in what it uses."""
    return {
        "prefix_cache": ["on" if scheduler.kv_cache_manager.enable_caching else "off"],
        "prefill_chunk": [str(scheduler.max_num_scheduled_tokens)],
        "max_sequences": [str(scheduler.max_num_running_reqs)],
    }


def _layers(runner: Any) -> dict[str, list[Any]]:
    """Which layers a rank has, how its experts are spread, and how long the blocks of its cache are."""
    modules = list(runner.get_model().modules())
    stages = {
        (module.start_layer, module.end_layer)
        for module in modules
        if hasattr(module, "start_layer") and hasattr(module, "end_layer")
    }
    spread = {
        "on" if module.moe_config.moe_parallel_config.use_ep else "off"
        for module in modules
        if hasattr(module, "moe_config")
    }
    return {
        "expert_parallel": sorted(spread) or ["off"],
        "block_size": [str(runner.vllm_config.cache_config.block_size)],
        "stage": sorted(stages),
    }
