"""Denoising loss of a latent diffusion model (arXiv 2112.10752); random numbers are tied to (seed, example, epoch).

B images, C latent channels, h×w latent pixels, L text tokens, D text width.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.adapters import lora as lora_layers
from finetune.adapters.formats import StoredAdapter
from finetune.config.schema import LoraConfig, LossConfig, ModelConfig, Quantize, SampleConfig
from finetune.config.spelling import setting
from finetune.data import order
from finetune.data.cache import read
from finetune.diffusion import fast_blocks
from finetune.diffusion.families import family
from finetune.diffusion.families.spec import FamilySpec, stacked
from finetune.diffusion.image_sampler import ImageSampler
from finetune.diffusion.objectives import WEIGHTINGS, Objective
from finetune.diffusion.pipeline import load_backbone, load_scheduler, prove_backbone, read_adapter, say_unused
from finetune.errors import ModelError
from finetune.memory import activation_offload, checkpointing, fallbacks
from finetune.memory.device import usable_bytes
from finetune.run import ranks
from finetune.run.records import Dataset, Example
from finetune.training.cuda_graphs import CudaGraphs
from finetune.training.fast_linear import reason_against
from finetune.training.task import Batch, Draw

VALIDATION_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # shares of the noise schedule: from nearly clean to nearly noise
VALIDATION_EPOCH = -1  # which training never has
TEXT = "text."  # begins the names of a batch's tensors that the text encoders made
ENTRIES_KEPT = 1024  # read entries of the cache; of SDXL at 1024 px half a gigabyte
PROBE = 16  # training images that stand in where nothing is held out, and the most that are validated on


class DiffusionTask:
    """LoRA on the UNet or transformer of an image model. `model` is it with adapters injected."""

    unit = "images"

    def __init__(
        self,
        dataset: Dataset,
        device: torch.device,
        *,
        model: ModelConfig,
        lora: LoraConfig,
        loss: LossConfig,
        sample: SampleConfig,
        dtype: torch.dtype,
        seed: int,
        vram_gib: float,
        activation_checkpointing: int,
        offload_activations: bool,
        fast: bool,
    ) -> None:
        """dtype: of the arithmetic. vram_gib and the three below: as in the configuration."""
        self.loss_settings, self.sample_settings = loss, sample
        self.device, self.dtype, self.seed, self.resolution = device, dtype, seed, model.resolution
        self.empty_text = Path(dataset.empty_text)
        examples = list(dataset.examples())
        self.training = [example for example in examples if not example.held_out]
        # Small sets hold nothing out: the same training images with fixed noise still compare from step to step.
        candidates = [example for example in examples if example.held_out] or self.training
        self.validation = [candidates[at] for at in order.by_content([example.key for example in candidates], PROBE)]
        self.size = len(self.training)
        self.read = lru_cache(ENTRIES_KEPT)(read)
        self.family = family(model.family)
        self.objective = self.family.objective(load_scheduler(model))
        self.image_sampler = self._make_image_sampler(model)
        backbone: Any = load_backbone(model, dtype, device, vram_gib=vram_gib)
        first = self.read(Path(self.training[0].latents))["mean"][None]
        prove_backbone(model, backbone, first, stacked([self.read(self.empty_text)]), device, dtype)
        checkpointing.set_checkpointing(backbone, activation_checkpointing)
        self.model: nn.Module = lora_layers.inject(backbone, lora, model.lora_targets[lora.targets], seed=seed)
        if fast and device.type == "cuda" and not reason_against(model, lora, dtype):
            fast_blocks.install(self.model, dtype)
        self.activation_offload = activation_offload.ActivationOffload(self.model, device, offload_activations)
        self.fallbacks = fallbacks.gpu_fallbacks(
            self.model, model, activation_checkpointing, self.activation_offload, device
        )
        self.graphs: CudaGraphs | None = None
        kept = not (activation_checkpointing or offload_activations)
        if fast and kept and device.type == "cuda" and replayable(model):
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self.graphs = CudaGraphs(self._loss, trained, usable_bytes(device, vram_gib))
        if lora.start_from:
            stored = read_start(model, self.model, lora.start_from)
            say_unused(Path(lora.start_from), stored)
            lora_layers.load_state(self.model, stored.weights, lora.start_from)

    def steps(self, *, effective: int, start: int) -> Iterator[Sequence[Draw]]:
        """The images of each step, each step's from as few buckets as possible."""
        buckets = [example.bucket for example in self.training]
        for chunk in order.steps(buckets, effective=effective, seed=self.seed, start=start):
            yield [(self.training[index], epoch) for index, epoch in chunk]

    def split(self, draws: Sequence[Draw], micro_batch: int) -> Sequence[Sequence[Draw]]:
        """Micro-batches of one bucket each."""
        return order.split(draws, lambda draw: draw[0].bucket, micro_batch)

    def worst(self, micro_batch: int) -> Sequence[Draw]:
        """The largest image, over and over."""
        return [(max(self.training, key=lambda example: math.prod(example.bucket)), 0)] * micro_batch

    def collate(self, draws: Sequence[Draw]) -> Batch:
        """Latents drawn from the cached posterior, noise, timestep and caption (or none) of each draw."""
        drawn = [self._noisy_example(example, epoch) for example, epoch in draws]
        return _batch(drawn)

    def loss(self, batch: Batch) -> Tensor:
        """Sum over images of the weighted mean squared error."""
        if self.graphs and torch.is_grad_enabled():
            return self.graphs(batch.tensors)
        with self.activation_offload():
            return self._loss(**batch.tensors)

    @torch.no_grad()
    def validate(self, micro_batch: int) -> dict[str, float]:
        """Mean squared error on fixed (image, noise, timestep) triples: "mean" and "t=…" per noise level."""
        if self.graphs:
            self.graphs.make_room()
        training = self.model.training
        self.model.eval()
        result = {}
        for timestep in map(self.objective.level, VALIDATION_LEVELS):
            total = 0.0
            for batch in self._fixed_batches(timestep, micro_batch):
                with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32):
                    total += float(self._errors(batch.to(self.device)).sum())
            result[f"t={timestep:g}"] = total / len(self.validation)
        self.model.train(training)
        return {"mean": sum(result.values()) / len(result), **result}

    def sample(self, prompts: Sequence[str], seed: int) -> list[Any]:
        """One PIL image per preview prompt, in the process that draws."""
        sample, side = self.sample_settings, self.resolution
        if self.image_sampler is None:
            return []
        if self.graphs:
            self.graphs.make_room()
        jobs = [(prompt, seed) for prompt in prompts]
        return self.image_sampler.generate(
            self.model, jobs, width=side, height=side, steps=sample.steps, guidance=sample.guidance
        )

    def reduce_memory(self) -> str | None:
        """Recompute every block, then keep what they need, and then all of them, in CPU memory."""
        self.graphs = None  # what follows doesn't find its tensors where they were, or changes what is computed
        return next(self.fallbacks, None)

    def notes(self) -> dict[str, str]:
        """None: the images and captions are in the report."""
        return {}

    def _loss(self, **tensors: Tensor) -> Tensor:
        predicted_BChw = predict(self.family, self.objective, self.model, tensors, self.dtype)
        return weighted(self.objective, predicted_BChw, tensors, self.loss_settings)

    def _make_image_sampler(self, model: ModelConfig) -> ImageSampler | None:
        """What draws previews. Made before the backbone is loaded, because text encoders may need the whole GPU."""
        sample = self.sample_settings
        prompts = sample.prompts[: sample.previews]
        if not prompts or ranks.rank():
            return None
        return ImageSampler(model, prompts, sample.negative, self.device, self.dtype)

    def _noisy_example(self, example: Example, epoch: int, timestep: float | None = None) -> dict[str, Any]:
        """One training input; a given `timestep` replaces the drawn one and keeps the caption (validation)."""
        random = torch.Generator().manual_seed(draw_seed(self.seed, example.key, epoch))
        latents = self.read(Path(example.latents))
        mean_Chw, std_Chw = latents["mean"], latents["std"]
        clean_Chw = mean_Chw + std_Chw * torch.randn(mean_Chw.shape, generator=random)
        noise_Chw = torch.randn(mean_Chw.shape, generator=random)
        offset_C11 = torch.randn((mean_Chw.shape[0], 1, 1), generator=random)
        drawn = self.objective.draw(random, clean_Chw)
        dropped = bool(torch.rand((), generator=random) < self.loss_settings.caption_dropout)
        text = self.empty_text if dropped and timestep is None else Path(example.text)
        chosen = drawn if timestep is None else timestep
        return {
            "clean": clean_Chw,
            "noise": noise_Chw + self.loss_settings.noise_offset * offset_C11,
            "text": self.read(text),
            "timestep": chosen,
            "name": f"{example.file} at timestep {chosen:g}",
        }

    def _fixed_batches(self, timestep: float, micro_batch: int) -> Iterator[Batch]:
        draws = [(example, VALIDATION_EPOCH) for example in self.validation]
        for part in self.split(draws, micro_batch):
            yield _batch([self._noisy_example(example, epoch, timestep) for example, epoch in part])

    def _errors(self, batch: Batch) -> Tensor:
        """Mean squared error of each image's prediction, (B,) fp32."""
        predicted_BChw = predict(self.family, self.objective, self.model, batch.tensors, self.dtype)
        return errors(self.objective, predicted_BChw, batch.tensors)


def read_start(model: ModelConfig, backbone: nn.Module, source: str) -> StoredAdapter:
    """The adapter to start from, as the one that is injected into `backbone`. Raises ModelError if it doesn't fit."""
    stored = read_adapter(model, backbone, Path(source))
    # As `lora.dora`, which is for language models alone.
    if lora_layers.is_dora([*stored.weights, *stored.unused]):
        raise ModelError(
            f"{source} was trained with DoRA, and image models can't continue such an adapter; "
            f"take one without DoRA, or start anew with {setting('lora.start_from', '')}"
        )
    return replace(stored, weights=lora_layers.as_start(backbone, stored.weights, stored.scales, source))


def predict(
    spec: FamilySpec, objective: Objective, model: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> Tensor:
    """What the model makes of a batch's noisy latents, (B, C, h, w). dtype: of its arithmetic."""
    noisy_BChw = objective.noisy(tensors["clean"], tensors["noise"], tensors["timesteps"])
    text = {  # large text encoders write bf16 whatever the backbone computes in
        name.removeprefix(TEXT): value.to(dtype) for name, value in tensors.items() if name.startswith(TEXT)
    }
    return spec.predict(model, noisy_BChw, tensors["timesteps"], text)


def replayable(model: ModelConfig) -> bool:
    """Whether the passes of the backbone may be replayed as CUDA graphs where all activations are kept on the GPU.

    Layers in int8 look for outliers, for which the host waits.
    """
    return family(model.family).capturable and not model.offload and model.quantize is not Quantize.int8


def errors(objective: Objective, predicted_BChw: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Mean squared error of each image's prediction, (B,) fp32."""
    target_BChw = objective.target(tensors["clean"], tensors["noise"], tensors["timesteps"])
    errors_B: Tensor = (predicted_BChw.float() - target_BChw.float()).square().mean(dim=(1, 2, 3))
    return errors_B


def weighted(objective: Objective, predicted_BChw: Tensor, tensors: Mapping[str, Tensor], loss: LossConfig) -> Tensor:
    """The loss: the sum of all images' errors, each with its weight."""
    weights_B = WEIGHTINGS[loss.weighting](objective, tensors["timesteps"], loss)
    return (errors(objective, predicted_BChw, tensors) * weights_B).sum()


def draw_seed(seed: int, key: str, epoch: int) -> int:
    """A 63-bit seed for one draw of one example: the same whatever the order, the micro-batch or the process."""
    digest = hashlib.sha256(f"{seed}/{key}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _batch(drawn: Sequence[dict[str, Any]]) -> Batch:
    tensors = {name: torch.stack([item[name] for item in drawn]) for name in ("clean", "noise")}
    tensors |= {TEXT + name: torch.stack([item["text"][name] for item in drawn]) for name in drawn[0]["text"]}
    tensors["timesteps"] = torch.tensor([item["timestep"] for item in drawn])
    return Batch(tensors, len(drawn), tuple(item["name"] for item in drawn), count=len(drawn), padded_count=len(drawn))
