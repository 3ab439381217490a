"""A language model as an engine: the base loaded once, adapters put beside one another on it, checked before use."""

import hashlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from fastapi import APIRouter
from torch import Tensor, nn

from finetune import hub
from finetune.adapters import formats
from finetune.config.schema import Config, ModelConfig
from finetune.data.text.tokens import Chat
from finetune.errors import ModelError
from finetune.language import causal_lm
from finetune.language.tokenize import chat_of
from finetune.memory.device import pick_device, pick_dtype
from finetune.planning.machine import present
from finetune.run.progress import say
from finetune.serving.adapters import BaseIdentity, Shelf, Source, most_bytes
from finetune.serving.attachments import Attachments
from finetune.serving.batch import Batch, CachedBatch, RereadBatch
from finetune.serving.fairness import Rates
from finetune.serving.metrics import Metrics
from finetune.serving.requests import BASE
from finetune.serving.router import Router
from finetune.serving.streams import ENDLESS, longest_replies
from finetune.serving.text_engine import TextEngine
from finetune.serving.text_routes import Defaults, Desk, routes

T = TypeVar("T")
CHECK_PROMPTS = ("Hello", "What is the colour of the sky?", "One two three four five six seven.")
CHECK_TOKENS = 8
MOST_ADAPTERS = 8  # that stay loaded; one of rank 16 takes 80 MB on a base of 7 billion weights in 16 bit


class LanguageServer:
    """A base with its engine and adapters."""

    def __init__(
        self,
        model: ModelConfig,
        chat: Chat,
        device: torch.device,
        dtype: torch.dtype,
        *,
        vram_gib: float,
        context: int = 0,
        most_rows: int,
        most_waiting: int,
    ) -> None:
        """context: tokens of prompt and reply, 0 for what the base reads.

        Raises ModelError for a base that can't be loaded, or that has no way to write replies."""
        self.chat = chat
        self.ends = chat.stop_ids()
        loaded: Any = causal_lm.load_model(model, dtype, device, vram_gib=vram_gib)
        self.model, self.router = loaded, Router(loaded)
        self.identity = BaseIdentity(
            model.base,
            hub.content_hash(model.base),
            hashlib.sha256(chat.template.text.encode()).hexdigest(),
        )
        reads = causal_lm.most_tokens(loaded) or ENDLESS
        self.most_tokens = min(context or reads, reads)
        self.embedding_rows = int(loaded.get_input_embeddings().weight.shape[0])
        prompts = [chat.prompt_ids(text) for text in CHECK_PROMPTS]
        batch = working_batch(loaded, self.router, prompts, self.ends, device, dtype, self.most_tokens)
        self.engine = TextEngine(batch, chat.tokenizer, self.ends, most_rows=most_rows, most_waiting=most_waiting)
        self.attachments = Attachments(loaded)

    async def between_steps(self, work: Callable[[], T]) -> T:
        """See `adapters.Holder`."""
        return await self.engine.between_steps(work)

    def load_adapter(self, folder: Path, key: str) -> None:
        """See `adapters.Holder`."""
        self.router.require_routable(formats.read_peft_config(folder), str(folder))
        with torch.inference_mode(False):  # else the weights could never be used outside of it
            self.attachments.load(folder, key, then=self.router.watch)

    def drop_adapter(self, key: str) -> None:
        """See `adapters.Holder`."""
        self.attachments.drop(key)


def service(config: Config, sources: Mapping[str, Source]) -> "LanguageService":
    """The service of a recipe. Raises ModelError, DataError."""
    device = pick_device(config.hardware.device)
    dtype, limits = pick_dtype(config.trainer.precision, device), config.serve
    context = limits.context
    if machine := present(config.hardware):
        context = longest_replies(
            config.model,
            dtype,
            machine,
            most_bytes(sources.values(), MOST_ADAPTERS),
            rows=limits.batch,
            context=context,
            max_new_tokens=limits.max_new_tokens,
        )
    server = LanguageServer(
        config.model,
        chat_of(config.model, config.data),
        device,
        dtype,
        vram_gib=config.hardware.vram_gib,
        context=context,
        most_rows=config.serve.batch,
        most_waiting=config.serve.queue,
    )
    defaults = Defaults(
        max_new_tokens=config.serve.max_new_tokens,
        temperature=config.serve.temperature,
        top_p=config.serve.top_p,
        timeout_s=config.serve.timeout_s,
        most_tokens=server.most_tokens,
        most_ids=server.embedding_rows,
    )
    rates = Rates(config.serve.requests_per_minute, config.serve.tokens_per_minute)
    return LanguageService(server, sources, defaults, rates)


