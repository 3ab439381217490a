"""python -m scripts.embedded PHASE… : trains, exports and measures the models that ship inside the package.

The phases, in order: render; readers, autoencoder and captioner (independent of one another, may run side by side);
diffusion (needs the autoencoder); export; evaluate. `all` runs them one after the other. `pack` and `unpack` carry the
results from one machine to another.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from scripts.embedded.settings import FULL_MINUTES, REPOSITORY, Settings

PHASES = ("render", "readers", "autoencoder", "captioner", "diffusion", "export", "evaluate")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.embedded", description=__doc__)
    parser.add_argument("phases", nargs="+", choices=(*PHASES, "all", "pack", "unpack"), metavar="PHASE")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "outputs" / "embedded", help="caches and checkpoints")
    parser.add_argument("--root", type=Path, help="where artefacts go; the repository, or WORK/root for a tiny run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, help="time for each phase named, instead of its own default")
    parser.add_argument("--out", type=Path, help="folder of the tar files, for pack and unpack")
    parser.add_argument("--tiny", action="store_true", help="a few pictures and steps, to prove the whole line")
    given = parser.parse_args()
    phases = [phase for name in given.phases for phase in (PHASES if name == "all" else (name,))]
    if {"pack", "unpack"} & set(phases) and given.out is None:
        parser.error("pack and unpack need --out FOLDER")
    settings = Settings(
        work=given.work,
        root=given.root or (given.work / "root" if given.tiny else REPOSITORY),
        device=given.device,
        tiny=given.tiny,
        minutes={name: given.minutes or default for name, default in FULL_MINUTES.items()},
    )
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    for phase in phases:
        if phase in ("pack", "unpack"):
            from scripts.embedded import packing

            getattr(packing, phase)(settings, given.out)
        else:
            function_of(phase)(settings)


def function_of(phase: str) -> Callable[[Settings], None]:
    """Imported when wanted: rendering needs neither diffusers nor transformers."""
    if phase == "render":
        from scripts.embedded.render_sets import render_sets as function
    elif phase == "readers":
        from scripts.embedded.train_readers import train_readers as function
    elif phase == "autoencoder":
        from scripts.embedded.autoencoder import train_autoencoder as function
    elif phase == "captioner":
        from scripts.embedded.captioner import train_captioner as function
    elif phase == "diffusion":
        from scripts.embedded.diffusion import train_diffusion as function
    elif phase == "export":
        from scripts.embedded.export import export as function
    else:
        from scripts.embedded.evaluate import evaluate as function
    return function


if __name__ == "__main__":
    main()
