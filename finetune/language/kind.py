"""Language models as a `finetune.kinds.Kind`: here the whole configuration becomes the values that this slice takes."""

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from finetune import hub
from finetune.adapters import lora
from finetune.config.describe import as_dict
from finetune.config.model_kinds import MODEL_KINDS
from finetune.config.schema import Config, ExportFormat, ModelConfig, Quantize
from finetune.data.text import formats, readers, store
from finetune.errors import ConfigError, DataError
from finetune.language import card, meta, task, tokenize
from finetune.language import export as exporting
from finetune.language import sample as sampling
from finetune.language.conversation import Conversation
from finetune.language.memory_model import LanguageMemoryModel
from finetune.memory import policy
from finetune.memory.device import pick_device, pick_dtype
from finetune.planning.workload import GLANCE_S, Examples, Workload, previews, validations
from finetune.reading import is_there
from finetune.run.hashing import hash_file, hash_of
from finetune.run.receipts import load_record, receipt_path
from finetune.run.records import Answer, Answers, Run, TextSet
from finetune.run.rundir import name_inside, written_config
from finetune.training.optim import OPTIMIZERS, optimizer_bytes
from finetune.training.task import Task

FACTS = MODEL_KINDS["language"]
DATASET, SAMPLES = TextSet, Answers
TEXT_SUFFIXES = (".json", ".jsonl", ".csv", ".txt")
BYTES_PER_TOKEN = 6  # of a file: about 4 of English, and what the format puts around it; a guess

dataset_inputs = tokenize.inputs
build_dataset = tokenize.build
dataset_complete = tokenize.complete
dataset_figures = tokenize.figures


def require_device(config: Config, device: torch.device) -> None:
    if config.lora.dora and config.model.quantize is Quantize.int8 and device.type != "cuda":
        # PEFT drops the scales of int8 weights there.
        raise ConfigError("lora.dora=true can't read int8 weights on a CPU; try model.quantize=nf4")


def require_base(config: Config) -> None:
    exporting.check_formats(config.model, config.lora, config.export.formats)
    hub.require_weights(config.model.base, "")
    if folder := hub.local(config.model.base):  # what is to be downloaded is seen then
        tokenize.chat_of(replace(config.model, base=str(folder)), config.data)


def require_start(config: Config) -> None:
    lora.require_start(
        config.lora,
        lambda settings: meta.adapted(config.model, settings, torch.float32, config.seed),
        lambda adapted: task.read_start(adapted, config.lora.start_from),
    )


def require_examples(config: Config) -> None:
    tokenize.require_examples(config.model, config.data, GLANCE_S)


def contents(config: Config) -> dict[str, str]:
    found, template = {"model.base": hub.content_hash(config.model.base)}, config.data.chat_template
    if template:
        is_file = os.path.isfile(template)  # noqa: PTH113 - a template itself may be given, too long for a path
        found["data.chat_template"] = hash_file(Path(template)) if is_file else hash_of(template)
    return found


def build_task(config: Config, dataset: TextSet, device: torch.device) -> Task:
    return task.LanguageTask(
        dataset,
        device,
        model=config.model,
        lora=config.lora,
        data=config.data,
        sample=config.sample,
        dtype=pick_dtype(config.trainer.precision, device),
        seed=config.seed,
        vram_gib=config.hardware.vram_gib,
        activation_checkpointing=config.trainer.activation_checkpointing,
        offload_activations=config.trainer.offload_activations,
        fast=config.trainer.fast,
    )


