"""A language model without weights, for the memory plan: what a step and every other phase would hold on the GPU.

B packs, L token positions of a pack, D hidden channels, V vocabulary entries.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from finetune.config.schema import DataConfig, LoraConfig, LoraInit, ModelConfig, Quantize, SampleConfig
from finetune.data.text import store
from finetune.language import causal_lm, compare_logits, fast_layers, meta, varlen_attention
from finetune.language.export import ROWS
from finetune.language.generate import ANSWER_BATCH
from finetune.language.losses import logits, summed_cross_entropy
from finetune.language.task import check_length, replayable
from finetune.memory import block_offload, checkpointing, policy
from finetune.planning import meta as planning_meta
from finetune.planning.tracer import PhaseOption, Trace, Tracer
from finetune.training.fast_linear import reason_against

TEMPLATE_TOKENS = 64  # what a chat template puts around a prompt, generously
COPIES = 5  # of a chunk's logits in `compare_logits.compare`


class LanguageMemoryModel:
    """Traces what `LanguageTask` and the stages around it run."""

    unit = "tokens"
    mild_checkpointing: tuple[int, ...] = (2,)

    def __init__(
        self,
        dtype: torch.dtype,
        *,
        cuda: bool,
        room: float,
        model: ModelConfig,
        lora: LoraConfig,
        sample: SampleConfig,
        data: DataConfig,
        fast: bool,
        merges: bool,
        validations: int,
        held_out: float | None,
        previews: int,
        seed: int,
    ) -> None:
        """dtype: of the arithmetic. room: bytes that the process may have, of which offloading fills a share. fast: as
        `trainer.fast`. merges: whether a merged model is exported. validations, previews: how often there are some.
        held_out: packs that are validated on, None where nobody knows.
        """
        self.base, self.lora, self.sample, self.length = model, lora, sample, data.length
        self.cuda, self.room, self.merges, self.seed = cuda, room, merges, seed
        self.validations, self.held_out, self.previews = validations, held_out, previews
        self.tracer = Tracer(dtype, like_cuda=cuda)
        self.notes = ["every token of a row counts as trained, the most there can be"]
        adapted = self._adapted(dtype)
        fast = fast and cuda and not reason_against(model, lora, dtype) and fast_layers.install(adapted, dtype)
        if fast:
            self.notes.append("layers: fast ones (trainer.fast)")
            self.mild_checkpointing = (
                2,
                len(cast(Any, adapted).get_decoder().layers),
            )  # the last: the first block, parts of others
        self.model = self.tracer.fakify(adapted).train()
        check_length(data.length, model.base, self.model)
        self.packed = cuda and varlen_attention.supports(self.model, dtype)
        if self.packed:
            varlen_attention.enable(self.model)
        self.replays = fast and replayable(self.model, data)
        attention = "flash, of each conversation alone" if self.packed else "with a mask of the whole row"
        self.notes.append(f"attention: {attention}")
        if model.quantize is not Quantize.none:
            self.notes.append("layers in 8 and 4 bit: as stored, and in 16 bit while they compute")
        self.count = data.length
        self.entry_bytes = float(np.dtype(store.COLUMNS["tokens"]).itemsize * data.length)
        self.less_cpu_memory = {"export": "try 'export.formats=[peft]'"} if merges else {}

    def replayed(self, checkpointing: int, offload_activations: bool) -> bool:
        """Whether a step is a CUDA graph, as in `LanguageTask`."""
        return self.replays and not (checkpointing or offload_activations)

    def set_checkpointing(self, every: int) -> None:
        """As `trainer.activation_checkpointing`; offloading recomputes all."""
        checkpointing.set_checkpointing(self.model, 1 if self.base.offload else every)

    def inputs(self, micro_batch: int) -> dict[str, Any]:
        """Rows as `LanguageTask.collate` makes them, each of one conversation."""
        shape = (micro_batch, self.length)
        ids_BL = torch.zeros(shape, dtype=torch.long)
        positions_BL, segments_BL = torch.zeros_like(ids_BL), torch.zeros_like(ids_BL)
        trained_BL = torch.ones(shape, dtype=torch.bool)
        seen: dict[str, Any]
        if self.packed:
            seen = varlen_attention.attention_kwargs(ids_BL, torch.zeros(micro_batch + 1, dtype=torch.int32))
        else:
            seen = {"attention_mask": torch.ones(micro_batch, 1, shape[1], shape[1], dtype=torch.bool)}
        return {"ids": ids_BL, "positions": positions_BL, "seen": seen, "others": (segments_BL, trained_BL)}

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """States behind the final norm."""
        return causal_lm.hidden_states(self.model, batch["ids"], batch["positions"], batch["seen"])

    def loss(self, states_BLD: Tensor, batch: dict[str, Any]) -> Tensor:
        """The sum over all tokens but each row's first."""
        hidden_ND, targets_N = states_BLD[:, :-1].flatten(0, 1), batch["ids"][:, 1:].flatten()
        return summed_cross_entropy(hidden_ND, causal_lm.head(self.model), targets_N)

    def offloaded(self) -> dict[str, float]:
        """What `model.offload` takes from the weights on the GPU, and the ring of blocks that come for it."""
        return block_offload.planned_bytes(self.model, self.room) if self.base.offload and self.cuda else {}

    def training_phases(
        self, micro_batch: int, held: Mapping[str, float]
    ) -> Iterator[tuple[str, Iterable[PhaseOption]]]:
        """Validation and previews."""
        if self.validations:
            yield (
                "validation",
                [
                    PhaseOption(
                        self._evaluated(lambda: self._validate(micro_batch), held), runs=self._validated(micro_batch)
                    )
                ],
            )
        if self.sample.prompts:
            yield "sampling", [PhaseOption(self._evaluated(self._write, held), runs=self._written_tokens())]

    def phases(self, micro_batch: int, held: Mapping[str, float]) -> Iterator[tuple[str, Iterable[PhaseOption]]]:
        """Every phase but the steps of training, by name."""
        yield from self.training_phases(micro_batch, held)
        slow = "in CPU memory, which may take hours; 'export.formats=[peft]' compares least"
        on_cpu = self._export_placement().cpu_fallback
        weights = 2.0 * sum(weight.numel() for weight in self._weights())
        # Each of two models reads the rows; the base is read from disk, a merged one written and read.
        export = PhaseOption(self._export(), runs=2 * ROWS, moved=weights * (3 if self.merges else 1))
        yield "export", [export, *([PhaseOption(None, slow)] if on_cpu else [])]

    def download_bytes(self) -> dict[str, float]:
        """Of the base."""
        return meta.download_bytes(self.base, sum(weight.numel() for weight in self._weights()))

    def cpu_memory(self, *, export_on_cpu: bool) -> dict[str, float]:
        """Of the base where blocks of it stay behind, and of models that are compared."""
        weights = sum(weight.numel() for weight in self._weights())
        frozen = float(block_offload.frozen_bytes(self.model))
        plain = self.base.quantize is Quantize.none
        loading = frozen if self.base.offload else 0.0  # else straight to the GPU
        if self._export_placement().offload or (self.merges and not self.lora.dora):
            export = policy.fp32_cpu_bytes(weights, self.room) if plain or self.merges else loading
        else:  # the base as a whole is on the GPU; a merged model is made in CPU memory all the same
            export = 2.0 * weights if self.merges else loading
        if export_on_cpu:  # of a quantised model at most, whose embeddings and head alone are in fp32
            count = sum(weight.numel() for weight in self.model.parameters())
            export = max(export, 4.0 * count if plain else 2.0 * block_offload.weight_bytes(self.model))
        return {"loading the base": loading, "export": export}

    def _weights(self) -> Iterator[nn.Parameter]:
        """Of the base, as it is before it is quantised."""
        return meta.language_model(self.base, torch.bfloat16).parameters()

    def _validated(self, micro_batch: int) -> float | None:
        """Micro-batches in all."""
        return None if self.held_out is None else self.validations * math.ceil(self.held_out / micro_batch)

    def _written_tokens(self) -> float:
        """One after the other in a run, each for as many prompts as are answered at once."""
        sample = self.sample
        previewed = min(sample.previews, len(sample.prompts))
        batches = 2 * math.ceil(len(sample.prompts) * len(sample.seeds) / ANSWER_BATCH)  # base and tuned
        batches += (self.previews + 1) * math.ceil(previewed / ANSWER_BATCH)  # the base's answers once
        return float(batches * sample.max_new_tokens)

    def _validate(self, micro_batch: int) -> None:
        with self.tracer.autocast():
            batch = self.inputs(micro_batch)
            self.loss(self.forward(batch), batch)

    def _write(self) -> None:
        """The last token of the longest answers, with all keys and values kept."""
        sample = self.sample
        model: Any = self.model
        # No tokenizer here: a token is at least a byte.
        longest = max(len(prompt.encode()) for prompt in sample.prompts) + TEMPLATE_TOKENS + sample.max_new_tokens
        rows = min(ANSWER_BATCH, len(sample.prompts))
        longest = min(longest, model.config.get_text_config().max_position_embeddings)
        with self.tracer.autocast():
            mask = torch.ones(rows, 1, longest, longest, dtype=torch.bool)
            ids_BL = torch.zeros(rows, longest, dtype=torch.long)
            positions_BL = torch.zeros_like(ids_BL)
            model(
                input_ids=ids_BL, attention_mask=mask, position_ids=positions_BL, use_cache=True, logits_to_keep=1
            ).logits.float()

    def _evaluated(self, work: Any, held: Mapping[str, float]) -> Trace:
        self.model.eval()
        try:
            return self.tracer.run(self.model, work, held=held)
        finally:
            self.model.train()

    def _export_placement(self) -> policy.Placement:
        return policy.language_export(self.base, cuda=self.cuda, dora=self.lora.dora)

    def _export(self) -> Trace:
        """Comparing two models, as `policy.language_export` places them: one of them on the GPU, and their head, or
        both where new tokens change it.
        """
        placed = self._export_placement()
        tracer = Tracer(placed.dtype, like_cuda=self.cuda)
        model: Any = tracer.fakify(self._adapted(placed.dtype)).eval()
        over = block_offload.weight_bytes(model) - block_offload.WEIGHTS_SHARE * self.room
        away = max(0.0, over) if placed.offload else 0.0

        def work() -> None:
            length = self.length
            ids_1L = torch.zeros(1, length, dtype=torch.long)
            mask = torch.ones(1, 1, length, length, dtype=torch.bool)
            states_LD = causal_lm.hidden_states(model, ids_1L, torch.zeros_like(ids_1L), {"attention_mask": mask})[0]
            head = causal_lm.head(model)
            if self.cuda:
                _moved = [torch.empty_like(head.weight) for _ in range(2 if self.base.added_tokens else 1)]
            rows = max(1, compare_logits.CHUNK_BYTES // (4 * head.weight.shape[0]))
            _alive = [logits(head, states_LD[:rows]) for _ in range(COPIES)]

        return tracer.run(model, work, held={"weights": -away})

    def _adapted(self, dtype: torch.dtype) -> nn.Module:
        adapted: Any = meta.adapted(self.base, self._traceable_lora(), dtype, self.seed)
        if self.base.quantize is Quantize.none:
            return cast(nn.Module, adapted)
        return planning_meta.quantised(adapted, self.base.quantize, adapted.get_output_embeddings())

    def _traceable_lora(self) -> LoraConfig:
        """The adapters with what can't be traced replaced by the nearest that can; said in the notes."""
        lora = self.lora
        if lora.init is not LoraInit.default:
            self._note(f"lora.init={lora.init.name} isn't traced: its start takes as much again as the adapters")
            lora = replace(lora, init=LoraInit.default)
        if lora.dora and self.base.quantize is not Quantize.none:
            self._note("lora.dora on a quantised base isn't traced: it needs copies of whole weights besides")
            lora = replace(lora, dora=False)
        return lora

    def _note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)
