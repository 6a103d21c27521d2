"""Have a target answer the items of a case. Importing this loads lm-eval."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from conformance.errors import ConformanceError
from conformance.evaluation import EvaluationOptions, evaluate
from conformance.gates import pairing
from conformance.gates.sequential import SequentialTest
from conformance.gates.spec import PairedRule
from conformance.gates.suite import AccuracyCase
from conformance.lm_eval_model import BATCH_SIZE
from conformance.scoring import Sheet
from conformance.scratch import Scratch
from conformance.targets.protocol import Target
from conformance.targets.reference_chat import CheckpointError, checkpoint_folder

VARIABLE = "CONFORMANCE_CHECKPOINTS"
_FIRST_LOOK = 8
"""A sequential gate is looked at after an eighth of its items, a quarter, half, and all."""
_SMALL_BATCH = 128
"""Questions at once to a bundled checkpoint: a step of so small a model takes hardly longer for more rows."""

Progress = Callable[[int, int], None]


class NotAtHandError(ConformanceError):
    """A checkpoint is not on this machine; the case says nothing then."""


def find_checkpoint(name: str) -> Path:
    """Folder of a case's checkpoint.

    Args:
        name: A bundled one's, or a published one's with its owner.

    Raises:
        NotAtHandError: it is not here; says what to do.
    """
    if "/" not in name:
        try:
            return checkpoint_folder(name)
        except CheckpointError as error:
            raise NotAtHandError(f"the checkpoint {name} is not at hand: {error}") from None
    named = os.environ.get(VARIABLE)
    folder = Path(named) / name if named else None
    if folder is None or not (folder / "config.json").is_file():
        where = f"{folder} has no config.json" if folder else f"{VARIABLE} is not set"
        raise NotAtHandError(
            f"the checkpoint {name} is not at hand: {where}; download it and set {VARIABLE} to the folder "
            f"that holds {name}"
        )
    return folder


def ask(
    case: AccuracyCase,
    target: Target,
    checkpoint: str | Path,
    *,
    reference: Sheet | None = None,
    progress: Progress | None = None,
) -> Sheet:
    """Ask all items, or fewer where a sequential gate stops.

    Args:
        case: What is asked, and how.
        target: Who is asked.
        checkpoint: Folder, or a server's name of its model.
        reference: For a sequential gate, which is looked at on the way.
        progress: Told how many of how many items are answered.

    Raises:
        EvaluationError, DataError: as `evaluate`.
        ComparisonError: as soon as a part of the answers cannot be paired with the reference.
    """
    gate = case.gate
    scratch = Scratch("conformance-gate-")
    try:
        options = EvaluationOptions(
            thinking=case.thinking,
            max_new_tokens=case.max_new_tokens,
            shots=case.shots,
            filter=case.filter,
            order_seed=case.order_seed,
            chat_template=case.chat_template,
            batch_size=BATCH_SIZE if "/" in case.checkpoint else _SMALL_BATCH,
            engine=case.options(),
            cache=scratch.path / "answers.jsonl",  # a later look does not ask again
        )

        def answers(limit: int) -> Sheet:
            def told(done: int, _part: int) -> None:
                if progress is not None:
                    progress(done, gate.items)

            return evaluate(
                target,
                case.task,
                checkpoint=checkpoint,
                limit=limit,
                seed=case.seed,
                options=options,
                progress=told,
            )

        if reference is not None and isinstance(gate, PairedRule) and gate.stop_alpha is not None:
            looks = (gate.items // parts for parts in (_FIRST_LOOK, 4, 2))
            for limit in (look for look in looks if look):
                part = answers(limit)
                if _stops(gate, reference, part):
                    return part
        return answers(gate.items)
    finally:
        scratch.close()


def _stops(gate: PairedRule, reference: Sheet, part: Sheet) -> bool:
    assert gate.stop_alpha is not None
    pairs = pairing.pair(reference, part, other_checkpoint=gate.other_checkpoint).pairs
    return SequentialTest(gate.stop_alpha, gate.floor).see_all(pair.difference for pair in pairs)
