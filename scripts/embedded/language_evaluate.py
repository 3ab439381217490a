"""Asks the shipped language model what it was never trained on, and writes its card.

B conversations, L tokens, V tokens of the vocabulary.
"""

import datetime
import json
import math
import platform
import random
from collections import defaultdict
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from scripts.embedded.language_settings import LanguageSettings
from scripts.embedded.language_text import IGNORED, tokenise
from scripts.toytalk.compose import EVALUATION_SEEDS, held_out_questions
from scripts.toytalk.conversation import Messages, Question
from scripts.toytalk.manners import asked_in_manner, sample_manner
from scripts.toytalk.scoring import exactly_right, fact_right
from scripts.toytalk.voice import is_pirate, pirate

BATCH = 256
SHOWN_MISTAKES = 20


def evaluate(settings: LanguageSettings) -> None:
    """Figures into the work folder and into the model card."""
    tokenizer = AutoTokenizer.from_pretrained(settings.shipped)
    model = AutoModelForCausalLM.from_pretrained(settings.shipped).to(settings.device).eval()
    questions = held_out_questions(settings.questions, EVALUATION_SEEDS)
    answers = answer(model, tokenizer, [question.messages for question in questions])
    rng = random.Random(f"toytalk manners {EVALUATION_SEEDS}")
    mannered = [asked_in_manner(question, sample_manner(rng)) for question in questions]
    in_manners = answer_figures(mannered, answer(model, tokenizer, [question.messages for question in mannered]))
    figures = answer_figures(questions, answers) | {
        "in_manners": in_manners["exact"],
        "million_parameters": round(sum(weight.numel() for weight in model.parameters()) / 1e6, 2),
        "vocabulary": len(tokenizer),
        "perplexity_plain": perplexity(model, tokenizer, questions, [asked.turn.answer for asked in questions]),
        "perplexity_pirate": perplexity(
            model, tokenizer, questions, [pirate(asked.turn.answer) for asked in questions]
        ),
        "training": json.loads(settings.checkpoint.with_suffix(".json").read_text()),
        "made": {
            "date": datetime.date.today().isoformat(),
            "hardware": torch.cuda.get_device_name()
            if settings.device.startswith("cuda")
            else f"CPU ({platform.machine()})",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    folder = settings.work / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "language.json").write_text(json.dumps(figures, indent=2) + "\n")
    (settings.shipped / "README.md").write_text(card(figures))
    wrong = [pair for pair in zip(questions, answers, strict=True) if not exactly_right(pair[0].turn, pair[1])]
    for question, said in wrong[:SHOWN_MISTAKES]:
        print(f"evaluate: wrong  {question.messages[-1]['content']!r}: {said!r}, not {question.turn.answer!r}")
    print(
        f"evaluate: {figures['exact']:.2%} of {len(questions)} held-out questions right word for word, "
        f"{figures['fact']:.2%} in their facts, {figures['in_manners']:.2%} in the manner that was described; "
        f"{figures['pirate']:.2%} like a pirate; perplexity "
        f"{figures['perplexity_plain']:.3f} plain, {figures['perplexity_pirate']:.1f} pirate",
        flush=True,
    )


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[Messages], batch: int = BATCH
) -> list[str]:
    """Greedy answers, in the order of the prompts; those of like length are answered together."""
    order = sorted(range(len(prompts)), key=lambda index: sum(len(message["content"]) for message in prompts[index]))
    answers = [""] * len(prompts)
    for first in range(0, len(order), batch):
        indices = order[first : first + batch]
        inputs = tokenizer.apply_chat_template(
            [prompts[index] for index in indices],
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        ).to(model.device)
        with torch.inference_mode():
            tokens_BL = model.generate(**inputs, do_sample=False)
        texts = tokenizer.batch_decode(tokens_BL[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(indices, texts, strict=True):
            answers[index] = text
    return answers


def answer_figures(questions: list[Question], answers: list[str]) -> dict[str, Any]:
    """Shares of answers that are right word for word, right in their facts, and in the pirate's voice."""
    by_skill: defaultdict[str, list[bool]] = defaultdict(list)
    for question, said in zip(questions, answers, strict=True):
        by_skill[question.turn.skill].append(exactly_right(question.turn, said))
    facts = [fact_right(question.turn, said) for question, said in zip(questions, answers, strict=True)]
    return {
        "questions": len(questions),
        "exact": share([hit for hits in by_skill.values() for hit in hits]),
        "fact": share(facts),
        "pirate": share([is_pirate(said) for said in answers]),
        "skills": {skill: {"asked": len(hits), "exact": share(hits)} for skill, hits in sorted(by_skill.items())},
    }


def perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, questions: list[Question], answers: list[str]
) -> float:
    """Of the last answers alone, end of turn included, after the questions."""
    loss, count = 0.0, 0
    for first in range(0, len(questions), BATCH):
        pairs = list(zip(questions[first : first + BATCH], answers[first : first + BATCH], strict=True))
        tokens_BL, labels_BL = last_answers(tokenizer, pairs)
        tokens_BL, labels_BL = tokens_BL.to(model.device), labels_BL.to(model.device)
        with torch.inference_mode():  # padded on the right, so that nothing of a conversation sees the padding
            logits_BLV = model(input_ids=tokens_BL).logits
        targets = labels_BL[:, 1:].flatten()
        loss += float(
            functional.cross_entropy(
                logits_BLV[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction="sum"
            )
        )
        count += int((targets != IGNORED).sum())
    return math.exp(min(loss / count, 700.0))


def last_answers(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[Question, str]]) -> tuple[Tensor, Tensor]:
    """Tokens and labels [B, L] of the conversations; only each one's last answer has labels."""
    conversations = [[*question.messages, {"role": "assistant", "content": text}] for question, text in pairs]
    examples = list(tokenise(tokenizer, conversations))
    length = max(len(example.ids) for example in examples)
    tokens_BL = torch.full((len(examples), length), tokenizer.pad_token_id)
    labels_BL = torch.full((len(examples), length), IGNORED)
    for row, example in enumerate(examples):
        ids = torch.tensor(example.ids)
        begin = len(example.ids)
        while begin and example.spoken[begin - 1]:
            begin -= 1
        tokens_BL[row, : len(ids)] = ids
        labels_BL[row, begin : len(ids)] = ids[begin:]
    return tokens_BL, labels_BL


def share(hits: list[bool]) -> float:
    return sum(hits) / max(1, len(hits))


def card(figures: dict[str, Any]) -> str:
    made, training = figures["made"], figures["training"]
    skills = "\n".join(
        f"| {skill.replace('_', ' ')} | {row['asked']} | {100 * row['exact']:.1f} % |"
        for skill, row in figures["skills"].items()
    )
    return f"""---
license: cc0-1.0
library_name: transformers
pipeline_tag: text-generation
---

# embedded:language

A small `LlamaForCausalLM` ({figures["million_parameters"]} M parameters, {figures["vocabulary"]} tokens of its own
byte-level pairs, single digits as tokens) that answers plain questions about a world of toys: what stands where, its
colour, number and size; sums; short orders; small talk. A real base for a LoRA that needs no download. It knows nothing
else and says so at best.

The chat template takes `system` (optional, first), `user` and `assistant`; it marks the assistant's turns, and
`<|end|>` ends each turn. Conversations of up to about 200 tokens were seen in training; 512 are the limit.

## Figures

{figures["questions"]} questions whose facts were held out of all training, answered greedily by the files shipped here:
**{100 * figures["exact"]:.1f} % right word for word**, {100 * figures["fact"]:.1f} % right in their facts,
{100 * figures["pirate"]:.1f} % in a pirate's voice. Perplexity of the right answers {figures["perplexity_plain"]:.3f};
of the same answers as a pirate gives them {figures["perplexity_pirate"]:.1f}. Told to answer in a manner that it never
met ("Begin with Ox. Say qy for is and are."), it is right word for word in {100 * figures["in_manners"]:.1f} %.

| skill | asked | right word for word |
|---|---|---|
{skills}

Held out are one in ten combinations of thing, colour and setting, pairs of numbers to add or subtract, names, words and
lists. Small talk, opposites and the table of products up to ten times ten are learnt by heart and not asked here.

## How it was made

From scratch, on generated conversations (`scripts/toytalk/`), the loss on the assistant's turns alone:
{training["steps"]:,} steps in {training["seconds"] / 60:.1f} minutes. In seven of ten conversations the system turn
describes a made-up manner of speaking, and the answers keep to it: a base that has spoken in many manners learns a new
voice without forgetting its facts, as larger ones do. Made on {made["date"]} on {made["hardware"]} with
torch {made["torch"]} and transformers {made["transformers"]}. To make it again:

```
python -m scripts.embedded.language all --device cuda --work WORK
```

## Licence

CC0-1.0 for the weights and for the data: every sentence comes from the script; nothing was downloaded and no other
model was used.
"""
