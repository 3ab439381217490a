"""How long a step takes: an estimate from the arithmetic and the bytes of its kernels.

A kernel waits for arithmetic or for memory, whichever takes longer at a stated share of the GPU's peak; besides, each
costs its start. A step takes as long as its kernels on the GPU, or as the host needs to launch them, unless it replays
them as a CUDA graph. The constants
were set by thirteen trainings on an H200 (docs/memory.md, where each is compared), of images and of language, most of
which waited for the host: seconds compare settings well, and are right to about a fifth there.
"""

from finetune.config.schema import Precision
from finetune.planning.machine import Machine
from finetune.planning.tracer import Trace

EFFICIENCY = 0.6  # of a GPU's peaks, of arithmetic and of memory
CPU_EFFICIENCY = 0.5
"""Of what a CPU does in one large product and one long copy: the two examples reach 0.42 (images) and 0.63
(conversations) of it on two cores of an AMD EPYC."""
DISK_BYTES_PER_S = 1e9  # of an SSD; assumed
KERNEL_S = 4.2e-6  # on the GPU, of each kernel
LAUNCH_S = 37e-6  # on the host, of each kernel, with Python, autograd and autocast around it
AROUND_REPLAY_S = 15e-3  # on the host, between two replays: the optimiser, the loss that is waited for; SD 1.5, H200


def seconds(trace: Trace, machine: Machine, precision: Precision, *, replayed: bool = False) -> float:
    """Of one run of a trace. replayed: by a CUDA graph."""
    tflops = machine.fp32_tflops if precision is Precision.fp32 else machine.tflops
    share = EFFICIENCY if machine.cuda else CPU_EFFICIENCY
    arithmetic, memory = share * tflops * 1e12, share * machine.gb_per_s * 1e9
    computing = sum(max(kernel.flops / arithmetic, kernel.moved / memory) for kernel in trace.kernels)
    if not machine.cuda:
        return computing
    on_gpu = computing + KERNEL_S * trace.launches
    return on_gpu + AROUND_REPLAY_S if replayed else max(on_gpu, LAUNCH_S * trace.launches)


def explained(machine: Machine, precision: Precision) -> str:
    """What the seconds rest on, for people."""
    if not machine.cuda:
        rates = f"{machine.tflops * 1e3:.0f} GFLOP/s and {machine.gb_per_s:.0f} GB/s measured now"
        return f"times are estimates: the work counted, at {CPU_EFFICIENCY:.0%} of the {rates}"
    tflops = machine.fp32_tflops if precision is Precision.fp32 else machine.tflops
    rates = f"{EFFICIENCY:.0%} of {tflops:.0f} TFLOP/s and {machine.gb_per_s:.0f} GB/s"
    known = "" if machine.known else " (assumed: no preset knows this GPU, so compare, don't trust)"
    return f"times are estimates: the work counted, at {rates}{known}, without downloads"
