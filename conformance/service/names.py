"""What names look like in the addresses of the service, and in its queries.

Names come from run files, which anyone may have written. In a path only these are taken; none of them is
ever joined to the path of a file.
"""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import Path, Query

RUN_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
"""Of a run in a path. Ids that the harness draws are such; a run with another id cannot be sent."""
_BADGE = r"^[A-Za-z0-9][A-Za-z0-9._@:+-]{0,99}$"
_TEXT = r"^[^\x00]*$"

RunId = Annotated[str, Path(pattern=RUN_ID, description="Id of a run.")]
TargetName = Annotated[str, Path(pattern=_BADGE, description="Spec of a target, such as `vllm@0.32.0`.")]
AreaName = Annotated[str, Path(pattern=_BADGE, description="Area of suites, such as `parser`.")]

Name = Annotated[str, Query(min_length=1, max_length=1000, pattern=_TEXT)]
Filter = Annotated[str | None, Query(min_length=1, max_length=1000, pattern=_TEXT)]
Limit = Annotated[int, Query(ge=1, le=1000, description="At most so many.")]
Offset = Annotated[int, Query(ge=0, le=10_000_000, description="Leave out so many first.")]


def addressable(run_id: str) -> bool:
    """Whether a run can be named in a path."""
    return re.fullmatch(RUN_ID, run_id) is not None
