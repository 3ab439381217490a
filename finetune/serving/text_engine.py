"""One thread that writes all replies: requests join and leave its batch between steps.

Nothing in it waits for a client. A step that fails ends no reply but the one that makes it fail: rows are ids and
random numbers, so the others are read again, in halves of the batch, until the row that can't be answered is alone.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from finetune.errors import is_out_of_memory
from finetune.language.generate import random_stream
from finetune.memory.device import release_memory
from finetune.run.progress import plural, say
from finetune.serving.batch import Batch
from finetune.serving.engine_thread import EngineThread
from finetune.serving.fairness import FairQueue
from finetune.serving.requests import Delta, Finish, Refused, Stats, TextRequest, settle
from finetune.serving.sampling import Sampler, draw
from finetune.serving.text_stream import TextStream

T = TypeVar("T")
LONGEST_RETRY_S = 60
JOIN_TOKENS = 2048  # of prompts that are read before the others take their next step


class TextEngine(EngineThread):
    """See `requests.TextEngine`. Ready at once; `close` ends its thread."""

    def __init__(self, batch: Batch, tokenizer: Any, ends: Sequence[int], *, most_rows: int, most_waiting: int) -> None:
        """ends: ids that end a reply. most_rows: replies that are written at once. most_waiting: of each client."""
        super().__init__()
        self.batch, self.tokenizer, self.ends = batch, tokenizer, frozenset(ends)
        self.most_rows, self.most_waiting = most_rows, most_waiting
        self.limit = most_rows  # lower after a failed step, for good where memory was short
        self._memory_is_short = False
        self._waiting: FairQueue[_Row] = FairQueue()
        self._rows: list[_Row] = []
        self._joining: list[_Row] = []  # neither waiting nor among the rows
        self._prompt_tokens = self._written_tokens = 0
        self._reply_s = 1.0  # how long one takes, an average over the last ones
        self._thread.start()

    def submit(self, request: TextRequest) -> "_Row":
        """See `requests.TextEngine`."""
        row = _Row(request, self.tokenizer, asyncio.get_running_loop())
        with self._changed:
            self._refuse_if_closing()
            running = self._count_running()
            own = self._waiting.count(request.client)
            if own + running >= self.most_waiting + max(self.limit, running):
                rounds = (len(self._waiting) + running) / self.limit
                seconds = min(LONGEST_RETRY_S, max(1, math.ceil(rounds * self._reply_s)))
                waiting = f"waiting already: {plural(own, 'request')}"
                raise Refused(429, waiting, code="queue_full", retry_after_s=seconds)
            self._waiting.put(request.client, row)
            self._changed.notify()
        return row

    def stats(self) -> Stats:
        """See `requests.TextEngine`."""
        return Stats(self._count_running(), len(self._waiting), self._prompt_tokens, self._written_tokens)

    def _count_running(self) -> int:
        """Without the replies that have ended: who has been told so may ask again before their rows are dropped."""
        return sum(row.finish is None for row in [*self._rows, *self._joining])

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._rows or self._work or self._closing):
                    self._changed.wait()
                if self._closing and not (self._waiting or self._rows or self._work):
                    return
                work = list(self._work)
                self._work.clear()
            for call, done in work:
                settle(call, done)
            try:
                self._leave()
                self._join()
                self._leave()
                if self._rows:
                    self._take(self._rows, self.batch.step([row.ids[-1] for row in self._rows]))
            except Exception as error:
                self._recover(error)

    def _join(self) -> None:
        """Read the prompts of rows that have a place now; long ones leave others for the next step."""
        with self._changed:
            found: list[_Row] = []
            self._joining = found
            while self._waiting and len(self._rows) + len(found) < self.limit:
                row = self._waiting.first()
                longest = max([len(row.ids), *(len(other.ids) for other in found)])
                if found and longest * (len(found) + 1) > JOIN_TOKENS:
                    break
                self._waiting.take()
                if not row.ended_early():
                    found.append(row)
        if found:
            self._take(found, self.batch.join([row.ids for row in found], [row.adapter for row in found]))
            self._rows, self._joining = [*self._rows, *found], []

    def _take(self, rows: "Sequence[_Row]", logits_BV: Tensor) -> None:
        """Draw the next token of each and tell who waits for it."""
        tokens = draw(logits_BV, [row.sampler for row in rows])
        self._prompt_tokens += sum(len(row.ids) for row in rows if not row.written)
        self._written_tokens += len(rows)  # before anybody can see them
        for row, token in zip(rows, tokens, strict=True):
            row.take(token, self.ends)

    def _leave(self) -> None:
        """Drop rows that are done, whose client has gone, or whose time is over."""
        staying = [index for index, row in enumerate(self._rows) if not row.ended_early()]
        if len(staying) == len(self._rows):
            return
        for row in self._rows:
            if row.finish in (Finish.stop, Finish.length):
                self._reply_s += 0.1 * (time.monotonic() - row.began - self._reply_s)
                if not self._memory_is_short:
                    self.limit = min(self.most_rows, self.limit + 1)
        self.batch.keep(staying)
        self._rows = [self._rows[index] for index in staying]

    def _recover(self, error: Exception) -> None:
        """Begin again with fewer rows at once; a row that fails alone is the one that can't be answered."""
        rows = [*self._rows, *self._joining]
        say(f"serve: a step of {plural(len(rows), 'request')} failed ({type(error).__name__}: {error})")
        error.__traceback__ = None  # it holds the tensors of every frame it passed
        self.batch.keep([])
        self._rows, self._joining = [], []
        if is_out_of_memory(error):
            self.batch.forget()
            self._memory_is_short |= len(rows) > 1
        release_memory()
        if len(rows) > 1:
            self.limit = len(rows) // 2
            with self._changed:
                self._waiting.put_back(rows)
            return
        for row in rows:
            row.give("", Finish.error)


