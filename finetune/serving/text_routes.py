"""The routes of a language model: OpenAI's, and `/chat` with `/stream_chat`."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError

from finetune.data.text.template import SKIP
from finetune.data.text.tokens import Chat
from finetune.errors import DataError
from finetune.serving import forms
from finetune.serving.adapters import Loaded, Shelf
from finetune.serving.fairness import Rates
from finetune.serving.http import ENDED, Events, client_of, event, finished, headers_of
from finetune.serving.metrics import Metrics
from finetune.serving.requests import Delta, Finish, Refused, Reply, TextEngine, TextRequest


@dataclass(frozen=True)
class Defaults:
    """What holds where a request says nothing, and what it may not exceed. most_tokens: of prompt and reply."""

    max_new_tokens: int
    temperature: float
    top_p: float
    timeout_s: float
    most_tokens: int
    most_ids: int


@dataclass
class Prepared:
    """A reply that has begun. stack: to be closed when nobody waits for it any more."""

    loaded: Loaded
    reply: AsyncIterator[Delta]
    prompt_tokens: int
    warnings: list[str]
    stack: AsyncExitStack

    def headers(self) -> dict[str, str]:
        """Who replies, and what of the request was ignored."""
        return headers_of(self.loaded, self.warnings)


class Desk:
    """Turns requests into replies under way."""

    def __init__(
        self, engine: TextEngine, shelf: Shelf, chat: Chat, defaults: Defaults, rates: Rates, metrics: Metrics
    ) -> None:
        self.engine, self.shelf, self.chat, self.defaults, self.metrics = engine, shelf, chat, defaults, metrics
        self.rates = rates
        # One at a time: rendering a template limits the memory of the whole process meanwhile.
        self._prompts = ThreadPoolExecutor(1, "prompts")

    async def ids(self, make: Callable[[], list[int]]) -> list[int]:
        """The ids of a prompt. Raises Refused where the template or the tokenizer refuses it."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._prompts, make)
        except DataError as error:
            reason = str(error).removesuffix(f"; correct the row, {SKIP}")
            raise Refused(400, reason, code="invalid_prompt") from error

    async def begin(
        self, client: str, make_ids: Callable[[], list[int]], form: forms.Sampling, most: int | None, ignored: list[str]
    ) -> Prepared:
        """A reply that is being written. most: tokens, as asked for. Raises Refused."""
        self.rates.use(client, "requests", 1)
        form.require_one()
        stops, ids = form.stops(), await self.ids(make_ids)
        most, warnings = self._limited(ids, most)
        if ignored:
            warnings.insert(0, f"ignored: {', '.join(ignored)}")
        self.rates.use(client, "tokens", len(ids) + most)
        reply: Reply | None = None
        async with AsyncExitStack() as stack:
            stack.callback(lambda: self.rates.give_back(client, "tokens", most - (reply.written if reply else 0)))
            loaded = await stack.enter_async_context(self.shelf.using(form.model or self.shelf.default))
            defaults = self.defaults
            reply = self.engine.submit(
                TextRequest(
                    ids=tuple(ids),
                    adapter=loaded.key,
                    max_new_tokens=most,
                    temperature=defaults.temperature if form.temperature is None else form.temperature,
                    top_p=defaults.top_p if form.top_p is None else form.top_p,
                    top_k=max(0, form.top_k or 0),
                    seed=secrets.randbits(62) if form.seed is None else form.seed,
                    stops=stops,
                    timeout_s=defaults.timeout_s,
                    client=client,
                )
            )
            stack.callback(reply.cancel)
            return Prepared(loaded, self.metrics.timed(reply), len(ids), warnings, stack.pop_all())
        raise AssertionError("unreachable")

    def _limited(self, ids: list[int], most: int | None) -> tuple[int, list[str]]:
        """How many tokens may be written, and a warning where that is less than was asked for."""
        room = self.defaults.most_tokens - len(ids)
        if room < 1:
            raise Refused(
                400,
                f"the prompt has {len(ids)} tokens, and this model reads {self.defaults.most_tokens} with the reply",
                code="context_length_exceeded",
                param="messages",
            )
        if max(ids) >= self.defaults.most_ids or min(ids) < 0:
            raise Refused(400, "the prompt has a token that this model doesn't know", code="invalid_prompt")
        allowed = min(self.defaults.max_new_tokens, room)
        if most is None or most <= allowed:
            return most or allowed, []
        return allowed, [f"at most {allowed} tokens are written, not {most}"]


async def whole(prepared: Prepared, request: Request) -> tuple[str, Delta]:
    """A reply's text and its last piece. Raises Refused for one that didn't come to its end."""
    text: list[str] = []

    async def pieces() -> AsyncIterator[Delta]:
        async for delta in prepared.reply:
            text.append(delta.text)
            yield delta

    async with prepared.stack:
        last = await finished(pieces(), request)
    return "".join(text), last


def usage(prompt_tokens: int, written: int) -> dict[str, int]:
    """OpenAI's counts."""
    return {"prompt_tokens": prompt_tokens, "completion_tokens": written, "total_tokens": prompt_tokens + written}


