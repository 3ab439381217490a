"""How long a step takes: an estimate from the arithmetic and the bytes of its kernels.

A kernel waits for arithmetic or for memory, whichever takes longer at a stated share of the card's peak; besides, each
costs its start. Set by steps measured on an H200 in 2026-11 (rank-16 LoRA, bf16), which come out as

    Stable Diffusion 1.5, 512 px, micro-batch 4 and 16, CUDA graph   11 % and 15 % too fast
    SDXL, 1024 px, micro-batch 2, CUDA graph                         21 % too slow
    Llama 2 7B in nf4, 4 and 8 rows of 1024, TRL's trainer           1 % and 28 % too slow

so seconds compare settings well and are right to about a third.
"""

from finetune.config import Precision
from finetune.planning.machine import Machine
from finetune.training.tracer import Trace

EFFICIENCY = 0.6  # of a card's peaks, of arithmetic and of memory
KERNEL_S = 4.2e-6  # on the card, of each kernel
LAUNCH_S = 28e-6  # on the host, of each kernel: Stable Diffusion 1.5 at 4 pictures took 125 ms without a CUDA graph
PCIE_GB_PER_S = 20.0  # of copies from pinned main memory over PCIe 4.0 x16 (31.5 GB/s by the standard)


def seconds(trace: Trace, machine: Machine, precision: Precision) -> float:
    """Of one run of a trace."""
    if not machine.cuda:  # measured rates are what really comes out
        return sum(max(k.flops / (machine.tflops * 1e12), k.moved / (machine.gb_per_s * 1e9)) for k in trace.kernels)
    tflops = machine.fp32_tflops if precision is Precision.fp32 else machine.tflops
    arithmetic, memory = EFFICIENCY * tflops * 1e12, EFFICIENCY * machine.gb_per_s * 1e9
    card = sum(max(kernel.flops / arithmetic, kernel.moved / memory) for kernel in trace.kernels)
    return max(card + KERNEL_S * trace.launches, LAUNCH_S * trace.launches)


def explained(machine: Machine, precision: Precision) -> str:
    """What the seconds rest on, for people."""
    if not machine.cuda:
        rates = f"{machine.tflops * 1e3:.0f} GFLOP/s and {machine.gb_per_s:.0f} GB/s, measured now"
        return f"seconds are an estimate: counted arithmetic and bytes over {rates}"
    tflops = machine.fp32_tflops if precision is Precision.fp32 else machine.tflops
    rates = f"{EFFICIENCY:.0%} of {tflops:.0f} TFLOP/s and {machine.gb_per_s:.0f} GB/s"
    known = "" if machine.known else " (assumed: no preset knows this card, so compare, don't trust)"
    return (
        f"seconds are an estimate: counted arithmetic and bytes at {rates}{known}, {KERNEL_S * 1e6:.0f} µs a kernel, "
        f"at least {LAUNCH_S * 1e6:.0f} µs a launch"
    )
