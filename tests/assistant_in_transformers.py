"""Runs under the interpreter of a transformers environment: published draft models, alone and in `generate`.

Reads a folder: `request.json`, which names checkpoint folders, and `input.safetensors`; writes `answer.json`
and `output.safetensors` there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.generation.candidate_generator import (
    SinglePositionMultiTokenCandidateGenerator as Candidates,
)

Tensors = dict[str, Tensor]

KINDS = ("sliding_attention", "full_attention")


def opened(folder: str, attention: str) -> tuple[Any, dict[str, list[str]]]:
    """A model in float32, and the tensors that did not fit it."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation=attention,
        key_mapping={r"^model\.language_model\.": "model."},
        output_loading_info=True,
    )
    return model.eval(), {key: sorted(map(str, report[key])) for key in ("missing_keys", "unexpected_keys")}


def steps(asked: list[dict[str, Any]], given: Tensors) -> tuple[Any, Tensors]:
    """Draft steps from given tokens, states and keys; each drafts its likeliest token and feeds back."""
    answers: dict[str, Any] = {}
    made: Tensors = {}
    for run in asked:
        model, unfit = opened(run["checkpoint"], run["attention"])
        answers[run["key"]] = {"class": type(model).__name__, "unfit": unfit}
        for case in run["cases"]:
            own = {name: given[f"{case}.{name}"] for name in ("token", "hidden", "positions", "mask")}
            shared = {kind: (given[f"{case}.{kind}.k"], given[f"{case}.{kind}.v"]) for kind in KINDS}
            token, hidden = own["token"], own["hidden"]
            logits, states = [], []
            for _ in range(run["count"]):
                with torch.inference_mode():
                    out = model(
                        inputs_embeds=torch.cat([given["table"][token], hidden], dim=-1),
                        attention_mask=own["mask"],
                        position_ids=own["positions"],
                        shared_kv_states=shared,
                    )
                token, hidden = out.logits.argmax(dim=-1), out.last_hidden_state
                logits.append(out.logits[:, 0])
                states.append(hidden[:, 0])
            made[f"{run['key']}.{case}.logits"] = torch.stack(logits)
            made[f"{run['key']}.{case}.states"] = torch.stack(states)
    return answers, made


@contextmanager
def startable() -> Iterator[None]:
    """Let `generate` start a draft model: it leaves out two arguments that nothing reads.

    See docs/findings.md, below transformers.
    """
    usual = Candidates.__init__

    def init(self: Any, **given: Any) -> None:
        usual(self, **({"input_ids": None, "model_kwargs": None} | given))

    with mock.patch.object(Candidates, "__init__", init):
        yield


@contextmanager
def only_what_stayed(window: int) -> Iterator[None]:
    """Have a round read the newest `window` keys at most, and none of tokens that were rejected.

    See docs/findings.md, below transformers, and docs/decisions.md, number 19.
    """
    usual = Candidates.get_candidates

    def get_candidates(self: Any, input_ids: Tensor, model_outputs: Any = None, **rest: Any) -> Any:
        if model_outputs is not None:
            passed = model_outputs.hidden_states[-1].shape[1]
            rejected = 0 if self.is_main_model_prefill else passed - 1 - rest["n_last_matches"]
            for kind, pair in model_outputs.shared_kv_states.items():
                cut = tuple(kept[:, :, : kept.shape[2] - rejected] for kept in pair)
                if kind == "sliding_attention":
                    cut = tuple(kept[:, :, -window:] for kept in cut)
                model_outputs.shared_kv_states[kind] = cut
        return usual(self, input_ids, model_outputs=model_outputs, **rest)

    with mock.patch.object(Candidates, "get_candidates", get_candidates):
        yield


def answer(target: Any, prompt: list[int], count: int, assistant: Any = None) -> list[int]:
    """The likeliest tokens after a prompt."""
    ids = torch.tensor([prompt])
    made = target.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        assistant_model=assistant,
    )
    found: list[int] = made[0, len(prompt) :].tolist()
    return found


