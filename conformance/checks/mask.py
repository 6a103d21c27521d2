"""Judge which keys every token sees, in every layer.

1. What is right follows from the configuration and the rows alone (`visibility`); no other engine is asked.
2. Each wrong pair of tokens breaks one rule, by what the two tokens are and by what the target does with
   them. A rule is reported once, at the first layer and pair where it is broken, with the number of pairs.
3. What the target says it ran must be what was asked for.

Rules of full layers:
  full-layer     a token sees a later one of its own image
  full-window    a token does not see an earlier one
Rules of sliding layers:
  window         a token does not see an earlier one in the window, or sees one before it
  block-window   a soft token sees an earlier one of its own image that is before the window
  block-closed   a soft token does not see a later one of its own image
  long-block     the same, all through an image that is longer than the window; or, where such images are to
                 be attended to causally, it does
  future-clamp   in an image longer than the window, a later token a window or more away is hidden where the
                 window must hide none, or seen where it must hide it
Rules of both:
  causal-model   a model without image attention shows a soft token a later one of its image
  merged-blocks  a soft token sees a later one of another image, frame or sound
  sound          a soft token of a sound sees a later one of it
  future         a token sees any other later one
  padding        a token sees a key that its row does not have
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conformance.checks.base import CheckOutcome
from conformance.checks.visibility import FULL, LayerType, Token, Visibility, outline, tokens_of
from conformance.errors import EngineError
from conformance.media import TEXT, Prompts
from conformance.oracles import Oracles, Wanted
from conformance.results import Evidence, Problem
from conformance.suites import MaskCase, MaskSuite, MixedRows
from conformance.targets.protocol import Feature, ForwardRequest, ForwardResult, Target
from conformance.worker.modules import MASK

if TYPE_CHECKING:
    from torch import Tensor

_EXPECTED = {
    "clamp_past": "the window hides keys that are too far in the past, and none behind the query.",
    "clamp_both": "the window hides keys that are too far away on either side.",
    "drop": "images longer than the window are attended to causally.",
}
_COLUMNS = 40
_ROWS = 24
"""Of a picture."""


def judge(case: MaskCase, suite: MaskSuite, target: Target, oracles: Oracles) -> CheckOutcome:
    """Compare the masks of all layers with the rule.

    Raises:
        EngineError: the rule does not cover the configuration, or a piece of media cannot be made.
        WorkerDiedError, TargetTimeoutError: from the target.
    """
    reason = _not_asked(case, target)
    if reason:
        return CheckOutcome("skip", reason=reason)
    config = suite.configs[case.config]
    prompts = oracles.prompts(case.rows, config)
    rule = Visibility.of(config, case.long_blocks)
    wanted = Wanted(
        config=config,
        seed=0,
        rows=prompts.rows,
        prefill=None,
        capture=tuple(map(_name, range(len(rule.layers)))),
        media=prompts.media,
        long_blocks=case.long_blocks,
    )
    request = oracles.request(wanted, attention=case.attention)
    rows = _rows(prompts, config, rule)
    evidence = _evidence(config, rows, rule)
    try:
        result = target.forward(request)
    except EngineError as error:
        problem = Problem(rule="raised", message=f"the forward pass raised {error}", got=str(error))
        return CheckOutcome.from_problems([problem], evidence)
    problems = [*_setting_problems(request, result), *_mask_problems(rule, rows, result)]
    Path(request.output).unlink(missing_ok=True)
    return CheckOutcome.from_problems(problems, evidence)


def _name(layer: int) -> str:
    """Name of the tensor that says which keys a layer's tokens see."""
    return f"layers.{layer}.self_attn{MASK}"


def _not_asked(case: MaskCase, target: Target) -> str:
    """Why a target cannot be asked; empty if it can."""
    info = target.describe()
    if "forward" not in info.capabilities:
        return f"{target.spec} has no capability `forward`"
    needed: list[Feature] = []
    if isinstance(case.rows, MixedRows):
        needed.append("media")
    if case.long_blocks is not None:
        needed.append("long-blocks")
    absent = [feature for feature in needed if feature not in info.features]
    return f"{target.spec} cannot run forward passes with {', '.join(absent)}" if absent else ""


# ------------------------------------------------------------------------------------------ what is right


