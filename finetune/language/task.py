"""Next-token loss of a causal language model on packed conversations; only the assistant's tokens are trained.

B packs, L token positions of a pack, N trained tokens, D width of the hidden states.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finetune.adapters import formats
from finetune.adapters import lora as lora_layers
from finetune.config.schema import DataConfig, LoraConfig, ModelConfig, SampleConfig
from finetune.data import order
from finetune.data.text import packing, store
from finetune.data.text.tokens import preview_row
from finetune.errors import ConfigError, ModelError
from finetune.language import causal_lm, fast_layers, varlen_attention
from finetune.language.generate import TextGenerator
from finetune.language.losses import summed_cross_entropy
from finetune.language.tokenize import chat_of
from finetune.memory import activation_offload, checkpointing, fallbacks
from finetune.memory.device import usable_bytes
from finetune.run.records import TextSet
from finetune.training.cuda_graphs import CudaGraphs
from finetune.training.task import Batch, Draw

VALIDATION_ROWS = 256  # the most that are validated on
LEAK_ROWS = 16  # of a pack that are compared; a pack of 32,768 tokens may hold hundreds
LEAK_TOLERANCE = 1e-3  # relative; sums in another order differ by less in bf16, a neighbour that is seen by far more
PACKS_SEEN = 32  # of all, for the worst: they differ in trained tokens alone, and little in those
ROUND_TO = 8  # token positions; a pack of one row alone is padded to a multiple of it


class LanguageTask:
    """LoRA on a causal language model. `model` has the adapters injected."""

    unit = "tokens"

    def __init__(
        self,
        dataset: TextSet,
        device: torch.device,
        *,
        model: ModelConfig,
        lora: LoraConfig,
        data: DataConfig,
        sample: SampleConfig,
        dtype: torch.dtype,
        seed: int,
        vram_gib: float,
        activation_checkpointing: int,
        offload_activations: bool,
        fast: bool,
    ) -> None:
        """dtype: of the arithmetic. vram_gib and the three below: as in the configuration."""
        self.base, self.data, self.sample_settings = model.base, data, sample
        self.device, self.dtype, self.seed = device, dtype, seed
        self.chat = chat_of(model, data)
        for prompt in sample.prompts:  # one that can't be answered is named now, and not when training is over
            self.chat.prompt_ids(prompt)
        self.rows = store.open_store(Path(dataset.rows))
        self.training, held_out = self.rows.split(data.validation_share)
        candidates = held_out if len(held_out) else self.training
        self.validation = candidates[order.by_content(self.rows.groups(candidates), VALIDATION_ROWS)]
        self.size = len(self.training)
        loaded: Any = causal_lm.load_model(model, dtype, device, vram_gib=vram_gib)
        check_length(data.length, model.base, loaded)
        causal_lm.require_rows(loaded, self.chat.tokenizer, self.rows.largest_id(), dataset.source)
        checkpointing.set_checkpointing(loaded, activation_checkpointing)
        new_tokens = self.chat.tokenizer.convert_tokens_to_ids(model.added_tokens)
        self.model: nn.Module = inject(loaded, model, lora, seed, new_tokens)
        self.graphs: CudaGraphs | None = None
        kept = not (activation_checkpointing or offload_activations)
        fast = fast and device.type == "cuda" and fast_layers.install_or_say(self.model, model, lora, dtype)
        if fast and kept and replayable(self.model, data):
            trained = lora_layers.adapter_parameters(self.model)
            self.graphs = CudaGraphs(self._replayed_states, trained, usable_bytes(device, vram_gib))
        self.activation_offload = activation_offload.ActivationOffload(self.model, device, offload_activations)
        self.fallbacks = fallbacks.gpu_fallbacks(
            self.model, model, activation_checkpointing, self.activation_offload, device
        )
        if lora.start_from:
            lora_layers.load_state(self.model, read_start(self.model, lora.start_from), lora.start_from)
        self.generator = TextGenerator(self.chat.tokenizer, self.chat.stop_ids(), device, self.dtype)
        self.base_answers: dict[tuple[str, int], str] = {}
        self._refuse_leaks()

    def steps(self, *, effective: int, start: int) -> Iterator[Sequence[Draw]]:
        """The packs of each step as (rows, epoch)."""
        lengths = self.rows.lengths[self.training]
        data = self.data
        planned = packing.steps(
            lengths, length=data.length, effective=effective, seed=self.seed, start=start, pack=data.packing
        )
        for step in planned:
            yield [(tuple(int(self.training[index]) for index in pack), epoch) for pack, epoch in step]

    def split(self, draws: Sequence[Draw], micro_batch: int) -> Sequence[Sequence[Draw]]:
        """Micro-batches in the order of the plan: all packs have one length."""
        return [draws[first : first + micro_batch] for first in range(0, len(draws), micro_batch)]

    def worst(self, micro_batch: int) -> Sequence[Draw]:
        """The pack of the first ones with most trained tokens, over and over; without packing the longest row."""
        if self.data.packing:
            first = next(iter(self.steps(effective=PACKS_SEEN, start=0)))
            return [max(first, key=lambda draw: self.collate([draw]).items)] * micro_batch
        longest = self.training[int(self.rows.lengths[self.training].argmax())]
        return [((int(longest),), 0)] * micro_batch

    def collate(self, draws: Sequence[Draw]) -> Batch:
        """Packs of the rows that each draw names."""
        return self._batch([pack for pack, _ in draws])

    def loss(self, batch: Batch) -> Tensor:
        """Sum over trained tokens of the cross entropy, in fp32."""
        tensors = batch.tensors
        with self.activation_offload():
            if self.graphs and torch.is_grad_enabled():
                hidden_BLD = self.graphs({name: tensors[name] for name in ("ids", "positions", "borders")})
            else:
                hidden_BLD = causal_lm.packed_hidden_states(
                    self.model, tensors["ids"], tensors["positions"], tensors["segments"]
                )
            states_ND = hidden_BLD.flatten(0, 1)[tensors["places"]]
            return summed_cross_entropy(states_ND, causal_lm.head(self.model), tensors["targets"])

    @torch.no_grad()
    def validate(self, micro_batch: int) -> dict[str, float]:
        """Mean cross entropy a trained token of the held-out rows, and its exponential."""
        if self.graphs:
            self.graphs.make_room()
        training = self.model.training
        self.model.eval()
        lengths, length = self.rows.lengths[self.validation], self.data.length
        packs = packing.plan(lengths, length=length, seed=0, epoch=0, pack=self.data.packing)
        named = [tuple(int(self.validation[index]) for index in pack) for pack in packs]
        total, items = 0.0, 0
        for first in range(0, len(named), micro_batch):
            batch = self._batch(named[first : first + micro_batch])
            total += self._measured(batch)
            items += batch.items
        self.model.train(training)
        mean = total / items
        return {"mean": mean, "perplexity": math.exp(min(mean, 700.0))}

    def sample(self, prompts: Sequence[str], seed: int) -> list[Any]:
        """Per prompt a Markdown text: what the base answers, and what the model as it is now answers."""
        if self.graphs:
            self.graphs.make_room()
        jobs = [(prompt, seed) for prompt in prompts]
        if not all(job in self.base_answers for job in jobs):
            with lora_layers.disabled(self.model):
                self.base_answers |= dict(zip(jobs, self._answers(jobs), strict=True))
        return [
            f"**base**: {self.base_answers[job]}\n\n**tuned**: {tuned}"
            for job, tuned in zip(jobs, self._answers(jobs), strict=True)
        ]

    def reduce_memory(self) -> str | None:
        """Recompute every block, then keep what they need, and then all of them, in CPU memory."""
        self.graphs = None  # what follows changes what is computed
        return next(self.fallbacks, None)

    def notes(self) -> dict[str, str]:
        """One real row with its trained tokens in ⟦ ⟧, so that a wrong mask is seen at once."""
        row = preview_row(self.chat.tokenizer, self.rows[int(self.training[0])])
        return {"trained tokens": "\n".join("    " + line for line in row.splitlines())}

    def _replayed_states(self, ids: Tensor, positions: Tensor, borders: Tensor) -> Tensor:
        """`packed_hidden_states` with nothing of it from the host."""
        return causal_lm.hidden_states(self.model, ids, positions, varlen_attention.attention_kwargs(ids, borders))

    def _answers(self, jobs: Sequence[tuple[str, int]]) -> list[str]:
        sample = self.sample_settings
        requested = [(self.chat.prompt_ids(prompt), seed) for prompt, seed in jobs]
        return self.generator.generate(
            self.model, requested, max_new_tokens=sample.max_new_tokens, temperature=sample.temperature
        )

    def _batch(self, packs: Sequence[tuple[int, ...]], length: int | None = None) -> Batch:
        """length: token positions of each pack; the recipe's unless given."""
        if length is None:
            packed = self.data.packing
            length = self.data.length if packed else max(self._together(pack) for pack in packs)
        built = [packing.build(self.rows.__getitem__, pack, length=length) for pack in packs]
        ids_BL, positions_BL, segments_BL, trained_BL = (
            np.stack([getattr(pack, name) for pack in built]) for name in ("ids", "positions", "segments", "trained")
        )
        rows_N, slots_N = trained_BL[:, 1:].nonzero()  # here: a mask on the GPU would have the host wait for it
        arrays = {
            "ids": ids_BL,
            "positions": positions_BL,
            "segments": segments_BL,
            "places": rows_N * ids_BL.shape[1] + slots_N,  # of the states that foretell a trained token
            "targets": ids_BL[rows_N, slots_N + 1],
        }
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self.graphs:
            tensors["borders"] = varlen_attention.padded(varlen_attention.cu_seqlens(tensors["segments"]))
        names = tuple(
            f"conversations {', '.join(str(self.rows.conversation_index(index) + 1) for index in pack)}"
            for pack in packs
        )
        return Batch(
            tensors,
            items=int(trained_BL.sum()),
            names=names,
            count=sum(pack.tokens for pack in built),
            padded_count=tensors["ids"].numel(),
            cpu_tensors=frozenset({"segments"}),
        )

    def _together(self, rows: Sequence[int]) -> int:
        """Slots of a pack that holds these rows and little more."""
        needed = sum(int(self.rows.lengths[row]) for row in rows)
        return min(self.data.length, -(-needed // ROUND_TO) * ROUND_TO)

    def _measured(self, batch: Batch) -> float:
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32):
            return float(self.loss(batch.to(self.device)))

    @torch.no_grad()
    def _refuse_leaks(self) -> None:
        """Compare a pack of real rows with the same rows one by one. Raises ModelError where they see one another."""
        data = self.data
        if not data.packing:
            return
        first = next(iter(self.steps(effective=1, start=0)))[0][0][:LEAK_ROWS]
        self.model.eval()
        packed = self._measured(self._batch([first], length=self._together(first)))
        alone = sum(self._measured(self._batch([(index,)], length=self._together([index]))) for index in first)
        self.model.train()
        if not abs(packed - alone) <= LEAK_TOLERANCE * abs(alone):
            raise ModelError(
                f"{self.base}: a pack of {len(first)} conversations has loss {packed:.4f}, the same ones "
                f"one by one {alone:.4f}: its attention mixes them; try data.packing=false"
            )


def replayable(model: nn.Module, data: DataConfig) -> bool:
    """Whether the passes of a model with fast layers may be replayed as CUDA graphs where all activations are kept."""
    return data.packing and varlen_attention.is_enabled(model)  # rows of many lengths alone would be as many graphs


def inject(loaded: nn.Module, model: ModelConfig, lora: LoraConfig, seed: int, new_tokens: Sequence[int]) -> nn.Module:
    """The base with adapters at their start. new_tokens: ids of `model.added_tokens`."""
    targets = model.lora_targets[lora.targets]
    return lora_layers.inject(loaded, lora, targets, seed=seed, new_token_rows=new_tokens)


def read_start(model: nn.Module, source: str) -> dict[str, Tensor]:
    """The adapter to start from, as the one that is injected into `model`. Raises ModelError if it doesn't fit."""
    stored = formats.read_peft(formats.peft_folder(Path(source)))
    return lora_layers.as_start(model, stored.weights, stored.scales, source)


def check_length(length: int, base: str, model: Any) -> None:
    """Raises ConfigError for rows of more tokens than the model reads."""
    most = causal_lm.most_tokens(model)
    if most is not None and length > most:
        raise ConfigError(f"data.length={length} is more than {base} reads ({most} tokens); try data.length={most}")
