"""The code on the card of an image adapter on a quantised base, run as somebody runs it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.config.schema import Config, Quantize
from finetune.diffusion.pipeline import load_adapter, load_backbone
from finetune.memory.device import pick_dtype
from finetune.run.records import Dataset
from finetune.stages.export import export
from finetune.stages.train import train

# Of what the adapter changes. 16 bit and int8 round, and diffusers keeps an adapter in bf16 where PEFT keeps it in
# fp32: the same adapter in two files differs by up to 0.033 on a CPU. One that is missing, or at half strength, differs
# by 0.5 and more. What is stored is compared bit for bit: it differs from the plain base by no more than rounding does.
ROUNDING = 0.1


def check(config: Config, data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, export and run the card's code beside `adapter/`: base and adapter are those that were compared."""
    config.lora.targets, config.optim.lr, config.sample.prompts = "attention", 0.03, ["a red robot"]
    page = Path(export(config, train(config, data)).folder, "README.md").read_text()
    monkeypatch.chdir(config.run_dir)
    device = torch.device(config.hardware.device.name)
    names: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0].replace('"cuda"', f'"{device}"'), names)
    assert Path("image.png").is_file()
    shown = names["pipeline"].unet
    base = load_backbone(config.model, pick_dtype(config.trainer.precision, device), device)
    assert config.model.quantize is not Quantize.none
    assert shown.config.quantization_config.to_dict() == base.config.quantization_config.to_dict()
    untuned = predicted(base)
    trained = load_adapter(config.model, base, Path("adapter", "peft"))
    theirs, ours = stored(shown), stored(trained)
    assert theirs.keys() == ours.keys()
    assert [name for name, weight in ours.items() if not equal(theirs[name], weight)] == []
    effect = (predicted(trained) - untuned).norm()
    assert effect > 0.2 * untuned.norm()
    assert (predicted(shown) - predicted(trained)).norm() < ROUNDING * effect


def stored(unet: Any) -> dict[str, Tensor]:
    """The weights of the base, with the scales of those that are quantised."""
    weights = unet.state_dict().items()
    return {name.replace(".base_layer", ""): weight for name, weight in weights if ".lora_" not in name}


def equal(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


@torch.no_grad()
def predicted(unet: Any) -> Tensor:
    """What it predicts for fixed random inputs, in fp32 on the CPU."""
    random = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 4, 8, 8, generator=random), torch.randn(1, 77, 16, generator=random)
    device, dtype = unet.device, unet.dtype
    step = torch.tensor([5], device=device)
    sample: Tensor = unet.eval()(latents.to(device, dtype), step, encoder_hidden_states=text.to(device, dtype)).sample
    return sample.float().cpu()
