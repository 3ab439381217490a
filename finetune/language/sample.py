"""Answer a recipe's prompts with the base and with the tuned model, side by side."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

import torch

from finetune.config.schema import ModelConfig, SampleConfig
from finetune.data.text.tokens import Chat
from finetune.language import causal_lm, export
from finetune.language.generate import ANSWER_BATCH, TextGenerator
from finetune.run.progress import progress
from finetune.run.records import Answer, by_prompt

PAGE = "answers.md"
MARKUP = re.compile(r"[\\`*_~\[\]|$]")  # what Markdown would take for more than a character


def sample(
    model: ModelConfig,
    settings: SampleConfig,
    chat: Chat,
    adapter: Path,
    adapter_name: str,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    vram_gib: float,
) -> tuple[str, tuple[Answer, ...]]:
    """The base's and the tuned model's answer to every prompt and seed, drawn with the same random numbers.

    Answers, settings and adapter (`adapter_name`) are in `samples.jsonl`, all answers on the Markdown page whose name
    is returned with them. Without a temperature the seed decides nothing, and the first one stands for all. Raises
    ModelError for an adapter that doesn't fit.
    """
    generator = TextGenerator(chat.tokenizer, chat.stop_ids(), device, dtype)
    seeds = settings.seeds if settings.temperature else settings.seeds[:1]
    requested = [(prompt, seed) for prompt in settings.prompts for seed in seeds]
    jobs = [(chat.prompt_ids(prompt), seed) for prompt, seed in requested]
    written: dict[str, list[str]] = {"base": [], "tuned": []}
    loaded = causal_lm.load_model(model, dtype, device, vram_gib=vram_gib)
    with progress("sample", 2 * len(jobs), unit="answers") as bar:
        for kind, texts in written.items():
            if kind == "tuned":
                loaded = export.load(loaded, adapter)
            for start in range(0, len(jobs), ANSWER_BATCH):
                part = jobs[start : start + ANSWER_BATCH]  # a progress bar moves after each
                texts += generator.generate(
                    loaded, part, max_new_tokens=settings.max_new_tokens, temperature=settings.temperature
                )
                bar.advance(len(part))
    items = tuple(
        Answer(prompt, seed, base, tuned)
        for (prompt, seed), base, tuned in zip(requested, written["base"], written["tuned"], strict=True)
    )
    facts = {
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "model": model.base,
        "adapter": adapter_name,
    }
    lines = [json.dumps(asdict(item) | facts, ensure_ascii=False) + "\n" for item in items]
    (folder / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / PAGE).write_text(page(items), encoding="utf-8")
    return PAGE, items


def page(items: Sequence[Answer]) -> str:
    """Markdown: a heading for each prompt, and under it a row for each seed, the base's answer beside the tuned one."""
    parts = ["# Base against tuned\n"]
    for prompt, rows in by_prompt(items).items():
        parts.append(f"\n## {_literal(' '.join(prompt.split()))}\n\n| seed | base | tuned |\n| --- | --- | --- |\n")
        parts += [f"| {item.seed} | {_literal(item.base)} | {_literal(item.tuned)} |\n" for item in rows]
    return "".join(parts)


def _literal(text: str) -> str:
    """A text as it was written, in one line of Markdown."""
    spelled = MARKUP.sub(lambda found: "\\" + found.group(), escape(text, quote=False))
    return "<br>".join(spelled.splitlines())
