"""What a video command leaves: plain values, without the libraries that made them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Annotated:
    """What was found in a video. seconds: of video. per_second: frames a second of each stage, and of the whole.
    classes: all that the detector knows; counts: tracks by class. damage: in words; empty where there is none. files:
    beside report and record.
    """

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
    damage: str
    files: tuple[str, ...]

    @property
    def found(self) -> str:
        """Tracks by class: one thing has several where it was hidden, or looked at too seldom."""
        if not self.counts:
            return f"nothing with a score of {self.threshold:g} or more"
        return f"tracks of {', '.join(f'{count} {name}' for name, count in self.counts.items())}"

    @property
    def speed(self) -> str:
        """Of the whole, and of each stage without waiting."""
        speed = self.per_second
        film = f", encode {speed['encode']:g} frames/s" if "labelled.mp4" in self.files else ""
        stages = f"decode {speed['decode']:g} frames/s, detect {speed['detect']:g} looks/s{film}"
        return f"{speed['together']:g} frames/s; alone {stages}"


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
