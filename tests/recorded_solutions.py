"""Real solutions of word problems with the labels that their authors gave them, as a server says them."""

from __future__ import annotations

import json
import lzma
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from conformance.targets.protocol import ServeAnswer, ServeRequest, TargetInfo

SAMPLE = Path(__file__).parent / "data" / "gsm8k" / "solutions.jsonl.xz"
_ALL = "gsm8k/example_model_solutions.jsonl"
_LAST_LINE = re.compile(r"^A: (.*)\Z", re.MULTILINE)


@dataclass(frozen=True)
class Solution:
    """A question, what a model said, and whether that is right."""

    question: str
    answer: str
    """The data set's own solution, with `#### ` before the number."""
    solution: str
    """The model's, whose last line is `A: ` and the number."""
    is_correct: bool

    @property
    def strict(self) -> str:
        """With the last line as the data set writes it."""
        return _LAST_LINE.sub(r"#### \1", self.solution)


def sample() -> list[Solution]:
    """Two hundred, one to a question, that stand in this repository."""
    with lzma.open(SAMPLE, "rt", encoding="utf-8") as file:
        return [Solution(**json.loads(line)) for line in file]


def everything() -> dict[str, list[Solution]]:
    """All of them, by model, where `CONFORMANCE_DATA_DIR` has the file; else nothing."""
    folder = os.environ.get("CONFORMANCE_DATA_DIR")
    path = Path(folder, _ALL) if folder else None
    if path is None or not path.is_file():
        return {}
    return read(path)


def read(path: Path) -> dict[str, list[Solution]]:
    """The published file: a question a line, with the solutions of four models."""
    found: dict[str, list[Solution]] = {}
    for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n"):
        row = json.loads(line)
        answer = _LAST_LINE.sub(r"#### \1", row["ground_truth"])
        for model, said in row.items():
            if isinstance(said, dict):
                made = Solution(row["question"], answer, said["solution"], said["is_correct"])
                found.setdefault(model, []).append(made)
    return found


def write_data(solutions: Sequence[Solution], folder: Path) -> None:
    """The questions as a data set that `CONFORMANCE_DATA_DIR` may name."""
    (folder / "gsm8k").mkdir(exist_ok=True)
    for split in ("train", "test"):
        rows = (json.dumps({"question": each.question, "answer": each.answer}) for each in solutions)
        (folder / "gsm8k" / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


class RecordedTarget:
    """Says the recorded solution of whatever question it is asked.

    Args:
        solutions: One to a question.
        strict: With their last line as the data set writes it.
    """

    spec = "recorded"

    def __init__(self, solutions: Sequence[Solution], *, strict: bool) -> None:
        self._said = {
            f"Question: {each.question}\nAnswer:": each.strict if strict else each.solution
            for each in solutions
        }

    def describe(self) -> TargetInfo:
        return TargetInfo(name="recorded", version="2021", capabilities=("serve",))

    def serve(self, request: ServeRequest) -> Sequence[ServeAnswer]:
        return list(self._answers(request))

    def close(self) -> None:
        pass

    def _answers(self, request: ServeRequest) -> Iterator[ServeAnswer]:
        for body in request.bodies:
            assert isinstance(body, dict)
            said = self._said[body["messages"][-1]["content"]]
            choice = {"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
            yield ServeAnswer(status=200, body={"choices": [choice]})
