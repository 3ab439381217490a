"""The language recipe, run once as a user types it, and everything that it leaves behind."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.run.receipts import load_record
from finetune.run.records import Adapter, Answers, Report, Run, TextSet
from tests.conftest import ROOT, Answer
from tests.end_to_end import command
from tests.end_to_end.command import Finished

pytestmark = pytest.mark.exhaustive  # of the two recipes the other is the README's first command
QUESTIONS = 80
STEPS = "trainer.steps=120"  # of 200: the last ones refine what is checked here with room to spare


@dataclass(frozen=True)
class Talk:
    """The command in a folder of its own that holds the example conversations and nothing else."""

    work: Path
    ended: Finished

    @property
    def run_dir(self) -> Path:
        return self.work / "outputs" / "pirate_chat"

    def record(self, stage: str, kind: type[Any]) -> Any:
        return load_record(self.run_dir, stage, kind)


@pytest.fixture(scope="session")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Talk:
    work = tmp_path_factory.mktemp("talk")
    data = Path("datasets", "pirate_chat", "conversations.jsonl")
    (work / data).parent.mkdir(parents=True)
    shutil.copy(ROOT / data, work / data)
    return Talk(work, command.run("train", "conf=pirate_chat", STEPS, cwd=work))


def test_it_ends_well_within_its_means(talk: Talk) -> None:
    assert talk.ended.code == 0, talk.ended.err
    for word in ("Traceback", "error", "warning", "Failed"):
        assert word not in talk.ended.err
    assert talk.ended.peak_gib < 3
    assert talk.ended.cpu_s < 360
    assert {path.name for path in talk.work.iterdir()} == {"datasets", "outputs"}


def test_the_table_fits_eighty_columns_and_counts_tokens(talk: Talk) -> None:
    table = talk.ended.out.partition("\nnext\n")[0]
    assert max(map(len, table.splitlines())) <= 80
    assert re.search(r"[\d,.]+ tokens/s", table)
    assert "answers" in table
    assert "images" not in talk.ended.out + talk.ended.err
    assert "image" not in talk.ended.out + talk.ended.err


def test_every_stage_leaves_its_record(talk: Talk) -> None:
    texts, run = talk.record("dataset", TextSet), talk.record("train", Run)
    assert texts.train + texts.validation == 200
    assert texts.validation > 0
    assert texts.truncated_share == 0.0
    assert texts.fill_share > 0.9
    assert run.unit == "tokens"
    assert run.best_validation < 0.5 * run.first_validation
    differences = talk.record("export", Adapter).differences
    assert differences["peft"] <= 1e-5
    assert differences["merged"] < 1e-3
    assert Path(talk.work / talk.record("report", Report).file).is_file()


def test_the_adapter_and_the_merged_model_come_with_what_a_server_needs(talk: Talk) -> None:
    adapter = talk.run_dir / "adapter"
    assert (adapter / "peft" / "adapter_model.safetensors").is_file()
    assert len(json.loads((adapter / "peft" / "chat_template.json").read_text())["sha256"]) == 64
    tokenizer = AutoTokenizer.from_pretrained(adapter / "merged")
    model = AutoModelForCausalLM.from_pretrained(adapter / "merged")
    question = [{"role": "user", "content": "There are two red boats on a beach. What colour are the boats?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = tokenizer.decode(model.generate(**ids, max_new_tokens=30)[0, ids["input_ids"].shape[1] :])
    assert "red" in answer
    models = json.loads((adapter / "comparison.json").read_text())["models"]
    assert models["merged"]["divergence"] < 0.01 < models["base"]["divergence"]


def test_answers_stand_beside_one_another(talk: Talk) -> None:
    answers = talk.record("sample", Answers)
    assert all(item.base and item.tuned and item.base != item.tuned for item in answers.items)
    page = (talk.run_dir / "samples" / "answers.md").read_text()
    assert all(f"## {item.prompt}" in page for item in answers.items)


def test_curves_answers_and_a_marked_row_are_in_tensorboard(talk: Talk) -> None:
    events = EventAccumulator(
        str(talk.run_dir / "tensorboard" / talk.run_dir.name), size_guidance={"tensors": 0, "scalars": 0}
    ).Reload()
    for tag in ("loss/step", "validation/mean", "validation/perplexity", "train/tokens_per_s", "train/padding"):
        assert events.Scalars(tag), tag
    marked = events.Tensors("trained tokens/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "⟦" in marked
    shown = [tag for tag in events.Tags()["tensors"] if tag.startswith("samples/0")]
    run = talk.record("train", Run)
    assert [event.step for event in events.Tensors(shown[0])] == [0, run.steps]


def test_the_same_command_again_skips_what_is_up_to_date(
    talk: Talk, finetune_cli: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(talk.work)
    again = finetune_cli("train", "conf=pirate_chat", STEPS)
    assert again.code == 0, again.err
    for stage in ("dataset", "train", "export", "sample"):
        assert f"{stage}: up to date, skipped" in again.err


def test_only_images_are_captioned(finetune_cli: Callable[..., Answer]) -> None:
    ended = finetune_cli("caption", "conf=pirate_chat")
    assert ended.code == 2
    (line,) = ended.errors
    assert line.startswith("error: ")
    assert "only images have captions" in line


@pytest.fixture(scope="session")
def figures(talk: Talk) -> dict[str, dict[str, float]]:
    """Answers to questions that neither base nor recipe ever met."""
    return dict(json.loads(command.script("measure_voice.py", str(talk.run_dir), "--questions", str(QUESTIONS))))


def test_the_adapter_has_the_voice_and_keeps_the_facts(figures: dict[str, dict[str, float]]) -> None:
    assert figures["base"]["voice"] == 0.0
    assert figures["tuned"]["voice"] >= 0.95, figures
    # The base has 0.99, the whole recipe reaches 0.965:
    assert figures["tuned"]["fact"] >= 0.90, figures
    assert figures["tuned"]["perplexity"] <= 0.5 * figures["base"]["perplexity"]
