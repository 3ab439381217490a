"""What a run on a GPU takes of CPU memory besides: what comes through it, waits in it, or is compared in it.

Upper bounds. A file that is stored as it computes is mapped, and its pages may go again; in another precision, as in an
export in fp32, a copy of all of it is there (seen with transformers 5.23 and diffusers 0.42 on a CPU). The process
itself, a few GiB with CUDA's libraries, is not counted.
"""

from collections.abc import Collection, Iterator, Mapping

from finetune.config.schema import Quantize
from finetune.planning.candidates import Candidates
from finetune.planning.machine import GIB
from finetune.planning.plan import Setting

USUAL_GIB = 16.0  # of a machine that isn't here
LEAST_GIB = 0.05  # what is less isn't worth a word


def peaks(candidates: Candidates, setting: Setting, on_cpu: Collection[str] = ()) -> dict[str, float]:
    """GiB by what is being done, the most first; nothing without a GPU, whose memory then is the main one.

    candidates, setting: what training takes. on_cpu: phases for which the GPU is too small.
    """
    if not candidates.machine.cuda:
        return {}
    waiting = candidates.waiting(setting)
    sizes = candidates.memory_model.cpu_memory(export_on_cpu="export" in on_cpu)
    found = {name: size / GIB for name, size in sizes.items()} | {"training": sum(waiting.values())}
    found["loading the base"] += waiting.get("blocks", 0.0)  # copied to their place while the whole is there
    kept = {name: gib for name, gib in found.items() if gib >= LEAST_GIB}
    return dict(sorted(kept.items(), key=lambda item: -item[1]))


def warning(found: Mapping[str, float], free_gib: float | None, candidates: Candidates) -> Iterator[str]:
    """A line that says what to type, where the most of `found`, the peaks of `candidates`, is more than is free."""
    if not found:
        return
    name, gib = next(iter(found.items()))
    if gib <= (USUAL_GIB if free_gib is None else free_gib):
        return
    plain = candidates.workload.model.quantize is Quantize.none
    smaller = "try model.quantize=nf4" if plain else "close other programs first"
    advice = candidates.memory_model.less_cpu_memory.get(name, smaller)
    here = "where there is less" if free_gib is None else f"and {free_gib:.1f} are free here now"
    yield f"CPU memory: {name} takes up to {gib:.1f} GiB; {here}, {advice}"
