"""One thread that draws images, one job after another; adapters are switched between jobs."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from finetune.memory.device import release_memory
from finetune.run.progress import plural, say
from finetune.serving.engine_thread import EngineThread
from finetune.serving.fairness import FairQueue
from finetune.serving.requests import Finish, Refused, Stats, settle

T = TypeVar("T")
LONGEST_RETRY_S = 600


@dataclass(frozen=True)
class ImageRequest:
    """Images to be drawn, one for each seed.

    adapter: a loaded adapter's key. width, height: pixels. client: who asks.
    """

    prompt: str
    negative: str
    adapter: str
    seeds: tuple[int, ...]
    steps: int
    guidance: float
    width: int
    height: int
    timeout_s: float
    client: str = ""


@dataclass(frozen=True)
class Drawn:
    """How far a job is. step: of `steps`; cut: the end of the prompt that the model can't read."""

    step: int
    steps: int
    images: tuple[Any, ...] = ()
    cut: str = ""
    finish: Finish | None = None


class Painter(Protocol):
    """Draws; called from one thread alone."""

    def draw(self, request: ImageRequest, on_step: Callable[[], None]) -> tuple[Sequence[Any], str]:
        """PIL images, and the end of the prompt that was cut off. What `on_step` raises ends the work."""
        ...


class ImageEngine(EngineThread):
    """Ready at once; `close` ends its thread."""

    def __init__(self, painter: Painter, *, most_waiting: int) -> None:
        """most_waiting: of each client."""
        super().__init__()
        self.painter, self.most_waiting = painter, most_waiting
        self._waiting: FairQueue[_Job] = FairQueue()
        self._running: _Job | None = None
        self._job_s = 10.0  # how long one takes, an average over the last ones
        self._thread.start()

    def submit(self, request: ImageRequest) -> "_Job":
        """A job, to be iterated over for what becomes of it. Raises Refused where too many wait."""
        job = _Job(request, asyncio.get_running_loop())
        with self._changed:
            self._refuse_if_closing()
            own = self._waiting.count(request.client)
            if own + (self._running is not None) > self.most_waiting:
                seconds = min(LONGEST_RETRY_S, max(1, math.ceil((len(self._waiting) + 1) * self._job_s)))
                raise Refused(429, f"waiting already: {plural(own, 'job')}", code="queue_full", retry_after_s=seconds)
            self._waiting.put(request.client, job)
            self._changed.notify()
        return job

    def stats(self) -> Stats:
        """Jobs; no tokens are read or written."""
        return Stats(int(self._running is not None), len(self._waiting), 0, 0)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._work or self._closing):
                    self._changed.wait()
                if self._closing and not (self._waiting or self._work):
                    return
                work = list(self._work)
                self._work.clear()
                self._running = self._waiting.take() if self._waiting else None
            for call, done in work:
                settle(call, done)
            if job := self._running:
                last = self._draw(job)
                self._running = None  # before anybody hears that it has ended
                job.give(last)

    def _draw(self, job: "_Job") -> Drawn:
        """What the job's client is told last."""
        began = time.monotonic()
        try:
            job.require_wanted()
            images, cut = self.painter.draw(job.request, job.after_step)
        except _Stopped as stopped:
            last = Drawn(job.step, job.request.steps, finish=stopped.finish)
        except Exception as error:
            say(f"serve: a job failed ({type(error).__name__}: {error})")
            last = Drawn(job.step, job.request.steps, finish=Finish.error)
        else:
            self._job_s += 0.3 * (time.monotonic() - began - self._job_s)
            return Drawn(job.request.steps, job.request.steps, tuple(images), cut, Finish.stop)
        if torch.cuda.is_available():
            release_memory()
        return last


class _Stopped(BaseException):
    """No Exception: nobody on the way may take it for a failure of the model."""

    def __init__(self, finish: Finish) -> None:
        super().__init__(finish.name)
        self.finish = finish


class _Job:
    """One request under way; see `requests.Reply`."""

    def __init__(self, request: ImageRequest, loop: asyncio.AbstractEventLoop) -> None:
        self.request = request
        self.step = 0
        self._deadline = time.monotonic() + request.timeout_s
        self._loop, self._news = loop, asyncio.Queue[Drawn]()
        self._cancelled = False

    async def __aiter__(self) -> AsyncIterator[Drawn]:
        """What becomes of it, until `finish` is set."""
        while True:
            news = await self._news.get()
            yield news
            if news.finish:
                return

    def cancel(self) -> None:
        """Stop it at its next step."""
        self._cancelled = True

    def require_wanted(self) -> None:
        """Raises _Stopped where nobody waits any more, or time is over."""
        if self._cancelled:
            raise _Stopped(Finish.error)
        if time.monotonic() > self._deadline:
            raise _Stopped(Finish.deadline)

    def after_step(self) -> None:
        """One more denoising step is done."""
        self.require_wanted()
        self.step += 1
        self.give(Drawn(min(self.step, self.request.steps), self.request.steps))

    def give(self, news: Drawn) -> None:
        """Hand news to the event loop."""
        try:
            self._loop.call_soon_threadsafe(self._news.put_nowait, news)
        except RuntimeError:  # the loop has ended, and with it whoever waited
            self._cancelled = True
