"""What routes of both kinds of model do: wait for an answer as long as its client does, and stream events."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse

from finetune.serving.adapters import Loaded
from finetune.serving.requests import Finish, Refused

POLL_S = 0.05  # between looks whether a client that doesn't stream is still there
ENDED = {
    Finish.deadline: partial(Refused, 504, "this took longer than serve.timeout_s", code="timeout", retry_after_s=1),
    Finish.error: partial(Refused, 500, "this could not be computed", code="failed"),
}
"""Why an answer didn't come to its end, each time as a new exception: one that is raised again keeps all its past."""


class Piece(Protocol):
    """News of an answer."""

    @property
    def finish(self) -> Finish | None: ...


P = TypeVar("P", bound=Piece)


class Events(StreamingResponse):
    """Server-sent events. Whatever becomes of the client, what it waited for is stopped."""

    def __init__(self, events: AsyncIterator[str], headers: dict[str, str], stack: AsyncExitStack) -> None:
        """stack: closed when nobody waits any more."""
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.stack = stack

    async def __call__(self, *arguments: Any) -> None:
        """ASGI."""
        async with self.stack:
            await super().__call__(*arguments)


def client_of(request: Request) -> str:
    """Who asks, as the guard found out."""
    return str(request.state.client)


async def finished(pieces: AsyncIterator[P], request: Request) -> P:
    """The last piece. Raises Refused for an answer that didn't come to its end, and where the client has gone."""

    async def read() -> P:
        async for piece in pieces:
            last = piece
        return last

    reading = asyncio.create_task(read())
    while not (await asyncio.wait({reading}, timeout=POLL_S))[0]:
        if await request.is_disconnected():
            reading.cancel()
            raise Refused(499, "the client has gone", code="client_closed_request")
    last = reading.result()
    if last.finish in ENDED:
        raise ENDED[last.finish]()
    return last


def headers_of(loaded: Loaded, warnings: list[str]) -> dict[str, str]:
    """Who answers, and what of the request was ignored."""
    found = {"x-finetune-model": loaded.model, "x-finetune-content": loaded.content}
    if warnings:
        text = "".join(char if char.isprintable() else " " for char in "; ".join(warnings))  # a client's own words
        found["x-finetune-warning"] = text.encode("ascii", "replace").decode()[:1000].strip()
    return found


def event(data: Any) -> str:
    """One server-sent event."""
    return f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n"
