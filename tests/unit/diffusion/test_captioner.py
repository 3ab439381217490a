"""The captioner, with a tiny random BLIP saved and loaded as a released one is."""

import gc
import weakref

import pytest
import torch
from PIL import Image

from finetune.config.schema import CaptionConfig
from finetune.diffusion.captioner import Blip, load_captioner, model_without_weights, trace_step
from finetune.errors import ModelError
from finetune.planning.tracer import Tracer
from tests.tiny_language_models import save_language
from tests.tiny_models import save_captioner

CPU = torch.device("cpu")
IMAGES = [Image.new("RGB", size, colour) for size, colour in [((40, 30), "red"), ((9, 90), "blue"), ((64, 64), "tan")]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_captioner(tmp_path_factory.mktemp("captioner")))


def load(model, dtype=torch.float32, *, tokens=8, beams=1):
    return load_captioner(CaptionConfig(model=str(model), max_new_tokens=tokens, num_beams=beams), CPU, dtype)


def captions(captioner, images):
    return captioner.caption([captioner.read(image) for image in images])


@pytest.mark.parametrize("num_beams", [1, 3])
def test_one_plain_caption_an_image_and_always_the_same(model, num_beams):
    captioner = load(model, beams=num_beams)
    first = captions(captioner, IMAGES)
    torch.manual_seed(99)
    again = [captions(captioner, [image])[0] for image in IMAGES]
    assert first == again
    assert len(first) == 3
    assert all(text == text.strip() and "[" not in text and len(text.split()) <= 8 for text in first)


def test_length_is_limited(model):
    assert all(len(text.split()) <= 2 for text in captions(load(model, tokens=2), IMAGES))


def test_half_precision_weights(model):
    captioner = load(model, torch.bfloat16, tokens=4)
    assert isinstance(captioner, Blip)
    assert {weight.dtype for weight in captioner.model.parameters()} == {torch.bfloat16}
    assert len(captions(captioner, IMAGES)) == 3


def test_the_model_is_gone_after(model):
    captioner = load(model, tokens=4)
    captions(captioner, IMAGES)
    weights = weakref.ref(next(captioner.model.parameters()))
    del captioner
    gc.collect()
    assert weights() is None


def test_a_folder_without_a_captioner(tmp_path):
    with pytest.raises(ModelError, match=r"holds no config\.json \(of a language model or captioner\); "):
        load(tmp_path)


def test_a_model_that_is_no_captioner_is_named(tmp_path):
    folder = save_language(tmp_path / "llama")
    with pytest.raises(ModelError, match=r"is a llama model; captions are made by: blip; try caption="):
        load(folder)
    with pytest.raises(ModelError, match=r"is a llama model; captions are made by: blip"):
        model_without_weights(str(folder), torch.float32)


def test_without_weights_it_is_the_model_that_is_loaded(model):
    loaded, empty = load(model, torch.bfloat16).model, model_without_weights(model, torch.bfloat16)
    assert {name: (weight.shape, weight.dtype) for name, weight in empty.named_parameters()} == {
        name: (weight.shape, weight.dtype) for name, weight in loaded.named_parameters()
    }
    tracer = Tracer(torch.bfloat16, like_cuda=False)
    traced = tracer.fakify(empty)

    def peak_bytes(batch):
        trace = tracer.run(traced, lambda: trace_step(traced, batch=batch, beams=3, new_tokens=5))
        return max(kernel.live for kernel in trace.kernels)

    assert 0 < peak_bytes(1) < peak_bytes(8)
