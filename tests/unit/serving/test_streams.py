"""How many replies of which length fit a GPU is said before anything is loaded; the GPU here is a pretended one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finetune.config.schema import Config, Device, ModelConfig, Quantize
from finetune.errors import ConfigError
from finetune.language import causal_lm
from finetune.planning.machine import GIB, Machine
from finetune.serving import streams
from finetune.serving.adapters import Source
from finetune.stages.serve import serving
from tests.tiny_language_models import save_language

GPU = Machine("a small GPU", True, 1.0, 0.5, True, 165.2, 82.6, 1008, 20.0, known=True)
TOKEN_BYTES = 2 * 2 * 2 * 8 * 2  # keys and values of 2 layers with 2 heads of 8 channels in 16 bit
ROWS, READS = 8, 256
SEVERAL = {"rows": ROWS, "context": 0, "max_new_tokens": 40}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return ModelConfig(kind="language", base=str(save_language(tmp_path_factory.mktemp("base"))))


@pytest.fixture(scope="module")
def gib(model: ModelConfig) -> Callable[[int, int], float]:
    return streams._Base(model, torch.bfloat16, GPU, 0.0).gib


def with_gib(vram_gib: float) -> Machine:
    return replace(GPU, vram_gib=vram_gib)


def test_every_row_takes_its_keys_and_values(gib: Callable[[int, int], float]) -> None:
    least = 32 * READS * TOKEN_BYTES
    assert least <= (gib(64, READS) - gib(32, READS)) * GIB <= 4 * least  # a layer in work is half of this base
    assert gib(1, 64) < gib(1, 256) < gib(2, 256)


def test_replies_get_as_long_as_there_is_room_for(
    model: ModelConfig, gib: Callable[[int, int], float], capsys: pytest.CaptureFixture[str]
) -> None:
    enough = with_gib(gib(ROWS, READS))
    assert streams.longest_replies(model, torch.bfloat16, enough, 0.0, **SEVERAL) == READS
    assert streams.longest_replies(model, torch.bfloat16, enough, 0.0, **SEVERAL | {"context": 100}) == 100
    assert capsys.readouterr().err == ""
    small = with_gib((gib(ROWS, 128) + gib(ROWS, 256)) / 2)
    found = streams.longest_replies(model, torch.bfloat16, small, 0.0, **SEVERAL)
    assert 128 < found < 256
    assert gib(ROWS, found) <= small.vram_gib
    said = capsys.readouterr().err
    assert f"serve: replies of {found} tokens, prompts included, fit with serve.batch=8 (a small GPU has" in said
    assert "this base reads 256: for longer ones lower serve.batch" in said


def test_what_does_not_fit_is_refused_with_what_does(model: ModelConfig, gib: Callable[[int, int], float]) -> None:
    small = with_gib(gib(ROWS // 2, READS))
    with pytest.raises(
        ConfigError, match=r"replies of 256 tokens take .* GiB with serve.batch=8, .* try serve\.batch="
    ) as no:
        streams.longest_replies(model, torch.bfloat16, small, 0.0, **SEVERAL | {"context": READS})
    offered = int(str(no.value).rpartition("=")[2])
    assert ROWS // 4 < offered <= ROWS // 2
    assert gib(offered, READS) <= small.vram_gib
    with pytest.raises(ConfigError, match=r"one alone doesn't fit either; try model\.quantize=nf4"):
        streams.longest_replies(model, torch.bfloat16, with_gib(0.5), 0.0, **SEVERAL | {"rows": 2})
    quantised = replace(model, quantize=Quantize.nf4)
    with pytest.raises(ConfigError, match="try a smaller base"):
        streams.longest_replies(quantised, torch.bfloat16, with_gib(0.5), 0.0, **SEVERAL | {"rows": 1})


def test_adapters_and_the_precision_of_the_base_count(model: ModelConfig, tmp_path: Path) -> None:
    nf4 = streams._Base(replace(model, quantize=Quantize.nf4), torch.bfloat16, GPU, 0.0)
    int8 = streams._Base(replace(model, quantize=Quantize.int8), torch.bfloat16, GPU, 0.0)
    plain = streams._Base(model, torch.bfloat16, GPU, 0.0)
    loaded = [base.tracer.run(base.model, lambda: torch.empty(1)).held["weights"] for base in (nf4, int8, plain)]
    assert loaded == sorted(loaded)
    assert loaded[0] < loaded[2]
    with_adapters = streams._Base(model, torch.bfloat16, GPU, 1024.0**2)
    assert (with_adapters.gib(1, 64) - plain.gib(1, 64)) * GIB == pytest.approx(1024**2)
    assert Source("gone", tmp_path, None).loaded_bytes == 0, "who asks for it is told"


def test_a_base_that_can_not_be_planned_is_served_all_the_same(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(streams, "new_cache", lambda: None)  # as if the layers kept something else
    assert streams.longest_replies(model, torch.bfloat16, GPU, 0.0, **SEVERAL | {"context": 100}) == 100
    assert "serve: this base can't be planned" in capsys.readouterr().err


def test_a_server_is_refused_before_anything_is_loaded(
    language_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(causal_lm, "load_model", load)
    config = language_config
    config.serve.port, config.hardware.device = 0, Device.auto
    config.hardware.gpu, config.hardware.vram_gib = "a small GPU", 0.5
    for key in ("tflops", "fp32_tflops", "gb_per_s", "pcie_gb_per_s"):
        setattr(config.hardware, key, 1.0)
    with pytest.raises(ConfigError, match=r"and a small GPU has 0\.5 GiB; one alone doesn't fit"), serving(config):
        pass