@dataclass(frozen=True)
class _Row:
    """A row, and what its tokens must see in layers of each type."""

    tokens: tuple[Token, ...]
    expected: dict[LayerType, Tensor]
    """bool [T, T]: queries, keys."""
    lengths: Mapping[int, int]
    """Tokens of each image and frame."""

    def seen(self, mask: Tensor, start: int) -> Tensor:
        """The part of a mask, bool [tokens, longest row], that is about this row's own keys."""
        return mask[start : start + len(self.tokens), : len(self.tokens)]


def _rows(prompts: Prompts, config: dict[str, Any], rule: Visibility) -> list[_Row]:
    blocks = prompts.blocks or tuple((TEXT,) * len(row) for row in prompts.rows)
    return [_row(tokens_of(ids, own, config), rule) for ids, own in zip(prompts.rows, blocks, strict=True)]


@lru_cache(maxsize=16)
def _row(tokens: tuple[Token, ...], rule: Visibility) -> _Row:
    """Kept for the next target, as it takes long for long rows."""
    import torch

    expected = {layer: torch.tensor(rule.grid(layer, tokens)) for layer in dict.fromkeys(rule.layers)}
    lengths = Counter(token.block for token in tokens if token.block != TEXT)
    return _Row(tokens, expected, lengths)


def _evidence(config: dict[str, Any], rows: Sequence[_Row], rule: Visibility) -> Evidence:
    images = f"Tokens of one image also see later ones of it; {_EXPECTED[rule.long_blocks]}"
    return Evidence(
        input=json.dumps({"config": config, "rows": [outline(row.tokens) for row in rows]}),
        expected=f"Full layers: a token sees itself and all earlier ones. Sliding layers: those among them "
        f"that are less than {rule.window} away. "
        + (images if rule.image_attention else "Images are attended to like text."),
    )


# ------------------------------------------------------------------------------------------ what came back


def _setting_problems(request: ForwardRequest, result: ForwardResult) -> Iterator[Problem]:
    """A backend that was asked for and not used is a failure, even where the masks are right."""
    asked, ran = request.attention, result.effective.get("attention")
    if asked is not None and ran != asked:
        yield Problem(
            rule="wrong-backend",
            message=f"attention {asked!r} was asked for and {ran!r} ran",
            expected=asked,
            got=ran,
        )


def _mask_problems(rule: Visibility, rows: Sequence[_Row], result: ForwardResult) -> Iterator[Problem]:
    from conformance.checks import tensors

    unread = ""
    masks: dict[str, Tensor] = {}
    try:
        masks = tensors.read(result.path)
    except tensors.TensorFileError as error:
        unread = f": the target's file cannot be read: {error}"
    names = [_name(layer) for layer in range(len(rule.layers))]
    absent = [name for name in names if name not in masks]
    if absent:
        yield Problem(rule="missing-tensor", message=f"no {', '.join(absent)}{unread}", got=absent)
    shape = (sum(len(row.tokens) for row in rows), max(len(row.tokens) for row in rows))
    odd = {name: fault for name in names if name in masks and (fault := _odd(masks[name], shape))}
    if odd:
        name, fault = next(iter(odd.items()))
        yield Problem(rule="shape", message=f"{name} {fault}", got=list(odd))
    findings: dict[str, _Finding] = {}
    for layer, name in enumerate(names):
        if name in masks and name not in odd:
            _compare(findings, rule, layer, rows, masks[name].bool())
    for finding in findings.values():
        yield finding.problem(rule, rows, masks[_name(finding.layer)].bool())


def _odd(mask: Tensor, shape: tuple[int, int]) -> str:
    """Why a tensor cannot be a mask; empty if it can."""
    if tuple(mask.shape) != shape:
        return f"has the shape {list(mask.shape)} and not {list(shape)}"
    others = mask[(mask != 0) & (mask != 1)]
    return f"holds {float(others[0])}, which is neither one nor zero" if others.numel() else ""


