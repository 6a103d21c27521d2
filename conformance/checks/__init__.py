"""Checks: one module per suite kind. `judge` is the only way in."""

from __future__ import annotations

from pathlib import Path

from conformance.checks import accuracy as accuracy_check
from conformance.checks import contract as contract_check
from conformance.checks import generation as generation_check
from conformance.checks import invariance as invariance_check
from conformance.checks import lora as lora_check
from conformance.checks import mask as mask_check
from conformance.checks import parity as parity_check
from conformance.checks import parser as parser_check
from conformance.checks import processor as processor_check
from conformance.checks import scoring as scoring_check
from conformance.checks import server as server_check
from conformance.checks import template as template_check
from conformance.checks.base import CheckOutcome, Search
from conformance.contract_suite import ContractCase, ContractSuite
from conformance.gates.suite import AccuracyCase, AccuracySuite
from conformance.invariance_suite import InvarianceCase, InvarianceSuite
from conformance.lora_suite import LoraCase, LoraSuite
from conformance.oracles import Oracles
from conformance.scoring_suite import ScoringCase, ScoringSuite
from conformance.suites import (
    AnySuite,
    Case,
    GenerationCase,
    GenerationSuite,
    MaskCase,
    MaskSuite,
    ParityCase,
    ParitySuite,
    ParserCase,
    ParserSuite,
    ProcessorCase,
    ProcessorSuite,
    ServerCase,
    ServerSuite,
    TemplateCase,
    TemplateSuite,
)
from conformance.targets.protocol import Target


def judge(
    case: Case,
    suite: AnySuite,
    target: Target,
    *,
    seed: int = 0,
    search: Search = "bounded",
    oracles: Oracles | None = None,
    folder: Path | None = None,
) -> CheckOutcome:
    """Judge one case on one target.

    Args:
        case: The case; its type matches the suite's kind.
        suite: The suite it stands in, for toolsets.
        target: Who is asked.
        seed: Seeds sampled chunkings and drawn answers, so that a failing run can be repeated.
        search: How much is spent on visiting every chunking; what is not searched is sampled.
        oracles: Needed for suites that run models, but for those of the kind `accuracy`.
        folder: Of the suite's file; needed for the kind `accuracy`.

    Raises:
        EngineError, WorkerDiedError, TargetTimeoutError: from the target.
    """
    if isinstance(suite, ParserSuite) and isinstance(case, ParserCase):
        return parser_check.judge(case, suite, target, seed=seed, search=search)
    if isinstance(suite, TemplateSuite) and isinstance(case, TemplateCase):
        return template_check.judge(case, suite, target)
    if isinstance(suite, ParitySuite) and isinstance(case, ParityCase):
        assert oracles is not None
        return parity_check.judge(case, suite, target, oracles)
    if isinstance(suite, MaskSuite) and isinstance(case, MaskCase):
        assert oracles is not None
        return mask_check.judge(case, suite, target, oracles)
    if isinstance(suite, ContractSuite) and isinstance(case, ContractCase):
        assert oracles is not None
        return contract_check.judge(case, suite, target, oracles)
    if isinstance(suite, ProcessorSuite) and isinstance(case, ProcessorCase):
        assert oracles is not None
        return processor_check.judge(case, suite, target, oracles)
    if isinstance(suite, ServerSuite) and isinstance(case, ServerCase):
        return server_check.judge(case, suite, target)
    if isinstance(suite, GenerationSuite) and isinstance(case, GenerationCase):
        assert oracles is not None
        return generation_check.judge(case, target, oracles)
    if isinstance(suite, InvarianceSuite) and isinstance(case, InvarianceCase):
        assert oracles is not None
        return invariance_check.judge(case, target, oracles, seed=seed)
    if isinstance(suite, LoraSuite) and isinstance(case, LoraCase):
        assert oracles is not None
        return lora_check.judge(case, suite, target, oracles)
    if isinstance(suite, AccuracySuite) and isinstance(case, AccuracyCase):
        assert folder is not None
        return accuracy_check.judge(case, target, folder)
    if isinstance(suite, ScoringSuite) and isinstance(case, ScoringCase):
        return scoring_check.judge(case, target)
    raise TypeError(f"case {case.id!r} ({type(case).__name__}) does not belong to a {suite.kind} suite")


__all__ = ["CheckOutcome", "Search", "judge"]
