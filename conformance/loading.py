"""Suite files to models: discovery, validation with line numbers, case digests and addresses.

A case is named by its address, `parser/reasoning::label-is-dropped`, everywhere: on the command
line, in expectations and in reports. A suite's id is its path below the suites' root, so the root
follows from the file.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter

from conformance import resources, yamlfile
from conformance.contract_suite import ContractCase, ContractSuite
from conformance.discovery import EXPECTATIONS_FOLDER
from conformance.errors import SuiteError, UsageError
from conformance.gates.suite import AccuracyCase, AccuracySuite
from conformance.invariance.models import HEADED, MODELS, DrawnModel
from conformance.invariance_suite import (
    ExamPrompts,
    InvarianceCase,
    InvarianceSuite,
    ScriptedPrompts,
)
from conformance.lora_suite import LoraCase, LoraSuite
from conformance.media import MARKERS, Piece, TextPiece, kind_of, marker_ids
from conformance.results import SCHEMA_VERSION
from conformance.scoring_suite import ScoringCase, ScoringSuite
from conformance.suites import (
    PROMPTS,
    AnySuite,
    Case,
    GenerationCase,
    GenerationSuite,
    MaskCase,
    MaskSuite,
    MixedRows,
    ParityCase,
    ParitySuite,
    ParserCase,
    ParserSuite,
    ProcessorCase,
    ProcessorSuite,
    RandomRows,
    ServerCase,
    ServerSuite,
    Suite,
    TemplateCase,
    TemplateSuite,
    ToolsSuiteBase,
)
from conformance.targets import bundled

_KINDS: dict[str, type[AnySuite]] = {
    "parser": ParserSuite,
    "template": TemplateSuite,
    "parity": ParitySuite,
    "mask": MaskSuite,
    "contract": ContractSuite,
    "processor": ProcessorSuite,
    "server": ServerSuite,
    "generation": GenerationSuite,
    "invariance": InvarianceSuite,
    "lora": LoraSuite,
    "scoring": ScoringSuite,
    "accuracy": AccuracySuite,
}


@dataclass(frozen=True)
class LoadedCase:
    """A case, where it stands, and what its results are filed under."""

    suite: LoadedSuite
    case: Case
    line: int
    digest: str
    cell: str = ""
    """Id of the matrix cell whose settings it has; empty outside the matrix."""
    matrix: Path | None = None
    """The file of that matrix; None for the bundled one."""

    @property
    def address(self) -> str:
        """`parser/reasoning::label-is-dropped`."""
        return f"{self.suite.suite.id}::{self.case.id}"


@dataclass(frozen=True, eq=False)
class LoadedSuite:
    """A suite file."""

    suite: AnySuite
    path: Path
    digest: str
    """SHA-256 of the file."""
    lines: tuple[int, ...]
    """Line of each case, in the order of `suite.cases`."""

    @property
    def root(self) -> Path:
        """The folder that suite ids are relative to."""
        return self.path.parents[self.suite.id.count("/")]

    @cached_property
    def cases(self) -> tuple[LoadedCase, ...]:
        """All cases in file order."""
        cases: tuple[Case, ...] = self.suite.cases
        return tuple(
            LoadedCase(self, case, line, case_digest(case, self.suite, self.path.parent))
            for case, line in zip(cases, self.lines, strict=True)
        )

    def case(self, case_id: str) -> LoadedCase:
        """The case with this id.

        Raises:
            UsageError: the suite has none.
        """
        for loaded in self.cases:
            if loaded.case.id == case_id:
                return loaded
        raise UsageError(f"{self.path}: no case {case_id!r}; `conformance list cases` names them all")


@dataclass(frozen=True, eq=False)
class LoadedSuites:
    """Several suites, in order of their ids."""

    suites: tuple[LoadedSuite, ...]

    def __iter__(self) -> Iterator[LoadedSuite]:
        return iter(self.suites)

    @cached_property
    def cases(self) -> tuple[LoadedCase, ...]:
        """All cases of all suites."""
        return tuple(case for suite in self.suites for case in suite.cases)

    def match(self, pattern: str) -> tuple[LoadedCase, ...]:
        """Cases whose address, or whose suite's id, matches a shell-style pattern."""
        return tuple(
            case
            for case in self.cases
            if fnmatch.fnmatchcase(case.address, pattern) or fnmatch.fnmatchcase(case.suite.suite.id, pattern)
        )


