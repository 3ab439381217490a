"""Draw or answer the recipe's prompts, base beside tuned."""

import re
import time
from pathlib import Path

from finetune import kinds
from finetune.adapters import attach, formats
from finetune.config.describe import as_dict
from finetune.config.schema import Config
from finetune.errors import ModelError
from finetune.memory.device import release_memory
from finetune.run.atomic import replace_folder
from finetune.run.hashing import hash_adapter, hash_files, hash_of
from finetune.run.progress import say
from finetune.run.receipts import load_record, save_receipt, set_aside_changed
from finetune.run.records import Adapter, Answers, Samples

MOST_OF_PROMPT = 40  # characters in a folder's name


def sample(config: Config, adapter: Adapter | None, *, own: bool = True) -> Samples | Answers:
    """Write `samples/`: all pairs on one page (a grid of images, or answers), `samples.jsonl`, each image alone.

    own: the settings are those of the run. Others get a folder below `samples_more/`, named by the first prompt and a
    hash of what decides them: what the run has drawn stays, up to date and in its report.

    Without prompts nothing is drawn, which is a record too: what an earlier command drew into `samples/` stays there,
    and is none of this run's.

    The adapter is `sample.adapter` if set, else `adapter`. Raises ModelError if there is none or it doesn't fit.
    """
    run_dir = Path(config.run_dir)
    settings = as_dict(config)
    if not config.sample.prompts:
        return _none(config, run_dir, hash_of(settings["sample"]))
    path = adapter_path(config, adapter)
    attach.require_adapter(path)  # before everything below a folder is hashed
    kind, precision = kinds.of(config), settings["trainer"]["precision"]
    model = {key: value for key, value in settings["model"].items() if key != "base"}
    contents = kind.contents(config)
    input_hash = hash_of(hash_adapter(path), settings["sample"], model, contents, precision)
    earlier = hash_of(_weights_hash(path), settings["sample"], settings["model"], precision)
    folder = (
        run_dir / "samples" if own else run_dir / "samples_more" / _folder_name(config.sample.prompts[0], input_hash)
    )
    if own and (
        record := load_record(run_dir, "sample", kind.SAMPLES, input_hash=input_hash, earlier=earlier, outputs=_outputs)
    ):
        say("sample: up to date, skipped")
        return record
    start = time.monotonic()
    if config.sample.adapter:
        formats.warn_of_another_base(path, config.model.base, contents["model.base"])
    release_memory()  # what the stage before left on the GPU
    with replace_folder(folder) as temporary:
        page, items = kind.sample(config, path, temporary)
        if own:
            set_aside_changed(run_dir, "sample", folder, temporary)
    record = kind.SAMPLES(str(folder), str(folder / page), items)  # type: ignore[arg-type]
    if not own:
        return record
    seconds = time.monotonic() - start
    save_receipt(
        run_dir,
        "sample",
        record,
        input_hash=input_hash,
        seconds=seconds,
        figures={"samples": 2 * len(items), "samples_per_s": 2 * len(items) / seconds},
        outputs=_outputs(record),
    )
    return record


def _outputs(samples: Samples | Answers) -> list[Path]:
    return [Path(samples.page), Path(samples.folder)]


def _folder_name(prompt: str, input_hash: str) -> str:
    words = re.sub(r"[\W_]+", "-", prompt.casefold())[:MOST_OF_PROMPT].strip("-")
    return "-".join(filter(None, [words, input_hash[:6]]))


def _none(config: Config, run_dir: Path, input_hash: str) -> Samples | Answers:
    record = kinds.of(config).SAMPLES("", "", ())
    say("sample: none, sample.prompts is empty")
    save_receipt(run_dir, "sample", record, input_hash=input_hash, seconds=0.0, figures={"samples": 0})
    return record


def adapter_path(config: Config, adapter: Adapter | None) -> Path:
    """`sample.adapter`, or else the run's. Raises ModelError if there is none."""
    if config.sample.adapter:
        return formats.peft_folder(Path(config.sample.adapter))
    if adapter is None:
        raise ModelError(
            f"{config.run_dir} has no adapter; train first, with the same settings (finetune train conf=…), or set "
            "sample.adapter=…"
        )
    return Path(adapter.folder) / next(iter(adapter.files.values()))


def _weights_hash(path: Path) -> str:
    """What 0.1 knew an adapter by: its weights."""
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    return hash_files(file for file in files if file.is_file())
