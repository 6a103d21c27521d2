"""lm-eval's tasks, ready to be asked: ours, its own, and its own with documents from a local folder.

1. A task's documents come from the folder that `CONFORMANCE_DATA_DIR` names, where it has them.
2. MMMU's answers are read without chance; see `conformance.tasks.mmmu`.
3. The solved examples before a question are drawn anew for each document, from the seed and the document
   alone. lm-eval draws them one after the other, so that a prompt would depend on the documents before it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lm_eval  # type: ignore[import-untyped]
from lm_eval.api.task import ConfigurableTask  # type: ignore[import-untyped]
from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]

from conformance.answering import EvaluationError, picture_sha256, sound_sha256
from conformance.tasks import mmmu, sources

FOLDER = Path(__file__).parent / "tasks"
_NEAR = ("gsm8k", "mmmu")
"""Folders of lm-eval that are looked into first: reading all of its 14 000 tasks takes many seconds."""
_MMMU = "mmmu_val"
Documents = Sequence[Mapping[str, Any]]
_CHOICE: Mapping[str, Any] = {
    "process_results": mmmu.process_results,
    "filter_list": [
        {"name": "choice", "filter": [{"function": mmmu.Choice}, {"function": "take_first"}]},
    ],
}


@dataclass(frozen=True)
class LoadedTask:
    """A task, or the tasks of a group, by name."""

    name: str
    parts: Mapping[str, Any]
    """lm-eval's tasks."""
    data: Mapping[str, str] = field(default_factory=dict)
    """Local files of documents, with their SHA-256."""

    @property
    def version(self) -> str:
        """Of the task; of a group, all of its tasks'."""
        return ", ".join(sorted({str(part.VERSION) for part in self.parts.values()}))

    @property
    def shots(self) -> int:
        """Solved examples before each question."""
        return max(int(part.config.num_fewshot or 0) for part in self.parts.values())


def load(
    name: str,
    *,
    shots: int | None = None,
    seed: int = 0,
    documents: Documents | None = None,
    examples: Documents = (),
) -> LoadedTask:
    """Load a task or a group by lm-eval's name for it.

    Args:
        name: Such as `nano_gsm8k`, `gsm8k`, `mmmu_val`.
        shots: Solved examples before each question; None: as the task has it.
        seed: Of their choice.
        documents: In place of the task's own.
        examples: Where there are `documents`, the solved ones.

    Raises:
        EvaluationError: there is no such task, or its answers are not generated.
        DataError: its documents cannot be read.
    """
    manager = _manager(name)
    parts: dict[str, Any] = {}
    data: dict[str, str] = {}
    for leaf in _leaves(manager, name):
        config, files = _config(manager, leaf)
        if documents is not None:
            config, files = _with_documents(config, documents, examples), {}
        data |= {f"{leaf}/{file}": digest for file, digest in sources.digests(files).items()}
        task = ConfigurableTask(config=config)
        if task.OUTPUT_TYPE != "generate_until":
            raise EvaluationError(
                f"{leaf}: its answers are not generated ({task.OUTPUT_TYPE}); run it by "
                "`python -m conformance.lm_eval_model`, which takes the arguments of lm-eval's own command"
            )
        if task.config.repeats > 1:
            raise EvaluationError(
                f"{leaf}: asks each question {task.config.repeats} times; targets decode greedily"
            )
        if shots is not None:
            task.set_config(key="num_fewshot", value=shots)
        _steady_examples(task, seed)
        parts[leaf] = task
    return LoadedTask(name, parts, data)


def _with_documents(config: Mapping[str, Any], documents: Documents, examples: Documents) -> dict[str, Any]:
    """A task's configuration, with other documents."""
    splits = {"test": sources.dataset(documents)}
    if examples:
        splits["train"] = sources.dataset(examples)
    train = "train" if examples else None
    return {
        **config,
        "test_split": "test",
        "validation_split": None,
        "training_split": train,
        "fewshot_split": train,
        "custom_dataset": lambda **_metadata: splits,
    }


def document_sha256(doc: Any) -> str:
    """Digest of a document, of pictures by their pixels."""
    text = json.dumps(doc, default=_digest_of, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _digest_of(value: Any) -> str:
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if hasattr(value, "convert"):
        return picture_sha256(value)
    if hasattr(value, "astype"):
        return sound_sha256(value)
    return str(value)


def _manager(name: str) -> Any:
    own = Path(lm_eval.__file__).parent / "tasks"
    near = TaskManager(
        include_defaults=False, include_path=[str(FOLDER), *(str(own / folder) for folder in _NEAR)]
    )
    if name in near.all_tasks:
        return near
    every = TaskManager(include_path=str(FOLDER))
    if name not in every.all_tasks:
        raise EvaluationError(
            f"there is no task {name!r}; `python -m conformance.lm_eval_model ls tasks` lists them"
        )
    return every


def _leaves(manager: Any, name: str) -> list[str]:
    """Names of the tasks in a group, at any depth."""
    config = manager.task_index[name].cfg or {}
    members = config.get("task")
    if name in manager.all_groups and isinstance(members, list):
        if not all(isinstance(member, str) for member in members):
            raise EvaluationError(
                f"{name}: a group that changes its tasks is not supported; name one of them"
            )
        return [leaf for member in members for leaf in _leaves(manager, member)]
    if name not in manager.all_subtasks:
        raise EvaluationError(f"{name}: neither a task nor a group of tasks")
    return [name]


def _config(manager: Any, leaf: str) -> tuple[dict[str, Any], dict[str, tuple[Path, ...]]]:
    """A task's own configuration with our changes, and the local files of its documents."""
    from lm_eval.tasks._yaml_loader import load_yaml  # type: ignore[import-untyped]

    config = dict(load_yaml(manager.task_index[leaf].yaml_path))
    for structural in ("tag", "group", "task_list"):
        config.pop(structural, None)
    if "class" in config:
        raise EvaluationError(f"{leaf}: a task written in Python is not supported")
    if leaf.startswith(_MMMU):
        config |= _CHOICE
    files: dict[str, tuple[Path, ...]] = {}
    if "dataset_path" in config:
        dataset, name = str(config["dataset_path"]), config.get("dataset_name")
        files = sources.local_files(dataset, name)
        if files:
            config["custom_dataset"] = lambda **_metadata: sources.load(dataset, name)
    return config, files


def _steady_examples(task: Any, seed: int) -> None:
    """See 3 above."""
    original = task.fewshot_context

    def context(doc: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        drawn = hashlib.sha256(f"{seed} {document_sha256(doc)}".encode()).digest()
        task.set_fewshot_seed(seed=int.from_bytes(drawn[:4], "little"))
        return original(doc, *arguments, **options)

    task.fewshot_context = context