def load_suites(paths: Sequence[Path] | None = None) -> LoadedSuites:
    """Load suite files.

    Args:
        paths: Files, or folders that are searched for `*.yaml`; None for the bundled suites.

    Raises:
        SuiteError: a file is broken, or two files have the same id.
        UsageError: a path does not exist, or nothing was found.
    """
    roots = [resources.suites_dir()] if paths is None else list(paths)
    files = sorted({file.resolve() for path in roots for file in _files(path)})
    if not files:
        raise UsageError(f"no suite files (*.yaml) under {', '.join(map(str, roots))}")
    loaded = sorted((load_suite(file) for file in files), key=lambda suite: suite.suite.id)
    seen: dict[str, LoadedSuite] = {}
    for suite in loaded:
        other = seen.setdefault(suite.suite.id, suite)
        if other is not suite:
            raise SuiteError(f"{suite.path}:1: id: {suite.suite.id!r} is also the id of {other.path}")
    return LoadedSuites(tuple(loaded))


def load_suite(path: Path) -> LoadedSuite:
    """Load one suite file; an unchanged file is parsed once per process.

    Raises:
        SuiteError: with file, line, field, what was expected and what to do.
    """
    path = path.resolve()
    try:
        stat = path.stat()
    except OSError as error:
        raise SuiteError(f"{path}: cannot be read: {error.strerror}") from None
    return _load(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=1024)
def _load(path: Path, _mtime: int, _size: int) -> LoadedSuite:
    document = yamlfile.read(path)
    if not isinstance(document.value, dict):
        raise document.error((), "a suite is a mapping with id, kind, title, description, area and cases")
    kind = document.value.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise document.error(("kind",), f"expected one of {', '.join(_KINDS)}, got {json.dumps(kind)}")
    suite = document.validate(_KINDS[kind])
    _check_id(document, suite)
    _check_cases(document, suite)
    lines = tuple(document.line(("cases", i)) for i in range(len(suite.cases)))
    return LoadedSuite(suite, path, hashlib.sha256(document.text.encode()).hexdigest(), lines)


def suite_files(root: Path) -> list[Path]:
    """Suite files under a folder, without the expectations.

    Raises:
        SuiteError: a file ends in `.yml`, which would be overlooked.
    """
    files = []
    for path in sorted(root.rglob("*.y*ml")):
        if path.relative_to(root).parts[0] == EXPECTATIONS_FOLDER or not path.is_file():
            continue
        if path.suffix == ".yml":
            raise SuiteError(f"{path}: suite files end in .yaml; rename it")
        if path.suffix == ".yaml":
            files.append(path)
    return files


def resolve_tools(case: Case, suite: AnySuite) -> tuple[dict[str, Any], ...]:
    """The tools that a case declares, whether by the name of a toolset or in place."""
    if isinstance(
        case,
        ParityCase
        | MaskCase
        | ContractCase
        | ProcessorCase
        | GenerationCase
        | InvarianceCase
        | LoraCase
        | AccuracyCase
        | ScoringCase,
    ):
        return ()
    if isinstance(case.tools, str):
        assert isinstance(suite, ToolsSuiteBase)
        return suite.toolsets[case.tools]
    return case.tools


def resolve_rows(
    rows: tuple[tuple[int, ...], ...] | RandomRows, config: dict[str, Any]
) -> tuple[tuple[int, ...], ...]:
    """Token ids of rows without media, drawn where they are not given."""
    if not isinstance(rows, RandomRows):
        return rows
    vocab_size = text_ids(config)
    draw = random.Random(rows.seed)  # noqa: S311 - seeded test data
    return tuple(tuple(draw.randrange(vocab_size) for _ in range(length)) for length in rows.random)


def text_ids(config: Mapping[str, Any]) -> int:
    """Token ids below this are text: all of a text model's, and in a whole one those before its markers."""
    vocab_size: int = config.get("text_config", config)["vocab_size"]
    markers = [token for kind in MARKERS for token in marker_ids(config, kind) if token is not None]
    return min([vocab_size, *markers])


def resolve_prompt(case: ParserCase) -> str:
    """The rendered prompt that a parser case answers."""
    return PROMPTS.get(case.prompt, case.prompt)


