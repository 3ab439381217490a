"""Export a diffusion adapter in every format, and verify each file by loading it into a fresh base."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.adapters import formats as files
from finetune.adapters import lora as lora_layers
from finetune.config.model_kinds import MODEL_KINDS
from finetune.config.rules import require_all
from finetune.config.schema import ExportFormat, LoraConfig, ModelConfig, Quantize
from finetune.diffusion.families import family
from finetune.diffusion.families.spec import MASK, BaseVersion
from finetune.diffusion.pipeline import load_adapter, load_backbone, load_scheduler, save_adapter
from finetune.errors import ExportError
from finetune.memory import policy
from finetune.memory.device import release_memory, usable_bytes
from finetune.run.hashing import hash_of
from finetune.run.progress import say

EMA_FILE = "pytorch_lora_weights_ema.safetensors"
PROBE_SEED = 20240131  # any fixed number: the inputs of the comparison
PROBE_SIDE = 16  # latent pixels


@dataclass(frozen=True)
class Exporter:
    """Exports adapters of one base. dtype: of training. name: of kohya-style files, with their `metadata`. content: of
    the base."""

    model: ModelConfig
    content: str
    lora: LoraConfig
    device: torch.device
    dtype: torch.dtype
    vram_gib: float
    seed: int
    name: str
    metadata: Mapping[str, str]

    def export(
        self,
        weights: Mapping[str, Tensor],
        averaged: Mapping[str, Tensor] | None,
        folder: Path,
        *,
        formats: Sequence[ExportFormat],
        tolerance: float,
    ) -> tuple[dict[str, str], dict[str, float]]:
        """Write the adapter into `folder` in each of `formats`, and its average, if there is one, in diffusers'.

        Returns the files by format (relative to `folder`) and, by format, ‖loaded − trained‖ / ‖trained‖ of the output
        in fp32 on fixed inputs. Raises ExportError if one is over `tolerance`.
        """
        trained = self._trained(weights)
        found = {name.name: WRITERS[name](self, trained, weights, folder) for name in formats}
        probe = self._probe()
        reference = probe(trained)
        extra = {}
        if averaged is not None:
            extra["ema"] = save_adapter(self.model, trained, folder, averaged, EMA_FILE).name
        del trained  # two of them don't fit every GPU
        release_memory()
        effect = _relative(probe(self._base()), reference)
        if effect <= tolerance:
            say(f"warning: the adapter changes the output by only {effect:.1e}; was it trained long enough?")
        differences = {}
        for name, file in found.items():
            release_memory()
            loaded = load_adapter(self.model, self._base(), folder / file)
            differences[name] = _relative(probe(loaded), reference)
            del loaded
            if not differences[name] <= tolerance:  # NaN fails too
                raise ExportError(
                    f"the {name} adapter {folder / file} does not reproduce the trained one: "
                    f"relative difference {differences[name]:.1e}, allowed {tolerance:.1e} (export.tolerance)"
                )
        return found | extra, differences

    def _trained(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """The trained module, rebuilt from the base and the checkpoint's weights."""
        targets = self.model.lora_targets[self.lora.targets]
        model = lora_layers.inject(self._base(), self.lora, targets, seed=self.seed)
        lora_layers.load_state(model, weights, "the checkpoint")
        return model.eval()

    def _base(self) -> nn.Module:
        """The base to compare on, as `policy.image_export` places it."""
        cuda, room = self.device.type == "cuda", usable_bytes(self.device, self.vram_gib)
        placed = policy.image_export(self.model, self.dtype, cuda=cuda, weights=0, room=room)
        if placed.offload:
            return load_backbone(self.model, placed.dtype, self.device, vram_gib=self.vram_gib)
        base = load_backbone(self.model, self.dtype, self.device, vram_gib=self.vram_gib)
        count = sum(weight.numel() for weight in base.parameters())
        placed = policy.image_export(self.model, self.dtype, cuda=cuda, weights=count, room=room)
        return base if self.model.quantize is not Quantize.none else base.to(placed.dtype)

    def _probe(self) -> Callable[[nn.Module], Tensor]:
        """A function that gives any backbone of this base the same random latents and texts, at two noise levels."""
        spec, device = family(self.model.family), self.device

        @torch.no_grad()
        def run(model: Any) -> Tensor:
            random = torch.Generator().manual_seed(PROBE_SEED)
            shape = (2, spec.latent_channels(model.config), PROBE_SIDE, PROBE_SIDE)
            latents_BChw = torch.randn(shape, generator=random)
            text = {
                name: (torch.ones(2, *shape) if name == MASK else torch.randn((2, *shape), generator=random)).to(device)
                for name, shape in sorted(spec.text_shapes(model.config).items())
            }
            dtype = next(weight.dtype for weight in model.parameters() if weight.is_floating_point())
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
                timesteps_B = torch.tensor([100, 800], device=device)
                predicted = spec.predict(model, latents_BChw.to(device), timesteps_B, text)
            return predicted.float()

        return run


def _write_peft(exporter: Exporter, trained: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> str:
    files.save_peft(trained, folder / "peft", weights, exporter.model.base, exporter.content)
    return "peft"


def _write_diffusers(exporter: Exporter, trained: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> str:
    return save_adapter(exporter.model, trained, folder, weights).name


def _write_kohya(exporter: Exporter, trained: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> str:
    spec, file = family(exporter.model.family), folder / kohya_file(exporter.name)
    version = spec.base_version(trained.config, load_scheduler(exporter.model).config)
    metadata = {**exporter.metadata, **version_metadata(version), files.BASE_CONTENT: exporter.content}
    return files.save_kohya(file, weights, spec.kohya_prefix, exporter.lora.alpha, metadata).name


WRITERS: dict[ExportFormat, Callable[[Exporter, nn.Module, Mapping[str, Tensor], Path], str]] = {
    ExportFormat.peft: _write_peft,
    ExportFormat.diffusers: _write_diffusers,
    ExportFormat.kohya: _write_kohya,
}
"""Each writes the adapter into a folder and returns the name of its file or folder there."""
require_all(MODEL_KINDS["diffusion"].export_formats, WRITERS, "diffusion.export.WRITERS")


def kohya_file(name: str) -> str:
    """What the kohya-style file of an adapter of that name is called."""
    return f"{name}.safetensors"


def kohya_metadata(
    name: str, base: str, lora: LoraConfig, trigger: str, training_hash: str, steps: int
) -> dict[str, str]:
    """What a stranger who finds the file needs; the ss_ keys are those other programs show."""
    return {
        "recipe": name,
        "base": base,
        "rank": str(lora.rank),
        "alpha": str(lora.alpha),
        "trigger_phrase": trigger,
        "training_hash": training_hash,
        "steps": str(steps),
        "adapter_id": hash_of(name, training_hash)[:16],
        "ss_sd_model_name": base,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(lora.rank),
        "ss_network_alpha": str(lora.alpha),
        "ss_output_name": name,
        "modelspec.title": name,
    }


def version_metadata(version: BaseVersion) -> dict[str, str]:
    """What programs filter adapters by: keys of sd-scripts and of Stability AI's ModelSpec."""
    return {
        "ss_base_model_version": version.name,
        "ss_v2": str(version.v2),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{version.architecture}/lora",
        "modelspec.implementation": "diffusers",
    }


def _relative(value: Tensor, reference: Tensor) -> float:
    return float(torch.linalg.vector_norm(value - reference) / torch.linalg.vector_norm(reference))
