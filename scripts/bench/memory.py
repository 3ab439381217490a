"""What training takes: each case once through the real `train` command, at full size, on a GPU capped to its budget.

    python -m scripts.bench.memory --cases sdxl-4,flux1-nf4 --work /tmp/bench --out results.jsonl

builds the bases with random weights (kept in WORK until their last case is done), trains a few steps, and appends one
JSON line per case: measured GiB, seconds, hardware, versions, date. Cases that ran out of memory are lines too. With
--alone, when nothing else uses the GPU meanwhile, it holds the speed of the steps as well.

    python -m scripts.bench.memory --plan results.jsonl

needs no GPU: it adds the plan's figures for each case, and writes the page docs/memory.md.
"""

import argparse
import datetime
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune.reporting import curves

if TYPE_CHECKING:
    from finetune.planning.candidates import Candidates

ROOT = Path(__file__).resolve().parents[2]
DIFFUSION, CONVERSATIONS = ROOT / "datasets" / "pixar_style", ROOT / "datasets" / "pirate_chat" / "conversations.jsonl"
STEPS = 8
WARM_UP = 3  # steps in which libraries choose their kernels and the allocator grows
GPU = "h200"  # the hardware preset of the GPU that the committed lines were measured on
COMMON = (
    f"trainer.steps={STEPS}",
    f"trainer.save_every={STEPS}",
    f"trainer.validate_every={STEPS}",
    "trainer.log_every=1",
    "trainer.autotune=check",
    "export.formats=[peft]",
    "sample.previews=1",
    "sample.seeds=[0]",
    "trainer.fast=false",  # most cases were measured before there were fast layers and CUDA graphs
    "lora.dropout=0.05",
)
IMAGE = (
    "data.validation_share=0",
    "sample.steps=4",
    "sample.prompts=[robot]",
    "optim.lr=1e-4",
    "lora.targets=attention",
)
LANGUAGE = ("sample.max_new_tokens=4", "sample.prompts=[Hello]", "optim.lr=1e-4", "data.workers=2")

OUTCOMES = {5: "out of memory", 124: "took too long"}
PAGE = """# Memory, planned and measured

Each row is one run of the real `train` command: random weights at full size, on an {hardware} whose allocator was
limited to the budget (torch {torch}, {date}). A run trains a few steps with validation and a preview, then
exports, samples and writes the report.

All GiB are the peak of torch's allocator during training:

- *planned*: what `finetune plan` traces. The plan adds the CUDA context and the allocator's slack to this.
- *dry run*: after the largest possible step, the first validation and the first preview, before step 1.
- *measured*: at the end of training.

Text encoders were shortened to a few layers. Several cases ran at the same time on the GPU: this changes the seconds
(not shown here), not the bytes.

| base | settings | budget GiB | planned | dry run | measured | planned vs. measured |
|---|---|---|---|---|---|---|
{rows}

{count} cases, of which {failed} Planned against measured: median difference {median:.1f} %, worst {worst:.1f} %.
Dry run against measured: median {dry_run_median:.1f} %, worst {dry_run_worst:.1f} %.

No constant was fitted for training steps. For decoding a preview the plan adds a workspace. It was taken from four of
these rows (SDXL with micro-batch 4, SD 3.5, FLUX.1, Z-Image) and used for FLUX.2 too. Where the preview is the peak,
the comparison of those four rows is therefore no proof.

## Speed, planned and measured

These are the cases that had the GPU to themselves. *Measured* is the median units per second of the steps after the
first {warm_up}; *planned* is the plan for this GPU with the same settings. The plan's rates were set from these rows:
the table shows how well a few constants describe them, and no more. No other GPU was compared.

| base | settings | unit | planned per second | measured | planned vs. measured |
|---|---|---|---|---|---|
{speeds}

Measured with `python -m scripts.bench.memory --work WORK --out FILE` on a machine with a GPU. The planned figures and
this page are written by `python -m scripts.bench.memory --plan FILE` on any machine. The lines are in
`scripts/bench/memory.jsonl`.
"""


@dataclass(frozen=True)
class Case:
    """One setting: its name, the preset of the base, the budget in GiB and what else is set."""

    name: str
    preset: str
    vram_gib: float
    overrides: tuple[str, ...]

    @property
    def images(self) -> bool:
        return any(override.startswith("model.resolution") for override in self.overrides)


def image(name: str, preset: str, side: int, micro_batch: int, *more: str, vram_gib: float = 24.0) -> Case:
    own = (f"model.resolution={side}", f"trainer.micro_batch={micro_batch}", "trainer.accumulate=1")
    return Case(name, preset, vram_gib, (*own, *more))


