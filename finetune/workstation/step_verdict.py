"""What holds a training step back, in words, and which settings would make it shorter."""

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.config.spelling import setting
from finetune.planning.choice import Choice
from finetune.planning.plan import KEYS
from finetune.run.cores import usable_cores
from finetune.run.step_time import ATTENTION, BETWEEN, COPIES, DATA, ELEMENT_WISE, GAPS, MATMUL, OTHER, StepTime

MUCH = 0.1  # of a step: shares below are left alone
IDLE = 0.3  # of a step without a kernel: below 70 % utilisation there is something to gain
WORTH = 0.05  # of throughput: smaller gains are not told from chance


@dataclass(frozen=True)
class Verdict:
    """words: what holds the step back, and what to do. change, expected: as in `Profile`."""

    words: str
    change: tuple[str, ...]
    expected: float | None


def judge(times: Sequence[StepTime], planned: Choice | None, *, fast: bool, chooses: bool) -> Verdict:
    """times: the setting that trains, then others. planned: what the plan would train with, None if there is no plan.

    fast: `trainer.fast`. chooses: a training would choose settings by itself, whatever is typed.
    """
    own = times[0]
    words = _on_gpu(own) if GAPS in own.parts else _on_cpu(own)
    keep = ("trainer.autotune=check",) if chooses else ()
    best, fastest = max((each for each in times if each.effective == own.effective), key=_speed), max(times, key=_speed)
    if fastest.items_per_s / best.items_per_s - 1 > WORTH:
        gain = fastest.items_per_s / own.items_per_s - 1
        words += (
            f" {fastest.name} takes {gain:.0%} more {own.unit} a second, but is another batch: it trains otherwise."
        )
    if (gain := best.items_per_s / own.items_per_s - 1) > WORTH:
        change = (*_changes(own.settings, best.settings), *keep)
        return Verdict(f"{words} Of what was measured, {best.name} is the fastest: {' '.join(change)}.", change, gain)
    settings = {name: getattr(planned.best, name) for name in KEYS} if planned else own.settings
    if planned and (gain := _planned_gain(own, planned)) > WORTH:
        change = (*_changes(own.settings, settings), *keep)
        return Verdict(f"{words} The plan's fastest setting that fits is {' '.join(change)}.", change, gain)
    if GAPS in own.parts and not fast and own.share(GAPS) + own.share(ELEMENT_WISE) > MUCH:
        change = (setting("trainer.fast", True),)
        return Verdict(f"{words} Fewer, larger kernels, or a CUDA graph, may help: {change[0]}.", change, None)
    same = "The plan knows no faster setting that trains the same" if planned else "There is no plan to compare with"
    return Verdict(f"{words} {same}.", (), None)


def _speed(time: StepTime) -> float:
    return time.items_per_s


def _on_gpu(own: StepTime) -> str:
    if own.share(DATA) > MUCH:
        return (
            f"The GPU waits for data {own.share(DATA):.0%} of a step: put the cache on a faster disk "
            f"(data.cache=FOLDER), and leave the CPU to this training; up to {_gain_without(own, DATA):.0%} to gain."
        )
    if own.share(COPIES) > MUCH:
        away = [KEYS[name] for name in ("offload", "offload_activations") if own.settings[name]]
        why = f" ({' and '.join(away)} keep what it needs in CPU memory)" if away else ""
        return f"The GPU waits for copies from and to CPU memory {own.share(COPIES):.0%} of a step{why}."
    if own.share(GAPS) > IDLE:
        return (
            f"The GPU is idle {own.share(GAPS):.0%} of a step, because the host launches its kernels too slowly: "
            f"larger micro-batches launch fewer; up to {_gain_without(own, GAPS):.0%} to gain."
        )
    return f"The GPU computes {1 - own.share(GAPS) - own.share(DATA) - own.share(COPIES):.0%} of a step. {_most(own)}"


def _on_cpu(own: StepTime) -> str:
    import torch

    used, there = torch.get_num_threads(), usable_cores()
    threads = f" It computes on {used} of {there} cores: OMP_NUM_THREADS={there} changes that." if used < there else ""
    if own.share(DATA) > MUCH:
        return f"The step waits for data {own.share(DATA):.0%} of its time.{threads}"
    if own.share(BETWEEN) > IDLE:
        return f"Python and PyTorch take {own.share(BETWEEN):.0%} of a step around short operations.{threads}"
    return f"The processor computes {1 - own.share(BETWEEN) - own.share(DATA):.0%} of a step. {_most(own)}{threads}"


def _most(own: StepTime) -> str:
    part = max((ATTENTION, MATMUL, ELEMENT_WISE, OTHER), key=own.share)
    return f"Most is {part}, {own.share(part):.0%}."


def _gain_without(own: StepTime, part: str) -> float:
    """Of throughput, if the part took no time."""
    return own.share(part) / (1 - own.share(part))


def _planned_gain(own: StepTime, planned: Choice) -> float:
    """Of throughput, of the plan's best over this setting; 0 where the plan has blocks elsewhere."""
    if own.settings["offload"] != planned.best.offload:
        return 0.0
    now = planned.candidates.setting(
        own.settings["micro_batch"], own.settings["checkpointing"], bool(own.settings["offload_activations"])
    )
    return now.seconds / planned.best.seconds - 1


def _changes(now: dict[str, int | bool], then: dict[str, int | bool]) -> tuple[str, ...]:
    """What to type."""
    return tuple(setting(KEYS[name], value) for name, value in then.items() if value != now[name])
