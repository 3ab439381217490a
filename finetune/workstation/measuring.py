"""What every measurement of `finetune bench` is made of: figures, the clock, and the meters of a GPU.

B texts, L tokens, V words of the vocabulary.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from finetune.training.energy import Energy, handles


@dataclass(frozen=True)
class Speed:
    """One figure. id: stable, to be compared. values: one of each repeat, in `unit`."""

    id: str
    unit: str
    more_is_better: bool
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.values)


Measure = Callable[[int], Iterator[Speed]]
REPEAT_S, LEAST = 1.5, 3


def rounds(repeats: int) -> Iterator[int]:
    """0, which warms up and does not count, then 1 to `repeats`; where one takes longer than `REPEAT_S`, fewer: all of
    them should take the time of so many, and are `LEAST` at least."""
    began = time.perf_counter()
    for number in range(1 + repeats):
        if number > LEAST and time.perf_counter() - began > repeats * REPEAT_S:
            return
        yield number


class Meter:
    """What NVML says of the GPU meanwhile; on a CPU, and where it says nothing, there are no figures."""

    def __init__(self, device: torch.device) -> None:
        self.energy_meter = Energy(handles([device] if device.type == "cuda" else []))
        self.start()

    def start(self) -> None:
        """Count from now on."""
        self.before = self.energy_meter.counted()

    def energy(self, name: str, of: str, count: float) -> Iterator[Speed]:
        """Joules for each of `count` things of that name, by the counter alone."""
        now_j = self.energy_meter.counted()
        if self.before is not None and now_j is not None:
            yield Speed(f"{name}-energy", f"J a {of}", False, ((now_j - self.before) / count,))

    def utilisation(self, name: str) -> Iterator[Speed]:
        """Share of the last sampling period, of a second at most, in which a kernel ran, percent."""
        import pynvml

        for handle in self.energy_meter.handles:
            try:
                share = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
            except pynvml.NVMLError:
                return
            yield Speed(f"{name}-busy", "% of the time", True, (float(share),))


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def generation(
    repeats: int, model: Any, name: str, device: torch.device, *, prompt_tokens: int, new_tokens: int
) -> Iterator[Speed]:
    """Time to the first token behind a prompt, and tokens a second from then on, of one text."""
    from transformers import GenerationConfig

    ids_BL = torch.randint(3, model.config.vocab_size, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    first_ms, per_second, meter = [], [], Meter(device)
    for number in rounds(repeats):
        if number == 1:
            meter.start()
        times: list[float] = []

        def note(_ids_BL: Tensor, scores_BV: Tensor, times: list[float] = times) -> Tensor:
            times.append(now(device))
            return scores_BV

        began = now(device)
        model.generate(
            ids_BL.to(device),
            attention_mask=torch.ones_like(ids_BL, device=device),
            generation_config=settings,
            logits_processor=[note],
        )
        first_ms.append(1000 * (times[0] - began))
        per_second.append((len(times) - 1) / (times[-1] - times[0]))
    yield Speed(f"{name}-pp{prompt_tokens}", "ms to first token", False, tuple(first_ms[1:]))
    yield Speed(f"{name}-tg{new_tokens}", "tokens/s", True, tuple(per_second[1:]))
    yield from meter.energy(name, "token", number * new_tokens)
