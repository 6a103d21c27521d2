"""Results and items as rows of the history database, and back."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError
from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.orm import Session, defer

from conformance.results import Footer, Header, Result, Run, Verdict
from conformance.store import MisfitError
from conformance.store.tables import ItemRow, PromptRow, ResultRow, RunRow

_AT_ONCE = 500
"""Values in one `IN (…)`; databases limit their number."""
_LONGEST_NAMES = 2000
"""Bytes of all names of a result together; PostgreSQL keeps no more in an index."""
_EXIT_CODES = range(256)


def check_storable(run: Run) -> None:
    """Refuse what not every database could keep, so that a run is welcome in all of them or in none.

    Raises:
        MisfitError: a name is too long, or has a character that PostgreSQL does not take; or the exit code
            is none; or a number is not finite, so that the line would not come back.
    """
    header, footer = run.header, run.footer
    finished = footer.finished if footer is not None else ""
    cell = header.cell.id if header.cell is not None else ""
    named: list[tuple[str, tuple[str, ...]]] = [
        ("the run", (header.run_id, header.harness, header.commit or "", finished, cell))
    ]
    named += [
        (
            f"the result of {r.suite[:80]}::{r.case[:80]}",
            (header.run_id, r.suite, r.case, r.target, r.digest, r.kind, r.area),
        )
        for r in run.results
    ]
    for what, names in named:
        if any("\0" in name for name in names):
            raise MisfitError(f"{what} has a name with the character U+0000, which databases do not keep")
        if sum(len(name.encode()) for name in names) > _LONGEST_NAMES:
            raise MisfitError(f"{what} has names of more than {_LONGEST_NAMES} bytes together")
    if footer is not None and footer.exit_code not in _EXIT_CODES:
        raise MisfitError("the run's exit code is none: it is not between 0 and 255")
    _comes_back(header, "the run's header")
    if footer is not None:
        _comes_back(footer, "the run's last line")


def _comes_back(line: Header | Result | Footer, what: str) -> str:
    """A line as JSON, from which it can be made again."""
    text = line.model_dump_json()
    try:
        type(line).model_validate_json(text)
    except ValidationError as error:
        place = ".".join(map(str, error.errors(include_url=False)[0]["loc"]))
        raise MisfitError(
            f"{what} holds a value that JSON cannot hold ({place}), such as a number that is not finite"
        ) from None
    return text


def merge_results(session: Session, run: Run) -> tuple[int, int]:
    """Store results that are new or stand later than the stored ones; how many of each."""
    latest = {(*result.key, result.digest): (n, result) for n, result in enumerate(run.results)}
    query = select(ResultRow).where(ResultRow.run_id == run.header.run_id).options(defer(ResultRow.body))
    stored = {(*row.key, row.digest): row for row in session.scalars(query)}
    added = updated = 0
    for identity, (position, result) in latest.items():
        text = _comes_back(result, f"the result of {result.suite}::{result.case}")
        content = hashlib.sha256(text.encode()).hexdigest()
        row = stored.get(identity)
        if row is None:
            suite, case, target, digest = identity
            row = ResultRow(run_id=run.header.run_id, suite=suite, case=case, target=target, digest=digest)
            session.add(row)
            added += 1
        elif (row.position, row.content) >= (position, content):
            continue
        else:
            _remove_items(session, row.id)
            updated += 1
        body, items = _split(text)
        row.kind, row.area, row.verdict = result.kind, result.area, result.verdict
        row.position, row.content, row.body, row.current = position, content, body, False
        if items:
            session.flush()  # gives the row its id
            _add_items(session, row.id, items)
    session.flush()
    return added, updated


def _split(text: str) -> tuple[str, list[dict[str, Any]]]:
    """A result as JSON without its items, and the items."""
    body = json.loads(text)
    accuracy = body["evidence"].get("accuracy")
    if accuracy is None:
        return text, []
    items = accuracy["sheet"]["items"]
    accuracy["sheet"]["items"] = []
    return json.dumps(body, ensure_ascii=False), items


def _add_items(session: Session, result_id: int, items: list[dict[str, Any]]) -> None:
    prompts = {_digest(item["prompt"]): item["prompt"] for item in items}
    known: set[str] = set()
    for some in _portions(list(prompts)):
        known.update(session.scalars(select(PromptRow.digest).where(PromptRow.digest.in_(some))))
    # As JSON, in which every character can be stored; PostgreSQL's text has no U+0000.
    fresh = [{"digest": d, "text": json.dumps(text)} for d, text in prompts.items() if d not in known]
    if fresh:
        session.execute(insert(PromptRow), fresh)
    session.execute(
        insert(ItemRow),
        [
            {
                "result_id": result_id,
                "number": number,
                "outcome": item["outcome"],
                "prompt": _digest(item["prompt"]),
                "body": json.dumps({name: value for name, value in item.items() if name != "prompt"}),
            }
            for number, item in enumerate(items)
        ],
    )


def remove_results(session: Session, run_id: str) -> None:
    """Remove all results of a run, with their items."""
    of_run = select(ResultRow.id).where(ResultRow.run_id == run_id)
    with_items = select(ItemRow.result_id).where(ItemRow.result_id.in_(of_run)).distinct()
    for result_id in session.scalars(with_items).all():
        _remove_items(session, result_id)
    session.execute(delete(ResultRow).where(ResultRow.run_id == run_id))


def _remove_items(session: Session, result_id: int) -> None:
    """Remove a result's items, and prompts that no other item has."""
    prompts = list(session.scalars(select(ItemRow.prompt).where(ItemRow.result_id == result_id).distinct()))
    session.execute(delete(ItemRow).where(ItemRow.result_id == result_id))
    used = select(ItemRow.prompt).where(ItemRow.prompt == PromptRow.digest).exists()
    for some in _portions(prompts):
        session.execute(delete(PromptRow).where(PromptRow.digest.in_(some), ~used))