@dataclass
class _Finding:
    """A broken rule, where it is broken first."""

    rule: str
    layer: int
    row: int
    query: int
    key: int
    sees: bool
    """What the target does: the token sees the key."""
    pairs: int = 0
    """Pairs of that layer."""
    layers: list[int] = field(default_factory=list)
    """All that break it."""

    def problem(self, rule: Visibility, rows: Sequence[_Row], mask: Tensor) -> Problem:
        """For people, with a picture of what is right and of what the target does."""
        kind, row = rule.layers[self.layer], rows[self.row]
        others = self.layers[1:]
        start = sum(len(other.tokens) for other in rows[: self.row])
        place = (self.query, self.key)
        return Problem(
            rule=self.rule,
            message=f"layer {self.layer} ({kind}{'' if kind == FULL else f', window {rule.window}'}), row "
            f"{self.row}: {_named(row, self.query)} {'sees' if self.sees else 'does not see'} "
            f"{_named(row, self.key)} and must{' not' if self.sees else ''}; in this layer "
            f"{'1 pair is' if self.pairs == 1 else f'{self.pairs} pairs are'} wrong like that"
            + (
                f", and some in layer{'s' * (len(others) > 1)} {', '.join(map(str, others))}"
                if others
                else ""
            ),
            expected=_picture(row.expected[kind], *place),
            got=_picture(row.seen(mask, start), *place),
        )


def _named(row: _Row, place: int) -> str:
    """`token 12 (image 1, place 3)`."""
    if place >= len(row.tokens):
        return f"key {place} (the row has {len(row.tokens)} tokens)"
    return f"token {place} ({row.tokens[place]})"


def _compare(
    findings: dict[str, _Finding], rule: Visibility, layer: int, rows: Sequence[_Row], mask: Tensor
) -> None:
    """Add what is wrong with a layer's mask, bool [tokens, longest row]."""
    kind = rule.layers[layer]
    start = 0
    for number, row in enumerate(rows):
        seen = row.seen(mask, start)
        count = len(row.tokens)
        opened = {block for block in row.lengths if _opened(row, block, seen)}
        wrong = [
            (query, key, _broken(rule, kind, row, query, key, opened))
            for query, key in (seen != row.expected[kind]).nonzero().tolist()
        ]
        beyond = mask[start : start + count, count:].nonzero().tolist()
        wrong += [(query, count + key, "padding") for query, key in beyond]
        for query, key, broken in wrong:
            if broken not in findings:
                sees = key >= count or bool(seen[query, key])
                findings[broken] = _Finding(broken, layer, number, query, key, sees)
            found = findings[broken]
            found.pairs += found.layer == layer
            if found.layers[-1:] != [layer]:
                found.layers.append(layer)
        start += count


def _broken(rule: Visibility, kind: LayerType, row: _Row, query: int, key: int, opened: set[int]) -> str:
    """The rule that a wrong pair breaks; see the top of this module.

    `opened` are the images some of whose tokens see later ones of them.
    """
    a, b = row.tokens[query], row.tokens[key]
    same_image = a.block != TEXT and a.block == b.block
    if key <= query:
        if kind == FULL:
            return "full-window"
        before = query - key >= rule.window
        return "block-window" if before and same_image and rule.image_attention else "window"
    if not same_image:
        if a.shares_piece(b):
            return "sound"
        return "merged-blocks" if a.soft and b.soft else "future"
    if not rule.image_attention:
        return "causal-model"
    if kind == FULL:
        return "full-layer"
    if row.lengths[a.block] > rule.window:
        if rule.long_blocks == "drop" or a.block not in opened:
            return "long-block"
        if key - query >= rule.window:
            return "future-clamp"
    return "block-closed"


def _opened(row: _Row, block: int, seen: Tensor) -> bool:
    """Whether any soft token of an image sees a later one of it."""
    first = next(place for place, token in enumerate(row.tokens) if token.block == block)
    end = first + row.lengths[block]
    return bool(seen[first:end, first:end].triu(diagonal=1).any())


def _picture(seen: Tensor, query: int, key: int) -> list[str]:
    """The part of a mask around a place: a line for each query, `#` where it sees the key and else `.`."""
    count = len(seen)
    top, left = (max(0, min(at - size // 2, count - size)) for at, size in ((query, _ROWS), (key, _COLUMNS)))
    part = seen[top : top + _ROWS, left : left + _COLUMNS].tolist()
    lines = [
        f"query {top + number:>4}  {''.join('#' if one else '.' for one in line)}"
        for number, line in enumerate(part)
    ]
    return [f"keys {left} to {min(left + _COLUMNS, count) - 1}", *lines]
