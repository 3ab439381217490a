"""Packs the artefacts into a few tar files of limited size, for machines that hand back little, and unpacks them."""

import tarfile
from pathlib import Path

from scripts.embedded.settings import Settings

MAX_TAR_BYTES = 15 * 2**20
MAX_TARS = 5
TAR_OVERHEAD_BYTES = 2048  # header and padding of each member


def pack(settings: Settings, out: Path) -> None:
    """First fit, largest first."""
    members = {path: Path("root") / path.relative_to(settings.root) for path in shipped_files(settings)}
    members |= {path: Path("evaluation") / path.name for path in sorted(settings.evaluation.glob("*"))}
    tars: list[list[Path]] = []
    for path in sorted(members, key=lambda member: -tar_bytes(member)):
        room = (tar for tar in tars if sum(map(tar_bytes, [*tar, path])) <= MAX_TAR_BYTES - 10240)
        tar = next(room, None)
        if tar is None:
            tars.append([path])
        else:
            tar.append(path)
    if len(tars) > MAX_TARS:
        raise ValueError(f"the artefacts need {len(tars)} tars of {MAX_TAR_BYTES >> 20} MiB, at most {MAX_TARS} may be")
    out.mkdir(parents=True, exist_ok=True)
    for number, paths in enumerate(tars):
        target = out / f"embedded-{number}.tar"
        with tarfile.open(target, "w") as archive:
            for path in paths:
                archive.add(path, members[path].as_posix())
        print(f"pack: {target}  {target.stat().st_size / 2**20:.1f} MiB  {len(paths)} files", flush=True)


def unpack(settings: Settings, out: Path) -> None:
    """Put back what `pack` took: artefacts below the root, contact sheets into the work folder."""
    places = {"root": settings.root, "evaluation": settings.evaluation}
    for source in sorted(out.glob("embedded-*.tar")):
        with tarfile.open(source) as archive:
            for member in archive.getmembers():
                prefix, _, rest = member.name.partition("/")
                member.name = rest
                archive.extract(member, places[prefix], filter="data")
        print(f"unpack: {source}", flush=True)


def shipped_files(settings: Settings) -> list[Path]:
    folders = (settings.embedded, settings.readers)
    return [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]


def tar_bytes(path: Path) -> int:
    return path.stat().st_size + TAR_OVERHEAD_BYTES
