"""What keeps clients from one another: places in the queue by turns, and how much each may ask for in a minute.

A client is known by the name of its key; without keys all are one.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from finetune.serving.requests import Refused

T = TypeVar("T")
MINUTE_S = 60.0


class FairQueue(Generic[T]):
    """First come, first served among a client's requests; clients take turns."""

    def __init__(self) -> None:
        self._again: deque[T] = deque()
        self._waiting: dict[str, deque[T]] = {}  # the client whose turn it is stands first

    def __len__(self) -> int:
        return len(self._again) + sum(map(len, self._waiting.values()))

    def count(self, client: str) -> int:
        """How many requests of a client wait."""
        return len(self._waiting.get(client, ()))

    def put(self, client: str, item: T) -> None:
        """Behind the client's others."""
        self._waiting.setdefault(client, deque()).append(item)

    def put_back(self, items: Iterable[T]) -> None:
        """In front of everything, in this order: what has been taken already and must begin again."""
        self._again.extendleft(reversed(list(items)))

    def first(self) -> T:
        """What `take` would take."""
        return self._again[0] if self._again else next(iter(self._waiting.values()))[0]

    def take(self) -> T:
        """The next one; its client's turn comes again after that of all others."""
        if self._again:
            return self._again.popleft()
        client, items = next(iter(self._waiting.items()))
        item = items.popleft()
        del self._waiting[client]
        if items:
            self._waiting[client] = items
        return item


class Rates:
    """What each client may use in a minute: it fills up again all the time, and never beyond a minute's worth.

    One request may be larger than what a minute allows: it is taken when nothing else was, and counts in full.
    """

    def __init__(
        self, requests_per_minute: int, tokens_per_minute: int, now: Callable[[], float] = time.monotonic
    ) -> None:
        """0: without a limit."""
        self._limits = {"requests": requests_per_minute, "tokens": tokens_per_minute}
        self._now = now
        self._used: dict[tuple[str, str], float] = {}  # by client and what
        self._seen: dict[tuple[str, str], float] = {}  # when that was right

    def use(self, client: str, what: str, amount: int) -> None:
        """Take so many requests or tokens. Raises Refused where there are too few left."""
        if not (most := self._limits[what]):
            return
        used = self._still_used(client, what, most)
        over = used - max(0, most - amount)
        if over > 0:
            raise Refused(
                429,
                f"this server gives a client {most:,} {what} a minute (serve.{what}_per_minute)",
                code="rate_limit_exceeded",
                retry_after_s=max(1, math.ceil(over / most * MINUTE_S)),
            )
        self._used[client, what] = used + amount

    def give_back(self, client: str, what: str, amount: int) -> None:
        """What was taken and not used after all."""
        if most := self._limits[what]:
            self._used[client, what] = max(0, self._still_used(client, what, most) - amount)

    def _still_used(self, client: str, what: str, most: int) -> float:
        """Of a minute's worth, what hasn't filled up again by now."""
        now, key = self._now(), (client, what)
        filled = most / MINUTE_S * (now - self._seen.get(key, now))
        self._seen[key] = now
        self._used[key] = max(0, self._used.get(key, 0) - filled)
        return self._used[key]
