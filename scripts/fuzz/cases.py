"""Every case by its number: a folder is prepared, then one command is run in it.

The classes take turns, so that the first hundred cases hold some of each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from scripts.fuzz import values, workbench
from scripts.fuzz.damage import NO_FILES, damage, no_file


@dataclass(frozen=True)
class Case:
    """prepare: changes the copy of the workbench that is the current folder, and says what it did."""

    number: int
    group: str
    words: tuple[str, ...]
    prepare: Callable[[], str]

    @property
    def overwrites(self) -> bool:
        """Whether captions may be replaced."""
        return any("caption.overwrite" in word for word in self.words)


Maker = Callable[[Random, int], tuple[tuple[str, ...], Callable[[], str]]]  # -> words, prepare


def make(seed: int, number: int) -> Case:
    """The case of a number; equal for equal arguments."""
    group = list(GROUPS)[number % len(GROUPS)]
    words, prepare = GROUPS[group](Random(f"{seed}/{number}"), number // len(GROUPS))
    return Case(number, group, words, prepare)


def _image_setting(random: Random, turn: int) -> tuple[tuple[str, ...], Callable[[], str]]:
    return _setting("image", random, turn)


def _language_setting(random: Random, turn: int) -> tuple[tuple[str, ...], Callable[[], str]]:
    return _setting("language", random, turn)


def _setting(kind: str, random: Random, turn: int) -> tuple[tuple[str, ...], Callable[[], str]]:
    keys = values.keys(kind)
    key = keys[turn % len(keys)]
    words = [f"{key}={values.typed(key, random)}"]
    if random.random() < 0.2:
        other = random.choice(keys)
        words.append(f"{other}={values.typed(other, random)}")
    return (_command(kind, key, random), f"conf={kind}", *words), lambda: ""


def _recipe_value(random: Random, turn: int) -> tuple[tuple[str, ...], Callable[[], str]]:
    """A value in a recipe, as YAML."""
    kind = random.choice(list(workbench.RECIPES))
    keys = values.keys(kind)
    key = keys[turn % len(keys)]
    text = values.written(key, random)

    def prepare() -> str:
        section, _, name = key.rpartition(".")
        line = f"{section}: {{{name}: {text}}}" if section else f"{name}: {text}"
        Path("conf", "odd.yaml").write_text(f"defaults: [{kind}]\n{line}\n", encoding="utf-8", errors="surrogatepass")
        return line[:100]

    return (_command(kind, key, random), "conf=odd"), prepare


def _command(kind: str, key: str, random: Random) -> str:
    commands = ["train", "train", "train", "dataset", "plan", "export", "sample", "report"]
    return random.choice([*commands, "caption"] if kind == "image" else commands)


def _odd_path(random: Random, turn: int) -> tuple[tuple[str, ...], Callable[[], str]]:
    """Something that is there, under an odd name."""
    name = values.NAMES[turn % len(values.NAMES)]
    kind, key, source = random.choice(
        (
            *(
                ("image", "data.folder", "images"),
                ("image", "model.base", "base"),
                ("image", "caption.model", "captioner"),
            ),
            *(("image", "model.base", "single.safetensors"), ("image", "sample.adapter", "run/adapter/peft")),
            *(("image", "run_dir", "run"), ("language", "run_dir", "chat"), ("language", "data.file", "chats.jsonl")),
            *(("language", "model.base", "lm"), ("language", "lora.start_from", "chat/adapter")),
            *(
                ("image", "data.cache", "cache"),
                ("language", "data.chat_template", "chat.jinja"),
                ("image", "conf", ""),
            ),
        )
    )
    target = name + Path(source).suffix
    if source in workbench.MADE:
        target = f"outputs/{name}"

    def prepare() -> str:
        if source:
            Path("outputs").mkdir(exist_ok=True)
            Path(source).rename(target)
        else:
            Path("conf", f"{name}.yaml").write_text(workbench.IMAGE_RECIPE)
        return f"{source or 'conf/image.yaml'} is called {target!a}"

    quoted = target.replace("\\", "\\\\").replace('"', '\\"')
    word = f'{key}="{quoted}"' if random.random() < 0.7 else f"{key}={target}"
    command = random.choice(("train", "sample" if key in ("sample.adapter", "run_dir") else "dataset"))
    parts = ("model.parts=base",) if source == "single.safetensors" else ()
    return (command, *(() if key == "conf" else (f"conf={kind}",)), word, *parts), prepare


def _damaged(run: str, commands: tuple[str, ...], patterns: tuple[str, ...], *settings: str) -> Maker:
    """Damage one or two of the files that fit a pattern, then run a command. run: the setting that says on what."""

    def make_case(random: Random, turn: int) -> tuple[tuple[str, ...], Callable[[], str]]:
        command = random.choice(commands)

        def prepare() -> str:
            files = sorted({path for pattern in patterns for path in Path().glob(pattern) if path.is_file()})
            first = files[random.randrange(len(files))]
            chosen = {first, *random.sample(files, 1 if random.random() < 0.1 else 0)}
            return "; ".join(f"{path}: {damage(path, random)}" for path in sorted(chosen))

        return (command, run, *settings), prepare

    return make_case


def _picture(random: Random, turn: int) -> tuple[tuple[str, ...], Callable[[], str]]:
    """A damaged image of one of the formats among good ones; sometimes it may be skipped."""
    suffix = workbench.SUFFIXES[turn % len(workbench.SUFFIXES)]
    skips = random.random() < 0.5

    def prepare() -> str:
        file = Path("images", f"{random.choice(('picture', '._x', '猫 1'))}.{suffix}")
        Path("formats", f"picture.{suffix}").rename(file)
        return f"{file}: {damage(file, random)}"

    command = random.choice(("caption", "dataset"))
    return (command, "conf=image", f"data.skip_bad={str(skips).lower()}"), prepare


def _conversations(random: Random, turn: int) -> tuple[tuple[str, ...], Callable[[], str]]:
    suffix = ("jsonl", "json", "csv", "parquet", "txt")[turn % 5]
    how = random.choice(("auto", "auto", "messages", "prompt_completion", "text"))
    file = f"chats.{suffix}"
    return (
        "dataset",
        "conf=language",
        f"data.file={file}",
        f"data.format={how}",
    ), lambda: f"{file}: {damage(Path(file), random)}"


def _no_file(random: Random, turn: int) -> tuple[tuple[str, ...], Callable[[], str]]:
    """A pipe, a socket or a device where a person names or keeps a file."""
    what = NO_FILES[turn % len(NO_FILES)]
    command, kind, file, *words = random.choice(
        (
            *(
                ("caption", "image", "images/red.png"),
                ("dataset", "image", "images/white.PNG"),
                ("plan", "image", "images/x.jpg"),
            ),
            *(("dataset", "image", "images/white.txt"), ("caption", "image", "images/metadata.jsonl")),
            *(("dataset", "image", "images/sub/metadata.csv"), ("dataset", "image", "images/red.caption")),
            *(
                ("dataset", "language", "odd.jsonl", "data.file=odd.jsonl"),
                ("plan", "language", "odd.csv", "data.file=odd.csv"),
            ),
            *(
                ("dataset", "language", "odd.json", "data.file=odd.json"),
                ("train", "language", "more/a.parquet", "data.file=more"),
            ),
            *(
                ("dataset", "language", "odd", "data.file=odd"),
                ("train", "language", "odd.txt", "data.chat_template=odd.txt"),
            ),
            *(
                ("train", "image", "odd.safetensors", "model.base=odd.safetensors"),
                ("train", "image", "odd", "model.base=odd"),
            ),
            *(
                ("train", "image", "odd.gguf", "model.base=odd.gguf"),
                ("sample", "image", "odd.safetensors", "sample.adapter=odd.safetensors"),
            ),
            *(
                ("train", "image", "odd.safetensors", "lora.start_from=odd.safetensors"),
                ("train", "language", "odd", "lora.start_from=odd"),
            ),
            *(
                ("train", "image", "conf/image.yaml"),
                ("plan", "image", "conf/model/odd.yaml", "model=odd"),
                ("train", "image", "odd", "run_dir=odd"),
            ),
            *(
                ("train", "image", "odd", "data.cache=odd"),
                ("caption", "image", "odd", "caption.model=odd", "caption.overwrite=true"),
            ),
            *(
                ("dataset", "image", "odd", "data.folder=odd"),
                ("caption", "image", "captioner/model.safetensors", "caption.overwrite=true"),
            ),
        )
    )

    def prepare() -> str:
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        no_file(path, what)
        return f"{file} is {what}"

    return (command, f"conf={kind}", *words), prepare


def _caption_table(random: Random, turn: int) -> tuple[tuple[str, ...], Callable[[], str]]:
    """A metadata.csv beside the images, whole or damaged."""
    name = ("metadata.csv", "metadata.tsv", "captions.csv", "metadata.parquet", "sub/metadata.csv", "Metadata.CSV")[
        turn % 6
    ]
    separator, column = random.choice(",;\t"), random.choice(("text", "caption", "prompt", "additional_feature", ""))
    mark, end = random.choice(("", "\ufeff")), random.choice(("\n", "\r\n"))
    rows = [
        f"file_name{separator}{column}",
        *(f"{colour}.png{separator}a {colour} wall" for colour in workbench.COLOURS),
    ]

    def prepare() -> str:
        file = Path("images", name)
        file.parent.mkdir(exist_ok=True)
        file.write_text(mark + end.join(rows), encoding="utf-8")
        for other in Path("images").glob("*.txt" if random.random() < 0.5 else "metadata.jsonl"):
            other.unlink()
        return f"{file}: {damage(file, random)}" if random.random() < 0.6 else f"{file} with {column!r}"

    return (random.choice(("caption", "dataset", "train")), "conf=image", "run_dir=other"), prepare


def _gguf(random: Random, turn: int) -> tuple[tuple[str, ...], Callable[[], str]]:
    """A GGUF file as a base of any kind, as a folder's only weights, or as an adapter."""
    name = ("base.gguf", "base.GGUF", "q4.Q4_K_M.gguf", "base.gguf.safetensors")[turn % 4]
    where, words = random.choice(
        (
            ("", ("train", "conf=image", f"model.base={name}")),
            ("", ("plan", "conf=image", f"model.base={name}", "model.parts=base")),
            ("", ("train", "conf=language", f"model.base={name}")),
            ("lm", ("train", "conf=language", "model.base=lm")),
            ("base/unet", ("train", "conf=image", "model.base=base")),
            ("only", ("plan", "conf=language", "model.base=only")),
            ("only", ("train", "conf=language", "model.base=only")),
            ("", ("sample", "conf=image", f"sample.adapter={name}")),
            ("", ("train", "conf=language", f"lora.start_from={name}")),
            ("", ("train", "conf=image", f"lora.start_from={name}")),
            ("", ("caption", "conf=image", f"caption.model={name}", "caption.overwrite=true")),
        )
    )

    def prepare() -> str:
        folder = Path(where)
        folder.mkdir(exist_ok=True)
        for weights in folder.glob("*.safetensors") if where else ():
            weights.unlink()
        file = folder / name
        file.write_bytes(GGUF_HEAD + random.randbytes(random.choice((0, 100, 10_000))))
        return f"{file}: {damage(file, random)}" if random.random() < 0.3 else f"{file} of {file.stat().st_size} bytes"

    return (*words, "run_dir=other"), prepare


