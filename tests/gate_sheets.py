"""Sheets of scored answers for tests of gates, made by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from conformance.gates.spec import PairedRule, UnpairedGate
from conformance.scoring import Item, Sheet, SheetHeader


def header(**fields: Any) -> SheetHeader:
    return SheetHeader(
        **{
            "task": "sums",
            "task_version": "1.0",
            "filter": "strict-match",
            "metric": "exact_match",
            "checkpoint": "nano-e",
            "checkpoint_sha256": "c" * 64,
            "target": "reference",
            "engine_version": "1",
            "dtype": "float32",
            "template_sha256": "t" * 64,
            "thinking": True,
            "shots": 0,
            "max_new_tokens": 64,
            "seed": 0,
            "order_seed": 0,
            "available": 10_000,
            "lm_eval": "0.4",
            "harness": "0.1",
            "created": "2026-01-01T00:00:00Z",
        }
        | fields
    )


def item(number: int, *, right: bool = True, **fields: Any) -> Item:
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    return Item(
        **{
            "doc_id": f"doc-{number}",
            "doc_hash": digest,
            "prompt_hash": digest[::-1],
            "prompt": f"What is {number} and 1?",
            "answer": str(number + 1 if right else number),
            "extracted": str(number + 1 if right else number),
            "expected": str(number + 1),
            "outcome": "correct" if right else "wrong",
            "tokens": 3,
            "finish_reason": "stop",
        }
        | fields
    )


def sheet(right: Sequence[bool], *, clusters: Sequence[str] | None = None, **fields: Any) -> Sheet:
    """One item for each flag: whether it is right."""
    return Sheet(
        header=header(**fields),
        items=tuple(
            item(number, right=bool(flag), cluster=clusters[number] if clusters else "")
            for number, flag in enumerate(right)
        ),
    )


def arms(both: int, lost: int, gained: int, neither: int, **fields: Any) -> tuple[Sheet, Sheet]:
    """A reference's and a target's sheet with so many items of each kind, in this order."""
    reference = [True] * both + [True] * lost + [False] * gained + [False] * neither
    target = [True] * both + [False] * lost + [True] * gained + [False] * neither
    return sheet(reference), sheet(target, target="vllm@0.32.0", **fields)


def changed(whole: Sheet, number: int, **fields: Any) -> Sheet:
    """The sheet with some fields of one item changed."""
    items = list(whole.items)
    items[number] = items[number].model_copy(update=fields)
    return whole.model_copy(update={"items": tuple(items)})


def paired(**fields: Any) -> PairedRule:
    return PairedRule(**{"items": 1000, "margin": 0.02, "floor": 0.005, "discordance": 0.02} | fields)


def unpaired(**fields: Any) -> UnpairedGate:
    return UnpairedGate(
        **{
            "kind": "unpaired",
            "items": 1319,
            "margin": 0.03,
            "floor": 0.005,
            "score": 0.934,
            "of": 1319,
            "published": "vllm-project/vllm#38835",
            "method": "Five shots through lm-eval, flexible-extract.",
        }
        | fields
    )
