"""User errors through the real command line: one line a problem, its exit code, and no file of the user changed."""

import ctypes
import json
import re
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune import hub
from finetune.data.images import walk
from finetune.errors import ConfigError, DataError, FinetuneError, ModelError, RunError
from tests.end_to_end import command
from tests.end_to_end.stored_runs import CONVERSATIONS, STORED
from tests.tiny_models import change_weights

Cli = Callable[..., Any]
CUT_PNG = (STORED / "pictures" / "blue.png").read_bytes()[:100]
GOOD_ROW = b'{"prompt": "a", "completion": "b"}\n'

# Runs a command without root's right to ignore file permissions (capabilities(7)); for others it changes nothing.
DROP = "import ctypes, os, sys; [ctypes.CDLL(None).prctl(24, n) for n in (1, 2)]; os.execv(sys.argv[1], sys.argv[1:])"
ORDINARY = (sys.executable, "-c", DROP)


def refused(answer: Any, code: int, *said: Sequence[str] | str) -> None:
    """The exit code, and one line for each problem that holds all its words; nothing else went wrong."""
    expected = [[words] if isinstance(words, str) else words for words in said]
    lines = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert answer.code == code, answer.err
    assert len(lines) == len(expected), answer.err
    for line, words in zip(lines, expected, strict=True):
        assert [word for word in words if word not in line] == [], line
    assert "Traceback" not in answer.err
    assert "unexpected" not in answer.err
    assert answer.out == ""


@contextmanager
def untouched(*folders: Path) -> Iterator[None]:
    """These folders hold the same before and after."""
    before = command.contents(*folders)
    yield
    assert command.contents(*folders) == before


# -- configuration: the exit code of a real process; the words themselves are tested with the command line -----------


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["conf=pixar_stile"], [["'pixar_stile'", "did you mean pixar_style?", "pirate_chat"]]),
        (["conf=pixar_style", "lora.rnak=4"], [["lora.rnak", "did you mean lora.rank?"]]),
        (
            ["conf=pixar_style", "lora.rank=0", "optim.lr=-1", "trainer.micro_batch=0", "sample.seeds=[]"],
            [
                ["lora.rank must be at least 1, got 0", "lora.rank=16"],
                ["optim.lr must be above 0, got -1.0", "optim.lr=0.0001"],
                ["trainer.micro_batch must be at least 1, got 0", "trainer.micro_batch=4"],
                ["sample.seeds", "sample.seeds=[0,1]"],
            ],
        ),
    ],
    ids=["recipe", "key", "values"],
)
def test_bad_configuration(workdir: Path, words: list[str], said: list[list[str]]) -> None:
    (workdir / "here").mkdir()
    refused(command.run("train", *words, cwd=workdir / "here"), ConfigError.exit_code, *said)
    assert list((workdir / "here").iterdir()) == []


# -- images --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ((), ["there is no folder other", "data.folder=path/to/images"]),
        (("other/",), ["other is empty", "data.folder=path/to/images"]),
        (
            ("other/notes.doc", "other/a.docx"),
            ["other has no images (found: 1 .doc, 1 .docx)", ".jpg .jpeg", "data."],
        ),
        (("other",), ["other is a file", 'data.folder="."']),
    ],
    ids=["missing", "empty", "no images", "a file"],
)
def test_a_folder_without_images(
    finetune_cli: Cli, workdir: Path, small: list[str], made: tuple[str, ...], said: list[str]
) -> None:
    for name in made:
        path = workdir / name
        (path if name.endswith("/") else path.parent).mkdir(exist_ok=True)
        if not name.endswith("/"):
            path.write_text("words")
    for verb in ("train", "plan"):
        refused(finetune_cli(verb, *small, "data.folder=other"), DataError.exit_code, said)
    if made:
        assert not list((workdir / "other").glob("metadata.jsonl"))


