"""Where models come from: the package itself, a local folder, the Hugging Face cache, then the hub; and who they are.

An image model in a single file is `finetune.diffusion.single_file`.

Weights are read as safetensors only, no code that comes with a model is ever run, and a hub that doesn't answer is
reported within seconds.
"""

import fnmatch
import gc
import hashlib
import json
import shlex
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError, ModelError, is_gpu_failure, is_out_of_memory
from finetune.reading import TEXTS, at_home, damage, read_text, require_whole
from finetune.run import libraries
from finetune.run.hashing import known_hash
from finetune.run.progress import plural

EMBEDDED = Path(__file__).resolve().parent / "embedded"
ARCHITECTURES = Path(__file__).resolve().parent / "architectures"  # configurations of released bases, without weights
HUB_ANSWER_S = 8.0  # one request that normally takes 0.2 s; name resolution may hang without an own time limit
REMEMBERED_BYTES = 64 << 20  # the hash of larger files is remembered: reading 24 GB again takes half a minute
HASHES = "finetune-hashes.json"  # beside the hub's cache, for every project of this user
REASON = 300  # characters of what a library says that are passed on
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")  # the second since transformers 5
OTHER_FORMATS = (".ckpt", ".pt", ".pth", ".bin", ".gguf")  # what model sites offer besides safetensors
PICKLE_WAY_OUT = (  # weights_only runs no code
    "import torch, safetensors.torch as s; "
    'w = torch.load({old!r}, map_location="cpu", weights_only=True); w = w.get("state_dict", w); '
    "s.save_file({{k: v.clone() for k, v in w.items() if torch.is_tensor(v)}}, {new!r})"
)
MODEL_FILES = {"model_index.json": "an image model", "config.json": "a language model or captioner"}
WITHOUT_WEIGHTS = ("Config", "Tokenizer", "Processor", "Scheduler")  # in the names of loaders
OFFLINE_WAYS_OUT = "model=embedded, model=embedded_language and caption=embedded come with the package"
LAYOUT = f"it needs the ordinary Hugging Face layout with *.safetensors weights ({OFFLINE_WAYS_OUT})"


def resolve(reference: str) -> Path | str:
    """The local folder behind `embedded:NAME` or a path; a hub id (`owner/name`, `owner/name@revision`) as it is.

    Raises ModelError for an embedded model that isn't there (listing those that are) and a path that doesn't exist.
    """
    if reference.startswith("embedded:"):
        name = reference.removeprefix("embedded:")
        folder = EMBEDDED / name
        if not _is_model(folder) or Path(name).name != name:
            there = ", ".join(f"embedded:{item.name}" for item in sorted(EMBEDDED.glob("*")) if _is_model(item))
            raise ModelError(f"there is no {reference}; this package carries: {there or 'none'}")
        return folder
    path = at_home(reference)
    if reference and path.is_dir():
        return path
    if path.is_file():
        _refuse_gguf(path)
        raise ModelError(
            f"{reference} is a single file, which only image models with a preset of their architecture are read "
            "from (model=sd15, model=sdxl, …); name the folder with its config files instead"
        )
    if not reference or reference.startswith((".", "/", "~")) or reference.count("/") > 1 + 2 * ("@" in reference):
        raise ModelError(
            f"no model folder {reference or repr(reference)}; give a folder with config files and safetensors, "
            f"a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5, or embedded:NAME ({OFFLINE_WAYS_OUT})"
        )
    return reference


def single_file(reference: str) -> Path | None:
    """The whole safetensors file that a reference names; None if it names a folder, a hub id or an embedded model.

    Raises ModelError for one that isn't there, is damaged, or has another format.
    """
    path = at_home(reference)
    suffix = path.suffix.lower()
    if not path.is_file() and (path.is_dir() or suffix not in (".safetensors", *OTHER_FORMATS)):
        return None
    if not path.is_file():
        raise ModelError(f"there is no file {reference}; download it, and type model.base= and where it lies")
    _refuse_gguf(path)
    if suffix != ".safetensors":
        code = PICKLE_WAY_OUT.format(old=str(path), new=str(path.with_suffix(".safetensors")))
        raise ModelError(
            f"{path} is no .safetensors file, and pickles may run code that comes with them; get the same model as "
            f".safetensors, or type: {shlex.join(['python', '-c', code])}"
        )
    if wrong := damage(path):
        raise ModelError(f"{path} is damaged ({wrong}); copy or download it again")
    return path


