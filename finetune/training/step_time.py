"""Where the time of traced training steps goes: a trace of torch's profiler, read as its file has it.

Each moment between the first step's begin and the last one's end belongs to one thing. On a GPU that is the kernel that
runs, else a copy from or to CPU memory, else the wait for data, else a gap. On a CPU it is the innermost operation of
the thread that trains, and all of the wait for data and of the optimiser's step.
"""

import gzip
import heapq
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from finetune.run.step_time import (
    ATTENTION,
    BETWEEN,
    COPIES,
    DATA,
    ELEMENT_WISE,
    GAPS,
    MATMUL,
    MEANINGS,
    OPTIMISER,
    OTHER,
)
from finetune.training.loop import WAITING

STEP = "optimiser step"  # what traces call one
OF_OPTIMISER = "Optimizer.step#"  # torch's own mark, of every optimiser
MICROSECOND = 1e-6
# By name, because a CUDA graph's kernels have no operation: those of PyTorch 2, cuBLAS, cuDNN, CUTLASS, bitsandbytes.
ATTENTION_NAMES = re.compile(r"flash|fmha|attention|sdpa", re.IGNORECASE)
MATMUL_NAMES = re.compile(
    r"gemm|gemv|cutlass|nvjet|xmma|conv(?!ert)|[dw]grad|winograd|splitk|cudnn|cublas|dot_kernel|matmul", re.IGNORECASE
)
ELEMENT_WISE_NAMES = re.compile(
    r"elementwise|reduce|softmax|norm|copy|cat|index|fill|dropout|multi_tensor|triton|rotate|swiglu|geglu|loss|"
    r"dequant|DtoD|memset|embedding|scatter|gather|distribution|scan|sort|upsample|pool|triu|arange",
    re.IGNORECASE,
)
CPU_MATMUL_NAMES = re.compile(r"aten::(\w*mm|\w*conv\w*|mv|dot|linear|matmul|einsum)(_\w+)?$|mkldnn|gemm")
KERNEL_RANK, COPY_RANK, MARK_RANK, OPERATION_RANK = 3, 2, 1, 0


class Span(NamedTuple):
    """Something that ran, in microseconds. rank: of several at once, the highest counts, then the innermost."""

    began: float
    ended: float
    part: str
    name: str
    rank: int


@dataclass(frozen=True)
class Traced:
    """Seconds of all traced steps together: by part of a step, and by the name of kernel or operation."""

    seconds: float
    parts: dict[str, float]
    names: dict[str, float]


def read(trace: Path) -> Traced:
    """What a trace file says. Raises ValueError for one without a step."""
    opened: Any = gzip.open if trace.suffix == ".gz" else open
    with opened(trace, "rt", encoding="utf-8") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    steps = [event for event in events if _is_mark(event) and event["name"] == STEP]
    if not steps:
        raise ValueError(f"{trace} has no step")
    thread = steps[0]["tid"]
    on_gpu = any(event.get("cat") == "kernel" for event in events)
    spans = list(_gpu_spans(events, thread) if on_gpu else _cpu_spans(events, thread))
    began, ended = min(event["ts"] for event in steps), max(event["ts"] + event["dur"] for event in steps)
    parts, names = _sums(spans, began, ended, GAPS if on_gpu else BETWEEN)
    there = [part for part in MEANINGS if part != BETWEEN] if on_gpu else _without(COPIES, GAPS)
    return Traced(
        (ended - began) * MICROSECOND,
        {part: parts[part] * MICROSECOND for part in there},
        {name: names[name] * MICROSECOND for name in sorted(names, key=names.__getitem__, reverse=True)},
    )


