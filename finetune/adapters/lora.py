"""LoRA through PEFT: put adapters on a base, switch them off, read their weights and load them again.

r rank, O and I output and input features of an adapted layer.
"""

import math
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.config.schema import LoraConfig, LoraInit
from finetune.errors import ConfigError, ModelError
from finetune.run.progress import plural

ADAPTER = "default"  # PEFT's own default name
# PEFT's fast SVD with 32 iterations: 99 % of the best rank-r part of a matrix without any structure. Its "pissa", an
# exact SVD, takes ten times as long.
PISSA = "pissa_niter_32"
SAME_MATRIX = 0.5  # largest relative change that nf4 makes (it makes about 0.1); a larger one is another matrix


def inject(
    model: nn.Module, lora: LoraConfig, targets: Sequence[str], *, seed: int, new_token_rows: Sequence[int] = ()
) -> nn.Module:
    """Put fp32 adapters on every layer whose name ends with one of `targets`. The base keeps its weights.

    lora: rsLoRA is arXiv 2312.03732, DoRA arXiv 2402.09353; default and PiSSA (arXiv 2404.02948) start as the base,
    LoftQ (arXiv 2310.08659, one iteration) adds the largest part of what nf4 lost, read from the base's files.
    seed: of the random start. new_token_rows: rows of the embedding, and of a head with its own weights, to train too.
    Raises ModelError if no layer matches or a layer can't start or train that way, ConfigError for LoftQ without nf4.
    """
    from peft import inject_adapter_in_model

    config = _peft_config(model, lora, targets, new_token_rows)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, model, adapter_name=ADAPTER)
        except ValueError as error:
            raise ModelError(
                f"no layer of the base matches lora targets {list(targets)}; try another lora.targets"
            ) from error
        device = compute_device(model)
        if lora.dora:
            _require_readable(model, device)
        for parameter in adapter_parameters(model):
            parameter.data = parameter.data.to(device, torch.float32)  # small updates vanish in 16 bit
        if lora.init is LoraInit.loftq:
            _start_loftq(model)
        if lora.dora:
            for _, layer in lora_layers(model):  # the magnitudes again, of fp32 factors and of LoftQ's
                layer.lora_variant[ADAPTER].init(layer, adapter_name=ADAPTER)
        if lora.init is LoraInit.pissa:
            _start_pissa(model)
    return model


def compute_device(model: nn.Module) -> torch.device:
    """Where the adapters belong: PEFT puts one beside its layer's weights, and those may be offloaded to the CPU."""
    return next((p.device for p in model.parameters() if p.device.type != "cpu"), torch.device("cpu"))


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
    return sum(p.numel() for p in adapter_parameters(model)), sum(_numel(p) for p in model.parameters())


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


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that makes the trained module out of the base, under PEFT's names: the very tensors, not copies.

    What is trained (`…lora_A.weight`), and PiSSA's frozen start (`…lora_A.initial`), which no other machine, precision
    or number of threads would find again to the bit.
    """
    from peft import get_peft_model_state_dict

    # Not PEFT's default `model.state_dict()`: bitsandbytes packs every layer's scales for that, each time.
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    named: dict[str, Tensor] = get_peft_model_state_dict(
        model, state_dict=tensors, adapter_name=ADAPTER, save_embedding_layers=False
    )
    return named


def trainable_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What is trained, under PEFT's names: the very tensors, not copies."""
    return {name: tensor.detach() for name, tensor in adapter_tensors(model).items() if tensor.requires_grad}


def state(model: nn.Module) -> dict[str, Tensor]:
    """`adapter_tensors` as fp32 copies on the CPU: what a checkpoint holds."""
    tensors = sorted(adapter_tensors(model).items())
    return {name: tensor.detach().float().cpu().clone().contiguous() for name, tensor in tensors}


