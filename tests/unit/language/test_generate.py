"""Answers: the same alone and in a batch, drawn with the right chances, ended where answers end."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from finetune.config.schema import ModelConfig
from finetune.data.text.tokens import Chat
from finetune.errors import ModelError
from finetune.language import causal_lm
from finetune.language.generate import GumbelNoise, TextGenerator
from tests import chat_templates as templates
from tests.tiny_language_models import save_language

pytestmark = pytest.mark.sampled
CPU = torch.device("cpu")
PROMPTS = ["hi!", "What is the colour of the sky?", "One two three four five six.", "a", "Answer like a pirate. Hello"]


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(templates.tokenizer(templates.CHATML))


@pytest.fixture(scope="module")
def model(chat: Chat) -> Any:
    """Sharp enough that rounding decides nothing, with settings that would spoil greedy answers."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(chat.tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.5,
        use_cache=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = LlamaForCausalLM(config)
    made.generation_config = GenerationConfig(
        do_sample=True, temperature=0.5, top_p=0.5, repetition_penalty=5.0, eos_token_id=3, max_length=4
    )
    return made.eval()


@pytest.fixture(scope="module")
def generator(chat: Chat) -> TextGenerator:
    return TextGenerator(chat.tokenizer, chat.stop_ids(), CPU, torch.float32)


def by(chat: Chat, batch_size: int) -> TextGenerator:
    made = TextGenerator(chat.tokenizer, chat.stop_ids(), CPU, torch.float32)
    made.adaptive_batch.batch_size = batch_size
    return made


def jobs(chat: Chat, *, seeds: tuple[int, ...] = (0,)) -> list[tuple[list[int], int]]:
    return [(chat.prompt_ids(prompt), seed) for prompt in PROMPTS for seed in seeds]


def test_greedy_answers_are_the_likeliest_tokens_one_after_another(
    chat: Chat, model: Any, generator: TextGenerator
) -> None:
    written = generator.generate(model, jobs(chat), max_new_tokens=12, temperature=0.0)
    for (ids, _), text in zip(jobs(chat), written, strict=True):
        read = list(ids)
        for _ in range(12):
            with torch.no_grad():
                read.append(int(model(torch.tensor([read])).logits[0, -1].argmax()))
            if read[-1] in chat.stop_ids():
                read.pop()
                break
        assert text == chat.tokenizer.decode(read[len(ids) :], skip_special_tokens=True).strip()
    assert len(set(written)) > 1


@pytest.mark.parametrize("temperature", [0.0, 0.7, 3.0])
def test_the_batch_does_not_show_in_the_answers(chat: Chat, model: Any, temperature: float) -> None:
    requested = jobs(chat, seeds=(0, 1))
    whole, few, alone = (
        by(chat, batch).generate(model, requested, max_new_tokens=12, temperature=temperature) for batch in (10, 3, 1)
    )
    assert whole == few == alone
    backwards = by(chat, 4).generate(model, requested[::-1], max_new_tokens=12, temperature=temperature)
    assert backwards[::-1] == whole


