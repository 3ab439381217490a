"""Checkpoints that are either whole or not there.

`checkpoints/step-000200/` holds the adapter, the optimiser's state, the average if there is one, `state.json`, and a
manifest with the hash of every file. It is written under a temporary name, flushed to disk and renamed.
"""

import io
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor

from finetune.errors import RunError, is_out_of_memory
from finetune.reading import read_text
from finetune.run.atomic import replace_folder
from finetune.run.hashing import hash_file
from finetune.run.plain import UNREADABLE, first_line, from_plain, require_names

PREFIX = "step-"
MANIFEST = "manifest.json"
ADAPTER, OPTIMIZER, STATE, EMA = "adapter.safetensors", "optimizer.pt", "state.json", "ema.safetensors"
# What the readers of these files raise besides: torch's of a pickle, and safetensors'.
DAMAGED = (*UNREADABLE, RuntimeError, EOFError, UnpicklingError, SafetensorError)


@dataclass(frozen=True)
class TrainState:
    """Everything but tensors that a resumed run needs.

    identity: what the run was trained with, flat key -> value; a resumed run must agree. count: images or tokens
    trained on. interval_*: of the steps since throughput was last logged. best_validation, best_step: of the saved
    steps; lowest_validation, lowest_step: of all. waited: validations in a row that were no lower. scaler: the fp16
    loss scaler's. requested: the memory settings that the run was given, and the GPU's memory; applied: those it
    started with; micro_batch, fallbacks: how far it had to go below them when memory ran out, in examples and in
    fallbacks of the task. planned_gib, dry_run_gib, energy_j, energy_s: as in `Run`.
    """

    identity: dict[str, Any]
    step: int = 0
    count: int = 0
    seconds: float = 0.0
    interval_seconds: float = 0.0
    interval_count: int = 0
    interval_padded_count: int = 0
    first_loss: float = 0.0
    smoothed_loss: float = 0.0
    first_validation: float | None = None
    best_validation: float | None = None
    best_step: int | None = None
    lowest_validation: float | None = None
    lowest_step: int | None = None
    waited: int = 0
    skipped_steps: int = 0
    scaler: dict[str, Any] | None = None
    requested: dict[str, Any] = field(default_factory=dict)
    applied: dict[str, Any] = field(default_factory=dict)
    micro_batch: int = 0
    fallbacks: int = 0
    planned_gib: float | None = None
    dry_run_gib: float | None = None
    energy_j: float | None = None
    energy_s: float = 0.0
    RENAMED: ClassVar[dict[str, str]] = {
        "units": "count",
        "asked": "requested",
        "taken": "applied",
        "measures": "fallbacks",
        "probed_gib": "dry_run_gib",
    }

    def fits(self, requested: Mapping[str, Any]) -> bool:
        """Whether memory settings and GPU are those of before. What an earlier version didn't note counts as equal."""
        return {**requested, **self.requested} == requested


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back."""

    folder: Path
    state: TrainState
    adapter: dict[str, Tensor]
    optimizer: dict[str, Any]
    ema: dict[str, Tensor] | None

    @property
    def averaged(self) -> dict[str, Tensor] | None:
        """The averaged adapter, if one was kept."""
        return None if self.ema is None else {name: value for name, value in self.ema.items() if name != "updates"}


def save(
    folder: Path,
    state: TrainState,
    adapter: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    ema: Mapping[str, Tensor] | None,
) -> Path:
    """Write `folder/step-N` atomically and return it. Raises RunError if the disk is full or not writable."""
    final = at(folder, state.step)
    with replace_folder(final, durable=True) as temporary:
        # Serialised in memory first: at a full disk, torch and safetensors raise errors that don't say so.
        (temporary / ADAPTER).write_bytes(save_tensors(dict(adapter)))
        buffer = io.BytesIO()
        torch.save(dict(optimizer), buffer)
        (temporary / OPTIMIZER).write_bytes(buffer.getbuffer())
        if ema is not None:
            (temporary / EMA).write_bytes(save_tensors(dict(ema)))
        (temporary / STATE).write_text(json.dumps(asdict(state), indent=2), encoding="utf-8")
        hashes = {path.name: hash_file(path) for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps(hashes, indent=2), encoding="utf-8")
    return final


def load(folder: Path) -> Checkpoint:
    """Read one checkpoint. Raises RunError if it or a file in it is missing or differs from its manifest."""
    try:
        hashes: dict[str, str] = json.loads(read_text(folder / MANIFEST))
        if lacking := [name for name in (ADAPTER, OPTIMIZER, STATE) if name not in hashes]:
            raise ValueError(f"{lacking[0]} is not in its manifest")
        require_names(*hashes)
        for name, expected in hashes.items():
            if hash_file(folder / name) != expected:
                raise ValueError(f"{name} differs from its manifest")
        state = from_plain(TrainState, json.loads(read_text(folder / STATE)))
        adapter = load_file(folder / ADAPTER)
        optimizer = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
        ema = load_file(folder / EMA) if EMA in hashes else None
    except DAMAGED as error:
        if is_out_of_memory(error) or isinstance(error, PermissionError):  # whole, and not to be deleted
            raise
        if not folder.exists():
            way = "restore it from a copy, or train again with the same settings"
            raise RunError(f"there is no checkpoint {folder}; {way}") from error
        raise RunError(
            f"checkpoint {folder} is damaged ({first_line(error)}); "
            "delete that folder and the same command goes on from the one before"
        ) from error
    return Checkpoint(folder, state, adapter, optimizer, ema)


def steps_on_disk(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending; a person's copies beside them are none."""
    numbers = (path.name.removeprefix(PREFIX) for path in folder.glob(f"{PREFIX}*") if path.is_dir())
    return sorted(int(number) for number in numbers if re.fullmatch(r"[0-9]{6,18}", number))


def at(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"{PREFIX}{step:06d}"


def prune(folder: Path, keep: int, also: Iterable[int | None]) -> None:
    """Delete all but the newest `keep` checkpoints, those of the steps `also`, and what a killed save left behind."""
    kept = {*steps_on_disk(folder)[-keep:], *also}
    for step in steps_on_disk(folder):
        if step not in kept:
            shutil.rmtree(at(folder, step))
    for left in folder.glob(f".{PREFIX}*.tmp"):  # by a save that was killed
        shutil.rmtree(left, ignore_errors=True)
