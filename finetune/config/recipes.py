"""Where recipes and presets lie, found without Hydra so that `finetune --help` answers at once."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path

from finetune.config.other_tools import NAMES
from finetune.config.spelling import setting
from finetune.reading import read_text

VIDEO = "video"  # the folder of conf/ with recipes of the video commands, which have settings of their own
GROUP = "conf"  # Hydra's group of recipes; every other group holds presets
BASE_NAME = "config"  # conf/config.yaml is the defaults list, not a recipe
LONGEST_FOLDER = 80  # characters of a sweep job's folder; file systems allow 255 bytes


def conf_dir() -> Path:
    """The `conf` folder that belongs to this package: inside it in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def conf_dirs() -> list[Path]:
    """The package's `conf` and then the user's `./conf`, whose files win over the package's of the same name."""
    here = Path.cwd() / "conf"
    own = conf_dir()
    return [own, here] if here.is_dir() and here.resolve() != own.resolve() else [own]


def recipe_files() -> dict[str, Path]:
    """Recipe name -> file."""
    found = {path.stem: path for folder in conf_dirs() for path in sorted(folder.glob("*.yaml"))}
    found.pop(BASE_NAME, None)
    return dict(sorted(found.items()))


def preset_files() -> dict[str, dict[str, Path]]:
    """Preset group (`lora`) -> preset name (`r32`) -> file."""
    found: dict[str, dict[str, Path]] = {}
    for folder in conf_dirs():
        for path in sorted(folder.glob("*/*.yaml")):
            found.setdefault(path.parent.name, {})[path.stem] = path
    found.pop("hydra", None)  # Hydra's own settings, which another program may keep in the same folder
    found.pop(VIDEO, None)
    return found


def names_file(key: str) -> bool:
    """Whether the value of a key is the name of a recipe or preset."""
    return key == GROUP or key in preset_files()


def video_files() -> dict[str, Path]:
    """Recipe of the video commands -> file."""
    return {path.stem: path for folder in conf_dirs() for path in sorted((folder / VIDEO).glob("*.yaml"))}


def title(path: Path) -> str:
    """The first comment line of a recipe or preset: what it is for."""
    try:
        first = read_text(path).lstrip().splitlines()[0]
    except (OSError, UnicodeDecodeError, IndexError):
        return ""
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def shown(path: Path) -> str:
    """A path as the person at the terminal would type it."""
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except (ValueError, RuntimeError):  # elsewhere; a link to itself
        return str(path)


def elsewhere(path: Path) -> Path | None:
    """Where a path such as `datasets/pixar_style` lies that isn't in the current folder: in the program's checkout."""
    shipped = conf_dir().parent / path
    return shipped if shipped.exists() else None


def no_such(what: str, word: str, offered: list[str]) -> str:
    """`no WHAT called WORD` with the nearest name and the list of what there is."""
    meant = word.lower().removesuffix(".yaml")
    near = [name for name in offered if name.lower() == meant]
    near = near or [name for name in offered if name == NAMES.get(meant) or name.lower().startswith(meant)]
    near = near or [name for name in offered if meant and meant in name.lower()]
    near = near or get_close_matches(meant, offered, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    if what == "model preset" and "/" in word:
        hint = f"type {setting('model.base', word)} and the preset of its architecture; "
    return f"no {what} called '{word}'; {hint}there are: {', '.join(offered) or 'none'}"


def sweep_folder(recipe: str, words: Sequence[str], swept: set[str]) -> str:
    """The folder of a job with these overrides: recipe / swept settings, and a digest of the settings in common."""
    settings = {key: value for key, _, value in (word.partition("=") for word in words)}
    settings.pop("run_dir", None)
    settings.pop(GROUP)
    varied = ",".join(f"{key}={value}" for key, value in sorted(settings.items()) if key in swept) or "all"
    common = "".join(f"{key}={value}\n" for key, value in sorted(settings.items()) if key not in swept)
    safe = re.sub(r"[^\w.=+,-]", "-", varied)[:LONGEST_FOLDER]
    hidden = common if safe == varied else varied + common  # what the readable part doesn't tell
    return f"{recipe}/{safe}" + (f"-{sha256(hidden.encode()).hexdigest()[:8]}" if hidden else "")
