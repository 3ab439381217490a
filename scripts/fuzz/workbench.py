"""A folder with all that commands read: tiny bases, images, conversations, a recipe and a finished run of each kind.

Every case gets a copy. Paths in it are relative, so that copies are independent.
"""

import contextlib
import csv
import json
from pathlib import Path

from PIL import Image

from finetune import cli
from tests.single_files import save_single_file
from tests.tiny_language_models import save_language
from tests.tiny_models import save_captioner, save_diffusion

COLOURS = ("red", "green", "blue", "white")
SUFFIXES = ("png", "jpg", "webp", "bmp", "tif", "gif", "avif", "jp2", "ppm", "tga")
IMAGE_RECIPE = """\
defaults: [pixar_style]
model: {base: base, resolution: 32, bucket_step: 16}
data: {folder: images, cache: cache}
caption: {model: captioner}
run_dir: run
hardware: {device: cpu}
optim: {warmup_steps: 0, lr: 1e-3}
lora: {rank: 4}
trainer: {steps: 1, micro_batch: 2, accumulate: 1, save_every: 1, validate_every: 1}
sample: {steps: 1, seeds: [0], previews: 1, prompts: ["a red wall, pixar style"]}
"""
LANGUAGE_RECIPE = """\
defaults: [pirate_chat]
model: {base: lm}
data: {file: chats.jsonl, cache: cache, length: 128, workers: 1}
run_dir: chat
hardware: {device: cpu}
optim: {warmup_steps: 0, lr: 1e-3}
lora: {rank: 4}
trainer: {steps: 1, micro_batch: 2, accumulate: 1, save_every: 1, validate_every: 1}
sample: {max_new_tokens: 4, previews: 1, prompts: ["hello"]}
export: {formats: [peft, merged]}
"""
RECIPES = {"image": IMAGE_RECIPE, "language": LANGUAGE_RECIPE}
MADE = ("run", "chat", "cache", "outputs")  # by commands; all else is a person's
METADATA = "images/metadata.jsonl"  # a person's too, but `caption` adds rows


def build(folder: Path) -> None:
    """Make it, with the very commands that are tried later: this process then has imported all that they need."""
    folder.mkdir(parents=True)
    with contextlib.chdir(folder):
        save_diffusion(Path("base"))
        save_single_file(Path("base"), Path("single.safetensors"), "sd")
        save_captioner(Path("captioner"))
        save_language(Path("lm"))
        _images(Path("images"))
        _conversations()
        Path("chat.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}")
        Path("conf").mkdir()
        for kind, text in RECIPES.items():
            Path("conf", f"{kind}.yaml").write_text(text)
            for command in ("train", "plan"):
                if code := cli.main([command, f"conf={kind}"]):
                    raise SystemExit(f"{command} conf={kind} ended with {code}")
        for suffix in SUFFIXES:  # one of each format, not trained on by the finished run
            Path("formats").mkdir(exist_ok=True)
            _image(Path("formats", f"picture.{suffix}"), "orange")


def _images(folder: Path) -> None:
    """Images with captions of each kind: a text file, a row of metadata.jsonl, none."""
    folder.mkdir()
    for colour in COLOURS:
        _image(folder / f"{colour}.png", colour)
    for colour in COLOURS[:2]:
        (folder / f"{colour}.txt").write_text(f"a {colour} wall, pixar style")
    row = {"file_name": "blue.png", "text": "a blue wall, pixar style"}
    (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")


def _image(file: Path, colour: str) -> None:
    image = Image.new("RGB", (64, 48), colour)
    image.paste("black", (8, 8, 30, 20))
    image.save(file, **({"exif": Image.Exif()} if file.suffix in (".jpg", ".webp") else {}))


def _conversations() -> None:
    """The same conversations in every format of file."""
    import pyarrow
    import pyarrow.parquet

    turns = [
        [{"role": "user", "content": f"How much is {i} plus {i}?"}, {"role": "assistant", "content": f"Arr, {2 * i}"}]
        for i in range(24)
    ]
    rows = [{"messages": messages} for messages in turns]
    flat = [{"prompt": asked["content"], "completion": said["content"]} for asked, said in turns]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("chats.json").write_text(json.dumps(rows, indent=1))
    Path("chats.txt").write_text("\n\n".join(row["completion"] for row in flat))
    with open("chats.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(flat)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(flat), "chats.parquet")
