"""Export a language adapter in every format, and verify each against the trained model on held-out rows.

Models are compared in fp32, one at a time on the device; merging holds another one, in 16 bit, in CPU memory.
"""

import copy
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finetune import hub
from finetune.adapters import attach
from finetune.adapters import formats as files
from finetune.adapters import lora as lora_layers
from finetune.config.model_kinds import MODEL_KINDS
from finetune.config.rules import require_all
from finetune.config.schema import ExportConfig, ExportFormat, LoraConfig, ModelConfig, Quantize
from finetune.data.text.store import TokenStore
from finetune.data.text.tokens import Chat, control_tokens
from finetune.errors import ExportError
from finetune.language import gguf_file
from finetune.language.causal_lm import load_model
from finetune.language.compare_logits import LogitDifference, compare, model_outputs
from finetune.language.merge import merge
from finetune.language.task import inject
from finetune.memory import policy
from finetune.memory.device import release_memory
from finetune.run.atomic import write_atomically
from finetune.run.progress import say

ROWS = 16  # the most that are compared on
RANDOM_ROWS, RANDOM_LENGTH, RANDOM_SEED = 4, 64, 20240131  # where there are no rows


@dataclass(frozen=True)
class Exporter:
    """Exports adapters of one base.

    content: the base's. chat: its tokenizer with its template. template: as `data.chat_template`; empty is the
    tokenizer's own. rows: token ids to compare on, and where they are from. name: of GGUF files.
    """

    model: ModelConfig
    content: str
    lora: LoraConfig
    chat: Chat
    template: str
    rows: list[list[int]]
    source: str
    device: torch.device
    vram_gib: float
    seed: int
    name: str

    def export(
        self,
        weights: Mapping[str, Tensor],
        averaged: Mapping[str, Tensor] | None,
        folder: Path,
        settings: ExportConfig,
    ) -> tuple[dict[str, str], dict[str, float]]:
        """Write the adapter into `folder` as a PEFT folder and in each of the formats, its average, if there is
        one, as a PEFT folder too, and `comparison.json`: how like the trained model the base and each format are.

        Returns the files by format (relative to `folder`), and by format the relative difference of the logits (peft)
        or of the weights' updates (gguf), or the mean KL in nats a token (merged). Raises ExportError if one is over
        its limit in the settings, ConfigError as `check_formats` does.
        """
        base = check_formats(self.model, self.lora, settings.formats)
        peft = folder / "peft"
        trained = inject(self._base(), self.model, self.lora, self.seed, self._new_tokens())
        lora_layers.load_state(trained, weights, "the checkpoint")
        reference = model_outputs(trained, self.rows, self.device)
        self._save_peft(trained, peft, weights)
        if averaged is not None:
            self._save_peft(trained, folder / "peft_ema", averaged)
        del trained
        release_memory()

        def measure(model: nn.Module) -> LogitDifference:
            return compare(reference, model_outputs(model, self.rows, self.device), self.device)

        fresh = self._base()
        found = _Export(self, base, peft, folder, measure, {"base": measure(fresh)})
        found.models["peft"] = measure(load(fresh, peft))
        del fresh
        release_memory()
        effect = found.models["base"].relative
        if effect <= settings.tolerance:
            say(f"warning: the adapter changes the logits by only {effect:.1e}; was it trained long enough?")
        names, differences = {}, {}
        # All others are made of the PEFT folder, which stays: it is what samples and a later training load.
        for name in dict.fromkeys([ExportFormat.peft, *settings.formats]):
            path, difference = WRITERS[name](found)
            _require(path, difference, getattr(settings, name.limit), name.limit)
            names[name.name], differences[name.name] = path.name, difference
        facts = {
            "rows": len(self.rows),
            "tokens": sum(map(len, self.rows)),
            "source": self.source,
            "gguf": differences.get("gguf"),
            "models": {name: asdict(difference) for name, difference in found.models.items()},
        }
        write_atomically(folder / "comparison.json", json.dumps(facts, indent=2) + "\n")
        return names | ({"ema": "peft_ema"} if averaged is not None else {}), differences

    def _base(self, **changes: Any) -> nn.Module:
        """The base to compare on, with `changes` of its settings, as `policy.language_export` places it."""
        model = replace(self.model, **changes)
        placed = policy.language_export(model, cuda=self.device.type == "cuda", dora=self.lora.dora)
        model = replace(model, offload=placed.offload)
        return load_model(model, placed.dtype, self.device, vram_gib=self.vram_gib)

    def _new_tokens(self) -> list[int]:
        found: list[int] = self.chat.tokenizer.convert_tokens_to_ids(self.model.added_tokens)
        return found

    def _save_peft(self, model: nn.Module, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """A PEFT folder with the hash of the chat template, so that a server can refuse another one."""
        files.save_peft(model, folder, weights, self.model.base, self.content)
        digest = hashlib.sha256(self.chat.template.text.encode()).hexdigest()
        template = {"sha256": digest, "base": self.model.base}
        write_atomically(folder / "chat_template.json", json.dumps(template, indent=2) + "\n")
        if self.model.added_tokens or self.template:
            self._save_tokenizer(folder)

    def _save_tokenizer(self, folder: Path) -> None:
        """The base's tokenizer with the new tokens, the run's template, and the token that ends its answers as eos."""
        tokenizer, template = copy.deepcopy(self.chat.tokenizer), self.chat.template
        if self.template:
            tokenizer.chat_template = template.text
        if "eos_token" not in template.text:  # else the template would write other texts
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(self.chat.stop_ids()[0])
        tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class _Export:
    """One export under way. base: the base's configuration. models: how like the trained one each model is, so far."""

    exporter: Exporter
    base: Any
    peft: Path
    folder: Path
    measure: Callable[[nn.Module], LogitDifference]
    models: dict[str, LogitDifference] = field(default_factory=dict)


def _write_peft(export: _Export) -> tuple[Path, float]:
    """It is there already: everything else is made of it."""
    return export.peft, export.models["peft"].relative


def _write_merged(export: _Export) -> tuple[Path, float]:
    """Write a whole model in 16 bit.

    A quantised base offers two ways: into the original weights, or into the dequantised ones that the adapter was
    trained with. Both are written and measured, and the one of the lower KL is kept.
    """
    exporter, merged = export.exporter, export.folder / "merged"
    dtype = torch.float16 if export.base.dtype is torch.float16 else torch.bfloat16
    quantised = exporter.model.quantize is not Quantize.none
    plain = replace(exporter.model, quantize=Quantize.none, offload=False)
    tried = {}
    for name in ("merged into the original weights", "merged into the dequantised weights")[: 1 + quantised]:
        folder = merged.with_name(name.replace(" ", "-"))
        stored = exporter._base() if "dequantised" in name else None
        model = merge(load_model(plain, dtype, torch.device("cpu")), export.peft, stored)
        stop_at(model, exporter.chat)
        model.save_pretrained(folder)
        exporter._save_tokenizer(folder)
        del model, stored
        release_memory()
        tried[name] = (folder, export.measure(exporter._base(base=str(folder), quantize=Quantize.none)))
        release_memory()
    best = min(tried, key=lambda name: (math.isnan(tried[name][1].divergence), tried[name][1].divergence))
    for name, (folder, difference) in tried.items():
        say(f"export: {name}: {difference.divergence:.2e} nats a token (KL){', kept' if name == best else ''}")
        if name == best:
            folder.rename(merged)
        else:
            shutil.rmtree(folder)
    export.models["merged"] = tried[best][1]
    if quantised:
        export.models.update({name: difference for name, (_, difference) in tried.items()})
        again = export.measure(exporter._base(base=str(merged)))  # as it will often be used
        export.models[f"merged, in {exporter.model.quantize.value} again"] = again
        release_memory()
    return merged, export.models["merged"].divergence


def _write_gguf(export: _Export) -> tuple[Path, float]:
    name, config = export.exporter.name, export.base.get_text_config()
    file = export.folder / f"{name}.gguf"
    gguf_file.write(file, export.peft, config, name)
    return file, gguf_file.difference(file, export.peft, config)


WRITERS: dict[ExportFormat, Callable[[_Export], tuple[Path, float]]] = {
    ExportFormat.peft: _write_peft,
    ExportFormat.merged: _write_merged,
    ExportFormat.gguf: _write_gguf,
}
"""Each writes the adapter and returns where it is, and its difference to the trained model."""
require_all(MODEL_KINDS["language"].export_formats, WRITERS, "language.export.WRITERS")


def check_formats(model: ModelConfig, lora: LoraConfig, formats: Sequence[ExportFormat]) -> Any:
    """The base's configuration. Raises ConfigError if one of the formats can't be had for it: ask early.

    The hub is asked only for a configuration that is neither on this machine nor in the package.
    """
    from transformers import AutoConfig

    hub.require(model.base, "config.json")
    base = hub.load(AutoConfig, str(hub.known_config(model.base) or model.base))
    if ExportFormat.gguf in formats:
        gguf_file.require(base.get_text_config(), dora=lora.dora, added_tokens=bool(model.added_tokens))
    return base


def load(model: nn.Module, path: Path) -> nn.Module:
    """The base with the adapter of a PEFT folder, or of a run's adapter folder, for inference; `model` is changed.

    Raises ModelError if the adapter is missing, damaged, or made for another base.
    """
    return attach.attach_peft_folder(model, files.peft_folder(path)).get_base_model()  # type: ignore[no-any-return]


def stop_at(model: Any, chat: Chat) -> None:
    """Let the model's own `generate` end an answer where samples end, and at control tokens where it did before."""
    own = model.generation_config.eos_token_id
    control = set(chat.tokenizer.convert_tokens_to_ids(control_tokens(chat.tokenizer)))
    before = [token for token in (own if isinstance(own, list) else [own]) if token in control]
    stops = list(dict.fromkeys([*chat.stop_ids(), *before]))
    for config in (model.generation_config, model.config.get_text_config()):
        config.eos_token_id = stops if len(stops) > 1 else stops[0]


def comparison_rows(stored: TokenStore | None, chat: Chat, *, length: int, share: float) -> tuple[list[list[int]], str]:
    """Token ids to compare on, and where they are from: held-out rows of the run's data set, spread over it.

    length: most tokens of a row. share: held out. Sets too small to hold any out give rows that were trained on;
    without a data set the ids are random.
    """
    if stored is None:
        random = torch.Generator().manual_seed(RANDOM_SEED)
        ids = torch.randint(chat.tokenizer.vocab_size, (RANDOM_ROWS, min(RANDOM_LENGTH, length)), generator=random)
        return ids.tolist(), "random tokens"
    training, held_out = stored.split(share)
    indices, source = (held_out, "held-out rows") if len(held_out) else (training, "rows that were trained on")
    spread = np.linspace(0, len(indices) - 1, min(ROWS, len(indices))).astype(int)
    return [stored[int(index)].ids[:length].tolist() for index in indices[spread]], source


def _require(path: Path, difference: float, limit: float, key: str) -> None:
    """Raises ExportError if the difference is over the limit, or not a number."""
    if not difference <= limit:
        what = "mean KL in nats a token" if key == "divergence" else "relative difference"
        raise ExportError(
            f"{path} does not reproduce the trained model: {what} {difference:.1e}, allowed {limit:.1e} (export.{key})"
        )
