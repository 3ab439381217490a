"""The routes of the runs page. They read, and name runs by the listing alone."""

from typing import Annotated, Any

from fastapi import APIRouter, Query

from finetune.serving.runs import Runs


def routes(runs: Runs) -> APIRouter:
    """All of them; each runs in a thread, as it waits for the disk."""
    router = APIRouter(prefix="/api/runs")

    @router.get("")
    def all_runs() -> dict[str, Any]:
        return {"runs": runs.all()}

    @router.get("/{name}/curves")
    def curves(name: str) -> dict[str, Any]:
        return {"run": runs.summary(name), "curves": runs.curves(name)}

    @router.get("/{name}/samples")
    def samples(name: str) -> dict[str, Any]:
        return runs.samples(name)

    @router.get("/{name}/previews")
    def previews(name: str) -> dict[str, Any]:
        return {"items": runs.previews(name)}

    @router.get("/{name}/captions")
    def captions(name: str, first: Annotated[int, Query(ge=0, le=2**31)] = 0) -> dict[str, Any]:
        return runs.captions(name, first)

    return router
