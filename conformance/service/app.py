"""The application: pages, queries and ingest, behind their guard."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from conformance import __version__
from conformance.service.api import PREFIX, Sources, router
from conformance.service.guard import Guard
from conformance.service.ingest import Ingest
from conformance.service.names import addressable
from conformance.service.newest import Newest
from conformance.service.pages import Dashboard
from conformance.store import StoreError, UnknownRunError
from conformance.store.history import Store

_LOG = logging.getLogger(__name__)
_NO_PAGE = "There is no such page. The newest run is at /, any other at /runs/ID/.\n"
_NO_RUN = f"No run has been merged yet. Send one to {PREFIX}/runs, or use `conformance store merge`.\n"


def make_app(store: Store, dashboard: Dashboard, ingest: Ingest, hosts: Sequence[str]) -> ASGIApp:
    """The service as an ASGI application.

    Args:
        store: The database.
        dashboard: Its pages.
        ingest: Takes runs into it.
        hosts: Names by which the service may be called. Others are refused, so that no page of another site
            can have its visitors' browsers ask here under a name of its own.
    """
    app = api_app()
    app.state.sources = Sources(store, Newest(store), ingest)
    app.state.dashboard = dashboard
    # Plain routes, which answer HEAD too; pages are no part of the API's document.
    app.router.routes += [
        Route("/runs/{run_id}", _to_folder),
        Route("/runs/{run_id}/{path:path}", _page_of_run),
        Route("/{path:path}", _page),
    ]
    return Guard(TrustedHostMiddleware(app, allowed_hosts=list(hosts), www_redirect=False))


def api_app() -> FastAPI:
    """The API alone, with nothing behind it; it can say what it is."""
    app = FastAPI(
        title="Gemma 4 conformance",
        description="Runs, results and their history.",
        version=__version__,
        openapi_url=f"{PREFIX}/openapi.json",
        docs_url=None,  # they would load scripts from other hosts
        redoc_url=None,
        redirect_slashes=False,
    )
    app.include_router(router)
    app.add_exception_handler(RequestValidationError, _wrong_query)
    app.add_exception_handler(UnknownRunError, _unknown_run)
    app.add_exception_handler(StoreError, _unusable)
    return app


def _wrong_query(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = " ".join(str(part) for part in first["loc"])
    return JSONResponse({"detail": f"{where}: {first['msg']}"}, 422)


def _unknown_run(_: Request, error: Exception) -> Response:
    return JSONResponse({"detail": "there is no such run"}, 404)


def _unusable(_: Request, error: Exception) -> Response:
    # The message names the database, which is nobody's affair who asks from outside.
    _LOG.error("%s", error)
    return JSONResponse({"detail": "the history cannot be used; the log of the service says why"}, 503)


async def _page(request: Request) -> Response:
    return await _answer(request, None)


async def _page_of_run(request: Request) -> Response:
    run_id = request.path_params["run_id"]
    return await _answer(request, run_id) if addressable(run_id) else PlainTextResponse(_NO_PAGE, 404)


async def _to_folder(request: Request) -> Response:
    """Links on the pages are relative to a folder."""
    run_id = request.path_params["run_id"]
    if not addressable(run_id):
        return PlainTextResponse(_NO_PAGE, 404)
    return RedirectResponse(f"/runs/{run_id}/", 308)


async def _answer(request: Request, run_id: str | None) -> Response:
    dashboard: Dashboard = request.app.state.dashboard
    path = request.path_params["path"]
    try:
        found = await dashboard.find(run_id, path)
    except UnknownRunError:
        return PlainTextResponse(_NO_PAGE, 404)
    if found is None:
        return PlainTextResponse(_NO_PAGE if path or run_id else _NO_RUN, 404)
    return Response(found.content, media_type=found.media_type)