def _refuse_gguf(path: Path) -> None:
    if path.suffix.lower() == ".gguf":
        raise ModelError(f"{path} is quantised for inference (GGUF); get the same model as .safetensors in 16 bit")


def require(reference: str, *names: str) -> None:
    """Raises ModelError if the reference is a local folder in which none of these files says what model is there.

    names: `model_index.json` for image models, `config.json` for language models and captioners; none given: either.
    """
    source, wanted = resolve(reference), names or MODEL_FILES
    if isinstance(source, Path) and not any((source / name).is_file() for name in wanted):
        for quantised in sorted(source.glob("*.gguf")):
            _refuse_gguf(quantised)
        kinds = " and no ".join(f"{name} (of {MODEL_FILES[name]})" for name in wanted)
        raise ModelError(
            f"the folder {reference} holds no {kinds}; name the folder that does, in the ordinary Hugging Face layout, "
            f"or another base ({OFFLINE_WAYS_OUT})"
        )


def require_weights(reference: str, *parts: str) -> None:
    """Raises ModelError for a local folder of which one of these parts has no weights, or damaged ones."""
    source = resolve(reference)
    for part in parts if isinstance(source, Path) else ():
        if not (files := sorted(Path(source, part).glob("*.safetensors"))):
            missing = Path(reference, part, "*.safetensors")
            raise ModelError(f"{reference} can't be used: {missing} is missing; {LAYOUT}")
        require_whole(*files)


def to_download(reference: str, *parts: str) -> list[str]:
    """Those of these parts of a hub id that have no weights on this machine."""
    if isinstance(source := resolve(reference), Path):
        return []
    folder = _snapshot(source)
    return [part for part in parts if folder is None or not any((folder / part).glob("*.safetensors"))]


def require_reachable(reference: str) -> None:
    """Raises ModelError for a hub id without weights here if the hub doesn't answer in time, or has no such model."""
    if single_file(reference) is None and isinstance(source := resolve(reference), str):
        folder = _snapshot(source)
        if folder is None or not any(folder.rglob("*.safetensors")):
            _ask_hub(source)


def local(reference: str) -> Path | None:
    """The folder of a base that is on this machine, downloaded ones included; None if it isn't. Raises ModelError."""
    require(reference)
    source = resolve(reference)
    return source if isinstance(source, Path) else _snapshot(source)


def known_config(base: str) -> Path | None:
    """The folder with the base's configuration: its own, or the one in `ARCHITECTURES`; None if neither is there."""
    found = local(base)
    if found is not None and _config_file(found).is_file():
        return found
    for shipped in sorted(ARCHITECTURES.iterdir()):
        if shipped.is_dir() and json.loads(_config_file(shipped).read_text())["_name_or_path"] == base.split("@")[0]:
            return shipped
    return None


def config_folder(base: str) -> Path:
    """The same; no hub is asked. Raises ModelError if neither is there."""
    if (found := known_config(base)) is not None:
        return found
    raise ModelError(
        f"the configuration of {base} is neither on this machine nor in the package, so its memory can't be planned; "
        f"type: {shlex.join(['hf', 'download', base])} --include '*.json', or name a local folder as model.base"
    )


def load(loader: Any, reference: str, **options: Any) -> Any:
    """`loader.from_pretrained` on whatever `reference` means, with everything that can go wrong said in one line.

    loader: a class of transformers or diffusers. options: passed on (`subfolder`, `dtype`, …). Raises ModelError if the
    model can't be found, is damaged, lacks weights, or has none as safetensors.
    """
    if not any(word in loader.__name__ for word in WITHOUT_WEIGHTS):
        keep_libraries()
    source = resolve(reference)
    folder = source if isinstance(source, Path) else _snapshot(source)
    wanted = options | _safe_options(loader)
    if folder is not None and (lack := _lacks(loader, folder / (options.get("subfolder") or ""))) is None:
        return _attempt(loader, reference, folder, wanted)
    if isinstance(source, Path):
        require(reference)
        raise ModelError(_unusable(loader, reference, options, f"{lack} is missing"))
    _ask_hub(source)
    name, revision = _split(source)
    commit = folder.name if folder is not None else revision  # a half-downloaded model goes on as the same version
    return _attempt(loader, reference, name, wanted | ({"revision": commit} if commit else {}))