def per_step(traced: Traced, steps: int, seconds: float) -> tuple[dict[str, float], dict[str, float]]:
    """Parts and names of one step that takes `seconds` without the profiler.

    What a GPU does takes as long under the profiler, while the host gets slower: the gaps are what is left. On a CPU
    all gets slower alike, as far as anyone can tell.
    """
    if GAPS not in traced.parts:
        scale = seconds / traced.seconds
        return _scaled(traced.parts, scale), _scaled(traced.names, scale)
    parts, names = _scaled(traced.parts, 1 / steps), _scaled(traced.names, 1 / steps)
    busy = sum(parts.values()) - parts[GAPS]
    return parts | {GAPS: max(0.0, seconds - busy)}, names


def _without(*parts: str) -> list[str]:
    return [part for part in MEANINGS if part not in parts]


def _scaled(values: Mapping[str, float], scale: float) -> dict[str, float]:
    return {name: value * scale for name, value in values.items()}


def _is_mark(event: Mapping[str, Any]) -> bool:
    return event.get("cat") == "user_annotation"


def _span(event: Mapping[str, Any], part: str, rank: int) -> Span:
    return Span(event["ts"], event["ts"] + event["dur"], part, event["name"], rank)


def _marks(events: Iterable[Mapping[str, Any]], thread: Any) -> Iterator[Span]:
    """The waits for data and the optimiser's steps of the thread that trains."""
    for event in events:
        if _is_mark(event) and event["tid"] == thread:
            if event["name"] == WAITING:
                yield _span(event, DATA, MARK_RANK)
            elif event["name"].startswith(OF_OPTIMISER):
                yield _span(event, OPTIMISER, MARK_RANK)


def _cpu_spans(events: list[dict[str, Any]], thread: Any) -> Iterator[Span]:
    yield from _marks(events, thread)
    for event in events:
        if event.get("cat") == "cpu_op" and event["tid"] == thread:
            yield _span(event, _part_of_operation(event["name"]), OPERATION_RANK)


def _part_of_operation(name: str) -> str:
    if ATTENTION_NAMES.search(name) or "scaled_dot_product" in name:
        return ATTENTION
    if CPU_MATMUL_NAMES.search(name):
        return MATMUL
    return OTHER if name.startswith(("autograd::", "torch::autograd")) or "::" not in name else ELEMENT_WISE


def _gpu_spans(events: list[dict[str, Any]], thread: Any) -> Iterator[Span]:
    marks = list(_marks(events, thread))
    updates = [mark for mark in marks if mark.part == OPTIMISER]
    yield from (mark for mark in marks if mark.part == DATA)
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    for event in events:
        if event.get("cat") == "gpu_memcpy" and "DtoD" not in event["name"]:
            yield _span(event, COPIES, COPY_RANK)
        elif event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            when = launched.get(event.get("args", {}).get("correlation"), -1.0)
            of_update = any(update.began <= when <= update.ended for update in updates)
            yield _span(event, OPTIMISER if of_update else _part_of_kernel(event["name"]), KERNEL_RANK)


def _part_of_kernel(name: str) -> str:
    for pattern, part in ((ATTENTION_NAMES, ATTENTION), (MATMUL_NAMES, MATMUL), (ELEMENT_WISE_NAMES, ELEMENT_WISE)):
        if pattern.search(name):
            return part
    return OTHER


def _sums(spans: list[Span], began: float, ended: float, otherwise: str) -> tuple[dict[str, float], dict[str, float]]:
    """Microseconds from `began` to `ended`, by part and by name; `otherwise`: the part where nothing runs."""
    parts: defaultdict[str, float] = defaultdict(float)
    names: defaultdict[str, float] = defaultdict(float)
    running: list[tuple[int, float, float, Span]] = []
    at = began

    def advance(until: float) -> None:
        nonlocal at
        while at < until:
            while running and running[0][-1].ended <= at:
                heapq.heappop(running)
            stop = min(until, running[0][-1].ended) if running else until
            span = running[0][-1] if running else None
            parts[span.part if span else otherwise] += stop - at
            if span:
                names[span.name] += stop - at
            at = stop

    for span in sorted(spans):
        advance(min(max(span.began, began), ended))
        heapq.heappush(running, (-span.rank, -span.began, span.ended, span))
    advance(ended)
    return parts, names
