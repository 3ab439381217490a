"""Beginnings that prompts share are read once, and what follows is as if they were not."""

from typing import Any

import pytest
import torch

from finetune.config.schema import ModelConfig
from finetune.language import causal_lm
from finetune.serving.batch import CachedBatch
from finetune.serving.prefixes import LEAST_TOKENS, Prefixes
from finetune.serving.requests import BASE
from finetune.serving.router import Router
from tests.tiny_language_models import save_language

CPU, FP32 = torch.device("cpu"), torch.float32
SYSTEM = [4 + index % 90 for index in range(LEAST_TOKENS + 8)]
PROMPTS = [[*SYSTEM, 9, 7], [*SYSTEM, 5, 6, 8, 11], [5, 6], [*SYSTEM, 10], [*SYSTEM, 9, 7]]
STEPS = 3


@pytest.fixture(scope="module", params=["llama", "gemma2", "mistral_sliding"])
def router(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Router:
    from peft import LoraConfig as PeftLoraConfig
    from peft import inject_adapter_in_model

    folder = save_language(tmp_path_factory.mktemp("base"), request.param)
    made = causal_lm.load_model(ModelConfig(kind="language", base=str(folder)), FP32, CPU)
    for seed, key in enumerate(("one", "two")):
        torch.manual_seed(seed)
        lora = PeftLoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        inject_adapter_in_model(lora, made, adapter_name=key)
    found = Router(made)
    found.watch()
    return found


class Counted(CachedBatch):
    """Notes how many tokens it reads."""

    read = 0

    def _forward(self, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        self.read += ids.numel()
        return super()._forward(ids, *rest)


def batch(router: Router, most_tokens: int) -> Counted:
    return Counted(router.model, router, CPU, FP32, most_tokens)


@torch.no_grad()
def written(made: Counted, adapters: list[str]) -> torch.Tensor:
    """Logits of all prompts, which join by ones and twos while others write."""
    made.keep([])
    found, rows = [made.join(PROMPTS[:1], adapters[:1])], 1
    for first in (1, 3):
        found.append(made.join(PROMPTS[first : first + 2], adapters[first : first + 2]))
        rows += 2
        found += [made.step([7 + step] * rows) for step in range(STEPS)]
    return torch.cat(found)


def test_a_shared_beginning_changes_no_logits(router: Router) -> None:
    adapters = ["one", "one", BASE, "two", "one"]
    without, kept = batch(router, 0), batch(router, 1000)
    expected = written(without, adapters)
    for _ in range(3):  # nothing is kept at first, then for one of the adapters, then for both
        torch.testing.assert_close(written(kept, adapters), expected, rtol=1e-3, atol=1e-3)
    assert kept.read < 0.7 * 3 * without.read
    found = kept.prefixes.longest("two", PROMPTS[0])
    assert found
    assert found.ids == tuple(SYSTEM)
    assert kept.prefixes.longest("another", PROMPTS[0]) is None, "the same words of another adapter"
    assert kept.prefixes.longest("two", SYSTEM) is None, "a token must be left to read"
    kept.forget()
    assert kept.prefixes.longest("two", PROMPTS[0]) is None
    torch.testing.assert_close(written(kept, adapters), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_no_more_is_kept_than_may_be(router: Router) -> None:
    made = batch(router, 2 * len(SYSTEM) + 10)
    for shift in range(4):
        beginning = [token + shift for token in SYSTEM]
        for last in (3, 4):
            made.join([[*beginning, last]], [BASE])
            made.keep([])
    kept = [made.prefixes.longest(BASE, [*(token + shift for token in SYSTEM), 3]) for shift in range(4)]
    assert [prefix is not None for prefix in kept] == [False, False, True, True]
    small = Prefixes(LEAST_TOKENS - 1)
    assert small.longest(BASE, SYSTEM) is None
