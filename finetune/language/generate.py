"""Answers written by a causal language model, many at once and each of them as if it were alone.

B answers, L tokens of the longest prompt, V tokens of the vocabulary.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import ModelError
from finetune.language import causal_lm
from finetune.memory.fallbacks import AdaptiveBatch
from finetune.run.hashing import hash_of

ANSWER_BATCH = 8


class TextGenerator:
    """Writes answers with any model of one base.

    The random numbers of an answer follow from its prompt and seed alone, whatever the model, the batch or the device.
    Where the GPU is too small it writes fewer at once.
    """

    def __init__(self, tokenizer: Any, ends: Sequence[int], device: torch.device, dtype: torch.dtype) -> None:
        """ends: ids that end an answer. dtype: of the arithmetic; anything but fp32 is autocast."""
        self.tokenizer, self.ends, self.device, self.dtype = tokenizer, tuple(ends), device, dtype
        self.adaptive_batch = AdaptiveBatch(ANSWER_BATCH, doing="writing")

    def generate(
        self,
        model: nn.Module,
        jobs: Sequence[tuple[Sequence[int], int]],
        *,
        max_new_tokens: int,
        temperature: float,
    ) -> list[str]:
        """One answer for each (ids of the prompt, seed), without control tokens and white space around it.

        temperature: 0 always takes the likeliest token. `model` is left in the mode it came in, train or eval. Raises
        ModelError for a prompt that leaves no room for an answer of `max_new_tokens`, torch.OutOfMemoryError where one
        answer is too much.
        """
        from transformers import GenerationConfig

        causal: Any = model
        self._require_room(causal, jobs, max_new_tokens)
        largest = max([self.ends[0], *(token for ids, _ in jobs for token in ids)])
        causal_lm.require_rows(causal, self.tokenizer, largest, "sample.prompts")
        training, own = causal.training, causal.generation_config
        causal.eval()
        # What isn't set is taken from the model's own settings, which may ask for penalties and top-p.
        causal.generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=list(self.ends),
            pad_token_id=self.ends[0],
        )
        try:
            return self.adaptive_batch.each(partial(self._answers, causal, temperature), jobs)
        finally:
            causal.generation_config = own
            causal.train(training)

    def _answers(self, model: Any, temperature: float, jobs: Sequence[tuple[Sequence[int], int]]) -> list[str]:
        length = max(len(ids) for ids, _ in jobs)
        ids_BL = torch.full((len(jobs), length), self.ends[0])  # masked, so any id will do
        mask_BL = torch.zeros_like(ids_BL)
        for row, (ids, _) in enumerate(jobs):  # on the left: all answers go on at the same place
            ids_BL[row, length - len(ids) :] = torch.tensor(ids)
            mask_BL[row, length - len(ids) :] = 1
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32):
            written_BL = model.generate(
                ids_BL.to(self.device),
                attention_mask=mask_BL.to(self.device),
                generation_config=model.generation_config,
                logits_processor=[GumbelNoise(jobs, temperature)] if temperature else [],
            )
        return [self._text(ids) for ids in written_BL[:, length:].tolist()]

    def _text(self, ids: Sequence[int]) -> str:
        stop = next((index for index, token in enumerate(ids) if token in self.ends), len(ids))
        text = self.tokenizer.decode(ids[:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).strip()

    def _require_room(self, model: Any, jobs: Sequence[tuple[Sequence[int], int]], max_new_tokens: int) -> None:
        most = causal_lm.most_tokens(model)
        longest = max((len(ids) for ids, _ in jobs), default=0)
        if most is not None and longest + max_new_tokens > most:
            raise ModelError(
                f"a prompt of {longest} tokens and sample.max_new_tokens={max_new_tokens} are more than the {most} "
                f"tokens that the base reads; try sample.max_new_tokens={max(1, most - longest)} or a shorter prompt"
            )


class GumbelNoise:
    """Makes the likeliest token a drawn one: argmax(scores / temperature + Gumbel noise) is a sample (arXiv 1411.0030).

    Unlike a draw from cumulated probabilities it hardly changes where the scores do: base and tuned model, or two sizes
    of a batch, part only where they disagree.
    """

    def __init__(self, jobs: Sequence[tuple[Sequence[int], int]], temperature: float) -> None:
        self.streams = [random_stream(ids, seed) for ids, seed in jobs]
        self.temperature = temperature

    def __call__(self, ids_BL: Tensor, scores_BV: Tensor) -> Tensor:
        noise_BV = torch.stack([gumbel(stream, scores_BV.shape[-1]) for stream in self.streams])
        return scores_BV.double() / self.temperature + noise_BV.to(scores_BV.device)


def random_stream(ids: Sequence[int], seed: int) -> torch.Generator:
    """The random numbers of one answer."""
    return torch.Generator().manual_seed(int(hash_of(list(ids), seed)[:15], 16))


def gumbel(stream: torch.Generator, size: int) -> Tensor:
    """So many numbers of Gumbel's distribution."""
    # fp64: of 32 bits too few are left for the rare large values that decide
    return -(-torch.rand(size, generator=stream, dtype=torch.float64).log()).log()
