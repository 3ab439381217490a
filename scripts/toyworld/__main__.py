"""Command line: a contact sheet to look at, or the example data."""

from __future__ import annotations

import argparse
from pathlib import Path

from scripts.toyworld.looks import HELD_OUT
from scripts.toyworld.scene import sample_scene


def main() -> None:
    """Parses the command and runs it."""
    parser = argparse.ArgumentParser(prog="python -m scripts.toyworld", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    sheet = commands.add_parser("sheet", help="draw many scenes into one picture")
    sheet.add_argument("out", type=Path)
    sheet.add_argument("--style", default="flat")
    sheet.add_argument("--size", type=int, default=128, help="pixels per scene")
    sheet.add_argument("--seed", type=int, default=0, help="seed of the first scene")
    sheet.add_argument("--count", type=int, default=24)
    sheet.add_argument("--columns", type=int, default=6)
    sheet.add_argument("--device", default="cpu")

    dataset = commands.add_parser("dataset", help="write an example data set, such as that of film-like pictures")
    dataset.add_argument("folder", type=Path)
    dataset.add_argument("--style", default="pixar", choices=tuple(HELD_OUT))
    dataset.add_argument("--count", type=int, default=40)
    dataset.add_argument("--size", type=int, default=512)
    dataset.add_argument("--captions", action="store_true", help="write them too, in text files beside the images")
    dataset.add_argument("--device", default="cpu")

    video = commands.add_parser("video", help="write the example video and what is truly in it")
    video.add_argument("folder", type=Path)
    video.add_argument("--device", default="cpu")

    options = parser.parse_args()
    # Imported here so that --help need not wait for torch.
    from scripts.toyworld.output import write_dataset, write_sheet

    if options.command == "sheet":
        scenes = [sample_scene(options.seed + k) for k in range(options.count)]
        write_sheet(options.out, scenes, options.style, options.size, columns=options.columns, device=options.device)
    elif options.command == "video":
        from scripts.toyworld.video import write_video

        write_video(options.folder, device=options.device)
    else:
        write_dataset(
            options.folder,
            style=options.style,
            count=options.count,
            size=options.size,
            captions=options.captions,
            device=options.device,
        )


if __name__ == "__main__":
    main()