@pytest.mark.sampled
@pytest.mark.parametrize("verb", ["train", "plan"])
@pytest.mark.parametrize("kind", ["images", "text"])
def test_a_cache_that_can_not_be_made(finetune_cli: Cli, images: Path, small: list[str], kind: str, verb: str) -> None:
    Path("file").write_text("words")
    Path("talk.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    words = small if kind == "images" else ["conf=pirate_chat", "data.file=talk.jsonl", "run_dir=run"]
    for cache, why in (("file", "File exists"), ("file/below", "Not a directory")):
        answer = finetune_cli(verb, *words, f"data.cache={cache}")
        refused(answer, DataError.exit_code, [f"cannot use the cache {cache} ({why})", "data.cache=FOLDER"])


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("talk.jsonl", b"no JSON"),
        ("talk.jsonl", b'{"a": 1}'),
        ("talk.jsonl", b""),
        ("talk.json", b"[{"),
        ("talk.csv", b"a,b\n1,2"),
        ("talk.parquet", b"PAR1"),
        ("talk.docx", b"words"),
        ("talk.zip", b"PK"),
        ("images/metadata.jsonl", b"no JSON"),
        ("images/metadata.parquet", b"PAR1"),
        ("images/red.txt", b"\xff\xfe\xff"),
    ],
)
def test_a_plan_refuses_the_data_that_training_refuses_at_a_glance(
    finetune_cli: Cli, images: Path, small: list[str], file: str, content: bytes
) -> None:
    Path(file).write_bytes(content)
    words = small if file.startswith("images") else ["conf=pirate_chat", f"data.file={file}", "run_dir=run"]
    trained, planned = finetune_cli("train", *words), finetune_cli("plan", *words)
    refused(planned, DataError.exit_code, [Path(file).stem])
    assert (trained.code, trained.errors[-1]) == (planned.code, planned.errors[-1])


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("images/blue.png", b"no image", "1 unreadable image; fix or remove what is listed"),
        ("images/blue.png", b"", "images/blue.png: is empty (0 bytes)"),
        ("images/blue.png", CUT_PNG, "images/blue.png: is truncated"),
        ("images/bleu.txt", b"words", "bleu.txt: there is no image bleu"),
        ("talk.jsonl", GOOD_ROW + b"no JSON", "talk.jsonl:2"),
        ("talk.jsonl", GOOD_ROW + b'{"prompt": "a", "completion": ""}', "talk.jsonl:2"),
    ],
)
def test_a_plan_looks_at_examples_as_training_does(
    finetune_cli: Cli, images: Path, small: list[str], file: str, content: bytes, said: str
) -> None:
    (images / "red.txt").unlink()
    Path(file).write_bytes(content)
    words = small if file.startswith("images") else ["conf=pirate_chat", f"data.file={file}", "run_dir=run"]
    with untouched(images):
        trained, planned = finetune_cli("train", *words), finetune_cli("plan", *words)
    assert said in planned.err
    errors = [[line for line in answer.errors if line.startswith("error: ")] for answer in (trained, planned)]
    assert (trained.code, errors[0]) == (planned.code, errors[1]) == (DataError.exit_code, errors[0])


