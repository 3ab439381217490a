"""Losses and gradient norms of short trainings, stored in `tests/stored/losses.json`.

A change of code that is to leave the training alone shows the same numbers. Where they are meant to change, say why in
the commit and store new ones (one minute on one core):

    OMP_NUM_THREADS=1 python -m tests.end_to_end.stored_losses
"""

import contextlib
import copy
import gc
import json
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

import finetune
from tests.conftest import ROOT
from tests.end_to_end.stored_runs import CONVERSATIONS, PICTURES, RUNS, STORED, StoredRun
from tests.tiny_families import SAVERS, save_family
from tests.tiny_language_models import CHATS, save_language

torch.set_num_threads(1)  # sums of several threads are added up in another order

FILE = STORED / "losses.json"
RELATIVE = {"loss/step": 1e-3, "train/gradient_norm": 1e-2}
"""Allowed on another processor, or with another version of a library; without AVX a tiny FLUX.2's norm is 0.5 % off."""
ABSOLUTE = 1e-5
TAGS = tuple(RELATIVE)
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "pillow")

LEAN = (
    "trainer.validate_every=0",
    "trainer.patience=0",
    "export.checkpoint=last",
    "sample.prompts=[]",
    "export.formats=[peft]",
    "hardware.device=cpu",
)
"""Leaves out what follows the training, and GPUs; no step is another one."""
TINY = (
    *("lora.rank=2", "lora.alpha=3", "lora.dropout=0", "optim.lr=1e-2", "optim.warmup_steps=0"),
    *("trainer.steps=3", "trainer.micro_batch=2", "trainer.accumulate=2", "trainer.precision=fp32", *LEAN),
)
LINEAR = "q_proj,k_proj,v_proj,qkv_proj,o_proj,gate_proj,up_proj,gate_up_proj,down_proj"  # phi3 and glm4 fuse some
FURTHER = "trainer.steps=4"  # of the stored runs

Figures = dict[str, list[float]]


def recipe(name: str, *data: str, work: Path) -> Path:
    """The example recipe as it is, ended after 20 steps, in a folder with the example data.

    It is `OMP_NUM_THREADS=1 python -m finetune train conf=NAME trainer.steps=20` and `LEAN`, with the dropout that was
    the default when the losses were stored. As after 200 steps, the learning rate rises for 10 steps; then it falls to
    zero at the 20th.
    """
    for file in (path for pattern in data for path in (ROOT / "datasets").glob(pattern)):
        place = work / file.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    with contextlib.chdir(work):
        finetune.train(name, ["trainer.steps=20", "lora.dropout=0.05", *LEAN])
    return work / "outputs" / name


def pictures(kind: str, *, work: Path) -> Path:
    """Three steps of a tiny model of a family of image models."""
    config = _tiny(
        "pixar_style", "lora.targets=attention", "loss.weighting=min_snr", "loss.min_snr_gamma=20", work=work
    )
    config.data.folder = str(shutil.copytree(STORED / PICTURES, work / PICTURES))
    config.model = save_family(work / "base", kind)
    finetune.train(config)
    return work / "run"


def language(architecture: str, *, work: Path) -> Path:
    """Three steps of a tiny language model."""
    linear = f"model.lora_targets.all_linear=[{LINEAR}]"
    config = _tiny("pirate_chat", linear, "data.length=192", "data.workers=1", work=work)
    config.data.file = str(shutil.copy(STORED / CONVERSATIONS, work))
    config.model.base = str(save_language(work / "base", architecture))
    finetune.train(config)
    return work / "run"


def _tiny(name: str, *overrides: str, work: Path) -> finetune.Config:
    config = copy.deepcopy(_composed(name, *overrides))
    config.run_dir, config.data.cache = str(work / "run"), str(work / "cache")
    gc.freeze()  # or each stage that makes room goes through all objects of the libraries
    return config


@cache
def _composed(name: str, *overrides: str) -> finetune.Config:
    return finetune.load(name, [*overrides, *TINY])


def resumed(stored: StoredRun, *, work: Path) -> Path:
    """A stored run of two steps, and two more: the last loss hangs on the optimiser's state that was stored."""
    run = stored.restore(work)
    with contextlib.chdir(work):
        finetune.train(stored.recipe, [*stored.overrides, FURTHER])
    return run


RECIPES = {  # the captions of the pictures are written by the command
    "pixar_style": partial(recipe, "pixar_style", "pixar_style/*.jpg"),
    "pirate_chat": partial(recipe, "pirate_chat", "pirate_chat/conversations.jsonl"),
}
CASES: dict[str, Callable[..., Path]] = {
    **RECIPES,
    **{f"images {kind}": partial(pictures, kind) for kind in SAVERS},
    **{f"language {architecture}": partial(language, architecture) for architecture in CHATS},
    **{name: partial(resumed, stored) for name, stored in RUNS.items()},
}


def figures(run: Path) -> Figures:
    """What a run has logged of each step."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    steps = [line for line in lines if TAGS[0] in line]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    return {tag: [line[tag] for line in steps] for tag in TAGS}


def stored() -> dict[str, Figures]:
    """The stored figures of every case."""
    return dict(json.loads(FILE.read_text(encoding="utf-8"))["figures"])


def expected(name: str) -> dict[str, Any]:
    """What `figures` must equal: the stored ones, to the bit where the processor and the libraries are the same."""
    before = json.loads(FILE.read_text(encoding="utf-8"))["fingerprint"]
    if before == fingerprint():
        return dict(stored()[name])
    if name in {*RECIPES, *RUNS} and before["machine"] != platform.machine():
        pytest.skip("without MKL torch draws other dropout masks")
    return {tag: pytest.approx(values, rel=RELATIVE[tag], abs=ABSOLUTE) for tag, values in stored()[name].items()}


def fingerprint() -> dict[str, str]:
    """What decides the last bits of a sum on a CPU."""
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        **{library: version(library) for library in LIBRARIES},
    }


def _processor() -> str:
    """Maker, family and model; a system without /proc knows less."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return platform.processor()
    lines = (line.partition(":") for line in file.read_text(encoding="utf-8").splitlines())
    facts = {key.strip(): value.strip() for key, _, value in lines}
    return " ".join(facts.get(key, "") for key in ("vendor_id", "cpu family", "model")).strip()


def _measured() -> Iterator[tuple[str, Figures]]:
    for name, train in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder) / "work"
            work.mkdir()
            yield name, figures(train(work=work))


if __name__ == "__main__":
    found = {"fingerprint": fingerprint(), "figures": dict(_measured())}
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
