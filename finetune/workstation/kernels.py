"""Whether the libraries that training leans on work on this device: a tiny run of each.

H heads, L tokens, E channels
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from finetune.run.plain import first_line

if TYPE_CHECKING:
    import torch

ROUNDING = 0.05  # relative difference of one attention in 16 bit; the same limit as `language.varlen_attention`
ATTENTION = {"flash": "FLASH_ATTENTION", "memory-efficient": "EFFICIENT_ATTENTION", "cuDNN": "CUDNN_ATTENTION"}


def read(device: "torch.device") -> dict[str, dict[str, str]]:
    """Library -> kind -> what is wrong with it; empty where it works."""
    return {"bitsandbytes": _bitsandbytes(device), "attention": _attention(device)}


def _bitsandbytes(device: "torch.device") -> dict[str, str]:
    from finetune.config.schema import ModelConfig, Precision, Quantize
    from finetune.memory.device import pick_dtype
    from finetune.memory.quantize import prove

    def layer(quantize: Quantize) -> str:
        prove(ModelConfig(quantize=quantize), pick_dtype(Precision.auto, device), device)
        return ""

    found = {quantize.name: _fault(partial(layer, quantize)) for quantize in (Quantize.nf4, Quantize.int8)}
    if device.type == "cuda":  # on a CPU, finetune has no use for it
        found["adamw8bit"] = _fault(partial(_optimizer, device))
    return found


def _fault(trial: Callable[[], str]) -> str:
    """What a trial says, or the error that ends it; the other trials go on."""
    try:
        return trial()
    except Exception as error:
        return first_line(error)


def _optimizer(device: "torch.device") -> str:
    """One step downhill with 8-bit states."""
    import torch

    from finetune.config.schema import OptimConfig, Optimizer
    from finetune.training.optim import SMALL_8BIT, build_optimizer

    weight = torch.nn.Parameter(torch.ones(SMALL_8BIT, device=device))
    optimizer = build_optimizer([weight], OptimConfig(name=Optimizer.adamw8bit, lr=0.1, weight_decay=0.0))
    torch.autograd.backward(weight.sum())
    optimizer.step()
    return "" if bool((weight < 1).all()) else "a step did not change every weight"


def _attention(device: "torch.device") -> dict[str, str]:
    return {name: _fault(partial(_attention_fault, kernel, device)) for name, kernel in ATTENTION.items()}


def _attention_fault(kernel: str, device: "torch.device") -> str:
    """One of torch's kernels against plain products."""
    import torch
    from torch.nn import attention, functional

    random = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cpu" else torch.float16  # every GPU has the latter
    query_HLE, key_HLE, value_HLE = (torch.randn(1, 4, 64, 64, generator=random).to(device, dtype) for _ in range(3))
    with attention.sdpa_kernel(attention.SDPBackend.MATH):
        expected = functional.scaled_dot_product_attention(query_HLE, key_HLE, value_HLE).float()
    with attention.sdpa_kernel(getattr(attention.SDPBackend, kernel)):
        output = functional.scaled_dot_product_attention(query_HLE, key_HLE, value_HLE).float()
    alike = (output - expected).norm() <= ROUNDING * expected.norm()
    return "" if alike else "another result than plain products"
