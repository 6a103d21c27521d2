"""The parity check: each rule, on targets that lie about one tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from conformance import resources
from conformance.checks import CheckOutcome, judge, tensors
from conformance.checks.parity import module_names
from conformance.errors import EngineError, SuiteError
from conformance.loading import case_digest, load_suite, load_suites, resolve_rows
from conformance.oracles import Oracles
from conformance.reporting.evidence import parity_view
from conformance.suites import ParityCase, ParitySuite, RandomRows
from conformance.targets.protocol import Capability, ForwardRequest, ForwardResult, TargetInfo

ORACLE = "lying_targets:Oracle"
CONFIG = {"vocab_size": 32, "num_hidden_layers": 2}
Change = Callable[[dict[str, Tensor]], object]


def true_tensors(request: ForwardRequest) -> dict[str, Tensor]:
    """The same for everybody who is asked the same; a router has two of four experts for each token."""
    tokens = sum(map(len, request.input_ids))
    made = {}
    for number, name in enumerate(request.capture):
        draw = torch.Generator().manual_seed(number)
        made[name] = torch.randn(tokens, 4, generator=draw)
        if name.endswith(".router"):
            made[name] = made[name] * torch.tensor([1.0, 0.0, 1.0, 0.0])
        if request.dtype == "bfloat16":
            made[name] = made[name].bfloat16().float()
    return made


class Fake:
    """Answers with the true tensors, changed."""

    def __init__(
        self,
        change: Change = lambda tensors: None,
        *,
        spec: str = "fake",
        capabilities: tuple[Capability, ...] = ("forward",),
        effective: dict[str, str] | None = None,
    ) -> None:
        self.spec = spec
        self.change = change
        self.capabilities = capabilities
        self.effective = effective
        self.requests: list[ForwardRequest] = []

    def describe(self) -> TargetInfo:
        return TargetInfo(name="fake", version="1", capabilities=self.capabilities)

    def forward(self, request: ForwardRequest) -> ForwardResult:
        self.requests.append(request)
        made = true_tensors(request)
        self.change(made)
        save_file(made, request.output)
        effective = self.effective or {"attention": request.attention or "sdpa", "dtype": request.dtype}
        return ForwardResult(path=request.output, order=request.capture, effective=effective)


@dataclasses.dataclass
class Setting:
    """An oracle, and the checkpoints that were written."""

    oracle: Fake
    oracles: Oracles
    written: list[tuple[dict[str, Any], int]]


@pytest.fixture
def setting() -> Iterator[Setting]:
    written: list[tuple[dict[str, Any], int]] = []

    def write(config: dict[str, Any], folder: Path, seed: int) -> None:
        assert folder.is_dir()
        written.append((config, seed))

    oracle = Fake(spec=ORACLE)
    oracles = Oracles(lambda spec: oracle, write)  # type: ignore[arg-type,return-value]
    yield Setting(oracle, oracles, written)
    oracles.close()


def parity_case(**changes: Any) -> ParityCase:
    values: dict[str, Any] = {
        "id": "demo",
        "title": "A case of this test.",
        "source": ["spec 2.4"],
        "config": "tiny",
        "rows": {"random": [5, 3], "seed": 1},
    }
    return ParityCase.model_validate(values | changes)


def parity_suite(case: ParityCase, config: dict[str, Any] | None = None) -> ParitySuite:
    return ParitySuite(
        kind="parity",
        id="parity/demo",
        title="Demo",
        description="Made by a test.",
        area="demo",
        oracle=ORACLE,
        configs={"tiny": config or CONFIG},
        cases=(case,),
    )


def run(setting: Setting, target: Fake, config: dict[str, Any] | None = None, **changes: Any) -> CheckOutcome:
    case = parity_case(**changes)
    return judge(case, parity_suite(case, config), target, oracles=setting.oracles)  # type: ignore[arg-type]


def scale(name: str, factor: float) -> Change:
    return lambda made: made[name].mul_(factor)


def put(name: str, place: tuple[int, ...], value: float) -> Change:
    def change(made: dict[str, Tensor]) -> None:
        made[name][place] = value

    return change


def test_the_truth_passes_and_every_module_is_in_the_evidence(setting: Setting) -> None:
    outcome = run(setting, Fake())
    assert outcome.verdict == "pass"
    assert outcome.evidence.parity is not None
    assert tuple(m.module for m in outcome.evidence.parity.modules) == module_names(CONFIG)
    assert {m.relative for m in outcome.evidence.parity.modules} == {0.0}
    assert outcome.evidence.parity.first is None


def test_the_first_module_that_differs_is_named_with_its_place(setting: Setting) -> None:
    def change(made: dict[str, Tensor]) -> None:
        made["layers.1"] *= 2
        made["layers.0.mlp"][6] += 0.5

    outcome = run(setting, Fake(change), prefill=1)
    [problem] = outcome.problems
    assert (outcome.verdict, problem.rule, problem.got) == ("fail", "diverges", "layers.0.mlp")
    assert "row 1, token 1 (a step of its own)" in problem.message
    assert outcome.evidence.parity is not None
    assert [m.module for m in outcome.evidence.parity.modules if m.rule] == ["layers.0.mlp", "layers.1"]
    # Both errors as NumPy would give them from the definition.
    truth = true_tensors(asked_first(setting))["layers.0.mlp"]
    lie = truth.clone()
    lie[6] += 0.5
    first = outcome.evidence.parity.first
    assert first is not None
    assert first.relative == pytest.approx(float((lie - truth).norm() / truth.norm()), rel=1e-2)
    assert first.maximum == pytest.approx(float(0.5 / truth.abs().max()), rel=1e-2)


def asked_first(setting: Setting) -> ForwardRequest:
    return setting.oracle.requests[0]


@pytest.mark.parametrize(
    ("factor", "tolerance", "verdict"),
    [
        (1 + 5e-6, {}, "pass"),
        (1 + 2e-5, {}, "fail"),
        (1 + 2e-5, {"relative": 1e-4}, "pass"),
        (1 + 2e-3, {"relative": 1e-2}, "fail"),  # by the largest element
        (1 + 2e-3, {"relative": 1e-2, "maximum": 1e-2}, "pass"),
    ],
)
def test_both_tolerances_hold(
    setting: Setting, factor: float, tolerance: dict[str, float], verdict: str
) -> None:
    assert run(setting, Fake(scale("norm", factor)), tolerance=tolerance).verdict == verdict


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (put("logits", (2, 1), float("nan")), "not-finite"),
        (put("logits", (2, 1), float("inf")), "not-finite"),
        (lambda made: made.pop("logits"), "missing-tensor"),
        (lambda made: made.update(logits=made["logits"][:7].clone()), "shape"),
        (lambda made: made.update(logits=made["logits"].flatten()), "shape"),
    ],
)
def test_what_cannot_be_compared(setting: Setting, change: Change, rule: str) -> None:
    outcome = run(setting, Fake(change))
    assert [problem.rule for problem in outcome.problems] == [rule]
    assert "logits" in outcome.problems[0].message
    assert outcome.evidence.parity is not None
    assert [m.rule for m in outcome.evidence.parity.modules if m.rule] == [rule]


def test_a_missing_tensor_does_not_hide_a_divergence(setting: Setting) -> None:
    def change(made: dict[str, Tensor]) -> None:
        del made["embed_tokens"]
        made["norm"] += 1

    assert [p.rule for p in run(setting, Fake(change)).problems] == ["missing-tensor", "diverges"]


def test_a_file_that_is_no_tensor_file(setting: Setting) -> None:
    target = Fake()

    def forward(request: ForwardRequest) -> ForwardResult:
        Path(request.output).write_bytes(b"rubbish")
        return ForwardResult(path=request.output, effective={"dtype": "float32"})

    target.forward = forward  # type: ignore[method-assign]
    [problem] = run(setting, target).problems
    assert problem.rule == "missing-tensor"


def test_a_zero_tensor_is_compared_absolutely() -> None:
    zero = torch.zeros(2, 3)
    found = tensors.distance(torch.full((2, 3), 3e-6), zero)
    assert found.maximum == pytest.approx(3e-6)
    assert found.relative == pytest.approx(3e-6 * 6**0.5)
    assert tensors.distance(zero, zero) == tensors.Distance(0.0, 0.0, 0)


@pytest.mark.parametrize(
    ("options", "effective", "rules"),
    [
        ({"attention": "flex"}, {"attention": "flex", "dtype": "float32"}, []),
        ({"attention": "flex"}, {"attention": "sdpa", "dtype": "float32"}, ["wrong-backend"]),
        ({"attention": "flex"}, {"dtype": "float32"}, ["wrong-backend"]),
        ({}, {"attention": "anything", "dtype": "float32"}, []),
        ({}, {"dtype": "bfloat16"}, ["wrong-dtype"]),
    ],
)
def test_what_was_asked_for_is_what_ran(
    setting: Setting, options: dict[str, Any], effective: dict[str, str], rules: list[str]
) -> None:
    outcome = run(setting, Fake(effective=effective), **options)
    assert [problem.rule for problem in outcome.problems] == rules


def test_bfloat16_is_judged_by_the_oracles_own_error(setting: Setting) -> None:
    assert run(setting, Fake(), dtype="bfloat16").verdict == "pass"
    outcome = run(setting, Fake(scale("layers.0", 1.02)), dtype="bfloat16")
    assert [problem.got for problem in outcome.problems] == ["layers.0"]
    wide = run(setting, Fake(scale("layers.0", 1.02)), dtype="bfloat16", factor=50.0)
    assert wide.verdict == "pass"
    assert outcome.evidence.parity is not None
    limit = outcome.evidence.parity.modules[0].relative_limit
    assert 1e-4 < limit < 1e-2, "twice the rounding of bfloat16"


def test_the_largest_of_many_roundings_may_differ_more_than_their_norm(setting: Setting) -> None:
    outcome = run(setting, Fake(), dtype="bfloat16")
    assert outcome.evidence.parity is not None
    for module in outcome.evidence.parity.modules:
        # The fake rounds as the oracle does, so that these are the oracle's own distances from float32.
        assert module.relative_limit == pytest.approx(2 * (module.relative or 0.0), rel=1e-2)
        assert module.maximum_limit == pytest.approx(4 * (module.maximum or 0.0), rel=1e-2)


def test_an_oracle_whose_rounding_chooses_other_experts_decides_nothing(setting: Setting) -> None:
    config = CONFIG | {"enable_moe_block": True}
    assert run(setting, Fake(), config, dtype="bfloat16").verdict == "pass"
    plain = setting.oracle.forward

    def forward(request: ForwardRequest) -> ForwardResult:
        if request.dtype == "bfloat16":
            setting.oracle.change = put("layers.1.router", (0, 1), 0.5)
        return plain(request)

    setting.oracle.forward = forward  # type: ignore[method-assign]
    outcome = run(setting, Fake(), config, dtype="bfloat16", weights=1)
    assert outcome.verdict == "inconclusive"
    assert "layers.1.router" in outcome.reason
    setting.oracle.change = lambda made: None
    assert run(setting, Fake(), config, weights=1).verdict == "pass", "float32 has one run only"


def test_the_oracle_runs_once_per_request_and_a_checkpoint_is_written_once(setting: Setting) -> None:
    run(setting, Fake())
    run(setting, Fake(), attention="eager")
    assert len(setting.oracle.requests) == 1
    assert setting.written == [(CONFIG, 0)]
    run(setting, Fake(), prefill=2)
    assert len(setting.oracle.requests) == 2
    assert len(setting.written) == 1
    run(setting, Fake(), weights=7)
    assert setting.written == [(CONFIG, 0), (CONFIG, 7)]
    run(setting, Fake(), dtype="bfloat16")
    assert [r.dtype for r in setting.oracle.requests].count("bfloat16") == 1


def test_files_are_deleted(setting: Setting) -> None:
    target = Fake()
    run(setting, target)
    assert not Path(target.requests[0].output).exists()
    oracle_file = Path(setting.oracle.requests[0].output)
    assert oracle_file.exists()
    setting.oracles.close()
    assert not oracle_file.parent.exists()


def test_skips(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    itself = run(setting, Fake(spec=ORACLE))
    assert (itself.verdict, itself.reason) == ("skip", f"{ORACLE} is the oracle of this suite")
    parser = run(setting, Fake(capabilities=("parse",)))
    assert (parser.verdict, parser.reason) == ("skip", "fake has no capability `forward`")
    monkeypatch.setattr(
        "conformance.targets.registry.unavailable", lambda spec: "it is not installed; run `install it`"
    )
    absent = run(setting, Fake())
    assert absent.verdict == "skip"
    assert "is not installed; run `install it`" in absent.reason
    assert setting.oracle.requests == []


def test_a_target_that_raises_fails_and_an_oracle_that_raises_is_an_error(setting: Setting) -> None:
    def refuse(made: dict[str, Tensor]) -> None:
        raise EngineError("no such backend")

    [problem] = run(setting, Fake(refuse)).problems
    assert problem.rule == "raised"
    assert "no such backend" in problem.message
    setting.oracle.change = refuse
    with pytest.raises(EngineError, match=f"the oracle {ORACLE}: no such backend"):
        run(setting, Fake(), weights=3)


@pytest.mark.parametrize(
    ("change", "effective", "message"),
    [
        (put("norm", (0, 0), float("nan")), None, "norm is not finite"),
        (lambda made: made.pop("norm"), None, "gave nothing for norm"),
        (lambda made: None, {"attention": "eager", "dtype": "float32"}, "ran attention 'eager'"),
        (lambda made: None, {"experts": "grouped_mm"}, "ran experts 'grouped_mm'"),
    ],
)
def test_an_oracle_that_is_none(
    setting: Setting, change: Change, effective: dict[str, str] | None, message: str
) -> None:
    setting.oracle.change, setting.oracle.effective = change, effective
    with pytest.raises(EngineError, match=message):
        run(setting, Fake())


def test_modules_follow_the_configuration() -> None:
    dense = module_names(CONFIG)
    assert dense[0] == "embed_tokens"
    assert dense[-3:] == ("layers.1", "norm", "logits")
    assert "layers.1.self_attn.k_norm" in dense
    assert not [name for name in dense if "per_layer" in name or "experts" in name]
    shared = module_names(CONFIG | {"num_kv_shared_layers": 1})
    assert set(dense) - set(shared) == {"layers.1.self_attn.k_norm"}
    moe = set(module_names(CONFIG | {"enable_moe_block": True})) - set(dense)
    assert {name.removeprefix("layers.0.") for name in moe if name.startswith("layers.0.")} == {
        "router", "experts", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2",
        "pre_feedforward_layernorm_2",
    }  # fmt: skip
    ple = set(module_names(CONFIG | {"hidden_size_per_layer_input": 8})) - set(dense)
    assert {"per_layer_model_projection", "per_layer_projection_norm"} < ple
    assert "layers.1.post_per_layer_input_norm" in ple


@pytest.mark.parametrize(
    ("token", "words"),
    [(0, "row 0, token 0"), (4, "row 0, token 4 (a step of its own)"), (5, "row 1, token 0")],
)
def test_places(token: int, words: str) -> None:
    assert tensors.place(token, [5, 3], 3) == words


def test_rows_are_seeded_and_part_of_the_digest() -> None:
    case = parity_case()
    suite = parity_suite(case)
    rows = resolve_rows(case.rows, suite.configs[case.config])
    assert [len(row) for row in rows] == [5, 3]
    assert rows == resolve_rows(case.rows, suite.configs[case.config])
    assert rows != resolve_rows(RandomRows(random=(5, 3), seed=2), suite.configs[case.config])
    other = parity_suite(case, CONFIG | {"vocab_size": 33})
    assert case_digest(case, suite) != case_digest(case, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("config: tiny", "config: small"), "no configuration 'small'"),
        (("rows: [[1, 2]]", "rows: [[1, 32]]"), "token id 32 is outside the vocabulary of 32"),
        (("rows: [[1, 2]]", "rows: [[1], []]"), "every row a token"),
        (("rows: [[1, 2]]", "rows: [[-1]]"), "greater than or equal to 0"),
        (("vocab_size: 32", "vocab_size: many"), "needs a positive `vocab_size`"),
        (("oracle: a:b", "oracle: transformers"), "oracle"),
        (("    weights: 0", "    prefill: 0"), "prefill"),
    ],
)
def test_broken_suites(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    text = (
        "kind: parity\nid: parity/demo\ntitle: Demo\ndescription: Made by a test.\narea: demo\noracle: a:b\n"
        "configs:\n  tiny: {vocab_size: 32, num_hidden_layers: 1}\ncases:\n  - id: demo\n"
        "    title: A case of this test.\n    source: [A01]\n    config: tiny\n    rows: [[1, 2]]\n"
        "    weights: 0\n"
    )
    path = tmp_path / "parity" / "demo.yaml"
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    assert load_suite(path).suite.kind == "parity"
    path.write_text(text.replace(*change) + "\n", encoding="utf-8")
    with pytest.raises(SuiteError, match=message):
        load_suite(path)


def test_the_dashboards_rows(setting: Setting) -> None:
    view = parity_view(run(setting, Fake(scale("norm", 2.0)), prefill=2).evidence.parity)
    assert view is not None
    assert [row.error.module for row in view.rows if row.first] == ["norm"]
    assert view.differing == 1
    assert view.passes == "rows of 5 and 3 tokens, 2 at once and then one by one"
    assert ("attention", "sdpa", "sdpa") in view.settings
    assert [row.relative for row in view.rows if row.first] == ["1.00e+00"]


def test_the_bundled_suites_reach_past_three_windows() -> None:
    suites = [
        s.suite
        for s in load_suites([resources.suites_dir()])
        if isinstance(s.suite, ParitySuite) and s.suite.area == "text-model"
    ]
    assert len(suites) == 6
    for suite in suites:
        windows = {name: config["sliding_window"] for name, config in suite.configs.items()}
        lengths = {
            case.id: [len(row) for row in resolve_rows(case.rows, suite.configs[case.config])]
            for case in suite.cases
        }
        whole = [c for c in suite.cases if c.prefill is None and max(lengths[c.id]) > 3 * windows[c.config]]
        steps = [c for c in suite.cases if c.prefill and max(lengths[c.id]) > 3 * windows[c.config]]
        assert any(c.prefill is not None and c.prefill < windows[c.config] for c in steps), suite.id
        assert whole, suite.id
        assert any(len(set(lengths[c.id])) > 1 and c.prefill for c in suite.cases), suite.id
        assert {c.attention for c in suite.cases} == {None, "eager", "sdpa", "flex"}, suite.id
        assert {c.dtype for c in suite.cases} == {"float32", "bfloat16"}, suite.id
