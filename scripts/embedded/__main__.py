"""python -m scripts.embedded PHASE… : trains, exports and measures the models that ship inside the package.

The phases, in order: render; readers, captioner and detector (which need the renders alone; the detector is exported
and measured in the same phase); autoencoder; decoder (makes it crisp); diffusion (needs the autoencoder); export;
evaluate. `all` runs them one after the other. A call whose time is up pauses, and the next one with the same WORK goes
on where it stopped. Parts named by --keep start as they are
shipped: autoencoder and diffusion model are trained on where their phase is named, the others stay so.
The diffusion model may be trained by several GPUs: torchrun --nproc-per-node 2 -m scripts.embedded diffusion.
`glance` draws contact sheets without figures; `pack` and `unpack` carry the results from one machine to another.
"""

import argparse
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from scripts.embedded.settings import FULL_MINUTES, PARTS, REPOSITORY, Settings

PHASES = ("render", "readers", "captioner", "detector", "autoencoder", "decoder", "diffusion", "export", "evaluate")
OF_RENDERS_ALONE = {"render", "readers", "captioner", "detector"}
OTHERS = ("all", "glance", "pack", "unpack")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.embedded", description=__doc__)
    parser.add_argument("phases", nargs="+", choices=(*PHASES, *OTHERS), metavar="PHASE")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "outputs" / "embedded", help="caches and checkpoints")
    parser.add_argument("--root", type=Path, help="where artefacts go; the repository, or WORK/root for a tiny run")
    parser.add_argument("--keep", default="readers,captioner", help=f"of {','.join(PARTS)}: start as shipped; or none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", default="", help="of phases over all calls, such as render=4,diffusion=9")
    parser.add_argument("--limit-s", type=float, default=math.inf, help="seconds after which this call pauses")
    parser.add_argument("--out", type=Path, help="folder of the tar files, for pack and unpack")
    parser.add_argument("--tiny", action="store_true", help="a few pictures and steps, to prove the whole line")
    given = parser.parse_args()
    phases = [phase for name in given.phases for phase in (PHASES if name == "all" else (name,))]
    kept = frozenset(given.keep.split(",")) - {"none"}
    minutes = dict(pair.partition("=")[::2] for pair in given.minutes.split(",") if pair)
    if {"pack", "unpack"} & set(phases) and given.out is None:
        parser.error("pack and unpack need --out FOLDER")
    if kept - set(PARTS):
        parser.error(f"--keep takes some of {','.join(PARTS)}, or none; got {given.keep}")
    if "diffusion" in kept and "autoencoder" not in kept:
        parser.error("a diffusion model is of no use without its autoencoder; try --keep …,autoencoder,diffusion")
    if set(minutes) - set(FULL_MINUTES):
        parser.error(f"--minutes takes PHASE=MINUTES for {', '.join(FULL_MINUTES)}; got {given.minutes}")
    settings = Settings(
        work=given.work,
        root=given.root or (given.work / "root" if given.tiny else REPOSITORY),
        device=given.device,
        tiny=given.tiny,
        minutes=FULL_MINUTES | {phase: float(amount) for phase, amount in minutes.items()},
        kept=kept,
        pause_at=time.time() + given.limit_s,
    )
    if "LOCAL_RANK" in os.environ:  # of torchrun
        dist.init_process_group("cpu:gloo,cuda:nccl" if given.device == "cuda" else "gloo")
        if given.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if given.device == "cuda":  # TF32 for what stays in fp32, the fastest convolutions found by trial
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    if kept and "unpack" not in phases:
        from scripts.embedded.keep import keep_shipped

        keep_shipped(settings, models=not OF_RENDERS_ALONE.issuperset(phases))
    for phase in phases:
        if time.time() >= settings.pause_at:
            print(f"time is up before {phase}: run this again", flush=True)
            break
        if phase in kept & {"readers", "captioner", "detector"}:
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
    elif phase == "decoder":
        from scripts.embedded.decoder import train_decoder as function
    elif phase == "captioner":
        from scripts.embedded.captioner import train_captioner as function
    elif phase == "detector":
        from scripts.embedded.detector_evaluate import detector as function
    elif phase == "diffusion":
        from scripts.embedded.diffusion import train_diffusion as function
    elif phase == "export":
        from scripts.embedded.export import export as function
    elif phase == "glance":
        from scripts.embedded.evaluate import glance as function
    else:
        from scripts.embedded.evaluate import evaluate as function
    return function


if __name__ == "__main__":
    main()