def read_result(session: Session, row: ResultRow) -> Result:
    """A stored result, with its items."""
    body = json.loads(row.body)
    if body["evidence"].get("accuracy") is None:
        return Result.model_validate_json(row.body)
    query = (
        select(ItemRow.body, PromptRow.text)
        .join(PromptRow, PromptRow.digest == ItemRow.prompt)
        .where(ItemRow.result_id == row.id)
        .order_by(ItemRow.number)
    )
    items = [{**json.loads(body), "prompt": json.loads(text)} for body, text in session.execute(query)]
    body["evidence"]["accuracy"]["sheet"]["items"] = items
    return Result.model_validate_json(json.dumps(body))


def mark_current(session: Session, run_id: str) -> None:
    """Mark the results that count in their run: of the case as planned, the last one."""
    header = Header.model_validate_json(session.get_one(RunRow, run_id).header)
    planned = {(p.suite, p.case, p.target): p.digest for p in header.manifest}
    query = select(ResultRow).where(ResultRow.run_id == run_id).options(defer(ResultRow.body))
    ordered = sorted(session.scalars(query), key=lambda row: (row.position, row.content))
    rows = [row for row in ordered if planned.get(row.key, row.digest) == row.digest]
    current = [row.id for row in {row.key: row for row in rows}.values()]
    session.execute(update(ResultRow).where(ResultRow.run_id == run_id).values(current=False))
    for some in _portions(current):
        session.execute(update(ResultRow).where(ResultRow.id.in_(some)).values(current=True))


def verdict_counts(session: Session, run_ids: Sequence[str]) -> dict[str, Counter[Verdict]]:
    """Run to verdict to number of results that count."""
    counts: dict[str, Counter[Verdict]] = {}
    for some in _portions(run_ids):
        query = (
            select(ResultRow.run_id, ResultRow.verdict, func.count())
            .where(ResultRow.run_id.in_(some), ResultRow.current)
            .group_by(ResultRow.run_id, ResultRow.verdict)
        )
        for run_id, verdict, number in session.execute(query):
            counts.setdefault(run_id, Counter())[verdict] = number
    return counts


def outcomes_of(session: Session, result_ids: Sequence[int]) -> dict[int, dict[str, int]]:
    """Result to outcome class to number of its items; results without items are left out."""
    found: dict[int, dict[str, int]] = {}
    for some in _portions(result_ids):
        query = (
            select(ItemRow.result_id, ItemRow.outcome, func.count())
            .where(ItemRow.result_id.in_(some))
            .group_by(ItemRow.result_id, ItemRow.outcome)
            .order_by(ItemRow.result_id, ItemRow.outcome)
        )
        for result_id, outcome, number in session.execute(query):
            found.setdefault(result_id, {})[outcome] = number
    return found


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _portions(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), _AT_ONCE):
        yield values[start : start + _AT_ONCE]