def keep_libraries() -> None:
    """Keep what libraries made when they were imported out of later searches for cycles, once, in a command of ours.

    Nothing that is kept out is ever freed, so this comes before the first model. A search looks at half a million
    objects for a quarter of a second, and stages search wherever they make room.
    """
    if not libraries.in_command or gc.get_freeze_count():
        return
    import peft  # noqa: F401  with bitsandbytes and torch's compiler behind it: nearly half of those objects

    gc.freeze()


def content_hash(reference: str, *parts: str) -> str:
    """Who the model is, by content: equal for equal weights and configuration, whatever the path or time.

    parts: patterns of top-level names that count (`"vae"`, `"text_encoder*"`); none given: everything. A hub model is
    its commit. Raises ModelError if the model isn't on disk and the hub doesn't answer.
    """
    source = resolve(reference)
    if isinstance(source, str):
        snapshot = _snapshot(source)
        commit = snapshot.name if snapshot is not None else _ask_hub(source)
        return f"{_split(source)[0]}@{commit}" + "".join(f"/{part}" for part in sorted(parts))
    digest = hashlib.sha256()
    for file in sorted(source.rglob("*")):
        relative = file.relative_to(source)
        counts = file.suffix in (*TEXTS, ".safetensors") and file.is_file()
        if counts and (not parts or any(fnmatch.fnmatchcase(relative.parts[0], part) for part in parts)):
            if file.suffix in TEXTS:
                require_whole(file)
            digest.update(f"{relative.as_posix()}\0{file.stat().st_size}\0".encode())
            hash_file_content(file, digest.update)
    return f"sha256:{digest.hexdigest()}"


def model_index(reference: str) -> dict[str, Any] | None:
    """A pipeline's model_index.json, or None where there is none on disk (yet)."""
    source = resolve(reference)
    folder = source if isinstance(source, Path) else _snapshot(source)
    file = folder / "model_index.json" if folder else None
    if file is None or not file.is_file():
        return None
    return read_object(file)


def read_object(file: Path) -> dict[str, Any]:
    """A JSON file of a model. Raises ModelError if it is no JSON object."""
    with explained(lambda reason: f"{file} is damaged ({reason}); restore it from a copy, or download the model again"):
        found = json.loads(read_text(file))
        if not isinstance(found, dict):
            raise ValueError("it holds no JSON object")
    return found


@contextmanager
def explained(message: Callable[[str], str]) -> Iterator[None]:
    """Around what libraries read and make of a model's files: whatever they raise becomes a ModelError.

    They check little of what they read, so that a damaged or odd file may raise anything. message: what is said for a
    reason. Errors that are ours, a lack of memory, and a GPU that fails pass.
    """
    try:
        yield
    except FinetuneError:
        raise
    except Exception as error:
        if is_out_of_memory(error) or is_gpu_failure(error):
            raise
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = " ".join(said.split())[:REASON] or type(error).__name__
        raise ModelError(message(reason)) from error


def _config_file(found: Path) -> Path:
    index = found / "model_index.json"
    return index if index.is_file() else found / "config.json"


def _safe_options(loader: Any) -> dict[str, Any]:
    safe: dict[str, Any] = {}
    if _has_weights(loader):
        safe = {"use_safetensors": True, "output_loading_info": True}
    elif hasattr(loader, "from_pipe"):  # a diffusers pipeline
        safe = {"use_safetensors": True}
    if loader.__name__.startswith("Auto") and loader.__module__.startswith("transformers."):
        safe["trust_remote_code"] = False  # the default asks at the terminal
    return safe


