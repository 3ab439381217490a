"""The front door: routes that every server has, errors in OpenAI's shape, and the guard around all of it."""

import time
from collections.abc import Sequence
from typing import Protocol

from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from finetune.run.progress import say
from finetune.serving import machine, page, run_routes
from finetune.serving.adapters import Shelf
from finetune.serving.forms import described
from finetune.serving.guard import Guard, Rules
from finetune.serving.metrics import CONTENT_TYPE, Metrics
from finetune.serving.requests import Refused
from finetune.serving.runs import Runs


class Service(Protocol):
    """A base with its adapters, of any kind of model."""

    shelf: Shelf
    metrics: Metrics
    main_page: str
    """See `page.TITLES`."""
    leaves_a_core: bool
    """Whether its steps are so short that they must not share their cores with the requests."""

    def routes(self) -> APIRouter:
        """What this kind of model is asked by."""
        ...

    def examples(self, url: str, key: str) -> Sequence[str]:
        """What to type to use it."""
        ...

    def close(self) -> None:
        """Finish what has begun."""
        ...


class State:
    """draining: no new connection is taken, and what has begun is finished."""

    draining = False


def build(service: Service, rules: Rules, state: State, runs: Runs) -> ASGIApp:
    """The application."""
    app = FastAPI(title="finetune", docs_url=None, redoc_url=None)  # their pages load scripts from elsewhere
    began = int(time.time())
    shelf = service.shelf

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        if state.draining:
            raise Refused(503, "this server is shutting down", code="shutting_down", retry_after_s=5)
        return {"status": "ready"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        return {"object": "list", "data": [_model(name, began) for name in shelf.names()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, object]:
        return _model(name, began) | {"content": await shelf.content(name)}

    pages = (page.routes(service.main_page), run_routes.routes(runs), machine.routes(machine.Machine(runs)))
    for each in (service.routes(), *pages):
        app.include_router(each)
    _answer_errors(app, service.metrics)
    cors = CORSMiddleware(
        app,
        allow_origins=sorted(rules.origins),
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type"],
    )
    return Guard(cors, rules)


def _model(name: str, began: int) -> dict[str, object]:
    return {"id": name, "object": "model", "created": began, "owned_by": "finetune"}


def _answer_errors(app: FastAPI, metrics: Metrics) -> None:
    def answer(refused: Refused) -> Response:
        metrics.refused.labels(refused.status).inc()
        return JSONResponse(refused.body(), refused.status, refused.headers())

    @app.exception_handler(Refused)
    async def on_refused(_: Request, error: Refused) -> Response:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> Response:
        line, place = described(list(error.errors()))
        return answer(Refused(400, line, code="invalid_value", param=place))

    @app.exception_handler(AnyHTTPException)
    async def on_http(_: Request, error: HTTPException) -> Response:
        codes = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
        return answer(Refused(error.status_code, str(error.detail), code=codes.get(error.status_code, "bad_request")))

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        say(f"serve: {request.method} {request.url.path} failed ({type(error).__name__}: {error}); please report it")
        return answer(Refused(500, "unexpected error", code="internal_error"))
