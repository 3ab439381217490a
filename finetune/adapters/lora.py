"""LoRA on a module through PEFT: inject, switch off, take the state out and put it back.

r rank, O and I output and input features of an adapted layer.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.config.schema import LoraInit
from finetune.errors import ConfigError, ModelError

ADAPTER = "default"  # PEFT's own default name
SVD_ITERATIONS = 16  # 99 % of the best part of a matrix without any structure, in a fifteenth of a full SVD's time
WRONG_SHARE = 0.5  # nf4 loses about a tenth of a weight matrix's norm; a larger difference is another matrix


def inject(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str],
    seed: int,
    init: LoraInit = LoraInit.default,
    rslora: bool = False,
    dora: bool = False,
    new_token_rows: Sequence[int] = (),
) -> nn.Module:
    """Put fp32 adapters of that rank on every layer whose name ends with one of `targets`. The base keeps its weights.

    init: default and pissa (arXiv 2404.02948) start as the base; loftq (arXiv 2310.08659, one iteration) adds the
    largest part of what nf4 lost, read from the base's files. rslora: arXiv 2312.03732. dora: arXiv 2402.09353.
    new_token_rows: rows of the embedding, and of a head with weights of its own, that are trained besides.
    Raises ModelError if no layer matches or a layer can't start or train that way, ConfigError for loftq without nf4.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets),
        exclude_modules=_containers(model, targets) or None,
        init_lora_weights=True,
        use_rslora=rslora,
        use_dora=dora,
        trainable_token_indices=_token_rows(model, new_token_rows, targets) if new_token_rows else None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, model, adapter_name=ADAPTER)
        except ValueError as error:
            raise ModelError(
                f"no layer of the base matches lora targets {list(targets)}; try another lora.targets"
            ) from error
        # PEFT puts an adapter where its layer's weights are, and those of offloaded layers wait in CPU memory.
        device = next((p.device for p in model.parameters() if p.device.type != "cpu"), torch.device("cpu"))
        if dora:
            _refuse_unreadable(model, device)
        for parameter in adapter_parameters(model):
            parameter.data = parameter.data.to(device, torch.float32)  # small updates vanish in 16 bit
        if init is LoraInit.loftq:
            _start_loftq(model)
        if dora:
            for _, layer in _layers(model):  # the magnitudes again, of fp32 factors and of those that LoftQ found
                layer.lora_variant[ADAPTER].init(layer, adapter_name=ADAPTER)
        if init is LoraInit.pissa:
            _start_pissa(model)
    return model


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What is trained, in a fixed order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def parameter_groups(model: nn.Module, ratio: float) -> list[dict[str, Any]]:
    """What is trained, as an optimiser's groups: a single one, or for `ratio` ≠ 1 all factors B in a second.

    The second's `lr_scale` is the ratio of its learning rate to the others' (LoRA+, arXiv 2402.12354).
    """
    if ratio == 1:
        return [{"params": adapter_parameters(model)}]
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for name, parameter in named if ".lora_B." not in name]},
        {"params": [parameter for name, parameter in named if ".lora_B." in name], "lr_scale": ratio},
    ]


def counts(model: nn.Module) -> tuple[int, int]:
    """Trainable parameters, all parameters; 4-bit weights count as what they stand for."""
    return sum(p.numel() for p in adapter_parameters(model)), sum(_size(p) for p in model.parameters())


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base as it was before `inject`, inside the block; nothing is trainable there."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def trainable_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What is trained under PEFT's names (`…lora_A.weight`): the very tensors, not copies."""
    named = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {_peft_name(name): parameter.detach() for name, parameter in named}


def state(model: nn.Module) -> dict[str, Tensor]:
    """All that makes the trained module out of the base, under PEFT's names: fp32 copies on the CPU.

    What is trained, and PiSSA's start (`…lora_A.initial`): no other machine, precision or number of threads would find
    quite the same one.
    """
    everything = trainable_tensors(model) | starts(model)
    return {name: weight.float().cpu().clone().contiguous() for name, weight in sorted(everything.items())}


