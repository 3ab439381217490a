"""The captioner, with a tiny random BLIP saved and loaded as a released one is."""

import gc
import weakref

import pytest
import torch
from PIL import Image

from finetune.diffusion.captioner import Captioner
from finetune.errors import ModelError
from tests.tiny_models import save_captioner

CPU = torch.device("cpu")
DIFFUSION = [
    Image.new("RGB", size, colour) for size, colour in [((40, 30), "red"), ((9, 90), "blue"), ((64, 64), "tan")]
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_captioner(tmp_path_factory.mktemp("captioner")))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_one_plain_caption_a_picture_and_always_the_same(model, num_beams):
    captioner = Captioner(model, CPU, torch.float32)
    first = captioner.caption(DIFFUSION, 8, num_beams)
    torch.manual_seed(99)
    again = [captioner.caption([image], 8, num_beams)[0] for image in DIFFUSION]
    assert first == again
    assert len(first) == 3
    assert all(text == text.strip() and "[" not in text and len(text.split()) <= 8 for text in first)


def test_length_is_limited(model):
    captioner = Captioner(model, CPU, torch.float32)
    assert all(len(text.split()) <= 2 for text in captioner.caption(DIFFUSION, 2, 1))


def test_half_precision_weights(model):
    captioner = Captioner(model, CPU, torch.bfloat16)
    assert {weight.dtype for weight in captioner.model.parameters()} == {torch.bfloat16}
    assert len(captioner.caption(DIFFUSION, 4, 1)) == 3


def test_the_model_is_gone_after(model):
    captioner = Captioner(model, CPU, torch.float32)
    captioner.caption(DIFFUSION, 4, 1)
    weights = weakref.ref(next(captioner.model.parameters()))
    del captioner
    gc.collect()
    assert weights() is None


def test_a_folder_without_a_captioner(tmp_path):
    with pytest.raises(ModelError, match=r"holds no config\.json \(of a language model or captioner\); "):
        Captioner(str(tmp_path), CPU, torch.float32)
