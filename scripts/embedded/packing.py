"""Packs the artefacts into a few tar files of limited size, for machines that hand back little, and unpacks them.

A tar's folders: `root`, what ships; `evaluation`, contact sheets; `work`, logs, and the autoencoder where
it is trained but not yet shipped with a diffusion model.
"""

import tarfile
from pathlib import Path

from safetensors.torch import load_file, save_file

from scripts.embedded.export import MODELS
from scripts.embedded.settings import Settings

MAX_TAR_BYTES = 15 * 2**20
MAX_TARS = 6  # of the eight files that come back, two stay for logs
MAX_TOTAL_BYTES = 62 * 2**20
TAR_OVERHEAD_BYTES = 2048  # header and padding of each member


def pack(settings: Settings, out: Path) -> None:
    """First fit, largest first."""
    members = {path: Path("root") / path.relative_to(settings.root) for path in shipped_files(settings)}
    members |= {path: Path("evaluation") / path.name for path in sorted(settings.evaluation.glob("*"))}
    unshipped = [] if (settings.work / "diffusion").exists() else halved(settings.work / "autoencoder")
    for path in (*settings.work.glob("*.log"), *unshipped):
        members[path] = Path("work") / path.relative_to(settings.work)
    tars: list[list[Path]] = []
    for path in sorted(members, key=lambda member: -tar_bytes(member)):
        room = (tar for tar in tars if sum(map(tar_bytes, [*tar, path])) <= MAX_TAR_BYTES - 10240)
        tar = next(room, None)
        if tar is None:
            tars.append([path])
        else:
            tar.append(path)
    total = sum(map(tar_bytes, members))
    if len(tars) > MAX_TARS or total > MAX_TOTAL_BYTES:
        raise ValueError(
            f"the artefacts need {len(tars)} tars of {MAX_TAR_BYTES >> 20} MiB, {total >> 20} MiB in all; "
            f"{MAX_TARS} and {MAX_TOTAL_BYTES >> 20} MiB may be"
        )
    out.mkdir(parents=True, exist_ok=True)
    for number, paths in enumerate(tars):
        target = out / f"embedded-{number}.tar"
        with tarfile.open(target, "w") as archive:
            for path in paths:
                archive.add(path, members[path].as_posix())
        print(f"pack: {target}  {target.stat().st_size / 2**20:.1f} MiB  {len(paths)} files", flush=True)


def unpack(settings: Settings, out: Path) -> None:
    """Put back what `pack` took: artefacts below the root, all else into the work folder."""
    places = {"root": settings.root, "evaluation": settings.evaluation, "work": settings.work}
    for source in sorted(out.glob("embedded-*.tar")):
        with tarfile.open(source) as archive:
            for member in archive.getmembers():
                prefix, _, rest = member.name.partition("/")
                member.name = rest
                archive.extract(member, places[prefix], filter="data")
        print(f"unpack: {source}", flush=True)


def shipped_files(settings: Settings) -> list[Path]:
    folders = (*(settings.embedded / name for name in MODELS), settings.readers)
    figures = settings.embedded / "figures.json"
    found = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return [*found, figures] if figures.exists() else found


def halved(folder: Path) -> list[Path]:
    """The files of a trained autoencoder, its weights brought to fp16 in place, as they will ship."""
    for path in folder.glob("*.safetensors"):
        save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    return sorted(folder.glob("*"))


def tar_bytes(path: Path) -> int:
    return path.stat().st_size + TAR_OVERHEAD_BYTES