def language(name: str, preset: str, length: int, quantize: str, *more: str, vram_gib: float = 24.0) -> Case:
    own = (f"data.length={length}", f"model.quantize={quantize}", "trainer.micro_batch=1", "trainer.accumulate=1")
    return Case(name, preset, vram_gib, (*own, *more))


CHECKPOINTING, NF4, OFFLOAD = "trainer.activation_checkpointing=1", "model.quantize=nf4", "model.offload=true"
FOUR, FAST = ("trainer.micro_batch=4", "lora.dropout=0"), "trainer.fast=true"
CASES = (
    image("sd15-512-16", "sd15", 512, 16),
    image("sd15-512-4", "sd15", 512, 4),
    image("sd15-512-32", "sd15", 512, 32, CHECKPOINTING),
    image("sd15-768-4", "sd15", 768, 4),
    image("sd21-768-2", "sd21", 768, 2),
    image("sdxl-1024-4", "sdxl", 1024, 4, CHECKPOINTING),
    image("sdxl-1024-1", "sdxl", 1024, 1),
    image("sdxl-1024-1-12gb", "sdxl", 1024, 1, CHECKPOINTING, vram_gib=12.0),
    image("sdxl-768-2", "sdxl", 768, 2),
    image("sd35-1024-1", "sd35_medium", 1024, 1, CHECKPOINTING),
    image("sd35-1024-1-8gb", "sd35_medium", 1024, 1, CHECKPOINTING, OFFLOAD, vram_gib=8.0),
    image("sd35-512-4", "sd35_medium", 512, 4),
    image("flux1-1024-nf4", "flux1_dev", 1024, 1, CHECKPOINTING, NF4),
    image("flux1-1024-nf4-10gb", "flux1_dev", 1024, 1, CHECKPOINTING, NF4, OFFLOAD, vram_gib=10.0),
    image("flux1-1024-48gb", "flux1_dev", 1024, 1, CHECKPOINTING, "model.quantize=none", vram_gib=44.0),
    image("flux1-512-nf4", "flux1_dev", 512, 2, CHECKPOINTING, NF4),
    image("flux2-klein-1024", "flux2_klein", 1024, 1, CHECKPOINTING),
    image("flux2-klein-512", "flux2_klein", 512, 4, CHECKPOINTING),
    image("z-image-1024", "z_image", 1024, 1, CHECKPOINTING),
    image("z-image-512", "z_image", 512, 2, CHECKPOINTING),
    image("qwen-image-1024-nf4", "qwen_image", 1024, 1, CHECKPOINTING, NF4),
    image("qwen-image-1024-nf4-16gb", "qwen_image", 1024, 1, CHECKPOINTING, NF4, OFFLOAD, vram_gib=16.0),
    language("llama2-7b-4x1024-nf4-plain", "llama2_7b", 1024, "nf4", *FOUR, CHECKPOINTING),
    language("llama2-7b-4x1024-nf4", "llama2_7b", 1024, "nf4", *FOUR, FAST),
    language("llama2-7b-4x1024-nf4-lean", "llama2_7b", 1024, "nf4", *FOUR, FAST, CHECKPOINTING),
    language("llama2-7b-8x1024-nf4", "llama2_7b", 1024, "nf4", *FOUR, FAST, "trainer.micro_batch=8"),
    language("llama31-8b-2x2048-nf4", "llama31_8b", 2048, "nf4", *FOUR, FAST, "trainer.micro_batch=2"),
    language("llama2-7b-2048-bf16", "llama2_7b", 2048, "none", CHECKPOINTING),
    language("llama2-7b-2048-bf16-10gb", "llama2_7b", 2048, "none", CHECKPOINTING, OFFLOAD, vram_gib=10.0),
    language("llama2-7b-2048-nf4", "llama2_7b", 2048, "nf4"),
    language("llama2-7b-2048-int8", "llama2_7b", 2048, "int8", CHECKPOINTING),
    language("llama31-8b-2048-nf4", "llama31_8b", 2048, "nf4", CHECKPOINTING),
    language("llama31-8b-8192-nf4", "llama31_8b", 8192, "nf4", CHECKPOINTING),
    language("llama31-8b-32768-nf4", "llama31_8b", 32768, "nf4", CHECKPOINTING, "trainer.offload_activations=true"),
    language("llama31-8b-2048-nf4-12gb", "llama31_8b", 2048, "nf4", CHECKPOINTING, vram_gib=12.0),
    language("llama2-13b-2048-nf4", "llama2_13b", 2048, "nf4", CHECKPOINTING),
    language("mistral-7b-2048-nf4", "mistral_7b", 2048, "nf4", CHECKPOINTING),
    language("qwen3-8b-2048-nf4", "qwen3_8b", 2048, "nf4", CHECKPOINTING),
    language("glm4-9b-2048-nf4", "glm4_9b", 2048, "nf4", CHECKPOINTING),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", help="names, separated by commas; all unless given")
    parser.add_argument("--work", type=Path, help="bases and run folders")
    parser.add_argument("--out", type=Path, help="JSON lines, appended to")
    parser.add_argument("--seconds", type=float, default=240.0, help="at most, for one case")
    parser.add_argument("--alone", action="store_true", help="nothing else uses the GPU: note the speed")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="add the plan's figures to these results")
    given = parser.parse_args()
    if given.plan:
        add_plans(given.plan, ROOT / "docs" / "memory.md")
        return
    if not (given.work and given.out):
        parser.error("--work and --out are needed to measure")
    chosen = chosen_cases(given.cases.split(",") if given.cases else [case.name for case in CASES])
    for index, case in enumerate(chosen):
        result = measure(case, given.work, given.seconds, alone=given.alone)
        with given.out.open("a") as lines:
            lines.write(json.dumps(result) + "\n")
        print(json.dumps({key: value for key, value in result.items() if key != "overrides"}), flush=True)
        if case.preset not in {later.preset for later in chosen[index + 1 :]}:
            shutil.rmtree(given.work / "bases" / case.preset, ignore_errors=True)


