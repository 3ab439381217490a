"""What the video commands are told: `key=value` words over a recipe `conf/video/NAME.yaml` over the defaults here."""

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import yaml

from finetune.config import describe, recipes
from finetune.config.describe import as_dict
from finetune.config.schema import Device
from finetune.errors import ConfigError
from finetune.reading import at_home, read_text

S = TypeVar("S", "Annotate", "Frames")
MOST_RATE = 1000
EXPORTS = ("coco", "yolo", "cvat")
NO_DETECTOR = (
    "say which detector: detector=PekingU/rtdetr_v2_r18vd from the hub, the folder of one on this machine, or "
    "embedded:detector, which knows toys alone"
)


@dataclass(frozen=True)
class Annotate:
    """Settings of `finetune annotate`."""

    video: str = ""
    """The video file."""
    folder: str = ""
    """Instead of `video`: a folder; every video in it is annotated."""
    name: str = ""
    """Of the run; the video's or the folder's name where it is empty."""
    run_dir: str = ""
    """Where everything goes; outputs/NAME where it is empty."""
    rate: Fraction = Fraction(5)
    """Frames looked at per second of video, such as 5, 0.5 or 30000/1001."""
    detector: str = ""
    """A detector of the DETR family: a local folder, a hub id, or embedded:detector, which knows toys alone."""
    threshold: float = 0.5
    """Least score of an object, 0 to 1."""
    classes: tuple[str, ...] = ()
    """Only these classes, such as [person,car]; all where it is empty."""
    batch: int = 8
    """Frames that the detector looks at together."""
    device: Device = Device.auto
    """auto, cuda or cpu."""
    labelled: bool = True
    """Whether the video is written once more, with the boxes in it."""
    images: bool = False
    """Whether the frames that were looked at are kept as images, for coco and yolo."""
    exports: tuple[str, ...] = EXPORTS
    """Of coco, yolo, cvat."""
    workers: int = 0
    """Videos annotated at once, each worker on a GPU of its own; 0: as many as there are GPUs."""

    def problems(self) -> list[str]:
        wrong = [name for name in self.exports if name not in EXPORTS]
        return [
            *_source_problems(self),
            *([] if self.detector else [NO_DETECTOR]),
            *([f"exports={wrong[0]} is none of {', '.join(EXPORTS)}"] if wrong else []),
            *_out_of_range(self, batch=(1, 1024), workers=(0, 64)),
        ]


@dataclass(frozen=True)
class Frames:
    """Settings of `finetune frames`."""

    video: str = ""
    """The video file."""
    folder: str = ""
    """Where the images go: a new or empty folder, or one that this command filled before."""
    rate: Fraction = Fraction(2)
    """Images at most per second of video; of each stretch the sharpest frame is considered."""
    sharpness: float = 0.5
    """Least sharpness, as a share of the median of the video's frames."""
    difference: float = 0.06
    """Least difference from every image that was taken before, as a share of full contrast."""
    most: int = 500
    """Images at most; where there are more, scenes take turns and give their sharpest."""
    crops: tuple[str, ...] = ()
    """Classes whose objects become images of their own, such as [car]; whole frames where it is empty."""
    margin: float = 0.15
    """Around a crop, as a share of the object's larger side."""
    least_px: int = 64
    """Least shorter side of an image, in pixels."""
    validation_share: float = 0.2
    """Share of images held out for validation, in whole scenes."""
    detector: str = ""
    """Of crops; see `finetune annotate`."""
    threshold: float = 0.5
    """Least score of an object that is cropped, 0 to 1."""
    batch: int = 8
    """Frames that the detector looks at together."""
    device: Device = Device.auto
    """auto, cuda or cpu."""

    def problems(self) -> list[str]:
        missing = [
            f"{key}= is missing, such as {key}={example}"
            for key, example in FRAMES_NEED.items()
            if not getattr(self, key)
        ]
        if self.folder and Path(self.folder).name in ("", ".."):
            missing.append(
                f"folder={self.folder} is replaced as a whole; give its name: folder={FRAMES_NEED['folder']}"
            )
        ranges = {"sharpness": (0, 10), "difference": (0, 1), "margin": (0, 2), "validation_share": (0, 0.9)}
        if self.crops and not self.detector:
            missing.append(NO_DETECTOR)
        return [*missing, *_out_of_range(self, **ranges, most=(1, 10**6), least_px=(16, 4096), batch=(1, 1024))]


KINDS: dict[str, type[Any]] = {"annotate": Annotate, "frames": Frames}
FRAMES_NEED = {"video": "holiday.mp4", "folder": "datasets/holiday"}


