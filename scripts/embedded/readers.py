"""Independent readers: small classifiers that say what a picture shows, or in which style, and how to load them.

They learn from renders alone and never see a model's samples. B pictures of 3×P×P, K labels of a head.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

READER_PX = 128
WIDTHS = (24, 48, 96, 112)
BATCH = 250


class Reader(nn.Module):
    """A residual network of four halvings with one linear head for each question."""

    def __init__(self, labels: Mapping[str, tuple[str, ...]]) -> None:
        super().__init__()
        self.labels = dict(labels)
        layers: list[nn.Module] = []
        for before, width in zip((3, *WIDTHS), WIDTHS, strict=False):
            layers += [Halving(before, width), Residual(width)]
        self.body = nn.Sequential(*layers)
        # The mean tells the setting, the maximum a small thing.
        self.heads = nn.ModuleDict({name: nn.Linear(2 * WIDTHS[-1], len(names)) for name, names in labels.items()})

    def forward(self, images_B3PP: Tensor) -> dict[str, Tensor]:
        """Pictures with values 0…1 at READER_PX to logits [B, K] by head."""
        pooled_BF = self.features(images_B3PP)
        return {name: head(pooled_BF) for name, head in self.heads.items()}

    def features(self, images_B3PP: Tensor) -> Tensor:
        """[B, F], what every head sees."""
        features = self.body(2.0 * images_B3PP - 1.0)
        return torch.cat([features.mean((2, 3)), features.amax((2, 3))], dim=1)


class Halving(nn.Sequential):
    def __init__(self, before: int, width: int) -> None:
        super().__init__(nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, features: Tensor) -> Tensor:
        return functional.relu(features + self.norm(self.conv(features)))


@torch.no_grad()
def read(reader: Reader, images_B3PP: Tensor) -> dict[str, list[str]]:
    """The likeliest label of each head for each picture.

    Takes uint8 or 0…1 floats of any size; returns {head: [label] * B}.
    """
    parts = [reader(pixels) for pixels in as_seen(reader, images_B3PP)]
    best = {name: torch.cat([part[name] for part in parts]).argmax(1).tolist() for name in reader.labels}
    return {name: [names[index] for index in best[name]] for name, names in reader.labels.items()}


@torch.no_grad()
def features_of(reader: Reader, images_B3PP: Tensor) -> Tensor:
    """Features [B, F], for uint8 or 0…1 floats of any size."""
    return torch.cat([reader.features(pixels) for pixels in as_seen(reader, images_B3PP)])


def as_seen(reader: Reader, images_B3PP: Tensor) -> Iterator[Tensor]:
    """The pictures in batches, as the reader takes them."""
    device = next(reader.parameters()).device
    for images in images_B3PP.split(BATCH):
        pixels = images.to(device)
        pixels = pixels.float() / 255.0 if images.dtype == torch.uint8 else pixels.float()
        if pixels.shape[-2:] != (READER_PX, READER_PX):
            pixels = functional.interpolate(pixels, (READER_PX, READER_PX), mode="bilinear", antialias=True)
        yield pixels


def save_reader(reader: Reader, path: Path) -> None:
    """fp16 safetensors, the labels in the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: _halve(tensor).cpu().contiguous() for name, tensor in reader.state_dict().items()}
    save_file(tensors, path, metadata={"labels": json.dumps(reader.labels)})


def load_reader(path: Path, device: str = "cpu") -> Reader:
    """The reader in `path`, in fp32, ready to `read`."""
    with safe_open(path, framework="pt") as file:
        labels = json.loads(file.metadata()["labels"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    reader = Reader({name: tuple(names) for name, names in labels.items()})
    reader.load_state_dict(tensors)
    return reader.float().to(device).eval()


def _halve(tensor: Tensor) -> Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor
