"""Stored references: a sheet, and beside it the record of how it came to be what it is.

`nano-e.jsonl` has a record `nano-e.baseline.json`. A reference is replaced only together with a paired
comparison with the one before, which the record keeps; a file that the record does not know is refused. So a
threshold cannot move without a trace.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from pathlib import Path

from pydantic import Field, ValidationError

from conformance.errors import ConformanceError
from conformance.gates.decision import Decision
from conformance.gates.pairing import UNANSWERED, check_items
from conformance.gates.spec import PairedGate
from conformance.records import Record
from conformance.scoring import Sheet

AGAIN = "make it by `conformance gate rebaseline`"
_ROUNDING = 1e-9
"""Of sums of shares."""

SHORTEST_REASON = 8
"""Characters of a sentence that says why a reference was made."""


class BaselineError(ConformanceError):
    """A reference is missing, was changed by hand, or cannot be what the gate needs."""


class Entry(Record):
    """A reference, when it was new."""

    sha256: str
    """Of the file."""
    made: str
    """ISO 8601, UTC."""
    reason: str = Field(min_length=SHORTEST_REASON)
    """Why it was made, in a sentence."""
    previous: str | None = None
    """SHA-256 of the one before; None for the first."""
    comparison: Decision | None = None
    """Of the one before as reference with this one as target."""
    accepted: bool = False
    """It came to be in spite of its comparison, or of what drops add up to: `--accept-drop`."""
    dirty: bool = False
    """Sources had been changed since the sheet's commit: `--allow-dirty`."""


class Baseline(Record):
    """The history of a reference, oldest first."""

    entries: tuple[Entry, ...] = Field(min_length=1)

    def drop_since_accepted(self) -> float:
        """What the drops of all comparisons add up to, less what was gained.

        Since the first reference, or the last one that was accepted in spite of its drop.
        """
        total = 0.0
        for entry in self.entries:
            drop = entry.comparison.drop if entry.comparison is not None else 0.0
            total = 0.0 if entry.accepted else total + drop
        return total


def record_path(reference: Path) -> Path:
    """Where the record of a reference stands."""
    return reference.with_suffix(".baseline.json")


def file_sha256(path: Path) -> str:
    """Digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inside(folder: Path, name: str) -> Path:
    """The reference that a gate names.

    Raises:
        BaselineError: it is outside the folder, through a link.
    """
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise BaselineError(f"{name} leads out of {folder}; keep references beside their suite")
    return path


def read(path: Path) -> Sheet:
    """Read a reference whose record knows it.

    Raises:
        BaselineError: there is none, or it was changed without a comparison.
        SheetError: it is no sheet.
    """
    if not path.is_file():
        if record_path(path).is_file():
            raise BaselineError(
                f"{path}: there is no such reference, and its record {record_path(path).name} tells of one; "
                "put it back, or a new one could not be compared with it"
            )
        raise BaselineError(f"{path}: there is no such reference; {AGAIN}")
    entries = history(path).entries
    digest = file_sha256(path)
    if entries[-1].sha256 != digest:
        raise BaselineError(
            f"{path}: its record says sha256 {entries[-1].sha256[:12]}…, and it has {digest[:12]}…; it was "
            f"changed without a comparison with the one before: put that back, and {AGAIN}"
        )
    return Sheet.read(path)


def history(path: Path) -> Baseline:
    """Read the record of a reference.

    Raises:
        BaselineError: there is none, or it does not hold together.
    """
    record = record_path(path)
    try:
        found = Baseline.model_validate_json(record.read_bytes())
    except OSError as error:
        raise BaselineError(f"{record}: cannot be read: {error.strerror}; {AGAIN}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise BaselineError(f"{record}: {place}: {first['msg']}") from None
    before: str | None = None
    for number, entry in enumerate(found.entries):
        if entry.previous != before or (entry.comparison is None) != (before is None):
            raise BaselineError(
                f"{record}: entries.{number}: it does not follow from the one before by a comparison"
            )
        before = entry.sha256
    return found


def current(path: Path) -> Sheet | None:
    """The reference that a new one has to be compared with; None where neither it nor a record is there.

    Raises:
        BaselineError, SheetError: as `read`.
    """
    return read(path) if path.exists() or record_path(path).exists() else None


def adds_up(path: Path, decision: Decision) -> float:
    """What the drops of a reference's history add up to, with that of the new one (a share of the items)."""
    return history(path).drop_since_accepted() + decision.drop


def too_much(total: float, gate: PairedGate) -> bool:
    """Whether drops that add up to this must not pass, though each of them did."""
    return total > gate.margin - _ROUNDING


def check_sources(commit: str | None) -> None:
    """Refuse answers of sources that nobody can find again.

    Args:
        commit: Of the harness, as in a sheet's header; None: it is installed, and its version says enough.

    Raises:
        BaselineError: it has `+dirty`.
    """
    if is_dirty(commit):
        raise BaselineError(
            f"the sources were changed since their commit ({commit}), so nobody could make this reference "
            "again; commit first, or give --allow-dirty, which the record keeps"
        )


def is_dirty(commit: str | None) -> bool:
    """Whether a sheet's commit says that sources were changed since."""
    return commit is not None and commit.endswith("+dirty")


def check_reference(gate: PairedGate, sheet: Sheet) -> None:
    """Refuse a sheet that could not serve the gate as its reference.

    Raises:
        BaselineError: says what is wrong with it.
        ComparisonError: an item is there twice, or was asked several times.
    """
    check_items(sheet)
    if len(sheet.items) != gate.items:
        raise BaselineError(f"the reference has {len(sheet.items)} items and the gate declares {gate.items}")
    gone = [item.doc_id for item in sheet.items if item.outcome in UNANSWERED]
    if gone:
        raise BaselineError(
            f"{len(gone)} items of the reference have no answer ({gone[0]}, …); ask them again"
        )
    cut = sum(item.finish_reason == "length" for item in sheet.items)
    if cut > gate.max_truncated * len(sheet.items):
        raise BaselineError(
            f"{cut} answers of the reference break off, more than `max_truncated` {gate.max_truncated:g} "
            "lets pass; raise `max_new_tokens`"
        )


def store(
    path: Path, sheet: Sheet, *, reason: str, comparison: Decision | None, accepted: bool = False
) -> Entry:
    """Write a reference and its record; the one that is there is replaced.

    Args:
        path: Of the sheet.
        sheet: The new one.
        reason: Why, in a sentence.
        comparison: With the one before.
        accepted: It is stored in spite of what it lost.

    Raises:
        BaselineError: there is one, and no comparison with it; or the other way round.
    """
    before = history(path) if current(path) is not None else None
    if (before is None) != (comparison is None):
        raise BaselineError(f"{path}: a reference is replaced with a comparison, and first made without one")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    sheet.write(fresh)
    entry = Entry(
        sha256=file_sha256(fresh),
        made=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        reason=reason,
        previous=before.entries[-1].sha256 if before is not None else None,
        comparison=comparison,
        accepted=accepted,
        dirty=is_dirty(sheet.header.commit),
    )
    grown = Baseline(entries=(*(before.entries if before is not None else ()), entry))
    record = record_path(path)
    record.with_suffix(".new").write_text(grown.model_dump_json(indent=2) + "\n", encoding="utf-8")
    # A record that is ahead of its sheet is refused by `read`, as is the opposite.
    record.with_suffix(".new").replace(record)
    fresh.replace(path)
    return entry