def case_digest(case: Case, suite: AnySuite, folder: Path | None = None) -> str:
    """SHA-256 over everything in the suite file, and in what it refers to, that can change the verdict.

    Args:
        case: It.
        suite: Where it stands.
        folder: Of the suite's file; needed for the kind `accuracy`.
    """
    content = {
        "schema": SCHEMA_VERSION,
        "suite": suite.id,
        "kind": suite.kind,
        "case": case.model_copy(update={"tags": ()}).model_dump(mode="json"),
        "tools": resolve_tools(case, suite),
    }
    if isinstance(case, ParserCase):
        content["prompt"] = resolve_prompt(case)
    if isinstance(suite, ParitySuite | ProcessorSuite):
        content["oracle"] = suite.oracle
    if isinstance(case, ParityCase | MaskCase) and isinstance(suite, ParitySuite | MaskSuite):
        content["config"] = suite.configs[case.config]
    if isinstance(case, ContractCase) and isinstance(suite, ContractSuite):
        content["config"] = suite.configs[case.config]
    if isinstance(case, LoraCase) and isinstance(suite, LoraSuite):
        content["config"] = suite.configs[case.config]
    if isinstance(case, GenerationCase):
        content["checkpoint"] = bundled.digests()
    if isinstance(case, InvarianceCase):
        content["checkpoint"] = _deciding(case)
    if isinstance(case, AccuracyCase):
        from conformance.gates import loading as gates

        assert folder is not None
        content["reference"] = gates.reference_sha256(case, folder)
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _deciding(case: InvarianceCase) -> Any:
    """What makes the model, and the prompts that lie elsewhere."""
    if case.model == "scripted":
        return bundled.digests()
    if not isinstance(case.prompts, ExamPrompts):
        return MODELS[cast(DrawnModel, case.model)]
    names = _bundled_names(case)
    data = resources.task_data(case.prompts.task).read_bytes()
    return {**{name: bundled.digests(name) for name in names}, "data": hashlib.sha256(data).hexdigest()}


def _bundled_names(case: InvarianceCase) -> list[str]:
    """A trained model, and its head where one drafts."""
    drafted = case.base.draft is not None or case.changed.draft is not None
    return [case.model, *([bundled.draft_name(case.model)] if drafted and case.model in HEADED else [])]


