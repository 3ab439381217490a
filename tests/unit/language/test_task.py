"""What is trained on, that packs don't leak, and what is shown meanwhile."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune import kinds
from finetune.adapters import lora
from finetune.config.schema import Config
from finetune.errors import ConfigError, DataError, ModelError
from finetune.language import causal_lm, tokenize
from finetune.language.task import LanguageTask
from finetune.run.records import TextSet

CPU = torch.device("cpu")


def build(config: Config, dataset: TextSet | None = None) -> LanguageTask:
    task = kinds.of(config).build_task(config, dataset or tokenize.build(config, None), CPU)
    assert isinstance(task, LanguageTask)
    return task


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_is_that_of_the_assistants_tokens_alone(language_config: Config, packing: bool) -> None:
    """Against the library's own model, conversation by conversation, with labels made by hand."""
    language_config.data.packing = packing
    task = build(language_config)
    draws = next(iter(task.steps(effective=3, start=0)))
    batch = task.collate(draws)
    loss = float(task.loss(batch).detach())

    model = AutoModelForCausalLM.from_pretrained(language_config.model.base)
    tokenizer = AutoTokenizer.from_pretrained(language_config.model.base)
    expected, items = 0.0, 0
    for rows, _ in draws:
        for row in rows:
            encoded = task.rows[row]
            text = tokenizer.decode(encoded.ids[encoded.trained].tolist())
            assert "matey" in text
            assert "How many" not in text
            ids = torch.tensor(encoded.ids.astype(int))
            trained = torch.from_numpy(encoded.trained)
            logits = model(ids[None]).logits[0, :-1]
            loss_1 = functional.cross_entropy(logits[trained[1:]], ids[1:][trained[1:]], reduction="sum")
            expected += float(loss_1.detach())
            items += int(trained.sum())
    assert loss == pytest.approx(expected, rel=1e-4)
    assert batch.items == items
    assert batch.count == sum(int(task.rows.lengths[row]) for rows, _ in draws for row in rows)


def test_a_pack_holds_several_conversations_and_padding_is_counted(language_config: Config) -> None:
    batch = build(language_config).collate(next(iter(build(language_config).steps(effective=2, start=0))))
    assert all(name.count(",") >= 1 for name in batch.names)
    assert batch.items < batch.count < batch.padded_count == 2 * language_config.data.length


def test_attention_across_conversations_is_refused(language_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = causal_lm.packed_hidden_states

    def mixing(model: nn.Module, ids_BL: Tensor, positions_BL: Tensor, segments_BL: Tensor | None) -> Tensor:
        proving = ids_BL.shape[1] < 8  # the two rows by which a model is refused when it is loaded
        return hidden(model, ids_BL, positions_BL, segments_BL if proving else None)

    monkeypatch.setattr(causal_lm, "packed_hidden_states", mixing)
    with pytest.raises(ModelError, match=r"data.packing=false"):
        build(language_config)
    language_config.data.packing = False
    build(language_config)


def test_validation_is_per_trained_token_and_has_a_perplexity(language_config: Config) -> None:
    task = build(language_config)
    found = task.validate(2)
    assert found["perplexity"] == pytest.approx(math.exp(found["mean"]))
    assert task.validate(1) == pytest.approx(found, rel=1e-5)
    held_out = {int(row) for row in task.validation}
    assert held_out
    assert not held_out & {row for rows, _ in next(iter(task.steps(effective=50, start=0))) for row in rows}


def test_previews_show_base_beside_tuned_and_the_base_stays(language_config: Config) -> None:
    task = build(language_config)
    before = task.sample(["How many cats?"], 0)[0]
    base, tuned = before.split("\n\n")
    assert base.removeprefix("**base**: ") == tuned.removeprefix("**tuned**: ")
    with torch.no_grad():
        for name, weight in lora.trainable_tensors(task.model).items():
            if "lora_B" in name:
                weight.add_(0.5)
    after = task.sample(["How many cats?"], 0)[0]
    assert after.split("\n\n")[0] == base
    assert after.split("\n\n")[1] != tuned


def test_one_row_is_shown_with_its_trained_tokens_marked(language_config: Config) -> None:
    text = build(language_config).notes()["trained tokens"]
    assert "⟦" in text
    assert "matey" in text.partition("⟦")[2]
    assert "How many" in text.partition("⟦")[0]


def test_rows_to_validate_on_are_chosen_by_content_and_not_by_order(
    language_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.language.task.VALIDATION_ROWS", 4)
    language_config.data.validation_share = 0.5
    file = Path(language_config.data.file)
    lines = file.read_text().splitlines()
    validated = []
    for order in (lines, lines[::-1]):
        file.write_text("\n".join(order))
        task = build(language_config)
        _, held_out = task.rows.split(0.5)
        assert len(held_out) > 4
        validated.append({tuple(task.rows[int(row)].ids.tolist()) for row in task.validation})
    assert validated[0] == validated[1]
    assert len(validated[0]) == 4


def test_prompts_that_cannot_be_answered_are_refused_before_training(language_config: Config) -> None:
    language_config.sample.prompts = ["Hello", "a\ud83d"]
    with pytest.raises(DataError, match=r"sample.prompts: .* has half a character"):
        build(language_config)


def test_rows_longer_than_the_model_reads_are_refused(language_config: Config) -> None:
    language_config.data.length = 100_000
    with pytest.raises(ConfigError, match=r"data.length=100000 .*data.length=256"):
        build(language_config)


def test_the_data_set_says_what_became_of_the_rows(language_config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(language_config.data.file)
    file.write_text(file.read_text() + file.read_text().splitlines()[0] + "\n")
    record = tokenize.build(language_config, None)
    said = capsys.readouterr().err
    assert record.train + record.validation == 41
    assert record.validation > 0
    assert 0 < record.trained_share < record.fill_share <= 1
    assert "messages (recognised)" in said
    assert "more than once: 1 conversation" in said
    assert f"{record.packs} packs" in said
    assert tokenize.complete(record)
    next(Path(record.rows).glob("tokens.bin")).write_bytes(b"cut")
    assert not tokenize.complete(record)
    with pytest.raises(DataError, match=r"damaged or gone"):
        build(language_config, record)


def test_what_decides_the_data_set_changes_its_hash(language_config: Config) -> None:
    before, record = tokenize.inputs(language_config, None), tokenize.build(language_config, None)
    language_config.data.validation_share = 0.3
    assert tokenize.inputs(language_config, None) != before
    assert tokenize.build(language_config, None).content != record.content


def test_new_tokens_train_their_own_rows_alone(language_config: Config) -> None:
    language_config.model.added_tokens = ["<|ship|>"]
    file = Path(language_config.data.file)
    file.write_text(file.read_text().replace("matey", "matey<|ship|>"))
    task = build(language_config)
    before = {name: weight.clone() for name, weight in lora.trainable_tensors(task.model).items()}
    rows = [name for name in before if "trainable_tokens" in name]
    assert rows
    assert all(before[name].shape[0] == 1 for name in rows)
    task.loss(task.collate(next(iter(task.steps(effective=2, start=0))))).backward()
    trained = {name for name, weight in task.model.named_parameters() if weight.requires_grad}
    for name, weight in task.model.named_parameters():
        assert (weight.grad is not None) == (name in trained)
