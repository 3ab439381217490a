"""What the front door and the engines say to one another, and how a request is refused."""

from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
BASE = ""
"""The key of no adapter."""


class Finish(Enum):
    """Why a reply ended, as OpenAI calls it; the last two as it has no word for them."""

    stop = "stop"
    length = "length"
    deadline = "deadline"
    error = "error"


@dataclass(frozen=True)
class TextRequest:
    """A reply to be written.

    ids: of the prompt. adapter: a loaded adapter's key, `BASE` for none. temperature: 0 always takes the likeliest
    token. top_k: draw from so many likeliest tokens, 0 from all. top_p: from the likeliest that together have this
    probability. stops: texts before which the reply ends. timeout_s: seconds from now. client: who asks.
    """

    ids: tuple[int, ...]
    adapter: str
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stops: tuple[str, ...]
    timeout_s: float
    client: str = ""


@dataclass(frozen=True)
class Delta:
    """A piece of a reply, perhaps empty. tokens: written so far. finish: None until the last piece."""

    text: str
    tokens: int
    finish: Finish | None = None


@dataclass(frozen=True)
class Stats:
    """running, waiting: requests now. The others count since the start: tokens read of prompts, and written."""

    running: int
    waiting: int
    prompt_tokens: int
    written_tokens: int


class Reply(Protocol):
    """A reply under way. written: tokens so far."""

    written: int

    def __aiter__(self) -> AsyncIterator[Delta]: ...

    def cancel(self) -> None:
        """Stop it before its next token. May be called at any time, and more than once."""
        ...


class TextEngine(Protocol):
    """Writes many replies at once. All but `close` is called from the event loop."""

    def submit(self, request: TextRequest) -> Reply:
        """Raises Refused where too many wait."""
        ...

    async def between_steps(self, work: Callable[[], T]) -> T:
        """What `work` returns, such as the loading of an adapter; the model is not used meanwhile."""
        ...

    def stats(self) -> Stats: ...

    def close(self) -> None:
        """Finish what has begun and end. Later requests are refused."""
        ...


def settle(call: Callable[[], Any], done: "Future[Any]") -> None:
    """Have a future end as the call does."""
    try:
        done.set_result(call())
    except BaseException as error:
        done.set_exception(error)


class Refused(Exception):
    """A request that isn't answered. status: of HTTP. code, param: as OpenAI's errors have them."""

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        message = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in message)  # a client's own words
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """OpenAI's shape of an error."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """When to try again, where that may help."""
        if self.retry_after_s is None:
            return {"x-should-retry": "false"}
        return {"Retry-After": str(self.retry_after_s), "x-should-retry": "true"}
