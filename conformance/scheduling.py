"""How suite items are spread over pytest-xdist workers."""

from __future__ import annotations

from xdist.scheduler import LoadGroupScheduling  # type: ignore[import-untyped]

from conformance import runner
from conformance.recording import NODE_ID


class TargetScheduling(LoadGroupScheduling):  # type: ignore[misc]  # xdist has no types
    """All cases of an engine form one group, so that it starts once.

    Targets that run in process cost nothing to start: their cases are spread freely, as ordinary
    tests are. Groups come from node ids rather than from marks, because marks change the ids, and
    then `--lf` no longer finds the failures of a run without workers.
    """

    def _split_scope(self, nodeid: str) -> str:
        match = NODE_ID.match(nodeid)
        if match is None or runner.in_process(match["target"]):
            return str(super()._split_scope(nodeid))
        return match["target"]