def routes(desk: Desk) -> APIRouter:
    """All of them."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(form: forms.ChatCompletion, request: Request) -> Response:
        messages = [turn.message(index) for index, turn in enumerate(form.messages)]
        most = form.max_completion_tokens or form.max_tokens
        prepared = await desk.begin(
            client_of(request), lambda: desk.chat.answer_ids(messages, "messages"), form, most, form.ignored()
        )
        return await _openai(prepared, form, request, chat=True)

    @router.post("/v1/completions")
    async def completions(form: forms.Completion, request: Request) -> Response:
        prepared = await desk.begin(
            client_of(request), lambda: _prompt_ids(desk.chat, form.prompt), form, form.max_tokens, form.ignored()
        )
        return await _openai(prepared, form, request, chat=False)

    @router.post("/chat")
    async def chat(form: forms.Chat, request: Request) -> Response:
        prepared = await _begin_chat(desk, form, request)
        text, last = await whole(prepared, request)
        return JSONResponse(_chat_reply(form, prepared, text, last), headers=prepared.headers())

    @router.get("/stream_chat")
    async def stream_chat(
        request: Request,
        prompt: str,
        history: Annotated[str, Query(description="a list of [question, answer] pairs as JSON")] = "[]",
        model: str | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Response:
        try:
            form = forms.Chat(
                prompt=prompt,
                history=json.loads(history),
                model=model,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
            )
        except (ValueError, RecursionError) as error:
            line, place = forms.described(error.errors()) if isinstance(error, ValidationError) else ("", "history")
            raise Refused(400, line or "history is not JSON", code="invalid_value", param=place) from error
        prepared = await _begin_chat(desk, form, request)

        async def events() -> AsyncIterator[str]:
            text = ""
            async for delta in prepared.reply:
                text += delta.text
                if delta.finish in ENDED:
                    yield event(ENDED[delta.finish]().body())
                elif delta.finish:
                    yield event({"delta": delta.text, "finished": True} | _chat_reply(form, prepared, text, delta))
                else:
                    yield event({"delta": delta.text, "finished": False})
            yield event("[DONE]")

        return Events(events(), prepared.headers(), prepared.stack)

    return router


async def _begin_chat(desk: Desk, form: forms.Chat, request: Request) -> Prepared:
    make_ids = partial(desk.chat.answer_ids, form.messages(), "prompt")
    return await desk.begin(client_of(request), make_ids, form.sampling(), form.max_new_tokens, form.ignored())


def _chat_reply(form: forms.Chat, prepared: Prepared, text: str, last: Delta) -> dict[str, Any]:
    assert last.finish is not None
    return {
        "response": text,
        "history": [*form.history, (form.prompt, text)],
        "model": prepared.loaded.model,
        "content": prepared.loaded.content,
        "finish_reason": last.finish.value,
        "usage": usage(prepared.prompt_tokens, last.tokens),
    }


async def _openai(prepared: Prepared, form: forms.Sampling, request: Request, *, chat: bool) -> Response:
    """OpenAI's answer, streamed or not. chat: of chat completions, else of completions."""
    kind, prefix = ("chat.completion", "chatcmpl") if chat else ("text_completion", "cmpl")
    head = {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": prepared.loaded.model,
        "system_fingerprint": prepared.loaded.content,
    }
    if form.stream:
        head["object"] = f"{kind}.chunk" if chat else kind
        with_usage = form.stream_options is not None and form.stream_options.include_usage
        chunks = _chunks(prepared, head, with_usage=with_usage, chat=chat)
        return Events(chunks, prepared.headers(), prepared.stack)
    text, last = await whole(prepared, request)
    assert last.finish is not None
    said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    choice = {"index": 0, **said, "logprobs": None, "finish_reason": last.finish.value}
    answer = head | {"choices": [choice], "usage": usage(prepared.prompt_tokens, last.tokens)}
    return JSONResponse(answer, headers=prepared.headers())


async def _chunks(prepared: Prepared, head: dict[str, Any], *, with_usage: bool, chat: bool) -> AsyncIterator[str]:
    def chunk(said: dict[str, Any], finish: Finish | None = None) -> str:
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish.value if finish else None}
        return event(head | {"choices": [choice]} | ({"usage": None} if with_usage else {}))

    if chat:
        yield chunk({"delta": {"role": "assistant", "content": ""}})
    async for delta in prepared.reply:
        if delta.finish in ENDED:
            yield event(ENDED[delta.finish]().body())
            break
        if delta.text:
            yield chunk({"delta": {"content": delta.text}} if chat else {"text": delta.text})
        if delta.finish:
            yield chunk({"delta": {}} if chat else {"text": ""}, delta.finish)
    if with_usage:
        yield event(head | {"choices": [], "usage": usage(prepared.prompt_tokens, delta.tokens)})
    yield event("[DONE]")


def _prompt_ids(chat: Chat, prompt: str | list[str] | list[int]) -> list[int]:
    """Raises Refused for several prompts, and none."""
    if isinstance(prompt, str):
        return chat.text_ids(prompt, "prompt")
    if not prompt or (isinstance(prompt[0], str) and len(prompt) > 1):
        raise Refused(400, "prompt takes one text, or the ids of one", code="invalid_value", param="prompt")
    first = prompt[0]
    return chat.text_ids(first, "prompt") if isinstance(first, str) else [int(token) for token in prompt]
