"""Replies that are written in one batch, each with an adapter of another sort, are those of PEFT's own `generate`."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config.schema import ModelConfig, Quantize
from finetune.data.text.tokens import Chat
from finetune.errors import ModelError
from finetune.language import causal_lm
from finetune.serving.language import LanguageServer
from finetune.serving.requests import BASE, TextRequest
from tests.tiny_language_models import save_language

CPU, FP32 = torch.device("cpu"), torch.float32
TARGETS = ["q_proj", "down_proj"]
WORDS = {"use_dora": True, "target_modules": ["embed_tokens", "o_proj"]}
IDS, WRITTEN = (5, 9, 6, 7), 6
SORTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "dora_rslora": {"use_dora": True, "use_rslora": True, "r": 4},
    "ranks": {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"down_proj": 40}, "use_rslora": True},
    "bias": {"lora_bias": True},
    "head": {"modules_to_save": ["lm_head"]},
    "rows": {"trainable_token_indices": {"embed_tokens": [6, 9]}, "target_modules": ["k_proj"]},
}


def save(folder: Path, model: ModelConfig, **settings: Any) -> Path:
    """An adapter that changes everything it can by a lot, written by PEFT."""
    from peft import LoraConfig, get_peft_model

    base: Any = causal_lm.load_model(model, FP32, CPU)
    made = get_peft_model(base, LoraConfig(**({"r": 2, "lora_alpha": 6, "target_modules": TARGETS} | settings)))
    random = torch.Generator().manual_seed(sum(map(ord, folder.name)))
    for parameter in made.parameters():
        if parameter.requires_grad:
            scale = parameter.std() if parameter.std() > 0 else 0.5
            parameter.data += scale * torch.randn(parameter.shape, generator=random)
    made.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def generated(model: ModelConfig, folder: Path | None) -> list[int]:
    """What PEFT writes with an adapter alone."""
    from peft import PeftModel

    base: Any = causal_lm.load_model(model, FP32, CPU)
    alone = PeftModel.from_pretrained(base, str(folder)).eval() if folder else base
    ids = torch.tensor([IDS])
    found = alone.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=WRITTEN,
        min_new_tokens=WRITTEN,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    written: list[int] = found[0, len(IDS) :].tolist()
    return written


def written_together(server: LanguageServer, keys: list[str]) -> dict[str, list[int]]:
    """The tokens of a reply for each adapter, all of them in one batch."""
    rows: dict[str, Any] = {}

    async def ask() -> None:
        for key in keys:
            rows[key] = server.engine.submit(TextRequest(IDS, key, WRITTEN, 0.0, 1.0, 0, 0, (), 60.0))
        for row in rows.values():
            async for _ in row:
                pass

    asyncio.run(ask())
    return {key: row.ids[len(IDS) :] for key, row in rows.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return ModelConfig(kind="language", base=str(save_language(tmp_path_factory.mktemp("base"))))


@pytest.fixture(scope="module")
def folders(base: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: save(root / name, base, **settings) for name, settings in (SORTS | {"words": WORDS}).items()}


def serving(model: ModelConfig) -> LanguageServer:
    made = LanguageServer(
        model, Chat(causal_lm.load_tokenizer(model.base)), CPU, FP32, vram_gib=0, most_rows=16, most_waiting=4
    )
    made.engine.ends = frozenset()  # as `generate` here, which writes so many tokens whatever they are
    return made


@pytest.fixture
def server(base: ModelConfig) -> Iterator[LanguageServer]:
    made = serving(base)
    yield made
    made.engine.close()


@pytest.mark.sampled
@pytest.mark.parametrize("order", [1, -1], ids=["plain first", "plain last"])
def test_every_sort_of_adapter_is_as_alone(
    base: ModelConfig, folders: dict[str, Path], server: LanguageServer, order: int
) -> None:
    names = list(SORTS)[::order]
    expected = {BASE: generated(base, None)} | {name: generated(base, folders[name]) for name in names}
    assert len(set(map(tuple, expected.values()))) == len(expected), "all of them differ"
    for name in names:
        server.load_adapter(folders[name], name)
    assert written_together(server, list(expected)) == expected
    for name in names[1::2]:
        server.drop_adapter(name)
        del expected[name]
    assert written_together(server, list(expected)) == expected
    server.load_adapter(folders["dora"], "dora")
    assert written_together(server, ["dora"]) == {"dora": generated(base, folders["dora"])}


def test_two_adapters_on_one_layer_are_as_alone_or_refused(
    base: ModelConfig, folders: dict[str, Path], server: LanguageServer
) -> None:
    server.load_adapter(folders["words"], "words")
    with pytest.raises(ModelError, match=r"rows replaces model\.embed_tokens, which can't be done for some"):
        server.load_adapter(folders["rows"], "rows")
    expected = {BASE: generated(base, None), "words": generated(base, folders["words"])}
    assert written_together(server, list(expected)) == expected
    server.drop_adapter("words")
    server.load_adapter(folders["head"], "head")
    with pytest.raises(ModelError, match="adapter changes lm_head, which another adapter here replaces; serve it"):
        server.router.require_routable({"target_modules": ["lm_head"]}, "adapter")


def test_dora_on_weights_of_4_bits_is_as_alone(base: ModelConfig, folders: dict[str, Path]) -> None:
    small = ModelConfig(kind="language", base=base.base, quantize=Quantize.nf4)
    server = serving(small)
    try:
        for name in ("plain", "dora"):
            server.load_adapter(folders[name], name)
        expected = {name: generated(small, folders[name]) for name in ("plain", "dora")}
        assert written_together(server, ["dora", "plain"]) == expected
    finally:
        server.engine.close()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bias": "all"}, r"changes biases of the base \(bias=all\); serve it merged"),
        ({"modules_to_save": ["model.norm"]}, r"replaces model\.norm, which can't be done for some requests alone"),
        ({"modules_to_save": ["mlp"]}, r"replaces model\.layers\.0\.mlp, which can't be done"),
        ({"target_parameters": ["mlp.down_proj.weight"]}, r"changes single parameters \(target_parameters\)"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_can_not_be_given_to_some_rows_is_refused(
    server: LanguageServer, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        server.router.require_routable(settings, "adapter")