def parse(kind: type[S], command: str, words: Sequence[str]) -> S:
    """The settings of a command line. Raises ConfigError, one line a problem."""
    given: dict[str, Any] = {}
    problems: list[str] = []
    hints = typing.get_type_hints(kind)
    chosen = [word.partition("=")[2] for word in words if word.startswith(f"{recipes.GROUP}=")]
    for recipe in chosen:
        given |= _recipe(recipe)
    for word in words:
        key, sign, text = word.partition("=")
        if not sign or word.startswith("-"):
            example = word if Path(word).is_file() else "holiday.mp4"
            problems.append(f"{word} is no setting; type {command} KEY=VALUE, such as video={example}")
        elif key != recipes.GROUP:
            given[key] = text
    values = {}
    for key, value in given.items():
        if key not in hints:
            problems.append(recipes.no_such(f"setting of {command}", key, list(hints)))
            continue
        try:
            values[key] = _typed(hints[key], value)
        except (ValueError, TypeError, LookupError, ZeroDivisionError):
            problems.append(f"{key}={value} can't be read; expected {_expected(hints[key])}")
    settings = kind(**values)
    if problems := problems or settings.problems():
        raise ConfigError("\n".join(problems))
    return settings


def offered(kind: type[Any], last: str) -> list[str]:
    """What the last word of a command line may become: settings, and recipes behind `conf=`."""
    key, sign, text = last.partition("=")
    if key == recipes.GROUP and sign:
        return [f"{key}={name}" for name in recipes.video_files() if name.startswith(text)]
    names = [recipes.GROUP, *(field.name for field in dataclasses.fields(kind))]
    return [] if sign else [f"{name}=" for name in names if name.startswith(last)]


def as_plain(settings: Annotate | Frames) -> dict[str, Any]:
    """The settings as values for config.yaml and for a hash."""
    plain: dict[str, Any] = as_dict(settings)
    return plain | {"rate": str(settings.rate)}


def help_text(command: str, width: int) -> str:
    """What `finetune COMMAND --help` prints: every setting with its default and meaning."""
    kind = KINDS[command]
    texts = describe.field_texts(sys.modules[__name__])
    entries = (
        describe.entry_lines(key, value, texts[kind.__name__, key], width) for key, value in as_plain(kind()).items()
    )
    return "\n".join([f"settings of {command}", *(line for entry in entries for line in entry)])


def existing(path: str) -> Path:
    """A path as it was typed, or where the program's checkout has it."""
    found = at_home(path)
    return found if found.exists() else recipes.elsewhere(found) or found


def _recipe(name: str) -> dict[str, Any]:
    files = recipes.video_files()
    if name not in files:
        raise ConfigError(recipes.no_such("video recipe", name, sorted(files)))
    try:
        found = yaml.safe_load(read_text(files[name]))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{recipes.shown(files[name])} is not readable YAML: {reason}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{recipes.shown(files[name])} holds no `key: value` lines")
    return {str(key): value for key, value in found.items()}


def _typed(hint: Any, value: Any) -> Any:
    """A value of a command line or of YAML as the setting has it. Raises ValueError, TypeError or LookupError."""
    if value is None:
        raise ValueError(value)
    if hint is str:
        return str(value)
    if hint is Fraction:
        rate = Fraction(str(value).replace(" ", ""))
        if not 0 < rate <= MOST_RATE:
            raise ValueError(value)
        return rate
    if isinstance(hint, types.GenericAlias):
        items = str(value).strip("[]").split(",") if isinstance(value, str) else list(value)
        return tuple(item for item in (str(item).strip(" '\"") for item in items) if item)
    if hint is bool:
        return {"true": True, "yes": True, "false": False, "no": False}[str(value).lower()]
    if hint is Device:
        return Device[str(value)]
    number = float(str(value))
    if not math.isfinite(number) or (hint is int and number != int(number)):
        raise ValueError(value)
    return hint(number)


def _expected(hint: Any) -> str:
    if isinstance(hint, types.GenericAlias):
        return "a list such as [car,boat]"
    if hint is Device:
        return " or ".join(Device.__members__)
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(
        hint, f"a number above 0 and up to {MOST_RATE}, such as 5, 0.5 or 30000/1001"
    )


def _source_problems(settings: Annotate) -> list[str]:
    if settings.video and settings.folder:
        return [f"video={settings.video} and folder={settings.folder} exclude each other; give one of them"]
    if not (settings.video or settings.folder):
        return ["say which video: video=FILE, or folder=DIR for all in it, or conf=toy_video to try"]
    return []


def _out_of_range(settings: Any, **ranges: tuple[float, float]) -> list[str]:
    ranges["threshold"] = (0, 1)
    return [
        f"{key} must be from {low} to {high}, got {getattr(settings, key)}"
        for key, (low, high) in ranges.items()
        if not low <= getattr(settings, key) <= high
    ]
