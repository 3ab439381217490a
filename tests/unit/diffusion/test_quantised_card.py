"""The code on the card of an adapter on a quantised base gives the base and the adapter that were compared.

Diffusers asks for a GPU before it quantises; bitsandbytes has kernels for CPUs too, and everything else is as it is.
"""

from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import pytest
from diffusers.quantizers.bitsandbytes import bnb_quantizer

from finetune.config.schema import Config, ExportFormat, Precision, Quantize
from finetune.run.records import Dataset
from tests import quantised_card
from tests.single_files import save_single_file


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for quantizer in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda *_, **__: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda _, devices: devices or {"": "cpu"})
    # On a CPU with AVX512-BF16, bitsandbytes would take its layout of its own, which GPUs don't have.
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)


def test_of_a_folder_in_4_bits(
    config: Config, make_dataset: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    config.model.quantize, config.trainer.precision = Quantize.nf4, Precision.bf16
    config.export.formats = [ExportFormat.peft, ExportFormat.diffusers]
    quantised_card.check(config, make_dataset(), monkeypatch)


def test_of_a_single_file_in_8_bits(
    config: Config,
    make_dataset: Callable[..., Dataset],
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config.model.quantize, config.export.formats = Quantize.int8, [ExportFormat.peft]
    file = save_single_file(tiny_base, tmp_path / "base.safetensors", "sd", None)
    config.model.base, config.model.parts = str(file), str(tiny_base)
    quantised_card.check(config, make_dataset(), monkeypatch)
