"""Image models as a `finetune.kinds.Kind`: here the whole configuration becomes the values that this slice takes."""

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from finetune import hub
from finetune.adapters import lora
from finetune.config.model_kinds import MODEL_KINDS
from finetune.config.schema import Config, ModelConfig, Quantize
from finetune.data.images import decode, folder, split, usable
from finetune.diffusion import captioner, card, encode, meta, single_file, task
from finetune.diffusion import export as exporting
from finetune.diffusion import sample as sampling
from finetune.diffusion.brush import Brush
from finetune.diffusion.families import family
from finetune.diffusion.memory_model import DiffusionMemoryModel
from finetune.diffusion.pipeline import base_hash
from finetune.errors import ConfigError, DataError
from finetune.memory import policy
from finetune.memory.device import pick_device, pick_dtype
from finetune.planning.workload import GLANCE_S, Examples, Workload, previews, validations
from finetune.reading import is_there
from finetune.run.progress import say
from finetune.run.receipts import load_record
from finetune.run.records import CaptionSet, Dataset, Run, Sample, Samples
from finetune.run.rundir import name_inside
from finetune.training.optim import OPTIMIZERS, optimizer_bytes
from finetune.training.task import Task

FACTS = MODEL_KINDS["diffusion"]
DATASET, SAMPLES = Dataset, Samples
REFERENCE_PX = 1024  # of an image of the data set beside the samples: several are held while these are drawn

dataset_inputs = encode.inputs
build_dataset = encode.build
dataset_complete = encode.complete
dataset_figures = encode.figures


def require_device(config: Config, device: torch.device) -> None:
    quantize = config.model.quantize
    if quantize is not Quantize.none and device.type != "cuda":  # diffusers quantises on GPUs alone
        raise ConfigError(f"model.quantize={quantize.name} of an image model needs a CUDA GPU; try model.quantize=none")


def require_base(config: Config) -> None:
    if config.sample.negative.strip() and not family(config.model.family).takes_negative:
        raise ConfigError(f"sample.negative: {config.model.family} takes no negative prompt; leave it out")
    if single_file.find(config.model) is None:  # which refuses a base that is no image model
        hub.require_weights(config.model.base, *meta.parts(config.model))


def require_start(config: Config) -> None:
    lora.require_start(
        config.lora,
        lambda settings: meta.adapted(config.model, settings, torch.float32, config.seed),
        lambda adapted: task.read_start(config.model, adapted, config.lora.start_from),
    )


def require_examples(config: Config) -> None:
    root, data, overwrite = Path(config.data.folder), config.data, config.caption.overwrite
    files = folder.images(root)
    broken, looked = usable.unreadable(root, files, data.max_pixels, GLANCE_S)
    written = usable.generated(root, Path(data.cache), load_record(Path(config.run_dir), "caption", CaptionSet))
    captions = folder.captions(root, files, () if overwrite else written)
    readable = usable.readable(root, files, broken | folder.no_files(root), skip=data.skip_bad)
    if usable.to_caption(root, readable, captions, written, overwrite=overwrite):
        captioner.require(config.caption.model)
    if looked < len(files):
        say(f"{looked:,} of {len(files):,} images were looked at; train looks at all of them")


def contents(config: Config) -> dict[str, str]:
    return {"model.base": base_hash(config.model)}


def build_task(config: Config, dataset: Dataset, device: torch.device) -> Task:
    return task.DiffusionTask(
        dataset,
        device,
        model=config.model,
        lora=config.lora,
        loss=config.loss,
        sample=config.sample,
        dtype=pick_dtype(config.trainer.precision, device),
        seed=config.seed,
        vram_gib=config.hardware.vram_gib,
        activation_checkpointing=config.trainer.activation_checkpointing,
        offload_activations=config.trainer.offload_activations,
        fast=config.trainer.fast,
    )


def examples(config: Config) -> Examples | None:
    root, share = Path(config.data.folder), config.data.validation_share
    if not config.data.folder or not is_there(root):
        return None
    files = folder.images(root)
    captions = {} if config.caption.overwrite else folder.captions(root, files).texts
    marked = split.for_validation(root, files, share)
    held_out = len(marked) if marked else encode.held_out_count(len(files), share)
    trained = len(files) - held_out
    cached = len(files) + (trained if config.data.flip else 0)
    return Examples(len(files), len(files) - len(captions), trained, cached, measured=True)


def workload(config: Config) -> Workload:
    found = examples(config)

    def build(model: ModelConfig, dtype: torch.dtype, cuda: bool, room: float) -> DiffusionMemoryModel:
        return DiffusionMemoryModel(
            dtype,
            cuda=cuda,
            room=room,
            model=model,
            lora=config.lora,
            loss=config.loss,
            caption=config.caption,
            sample=config.sample,
            max_aspect=config.data.max_aspect,
            validations=validations(config.trainer),
            previews=previews(config.trainer, config.sample.every),
            examples=found,
            seed=config.seed,
            fast=config.trainer.fast,
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
    device = pick_device(config.hardware.device)
    dtype = pick_dtype(config.trainer.precision, device)
    cuda = device.type == "cuda"
    return policy.image_export(config.model, dtype, cuda=cuda, weights=0, room=0.0).cpu_fallback


def export(
    config: Config, run: Run, weights: Mapping[str, Tensor], averaged: Mapping[str, Tensor] | None, folder: Path
) -> tuple[dict[str, str], dict[str, float]]:
    device = pick_device(config.hardware.device)
    exporter = exporting.Exporter(
        model=config.model,
        content=base_hash(config.model),
        lora=config.lora,
        device=device,
        dtype=pick_dtype(config.trainer.precision, device),
        vram_gib=config.hardware.vram_gib,
        seed=config.seed,
        name=config.name,
        metadata=exporting.kohya_metadata(
            config.name, config.model.base, config.lora, config.caption.trigger, run.training_hash, run.steps
        ),
    )
    return exporter.export(weights, averaged, folder, formats=config.export.formats, tolerance=config.export.tolerance)


def usage(config: Config) -> str:
    prompt = next(iter(config.sample.prompts), config.caption.trigger or "a house on a hill")
    return card.usage(
        config.model,
        dtype=pick_dtype(config.trainer.precision, pick_device(config.hardware.device)),
        formats=config.export.formats,
        kohya_file=exporting.kohya_file(config.name),
        prompt=prompt,
        steps=config.sample.steps,
    )


def use(config: Config, adapter: Path) -> Brush:
    device = pick_device(config.hardware.device)
    dtype = pick_dtype(config.trainer.precision, device)
    return Brush(config.model, config.sample, adapter, device, dtype, config.hardware.vram_gib)


def sample(config: Config, adapter: Path, folder: Path) -> tuple[str, tuple[Sample, ...]]:
    device = pick_device(config.hardware.device)
    dtype = pick_dtype(config.trainer.precision, device)
    name = name_inside(adapter, Path(config.run_dir))
    return sampling.sample(
        config.model,
        config.sample,
        adapter,
        name,
        [] if config.sample.adapter else _references(config),
        folder,
        device,
        dtype,
        config.hardware.vram_gib,
    )


def _references(config: Config) -> list[Image.Image]:
    """Some of the run's images, as far as they still are where they were."""
    images = []
    if captions := load_record(Path(config.run_dir), "caption", CaptionSet):
        for file in captions.some():
            with suppress(DataError):
                image = decode.open_rgb(file, config.data.max_pixels)
                image.thumbnail((REFERENCE_PX, REFERENCE_PX))
                images.append(image)
    return images
