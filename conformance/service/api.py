"""Queries, answered as JSON, and the one request that changes something: a run that is sent."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException

from conformance import __version__
from conformance.reporting.badges import badge
from conformance.results import Result, Verdict
from conformance.service.ingest import MEDIA_TYPE, Ingest
from conformance.service.models import (
    AccuracyList,
    CaseList,
    ChangeList,
    Health,
    Points,
    Refusal,
    ResultList,
    RunList,
    Summary,
)
from conformance.service.names import AreaName, Filter, Limit, Name, Offset, RunId, TargetName
from conformance.service.newest import Newest, areas
from conformance.store import Merged, StoredRun, StoreError
from conformance.store.history import Store

PREFIX = "/api/v1"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sources:
    """What queries are answered from."""

    store: Store
    newest: Newest
    ingest: Ingest


def _sources(request: Request) -> Sources:
    found = request.app.state.sources
    assert isinstance(found, Sources)
    return found


def _sender(
    request: Request,
    shown: Annotated[
        HTTPAuthorizationCredentials | None,
        Security(
            HTTPBearer(auto_error=False, description="The token of the service, for those who send runs.")
        ),
    ],
) -> None:
    _sources(request).ingest.check_sender(shown.credentials if shown is not None else None)


From = Annotated[Sources, Depends(_sources)]
router = APIRouter(prefix=PREFIX)


def _refusals(**words: str) -> dict[int | str, dict[str, Any]]:
    """Documentation of refusals; names are like `on_404`."""
    told = {"on_503": "The database cannot be used."} | words
    return {
        int(name.removeprefix("on_")): {"model": Refusal, "description": text}
        for name, text in sorted(told.items())
    }


_STRING = {"schema": {"type": "string"}}
_SENT: dict[int | str, dict[str, Any]] = {
    200: {"model": Merged, "description": "All of it was there already."},
    201: {"description": "Something was added or updated."},
}
_WRONG = "The query is wrong."
_NO_RUN = "There is no such run."


@router.get(
    "/health",
    responses={503: {"model": Health, "description": "The database cannot be read."}},
)
def health(sources: From, response: Response) -> Health:
    """Whether the service can answer."""
    runs = None
    try:
        runs = sources.store.size()
    except StoreError as error:
        _LOG.error("%s", error)
        response.status_code = 503
    return Health(
        status="unavailable" if runs is None else "ok",
        version=__version__,
        ingest=sources.ingest.enabled,
        runs=runs,
    )


@router.get("/runs", responses=_refusals(on_422=_WRONG))
def runs(sources: From, limit: Limit = 100, offset: Offset = 0) -> RunList:
    """The runs, newest first."""
    found = sources.store.runs(limit=limit, offset=offset)
    return RunList(total=sources.store.size(), runs=tuple(found))


@router.post(
    "/runs",
    dependencies=[Depends(_sender)],
    status_code=201,
    responses=_SENT
    | _refusals(
        on_400="The body did not come whole.",
        on_401="The token is missing or wrong.",
        on_403="The service takes no runs.",
        on_408="The body came too slowly.",
        on_409="Another run of this id is stored.",
        on_413="The run file is too large.",
        on_415="The body is of another type, or compressed.",
        on_422="The body is no run file, or holds what cannot be kept.",
    ),
    openapi_extra={
        "requestBody": {
            "required": True,
            "description": "One JSON document a line; the schema of a line is `conformance schema run-file`.",
            "content": {MEDIA_TYPE: _STRING},
        }
    },
)
async def send_run(request: Request, response: Response, sources: From) -> Merged:
    """Send a run file, as it is. A run is known by its id: sending it again changes nothing.

    A file that has grown adds what is new. A torn last line is reported in the answer, and the rest is kept.
    """
    merged = await sources.ingest.take(request)
    if not merged.changed:
        response.status_code = 200
    return merged


@router.get("/runs/{run_id}", responses=_refusals(on_404=_NO_RUN, on_422=_WRONG))
def one_run(sources: From, run_id: RunId) -> StoredRun:
    """One run, without its results."""
    return sources.store.described(run_id)


@router.get("/runs/{run_id}/results", responses=_refusals(on_404=_NO_RUN, on_422=_WRONG))
def results(
    sources: From,
    run_id: RunId,
    suite: Filter = None,
    target: Filter = None,
    area: Filter = None,
    verdict: Annotated[Verdict | None, Query()] = None,
    limit: Limit = 100,
    offset: Offset = 0,
) -> ResultList:
    """The results of a run, without their evidence."""
    found, total = sources.store.results(
        run_id, limit=limit, offset=offset, suite=suite, target=target, area=area, verdict=verdict
    )
    return ResultList(total=total, results=tuple(found))


@router.get(
    "/runs/{run_id}/result",
    responses=_refusals(on_404="There is no such run, or it has no such result.", on_422=_WRONG),
)
def result(sources: From, run_id: RunId, suite: Name, case: Name, target: Name) -> Result:
    """One result of a run, with its evidence."""
    found = sources.store.result(run_id, (suite, case, target))
    if found is None:
        raise HTTPException(404, "this run has no such result")
    return found


@router.get(
    "/runs/{run_id}/changes",
    responses=_refusals(on_404=_NO_RUN, on_422=_WRONG),
)
def changes(sources: From, run_id: RunId, since: Name) -> ChangeList:
    """Verdicts that differ from those of another run."""
    return ChangeList(
        run_id=run_id, since=since, changes=tuple(sources.store.changes(before=since, after=run_id))
    )


@router.get("/cases", responses=_refusals(on_422=_WRONG))
def cases(
    sources: From,
    suite: Filter = None,
    kind: Filter = None,
    area: Filter = None,
    limit: Limit = 100,
    offset: Offset = 0,
) -> CaseList:
    """The cases, each with its newest verdict on each target."""
    found = [
        row
        for row in sources.newest.cases()
        if suite in (None, row.suite) and kind in (None, row.kind) and area in (None, row.area)
    ]
    return CaseList(total=len(found), cases=tuple(found[offset : offset + limit]))


@router.get(
    "/history",
    responses=_refusals(on_404="There is no result of this case.", on_422=_WRONG),
)
def history(
    sources: From, suite: Name, case: Name, target: Filter = None, limit: Limit = 100, offset: Offset = 0
) -> Points:
    """A case over time, with scores where it has any. Portions begin at its newest result."""
    found, total = sources.store.points(suite, case, target, limit=limit, offset=offset)
    if not total:
        raise HTTPException(404, "there is no result of this case")
    return Points(suite=suite, case=case, total=total, points=tuple(found))


@router.get("/accuracy", responses=_refusals())
def accuracy(sources: From) -> AccuracyList:
    """The accuracy cases on their targets, each with its newest result."""
    return AccuracyList(series=tuple(v for v in sources.newest.verdicts() if v.kind == "accuracy"))


@router.get(
    "/summary",
    responses=_refusals(on_404=_NO_RUN, on_422=_WRONG),
)
def summary(sources: From, run: Filter = None) -> Summary:
    """Verdicts by target and area: of one run, or of the newest result of every case on every target."""
    found = sources.newest.verdicts() if run is None else sources.store.results(run)[0]
    return Summary(run_id=run, areas=areas(found))


_BADGE: dict[str, Any] = {
    "response_class": Response,
    "responses": {
        200: {"content": {"image/svg+xml": {"schema": {"type": "string"}}}, "description": "A picture."}
    }
    | _refusals(on_404="There is no such result.", on_422="This is no name."),
}


@router.get("/badges/{target}.svg", **_BADGE)
def target_badge(sources: From, target: TargetName) -> Response:
    """A badge of a target, of its newest results."""
    return _picture(sources, target, None)


@router.get("/badges/{target}/{area}.svg", **_BADGE)
def area_badge(sources: From, target: TargetName, area: AreaName) -> Response:
    """A badge of one area of a target, of its newest results."""
    return _picture(sources, target, area)


def _picture(sources: Sources, target: str, area: str | None) -> Response:
    counts = sources.newest.counts(target, area)
    if counts is None:
        raise HTTPException(404, "there is no result of this target and area")
    picture = badge(target if area is None else f"{target} {area}", counts)
    # Other sites are what badges are for.
    return Response(
        picture, media_type="image/svg+xml", headers={"Cross-Origin-Resource-Policy": "cross-origin"}
    )
