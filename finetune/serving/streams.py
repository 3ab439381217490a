"""How long replies may get so that all of them fit a GPU beside the base and its adapters, before anything is loaded.

As for a training, the model's own code runs on tensors that have nothing in them; see `planning.tracer`.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from finetune.config.schema import ModelConfig, Quantize
from finetune.errors import ConfigError, ModelError
from finetune.language import causal_lm, meta
from finetune.memory import block_offload
from finetune.planning import meta as planning_meta
from finetune.planning.candidates import parts
from finetune.planning.machine import GIB, Machine
from finetune.planning.tracer import Tracer
from finetune.run.progress import say
from finetune.serving.cache import join, new_cache
from finetune.serving.prefixes import MOST_TOKENS
from finetune.serving.sampling import SCORES_BYTES

ENDLESS = 2**31  # tokens, of a base that names no limit
LEAST_PROMPT = 64  # tokens beside a reply of `serve.max_new_tokens`: a template, and a short question


def longest_replies(
    model: ModelConfig,
    dtype: torch.dtype,
    machine: Machine,
    adapter_bytes: float,
    *,
    rows: int,
    context: int,
    max_new_tokens: int,
) -> int:
    """Tokens of a reply and its prompt of which so many rows fit the machine.

    adapter_bytes: of all that are loaded at once. context: as `serve.context`; 0 takes what the base reads, or what
    fits, and then says so. Raises ConfigError where less fits than is asked for, or than a reply of `max_new_tokens`
    needs. A base that can't be planned gets what was asked for, and that is said.
    """
    try:
        base = _Base(model, dtype, machine, adapter_bytes)
        gib = cache(base.gib)
        wanted = min(context or base.most_tokens, base.most_tokens)
        gib(rows, wanted)
    except ModelError as error:  # one that can't be had at all is named again when it is loaded
        say(f"serve: {error}")
        return context
    least = wanted if context else min(wanted, max_new_tokens + LEAST_PROMPT)
    fitting = _largest(wanted, least, machine.vram_gib, lambda tokens: gib(rows, tokens))
    if fitting == wanted:
        return wanted
    where = f"{machine.name} has {machine.vram_gib:.1f} GiB"
    if fitting:
        say(
            f"serve: replies of {fitting:,} tokens, prompts included, fit with serve.batch={rows} ({where}); this base "
            f"reads {wanted:,}: for longer ones lower serve.batch"
        )
        return fitting
    need = f"replies of {least:,} tokens take {gib(rows, least):.1f} GiB with serve.batch={rows}, and {where}"
    if rows_fitting := _largest(rows, 1, machine.vram_gib, lambda fewer: gib(fewer, least)):
        raise ConfigError(f"{need}; try serve.batch={rows_fitting}")
    smaller = "model.quantize=nf4" if model.quantize is not Quantize.nf4 else "a smaller base"
    raise ConfigError(f"{need}; one alone doesn't fit either; try {smaller}")


def _largest(wanted: int, least: int, budget_gib: float, gib: Callable[[int], float]) -> int:
    """A size from `least` to `wanted` that fits, near the largest; 0 if none does.

    What is taken is a convex function of the size, so between one that fits and one that doesn't the chord is above it.
    """
    size, above, over_gib = wanted, 0, 0.0
    while (taken_gib := gib(size)) > budget_gib:
        if size == least:
            return 0
        size, above, over_gib = max(least, size // 2), size, taken_gib
    if above:
        size += int((above - size) * (budget_gib - taken_gib) / (over_gib - taken_gib))
    return size


class _Base:
    """A base without weights, which replies are written with."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype, machine: Machine, adapter_bytes: float) -> None:
        self.machine, self.tracer = machine, Tracer(dtype, like_cuda=machine.cuda)
        built: Any = meta.language_model(model, dtype)
        self.most_tokens = causal_lm.most_tokens(built) or ENDLESS
        if model.quantize is not Quantize.none:
            built = planning_meta.quantised(built, model.quantize, built.get_output_embeddings())
        self.model: nn.Module = self.tracer.fakify(built).eval()
        self.held = {"adapters": adapter_bytes}
        if model.offload and machine.cuda:
            room = (machine.vram_gib - machine.context_gib) * GIB
            self.held |= block_offload.planned_bytes(self.model, room)

    def gib(self, rows: int, tokens: int) -> float:
        """When the last of so many rows joins, and all write their last token."""
        trace = self.tracer.run(self.model, lambda: self._write(rows, tokens), held=self.held)
        return sum(parts(trace, self.machine).values())

    def _write(self, rows: int, tokens: int) -> None:
        one, last = new_cache(), new_cache()
        self._read(one, 1, 1, 1)  # shows what the layers keep
        all_rows, _prefixes = _like(one, rows - 1, tokens), _like(one, 1, min(tokens, MOST_TOKENS))
        self._read(last, 1, tokens, tokens)
        if rows > 1:
            join(all_rows, [last], tokens)
        else:
            all_rows = last
        self._read(all_rows, rows, 1, tokens + 1)

    def _read(self, cache: Any, rows: int, new: int, seen: int) -> None:
        model: Any = self.model
        with self.tracer.autocast():
            logits_BV = model(
                input_ids=torch.zeros(rows, new, dtype=torch.long),
                attention_mask=torch.ones(rows, 1, new, seen, dtype=torch.bool),
                position_ids=torch.zeros(rows, new, dtype=torch.long),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        _scores = torch.empty(logits_BV.numel() * SCORES_BYTES, dtype=torch.uint8)


def _like(cache: Any, rows: int, tokens: int) -> Any:
    """A cache of the same model."""
    found = new_cache()
    for index, layer in enumerate(cache.layers if rows else ()):
        parts = (layer.keys, layer.values)
        found.update(*[part.new_empty(rows, part.shape[1], tokens, part.shape[3]) for part in parts], index)
    return found