def load_state(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Put an adapter's weights into a model with injected adapters. Raises ModelError if names or shapes differ."""
    from peft import set_peft_model_state_dict

    _require_fit(adapter_tensors(model), weights, source)
    set_peft_model_state_dict(model, dict(weights), adapter_name=ADAPTER)


def _require_fit(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str) -> None:
    if own.keys() != weights.keys():
        odd = sorted(own.keys() ^ weights.keys())
        raise ModelError(
            f"{source} does not fit: {plural(len(odd), 'tensor')} without a counterpart, first {odd[0]}; "
            "was lora.targets, lora.init, lora.dora or model.added_tokens changed?"
        )
    for name, weight in weights.items():
        if weight.shape != own[name].shape:
            raise ModelError(
                f"{source} does not fit: {name} is {tuple(weight.shape)}, here {tuple(own[name].shape)}; "
                "set lora.rank to match"
            )


def as_start(
    model: nn.Module, weights: Mapping[str, Tensor], scales: Mapping[str, float], source: str
) -> dict[str, Tensor]:
    """An adapter that was trained with other settings, for `load_state`: B is rescaled so that it is the same function.

    model: with adapters injected, on any device, `meta` too. scales: by layer, the factor of its update B A where it
    was trained. Raises ModelError if it doesn't fit, or can't be the same.
    """
    own, (_, first) = adapter_tensors(model), lora_layers(model)[0]
    ranks, rank = sorted({len(weight) for name, weight in weights.items() if ".lora_A." in name}), first.r[ADAPTER]
    if ranks and ranks != [rank]:
        advice = f"set lora.rank={ranks[0]}" if len(ranks) == 1 else "only adapters of one rank can be continued"
        raise ModelError(f"{source} has rank {', '.join(map(str, ranks))}, and lora.rank is {rank}; {advice}")
    dora, here = is_dora(weights), is_dora(own)
    if dora != here:
        setting, stored = str(here).lower(), str(dora).lower()
        raise ModelError(f"{source} was trained with dora={stored}, and lora.dora is {setting}; set lora.dora={stored}")
    scaled = dict(weights)
    for name, layer in lora_layers(model):
        factor = scales.get(name, 1.0) / layer.scaling[ADAPTER]
        for key in (f"{name}.lora_B.weight", f"{name}.lora_embedding_B"):
            if key in scaled and factor != 1:
                scaled[key] = scaled[key].float() * factor
    _require_fit(own, scaled, source)
    return scaled


def require_start(
    lora: LoraConfig, adapted: Callable[[LoraConfig], nn.Module], read: Callable[[nn.Module], object]
) -> None:
    """Raises ModelError for an adapter to start from that doesn't fit, as far as the base's configuration is here.

    adapted: the base on `meta` with such adapters. read: raises for what doesn't fit into it.
    """
    try:
        model = adapted(replace(lora, init=LoraInit.default))  # others start from weights
    except ModelError:  # nothing is known of a base on the hub, and loading another says what is wrong
        return
    read(model)


def is_dora(names: Iterable[str]) -> bool:
    """Whether an adapter has magnitudes beside its factors, by its tensors' names, which are PEFT's or kohya's."""
    return any("lora_magnitude_vector" in name or name.endswith(".dora_scale") for name in names)


def lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers with adapters, by name."""
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def base_weight(layer: Any) -> Tensor:
    """The weights that an adapted layer's base computes with, fp32, in the shape they are stored in."""
    from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type

    base = layer.get_base_layer()
    weight: Tensor = base.weight.detach()
    if get_bnb_param_type(base.weight):
        weight = dequantize_bnb_weight(base.weight, state=getattr(base, "state", None))
    return weight.float()


def _peft_config(model: nn.Module, lora: LoraConfig, targets: Sequence[str], new_token_rows: Sequence[int]) -> Any:
    from peft import LoraConfig as PeftLoraConfig

    return PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(targets),
        exclude_modules=_modules_without_weights(model, targets) or None,
        init_lora_weights=True,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        trainable_token_indices=_token_rows(model, new_token_rows, targets) if new_token_rows else None,
    )