def _lacks(loader: Any, part: Path) -> str | None:
    """What `from_pretrained` would need and not find in the folder; None if nothing."""
    if not part.is_dir():
        return str(part)
    name, weights = loader.__name__, ("*.safetensors",) if _has_weights(loader) else ()
    wanted = TOKENIZER_FILES if "Tokenizer" in name else PROCESSOR_FILES if "ImageProcessor" in name else weights
    if wanted and not any(file.is_file() for pattern in wanted for file in part.glob(pattern)):
        return str(part / wanted[0])  # transformers would make an empty tokenizer and not say so
    return None


def _has_weights(loader: Any) -> bool:
    import torch

    return isinstance(loader, type) and issubclass(loader, torch.nn.Module)


def _unusable(loader: Any, reference: str, options: dict[str, Any], reason: str) -> str:
    part = Path(reference, options.get("subfolder") or "")
    return f"{part} can't be loaded as {loader.__name__}: {reason}; {LAYOUT}"


def _attempt(loader: Any, reference: str, source: Path | str, options: dict[str, Any]) -> Any:
    with explained(lambda reason: _unusable(loader, reference, options, reason)), libraries.without_progress_bars():
        return _load(loader, reference, source, options)


def _load(loader: Any, reference: str, source: Path | str, options: dict[str, Any]) -> Any:
    """One call of from_pretrained. Raises what it raises, and ModelError for damaged files and missing weights."""
    if isinstance(source, Path):
        part = source / (options.get("subfolder") or "")
        for file in sorted(part.rglob("*") if hasattr(loader, "from_pipe") else part.glob("*")):
            if file.suffix != ".safetensors" or "use_safetensors" in options:
                require_whole(file)
    loaded = loader.from_pretrained(str(source), **options)
    if not options.get("output_loading_info"):
        return loaded
    model, info = loaded
    missing = sorted(set(info["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if missing:  # left at random values by from_pretrained, which only warns
        raise ModelError(
            f"{reference} lacks {plural(len(missing), 'weight')} of {loader.__name__}, first {missing[0]}; get it again"
        )
    return model


def _ask_hub(source: str) -> str:
    """The hub's commit of a model. Raises ModelError if the hub doesn't answer in time, or has no such model."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    name, revision = _split(source)
    answer: list[Any] = []

    def ask() -> None:
        try:
            answer.append(HfApi().model_info(name, revision=revision, timeout=HUB_ANSWER_S / 2).sha)
        except Exception as error:  # whatever it is, it is reported below
            answer.append(error)

    # A thread, because resolving a host name can hang for half a minute and can't be given a time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_ANSWER_S)
    found = answer[0] if answer else TimeoutError(f"no answer within {HUB_ANSWER_S:.0f} s")
    if isinstance(found, str):
        return found
    if isinstance(found, GatedRepoError):
        raise ModelError(
            f"{name} is gated: accept its licence at https://huggingface.co/{name} and type: hf auth login"
        )
    if isinstance(found, RepositoryNotFoundError | RevisionNotFoundError | HFValidationError):
        raise ModelError(
            f"the hub has no public model {source} and there is no such folder; check the name, or type: hf auth login"
        )
    reason = textwrap.shorten(str(found), 120, placeholder=" …") or type(found).__name__
    raise ModelError(
        f"{source} is not on disk ({_cache()}) and the hub can't be reached ({reason}); on a machine with a network "
        f"type: {shlex.join(['hf', 'download', name])}, copy that folder here and name it instead; {OFFLINE_WAYS_OUT}"
    )


def _snapshot(source: str) -> Path | None:
    """Folder of a hub model in the local cache, named by its commit; None if it isn't there."""
    name, revision = _split(source)
    folder = _cache() / ("models--" + name.replace("/", "--"))
    reference = folder / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else (revision or "")
    snapshot = folder / "snapshots" / commit
    return snapshot if commit and snapshot.is_dir() else None


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _split(source: str) -> tuple[str, str | None]:
    name, _, revision = source.partition("@")
    return name, revision or None


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in MODEL_FILES)


def hash_file_content(file: Path, update: Callable[[bytes], object]) -> None:
    """Feed a file to a hash: all of it, or of a large one the hash of all of it, which is remembered."""
    if file.stat().st_size > REMEMBERED_BYTES:
        update(bytes.fromhex(known_hash(file, _cache().parent / HASHES)))
        return
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            update(block)