def test_a_captioner_that_nothing_is_to_be_captioned_with_need_not_be_there(
    finetune_cli: Cli, images: Path, small: list[str]
) -> None:
    assert finetune_cli("plan", *small, "caption.model=./nowhere").code == 0
    refused(finetune_cli("plan", *small, "caption.model=./nowhere", "caption.overwrite=true"), 4, "folder ./nowhere")


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        (["conf=pixar_style", "model.base=./nowhere"], ModelError, "no model folder ./nowhere; give a folder"),
        (["conf=pirate_chat", "model.base=./nowhere"], ModelError, "no model folder ./nowhere; give a folder"),
        (["conf=pixar_style", "model.base=x.safetensors"], ModelError, "no file x.safetensors; download it"),
        (["conf=pixar_style", "model.base=./empty"], ModelError, "./empty holds no model_index.json"),
        (["conf=pirate_chat", "model.base=./empty"], ModelError, "./empty holds no model_index.json"),
        (["conf=pixar_style", "caption.model=./empty"], ModelError, "./empty holds no config.json"),
        (["conf=pirate_chat", "data.chat_template=x.jinja"], DataError, "there is no chat template x.jinja; there are"),
        (["conf=pirate_chat", "run_dir=empty/file"], RunError, "the run folder empty/file (File exists); choose one"),
        (["conf=pirate_chat", "run_dir=empty/file/a"], RunError, "folder empty/file/a (Not a directory); choose one"),
        (["conf=pirate_chat", "run_dir=foreign"], RunError, "foreign/report.html is of no run, and a run would"),
        (["conf=pixar_style", "model.base=./bare"], ModelError, "bare/unet/*.safetensors is missing; it needs"),
        (["conf=pirate_chat", "model.base=./bare_chat"], ModelError, "bare_chat/*.safetensors is missing; it needs"),
        (["conf=pixar_style", "caption.model=./bare_blip"], ModelError, "bare_blip/*.safetensors is missing; it needs"),
        (["conf=pixar_style", "caption.model=./mute"], ModelError, "mute/tokenizer.json is missing; it needs"),
        (["conf=pixar_style", "caption.model=embedded:language"], ModelError, "is a llama model; captions are made by"),
        (["conf=pirate_chat", "model.base=./cut"], ModelError, "cut/model.safetensors is damaged (9 bytes without a"),
        (
            ["conf=pirate_chat", "export.formats=[gguf]", "lora.dora=true"],
            ConfigError,
            "names gguf, but lora.dora=true",
        ),
    ],
)
def test_a_plan_refuses_what_training_refuses_before_its_first_step(
    finetune_cli: Cli, workdir: Path, images: Path, words: list[str], error: type[FinetuneError], said: str
) -> None:
    for text in images.glob("*.txt"):
        text.unlink()
    (workdir / "empty").mkdir()
    (workdir / "empty/file").touch()
    (workdir / "foreign").mkdir()
    (workdir / "foreign/report.html").touch()
    for folder, name, without in (
        ("diffusion", "bare", "*.safetensors"),
        ("language", "bare_chat", "*.safetensors"),
        ("language", "cut", "*.safetensors"),
        ("captioner", "bare_blip", "*.safetensors"),
        ("captioner", "mute", "tokenizer*"),
    ):
        shutil.copytree(hub.EMBEDDED / folder, name, ignore=shutil.ignore_patterns(without))
    Path("cut/model.safetensors").write_bytes(b"cut short")
    data = "data.folder=images" if words[0] == "conf=pixar_style" else f"data.file={STORED / CONVERSATIONS}"
    with untouched(images):
        for verb in ("train", "plan"):
            refused(finetune_cli(verb, words[0], data, "run_dir=run", *words[1:]), error.exit_code, said)
    assert not Path("run").exists()