def _modules_without_weights(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Modules with a target's name that are no layers: in blocks of another kind, a list of layers or an activation."""
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


def _require_readable(model: nn.Module, device: torch.device) -> None:
    """DoRA reads the base's weights in every step. Raises ModelError where it can't."""
    weights = [layer.get_base_layer().weight for _, layer in lora_layers(model)]
    if any(weight.device != device for weight in weights):
        raise ModelError(
            "lora.dora=true needs all weights where it computes, and model.offload=true keeps some in CPU memory; "
            "set one of the two to false"
        )


def _start_loftq(model: Any) -> None:
    """Start the adapters of 4-bit layers as the largest part of what quantisation lost.

    PEFT's own `replace_lora_weights_loftq` needs a CUDA GPU, files with the model's very names, and alpha = rank.
    """
    from peft.utils.integrations import get_bnb_param_type

    waiting = {
        _name_in_stack(name): (name, layer)
        for name, layer in lora_layers(model)
        if get_bnb_param_type(layer.get_base_layer().weight) == "4bit"
    }
    if not waiting:
        raise ConfigError("lora.init=loftq makes up for nf4's loss; set model.quantize=nf4, or try lora.init=pissa")
    for key, tensor in _tensors_of_base(model, waiting):
        stored_OI = base_weight(waiting[key][1])
        # Another part of the model, such as one that reads images, may have a layer of this name.
        if tensor.shape == stored_OI.shape:
            lost_OI = tensor.to(stored_OI) - stored_OI
            if lost_OI.norm() < SAME_MATRIX * stored_OI.norm():
                _start_at(*waiting.pop(key), lost_OI)
    for name, _ in waiting.values():
        raise ModelError(
            f"lora.init=loftq needs the weights that {name} was quantised from, and {model.name_or_path!r} does not "
            "hold them; name the base before quantisation, or try lora.init=default"
        )


def _name_in_stack(name: str) -> str:
    """`layers.0.mlp.up_proj` of `model.layers.0.mlp.up_proj`: what comes before differs between model and files."""
    return re.sub(r"^.*?(?=\w+\.\d+\.)", "", name)


def _tensors_of_base(model: Any, wanted: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """The weights of wanted layers, one after another, from the files that the base was loaded from."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    try:
        commit = getattr(model.config, "_commit_hash", None)
        config = cached_file(model.name_or_path, "config.json", revision=commit, local_files_only=True)
    except OSError:  # a model built in memory
        return
    for file in sorted(Path(config).parent.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a dict)
                if (name := _name_in_stack(key.removesuffix(".weight"))) in wanted:
                    yield name, tensors.get_tensor(key)


def _start_pissa(model: nn.Module) -> None:
    """Start every adapter as the principal part of its layer's weights, and subtract that part beside it."""
    for name, layer in lora_layers(model):
        _start_at(name, layer, base_weight(layer))
        A_rI, B_Or = layer.lora_A[ADAPTER].weight.data, layer.lora_B[ADAPTER].weight.data
        layer.lora_A[ADAPTER] = _PissaFactor(A_rI, A_rI.clone(), 0)
        layer.lora_B[ADAPTER] = _PissaFactor(B_Or, -B_Or, 1)


def _start_at(name: str, layer: Any, matrix: Tensor) -> None:
    """Give A and B the scaled product that is the closest to `matrix` (arXiv 2404.02948, eq. 2 and 3), as PEFT does.

    matrix: in the shape of the layer's weights.
    """
    if ADAPTER not in layer.lora_A or matrix.ndim != 2:
        raise ModelError(f"{name} is no linear layer, and only those can start elsewhere; try lora.init=default")
    if layer.r[ADAPTER] > (most := min(matrix.shape)):
        raise ModelError(f"{name} has only {most} directions to start in; set lora.rank={most}, or lora.init=default")
    base = layer.get_base_layer()
    stored = base.weight
    base.weight = nn.Parameter(matrix.to(layer.lora_A[ADAPTER].weight), requires_grad=False)
    layer.pissa_init(ADAPTER, PISSA)  # takes the product off the weights, which are not the base's own
    base.weight = stored


class _PissaFactor(nn.Module):
    """One factor of a PiSSA adapter beside its frozen start: [A; A₀] (2r, I) or [B, −B₀] (O, 2r).

    Their product B A − B₀ A₀ is the change so far. PEFT subtracts B₀ A₀ from the base instead; that rounds it in the
    base's precision, and has to be undone for every other use of the base. PEFT's own `merge` sees `weight` alone:
    merge what `save_peft` writes.
    """

    initial: Tensor

    def __init__(self, weight: Tensor, initial: Tensor, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_buffer("initial", initial)
        self.dim = dim

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, torch.cat([self.weight, self.initial], self.dim))


def _numel(parameter: Any) -> int:
    """Numbers that a parameter stands for: bitsandbytes packs two 4-bit ones into a byte."""
    from peft.utils.integrations import get_bnb_param_type

    return math.prod(parameter.quant_state.shape) if get_bnb_param_type(parameter) == "4bit" else parameter.numel()
