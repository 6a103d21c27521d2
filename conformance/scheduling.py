"""How suite items are spread over pytest-xdist workers."""

from __future__ import annotations

from pathlib import Path

from xdist.scheduler import LoadGroupScheduling  # type: ignore[import-untyped]

from conformance import runner
from conformance.invariance_suite import InvarianceCase
from conformance.recording import NODE_ID, planned_item
from conformance.suites import ParitySuite


class TargetScheduling(LoadGroupScheduling):  # type: ignore[misc]  # xdist has no types
    """All cases of an engine form one group, so that it starts once.

    Targets that run in process cost nothing to start: their cases are spread freely, as ordinary tests are,
    but for those that are compared with an oracle, or with a baseline. These form groups of their own,
    where the oracle or the baseline runs once and what it computed is kept. What the same engine is asked
    as a target is another group: the two would be the longest, one behind the other, and a second start
    costs less. An engine that is compared stays in its own group: its start costs more than the oracle's.
    Groups come from node ids rather than from marks, because marks change the ids, and then `--lf` no
    longer finds the failures of a run without workers.
    """

    def _split_scope(self, nodeid: str) -> str:
        match = NODE_ID.match(nodeid)
        if match is None:
            return str(super()._split_scope(nodeid))
        if not runner.in_process(match["target"]):
            return match["target"]
        return self._shared(nodeid) or str(super()._split_scope(nodeid))

    def _shared(self, nodeid: str) -> str:
        """The oracle of a case, or the model whose answers are its baseline; empty if it has neither."""
        item = planned_item(Path(self.config.rootpath), nodeid)
        if item is None:
            return ""
        suite, case = item.loaded.suite.suite, item.loaded.case
        if isinstance(suite, ParitySuite):
            return f"oracle {suite.oracle}"
        return f"invariance {case.model}" if isinstance(case, InvarianceCase) else ""
