"""Two packs of rows, and what they give the adapters of a language model."""

import numpy as np
import torch
from torch import Tensor, nn

from finetune.adapters import lora
from finetune.config.schema import LoraConfig
from finetune.data.text.packing import build
from finetune.data.text.tokens import Encoded
from finetune.language import causal_lm
from finetune.language.losses import summed_cross_entropy

LENGTHS = (9, 1, 6), (3, 12)  # tokens of the rows of two packs of 17 and more slots


def packs(length: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """ids, positions and segments (2, L) of two packs with padding at their ends."""
    random = np.random.default_rng(0)
    built = []
    for lengths in LENGTHS:
        rows = [Encoded(random.integers(5, 390, n).astype(np.uint32), np.ones(n, np.bool_)) for n in lengths]
        built.append(build(rows.__getitem__, range(len(rows)), length=length))
    fields = ([getattr(pack, name) for pack in built] for name in ("ids", "positions", "segments"))
    ids_BL, positions_BL, segments_BL = (torch.from_numpy(np.stack(field)) for field in fields)
    return ids_BL, positions_BL, segments_BL


def adapted(model: nn.Module, targets: list[str], dropout: float = 0.0) -> nn.Module:
    """The model with adapters that change it, in training mode."""
    lora.inject(model, LoraConfig(rank=4, alpha=8, dropout=dropout), targets, seed=0)
    random = torch.Generator().manual_seed(0)
    for parameter in lora.adapter_parameters(model):
        change = 0.1 * torch.randn(parameter.shape, generator=random)
        parameter.data = (parameter.data.cpu() + change).to(model.device)  # where the base has layers in CPU memory
    return model.train()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """What a packed batch's loss gives the adapters."""
    model.zero_grad()
    device = next(model.parameters()).device
    ids_BL, positions_BL, segments_BL = packs()
    states_BLD = causal_lm.packed_hidden_states(model, ids_BL.to(device), positions_BL.to(device), segments_BL)
    trained = positions_BL[:, 1:] > 0
    states_ND, targets_N = states_BLD[:, :-1][trained.to(device)], ids_BL[:, 1:][trained].to(device)
    summed_cross_entropy(states_ND, causal_lm.head(model), targets_N).backward()
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and parameter.grad.any() for _, parameter in named)
    return {name: parameter.grad.float().cpu() for name, parameter in named}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Relative difference of two sets of tensors, as one."""
    one, other = (torch.cat([part[name].flatten() for name in sorted(part)]) for part in (a, b))
    return float((one - other).norm() / other.norm())
