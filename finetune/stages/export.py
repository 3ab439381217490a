"""Export the trained adapter in every format, each one proven against the trained module."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from finetune import kinds
from finetune.config.describe import as_dict
from finetune.config.schema import CheckpointChoice, Config, Device, Precision
from finetune.errors import is_gpu_out_of_memory
from finetune.memory.device import release_memory
from finetune.memory.fallbacks import try_within_memory
from finetune.reporting.facts import difference, run_facts
from finetune.run.atomic import replace_folder
from finetune.run.hashing import hash_of
from finetune.run.progress import say
from finetune.run.receipts import load_record, save_receipt, set_aside_changed
from finetune.run.records import Adapter, Run
from finetune.training import checkpoint

T = TypeVar("T")
CARD = "README.md"
ON_CARD = ("trained on", "effective batch", "loss", "trained parameters")
"""Figures of the run that stay true wherever the adapter goes."""


def export(config: Config, run: Run) -> Adapter:
    """Write `adapter/`: all formats, or none if one does not reproduce the trained module (ExportError)."""
    run_dir = Path(config.run_dir)
    folder = run_dir / "adapter"
    settings = as_dict(config)
    inputs = (run.training_hash, run.steps, settings["export"], config.caption.trigger, config.name)
    input_hash = hash_of(*inputs, config.model.base, kinds.of(config).contents(config))
    record = load_record(run_dir, "export", Adapter, input_hash=input_hash, earlier=hash_of(*inputs), outputs=_outputs)
    if record and (folder / CARD).exists():
        say("export: up to date, skipped")
        return record
    start = time.monotonic()
    release_memory()  # what the stage before left on the GPU
    trained = checkpoint.load(_chosen(config, run))
    with replace_folder(folder) as temporary:
        kind = kinds.of(config)
        files, differences = _within_memory(
            config, temporary, lambda here: kind.export(here, run, trained.adapter, trained.averaged, temporary)
        )
        (temporary / CARD).write_text(_card(config, run, files, differences, kind.usage(config)), encoding="utf-8")
        set_aside_changed(run_dir, "export", folder, temporary)
    record = Adapter(str(folder), files, differences, config.model.base, config.caption.trigger)
    save_receipt(
        run_dir,
        "export",
        record,
        input_hash=input_hash,
        seconds=time.monotonic() - start,
        figures={f"{export_format} difference": value for export_format, value in differences.items()},
        outputs=_outputs(record),
        editable=[folder / CARD],
    )
    by_difference: dict[str, list[str]] = {}
    for name in differences:
        by_difference.setdefault(difference(name, differences), []).append(name)
    proven = ", ".join(f"{found} ({', '.join(names)})" for found, names in by_difference.items())
    say(f"export: compared with the trained model: {proven}")
    return record


def _outputs(adapter: Adapter) -> list[Path]:
    """What has to stay as it was written; the card is a person's to edit."""
    folder = Path(adapter.folder)
    return [*(folder / name for name in adapter.files.values()), *folder.glob("*.json")]


def _within_memory(config: Config, folder: Path, write: Callable[[Config], T]) -> T:
    """What `write` returns: on the GPU, and where that is too small and the work can be done there, in CPU memory."""
    if not kinds.of(config).exports_on_cpu(config):
        return write(config)
    found = try_within_memory(lambda: write(config), is_oom=is_gpu_out_of_memory)
    if found is not None:
        return found
    say("export: the GPU is too small; models are compared in CPU memory, which may take hours for large ones")
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    hardware = replace(config.hardware, device=Device.cpu)
    return write(replace(config, hardware=hardware, trainer=replace(config.trainer, precision=Precision.auto)))


def _chosen(config: Config, run: Run) -> Path:
    """The checkpoint that is exported; the last one where none was validated."""
    last = Path(run.checkpoint)
    if config.export.checkpoint is CheckpointChoice.last or run.best_step is None:
        return last
    return checkpoint.at(last.parent, run.best_step)


def _card(config: Config, run: Run, files: dict[str, str], differences: dict[str, float], usage: str) -> str:
    """The model card: what it is, how it was made, how to load it."""
    facts = [f"| {fact.label} | {fact.text} |" for fact in run_facts(run) if fact.label in ON_CARD]
    exported = [f"| {name} | `{file}` | {difference(name, differences)} |" for name, file in files.items()]
    trigger = f"\nPut **{config.caption.trigger}** into the prompt to use it.\n" if config.caption.trigger else ""
    newline = "\n"
    return f"""---
base_model: {json.dumps(config.model.base, ensure_ascii=False)}
library_name: peft
tags: [lora, finetune]
---
# {config.name}
LoRA (rank {config.lora.rank}, alpha {config.lora.alpha:g}, {config.lora.targets}) for `{config.model.base}`.
{trigger}
| format | file | difference to the trained model |
|---|---|---|
{newline.join(exported)}

```python
{_usage(usage, config.model.base)}```

| training | |
|---|---|
{newline.join(facts)}

Training hash: `{run.training_hash}`
"""


def _usage(code: str, base: str) -> str:
    """`code` with what its libraries load the base from: an embedded one is a folder of this package."""
    if base.startswith("embedded:"):
        return "from finetune import hub\n" + code.format(base=f'str(hub.resolve("{base}"))')
    name, _, revision = base.partition("@")
    spelt = json.dumps(name, ensure_ascii=False)  # a path may hold quotes and backslashes
    return code.format(base=spelt + (f", revision={json.dumps(revision)}" if revision else ""))
