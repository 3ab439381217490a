"""Contact sheets: pictures in a grid with a line of text below each."""

import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

COLUMNS = 8
TEXT_PX = 36
GAP_PX = 4
LETTERS_A_LINE = 24


def contact_sheet(images_N3PP: Tensor, lines: list[str], path: Path) -> None:
    """Write pictures with values 0…1, or uint8, and their lines to a PNG."""
    images = images_N3PP if images_N3PP.dtype == torch.uint8 else (images_N3PP * 255).round().to(torch.uint8)
    px = images.shape[-1]
    rows = -(-len(images) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (px + GAP_PX), rows * (px + TEXT_PX)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (image, line) in enumerate(zip(images.cpu(), lines, strict=True)):
        left, top = index % COLUMNS * (px + GAP_PX), index // COLUMNS * (px + TEXT_PX)
        sheet.paste(Image.fromarray(image.permute(1, 2, 0).numpy()), (left, top))
        text = "\n".join(textwrap.wrap(line, LETTERS_A_LINE)[:3])
        pen.multiline_text((left + 2, top + px + 1), text, "black", spacing=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