class _Row:
    """One reply: what it has read and written, and who waits for it."""

    def __init__(self, request: TextRequest, tokenizer: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.ids = list(request.ids)
        self.adapter = request.adapter
        random = random_stream(request.ids, request.seed) if request.temperature else None
        self.sampler = Sampler(request.temperature, request.top_p, request.top_k, random)
        self.began = time.monotonic()
        self.deadline = self.began + request.timeout_s
        self.most = request.max_new_tokens
        self.written = 0
        self.finish: Finish | None = None
        self._text = TextStream(tokenizer, request.stops)
        self._loop, self._deltas = loop, asyncio.Queue[Delta]()
        self._cancelled = False

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """See `Reply`."""
        while True:
            delta = await self._deltas.get()
            yield delta
            if delta.finish:
                return

    def cancel(self) -> None:
        """See `Reply`."""
        self._cancelled = True

    def take(self, token: int, ends: frozenset[int]) -> None:
        """The next token of the reply."""
        self.ids.append(token)
        self.written += 1
        if token in ends:
            self.give(self._text.end(), Finish.stop)
            return
        text = self._text.push(token)
        if self._text.stopped:
            self.give(text, Finish.stop)
        elif self.written >= self.most:
            self.give(text + self._text.end(), Finish.length)
        else:
            self.give(text)

    def give(self, text: str, finish: Finish | None = None) -> None:
        """Hand a piece to the event loop; nothing where there is nothing to say."""
        self.finish = finish
        if not (text or finish):
            return
        try:
            self._loop.call_soon_threadsafe(self._deltas.put_nowait, Delta(text, self.written, finish))
        except RuntimeError:  # the loop has ended, and with it whoever waited
            self._cancelled = True

    def ended_early(self) -> bool:
        """Whether nothing is to be written any more; tells whoever waits where time is over."""
        if not self.finish and not self._cancelled and time.monotonic() > self.deadline:
            self.give(self._text.end(), Finish.deadline)
        return self._cancelled or self.finish is not None
