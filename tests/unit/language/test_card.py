"""The code on a language adapter's card loads the model that was trained, and a merged model stops where samples do."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetune
from finetune import kinds
from finetune.adapters import lora
from finetune.config.schema import Config, ExportFormat, Quantize
from finetune.language import tokenize
from finetune.language.causal_lm import load_model
from finetune.language.task import inject
from finetune.run.records import Run

RUN = Run("", "", 4, 0, 0, 1.0, 0.5, None, None, None, "tokens", 0, 0.0, 0.0, 0, "0" * 64)
CONTROL = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture
def trained(language_config: Config) -> Any:
    """Makes the trained model of the configuration, exports it, and gives it back."""

    def make(folder: Path) -> Any:
        model = load_model(language_config.model, torch.float32, torch.device("cpu"))
        tokenizer = tokenize.chat_of(language_config.model, language_config.data).tokenizer
        new = tokenizer.convert_tokens_to_ids(language_config.model.added_tokens)
        model = inject(model, language_config.model, language_config.lora, 0, new)
        random = torch.Generator().manual_seed(1)
        for weight in lora.trainable_tensors(model).values():
            weight += 0.05 * torch.randn(weight.shape, generator=random)
        folder.mkdir(parents=True)
        kinds.of(language_config).export(language_config, RUN, lora.state(model), None, folder)
        return model.eval()

    return make


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model.eval()(ids).logits.float()
    return found


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("quantize", "template", "added"),
    list(itertools.product(Quantize, ["", "chatml"], [[], CONTROL])),
)
def test_the_code_on_the_card_loads_the_trained_model(
    language_config: Config,
    trained: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    quantize: Quantize,
    template: str,
    added: list[str],
) -> None:
    config = language_config
    config.model.quantize, config.data.chat_template, config.model.added_tokens = quantize, template, added
    config.sample.prompts = ['How {many} "cats"? ☃']
    own = trained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    code = kinds.of(config).usage(config).format(base=json.dumps(config.model.base))
    names: dict[str, Any] = {}
    exec(code, names)
    chat = tokenize.chat_of(config.model, config.data)
    prompt = chat.prompt_ids(config.sample.prompts[0])
    assert names["inputs"]["input_ids"][0].tolist() == prompt
    written = names["answer"][0, len(prompt) :].tolist()
    assert capsys.readouterr().out.splitlines()
    assert len(written) == 128 or written[-1] in chat.stop_ids()
    ids = torch.tensor([prompt])
    difference = logits(names["model"], ids) - logits(own, ids)
    assert float(difference.norm() / logits(own, ids).norm()) < 1e-5


class _Speaks:
    """Makes the model write one token, and another one from the fifth on."""

    def __init__(self, prompt: int, word: int, end: int) -> None:
        self.prompt, self.word, self.end = prompt, word, end

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -1e9)
        forced[:, self.end if ids.shape[1] >= self.prompt + 4 else self.word] = 0.0
        return forced


def test_a_merged_model_stops_at_the_templates_end_token(language_config: Config, trained: Any, tmp_path: Path) -> None:
    language_config.model.added_tokens, language_config.data.chat_template = CONTROL, "chatml"
    language_config.export.formats = [ExportFormat.merged]
    trained(tmp_path / "adapter")
    chat = tokenize.chat_of(language_config.model, language_config.data)
    end = chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert chat.stop_ids() == (end, chat.tokenizer.eos_token_id)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter" / "merged")
    prompt = torch.tensor([chat.prompt_ids("Hello")])
    for stop in chat.stop_ids():
        speaks = _Speaks(prompt.shape[1], 40, stop)
        written = merged.generate(prompt, max_new_tokens=60, logits_processor=[speaks])[0, prompt.shape[1] :]
        assert written.tolist() == [40] * 4 + [stop]
    assert set(merged.generation_config.eos_token_id) == set(merged.config.eos_token_id) == set(chat.stop_ids())
    for name in ("merged", "peft"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter" / name)
        assert tokenizer.eos_token == "<|im_end|>"
        assert "<|im_start|>" in tokenizer.chat_template
        assert tokenizer.tokenize("a<|im_end|>") == ["a", "<|im_end|>"]
    assert chat.tokenizer.eos_token == "<|eot_id|>", "the run's own tokenizer stays as it is"


def test_a_merged_model_of_the_bases_own_template_keeps_its_end(
    language_config: Config, trained: Any, tmp_path: Path
) -> None:
    language_config.export.formats = [ExportFormat.merged]
    trained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(language_config.model.base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter" / "merged")
    assert merged.generation_config.eos_token_id == merged.config.eos_token_id == base.config.eos_token_id
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter" / "merged").eos_token == "<|eot_id|>"


@pytest.mark.sampled
@pytest.mark.parametrize("formats", [["merged"], ["gguf"], ["gguf", "merged"]])
def test_a_run_without_peft_among_its_formats_has_samples_and_a_card_that_runs(
    language_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, formats: list[str]
) -> None:
    language_config.export.formats = [ExportFormat[name] for name in formats]
    language_config.trainer.steps, language_config.trainer.validate_every = 1, 0
    result = finetune.train(language_config)
    assert result.adapter is not None
    assert list(result.adapter.files) == ["peft", *formats]
    assert result.samples is not None
    assert len(result.samples.items) == 1
    card = (Path(result.adapter.folder) / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(language_config.run_dir)
    assert code is not None
    exec(code.group(1), {})