class Recorder:
    """What a draft model is given and says, while `generate` uses it."""

    def __init__(self, model: Any, key: str) -> None:
        self.tensors: Tensors = {}
        self._model = model
        self._key = key
        self._count = 0
        self._calls: list[dict[str, Any]] = []

    def run(self, target: Any, prompt: list[int], count: int) -> dict[str, Any]:
        """The tokens of an answer, and the calls that it took; tensors are kept by the names of the calls."""
        self._calls = []
        with mock.patch.object(self._model, "forward", partial(self._forward, self._model.forward)):
            tokens = answer(target, prompt, count, self._model)
        return {"tokens": tokens, "calls": self._calls}

    def _forward(self, usual: Any, **inputs: Any) -> Any:
        out = usual(**inputs)
        name = f"{self._key}.{self._count}"
        self._count += 1
        shared = inputs["shared_kv_states"]
        self._calls.append(
            {
                "name": name,
                "position": int(inputs["position_ids"]),
                "keys": {kind: shared[kind][0].shape[2] for kind in KINDS},
                "token": int(out.logits.argmax()),
            }
        )
        kept = {"input": inputs["inputs_embeds"], "logits": out.logits, "state": out.last_hidden_state}
        kept |= {
            f"{kind}.{part}": tensor
            for kind in KINDS
            for part, tensor in zip("kv", shared[kind], strict=True)
        }
        self.tensors |= {f"{name}.{part}": tensor.clone() for part, tensor in kept.items()}
        return out


def generation(asked: list[dict[str, Any]], given: Tensors) -> tuple[Any, Tensors]:
    """Greedy answers to prompts, with and without a draft model, and each call of the draft model."""
    answers: dict[str, Any] = {}
    made: Tensors = {}
    for run in asked:
        target, unfit = opened(run["target"], "sdpa")
        target.generation_config.eos_token_id = None
        assistant, _ = opened(run["assistant"], "sdpa")
        assistant.generation_config.num_assistant_tokens = run["drafts"]
        found = {"class": type(target).__name__, "unfit": unfit, "as_it_is": None}
        try:
            answer(target, run["prompts"][0], run["count"], assistant)
        except TypeError as error:
            found["as_it_is"] = str(error)
        found["alone"] = [answer(target, prompt, run["count"]) for prompt in run["prompts"]]
        for way, changed in (("usual", nullcontext()), ("mended", only_what_stayed(run["window"]))):
            recorder = Recorder(assistant, f"{run['key']}.{way}")
            with startable(), changed:
                found[way] = [recorder.run(target, prompt, run["count"]) for prompt in run["prompts"]]
            made |= recorder.tensors
        answers[run["key"]] = found
    return answers, made


def adapter(asked: dict[str, Any], given: Tensors) -> tuple[Any, Tensors]:
    """Requests to the harness's own adapter, and how many passes the target made for each."""
    from conformance.worker.adapters import transformers_generate

    del given
    passes: list[int] = []
    inside: set[str] = set()
    usual = transformers_generate.load

    def load(*arguments: Any) -> Any:
        model = usual(*arguments)
        passes.append(0)

        def count(target: Any, _inputs: Any) -> None:
            passes[-1] += 1
            inside.update(type(module).__name__ for module in target.modules())

        model.register_forward_pre_hook(count)
        return model

    found: dict[str, Any] = {"refused": {}}
    with mock.patch.object(transformers_generate, "load", load):
        for name, request in asked["refused"].items():
            try:
                found["refused"][name] = str(transformers_generate.generate(request))
            except (TypeError, transformers_generate.RequestError) as error:
                found["refused"][name] = f"{type(error).__name__}: {error}"
        passes.clear()
        with startable():
            found["answers"] = [transformers_generate.generate(request) for request in asked["requests"]]
    return found | {"passes": passes, "inside": sorted(inside)}, {}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    asked = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    given = load_file(folder / "input.safetensors")
    answers: dict[str, Any] = {}
    made: Tensors = {}
    for task in (steps, generation, adapter):
        if task.__name__ in asked:
            answers[task.__name__], tensors = task(asked[task.__name__], given)
            made |= {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(made, folder / "output.safetensors")
    (folder / "answer.json").write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