def examples(config: Config) -> Examples | None:
    """Of the run's data set, if it is there; else guessed from the size of files of text."""
    data, named, run_dir = config.data, Path(config.data.file), Path(config.run_dir)
    if not data.file or not all(map(is_there, readers.paths_of(named))):
        return None
    files = readers.files_of(named)
    written, record, settings = written_config(run_dir), load_record(run_dir, "dataset", TextSet), as_dict(config)
    if record and all(written.get(section) == settings[section] for section in ("model", "data")):
        read = receipt_path(run_dir, "dataset").stat().st_mtime
        if all(file.stat().st_mtime < read for file in files):
            return Examples(0, 0, record.packs, record.tokens / data.length, measured=True)
    formats.open_source(named, format_=data.format, columns=data.columns, skip_bad=data.skip_bad)
    if not all(file.is_file() and file.suffix.lower() in TEXT_SUFFIXES for file in files):
        return None
    packs = sum(file.stat().st_size for file in files) / BYTES_PER_TOKEN / data.length
    return Examples(0, 0, max(1.0, packs * (1 - data.validation_share)), packs, measured=False)


def workload(config: Config) -> Workload:
    found, share = examples(config), config.data.validation_share

    def build(model: ModelConfig, dtype: torch.dtype, cuda: bool, room: float) -> LanguageMemoryModel:
        return LanguageMemoryModel(
            dtype,
            cuda=cuda,
            room=room,
            model=model,
            lora=config.lora,
            sample=config.sample,
            data=config.data,
            fast=config.trainer.fast,
            merges=ExportFormat.merged in config.export.formats,
            validations=validations(config.trainer),
            held_out=None if found is None else found.per_epoch * share / (1 - share),
            previews=previews(config.trainer, config.sample.every),
            seed=config.seed,
        )

    return Workload(
        config.model,
        config.trainer,
        found,
        optimizer_bytes=partial(optimizer_bytes, config.optim.name),
        paged_optimizer=OPTIMIZERS[config.optim.name].paged,
        build=build,
    )


def exports_on_cpu(config: Config) -> bool:
    cuda = pick_device(config.hardware.device).type == "cuda"
    return policy.language_export(config.model, cuda=cuda, dora=config.lora.dora).cpu_fallback


def export(
    config: Config, run: Run, weights: Mapping[str, Tensor], averaged: Mapping[str, Tensor] | None, folder: Path
) -> tuple[dict[str, str], dict[str, float]]:
    chat = tokenize.chat_of(config.model, config.data)
    rows, source = exporting.comparison_rows(
        _stored_rows(config), chat, length=config.data.length, share=config.data.validation_share
    )
    exporter = exporting.Exporter(
        model=config.model,
        content=hub.content_hash(config.model.base),
        lora=config.lora,
        chat=chat,
        template=config.data.chat_template,
        rows=rows,
        source=source,
        device=pick_device(config.hardware.device),
        vram_gib=config.hardware.vram_gib,
        seed=config.seed,
        name=config.name,
    )
    return exporter.export(weights, averaged, folder, config.export)


def usage(config: Config) -> str:
    return card.usage(
        config.model,
        tokenize.chat_of(config.model, config.data),
        template=config.data.chat_template,
        dtype=pick_dtype(config.trainer.precision, pick_device(config.hardware.device)),
        prompt=next(iter(config.sample.prompts), "Hello!"),
    )


def use(config: Config, adapter: Path) -> Conversation:
    device = pick_device(config.hardware.device)
    dtype = pick_dtype(config.trainer.precision, device)
    chat = tokenize.chat_of(config.model, config.data)
    return Conversation(config.model, config.sample, chat, adapter, device, dtype, config.hardware.vram_gib)


def sample(config: Config, adapter: Path, folder: Path) -> tuple[str, tuple[Answer, ...]]:
    device = pick_device(config.hardware.device)
    dtype = pick_dtype(config.trainer.precision, device)
    chat = tokenize.chat_of(config.model, config.data)
    name = name_inside(adapter, Path(config.run_dir))
    return sampling.sample(
        config.model, config.sample, chat, adapter, name, folder, device, dtype, config.hardware.vram_gib
    )


def _stored_rows(config: Config) -> store.TokenStore | None:
    """Of the run's data set, if they are still in the cache, which may be deleted at any time."""
    record = load_record(Path(config.run_dir), "dataset", TextSet)
    try:
        return store.open_store(Path(record.rows)) if record else None
    except DataError:
        return None
