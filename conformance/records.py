"""Base of what run files hold, in a module of its own so that results may name records of other modules."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Base of run-file lines, and of what stands in them."""

    # Validators are built where one is first used, as a command needs few of them.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
