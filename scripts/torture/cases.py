"""What is tortured: small runs of both kinds, the whole line and each command alone, in one process and in two."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.torture.commands import run_to_end
from tests.tiny_language_models import save_language
from tests.tiny_models import save_captioner, save_diffusion

ROOT = Path(__file__).resolve().parents[2]
IMAGES, CHATS = 5, 10
# A higher learning rate is warned about, and the warning stands in the receipt of the first stage that is done again.
COMMON = (
    *("run_dir=run", "data.cache=cache", "hardware.device=cpu", "trainer.steps=2", "trainer.save_every=1"),
    *("trainer.validate_every=1", "trainer.ema_decay=0.9", "optim.warmup_steps=0", "optim.lr=1e-4"),
)
WORDS = {
    "image": (
        *("conf=mine", *COMMON, "model.base=base", "model.resolution=32", "model.bucket_step=16"),
        *("caption.model=captioner", "caption.batch=1", "trainer.micro_batch=2", "sample.steps=1", "sample.previews=0"),
        *('sample.prompts=["a red cat, pixar style"]', "export.formats=[peft,kohya]"),
    ),
    "language": (
        *("conf=mine", *COMMON, "model.base=base", "data.length=128", "data.workers=1", "trainer.micro_batch=1"),
        *("trainer.accumulate=2", "sample.max_new_tokens=2", "sample.prompts=[hello]", "export.formats=[peft]"),
    ),
}
RECIPES = {"image": "smoke", "language": "pirate_chat"}
OTHERS = {
    "image": {"export": ("export.formats=[peft,kohya,diffusers]",), "sample": ('sample.prompts=["a blue fish"]',)},
    "language": {"export": ("export.formats=[peft,merged,gguf]",), "sample": ("sample.prompts=[goodbye]",)},
}
"""What gives a command work to do where a run is finished."""
OWN_CAPTION, OWN_ROW = "a scene in my own words, pixar style\n", "another one of mine, pixar style"


@dataclass(frozen=True)
class Case:
    """One command in one folder. before: the commands that prepare the folder. words: its settings."""

    kind: str
    command: str
    processes: int
    before: tuple[str, ...]
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.kind} {self.command}" + (f" in {self.processes} processes" if self.processes > 1 else "")

    @property
    def line(self) -> list[str]:
        """The words behind `finetune`."""
        return [self.command, *self.words]


def all_cases() -> list[Case]:
    found = []
    for kind, words in WORDS.items():
        found += [Case(kind, "train", 1, (), words), Case(kind, "train", 2, (), words)]
        alone = {"caption": (), "dataset": ("caption",)} if kind == "image" else {"dataset": ()}
        alone |= dict.fromkeys(("export", "sample", "report"), ("train",))
        for command, before in alone.items():
            found.append(Case(kind, command, 1, before, (*words, *OTHERS[kind].get(command, ()))))
    return found


def prepare(folder: Path, kind: str, before: Sequence[str]) -> None:
    """A folder with a person's files, and what earlier commands made of them."""
    (folder / "conf").mkdir(parents=True)
    data = "  folder: images" if kind == "image" else "  file: chats.jsonl"
    (folder / "conf" / "mine.yaml").write_text(f"# My own recipe.\ndefaults:\n  - {RECIPES[kind]}\ndata:\n{data}\n")
    if kind == "image":
        _images(folder / "images")
        save_diffusion(folder / "base")
        save_captioner(folder / "captioner")
    else:
        save_language(folder / "base")
        rows = (ROOT / "datasets" / "pirate_chat" / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
        (folder / "chats.jsonl").write_text("".join(f"{row}\n" for row in rows[:CHATS]), encoding="utf-8")
    for command in before:
        run_to_end(folder, [command, *WORDS[kind]])


def _images(folder: Path) -> None:
    """Some with captions by hand, in both places where they may stand; one in a folder of its own."""
    (folder / "more").mkdir(parents=True)
    files = sorted((ROOT / "datasets" / "pixar_style").glob("*.jpg"))[:IMAGES]
    for number, file in enumerate(files):
        shutil.copy(file, folder / ("more" if number == IMAGES - 1 else "") / file.name)
    (folder / f"{files[0].stem}.txt").write_text(OWN_CAPTION, encoding="utf-8")
    row = {"file_name": files[1].name, "text": OWN_ROW, "note": "kept"}
    (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")


def persons_files(folder: Path) -> dict[str, bytes]:
    """What no command may change, by path: images, captions and conversations of one's own, and the recipe."""
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for place in ("images", "conf", "chats.jsonl")
        for path in _files(folder / place)
        if not path.name.startswith(".") and path.name != "metadata.jsonl"
    }
    rows = folder / "images" / "metadata.jsonl"
    if rows.exists():  # to which rows are added
        own = [row for row in rows.read_bytes().splitlines() if OWN_ROW.encode() in row]
        found["my row of metadata.jsonl"] = b"\n".join(own)
    return found


def _files(place: Path) -> Sequence[Path]:
    return [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