def _template(random: Random, turn: int) -> tuple[tuple[str, ...], Callable[[], str]]:
    """A template that is damaged, or a program that does something else."""
    text = values.TEMPLATES[turn % len(values.TEMPLATES)]

    def prepare() -> str:
        if random.random() < 0.5:
            return f"chat.jinja: {damage(Path('chat.jinja'), random)}"
        Path("chat.jinja").write_text(text, encoding="utf-8", errors="surrogatepass")
        return f"chat.jinja: {text[:60]}"

    return (random.choice(("dataset", "train")), "conf=language", "data.chat_template=chat.jinja"), prepare


def _adapter(random: Random, turn: int) -> tuple[tuple[str, ...], Callable[[], str]]:
    """A damaged adapter to draw with or to continue from, as a copy outside the run folder."""
    kind, source = random.choice(ADAPTERS)
    command, key = random.choice((("sample", "sample.adapter"), ("train", "lora.start_from")))

    def prepare() -> str:
        Path("adapter").mkdir()
        copies = [Path("adapter", file.name) for file in map(Path, source)]
        for file, copied in zip(source, copies, strict=True):
            copied.write_bytes(Path(file).read_bytes())
        damaged = random.choice(copies)
        return f"{damaged}: {damage(damaged, random)}"

    value = "adapter" if len(source) > 1 else f"adapter/{Path(source[0]).name}"
    return (command, f"conf={kind}", f"{key}={value}", "run_dir=other"), prepare