class LanguageService:
    """See `app.Service`."""

    main_page = "chat"
    leaves_a_core = True

    def __init__(self, server: LanguageServer, sources: Mapping[str, Source], defaults: Defaults, rates: Rates) -> None:
        self.server, self.defaults, self.rates = server, defaults, rates
        self.shelf = Shelf(sources, server, base=server.identity, most=MOST_ADAPTERS)
        self.metrics = Metrics(server.engine.stats)

    def routes(self) -> APIRouter:
        """See `app.Service`."""
        return routes(Desk(self.server.engine, self.shelf, self.server.chat, self.defaults, self.rates, self.metrics))

    def examples(self, url: str, key: str) -> Sequence[str]:
        """See `app.Service`."""
        body = shlex.quote(json.dumps({"prompt": "Who are you?", "history": []}))
        bearer = f" -H 'Authorization: Bearer {key}'" if key else ""
        client = f"openai.OpenAI(base_url={url + '/v1'!r}, api_key={key or 'none'!r})"
        messages = "[{'role': 'user', 'content': 'Who are you?'}]"
        return (
            f"curl {url}/chat -H 'Content-Type: application/json'{bearer} -d {body}",
            f"{client}.chat.completions.create(model={self.shelf.default!r}, messages={messages})",
        )

    def close(self) -> None:
        """See `app.Service`."""
        self.server.engine.close()


def working_batch(
    model: nn.Module,
    router: Router,
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    most_tokens: int = 0,
) -> Batch:
    """The fastest batch whose rows get the logits that `generate` computes for each alone, while others join and leave.

    most_tokens: of beginnings that it keeps for later prompts. Raises ModelError where none does.
    """
    noise = causal_lm.FP32_NOISE
    if dtype is not torch.float32 or hasattr(model, "hf_quantizer"):
        noise = causal_lm.HALF_NOISE
    expected = [_generated(model, ids, ends, device, dtype) for ids in prompts]
    reasons: list[str] = []
    for way in (CachedBatch, RereadBatch):
        try:
            worst = _difference(way(model, router, device, dtype), prompts, expected)
            if worst <= noise:
                if reasons:
                    say(f"serve: replies are written without a key-value cache, which is slow: {reasons[0]}")
                return way(model, router, device, dtype, most_tokens)
            reasons.append(f"logits in a batch differ by {worst:.2g} of their size from those of `generate`")
        except Exception as error:  # an architecture may fail in any way
            reasons.append(f"{type(error).__name__}: {error}")
    raise ModelError(f"this base can't write several replies at once: {'; '.join(reasons)}")


def _generated(
    model: Any, ids: Sequence[int], ends: Sequence[int], device: torch.device, dtype: torch.dtype
) -> tuple[list[int], Tensor]:
    """What `generate` writes greedily, and the logits (T, V) behind it."""
    from transformers import GenerationConfig

    settings = GenerationConfig(
        max_new_tokens=CHECK_TOKENS,
        min_new_tokens=CHECK_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        eos_token_id=list(ends),
        pad_token_id=ends[0],
    )
    ids_1L = torch.tensor([list(ids)], device=device)
    own, model.generation_config = model.generation_config, settings
    try:
        with torch.inference_mode(), torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
            found = model.generate(ids_1L, attention_mask=torch.ones_like(ids_1L), generation_config=settings)
    finally:
        model.generation_config = own
    return found.sequences[0, len(ids) :].tolist(), torch.stack([each[0].float() for each in found.logits])


@torch.inference_mode()
def _difference(batch: Batch, prompts: Sequence[Sequence[int]], expected: Sequence[tuple[list[int], Tensor]]) -> float:
    """The largest relative difference of logits while rows that are given `generate`'s tokens join and leave."""
    written = [0] * len(prompts)
    rows: list[int] = []
    worst = 0.0
    waiting = list(range(len(prompts)))
    while waiting or rows:
        if waiting:
            row = waiting.pop(0)
            found = [(row, batch.join([prompts[row]], [BASE])[0])]
            rows.append(row)
            worst = max(worst, *(_relative(logits, expected[row][1][0]) for row, logits in found))
        logits_BV = batch.step([expected[row][0][written[row]] for row in rows])
        for place, row in enumerate(rows):
            written[row] += 1
            worst = max(worst, _relative(logits_BV[place], expected[row][1][written[row]]))
        staying = [place for place, row in enumerate(rows) if written[row] < CHECK_TOKENS - 1]
        if len(staying) < len(rows):
            batch.keep(staying)
            rows = [rows[place] for place in staying]
    return worst


def _relative(one_V: Tensor, other_V: Tensor) -> float:
    return float((one_V - other_V).norm() / other_V.norm())
