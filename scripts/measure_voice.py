"""Measure what a voice recipe on the embedded language model does, with a reader that goes by words alone.

python scripts/measure_voice.py RUN_DIR [--questions 300]: asks what neither the base nor the recipe ever met, base and
tuned, and prints the shares of answers in the pirate's voice and with the right facts, and the perplexity of the right
answers in that voice.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetune.config.schema import ModelConfig
from finetune.language.causal_lm import load_model, load_tokenizer
from finetune.language.export import load
from scripts.embedded.language_evaluate import answer, answer_figures, perplexity
from scripts.toytalk.compose import held_out_questions
from scripts.toytalk.voice import pirate

FIRST_SEED = 97_000_000  # questions that no training and no other measurement asks
BASE = "embedded:language"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--questions", type=int, default=300)
    given = parser.parse_args()
    print(json.dumps(measure(given.run_dir / "adapter" / "peft", questions=given.questions), indent=2))


def measure(adapter: Path, *, questions: int) -> dict[str, dict[str, float]]:
    """For base and tuned: shares of answers in the voice and with the right facts, perplexity of the right ones."""
    requested = held_out_questions(questions, FIRST_SEED)
    wanted = [pirate(question.turn.answer) for question in requested]
    tokenizer = load_tokenizer(BASE)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures = {}
    model: Any = load_model(ModelConfig(kind="language", base=BASE), torch.float32, device)
    for name in ("base", "tuned"):
        if name == "tuned":
            model = load(model, adapter)
        found = answer_figures(
            requested, answer(model, tokenizer, [question.messages for question in requested], batch=32)
        )
        figures[name] = {
            "voice": found["pirate"],
            "fact": found["fact"],
            "perplexity": perplexity(model, tokenizer, requested, wanted),
        }
    return figures


if __name__ == "__main__":
    main()