GGUF_HEAD = b"GGUF" + (3).to_bytes(4, "little") + bytes(16)  # version 3, no tensors, no values
PEFT = ("adapter_model.safetensors", "adapter_config.json")
ADAPTERS = (
    ("image", ("run/adapter/pytorch_lora_weights.safetensors",)),
    ("image", ("run/adapter/image.safetensors",)),
    ("image", tuple(f"run/adapter/peft/{name}" for name in PEFT)),
    ("language", tuple(f"chat/adapter/peft/{name}" for name in PEFT)),
)
LINE = ("train", "train", "export", "sample", "report")
MODEL_FILES = ("**/*.json", "**/*.safetensors", "**/*.txt", "**/*.jinja")
GROUPS: dict[str, Maker] = {
    "image settings": _image_setting,
    "language settings": _language_setting,
    "recipe values": _recipe_value,
    "images": _picture,
    "image runs": _damaged("conf=image", LINE, ("run/**/*", "run/.*/*")),
    "conversations": _conversations,
    "captions": _damaged("conf=image", ("caption", "dataset", "train"), ("images/*.txt", "images/*.jsonl")),
    "language runs": _damaged("conf=language", LINE, ("chat/**/*", "chat/.*/*")),
    "runs by folder": _damaged("run_dir=run", ("export", "sample", "report"), ("run/config.yaml",)),
    "odd names": _odd_path,
    "recipe files": _damaged("conf=image", ("train", "plan", "report"), ("conf/image.yaml",)),
    "adapters": _adapter,
    "chat templates": _template,
    "language bases": _damaged(
        "conf=language", ("train", "plan"), tuple(f"lm/{p}" for p in MODEL_FILES), "run_dir=other"
    ),
    "image bases": _damaged("conf=image", ("train", "plan"), tuple(f"base/{p}" for p in MODEL_FILES), "run_dir=other"),
    "single files": _damaged(
        "conf=image",
        ("train",),
        ("single.safetensors",),
        "model.base=single.safetensors",
        "model.parts=base",
        "run_dir=other",
    ),
    "captioners": _damaged(
        "conf=image", ("caption",), tuple(f"captioner/{p}" for p in MODEL_FILES), "caption.overwrite=true"
    ),
    "no files": _no_file,
    "caption tables": _caption_table,
    "GGUF bases": _gguf,
    "caches": _damaged("conf=image", ("train", "dataset"), ("cache/**/*",), "trainer.restart=true"),
}
