"""python -m scripts.embedded PHASE… : trains, exports and measures the models that ship inside the package.

The phases, in order: render; readers, autoencoder and captioner (independent of one another, may run side by side);
diffusion (needs the autoencoder); export; evaluate. `all` runs them one after the other. Parts named by --keep are
taken as shipped. `probe` measures training steps on this machine, and the trainings take its fastest variant; `glance`
draws contact sheets without figures; `pack` and `unpack` carry the results from one machine to another. rebuild.sh puts
all of them together.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch

from scripts.embedded.settings import FULL_MINUTES, PARTS, REPOSITORY, Settings
from scripts.embedded.team import settle_torch
from scripts.embedded.variants import Variant

PHASES = ("render", "readers", "autoencoder", "captioner", "diffusion", "export", "evaluate")
PROBES = ("probe", "probe-autoencoder", "probe-diffusion", "probe-team")
OTHERS = ("all", "glance", "pack", "unpack", *PROBES)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.embedded", description=__doc__)
    parser.add_argument("phases", nargs="+", choices=(*PHASES, *OTHERS), metavar="PHASE")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "outputs" / "embedded", help="caches and checkpoints")
    parser.add_argument("--root", type=Path, help="where artefacts go; the repository, or WORK/root for a tiny run")
    parser.add_argument("--keep", default="readers,captioner", help=f"of {','.join(PARTS)}: not trained anew; or none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, help="that train one model together; one a GPU unless named")
    parser.add_argument("--minutes", type=float, help="time for each phase named, instead of its own default")
    parser.add_argument("--until", type=float, default=math.inf, help="diffusion pauses at this second of the epoch")
    parser.add_argument("--variant", help="such as channels_last+bf16+compiled; the fastest probed unless named")
    parser.add_argument("--out", type=Path, help="folder of the tar files, for pack and unpack")
    parser.add_argument("--tiny", action="store_true", help="a few pictures and steps, to prove the whole line")
    given = parser.parse_args()
    phases = [phase for name in given.phases for phase in (PHASES if name == "all" else (name,))]
    kept = frozenset(given.keep.split(",")) - {"none"}
    if {"pack", "unpack"} & set(phases) and given.out is None:
        parser.error("pack and unpack need --out FOLDER")
    if kept - set(PARTS):
        parser.error(f"--keep takes some of {','.join(PARTS)}, or none; got {given.keep}")
    if "diffusion" in kept and "autoencoder" not in kept:
        parser.error("a diffusion model is of no use without its autoencoder; try --keep …,autoencoder,diffusion")
    if given.variant is not None:
        Variant.parse(given.variant)
    settings = Settings(
        work=given.work,
        root=given.root or (given.work / "root" if given.tiny else REPOSITORY),
        device=given.device,
        tiny=given.tiny,
        minutes={name: given.minutes or default for name, default in FULL_MINUTES.items()},
        kept=kept,
        processes=given.processes or (torch.cuda.device_count() if given.device == "cuda" else 1),
        pause_at=given.until,
        variant=given.variant,
    )
    settle_torch()
    if kept and "unpack" not in phases:
        from scripts.embedded.keep import keep_shipped

        keep_shipped(settings)
    for phase in phases:
        if phase in kept and phase != "diffusion":
            print(f"{phase}: kept as shipped", flush=True)
        elif phase in ("pack", "unpack"):
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
    elif phase in PROBES:
        from scripts.embedded import probe

        return getattr(probe, phase.replace("-", "_"))  # type: ignore[no-any-return]
    elif phase == "glance":
        from scripts.embedded.evaluate import glance as function
    else:
        from scripts.embedded.evaluate import evaluate as function
    return function


if __name__ == "__main__":
    main()
