"""Export a language adapter in every format, and prove each against the trained model on held-out rows.

Models are compared in fp32, one at a time on the device; merging holds another one, in 16 bit, in CPU memory.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finetune import hub
from finetune.adapters import attach, formats, lora
from finetune.config.schema import Config, ExportFormat, Quantize
from finetune.data.text.store import open_store
from finetune.data.text.tokens import Chat
from finetune.errors import DataError, ExportError
from finetune.language import gguf_file
from finetune.language.causal_lm import load_model
from finetune.language.compare_logits import LogitDifference, compare, model_outputs
from finetune.language.merge import merge
from finetune.language.task import inject
from finetune.language.tokenize import chat_of
from finetune.memory.device import pick_device, release_memory
from finetune.run.atomic import write_atomically
from finetune.run.progress import say
from finetune.run.records import Run, TextSet, load_record

ROWS = 16  # the most that are compared on
RANDOM_ROWS, RANDOM_LENGTH, RANDOM_SEED = 4, 64, 20240131  # where there are no rows
USAGE = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({base})
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), "adapter/peft")
"""


def write(
    config: Config, run: Run, weights: dict[str, Tensor], averaged: dict[str, Tensor] | None, folder: Path
) -> tuple[dict[str, str], dict[str, float]]:
    """Write the adapter into `folder` in each of `export.formats`, its average, if there is one, as a PEFT folder, and
    `comparison.json`: how like the trained model the base and each format are.

    Returns the files by format (relative to `folder`), and by format the relative difference of the logits (peft) or
    of the weights' updates (gguf), or the mean KL in nats a token (merged). Raises ExportError if one is over
    `export.tolerance`, or the last over `export.divergence`; ConfigError as `refuse` does.
    """
    base, export = refuse(config), config.export
    device, chat = pick_device(config.hardware.device), chat_of(config)
    rows, source = _rows(config, chat)
    peft, merged, gguf = folder / "peft", folder / "merged", folder / f"{config.name}.gguf"

    trained = inject(config, _fp32(config, device), chat.tokenizer)
    lora.load_state(trained, weights, "the checkpoint")
    reference = model_outputs(trained, rows, device)
    _save_peft(config, trained, peft, weights, chat)
    if averaged is not None:
        _save_peft(config, trained, folder / "peft_ema", averaged, chat)
    del trained
    release_memory()

    def measure(model: nn.Module) -> LogitDifference:
        return compare(reference, model_outputs(model, rows, device), device)

    fresh = _fp32(config, device)
    models = {"base": measure(fresh), "peft": measure(load(fresh, peft))}
    del fresh
    release_memory()
    if models["base"].relative <= export.tolerance:
        say(
            f"export: the adapter changes the logits by only {models['base'].relative:.1e}; was it trained long enough?"
        )
    differences = {"peft": _checked(peft, models["peft"].relative, export.tolerance, "tolerance")}
    if ExportFormat.merged in export.formats:
        models |= _write_merged(config, base, chat, peft, merged, measure, device)
        differences["merged"] = _checked(merged, models["merged"].divergence, export.divergence, "divergence")
    if ExportFormat.gguf in export.formats:
        gguf_file.write(gguf, peft, base.get_text_config(), config.name)
        difference = gguf_file.difference(gguf, peft, base.get_text_config())
        differences["gguf"] = _checked(gguf, difference, export.tolerance, "tolerance")
    if ExportFormat.peft not in export.formats:
        shutil.rmtree(peft)
        del differences["peft"]
    facts = {"rows": len(rows), "tokens": sum(map(len, rows)), "source": source, "gguf": differences.get("gguf")}
    facts["models"] = {name: asdict(difference_) for name, difference_ in models.items()}
    write_atomically(folder / "comparison.json", json.dumps(facts, indent=2) + "\n")
    places = {"peft": peft, "merged": merged, "gguf": gguf}
    files = {export_format: places[export_format].name for export_format in differences}
    return files | ({"ema": "peft_ema"} if averaged is not None else {}), differences


def usage(config: Config) -> str:
    """Python that loads an adapter, `{base}` to be filled in."""
    return USAGE


def refuse(config: Config) -> Any:
    """The base's configuration. Raises ConfigError if one of `export.formats` can't be had for it: ask early."""
    from transformers import AutoConfig

    base = hub.load(AutoConfig, config.model.base)
    if ExportFormat.gguf in config.export.formats:
        gguf_file.require(base.get_text_config(), dora=config.lora.dora, added_tokens=bool(config.model.added_tokens))
    return base


def load(model: nn.Module, path: Path) -> nn.Module:
    """The base with the adapter of a PEFT folder, or of a run's adapter folder, for inference; `model` is changed.

    Raises ModelError if the adapter is missing, damaged, or made for another base.
    """
    return attach.attach(model, formats.peft_folder(path)).get_base_model()  # type: ignore[no-any-return]


