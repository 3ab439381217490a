"""python -m scripts.embedded.language PHASE… : the language model that ships inside the package.

The phases, in order: data (generate conversations, learn the tokenizer, pack rows), train, export (fp16 files into
finetune/embedded/language), evaluate (questions never trained on, to the exported files; writes their model card).
`all` runs them one after the other; a training that was cut continues where it was.

B rows, L tokens in a row, V tokens of the vocabulary.
"""

import argparse
import itertools
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.embedded.fit import Budget, fit, save_atomically
from scripts.embedded.language_evaluate import evaluate
from scripts.embedded.language_settings import LanguageSettings
from scripts.embedded.language_text import CONTEXT, IGNORED, Rows, attended, pack, tokenise, train_tokenizer
from scripts.embedded.settings import REPOSITORY, SEED
from scripts.embedded.vocabularies import forget_batching
from scripts.toytalk.compose import TRAINING_SEEDS, training_conversations
from scripts.toytalk.conversation import Messages
from scripts.toytalk.manners import with_manners

PHASES = ("data", "train", "export", "evaluate")
CHUNK_SEEDS = 2000
TOKENIZER_SEEDS = 40_000  # conversations that the tokenizer is learnt from
LEARNING_RATE = 1e-3
LONGEST_ANSWER = 64  # tokens
MAX_FILE_MIB = 15


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.embedded.language", description=__doc__)
    parser.add_argument("phases", nargs="+", choices=(*PHASES, "all"), metavar="PHASE")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "outputs" / "embedded", help="rows and checkpoints")
    parser.add_argument("--root", type=Path, help="where files go; the repository, or WORK/root for a tiny run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=LanguageSettings.minutes, help="of training")
    parser.add_argument("--seeds", type=int, default=LanguageSettings.seeds, help="conversations to generate")
    parser.add_argument("--rows", type=int, default=LanguageSettings.rows, help="rows of a training step")
    parser.add_argument("--questions", type=int, default=LanguageSettings.questions, help="asked in the evaluation")
    parser.add_argument("--tiny", action="store_true", help="little data, few steps, to prove the whole line")
    given = parser.parse_args()
    settings = LanguageSettings(
        work=given.work,
        root=given.root or (given.work / "root" if given.tiny else REPOSITORY),
        device=given.device,
        tiny=given.tiny,
        minutes=given.minutes,
        seeds=400 if given.tiny else given.seeds,
        rows=4 if given.tiny else given.rows,
        questions=24 if given.tiny else given.questions,
    )
    torch.set_float32_matmul_precision("high")
    for phase in [phase for name in given.phases for phase in (PHASES if name == "all" else (name,))]:
        if phase == "data":
            make_data(settings)
        elif phase == "train":
            train(settings)
        elif phase == "export":
            export(settings.model_folder, settings.shipped)
        else:
            evaluate(settings)


def make_data(settings: LanguageSettings) -> None:
    """The tokenizer first, then rows of tokens, on all cores."""
    if settings.packed.exists():
        print(f"data: {settings.packed} is there", flush=True)
        return
    sample = spoken(TRAINING_SEEDS, min(settings.seeds, TOKENIZER_SEEDS))
    texts = (message["content"] for messages in sample for message in messages)
    tokenizer = train_tokenizer(texts)
    tokenizer.save_pretrained(settings.tokenizer)
    starts = range(TRAINING_SEEDS, TRAINING_SEEDS + settings.seeds, CHUNK_SEEDS)
    sizes = [min(CHUNK_SEEDS, TRAINING_SEEDS + settings.seeds - start) for start in starts]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        chunks = list(pool.map(packed_chunk, itertools.repeat(settings.tokenizer), starts, sizes))
    parts = [torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*chunks, strict=True)]
    save_atomically(parts, settings.packed)
    rows = Rows(*parts)
    used, trained = (rows.tokens != tokenizer.pad_token_id), (rows.labels != IGNORED)
    print(
        f"data: {len(tokenizer)} tokens in the vocabulary; {len(used)} rows, {used.sum() / 1e6:.1f} M tokens, "
        f"{used.float().mean():.0%} of the room; {trained.sum() / 1e6:.1f} M said by the assistant",
        flush=True,
    )