def test_a_small_gpu_writes_fewer_at_once(
    chat: Chat, model: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    requested = jobs(chat, seeds=(0, 1))
    whole = by(chat, len(requested)).generate(model, requested, max_new_tokens=12, temperature=0.7)
    generate = model.generate

    def limited(ids_BL: Any, **options: Any) -> Any:
        if len(ids_BL) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(ids_BL, **options)

    monkeypatch.setattr(model, "generate", limited)
    small = by(chat, 8)
    assert small.generate(model, requested, max_new_tokens=12, temperature=0.7) == whole
    assert "too small for 4 at once" in capfd.readouterr().err.splitlines()[-1]
    assert small.adaptive_batch.batch_size == 2


@pytest.mark.parametrize("architecture", ["qwen3", "mistral_sliding", "gemma2", "gemma3", "glm4", "granite", "cohere"])
def test_no_architecture_minds_the_batch(tmp_path: Path, architecture: str) -> None:
    config = ModelConfig(kind="language", base=str(save_language(tmp_path, architecture)))
    chat = Chat(causal_lm.load_tokenizer(config.base))
    base = causal_lm.load_model(config, torch.float32, CPU)
    together, alone = (by(chat, b).generate(base, jobs(chat), max_new_tokens=9, temperature=0.5) for b in (8, 1))
    assert together == alone
    assert len(set(alone)) == len(PROMPTS)


def test_seed_and_prompt_decide_what_is_drawn(chat: Chat, model: Any, generator: TextGenerator) -> None:
    ids, other = chat.prompt_ids("hi!"), chat.prompt_ids("a")

    def drawn(*requested: tuple[list[int], int]) -> list[str]:
        return generator.generate(model, requested, max_new_tokens=12, temperature=3.0)

    torch.manual_seed(1)
    first = drawn((ids, 0), (ids, 1), (ids, 0))
    torch.manual_seed(2)
    assert first == drawn((ids, 0), (ids, 1), (ids, 0)), "no global stream is read"
    assert first[0] == first[2] != first[1]
    noise = [GumbelNoise([(prompt, 0)], 1.0)(torch.zeros(1, 1), torch.zeros(1, 50)) for prompt in (ids, other)]
    assert not torch.equal(*noise)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_with_the_chances_of_the_scores(temperature: float) -> None:
    scores_V = torch.tensor([0.0, 1.0, 2.0, -1.0, -math.inf])
    count = 4000
    noise = GumbelNoise([([1], seed) for seed in range(count)], temperature)
    drawn_BV = noise(torch.zeros(count, 1), scores_V.expand(count, -1))
    shares = torch.bincount(drawn_BV.argmax(-1), minlength=5) / count
    chances = torch.softmax(scores_V / temperature, -1)
    assert shares[-1] == 0
    assert torch.all((shares - chances).abs() <= 4 * (chances * (1 - chances) / count).sqrt())


def test_an_answer_stops_at_any_of_its_ends_and_shows_none(chat: Chat, model: Any) -> None:
    requested = jobs(chat)
    free = TextGenerator(chat.tokenizer, chat.stop_ids(), CPU, torch.float32)
    whole = free.generate(model, requested, max_new_tokens=12, temperature=0.0)
    longest = max(whole, key=len)
    ids = chat.tokenizer(longest, add_special_tokens=False)["input_ids"]
    stopped = TextGenerator(chat.tokenizer, [*chat.stop_ids(), ids[2]], CPU, torch.float32)
    texts = stopped.generate(model, requested, max_new_tokens=12, temperature=0.0)
    text = texts[whole.index(longest)]
    assert longest.startswith(text)
    assert len(text) < len(longest)
    assert not any(token in text for text in whole for token in ("<|im_end|>", "</s>", "<|im_start|>"))


def test_the_model_is_left_as_it_came(chat: Chat, model: Any, generator: TextGenerator) -> None:
    settings, weights = model.generation_config, {name: value.clone() for name, value in model.state_dict().items()}
    for training in (True, False):
        model.train(training)
        generator.generate(model, jobs(chat), max_new_tokens=2, temperature=1.0)
        assert model.training is training
        assert model.generation_config is settings
        assert model.config.use_cache is False
        assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
        assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
def test_dropout_and_checkpointing_are_off_while_writing(chat: Chat, model: Any, generator: TextGenerator) -> None:
    before = generator.generate(model, jobs(chat), max_new_tokens=6, temperature=0.0)
    dropping = nn.Dropout(0.5)
    handle = model.model.layers[0].mlp.register_forward_hook(lambda _, __, output: dropping(output))
    model.model.layers[0].mlp.dropping = dropping  # so that the mode reaches it
    model.gradient_checkpointing_enable()
    try:
        assert generator.generate(model.train(), jobs(chat), max_new_tokens=6, temperature=0.0) == before
        assert dropping.training
    finally:
        handle.remove()
        model.gradient_checkpointing_disable()
        del model.model.layers[0].mlp.dropping
        model.eval()


def test_sixteen_bit_arithmetic_writes_too(chat: Chat, model: Any) -> None:
    half = TextGenerator(chat.tokenizer, chat.stop_ids(), CPU, torch.bfloat16)
    assert len(half.generate(model, jobs(chat), max_new_tokens=3, temperature=0.5)) == len(PROMPTS)


def test_a_prompt_without_room_for_an_answer_is_refused(chat: Chat, model: Any, generator: TextGenerator) -> None:
    prompt = [(chat.prompt_ids("hi! " * 10), 0)]
    room = 128 - len(prompt[0][0])
    assert generator.generate(model, prompt, max_new_tokens=room, temperature=0.0)
    with pytest.raises(ModelError, match=rf"more than the 128 tokens that the base reads; .*max_new_tokens={room} or"):
        generator.generate(model, prompt, max_new_tokens=room + 1, temperature=0.0)
    assert generator.generate(model, [], max_new_tokens=1, temperature=0.0) == []
