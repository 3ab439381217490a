"""Where curves go: TensorBoard event files and `metrics.jsonl`, one line per logged step.

A place that can't be used costs no run: it is reported, and the curves are not written there.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from finetune.run.atomic import write_atomically
from finetune.run.metrics import read_rows
from finetune.run.progress import say
from finetune.run.records import METRICS
from finetune.training.energy import Energy, gpus_of_the_run, handles

GIB = 2**30


class Tracker:
    """Writes one run's curves; a resumed run continues them without a fork."""

    def __init__(self, run_dir: Path, start: int, device: torch.device) -> None:
        self.file = run_dir / METRICS
        self.device = device
        self.writes = not self.file.exists() or self.file.is_file()
        if self.writes:
            self._forget_after(start)
        else:
            say(f"warning: {self.file} is no file; no curves are written there; delete it")
        self.board = _board(run_dir, start)
        gpus = handles(gpus_of_the_run(device))
        self.gpu = _Gpu(gpus[0] if gpus else None)  # only the first process has a tracker, and its GPU is the first
        self.energy = Energy(gpus)
        self.row: dict[str, float | None] = {}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Points at `step`; the tag's part before "/" is TensorBoard's section. `end_row` writes them to the file."""
        for tag, value in values.items():
            self.board.add_scalar(tag, value, step)
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        self.row = {"step": step, **self.row, **finite}

    def end_row(self) -> None:
        """Write what was logged of one step as one line."""
        if self.row and self.writes:
            with open(self.file, "a", encoding="utf-8") as lines:
                lines.write(json.dumps(self.row) + "\n")
        self.row = {}

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """A text, shown as Markdown."""
        self.board.add_text(tag, text, step)

    def previews(self, step: int, previews: Mapping[str, Any]) -> None:
        """PIL images or texts by tag."""
        import numpy as np

        for tag, preview in previews.items():
            if isinstance(preview, str):
                self.text(tag, preview, step)
            else:
                self.board.add_image(tag, np.asarray(preview), step, dataformats="HWC")
        self.board.flush()  # by itself TensorBoard's writer does it every two minutes

    def hparams(self, settings: Mapping[str, Any], tags: Iterable[str]) -> None:
        """Settings against the last values of these curves, for TensorBoard's hparams table.

        `SummaryWriter.add_hparams` would write a point of each figure besides, which hides the curves behind it.
        """
        from torch.utils.tensorboard import summary

        flat = {
            key: value if isinstance(value, int | float | str | bool) else str(value) for key, value in settings.items()
        }
        writer: Any = self.board.file_writer
        hparams: Any = summary.hparams
        for written in hparams(flat, dict.fromkeys(tags, 0.0)):
            writer.add_summary(written)

    def hardware(self) -> dict[str, float]:
        """Memory in use, and utilisation and power where NVML answers."""
        return {"system/memory_gib": memory_gib(self.device), **self.gpu.read()}

    def close(self) -> None:
        """Write what is left, and close the event file."""
        self.end_row()
        self.board.close()

    def _forget_after(self, step: int) -> None:
        if self.file.exists():
            kept = [row.line for row in read_rows(self.file.parent) if row.step <= step] if step else []
            write_atomically(self.file, "".join(line + "\n" for line in kept))


def _board(run_dir: Path, start: int) -> Any:
    """TensorBoard's writer; purge_step hides the points that a killed run wrote after its last checkpoint.

    TensorBoard calls a run by its folder below the one that it is given. A run that an earlier version began goes on in
    the folder above.
    """
    from torch.utils.tensorboard import SummaryWriter

    folder = run_dir / "tensorboard"
    if folder.exists() and not folder.is_dir():
        say(f"warning: {folder} is no folder; no curves are written there; delete it")
        return _NoBoard()
    own = folder if any(folder.glob("events.*")) else folder / run_dir.resolve().name
    return SummaryWriter(str(own), purge_step=start + 1 if start else None)


class _NoBoard:
    """Takes what a `SummaryWriter` and its parts take."""

    def __getattr__(self, name: str) -> "_NoBoard":
        return self

    def __call__(self, *_: Any, **__: Any) -> None: ...


class _Gpu:
    """NVML readings of the GPU in use; nothing on machines without."""

    def __init__(self, handle: Any) -> None:
        """handle: NVML's."""
        self.handle = handle

    def read(self) -> dict[str, float]:
        if self.handle is None:
            return {}
        import pynvml

        try:
            return {
                "system/gpu_utilisation_percent": float(pynvml.nvmlDeviceGetUtilizationRates(self.handle).gpu),
                "system/gpu_power_w": pynvml.nvmlDeviceGetPowerUsage(self.handle) / 1000,
            }
        except pynvml.NVMLError:  # some virtual machines answer only in part
            return {}


def memory_gib(device: torch.device) -> float:
    """Memory in use now, GiB: the allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / GIB
    import psutil

    return float(psutil.Process().memory_info().rss) / GIB
