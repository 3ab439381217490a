"""Answer a recipe's prompts with the base and with the tuned model, side by side."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

from finetune.config.schema import Config
from finetune.language import causal_lm, export
from finetune.language.generate import ANSWER_BATCH, TextGenerator
from finetune.language.tokenize import chat_of
from finetune.memory.device import pick_device, pick_dtype
from finetune.reporting.texts import by_prompt
from finetune.run.progress import progress
from finetune.run.records import Answer

PAGE = "answers.md"
MARKUP = re.compile(r"[\\`*_~\[\]|$]")  # what Markdown would take for more than a character


def draw(config: Config, adapter: Path, folder: Path) -> tuple[str, tuple[Answer, ...]]:
    """The base's and the tuned model's answer to every prompt and seed, drawn with the same random numbers.

    Answers, settings and adapter are in `samples.jsonl`, all answers on the Markdown page whose name is returned with
    them. Without a temperature the seed decides nothing, and the first one stands for all. Raises ModelError for an
    adapter that doesn't fit.
    """
    sample = config.sample
    device = pick_device(config.hardware.device)
    dtype = pick_dtype(config.trainer.precision, device)
    chat = chat_of(config)
    generator = TextGenerator(chat.tokenizer, chat.stop_ids(), device, dtype)
    seeds = sample.seeds if sample.temperature else sample.seeds[:1]
    requested = [(prompt, seed) for prompt in sample.prompts for seed in seeds]
    jobs = [(chat.prompt_ids(prompt), seed) for prompt, seed in requested]
    written: dict[str, list[str]] = {"base": [], "tuned": []}
    model = causal_lm.load_model(config.model, dtype, device, vram_gib=config.hardware.vram_gib)
    with progress("sample", 2 * len(jobs), unit="answers") as bar:
        for kind, texts in written.items():
            if kind == "tuned":
                model = export.load(model, adapter)
            for start in range(0, len(jobs), ANSWER_BATCH):
                part = jobs[start : start + ANSWER_BATCH]  # a progress bar moves after each
                texts += generator.generate(
                    model, part, max_new_tokens=sample.max_new_tokens, temperature=sample.temperature
                )
                bar.advance(len(part))
    items = tuple(
        Answer(prompt, seed, base, tuned)
        for (prompt, seed), base, tuned in zip(requested, written["base"], written["tuned"], strict=True)
    )
    settings = {
        "max_new_tokens": sample.max_new_tokens,
        "temperature": sample.temperature,
        "model": config.model.base,
        "adapter": str(adapter),
    }
    lines = [json.dumps(asdict(item) | settings, ensure_ascii=False) + "\n" for item in items]
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
