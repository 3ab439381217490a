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