def huge(side: int) -> bytes:
    """A whole black PNG of side x side pixels, one bit each."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(side * (1 + side // 8)), 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_bad_images_are_all_named_and_may_be_skipped(finetune_cli: Cli, images: Path, small: list[str]) -> None:
    noise = Image.effect_noise((256, 256), 90)
    noise.save(images / "truncated.jpg")
    (images / "truncated.jpg").write_bytes((images / "truncated.jpg").read_bytes()[:9000])
    (images / "corrupt.png").write_bytes(b"these are words, not pixels")
    (images / "empty.webp").write_bytes(b"")
    (images / "huge.png").write_bytes(huge(30_000))
    with untouched(images):
        refused(
            finetune_cli("train", *small),
            DataError.exit_code,
            ["4 unreadable images", "data.skip_bad=true"],
            ["corrupt.png", "is not an image"],
            ["empty.webp", "is empty (0 bytes)"],
            ["huge.png", "30000 x 30000 pixels", "data.max_pixels=900000000"],
            ["truncated.jpg", "is truncated"],
        )
        skipping = finetune_cli("train", *small, "data.skip_bad=true")
    assert skipping.code == 0, skipping.err
    warned = [line for line in skipping.errors if line.startswith("warning: left out images/")]
    assert [line.split(":")[1].split("/")[1] for line in warned] == [
        *("corrupt.png", "empty.webp", "huge.png", "truncated.jpg")
    ]
    lines = Path("run/dataset.jsonl").read_text().splitlines()
    assert [json.loads(line)["file"] for line in lines] == ["blue.png", "green.png", "red.png", "white.png"]


def test_a_single_image_is_trained_on_with_a_warning(finetune_cli: Cli, images: Path, small: list[str]) -> None:
    for name in ("green", "blue", "white"):
        (images / f"{name}.png").unlink()
        (images / f"{name}.txt").unlink()
    counted_wrongly = re.compile(r"(?<![\d.,/×])\b1 [a-z]+s\b")
    with untouched(images):
        answer = finetune_cli("train", *small, "trainer.steps=1")
        again = finetune_cli("train", *small, "trainer.steps=1")
    assert (answer.code, again.code) == (0, 0), answer.err
    assert [line for line in answer.errors if line.startswith("warning: only one image; ")]
    assert counted_wrongly.findall("\n".join([answer.err, answer.out, again.err, again.out])) == []
    assert Path("run/adapter/pixar_style.safetensors").exists()


def test_a_folder_whose_files_can_be_listed_and_not_looked_at(workdir: Path, images: Path, small: list[str]) -> None:
    (images / "locked").mkdir()
    (images / "red.png").rename(images / "locked" / "red.png")
    (images / "locked").chmod(0o444)
    try:
        answer = command.run("caption", *small, cwd=workdir, before=ORDINARY)
    finally:
        (images / "locked").chmod(0o755)
    refused(answer, DataError.exit_code, "images/locked: can't be read (Permission denied); make it readable, move")


def test_a_home_folder_is_no_folder_of_images(
    finetune_cli: Cli, workdir: Path, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (workdir / "home/project").mkdir(parents=True)
    for number in range(9):
        (workdir / f"home/project/{number}.py").touch()
    monkeypatch.setenv("HOME", str(workdir / "home"))
    monkeypatch.setattr(walk, "MOST_OTHERS", 5)
    said = ["home is no folder of images: 0 images among its first", "files and folders", "data.folder=path/to/images"]
    for command_name in ("train", "caption"):
        refused(finetune_cli(command_name, *small, "data.folder=~"), DataError.exit_code, said)


# -- captions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"), [("red.txt", "ein grüner Würfel"), ("metadata.jsonl", '{"file_name": "red.png", "text": "ü"}')]
)
def test_captions_that_are_not_utf8(finetune_cli: Cli, images: Path, small: list[str], name: str, text: str) -> None:
    data = text.encode("latin-1")
    (images / name).write_bytes(data)
    at = data.index(b"\xfc")
    with untouched(images):
        refused(
            finetune_cli("train", *small),
            DataError.exit_code,
            [f"images/{name}: byte {at} is not UTF-8 (0xfc)", "save the file as UTF-8"],
        )


def test_of_a_key_that_is_there_twice_none_is_trained(finetune_cli: Cli, images: Path, small: list[str]) -> None:
    (images / "metadata.jsonl").write_text('{"file_name": "red.png", "text": "mine",\t"text": "another"}\n')
    Path("chats.jsonl").write_text(
        '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "prompt": "b", "completion": 1}'
    )
    Path("chats.json").write_text('[\n{"messages": [{"role": "user", "role": "assistant",\n"content": "a"}]}]')
    keep = "twice in one object (column {}); keep one of them"
    with untouched(images):
        for words, said in (
            (small, f'images/metadata.jsonl, line 1: has the key "text" {keep.format(42)}'),
            (["conf=pirate_chat", "data.file=chats.jsonl"], f'chats.jsonl:2: has the key "prompt" {keep.format(17)}'),
            (["conf=pirate_chat", "data.file=chats.json"], f'chats.json:2: has the key "role" {keep.format(32)}'),
        ):
            refused(finetune_cli("train", *words, "run_dir=run"), DataError.exit_code, said)


def test_a_caption_that_is_too_long_is_warned_about_with_what_is_lost(
    finetune_cli: Cli, images: Path, small: list[str]
) -> None:
    text = "a red wall, pixar style, " + " ".join(f"brick{number}" for number in range(40))
    (images / "red.txt").write_text(text)
    for _ in range(2):  # also where nothing is left to encode
        with untouched(images):
            answer = finetune_cli("dataset", *small)
        assert answer.code == 0, answer.err
        said = r"^warning: the caption of red.png is truncated: (\d+) words dropped: (.*)$"
        found = re.findall(said, answer.err, re.MULTILINE)
        assert len(found) == 1
        words, lost = found[0]
        assert int(words) == len(lost.split())
        assert text.replace(" ", "").endswith(lost.replace(" ", ""))
        assert 0 < len(lost) < len(text)
        Path("run/receipts/dataset.json").unlink()


# -- the output folder -----------------------------------------------------------------------------------------------


@pytest.fixture
def rights() -> None:
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "prctl"):
        pytest.skip("file permissions are tested on Linux")


@pytest.mark.exhaustive
@pytest.mark.usefixtures("rights")
def test_a_read_only_output_folder(workdir: Path, images: Path, small: list[str]) -> None:
    closed = workdir / "closed"
    closed.mkdir(mode=0o555)
    with untouched(images):
        answer = command.run("train", *small, "run_dir=closed/run", cwd=workdir, before=ORDINARY)
    refused(answer, RunError.exit_code, ["run folder closed/run (Permission denied)", "run_dir=PATH"])
    planned = command.run("plan", *small, "run_dir=closed/run", cwd=workdir, before=ORDINARY)
    assert (planned.code, planned.errors) == (answer.code, answer.errors)
    assert list(closed.iterdir()) == []


@pytest.mark.exhaustive
@pytest.mark.usefixtures("rights")
def test_a_read_only_folder_of_images_without_captions(workdir: Path, images: Path, small: list[str]) -> None:
    (images / "red.txt").unlink()
    images.chmod(0o555)
    try:
        with untouched(images):
            answer = command.run("train", *small, cwd=workdir, before=ORDINARY)
            planned = command.run("plan", *small, cwd=workdir, before=ORDINARY)
    finally:
        images.chmod(0o755)
    assert (planned.code, planned.errors) == (answer.code, answer.errors)
    refused(
        answer,
        DataError.exit_code,
        ["captions can't be written to images/metadata.jsonl (Permission denied)", "chmod u+w", "data.folder=COPY"],
    )


@pytest.mark.sampled
@pytest.mark.usefixtures("rights")
@pytest.mark.parametrize("verb", ["train", "plan"])
@pytest.mark.parametrize(
    "recipe", [["smoke", "data.folder=images"], ["pirate_chat", f"data.file={STORED / CONVERSATIONS}"]]
)
def test_a_cache_that_holds_nothing_and_cannot_be_written(
    workdir: Path, images: Path, recipe: list[str], verb: str
) -> None:
    (workdir / "closed").mkdir(mode=0o555)
    words = [f"conf={recipe[0]}", *recipe[1:], "run_dir=run", "data.cache=closed"]
    said = "cannot use the cache closed (Permission denied); try data.cache=FOLDER"
    refused(command.run(verb, *words, cwd=workdir, before=ORDINARY), DataError.exit_code, said)


@pytest.mark.sampled
@pytest.mark.usefixtures("rights")
@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["conf=smoke", "data.folder=closed/images"], DataError.exit_code),
        (["conf=pirate_chat", "data.file=closed/talk.jsonl"], DataError.exit_code),
        (["conf=smoke", "data.folder=images", "lora.start_from=closed/adapter"], ModelError.exit_code),
    ],
)
def test_what_lies_in_a_closed_folder_cannot_be_read(workdir: Path, images: Path, words: list[str], code: int) -> None:
    (workdir / "closed").mkdir(mode=0o000)
    said = [f"{words[-1]} can't be read (Permission denied)", "make it readable"]
    refused(command.run("plan", *words, cwd=workdir, before=ORDINARY), code, said)


# Runs one command on a roomy disk and then on disks that hold a share of what it wrote, each time once more after the
# disk has grown; prints how each ended. In a mount namespace of its own: nothing stays mounted.
ON_SMALL_DISKS = """
import contextlib, gc, hashlib, io, json, pathlib, shutil, subprocess, sys
from finetune import cli
shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40)  # what fills a disk comes later
shares, words = json.loads(sys.argv[1]), json.loads(sys.argv[2])
def mount(*options):
    subprocess.run(["mount", *options, "disk"], check=True)
