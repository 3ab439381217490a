"""What a video command leaves: plain values, without the libraries that made them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Annotated:
    """What was found in a video. seconds: of video. per_second: frames a second of each stage, and of the whole.
    classes: all that the detector knows; counts: tracks by class."""

    video: str
    sha256: str
    input_hash: str
    width: int
    height: int
    seconds: float
    frames: int
    looks: int
    objects: int
    scenes: tuple[float, ...]
    model: str
    threshold: float
    classes: tuple[str, ...]
    counts: dict[str, int]
    per_second: dict[str, float]
    damage: int
    cut_off: bool


@dataclass(frozen=True)
class Extracted:
    """Images out of a video. candidates: stretches of a scene, each with its sharpest frame. frames: those of them that
    were sharp and unlike the others. images: what was written; validation: those of them that are held out."""

    video: str
    folder: str
    scenes: int
    candidates: int
    frames: int
    images: int
    validation: int
