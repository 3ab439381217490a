"""An image model without weights, for the memory plan: what a step and every other phase would hold on the GPU.

B images, C latent channels, h×w latent pixels, H×W pixels, T tokens of a caption, D text width.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from finetune import hub
from finetune.config.model_kinds import MODEL_KINDS
from finetune.config.schema import CaptionConfig, LoraConfig, LossConfig, ModelConfig, Quantize, SampleConfig
from finetune.data.images import buckets
from finetune.diffusion import captioner, export, fast_blocks, meta, single_file, task, tiling
from finetune.diffusion.families import family
from finetune.diffusion.image_sampler import IMAGE_BATCH, images_at_once
from finetune.memory import block_offload, checkpointing, policy
from finetune.planning import meta as planning_meta
from finetune.planning.tracer import PhaseOption, Trace, Tracer
from finetune.planning.workload import Examples
from finetune.training.fast_linear import reason_against

# Beyond what a trace of a decoder shows: cuDNN's workspaces for its fp32 convolutions, which no trace can see. Measured
# on an H200, torch 2.11, at 1024 px: 1.83 to 1.94 GiB with SDXL, SD 3.5 Medium, FLUX.1, Z-Image; FLUX.2 agreed with it.
WORKSPACE_GIB_PER_MEGAPIXEL = 1.9
CAPTION_TOKENS = 12  # that BLIP mostly writes, each of them a step for a batch of images
IMAGE_FORMATS = len(MODEL_KINDS["diffusion"].export_formats)
ELSEWHERE, ONE = "in CPU memory, which is slower", "one image at once"  # words of a `PhaseOption`


class DiffusionMemoryModel:
    """Traces what `DiffusionTask` and the stages around it run."""

    unit = "images"
    mild_checkpointing: tuple[int, ...] = (2,)

    def __init__(
        self,
        dtype: torch.dtype,
        *,
        cuda: bool,
        room: float,
        model: ModelConfig,
        lora: LoraConfig,
        loss: LossConfig,
        caption: CaptionConfig,
        sample: SampleConfig,
        max_aspect: float,
        validations: int,
        previews: int,
        examples: Examples | None,
        seed: int,
        fast: bool,
    ) -> None:
        """dtype: of the arithmetic. room: bytes that the process may have, of which offloading fills a share.
        max_aspect: of buckets. validations, previews: how often there are some in a run. fast: as `trainer.fast`.
        """
        self.base, self.lora, self.loss_settings, self.caption, self.sample = model, lora, loss, caption, sample
        self.cuda, self.room, self.seed, self.fast = cuda, room, seed, fast
        self.validations, self.previews, self.examples = validations, previews, examples
        self.tracer = Tracer(dtype, like_cuda=cuda)
        self.family = family(model.family)
        single_file.find(model)  # which refuses one of another architecture
        self.objective = meta.objective(model)
        self.width, self.height = _largest_bucket(model, max_aspect)
        self.vae = self.tracer.fakify(meta.autoencoder(model))
        self.latents = self._latents(self.width, self.height)
        adapted = self._adapted(dtype)
        if fast and cuda and not reason_against(model, lora, dtype):
            fast_blocks.install(adapted, dtype)
        self.model = self.tracer.fakify(adapted).train()
        text_bytes = policy.text_encoder_dtype(large=bool(self.family.large_text)).itemsize
        texts = sum(math.prod(shape) for shape in self.family.text_shapes(_config(self.model)).values())
        self.entry_bytes = 2 * 4.0 * math.prod(self.latents) + text_bytes * texts  # mean and deviation in fp32
        self.notes = [f"images of {self.width}×{self.height}, the largest of this recipe's shapes"]
        if self.replayed(0, False):
            self.notes.append("steps are faster where no activations are recomputed (CUDA graphs; trainer.fast)")
        self.count = 1
        self.less_cpu_memory = {"loading the text encoders": "close other programs first"}
        self.readings: dict[int, Trace] = {}  # of text encoders, by captions at once

    def set_checkpointing(self, every: int) -> None:
        """As `trainer.activation_checkpointing`; offloading recomputes all."""
        checkpointing.set_checkpointing(self.model, 1 if self.base.offload else every)

    def replayed(self, checkpointing: int, offload_activations: bool) -> bool:
        """Whether a step is a CUDA graph, as in `DiffusionTask`."""
        return self.cuda and self.fast and not (checkpointing or offload_activations) and task.replayable(self.base)

    def inputs(self, micro_batch: int) -> dict[str, Tensor]:
        """The tensors of a batch as `DiffusionTask.collate` makes them."""
        latents = (micro_batch, *self.latents)
        batch = {"clean": torch.empty(latents), "noise": torch.empty(latents)}
        batch |= {task.TEXT + name: values for name, values in self._texts(micro_batch).items()}
        return batch | {"timesteps": torch.zeros(micro_batch, dtype=torch.long)}

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The prediction."""
        return task.predict(self.family, self.objective, self.model, batch, self.tracer.dtype)

    def loss(self, predicted_BChw: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The sum over images."""
        return task.weighted(self.objective, predicted_BChw, batch, self.loss_settings)

    def offloaded(self) -> dict[str, float]:
        """What `model.offload` takes from the weights on the GPU, and the ring of blocks that come for it."""
        return self._offloaded(self.model)

    def training_phases(
        self, micro_batch: int, held: Mapping[str, float]
    ) -> Iterator[tuple[str, Iterable[PhaseOption]]]:
        """Validation and previews."""
        if self.validations:
            passes = len(task.VALIDATION_LEVELS) * math.ceil(task.PROBE / micro_batch)
            yield "validation", [PhaseOption(self._forward(micro_batch, held), runs=self.validations * passes)]
        if self.sample.prompts:
            yield "sampling", self._sampling(micro_batch, held)

    def phases(self, micro_batch: int, held: Mapping[str, float]) -> Iterator[tuple[str, Iterable[PhaseOption]]]:
        """Every phase but the steps of training, by name."""
        found = self.examples
        words = None if found is None else CAPTION_TOKENS * math.ceil(found.to_caption / self.caption.batch)
        if words != 0:  # else the captioner need not be there
            yield "captioning", [PhaseOption(self._captioning, runs=words)]
        yield "encoding texts", self._encoding_texts()
        yield "encoding images", [PhaseOption(self._encoding_images, runs=None if found is None else found.to_encode)]
        yield from self.training_phases(micro_batch, held)
        yield "export", self._exporting()

    def download_bytes(self) -> dict[str, float]:
        """Of the base, and of the captioner where an image has no caption."""
        found = meta.download_bytes(self.base)
        if self.examples is None or self.examples.to_caption:
            found |= captioner.download_bytes(self.caption.model)
        return found

    def cpu_memory(self, *, export_on_cpu: bool) -> dict[str, float]:
        """Of weights on their way to the GPU, and of models that are compared."""
        weights = sum(weight.numel() for weight in self.model.parameters())
        placed = self._export_placement()
        if file := hub.single_file(self.base.base):  # its tensors are renamed and cut up first
            loading = float(file.stat().st_size)
        else:  # diffusers quantises on the GPU
            loading = float(block_offload.frozen_bytes(self.model)) if self.base.quantize is Quantize.none else 0.0
        in_fp32 = placed.offload and placed.dtype is torch.float32
        export = policy.fp32_cpu_bytes(weights, self.room) if in_fp32 else loading
        compared = 4.0 * weights if export_on_cpu else 0.0
        return {
            "loading the base": loading,
            "export": max(export, compared),
            "loading the text encoders": float(block_offload.weight_bytes(meta.text_encoders(self.base))),
        }

    @cached_property
    def _captioning(self) -> Trace:
        settings = self.caption
        tracer = Tracer(self.tracer.dtype, like_cuda=self.tracer.like_cuda)
        model = tracer.fakify(captioner.model_without_weights(settings.model, tracer.dtype))
        beams, tokens = settings.num_beams, settings.max_new_tokens
        return tracer.run(
            model, lambda: captioner.trace_step(model, batch=settings.batch, beams=beams, new_tokens=tokens)
        )

    def _encoding_texts(self) -> Iterator[PhaseOption]:
        """As `TextEncoder` goes about it."""
        captions, texts = self.family.captions_per_pass, None if self.examples is None else self.examples.to_encode
        yield PhaseOption(self._reading(captions), runs=None if texts is None else math.ceil(texts / captions))
        if self.cuda and captions > 1:
            yield PhaseOption(self._reading(1), "fewer captions at once", runs=texts)
        if self.cuda:
            yield PhaseOption(None, ELSEWHERE)

    def _reading(self, captions: int) -> Trace:
        if captions in self.readings:
            return self.readings[captions]
        tracer = Tracer(torch.float32, like_cuda=self.tracer.like_cuda)
        encoders = tracer.fakify(meta.text_encoders(self.base))

        def work() -> None:
            for part, encoder in encoders.named_children():
                ids_BL = torch.zeros(captions, self.family.text_tokens[part], dtype=torch.long)
                encoder(input_ids=ids_BL, output_hidden_states=True)

        self.readings[captions] = tracer.run(encoders, work)
        return self.readings[captions]

    @cached_property
    def _encoding_images(self) -> Trace:
        return self.tracer.run(
            self.vae, lambda: self.family.moments(self.vae, torch.empty(1, 3, self.height, self.width))
        )

    def _forward(self, micro_batch: int, held: Mapping[str, float]) -> Trace:
        def work() -> None:
            with self.tracer.autocast():
                batch = self.inputs(micro_batch)
                task.errors(self.objective, self.forward(batch), batch)

        return self._evaluated(self.model, work, held)

    def _sampling(self, micro_batch: int, held: Mapping[str, float]) -> Iterator[PhaseOption]:
        """Previews in training, where the optimiser is there too, as `ImageSampler` goes about them.

        Its time is that of a validation's forward pass, whose images are as large, for each image and step.
        """
        sample = self.sample
        drawn = 2 * len(sample.prompts) * len(sample.seeds)  # without the adapter and with it
        drawn += self.previews * min(sample.previews, len(sample.prompts))
        rows = drawn * sample.steps * (2 if self._guided() else 1)
        option = partial(PhaseOption, runs=rows / micro_batch, timed=self._forward(micro_batch, held))
        previews = min(IMAGE_BATCH, sample.previews, len(sample.prompts))
        count = max(previews, images_at_once(self.base.resolution, len(sample.seeds)))
        yield option(self._drawing(count, self.vae, held))
        while self.cuda and count > 1:
            count //= 2
            words = f"{count} images at once" if count > 1 else ONE
            yield option(self._drawing(count, self.vae, held), words)
        if self.cuda and self.base.resolution > tiling.TILE:
            tiled = self.tracer.fakify(meta.autoencoder(self.base))
            tiling.enable_tiling(tiled)
            yield option(self._drawing(1, tiled, held), f"{ONE}, decoded in tiles")

    def _guided(self) -> bool:
        """Whether an image is drawn with and without its prompt."""
        return self.sample.guidance > 1 and self.family.takes_negative

    def _drawing(self, count: int, vae: nn.Module, held: Mapping[str, float]) -> Trace:
        side = self.base.resolution
        latents = self._latents(side, side)

        def work() -> None:
            with self.tracer.autocast():
                rows = count * (2 if self._guided() else 1)
                timesteps_B = torch.zeros(rows, dtype=torch.long)
                self.family.predict(self.model, torch.empty(rows, *latents), timesteps_B, self._texts(rows))
            self.family.decode(vae, self.family.pack_latents(torch.empty(count, *latents)), side, side)

        if self.cuda:
            pixels = side * side * (count if count * side * side <= tiling.MAX_BATCH_PIXELS else 1)
            if tiling.is_tiled(vae):
                pixels = min(pixels, tiling.TILE**2)
            held = dict(held) | {"workspace": WORKSPACE_GIB_PER_MEGAPIXEL * pixels * 2**10}
            others = "" if self.family.decode_workspace_measured else " with other autoencoders"
            self._note(f"sampling: what cuDNN takes to decode images is as measured on an H200{others}")
        return self._evaluated(nn.ModuleList([self.model, vae]), work, held)

    def _exporting(self) -> Iterator[PhaseOption]:
        weights = sum(weight.numel() for weight in self.model.parameters())
        yield PhaseOption(self._export(), runs=1 + IMAGE_FORMATS, moved=2.0 * weights)  # the base is read once
        if self._export_placement().cpu_fallback:
            yield PhaseOption(None, ELSEWHERE)

    def _export_placement(self) -> policy.Placement:
        weights = sum(parameter.numel() for parameter in self.model.parameters())
        return policy.image_export(self.base, self.tracer.dtype, cuda=self.cuda, weights=weights, room=self.room)

    def _export(self) -> Trace:
        """One model at a time, as `policy.image_export` places it."""
        dtype = self._export_placement().dtype
        tracer = Tracer(dtype, like_cuda=self.cuda)
        model = tracer.fakify(self._adapted(dtype)).eval()
        latents = (2, self.latents[0], export.PROBE_SIDE, export.PROBE_SIDE)

        def work() -> None:
            with tracer.autocast():
                self.family.predict(model, torch.empty(latents), torch.zeros(2, dtype=torch.long), self._texts(2))

        return tracer.run(model, work, held=self._offloaded(model))

    def _offloaded(self, model: nn.Module) -> dict[str, float]:
        if not (self.base.offload and self.cuda):
            return {}
        # diffusers quantises on the GPU, where the model takes room while its blocks are sent away.
        there = 0 if self.base.quantize is Quantize.none else block_offload.weight_bytes(model)
        return block_offload.planned_bytes(model, self.room - there)

    def _evaluated(self, model: nn.Module, work: Any, held: Mapping[str, float]) -> Trace:
        self.model.eval()
        try:
            return self.tracer.run(model, work, held=held)
        finally:
            self.model.train()

    def _adapted(self, dtype: torch.dtype) -> nn.Module:
        adapted = meta.adapted(self.base, self.lora, dtype, self.seed)
        if self.base.quantize is Quantize.none:
            return adapted
        return planning_meta.quantised(adapted, self.base.quantize)

    def _note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)

    def _latents(self, width: int, height: int) -> tuple[int, ...]:
        return tuple(self.tracer.shape(lambda: self.family.moments(self.vae, torch.empty(1, 3, height, width))[0])[1:])

    def _texts(self, count: int) -> dict[str, Tensor]:
        shapes = self.family.text_shapes(_config(self.model))
        return {name: torch.empty(count, *shape) for name, shape in shapes.items()}


def _config(model: Any) -> Any:
    return model.config


def _largest_bucket(model: ModelConfig, max_aspect: float) -> buckets.Bucket:
    shapes = buckets.make(model.resolution, step=model.bucket_step, max_aspect=max_aspect)
    return max(shapes, key=lambda bucket: bucket[0] * bucket[1])