def _rows(config: Config, chat: Chat) -> tuple[list[list[int]], str]:
    """Token ids to compare on, and where they are from: held-out rows of the run's data set, spread over it.

    Sets too small to hold any out give rows that were trained on; without a data set the ids are random.
    """
    record = load_record(Path(config.run_dir), "dataset", TextSet)
    try:
        stored = open_store(Path(record.rows)) if record else None
    except DataError:  # the cache may be deleted at any time
        stored = None
    if stored is None:
        random = torch.Generator().manual_seed(RANDOM_SEED)
        ids = torch.randint(
            len(chat.tokenizer), (RANDOM_ROWS, min(RANDOM_LENGTH, config.data.length)), generator=random
        )
        return ids.tolist(), "random tokens"
    training, held_out = stored.split(config.data.validation_share)
    indices, source = (held_out, "held-out rows") if len(held_out) else (training, "rows that were trained on")
    spread = np.linspace(0, len(indices) - 1, min(ROWS, len(indices))).astype(int)
    return [stored[int(index)].ids[: config.data.length].tolist() for index in indices[spread]], source


def _fp32(config: Config, device: torch.device, **changes: Any) -> nn.Module:
    """The base in fp32, with `changes` of `config.model`; a quantised one stays so and computes in fp32.

    In fp32 a base may not fit the GPU that it was trained on in 16 bit: then layers wait in CPU memory.
    """
    model = replace(config.model, **changes)
    if device.type == "cuda" and model.quantize is Quantize.none and not config.lora.dora:  # which needs all at hand
        model.offload = True
    return load_model(model, torch.float32, device, vram_gib=config.hardware.vram_gib)


def _save_peft(config: Config, model: nn.Module, folder: Path, weights: dict[str, Tensor], chat: Chat) -> None:
    """A PEFT folder with the hash of the chat template, so that a server can refuse another one."""
    formats.save_peft(model, folder, weights, config.model.base)
    template = {"sha256": hashlib.sha256(chat.template.text.encode()).hexdigest(), "base": config.model.base}
    write_atomically(folder / "chat_template.json", json.dumps(template, indent=2) + "\n")
    if config.model.added_tokens:
        _save_tokenizer(config, chat, folder)


def _save_tokenizer(config: Config, chat: Chat, folder: Path) -> None:
    if config.data.chat_template:
        chat.tokenizer.chat_template = chat.template.text
    chat.tokenizer.save_pretrained(folder)


def _write_merged(
    config: Config,
    base: Any,
    chat: Chat,
    peft: Path,
    merged: Path,
    measure: Callable[[nn.Module], LogitDifference],
    device: torch.device,
) -> dict[str, LogitDifference]:
    """Write a whole model in 16 bit: under "merged" what it is like, and under other names what else was tried.

    A quantised base offers two ways: into the original weights, or into the dequantised ones that the adapter was
    trained with. Both are written and measured, and the one of the lower KL is kept.
    """
    dtype = torch.float16 if base.dtype is torch.float16 else torch.bfloat16
    quantised = config.model.quantize is not Quantize.none
    plain = replace(config.model, quantize=Quantize.none, offload=False)
    tried = {}
    for name in ("merged into the original weights", "merged into the dequantised weights")[: 1 + quantised]:
        folder = merged.with_name(name.replace(" ", "-"))
        stored = _fp32(config, device) if "dequantised" in name else None
        model = merge(load_model(plain, dtype, torch.device("cpu")), peft, stored)
        model.save_pretrained(folder)
        _save_tokenizer(config, chat, folder)
        del model, stored
        release_memory()
        tried[name] = (folder, measure(_fp32(config, device, base=str(folder), quantize=Quantize.none)))
        release_memory()
    best = min(tried, key=lambda name: (math.isnan(tried[name][1].divergence), tried[name][1].divergence))
    for name, (folder, difference_) in tried.items():
        say(f"export: {name}: {difference_.divergence:.2e} nats a token (KL){', kept' if name == best else ''}")
        if name == best:
            folder.rename(merged)
        else:
            shutil.rmtree(folder)
    found = {"merged": tried[best][1]}
    if quantised:
        found |= {name: difference_ for name, (_, difference_) in tried.items()}
        again = measure(_fp32(config, device, base=str(merged)))  # as it will often be used
        release_memory()
        found[f"merged, in {config.model.quantize.value} again"] = again
    return found


def _checked(path: Path, difference: float, limit: float, key: str) -> float:
    """The difference. Raises ExportError if it is over the limit, or not a number."""
    if not difference <= limit:
        what = "mean KL in nats a token" if key == "divergence" else "relative difference"
        raise ExportError(
            f"{path} does not reproduce the trained model: {what} {difference:.1e}, allowed {limit:.1e} (export.{key})"
        )
    return difference
