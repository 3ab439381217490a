"""Saved pipelines as one file with the names that their makers gave the weights: diffusers' converters, turned round.

A converter is given names in place of weights. What comes out says which weight of diffusers each of them becomes, and
whether it was cut into equal pieces or put together in another order.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import single_file_utils as converters
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.diffusion.families import family
from finetune.diffusion.single_file import BACKBONE

MAPPING = converters.DIFFUSERS_TO_LDM_MAPPING
ENDS = ("weight", "bias")
RESNET = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
VAE_RESNET = ("norm1", "conv1", "norm2", "conv2", "nin_shortcut")
VAE_ATTENTION = ("norm", "q", "k", "v", "proj_out")
FLUX2 = (
    *("img_in", "txt_in", "time_in.in_layer", "time_in.out_layer", "final_layer.linear"),
    *("double_stream_modulation_img.lin", "double_stream_modulation_txt.lin", "single_stream_modulation.lin"),
    "final_layer.adaLN_modulation.1",
)
FLUX2_DOUBLE = ("{}_attn.qkv", "{}_attn.proj", "{}_mlp.0", "{}_mlp.2")
MOST_BLOCKS = 60


class Piece:
    """Stands for weights, or pieces of them, joined: (name, number of the piece, how many there are)."""

    shape: tuple[int, ...] = (0,)
    ndim = 1

    def __init__(self, *joined: tuple[str, int, int]) -> None:
        self.joined = joined

    def chunk(self, count: int, dim: int = 0) -> list["Piece"]:
        ((name, _, _),) = self.joined
        return [Piece((name, number, count)) for number in range(count)]

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, arguments: tuple[Any, ...], named: Any = None
    ) -> Any:
        if function is torch.cat:
            return Piece(*(part for piece in arguments[0] for part in piece.joined))
        assert function in (torch.chunk, torch.split)
        return arguments[0].chunk(arguments[1] if function is torch.chunk else len(arguments[1]))


class Asked(dict[str, Any]):
    """Has whatever weight is asked for; lists no more than what converters count blocks by."""

    def pop(self, name: str, *_: Any) -> Piece:
        super().pop(name, None)
        return Piece((name, 0, 1))

    def __missing__(self, name: str) -> Piece:
        return Piece((name, 0, 1))


def save_single_file(folder: Path, file: Path, kind: str, parts: Iterable[str] | None = None) -> Path:
    """The pipeline's backbone, autoencoder and CLIP text encoders (or `parts`) in one file of the original layout."""
    found: dict[str, Tensor] = {}
    for part in parts or (family(kind).backbone, "vae", *family(kind).text_tokens):
        weights = {
            name: weight
            for source in (folder / part).glob("*.safetensors")
            for name, weight in load_file(source).items()
        }
        if part == family(kind).backbone:
            names = {BACKBONE + name: weight for name, weight in original_backbone(kind, weights).items()}
        elif part == "vae":
            names = {f"first_stage_model.{name}": weight for name, weight in _vae(weights).items()}
        else:
            names = dict(_text_encoder(weights, family(kind).file_text_prefixes[part]))
        found |= {name: weight.contiguous() for name, weight in names.items()}
    save_file(found, file)
    return file


