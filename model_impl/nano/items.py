"""Items of the nano tasks: `python -m model_impl.nano.items TASK [FILE]` writes them as JSON Lines.

The same on every machine. They are drawn from what no training ever sees; a training draws from the rest.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from model_impl.nano.lesson import Lesson
from model_impl.nano.problems import problem
from model_impl.nano.subjects.items import documents, examination

COUNT = 500
_MOST_ALIKE = 5
"""Items with the same answer: so no answer is a good guess."""
_SEED = "nano_gsm8k"

Item = dict[str, Any]


def word_problems(count: int = COUNT) -> list[Item]:
    """Held-out word problems, in the shape of `gsm8k`: no two of one template, or of the same numbers."""
    rng = random.Random(_SEED)  # noqa: S311 - not a secret
    items: list[Item] = []
    seen: set[object] = set()
    answers: Counter[int] = Counter()
    while len(items) < count:
        drawn = problem(rng, "test")
        if drawn.template in seen or drawn.numbers in seen or answers[drawn.answer] == _MOST_ALIKE:
            continue
        seen |= {drawn.template, drawn.numbers}
        answers[drawn.answer] += 1
        items.append(
            {
                "id": f"problem-{len(items):03d}",
                "question": drawn.text,
                "answer": f"{drawn.solution}\n#### {drawn.answer}",
                "steps": drawn.steps,
                "template": drawn.template,
                "numbers": list(drawn.numbers),
            }
        )
    return items


TASKS: Mapping[str, Callable[[], list[Item]]] = {
    "nano_gsm8k": word_problems,
    "nano_mmmu": lambda: list(documents("nano_mmmu")),
    "nano_sounds": lambda: list(documents("nano_sounds")),
}


def lessons(task: str) -> list[Lesson]:
    """The very items of a task as lessons; what stands in an answer before the end of its thought is no part.

    Args:
        task: One of `TASKS`.
    """
    if task != "nano_gsm8k":
        return [exercise.lesson(thinking=True) for exercise in examination(task)]
    return [
        Lesson(
            messages=({"role": "user", "content": item["question"]},),
            answer=f"#### {item['answer'].rpartition('#### ')[2]}",
            key=item["template"],
            numbers=tuple(item["numbers"]),
            thinking=True,
        )
        for item in word_problems()
    ]


def write(items: Sequence[Item], path: Path) -> None:
    """Write items, one a line."""
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
    path.write_text("".join(lines), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the items of a task."""
    parser = argparse.ArgumentParser(
        prog="python -m model_impl.nano.items", description="Write the items of a nano task."
    )
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("file", nargs="?", type=Path, help="[conformance/tasks/data/TASK.jsonl]")
    chosen = parser.parse_args(arguments)
    data = Path(__file__).parents[2] / "conformance" / "tasks" / "data"
    path = chosen.file or data / f"{chosen.task}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write(TASKS[chosen.task](), path)


if __name__ == "__main__":
    main()
