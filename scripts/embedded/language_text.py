"""The language model's text: its tokenizer and chat template, and conversations packed into rows of one length.

N rows, L tokens in a row.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from scripts.toytalk.conversation import Messages

CONTEXT = 512
ROW_LENGTH = 256
MOST_TOKENS = 1536
MIN_PAIRS = 20  # a pair of letters seen less often is no token: made-up words stay in pieces that are met often
IGNORED = -100  # the label that cross-entropy skips

START, END, PAD = "<|start|>", "<|end|>", "<|pad|>"
ROLES = {role: f"<|{role}|>" for role in ("system", "user", "assistant")}

# Single digits, so that sums are learnt digit by digit; words with the space before them; runs of punctuation.
PIECES = Regex(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+")

# A system turn may open the conversation; what stands between the generation marks is what the model says itself,
# up to and with the end of its turn.
CHAT_TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' and not loop.first %}
        {{- raise_exception('a system message may only come first') }}
    {%- elif message['role'] in ('system', 'user') %}
        {{- '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}
    {%- elif message['role'] == 'assistant' %}
        {{- '<|assistant|>' }}
        {%- generation %}
            {{- message['content'] | trim + '<|end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- raise_exception('roles are system, user and assistant, not ' + message['role']) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level pairs learnt from texts: every text of any language tokenises and comes back unchanged."""
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(PIECES, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    learner.decoder = decoders.ByteLevel()
    learner.train_from_iterator(
        texts,
        BpeTrainer(
            vocab_size=MOST_TOKENS,
            min_frequency=MIN_PAIRS,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=[PAD, START, END, *ROLES.values()],
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=learner,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(ROLES.values()),
        chat_template=CHAT_TEMPLATE,
        padding_side="left",  # prompts of different lengths then end together
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class Tokens:
    """One conversation: its ids, and which of them the assistant says."""

    ids: list[int]
    spoken: list[bool]


def tokenise(tokenizer: PreTrainedTokenizerFast, conversations: list[Messages]) -> Iterator[Tokens]:
    """Through the chat template, whose generation marks tell who says what."""
    for messages in conversations:
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        yield Tokens(rendered["input_ids"], [bool(mark) for mark in rendered["assistant_masks"]])


@dataclass(frozen=True)
class Rows:
    """Conversations side by side in rows: tokens, labels and positions, each [N, L] in 16 bits to save memory.

    Positions start anew with each conversation, and at every padding token.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor


def pack(examples: Iterable[Tokens], pad: int, length: int = ROW_LENGTH, open_rows: int = 64) -> Rows:
    """First fit into rows of `length`; what is longer than a row is left out."""
    rows: list[list[Tokens]] = []
    room: dict[int, int] = {}  # row -> tokens left, for the rows not yet closed
    for example in examples:
        size = len(example.ids)
        if size > length:
            continue
        row = next((row for row, left in room.items() if left >= size), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room[row] = length
            if len(room) > open_rows:  # the fullest is closed
                del room[min(room, key=lambda open_row: room[open_row])]
        rows[row].append(example)
        room[row] -= size
    tokens_NL = torch.full((len(rows), length), pad, dtype=torch.int16)
    labels_NL = torch.full((len(rows), length), IGNORED, dtype=torch.int16)
    positions_NL = torch.zeros((len(rows), length), dtype=torch.int16)
    for index, row_examples in enumerate(rows):
        ids = torch.tensor([token for example in row_examples for token in example.ids])
        spoken = torch.tensor([mark for example in row_examples for mark in example.spoken])
        tokens_NL[index, : len(ids)] = ids
        labels_NL[index, : len(ids)] = ids.masked_fill(~spoken, IGNORED)
        positions_NL[index, : len(ids)] = torch.cat([torch.arange(len(example.ids)) for example in row_examples])
    return Rows(tokens_NL, labels_NL, positions_NL)


def attended(positions_BL: Tensor) -> Tensor:
    """[B, 1, L, L], true where a token sees another: itself and those before it in its own conversation."""
    conversation_BL = (positions_BL == 0).cumsum(1)
    same_BLL = conversation_BL[:, :, None] == conversation_BL[:, None, :]
    return torch.tril(same_BLL)[:, None]