def original_backbone(kind: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A backbone's weights under their original names, without a prefix."""
    names: dict[str, Any]
    if kind in ("sd", "sdxl"):
        named = {BACKBONE + name: Piece((name, 0, 1)) for name in _unet_names(weights)}
        config = {"layers_per_block": _layers(weights), "addition_embed_type": _embedding(weights)}
        converted = converters.convert_ldm_unet_checkpoint(named, config)
    elif kind == "sd3":
        blocks = {name.split(".")[1] for name in weights if name.startswith("transformer_blocks.")}
        names = {f"joint_blocks.{block}.": None for block in blocks}
        names |= {f"joint_blocks.{name.split('.')[1]}.attn2.ln_q": None for name in weights if ".attn2." in name}
        converted = converters.convert_sd3_transformer_checkpoint_to_diffusers(Asked(names))
    elif kind == "flux":
        names = {
            f"{stream}_blocks.{name.split('.')[1]}.": None
            for stream, begin in (("double", "transformer_blocks."), ("single", "single_transformer_blocks."))
            for name in weights
            if name.startswith(begin)
        }
        converted = converters.convert_flux_transformer_checkpoint_to_diffusers(Asked(names | {"guidance": None}))
    elif kind == "flux2":
        converted = converters.convert_flux2_transformer_checkpoint_to_diffusers(_pieces(_flux2_names()))
    else:
        assert kind == "z_image"
        converted = converters.convert_z_image_transformer_checkpoint_to_diffusers(_pieces(_z_image_names(weights)))
    return _back(converted, weights)


def _back(converted: Mapping[str, Piece], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    pieces: dict[str, dict[int, Tensor]] = {}
    for name, weight in weights.items():
        joined = converted[name].joined
        for (original, number, _), part in zip(joined, weight.chunk(len(joined)), strict=True):
            pieces.setdefault(original, {})[number] = part
    return {name: torch.cat([parts[number] for number in sorted(parts)]) for name, parts in pieces.items()}


def _pieces(names: Iterable[str]) -> dict[str, Any]:
    return {name: Piece((name, 0, 1)) for name in names}


def _unet_names(weights: Mapping[str, Tensor]) -> Iterator[str]:
    """Every name that a UNet may have."""
    for group in MAPPING["unet"].values():
        yield from group.values()
    attention = {name.split(".", 4)[4] for name in weights if ".attentions." in name and name.startswith("down_blocks")}
    attention |= {name.split(".", 3)[3] for name in weights if name.startswith("mid_block.attentions.")}
    blocks = [f"{side}_blocks.{number}" for side in ("input", "output") for number in range(13)]
    for block, end in itertools.product(
        [*(f"{block}.0" for block in blocks), "middle_block.0", "middle_block.2"], ENDS
    ):
        yield from (f"{block}.{layer}.{end}" for layer in RESNET)
    for block, name in itertools.product([*(f"{block}.1" for block in blocks), "middle_block.1"], attention):
        yield f"{block}.{name}"
    for block, end in itertools.product(blocks, ENDS):
        yield f"{block}.0.op.{end}" if block.startswith("input") else f"{block}.2.conv.{end}"


def _layers(weights: Mapping[str, Tensor]) -> int:
    return len({name.split(".")[3] for name in weights if name.startswith("down_blocks.0.resnets.")})


def _embedding(weights: Mapping[str, Tensor]) -> str | None:
    return "text_time" if "add_embedding.linear_1.weight" in weights else None


def _flux2_names() -> Iterator[str]:
    for name in FLUX2:
        yield f"{name}.weight"
    for number in range(MOST_BLOCKS):
        for stream, layer in itertools.product(("img", "txt"), FLUX2_DOUBLE):
            yield f"double_blocks.{number}.{layer.format(stream)}.weight"
        for stream, norm in itertools.product(("img", "txt"), ("query", "key")):
            yield f"double_blocks.{number}.{stream}_attn.norm.{norm}_norm.scale"
        yield from (f"single_blocks.{number}.linear{layer}.weight" for layer in (1, 2))
        yield from (f"single_blocks.{number}.norm.{norm}_norm.scale" for norm in ("query", "key"))


def _z_image_names(weights: Mapping[str, Tensor]) -> Iterator[str]:
    for name in weights:
        for new, old in (
            ("all_final_layer.2-1.", "final_layer."),
            ("all_x_embedder.2-1.", "x_embedder."),
            (".attention.to_out.0.", ".attention.out."),
            (".attention.norm_k.", ".attention.k_norm."),
            (".attention.norm_q.", ".attention.q_norm."),
            (".attention.to_q.", ".attention.qkv."),
        ):
            name = name.replace(new, old)
        yield name


def _vae(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = list(MAPPING["vae"].values())
    for end, layer in itertools.product(ENDS, VAE_RESNET):
        for level, number in itertools.product(range(4), range(3)):
            names += [f"{side}.{level}.block.{number}.{layer}.{end}" for side in ("encoder.down", "decoder.up")]
        names += [f"{side}.mid.block_{number}.{layer}.{end}" for side in ("encoder", "decoder") for number in (1, 2)]
    for end in ENDS:
        names += [f"{side}.mid.attn_1.{layer}.{end}" for side in ("encoder", "decoder") for layer in VAE_ATTENTION]
        names += [f"encoder.down.{level}.downsample.conv.{end}" for level in range(4)]
        names += [f"decoder.up.{level}.upsample.conv.{end}" for level in range(4)]
    levels = [None] * len({name.split(".")[2] for name in weights if name.startswith("encoder.down_blocks.")})
    converted = converters.convert_ldm_vae_checkpoint(
        {f"vae.{name}": piece for name, piece in _pieces(names).items()},
        {"down_block_types": levels, "up_block_types": levels},
    )
    found = _back(converted, weights)
    return {  # attention was made of convolutions
        name: weight[..., None, None] if ".attn_1." in name and weight.ndim == 2 else weight
        for name, weight in found.items()
    }


def _text_encoder(weights: Mapping[str, Tensor], begin: str) -> Iterator[tuple[str, Tensor]]:
    """A text encoder's: as transformers names them, or OpenCLIP those of Stable Diffusion XL's second one."""
    if begin != "conditioner.embedders.1.":
        for name, weight in weights.items():
            outside = "t5" in begin or name.startswith(("text_model.", "text_projection."))
            yield f"{begin}transformer.{name if outside else f'text_model.{name}'}", weight
        return
    whole, layers = MAPPING["openclip"]["layers"], MAPPING["openclip"]["transformer"]
    fused: dict[str, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        if name in whole:
            yield f"{begin}model.{whole[name]}", weight.T if name == "text_projection.weight" else weight
            continue
        old = name
        for new, original in layers.items():
            old = old.replace(new, original)
        if "_proj." in old and ".attn." in old and "out_proj" not in old:
            layer, letter, end = old.rsplit(".", 2)
            fused.setdefault(f"{begin}model.transformer.{layer}.in_proj_{end}", {})[letter] = weight
        else:
            yield f"{begin}model.transformer.{old}", weight
    for name, parts in fused.items():
        yield name, torch.cat([parts[f"{letter}_proj"] for letter in "qkv"])
