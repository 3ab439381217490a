"""How often the stages read, hash and decode images, by the benchmark's own counts."""

import pytest

from finetune.config.schema import CaptionConfig, Config, DataConfig, Device, HardwareConfig, ModelConfig
from scripts.bench.images import Counts, Path, counting, counts_of, write_image, write_images
from tests.tiny_models import save_captioner, save_diffusion

COUNT = 6


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return str(save_diffusion(folder / "base")), str(save_captioner(folder / "captioner"))


@pytest.fixture
def config(tmp_path, models):
    write_images(tmp_path / "images", COUNT)
    return Config(
        run_dir=str(tmp_path / "run"),
        model=ModelConfig(base=models[0], resolution=32, bucket_step=8),
        data=DataConfig(folder=str(tmp_path / "images"), cache=str(tmp_path / "cache")),
        caption=CaptionConfig(model=models[1], batch=4, max_new_tokens=3),
        hardware=HardwareConfig(device=Device.cpu),
    )


def work(counts: Counts):
    return counts.files, counts.hashes, counts.decodes


def test_images_with_captions_are_checked_and_encoded(config):
    config.data.flip = True  # a mirror image is encoded from the same decoded one
    assert work(counts_of(config)) == (2 * COUNT, 2 * COUNT, 2 * COUNT)
    assert work(counts_of(config)) == (0, 0, 0)
    write_image(Path(config.data.folder) / "00003.png", seed=99)
    assert work(counts_of(config)) == (2, 2, 2)
    assert work(counts_of(config)) == (0, 0, 0)


def test_images_without_captions_are_decoded_once_more_for_theirs(config):
    (Path(config.data.folder) / "metadata.jsonl").unlink()
    assert work(counts_of(config)) == (3 * COUNT, 2 * COUNT, 3 * COUNT)
    assert work(counts_of(config)) == (0, 0, 0)


def test_the_counts_count(tmp_path):
    write_images(tmp_path / "images", 1)
    file = tmp_path / "images" / "00000.png"
    with counting(tmp_path / "images") as counts:
        file.read_bytes()
        with open(file, "rb") as stream:
            stream.read()
    assert (counts.files, counts.bytes_read) == (2, 2 * file.stat().st_size)
    assert counts.row("x").count("|") == 7
