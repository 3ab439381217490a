"""What is drawn for an example depends on (seed, example, epoch) alone; the loss weights are those of the paper."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import kinds
from finetune.config.schema import Config
from finetune.data.cache import Cache
from finetune.diffusion.objectives import Denoising
from finetune.diffusion.task import DiffusionTask, draw_seed
from finetune.errors import ModelError
from finetune.run.records import Dataset
from tests.tiny_models import save_diffusion

CPU = torch.device("cpu")


def build(config: Config, dataset: Dataset) -> DiffusionTask:
    task = kinds.of(config).build_task(config, dataset, CPU)
    assert isinstance(task, DiffusionTask)
    return task


def test_noise_and_timestep_do_not_depend_on_batch_or_order(
    config: Config, make_dataset: Callable[..., Dataset]
) -> None:
    dataset = make_dataset()
    task = build(config, dataset)
    examples = [example for example in dataset.examples() if example.bucket == (32, 32)][:3]
    forward = task.collate([(example, 5) for example in examples])
    backward = task.collate([(example, 5) for example in reversed(examples)])
    for name, tensor in forward.tensors.items():
        assert torch.equal(tensor, backward.tensors[name].flip(0))
    assert not torch.equal(forward.tensors["noise"], task.collate([(e, 6) for e in examples]).tensors["noise"])


def test_validation_repeats_exactly_and_names_noise_levels(
    config: Config, make_dataset: Callable[..., Dataset]
) -> None:
    dataset = make_dataset()
    task = build(config, dataset)
    first = task.validate(2)
    torch.rand(5)
    assert task.validate(1) == pytest.approx(first, rel=1e-5)
    assert list(first) == ["mean", "t=100", "t=900"]
    assert first["mean"] == pytest.approx(sum(list(first.values())[1:]) / 2)


def test_images_to_validate_on_are_chosen_by_content_and_not_by_order(
    config: Config, make_dataset: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.diffusion.task.PROBE", 3)
    dataset = make_dataset(12, held_out=6)
    index = Path(dataset.index)
    lines = index.read_text().splitlines()
    chosen = []
    for order in (lines, lines[::-1]):
        index.write_text("\n".join(order) + "\n")
        chosen.append({example.key for example in build(config, dataset).validation})
    assert chosen[0] == chosen[1] == {f"{number:064x}" for number in (1, 2, 3)}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_prediction_has_no_loss(
    config: Config, make_dataset: Callable[..., Dataset], tmp_path_factory: pytest.TempPathFactory, prediction: str
) -> None:
    config.model.base = str(save_diffusion(tmp_path_factory.mktemp("base"), prediction_type=prediction))
    config.loss.min_snr_gamma = 0
    dataset = make_dataset()
    task = build(config, dataset)
    batch = task.collate([(next(dataset.examples()), 0)])
    clean, noise, timesteps = (batch.tensors[name] for name in ("clean", "noise", "timesteps"))
    assert isinstance(task.objective, Denoising)
    alpha = task.objective.alphas_cumprod[timesteps].sqrt().view(-1, 1, 1, 1)
    sigma = (1 - alpha**2).sqrt()
    truth = {"epsilon": noise, "v_prediction": alpha * noise - sigma * clean, "sample": clean}[prediction]
    task.model = lambda *_, **__: (truth,)  # type: ignore[assignment]
    assert float(task.loss(batch)) == pytest.approx(0, abs=1e-9)
    task.model = lambda *_, **__: (truth + 1,)  # type: ignore[assignment]
    assert float(task.loss(batch)) > 0.01


def test_caption_dropout_noise_offset_and_min_snr_are_used(
    config: Config, make_dataset: Callable[..., Dataset]
) -> None:
    dataset = make_dataset()
    example = next(dataset.examples())
    config.loss.caption_dropout = 0.999999
    dropped = build(config, dataset).collate([(example, 0)])
    assert not dropped.tensors["text.embedding"].any()
    config.loss.caption_dropout = 0.0
    plain = build(config, dataset).collate([(example, 0)])
    assert plain.tensors["text.embedding"].any()
    config.loss.noise_offset = 0.5
    shifted = build(config, dataset).collate([(example, 0)])
    difference = shifted.tensors["noise"] - plain.tensors["noise"]
    assert difference.std(dim=(2, 3)).max() < 1e-5
    assert difference.abs().max() > 0.05


def test_a_backbone_that_fails_is_named_before_anything_is_trained(
    config: Config, make_dataset: Callable[..., Dataset], tmp_path: Path
) -> None:
    config.model.base = str(save_diffusion(tmp_path / "base"))
    file = tmp_path / "base" / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"freq_shift": "x"}))
    with pytest.raises(ModelError, match=r"the unet of .*base failed"):
        build(config, make_dataset())


def test_captions_of_another_model_are_named_before_anything_is_trained(
    config: Config, make_dataset: Callable[..., Dataset], tmp_path: Path
) -> None:
    dataset = make_dataset()
    Cache(tmp_path / "cache").put(Path(dataset.empty_text).stem, {"embedding": torch.zeros(77, 24)})
    with pytest.raises(ModelError, match="its files may be damaged or of different models"):
        build(config, dataset)


def test_what_a_training_step_raises_stays_itself(config: Config, make_dataset: Callable[..., Dataset]) -> None:
    dataset = make_dataset()
    task = build(config, dataset)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError("not about a file")

    task.model.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        task.loss(task.collate([(next(dataset.examples()), 0)]))
    with pytest.raises(ZeroDivisionError):
        task.validate(1)


def test_seeds_are_spread() -> None:
    seeds = {draw_seed(seed, key, draw) for seed in range(5) for key in "abc" for draw in range(-1, 5)}
    assert len(seeds) == 90