def json_schema() -> dict[str, Any]:
    """JSON Schema of suite files, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **TypeAdapter(Suite).json_schema()}


def _files(path: Path) -> Iterable[Path]:
    if path.is_dir():
        return suite_files(path)
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    return [path]


def _check_id(document: yamlfile.Document, suite: AnySuite) -> None:
    depth = suite.id.count("/") + 1
    actual = "/".join(document.path.with_suffix("").parts[-depth:])
    if document.path.suffix != ".yaml":
        raise SuiteError(f"{document.path}: suite files end in .yaml; rename it")
    if actual != suite.id:
        raise document.error(
            ("id",), f"{suite.id!r} must equal the end of the file's path, {actual!r}; change one of them"
        )


def _check_cases(document: yamlfile.Document, suite: AnySuite) -> None:
    first: dict[str, int] = {}
    cases: tuple[Case, ...] = suite.cases
    for index, case in enumerate(cases):
        earlier = first.setdefault(case.id, index)
        if earlier != index:
            line = document.line(("cases", earlier))
            raise document.error(
                ("cases", index, "id"),
                f"duplicate case id {case.id!r}, first used on line {line}; rename one",
            )
    for index, case in enumerate(cases):
        loc = ("cases", index)
        if case.control_of is not None and (case.control_of not in first or case.control_of == case.id):
            raise document.error(
                (*loc, "control_of"),
                f"{case.control_of!r} is no other case of this suite; name the case that this one controls",
            )
        if isinstance(case, ParityCase | MaskCase):
            assert isinstance(suite, ParitySuite | MaskSuite)
            _check_rows(document, loc, case, suite)
        elif isinstance(case, ContractCase):
            assert isinstance(suite, ContractSuite)
            _check_split(document, loc, case, suite)
        elif isinstance(case, ProcessorCase):
            _check_placeholders(document, loc, case)
        elif isinstance(case, GenerationCase):
            _check_lines(document, (*loc, "lines"), case.lines)
        elif isinstance(case, InvarianceCase):
            if isinstance(case.prompts, ScriptedPrompts):
                _check_lines(document, (*loc, "prompts", "lines"), case.prompts.lines)
            elif isinstance(case.prompts, ExamPrompts):
                _check_trained(document, loc, case)
        elif isinstance(case, LoraCase):
            assert isinstance(suite, LoraSuite)
            _check_config(document, loc, case.config, suite.configs)
            _check_media(document, loc, ("rows",), case.rows, suite.configs[case.config])
        elif isinstance(case, AccuracyCase):
            _check_gate(document, loc, case)
        elif isinstance(case, ScoringCase):
            continue  # whether there is such a task, lm-eval says, which takes seconds to import
        else:
            assert isinstance(suite, ToolsSuiteBase)
            _check_chat(document, loc, case, suite)


def _check_trained(document: yamlfile.Document, loc: tuple[str | int, ...], case: InvarianceCase) -> None:
    for name in _bundled_names(case):
        if not bundled.has(name):
            raise document.error(
                (*loc, "model"), f"no checkpoint {name!r} is bundled; train it: docs/nano.md says how"
            )


def _check_split(
    document: yamlfile.Document, loc: tuple[str | int, ...], case: ContractCase, suite: ContractSuite
) -> None:
    config = suite.configs.get(case.config)
    if config is None:
        known = ", ".join(sorted(suite.configs))
        raise document.error(
            (*loc, "config"), f"no configuration {case.config!r} in this suite; there are: {known}"
        )
    for key, form in (("vocab_size", int), ("hidden_size", int), ("layer_types", list)):
        if not isinstance(config.get(key), form):
            raise document.error(("configs", case.config), f"the configuration needs `{key}`")
    layers = len(config["layer_types"])
    if config.get("num_hidden_layers") != layers or sum(case.pipeline) != layers or min(case.pipeline) < 1:
        raise document.error(
            (*loc, "pipeline"), f"{list(case.pipeline)} does not divide the configuration's {layers} layers"
        )


def _check_chat(
    document: yamlfile.Document,
    loc: tuple[str | int, ...],
    case: ParserCase | TemplateCase | ServerCase,
    suite: ToolsSuiteBase,
) -> None:
    if isinstance(case.tools, str) and case.tools not in suite.toolsets:
        known = ", ".join(sorted(suite.toolsets)) or "none; add `toolsets:` to the suite"
        raise document.error((*loc, "tools"), f"no toolset {case.tools!r} in this suite; there are: {known}")
    if isinstance(case, ParserCase) and case.prompt not in PROMPTS and "<|turn>" not in case.prompt:
        raise document.error(
            (*loc, "prompt"),
            f"no prompt is called {case.prompt!r}; use {', '.join(PROMPTS)}, or a literal prompt that "
            "holds <|turn>",
        )


def _check_lines(document: yamlfile.Document, loc: tuple[str | int, ...], lines: tuple[str, ...]) -> None:
    known = bundled.lines()
    for index, line in enumerate(lines):
        if line not in known:
            raise document.error(
                (*loc, index), f"the script has no line {line!r}; its lines are {', '.join(known)}"
            )


def _check_gate(document: yamlfile.Document, loc: tuple[str | int, ...], case: AccuracyCase) -> None:
    from conformance.gates import loading as gates  # SciPy, where there are gates

    wrong = gates.check(case, document.path.parent)
    if wrong is not None:
        field, message = wrong
        raise document.error((*loc, *field), message)


def _check_placeholders(document: yamlfile.Document, loc: tuple[str | int, ...], case: ProcessorCase) -> None:
    first = kind_of(case.pieces[0])
    if case.extra_placeholders + sum(kind_of(piece) == first for piece in case.pieces) < 0:
        raise document.error(
            (*loc, "extra_placeholders"),
            f"there are fewer pieces of the first one's kind, {first}",
        )
    if case.extra_placeholders and not case.refused:
        raise document.error(
            (*loc, "extra_placeholders"), "placeholders that do not match the media must be `refused: true`"
        )


def _check_rows(
    document: yamlfile.Document,
    loc: tuple[str | int, ...],
    case: ParityCase | MaskCase,
    suite: ParitySuite | MaskSuite,
) -> None:
    config = _check_config(document, loc, case.config, suite.configs)
    text = config.get("text_config", config)
    if isinstance(case.rows, MixedRows):
        _check_media(document, loc, ("rows", "pieces"), case.rows.pieces, config)
        return
    rows = case.rows if isinstance(case.rows, tuple) else ()
    largest = max((max(row) for row in rows), default=0)
    if largest >= text["vocab_size"]:
        raise document.error(
            (*loc, "rows"), f"token id {largest} is outside the vocabulary of {text['vocab_size']}"
        )


def _check_config(
    document: yamlfile.Document, loc: tuple[str | int, ...], name: str, configs: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The configuration of a case, if it is there and of a model with layers and tokens."""
    config = configs.get(name)
    if config is None:
        known = ", ".join(sorted(configs))
        raise document.error((*loc, "config"), f"no configuration {name!r} in this suite; there are: {known}")
    text = config.get("text_config", config)
    for key in ("vocab_size", "num_hidden_layers"):
        if not isinstance(text, dict) or type(text.get(key)) is not int or text[key] < 1:
            raise document.error(("configs", name), f"the configuration needs a positive `{key}`")
    return config


def _check_media(
    document: yamlfile.Document,
    loc: tuple[str | int, ...],
    field: tuple[str, ...],
    rows: tuple[tuple[Piece, ...], ...],
    config: dict[str, Any],
) -> None:
    for number, row in enumerate(rows):
        for place, piece in enumerate(row):
            if isinstance(piece, TextPiece):
                continue
            kind = kind_of(piece)
            section = "audio_config" if kind == "audio" else "vision_config"
            missing = [
                f"{name}_token_id"
                for name, token in zip(MARKERS[kind], marker_ids(config, kind), strict=True)
                if token is None
            ]
            missing += [section] if config.get(section) is None else []
            if missing:
                raise document.error(
                    (*loc, *field, number, place),
                    f"for {kind} the configuration needs {', '.join(missing)}",
                )