def attempt():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(words)
    adapter = pathlib.Path("disk/run/adapter/peft/adapter_model.safetensors")
    content = hashlib.sha256(adapter.read_bytes()).hexdigest() if adapter.exists() else ""
    print(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue(), "adapter": content}))
mount("-t", "tmpfs", "-o", "size=64m", "tmpfs")
attempt()
gc.freeze()  # the libraries stay: looking through them for cycles took half of every attempt
used = int(subprocess.check_output(["df", "--output=used", "-k", "disk"]).split()[-1])
for share in shares:
    subprocess.run(["umount", "-l", "disk"], check=True)
    mount("-t", "tmpfs", "-o", f"size={int(share * used)}k", "tmpfs")
    attempt()
    mount("-o", "remount,size=64m")
    attempt()
"""


def test_a_disk_without_room_for_checkpoints_is_said_before_the_first_step(
    finetune_cli: Cli, workdir: Path, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(workdir)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    said = [
        "the disk of run is too small: 10 KB are free, and up to ",
        "checkpoints of ",
        " of exports); free some space",
    ]
    words = ["trainer.steps=2", "trainer.save_every=1"]
    answer = finetune_cli("train", *small, *words)
    refused(answer, RunError.exit_code, [*said, "run_dir=PATH or trainer.keep_checkpoints=1"])
    assert not list(Path("run/checkpoints").glob("*"))
    planned = finetune_cli("plan", *small, *words)
    assert (planned.code, planned.errors) == (RunError.exit_code, answer.errors[-1:])
    shown = " ".join(planned.out.split())
    assert re.search(r" disk about .* \(2 checkpoints of .* of exports, .* of cache\); 10 KB free ", shown)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(total=0, free=0))  # one that doesn't say
    assert finetune_cli("train", *small, *words).code == 0


@pytest.mark.exhaustive
def test_a_full_disk_loses_nothing_wherever_it_strikes(workdir: Path, images: Path, small: list[str]) -> None:
    own = ["unshare", "--user", "--map-root-user", "--mount"]
    (workdir / "disk").mkdir()
    tried = [*own, "mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", "disk"]
    if shutil.which(own[0]) is None or subprocess.run(tried, cwd=workdir, capture_output=True, check=False).returncode:
        pytest.skip("a disk of one's own can't be mounted here")
    shares = [
        0.03,
        0.15,
        0.4,
        0.6,
        0.75,
        0.95,
    ]  # in the data set, training, its last checkpoint, export, samples, report
    words = ["train", *small, "run_dir=disk/run", "export.formats=[peft]"]
    ended = subprocess.run(
        [*own, sys.executable, "-c", ON_SMALL_DISKS, json.dumps(shares), json.dumps(words)],
        cwd=workdir,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    whole, *answers = [json.loads(line) for line in ended.stdout.splitlines()]
    assert whole["code"] == 0, whole
    assert len(answers) == 2 * len(shares)
    for full, roomy in zip(answers[::2], answers[1::2], strict=True):
        lines = [line for line in full["err"].splitlines() if line.startswith("error: ")]
        assert (full["code"], len(lines)) == (RunError.exit_code, 1), full
        assert "No space left on device" in lines[0] or "is full" in lines[0], lines
        assert "free" in lines[0]
        assert "Traceback" not in full["err"]
        assert (roomy["code"], roomy["adapter"]) == (0, whole["adapter"]), roomy  # the same command, once there is room


@pytest.mark.exhaustive
def test_a_run_folder_in_use_by_another_process(
    finetune_cli: Cli, workdir: Path, images: Path, small: list[str]
) -> None:
    other = command.start("dataset", *small, cwd=workdir)
    other.wait_for("the lock", (workdir / "run" / ".lock.json").exists)
    other.send(signal.SIGSTOP)  # however long the question takes
    try:
        with untouched(images, workdir / "run"):
            refused(
                finetune_cli("train", *small),
                RunError.exit_code,
                [f"run is in use by process {other.process.pid} since 20", "wait for it", "run_dir=PATH"],
            )
    finally:
        other.send(signal.SIGCONT)
    ended = other.finish()
    assert ended.code == 0, ended.err


# -- going on from what is there -------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_going_on_with_another_configuration_lists_what_changed(
    finetune_cli: Cli, images: Path, small: list[str], trained: Path
) -> None:
    with untouched(images, trained / "checkpoints", trained / "adapter", trained / "samples"):
        for command in ("train", "plan"):
            changed = finetune_cli(command, *small, "lora.rank=2", "optim.lr=0.05", "seed=7", "trainer.steps=3")
            refused(
                changed,
                RunError.exit_code,
                [
                    "run was trained with other settings (lora.rank: 4 -> 2; optim.lr: 0.001 -> 0.05; seed: 0 -> 7)",
                    "run_dir=",
                    "trainer.restart=true",
                ],
            )
            refused(finetune_cli(command, *small, "trainer.steps=1"), RunError.exit_code, ["past trainer.steps=1"])
        (images / "red.txt").write_text("a crimson wall, pixar style")
        recaptioned = finetune_cli("train", *small)
        (images / "red.txt").write_text("a red wall, pixar style")
        refused(recaptioned, RunError.exit_code, ["1 caption changed: red.png", "trainer.restart=true"])
    for command in ("plan", "train", "plan"):  # more steps are no other run
        assert finetune_cli(command, *small, "trainer.steps=3").code == 0
    assert finetune_cli("plan", *small, "lora.rank=2", "trainer.restart=true").code == 0


def test_a_base_without_negative_prompts_refuses_one(finetune_cli: Cli, images: Path) -> None:
    flux = ["model=flux1_dev", "hardware=rtx4090", "sample.guidance=3", "sample.negative=blur"]
    refused(
        finetune_cli("plan", "conf=pixar_style", "data.folder=images", *flux),
        ConfigError.exit_code,
        ["sample.negative: flux takes no negative prompt; leave it out"],
    )


@pytest.mark.sampled
@pytest.mark.parametrize("command", ["plan", "train"])
def test_another_batch_or_base_is_refused_before_captions_are_made(
    finetune_cli: Cli, tiny_base: Path, images: Path, small: list[str], trained: Path, command: str
) -> None:
    (images / "red.txt").unlink()
    changed = shutil.copytree(tiny_base, Path("changed"))
    change_weights(changed)
    with untouched(images, trained / "checkpoints", trained / "adapter"):
        for words, difference in (
            (["trainer.micro_batch=4"], "effective batch: 2 -> 4"),
            ([f"model.base={changed}"], f"model.base: {tiny_base} -> {changed}"),
        ):
            refused(
                finetune_cli(command, *small, *words),
                RunError.exit_code,
                [f"run was trained with other settings ({difference})"],
            )
    (images / "red.txt").write_text("a red wall, pixar style")
    assert finetune_cli("plan", *small, "trainer.micro_batch=1").code == 0  # two processes would make the same of it
    if command == "train":
        refused(finetune_cli("train", *small, "trainer.micro_batch=1"), RunError.exit_code, ["effective batch: 2 -> 1"])


def test_a_damaged_checkpoint_is_named_and_the_advice_works(
    finetune_cli: Cli, images: Path, small: list[str], trained: Path
) -> None:
    newest = trained / "checkpoints" / "step-000002"
    file = newest / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-100])
    with untouched(images, trained / "checkpoints", trained / "adapter"):
        refused(
            finetune_cli("train", *small, "trainer.steps=3"),
            RunError.exit_code,
            ["checkpoint run/checkpoints/step-000002 is damaged (optimizer.pt ", "delete that folder"],
        )
    shutil.rmtree(newest)
    answer = finetune_cli("train", *small, "trainer.steps=3")
    assert answer.code == 0, answer.err
    assert "train: going on from step 1" in answer.errors


@pytest.mark.parametrize(
    "name", ["peft/adapter_model.safetensors", "peft/adapter_config.json", "pixar_style.safetensors"]
)
def test_a_damaged_adapter_is_named(
    finetune_cli: Cli, images: Path, small: list[str], trained: Path, name: str
) -> None:
    file = trained / "adapter" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    given = file.parent if name.startswith("peft") else file
    with untouched(images, trained / "samples", trained / "checkpoints"):
        refused(
            finetune_cli("sample", *small, f"sample.adapter={given}"),
            ModelError.exit_code,
            [f"run/adapter/{name} is damaged", "export it again"],
        )


def test_a_folder_without_weights_is_no_adapter(
    finetune_cli: Cli, workdir: Path, images: Path, small: list[str]
) -> None:
    (images / "deep").mkdir()
    (images / "deep" / "other.safetensors").write_bytes(b"not looked at")
    answer = finetune_cli("sample", *small, f"sample.adapter={images}")
    refused(answer, ModelError.exit_code, [f"no adapter at {images};", "sample.adapter=FOLDER_OR_FILE"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lora.rank=8"], "finished has rank 4, and lora.rank is 8; set lora.rank=4"),
        (
            ["model.base=embedded:diffusion"],
            ["finished does not fit: ", "tensors without a counterpart"],
        ),
        (
            ["conf=pirate_chat", f"data.file={STORED / CONVERSATIONS}", "lora.rank=4"],
            ["finished does not fit: ", "tensors without a counterpart"],
        ),
    ],
    ids=["rank", "another base", "another kind"],
)
def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_made(
    finetune_cli: Cli, workdir: Path, images: Path, small: list[str], finished: Path, words: list[str], said: list[str]
) -> None:
    (workdir / "finished").symlink_to(finished / "run")
    for text in images.glob("*.txt"):
        text.unlink()
    recipe = [] if words[0].startswith("conf=") else [word for word in small if not word.startswith("data.cache=")]
    start = ["lora.start_from=finished", "data.cache=cache", "run_dir=run"]
    with untouched(workdir):
        for verb in ("train", "plan"):
            refused(finetune_cli(verb, *recipe, *words, *start), ModelError.exit_code, said)
    assert sorted(path.name for path in workdir.iterdir()) == ["finished", "images"]


@pytest.mark.exhaustive
def test_a_model_that_is_nowhere_names_the_embedded_one(workdir: Path, images: Path, small: list[str]) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(workdir / "hub"), "HF_HUB_OFFLINE": "0"}
    words = [word for word in small if not word.startswith("model.")]
    (images / "red.txt").unlink()  # no caption is made
    with untouched(images):
        answer = command.run("train", *words, "model=sd15", cwd=workdir, **nowhere)
    refused(
        answer,
        ModelError.exit_code,
        ["stable-diffusion-v1-5/stable-diffusion-v1-5 is not on disk", "hub can't be reached", "model=embedded"],
    )
    assert answer.seconds < 60
