"""Adapters by the names that clients call them, each known by its content and loaded when it is first asked for.

`base` is the base alone, `base:NAME` an adapter, `base:NAME@step-200` a checkpoint of the run that made it.
"""

import asyncio
import json
import re
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from finetune.adapters import formats
from finetune.config.rules import is_file_name
from finetune.errors import ConfigError, ModelError
from finetune.reading import read_text
from finetune.run.hashing import Stamp, hash_files, stamp_of, trusted
from finetune.run.plain import UNREADABLE
from finetune.serving.requests import BASE, Refused
from finetune.training import checkpoint

T = TypeVar("T")
BASE_NAME = "base"
CHECKPOINT = re.compile(r"(?P<name>.+)@step-(?P<step>[0-9]{1,18})")
KEY_DIGITS = 16  # of a hash; an adapter's key is also a module's name, in which no dot may be
TEMPLATE_FILE = "chat_template.json"
BASE_CONTENT = "content of model.base"  # in the identity of a run's checkpoints


@dataclass(frozen=True)
class Source:
    """Where an adapter lies. folder: of PEFT, or a file. run: the run folder around it, if there is one."""

    name: str
    folder: Path
    run: Path | None

    @property
    def steps(self) -> list[int]:
        """The run's checkpoints."""
        return checkpoint.steps_on_disk(self.run / "checkpoints") if self.run else []

    def files(self, step: int | None) -> tuple[Path, ...]:
        """What decides the adapter, or that of a checkpoint, and what it can be used with."""
        if not self.folder.is_dir():
            return (self.folder,)
        settings = [self.folder / name for name in (formats.PEFT_CONFIG, TEMPLATE_FILE)]
        if step is not None and self.run:
            weights = [checkpoint.at(self.run / "checkpoints", step) / checkpoint.ADAPTER]
        else:
            weights = sorted(self.folder.glob("*.safetensors"))
        return (*weights, *(file for file in settings if file.exists()))

    @property
    def loaded_bytes(self) -> float:
        """Of the adapter in use, which is computed in fp32; 0 of one that can't be read: who asks for it is told."""
        try:
            weights = formats.read_weights(self.files(None)[0])
        except (ModelError, IndexError):
            return 0.0
        return 4.0 * sum(weight.numel() for weight in weights.values())


def most_bytes(sources: Collection[Source], most: int) -> float:
    """Of all adapters that can be loaded at once, `most` of them, as if each were as large as the largest."""
    count = min(most, sum(1 + len(source.steps) for source in sources))
    return count * max((source.loaded_bytes for source in sources), default=0.0)


@dataclass(frozen=True)
class Loaded:
    """A model that a request named. content: hash of the base, and of its adapter. key: of the adapter."""

    model: str
    content: str
    key: str = BASE


@dataclass(frozen=True)
class BaseIdentity:
    """What adapters are checked against. content: hash. template: sha256 of the chat template, empty for none."""

    name: str
    content: str
    template: str


class Holder(Protocol):
    """An engine, as far as adapters go."""

    async def between_steps(self, work: Callable[[], T]) -> T:
        """What `work` returns; the model is not used meanwhile."""
        ...

    def load_adapter(self, folder: Path, key: str) -> None:
        """Put an adapter into the model. Raises ModelError if it doesn't fit."""
        ...

    def drop_adapter(self, key: str) -> None:
        """Take it out again."""
        ...


def sources(own: Path | None, own_name: str, given: Mapping[str, str]) -> dict[str, Source]:
    """Adapters by name: the run's own one, if there is one, and those of `serve.adapters`.

    given: name -> run folder or adapter's folder. Raises ConfigError for a name that can't be one or is the run's own,
    ModelError for a folder that isn't there.
    """
    found = {own_name: Source(own_name, own, _run_around(own))} if own else {}
    for name, path in given.items():
        if not is_file_name(name) or set(name) & set(":@") or name in found:
            raise ConfigError(
                f"serve.adapters: an adapter can't be called {name!r} here; take another name, without : @ /"
            )
        folder = formats.peft_folder(Path(path))
        if not folder.exists():
            raise ModelError(f"serve.adapters: there is no adapter at {path}; name a run folder or an adapter's folder")
        found[name] = Source(name, folder, _run_around(folder))
    return found


def _run_around(adapter: Path) -> Path | None:
    """The run folder of `RUN/adapter/peft`."""
    run = adapter.parent.parent
    return run if (run / "checkpoints").is_dir() else None


