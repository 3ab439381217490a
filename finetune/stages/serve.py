"""Answer requests over HTTP, with the base and with adapters, until it is stopped."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from finetune.adapters import formats
from finetune.config.model_kinds import model_kind
from finetune.config.recipes import recipe_files
from finetune.config.schema import Config, ExportFormat
from finetune.config.spelling import override, setting
from finetune.errors import ConfigError
from finetune.run.progress import plural, say
from finetune.run.receipts import load_record
from finetune.run.records import Adapter

NEEDED = ("fastapi", "uvicorn", "prometheus_client")  # of the extra `serve`
KEY_FILE = "serve_key.sha256"


@dataclass(frozen=True)
class Serving:
    """A server that runs. keys: of clients by name, those that were made just now; "" without `serve.keys`."""

    url: str
    keys: dict[str, str]
    models: tuple[str, ...]


@dataclass(frozen=True)
class Served:
    """What was served until the server was stopped."""

    models: tuple[str, ...]


def serve(config: Config, typed: Sequence[str] = ()) -> Served:
    """Serve until SIGINT or SIGTERM. Raises ConfigError, ModelError, DataError before it begins.

    typed: recipe and settings as they were given, which a command that is offered repeats.
    """
    with _prepared(config, typed) as (parts, serving):
        from finetune.serving import server

        server.run(*parts)
    return Served(serving.models)


@contextmanager
def serving(config: Config, typed: Sequence[str] = ()) -> Iterator[Serving]:
    """Serve inside the block, in a thread; otherwise as `serve`."""
    with _prepared(config, typed) as (parts, found):
        from finetune.serving import server

        with server.in_background(*parts):
            yield found


@contextmanager
def _prepared(config: Config, typed: Sequence[str]) -> Iterator[tuple[Any, Serving]]:
    """What `finetune.serving.server` takes, with the models loaded and the address taken; what to type is said."""
    _require_packages()
    from finetune.serving import adapters, guard, keys, runs, server

    settings, run_dir = config.serve, Path(config.run_dir)
    with server.listening(settings.host, settings.port) as listener:
        hashes: dict[str, str] = {}
        new: dict[str, str] = {}
        if settings.keys or not guard.is_loopback(settings.host):
            hashes, new = keys.stored_or_new_keys(run_dir / KEY_FILE, settings.keys or [""])
        rules = guard.Rules(
            hashes,
            guard.names_of(settings.host, settings.names),
            frozenset(origin.rstrip("/") for origin in settings.origins),
            settings.max_body_kib * 1024,
        )
        own = _own_adapter(load_record(run_dir, "export", Adapter), config)
        found = adapters.sources(own, config.name, settings.adapters)
        kind: Any = import_module(f"finetune.serving.{model_kind(config.model.kind).name}")
        service = kind.service(config, found)
        try:
            url = _url(listener)
            if own is None:
                others = "" if len(service.shelf.names()) > 1 else "the base answers alone; "
                say(f"serve: no adapter in {config.run_dir} yet, {others}train one: {_train_command(config, typed)}")
            _announce(config, service, url, new, needs_key=bool(hashes))
            beside = runs.Runs(run_dir.absolute().parent, config.data.folder)
            yield (service, rules, listener, beside), Serving(url, new, tuple(service.shelf.names()))
        finally:
            service.close()


def _own_adapter(record: Adapter | None, config: Config) -> Path | None:
    """The run's PEFT folder, which is the format that adapters are put beside one another from."""
    if record and ExportFormat.peft.name not in record.files:
        formats_kept = [name for name in record.files if name in ExportFormat.__members__]
        words = [override("run_dir", config.run_dir), override("export.formats", [*formats_kept, "peft"])]
        raise ConfigError(
            f"the adapter of {config.run_dir} was exported without a PEFT folder; "
            f"type: {shlex.join(['finetune', 'export', *words])}"
        )
    return formats.peft_folder(Path(record.folder)) if record else None


def _require_packages() -> None:
    for name in NEEDED:
        try:
            import_module(name)
        except ImportError as error:
            raise ConfigError(f"`finetune serve` needs {name}; type: pip install 'finetune[serve]'") from error


def _url(listener: Any) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _train_command(config: Config, typed: Sequence[str]) -> str:
    """What trains the run that is served; the server's own settings don't belong to it."""
    if not typed:
        return "finetune.train(config)"
    words = [word for word in typed if not word.lstrip("+").startswith(("serve.", "serve="))]
    if any(word.startswith("conf=") for word in words):
        return shlex.join(["finetune", "train", *words])
    recipe = setting("conf", config.name) if config.name in recipe_files() else "conf=…"  # a run doesn't know its own
    return f"finetune train {recipe} {shlex.join(words)}"


def _announce(config: Config, service: Any, url: str, new: Mapping[str, str], *, needs_key: bool) -> None:
    """Models, and what to type to ask them. new: keys by name."""
    names = service.shelf.names()
    shown = [name for name in names if "@" not in name]
    steps = len(names) - len(shown)
    say(f"serve: models {', '.join(shown)}" + (f", and {plural(steps, 'checkpoint')} as NAME@step-N" if steps else ""))
    for name, key in new.items():
        say(f"serve: the key{name and f' of {name}'}, shown this once: {key}")
    if old := [name for name in config.serve.keys if name not in new]:
        file = Path(config.run_dir) / KEY_FILE
        say(f"serve: keys of before: {', '.join(old)}; for a new one delete its line in {file}")
    elif needs_key and not new:
        say(f"serve: the key is that of before; for a new one delete {Path(config.run_dir) / KEY_FILE}")
    for line in service.examples(url, "KEY" if needs_key else ""):
        say(f"  {line}")
    say(f"serve: {url} (stop with Ctrl-C)")
