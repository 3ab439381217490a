"""The code on the card of an adapter on a quantised base, as somebody with a GPU runs it: it gives the trained model.

`tests/unit/diffusion/test_quantised_card.py` runs two of the cases of images by the CPU kernels of bitsandbytes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config.schema import Config, Device, ExportFormat, Precision, Quantize
from finetune.language import tokenize
from finetune.run.records import Dataset
from finetune.stages.export import export
from finetune.stages.train import train
from tests import quantised_card
from tests.single_files import save_single_file

pytestmark = pytest.mark.gpu
SAME, CHANGED = 0.02, 0.05  # KL divergence; relative to what is predicted
QUANTISED = [Quantize.nf4, Quantize.int8]


@pytest.mark.parametrize("source", ["folder", "single file"])
@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp32])
@pytest.mark.parametrize("quantize", QUANTISED)
def test_of_an_image_adapter(
    config: Config,
    make_dataset: Callable[..., Dataset],
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quantize: Quantize,
    precision: Precision,
    source: str,
) -> None:
    config.hardware.device, config.trainer.precision, config.model.quantize = Device.cuda, precision, quantize
    if source == "single file":
        file = save_single_file(tiny_base, tmp_path / "base.safetensors", "sd", None)
        config.model.base, config.model.parts = str(file), str(tiny_base)
    quantised_card.check(config, make_dataset(), monkeypatch)


@pytest.mark.parametrize("template", ["", "chatml"])
@pytest.mark.parametrize("quantize", QUANTISED)
def test_of_a_language_adapter(
    language_config: Config, monkeypatch: pytest.MonkeyPatch, quantize: Quantize, template: str
) -> None:
    config = language_config
    config.hardware.device, config.trainer.precision = Device.cuda, Precision.bf16
    config.model.quantize, config.data.chat_template = quantize, template
    config.optim.lr, config.export.formats = 0.1, [ExportFormat.peft]
    adapter = export(config, train(config, tokenize.build(config, None)))
    assert adapter.differences["peft"] < SAME
    model = executed(adapter.folder, config.run_dir, monkeypatch)["model"]
    ids = torch.tensor([tokenize.chat_of(config.model, config.data).prompt_ids("How many cats?")], device=model.device)
    with torch.no_grad():
        trained = model.eval()(ids).logits.float()
        with model.disable_adapter():
            untuned = model(ids).logits.float()
    assert (trained - untuned).norm() > CHANGED * trained.norm()


def executed(folder: str, run_dir: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the card's code leaves behind, run beside `adapter/`."""
    page = Path(folder, "README.md").read_text()
    monkeypatch.chdir(run_dir)
    names: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    return names
