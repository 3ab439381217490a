"""Operations of torch made of our own kernels: the memory plan meets one kernel with its results, and nothing of what
is inside."""

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

REGISTRY: Any = torch.library  # half-typed


Like = Callable[..., torch.Tensor | None]


def define(
    namespace: str, signatures: Mapping[str, str], plain: Any, compiled: str, made: Mapping[str, Like] | None = None
) -> Any:
    """The operations of a namespace by name, as `torch.ops` has them.

    plain: has a function for each, in torch's operations. compiled: the module that has them for a GPU in Triton, which
    torch's build for CPUs lacks. made: what an operation's result is like; unless given it is like the first tensor,
    and nothing for names that end with "_". Through a `Library`, because a `custom_op` costs the host several times as
    much a call.
    """
    on_gpu = import_module(compiled) if find_spec("triton") else plain
    library = REGISTRY.Library(namespace, "DEF")
    _KEPT.append(library)  # it takes its operations with it
    for name, signature in signatures.items():
        library.define(name + signature)
        like = _nothing if name.endswith("_") else (made or {}).get(name, _like_first)
        REGISTRY.register_fake(f"{namespace}::{name}", like)
        library.impl(name, getattr(plain, name), "CPU")
        library.impl(name, getattr(on_gpu, name), "CUDA")
    return getattr(torch.ops, namespace)


def rms_normed(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x divided by the root mean square of its last dimension, in fp32, and what it was multiplied with for that."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * scale, scale


def _nothing(*_: Any) -> None:
    return None


def _like_first(first: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(first)


_KEPT: list[Any] = []