def load_state(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Put an adapter's weights into a model with injected adapters. Raises ModelError if names or shapes differ."""
    from peft import set_peft_model_state_dict

    own = state(model)
    if own.keys() != weights.keys():
        odd = sorted(own.keys() ^ weights.keys())
        raise ModelError(
            f"{source} does not fit: {len(odd)} tensors differ, first {odd[0]}; "
            "was lora.targets, lora.init, lora.dora or model.added_tokens changed?"
        )
    for name, weight in weights.items():
        if weight.shape != own[name].shape:
            raise ModelError(
                f"{source} does not fit: {name} is {tuple(weight.shape)}, here {tuple(own[name].shape)}; "
                "set lora.rank to match"
            )
    set_peft_model_state_dict(model, dict(weights), adapter_name=ADAPTER)


def _containers(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """What a target's name fits and is no layer: a list of layers, or an activation, in blocks of another kind."""
    return [
        name
        for name, module in model.named_modules()
        if any(f".{name}".endswith(f".{target}") for target in targets) and not list(module.parameters(recurse=False))
    ]


def _token_rows(model: Any, rows: Sequence[int], targets: Sequence[str]) -> dict[str, list[int]]:
    """The rows by layer: of the input embedding, and of the head unless it has the embedding's weights."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    names = [name for layer in layers for name, module in model.named_modules() if module is layer]
    for name in names:
        if any(f".{name}".endswith(f".{target}") for target in targets):
            raise ModelError(
                f"{name} can't have an adapter and new rows at once; take it out of the lora targets {list(targets)}, "
                "or train without model.added_tokens"
            )
    if getattr(head, "bias", None) is not None:  # PEFT's layer for new rows leaves it out
        raise ModelError("new rows don't fit a head with a bias, as this base has; train without model.added_tokens")
    return {name: sorted(set(rows)) for name in names}


def _refuse_unreadable(model: nn.Module, device: torch.device) -> None:
    """DoRA reads the base's weights in every step. Raises ModelError where it can't."""
    weights = [layer.get_base_layer().weight for _, layer in _layers(model)]
    if any(weight.device != device for weight in weights):
        raise ModelError(
            "lora.dora=true needs all weights where it computes, and model.offload=true keeps some in CPU memory; "
            "set one of the two to false"
        )
    if device.type == "cpu" and any(_bits(weight) == 8 for weight in weights):  # PEFT drops their scales there
        raise ModelError("lora.dora=true can't read int8 weights on a CPU; try model.quantize=nf4")


def _start_loftq(model: Any) -> None:
    """Start the adapters of 4-bit layers as the principal part of what quantisation lost."""
    packed = [(name, layer) for name, layer in _layers(model) if _bits(layer.get_base_layer().weight) == 4]
    if not packed:
        raise ConfigError("lora.init=loftq makes up for nf4's loss; set model.quantize=nf4, or try lora.init=pissa")
    files = _base_files(model)
    for name, layer in packed:
        stored_OI = _weight(name, layer)
        original_OI = _original(files, name, stored_OI)
        if original_OI is None:
            raise ModelError(
                f"lora.init=loftq needs the weights that {name} was quantised from, and {model.name_or_path!r} does "
                "not hold them; name the base before quantisation, or try lora.init=default"
            )
        A_rI, B_Or = _factors(name, layer, original_OI - stored_OI)
        layer.lora_A[ADAPTER].weight.data, layer.lora_B[ADAPTER].weight.data = A_rI, B_Or


def _start_pissa(model: nn.Module) -> None:
    """Start every adapter as the principal part of its layer's weights, and take that part off beside it."""
    for name, layer in _layers(model):
        A_rI, B_Or = _factors(name, layer, _weight(name, layer))
        layer.lora_A[ADAPTER] = _Anchored(A_rI, A_rI.clone(), 0)
        layer.lora_B[ADAPTER] = _Anchored(B_Or, -B_Or, 1)


class _Anchored(nn.Module):
    """One factor of a PiSSA adapter beside its frozen start: [A; A₀] (2r, I) or [B, −B₀] (O, 2r).

    Their product B A − B₀ A₀ is the change so far. Subtracting B₀ A₀ from the base instead would round it in the
    base's precision, and would have to be undone for every other use of the base. PEFT's own `merge` sees `weight`
    alone: merge what `save_peft` writes.
    """

    initial: Tensor

    def __init__(self, weight: Tensor, initial: Tensor, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_buffer("initial", initial)
        self.dim = dim

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, torch.cat([self.weight, self.initial], self.dim))


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _weight(name: str, layer: Any) -> Tensor:
    """The base's weights as they act, (O, I) fp32 on the adapter's device. Raises ModelError if it isn't linear."""
    from peft.utils.integrations import dequantize_bnb_weight

    base = layer.get_base_layer()
    weight: Tensor = base.weight.detach()
    if _bits(base.weight):
        weight = dequantize_bnb_weight(base.weight, state=getattr(base, "state", None))
    if ADAPTER not in layer.lora_A or weight.ndim != 2:
        raise ModelError(f"{name} is no linear layer, and only those can start elsewhere; try lora.init=default")
    weight = weight.to(layer.lora_A[ADAPTER].weight)
    return weight.T if layer.fan_in_fan_out else weight


def _factors(name: str, layer: Any, matrix_OI: Tensor) -> tuple[Tensor, Tensor]:
    """A (r, I) and B (O, r) whose scaled product is the closest to `matrix_OI` (arXiv 2404.02948, eq. 2 and 3)."""
    rank, most = layer.r[ADAPTER], min(matrix_OI.shape)
    if rank > most:
        raise ModelError(f"{name} has only {most} directions to start in; set lora.rank={most}, or lora.init=default")
    left_OR, values_R, right_IR = torch.svd_lowrank(matrix_OI, q=min(2 * rank, most), niter=SVD_ITERATIONS)
    root_r = (values_R[:rank] / layer.scaling[ADAPTER]).sqrt()
    return (root_r * right_IR[:, :rank]).T.contiguous(), (left_OR[:, :rank] * root_r).contiguous()


def _base_files(model: Any) -> dict[str, Path]:
    """The file of every tensor in the folder that the base was loaded from."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    try:
        commit = getattr(model.config, "_commit_hash", None)
        config = cached_file(model.name_or_path, "config.json", revision=commit, local_files_only=True)
    except OSError:  # a model built in memory
        return {}
    files: dict[str, Path] = {}
    for file in Path(config).parent.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            files |= dict.fromkeys(tensors.keys(), file)
    return files


def _original(files: Mapping[str, Path], name: str, stored_OI: Tensor) -> Tensor | None:
    """The tensor in the files that a 4-bit layer was made from, told by its contents where several have its name."""
    from safetensors import safe_open

    tail = re.sub(r"^.*?(?=\w+\.\d+\.)", "", name)  # `layers.0.mlp.up_proj`: what comes before differs in the files
    for key in (key for key in files if key.endswith(f"{tail}.weight")):
        with safe_open(files[key], framework="pt") as tensors:
            found_OI: Tensor = tensors.get_tensor(key).to(stored_OI)
        if found_OI.shape == stored_OI.shape and (found_OI - stored_OI).norm() < WRONG_SHARE * stored_OI.norm():
            return found_OI
    return None


def _bits(weight: Tensor) -> int:
    """Of each number in a weight that bitsandbytes quantised: 4 or 8; 0 for any other."""
    return {"Params4bit": 4, "Int8Params": 8}.get(type(weight).__name__, 0)


def _size(parameter: Any) -> int:
    """Numbers that a parameter stands for: bitsandbytes packs two 4-bit ones into a byte."""
    return math.prod(parameter.quant_state.shape) if _bits(parameter) == 4 else parameter.numel()


def _peft_name(name: str) -> str:
    short = name.removeprefix("module.").replace(f".{ADAPTER}.", ".").removesuffix(f".{ADAPTER}")
    return short.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")  # as PEFT writes it


def starts(model: nn.Module) -> dict[str, Tensor]:
    """What PiSSA takes off again, under names as PEFT would give them; nothing in any other adapter."""
    return {_peft_name(name): start for name, start in model.named_buffers() if name.endswith(f".{ADAPTER}.initial")}