def packed_chunk(tokenizer_folder: Path, first_seed: int, seeds: int) -> tuple[np.ndarray, ...]:
    """The fields of Rows, as arrays: each tensor from another process would keep a file open."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    rows = pack(tokenise(tokenizer, spoken(first_seed, seeds)), tokenizer.pad_token_id)
    return rows.tokens.numpy(), rows.labels.numpy(), rows.positions.numpy()


def spoken(first_seed: int, seeds: int) -> list[Messages]:
    """The seeds' conversations, plain or in a manner that is described first."""
    conversations = with_manners(training_conversations(first_seed, seeds), first_seed)
    return [conversation.messages for conversation in conversations]


def new_model(tokenizer: PreTrainedTokenizerFast, *, tiny: bool = False) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64 if tiny else 256,
            intermediate_size=128 if tiny else 704,
            num_hidden_layers=2 if tiny else 8,
            num_attention_heads=2 if tiny else 8,
            num_key_value_heads=1 if tiny else 4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(settings: LanguageSettings) -> None:
    """Only what the assistant says is trained; conversations that share a row do not see one another."""
    tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer)
    rows = Rows(*torch.load(settings.packed, map_location=settings.device))
    torch.manual_seed(SEED)
    model = new_model(tokenizer, tiny=settings.tiny).to(settings.device)

    def draw(generator: torch.Generator) -> tuple[Tensor, ...]:
        drawn_B = torch.randint(len(rows.tokens), (settings.rows,), generator=generator, device=generator.device)
        return rows.tokens[drawn_B].long(), rows.labels[drawn_B].long(), rows.positions[drawn_B].long()

    def loss_of(tokens_BL: Tensor, labels_BL: Tensor, positions_BL: Tensor) -> Tensor:
        logits_BLV = model(
            input_ids=tokens_BL, attention_mask=attended(positions_BL), position_ids=positions_BL, use_cache=False
        ).logits
        return functional.cross_entropy(
            logits_BLV[:, :-1].flatten(0, 1).float(), labels_BL[:, 1:].flatten(), ignore_index=IGNORED
        )

    fit(
        model,
        draw,
        loss_of,
        name="language",
        budget=Budget(settings.minutes * 60, 4 if settings.tiny else None),
        lr=LEARNING_RATE,
        checkpoint=settings.checkpoint,
        seed=SEED,
        graph=True,
    )
    model.save_pretrained(settings.model_folder)
    tokenizer.save_pretrained(settings.model_folder)


def export(trained: Path, shipped: Path) -> None:
    """The trained model as the package ships it: one fp16 file that loads as fp32, and its tokenizer."""
    shutil.rmtree(shipped, ignore_errors=True)
    model = LlamaForCausalLM.from_pretrained(trained, dtype=torch.float16)
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise ValueError(f"{trained} holds values that fp16 cannot; train again")
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        max_new_tokens=LONGEST_ANSWER,
        do_sample=False,
    )
    model.save_pretrained(shipped)
    config = LlamaConfig.from_pretrained(shipped)
    config.dtype = "float32"  # what loads where nobody asks for a dtype: CPUs compute fp16 slowly
    config.save_pretrained(shipped)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    forget_batching(tokenizer)
    tokenizer.save_pretrained(shipped)
    sizes = {path: path.stat().st_size / 2**20 for path in sorted(shipped.iterdir())}
    for path, mib in sizes.items():
        path.chmod(0o644)  # safetensors writes files that only their owner can read
        if mib > MAX_FILE_MIB:
            raise ValueError(f"{path} has {mib:.1f} MiB; a shipped file may have {MAX_FILE_MIB}")
    print(f"export: {sum(sizes.values()):.1f} MiB in {shipped}", flush=True)


if __name__ == "__main__":
    main()