class Shelf:
    """Loads adapters by content, and drops those that were not asked for the longest."""

    def __init__(self, found: Mapping[str, Source], holder: Holder, *, base: BaseIdentity, most: int) -> None:
        """most: adapters that stay loaded, besides those in use."""
        self.sources, self.base = dict(found), base
        self._holder, self._most = holder, most
        self._lock = threading.Lock()  # between requests, and the engine's thread that loads
        self._loaded: dict[str, None] = {}  # keys, the last used at the end
        self._uses: Counter[str] = Counter()
        self._hashes: dict[tuple[Path, ...], tuple[list[Stamp], str]] = {}

    @property
    def default(self) -> str:
        """The model of requests that name none."""
        return f"{BASE_NAME}:{next(iter(self.sources))}" if self.sources else BASE_NAME

    def names(self) -> list[str]:
        """All models, the default first."""
        tuned = [f"{BASE_NAME}:{name}" for name in self.sources]
        steps = [f"{BASE_NAME}:{source.name}@step-{step}" for source in self.sources.values() for step in source.steps]
        return [*tuned, BASE_NAME, *steps]

    async def content(self, model: str) -> str:
        """What a model is known by: the hash of the base, and of its adapter. Raises Refused as `using`."""
        if model == BASE_NAME:
            return self.base.content
        with _refused(model):
            return f"{self.base.content}+{await asyncio.to_thread(self._content, *self._find(model))}"

    @asynccontextmanager
    async def using(self, model: str) -> AsyncIterator[Loaded]:
        """A model, loaded; it stays so inside the block. An adapter whose files have changed is loaded again.

        Raises Refused for a name that there isn't, and for an adapter that was trained on another base or template.
        """
        if model == BASE_NAME:
            yield Loaded(model, self.base.content)
            return
        source, step = self._find(model)
        with _refused(model):
            key = await asyncio.to_thread(self._content, source, step)
        with self._lock:
            self._uses[key] += 1
            if ready := key in self._loaded:
                self._loaded[key] = self._loaded.pop(key)  # to the end
        try:
            if not ready:
                with _refused(model):
                    await self._holder.between_steps(lambda: self._have(source, step, key))
            yield Loaded(model, f"{self.base.content}+{key}", key)
        finally:
            with self._lock:
                self._uses[key] -= 1

    def _have(self, source: Source, step: int | None, key: str) -> None:
        """Load an adapter unless another request has done so, and drop others that are too many."""
        if key not in self._loaded:
            with tempfile.TemporaryDirectory() as temporary:
                folder = source.folder if step is None else _unpacked(source, step, Path(temporary))
                require_same_base(source, folder, self.base)
                self._holder.load_adapter(folder, key)
            if self._content(source, step) != key:
                self._holder.drop_adapter(key)
                raise ModelError(f"{source.folder} was replaced while it was read; ask again")
        with self._lock:
            self._loaded[key] = None
            idle = [old for old in self._loaded if not self._uses[old]]
            dropped = idle[: max(0, len(self._loaded) - self._most)]
            for old in dropped:
                del self._loaded[old]
        for old in dropped:
            self._holder.drop_adapter(old)

    def _find(self, model: str) -> tuple[Source, int | None]:
        name = model.removeprefix(f"{BASE_NAME}:")
        step = None
        if name not in self.sources and (match := CHECKPOINT.fullmatch(name)):
            name, step = match["name"], int(match["step"])
        source = self.sources.get(name)
        if source is None or not model.startswith(f"{BASE_NAME}:") or (step is not None and step not in source.steps):
            raise Refused(
                404,
                f"there is no model {model[:100]!r}; this server has {', '.join(self.names())}",
                code="model_not_found",
                param="model",
            )
        return source, step

    def _content(self, source: Source, step: int | None) -> str:
        """Hash of an adapter, whatever it is called. Raises ModelError where it isn't there any more."""
        try:
            files = source.files(step)
            stamps, now = [stamp_of(file) for file in files], time.time_ns()
            if files not in self._hashes or self._hashes[files][0] != stamps:
                digest = hash_files(files)[:KEY_DIGITS]
                if not all(trusted(stamp, now) for stamp in stamps):
                    return digest
                self._hashes[files] = stamps, digest
            return self._hashes[files][1]
        except OSError as error:
            raise ModelError(f"{error.filename} can't be read ({error.strerror})") from error


@contextmanager
def _refused(model: str) -> Iterator[None]:
    try:
        yield
    except ModelError as error:
        raise Refused(409, f"{model}: {error}", code="adapter_unusable", param="model") from error


def _unpacked(source: Source, step: int, folder: Path) -> Path:
    """A checkpoint as a PEFT folder, with the settings of the adapter that was exported from its run."""
    from safetensors.torch import save_file

    assert source.run is not None
    saved = checkpoint.at(source.run / "checkpoints", step) / checkpoint.ADAPTER
    weights = formats.read_weights(saved)
    if any(name.endswith(".initial") for name in weights):
        raise ModelError("checkpoints of lora.init=pissa can't be served, only the exported adapter")
    for name in (formats.PEFT_CONFIG, TEMPLATE_FILE):
        if (source.folder / name).exists():
            shutil.copy(source.folder / name, folder / name)
    named = {f"base_model.model.{name}": weight for name, weight in weights.items()}
    save_file(named, folder / formats.PEFT_WEIGHTS, metadata={"format": "pt"})
    return folder


def require_same_base(source: Source, folder: Path, base: BaseIdentity) -> None:
    """Raises ModelError for an adapter that was trained on another base, or with another chat template.

    A run's checkpoints know the content of the base, as exported files do. Others know what it was called.
    """
    trained = _trained_on(source)
    same = trained == base.content if trained else formats.is_of_base(folder, base.name, base.content)
    if not same:
        trained = trained or " ".join(filter(None, formats.made_for(folder)))
        raise ModelError(f"it was trained on the base {trained}, and this server has {base.name} ({base.content})")
    template = _settings(folder / TEMPLATE_FILE).get("sha256", base.template)
    if template != base.template:
        raise ModelError(
            "it was trained with another chat template; name that one in data.chat_template, or serve it alone"
        )


def _trained_on(source: Source) -> str:
    """Hash of the base that the run's last checkpoint notes; empty where nothing is noted."""
    if not source.steps or source.run is None:
        return ""
    state = _settings(checkpoint.at(source.run / "checkpoints", source.steps[-1]) / checkpoint.STATE)
    return str(state.get("identity", {}).get(BASE_CONTENT, ""))


def _settings(file: Path) -> dict[str, Any]:
    """A JSON file's object; empty where there is none. Raises ModelError for a damaged one."""
    try:
        return dict(json.loads(read_text(file)))
    except FileNotFoundError:
        return {}
    except UNREADABLE as error:
        raise ModelError(f"{file} is damaged; export the adapter again") from error