def chosen_cases(names: Sequence[str]) -> list[Case]:
    """The cases of those names. Exits with a line for a name that there isn't."""
    known = {case.name: case for case in CASES}
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"no case {unknown[0]}; there are: {', '.join(known)}")
    return [known[name] for name in names]


def measure(case: Case, work: Path, seconds: float, *, alone: bool) -> dict[str, Any]:
    """Plan and train one case; everything that its line holds."""
    from scripts.bench.bases import build

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = work / "bases" / case.preset
    if not base.exists():
        build(case.preset, base, device)
    run = work / "runs" / case.name
    words = command(case, base, run, work / "images")
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "finetune", "train", *words],
            cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
        code, said = done.returncode, (done.stderr + done.stdout).strip().splitlines()
    except subprocess.TimeoutExpired as error:
        code, said = 124, ((error.stderr or b"") + (error.stdout or b"")).decode().strip().splitlines()
    line = asdict(case) | {
        "exit_code": code,
        "seconds_in_all": round(time.monotonic() - began, 1),
        **figures(run),
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    if alone and (rates := speeds(run)):
        line["a_second"] = statistics.median(rates[WARM_UP:])
    if code:
        line["said"] = said[-6:]
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return line


def command(case: Case, base: Path, run: Path, images: Path) -> list[str]:
    """What follows `finetune train`."""
    shared = [f"model={case.preset}", f"model.base={base}", f"run_dir={run}", f"hardware.vram_gib={case.vram_gib}"]
    if case.images:
        if not images.exists():
            images.mkdir(parents=True)
            chosen = sorted(DIFFUSION.glob("*.jpg"))[:8]
            for file in chosen:
                shutil.copy(file, images)
            captions = [json.dumps({"file_name": file.name, "text": file.stem}) for file in chosen]
            (images / "metadata.jsonl").write_text("\n".join(captions))
        return ["conf=pixar_style", *shared, f"data.folder={images}", *COMMON, *IMAGE, *case.overrides]
    return ["conf=pirate_chat", *shared, f"data.file={CONVERSATIONS}", *COMMON, *LANGUAGE, *case.overrides]


def figures(run: Path) -> dict[str, Any]:
    """What the receipts of a run say: peak memory and seconds of each stage."""
    found: dict[str, Any] = {"stages": {}}
    for file in sorted((run / "receipts").glob("*.json")):
        receipt = json.loads(file.read_text())
        found["stages"][receipt["stage"]] = round(receipt["seconds"], 1)
        if receipt["stage"] == "train":
            found |= {key: receipt["figures"][key] for key in ("dry_run_gib", "measured_gib")}
    return found


def speeds(run: Path) -> list[float]:
    """Images, or tokens with padding, in a second of each step."""
    found = curves.read(run)
    (rates,) = [points for tag, points in found.items() if curves.SPEED.fullmatch(tag)] or [[]]
    padding = dict(found.get("train/padding", []))
    return [rate / (1 - padding.get(step, 0.0)) for step, rate in rates]


def add_plans(results: Path, page: Path) -> None:
    """Put the plan's figures into every line that has a measurement, and write the page with the tables."""
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    for line in lines:
        if "measured_gib" in line:
            candidates, setting = candidates_for(chosen_cases([line["name"]])[0])
            line["planned_gib"] = planned_gib(candidates, setting)
            line["planned_a_second"] = planned_a_second(candidates, setting)
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page.write_text(table(lines))


def candidates_for(case: Case) -> tuple["Candidates", tuple[int, int, bool]]:
    """The plan of what a case ran on the GPU, and which setting that was.

    Texts were encoded by shortened encoders, and what lies outside torch's allocator was not measured: neither counts.
    """
    from finetune import kinds
    from finetune.config import compose
    from finetune.planning.candidates import Candidates
    from finetune.planning.machine import read

    words = command(case, Path("base"), Path("run"), DIFFUSION)
    kept = [word for word in words if not word.startswith(("model.base=", "hardware."))]
    # Validation is a step without what that keeps for backward, and so is a sentence that is no longer than a row.
    kept += ["trainer.validate_every=0", *([] if case.images else ["sample.prompts=[]"])]
    config = compose.load(
        kept[0].removeprefix("conf="), [*kept[1:], f"hardware={GPU}", f"hardware.vram_gib={case.vram_gib}"]
    )
    trainer = config.trainer
    setting = trainer.micro_batch, trainer.activation_checkpointing, trainer.offload_activations
    return Candidates(kinds.of(config).workload(config), read(config.hardware)), setting


def planned_gib(candidates: "Candidates", setting: tuple[int, int, bool]) -> float:
    """GiB of tensors at the worst moment, as the plan traces it."""
    return candidates.tensors_gib(*setting)


def planned_a_second(candidates: "Candidates", setting: tuple[int, int, bool]) -> float:
    """Images, or tokens with padding, as the plan estimates."""
    step = candidates.setting(*setting)
    return step.count / step.seconds


def table(lines: Sequence[dict[str, Any]]) -> str:
    """docs/memory.md."""
    done = [line for line in lines if "planned_gib" in line]
    errors = sorted(abs(line["planned_gib"] / line["measured_gib"] - 1) for line in done)
    dry_run_errors = sorted(abs(line["dry_run_gib"] / line["measured_gib"] - 1) for line in done)
    failed = [line for line in lines if line["exit_code"]]
    ends = "; ".join(f"`{line['name']}` ({OUTCOMES.get(line['exit_code'], line['exit_code'])})" for line in failed)
    return PAGE.format(
        hardware=lines[0]["hardware"],
        torch=lines[0]["torch"],
        date=lines[0]["date"],
        rows="\n".join(map(row, done)),
        speeds="\n".join(speed_row(line) for line in done if "a_second" in line),
        median=100 * errors[len(errors) // 2],
        worst=100 * errors[-1],
        dry_run_median=100 * dry_run_errors[len(dry_run_errors) // 2],
        dry_run_worst=100 * dry_run_errors[-1],
        count=len(lines),
        failed=f"{len(failed)} did not end well: {ends}." if failed else "none ran out of memory.",
        warm_up=WARM_UP,
    )


def row(line: dict[str, Any]) -> str:
    """One case of the table of memory."""
    gib = [f"{line[name]:.1f}" for name in ("vram_gib", "planned_gib", "dry_run_gib", "measured_gib")]
    error = 100 * (line["planned_gib"] / line["measured_gib"] - 1)
    return "| " + " | ".join([f"`{line['preset']}`", settings(line), *gib, f"{error:+.1f} %"]) + " |"


def speed_row(line: dict[str, Any]) -> str:
    """One case of the table of speeds."""
    unit = "images" if chosen_cases([line["name"]])[0].images else "tokens"
    rates = [f"{line[name]:,.{1 if line['a_second'] < 100 else 0}f}" for name in ("planned_a_second", "a_second")]
    error = 100 * (line["planned_a_second"] / line["a_second"] - 1)
    return "| " + " | ".join([f"`{line['preset']}`", settings(line), unit, *rates, f"{error:+.0f} %"]) + " |"


def settings(line: dict[str, Any]) -> str:
    """What sets a case apart, without the names of the groups."""
    return ", ".join(override.partition(".")[2] for override in line["overrides"])


if __name__ == "__main__":
    main()
