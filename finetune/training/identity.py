"""What a run is: the settings, contents and data that decide its result. Only the same run goes on in its folder."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune import hub
from finetune.config.describe import as_dict, sections
from finetune.config.schema import Config
from finetune.config.spelling import setting
from finetune.errors import RunError
from finetune.run import previous, ranks
from finetune.run.receipts import load_receipt
from finetune.run.records import Dataset, TextSet
from finetune.training import checkpoint

ADDED = {"loss.weighting": "min_snr"}
"""Settings that 0.1 did not have, at the value that it stood for: its runs go on."""
CONTENT = "content of "  # before the key of a setting that names a base or an adapter
BATCH, DATA = "effective batch", (Dataset.identity_key, TextSet.identity_key)
"""In a run's identity, beside the settings."""
NOT_THE_RESULT = ("model.offload", "optim.allow_large_lr")
"""Where weights are, and a consent; in 0.1 the first was part of a run's identity."""


def settings_of(config: Config) -> dict[str, Any]:
    """What decides the result beside the data, flat; a run may only be continued with the same. Steps may be raised,
    micro-batch and accumulation exchanged, and weights kept elsewhere."""
    settings = as_dict(config)
    trainer = settings["trainer"]
    if hub.single_file(config.model.base) is None:
        settings["model"].pop("parts", None)  # not looked at, and runs from before there was one shall go on
    kept: dict[str, Any] = {
        "seed": settings["seed"],
        **{key: value for key, value in settings.items() if key in ("model", "lora", "optim", "loss")},
        "trainer": {key: trainer[key] for key in ("precision", "clip_norm", "ema_decay")},
        BATCH: trainer["micro_batch"] * trainer["accumulate"] * ranks.world_size(),
    }
    return {key: value for key, value in flat(kept).items() if key not in NOT_THE_RESULT and ADDED.get(key) != value}


def require_resumable(
    run_dir: Path, settings: dict[str, Any], contents: Callable[[], dict[str, str]], steps: int
) -> None:
    """Raises RunError as `resume` does for what lies in the run folder, as far as it is told before data are read.

    A batch that several processes would make of the one asked for counts as the same.
    """
    if newest := _newest(run_dir):
        before, identity = _contents_in_receipt(run_dir) | newest.state.identity, settings | noted(contents())
        if before.get(BATCH, 0) % identity[BATCH] == 0:
            before[BATCH] = identity[BATCH]
        _require_same(newest, list(_changes(before, identity)), steps)


def noted(contents: Mapping[str, str]) -> dict[str, str]:
    """Hashes by the setting that names what is hashed, as an identity has them."""
    return {f"{CONTENT}{key}": value for key, value in contents.items()}


def resume(
    run_dir: Path, identity: dict[str, Any], steps: int, dataset: Dataset | TextSet
) -> checkpoint.Checkpoint | None:
    """The newest checkpoint if it continues this very run. Raises RunError with every difference otherwise."""
    newest = _newest(run_dir)
    if newest:
        before = newest.state.identity
        same_data = before.get(dataset.identity_key) == dataset.content
        data = "" if same_data else previous.changes(run_dir, dataset)
        _require_same(newest, list(_changes(_contents_in_receipt(run_dir) | before, identity)), steps, data=data)
    return newest


def _newest(run_dir: Path) -> checkpoint.Checkpoint | None:
    """The newest checkpoint. Raises RunError where it is damaged."""
    folder = run_dir / "checkpoints"
    found = checkpoint.steps_on_disk(folder)
    return checkpoint.load(checkpoint.at(folder, found[-1])) if found else None


def _require_same(newest: checkpoint.Checkpoint, changed: list[str], steps: int, *, data: str = "") -> None:
    """Raises RunError where settings have changed or, as `data` says, examples, or where it is trained further."""
    run_dir, step = newest.folder.parents[1], newest.state.step
    advice = "take another run_dir=…, or trainer.restart=true to set the earlier run aside and start again"
    if changed or data:
        if data and (adapter := run_dir / "adapter").exists():
            advice += f"; to continue from its adapter, take another name=… and {setting('lora.start_from', adapter)}"
        what = "settings" if changed else "data"
        raise RunError(
            f"{run_dir} was trained with other {what} ({'; '.join(filter(None, [data, *changed]))}); {advice}"
        )
    if step > steps:
        raise RunError(f"{run_dir} is already at step {step}, past trainer.steps={steps}; {advice}")


def _contents_in_receipt(run_dir: Path) -> dict[str, Any]:
    """Contents that the receipt knows, of a run whose checkpoints are older than they are."""
    receipt = load_receipt(run_dir, "train")
    return {key: value for key, value in (receipt.figures if receipt else {}).items() if key.startswith(CONTENT)}


def _changes(before: dict[str, Any], identity: dict[str, Any]) -> Iterator[str]:
    """Every difference but the data's, in words. Contents that an earlier version didn't note are taken for today's."""
    defaults = _defaults()  # what a setting that is newer than the run counts as
    for key in sorted((before.keys() | identity.keys()) - {*NOT_THE_RESULT, *DATA}):
        unset = defaults.get(key, "not set")
        old, new, content = before.get(key, unset), identity.get(key, unset), f"{CONTENT}{key}"
        moved = content in before and before[content] == identity.get(content)
        if old == new:
            if content in before and not moved:
                yield f"{key}: other files in {new}"
        elif not moved and not key.startswith(CONTENT):
            yield f"{key}: {old} -> {new}"


def _defaults() -> dict[str, Any]:
    """Every setting's default, flat."""
    config = Config()
    return flat({section: as_dict(getattr(config, section)) for section in sections()})


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
