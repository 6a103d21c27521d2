"""Tables of the history database. A change here is a new `VERSION`."""

from __future__ import annotations

from sqlalchemy import Boolean, ForeignKey, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from conformance.results import Verdict

VERSION = 2
"""Of the schema."""


MIGRATIONS: dict[int, tuple[str, ...]] = {
    1: (
        "ALTER TABLE conformance_runs ADD COLUMN cell TEXT",
        "ALTER TABLE conformance_version ADD COLUMN revision INTEGER NOT NULL DEFAULT 0",
    ),
}
"""A version to what makes the next one of it: statements that SQLite and PostgreSQL both know."""


class Base(DeclarativeBase):
    """Base of the tables; their names begin alike, because a team's database may hold others."""

    type_annotation_map = {str: Text(), Verdict: String(), bool: Boolean(), int: Integer()}  # noqa: RUF012


class VersionRow(Base):
    """The one row that says which schema this is. Writers on PostgreSQL lock it."""

    __tablename__ = "conformance_version"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    version: Mapped[int]
    revision: Mapped[int] = mapped_column(default=0)
    """Counts the merges that changed anything; what is made from the database can be kept until the next."""


class RunRow(Base):
    """A run, as its newest copy has it."""

    __tablename__ = "conformance_runs"

    run_id: Mapped[str] = mapped_column(primary_key=True)
    started: Mapped[str]
    """ISO 8601 in UTC with microseconds, so that texts sort as times."""
    harness: Mapped[str]
    commit: Mapped[str | None]
    finished: Mapped[str | None]
    exit_code: Mapped[int | None]
    planned: Mapped[int]
    """Number of planned results."""
    lines: Mapped[int]
    """Complete lines of the copy."""
    digest: Mapped[str]
    """SHA-256 of header and footer: which of two copies of one length is kept."""
    header: Mapped[str]
    """JSON; the headers of the file, merged."""
    footer: Mapped[str | None]
    cell: Mapped[str | None]
    """Id of the cell of the matrix that it is a run of; None outside the matrix."""


class ResultRow(Base):
    """The last result of a case, as it was then, on a target in a run."""

    __tablename__ = "conformance_results"
    __table_args__ = (
        UniqueConstraint("run_id", "suite", "case", "target", "digest"),
        Index("conformance_results_by_case", "suite", "case", "target"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey(RunRow.run_id))
    suite: Mapped[str]
    case: Mapped[str]
    target: Mapped[str]
    digest: Mapped[str]
    """Of the case."""
    kind: Mapped[str]
    area: Mapped[str]
    verdict: Mapped[Verdict]
    current: Mapped[bool]
    """It counts: it is of the case as the run planned it last."""
    position: Mapped[int]
    """Among the results of its file."""
    content: Mapped[str]
    """SHA-256 of the result."""
    body: Mapped[str]
    """JSON, without the items of accuracy evidence."""

    @property
    def key(self) -> tuple[str, str, str]:
        """Suite, case, target."""
        return (self.suite, self.case, self.target)


class PromptRow(Base):
    """A text that items were asked."""

    __tablename__ = "conformance_prompts"

    digest: Mapped[str] = mapped_column(primary_key=True)
    """SHA-256 of the text."""
    text: Mapped[str]
    """As a JSON string."""


class ItemRow(Base):
    """One item of accuracy evidence."""

    __tablename__ = "conformance_items"

    result_id: Mapped[int] = mapped_column(ForeignKey(ResultRow.id), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """Its place in the sheet."""
    outcome: Mapped[str]
    prompt: Mapped[str] = mapped_column(ForeignKey(PromptRow.digest), index=True)
    body: Mapped[str]
    """JSON, without the prompt."""
