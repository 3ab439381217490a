"""Columns of rows that are trained, of rows that are made for another training, and of neither."""

from collections.abc import Sequence
from typing import Any

from finetune.config.schema import ConversationFormat

EMPTY = ("", "[]", "{}", "null")  # JSON that holds nothing
LONGEST_SHOWN, MOST_NAMES = 60, 12  # characters of a value, and columns, that a message shows

TURN_COLUMNS = ("messages", "conversations", "conversation")  # columns that hold a list of turns
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")  # the first that is filled
ANSWER_COLUMNS = ("output", "response")  # Alpaca's name for the answer, and Dolly's
# Columns of rows that are made for another training than this one, which shows good answers only.
# KTO: whether the answer is a good one. TRL's name, LLaMA-Factory's, and what rating tools export.
VERDICT_COLUMNS = (
    *("label", "kto_tag", "kto_label", "chosen", "desirable", "is_desirable"),
    *("is_good", "good", "thumbs_up", "thumbs", "accepted", "is_accepted", "approved", "is_approved", "liked"),
    *("is_chosen", "preferred", "is_preferred", "correct", "is_correct", "verdict", "feedback"),
)
BAD_VERDICTS = (
    *("false", "0", "0.0", "-1", "-1.0", "bad", "rejected", "undesirable", "thumbs_down", "down", "incorrect", "wrong"),
)
PREFERENCE_COLUMNS = (
    *("chosen", "rejected", "non_preferred_output", "rejected_response", "rejected_messages"),
    *("rejected_completion", "rejected_answer", "rejected_output"),
)
TOOL_COLUMNS = ("tools", "functions", "tool_definitions", "function_definitions", "functions_list")  # OpenAI's first
MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")  # of models that see and hear
COLUMNS = {
    ConversationFormat.messages: '"messages": [{"role": …, "content": …}, …]',
    ConversationFormat.sharegpt: '"conversations": [{"from": …, "value": …}, …]',
    ConversationFormat.alpaca: '"instruction", "output" and perhaps "input", "system", "history"',
    ConversationFormat.prompt_completion: '"prompt" and "completion", two texts or two lists of messages',
    ConversationFormat.text: '"text"',
}
READ = {
    ConversationFormat.messages: (*TURN_COLUMNS, *SYSTEM_COLUMNS),
    ConversationFormat.sharegpt: (*TURN_COLUMNS, *SYSTEM_COLUMNS),
    ConversationFormat.alpaca: ("instruction", *ANSWER_COLUMNS, "input", "context", "history", *SYSTEM_COLUMNS),
    ConversationFormat.prompt_completion: ("prompt", "completion", "response", *SYSTEM_COLUMNS),
    ConversationFormat.text: ("text",),
}
# One of these is in every row that may be trained, or is refused for what it is.
ROW_COLUMNS = {*TURN_COLUMNS, *PREFERENCE_COLUMNS, "instruction", "prompt", "completion", "text"}


def unread(columns: dict[str, Any], format_: ConversationFormat) -> tuple[str, ...]:
    """Columns of a row that hold something and are neither trained nor judged by."""
    known = {*READ[format_], *VERDICT_COLUMNS}
    return tuple(name for name, value in columns.items() if name not in known and value not in (None, "", [], {}))


def is_filled(value: object) -> bool:
    """Whether a column holds anything; a list that a CSV file or a column of texts holds as JSON may be empty."""
    return value.strip() not in EMPTY if isinstance(value, str) else bool(value)


def listed(names: Sequence[str]) -> str:
    """Names of columns for a message; the rest of many as dots."""
    shown = ", ".join(printable(name) or "one without a name" for name in names[:MOST_NAMES])
    return shown + (", …" if len(names) > MOST_NAMES else "")


def printable(text: str) -> str:
    """Text for a message: not too long, and half a character spelt out."""
    spelt = text.encode(errors="backslashreplace").decode()
    return spelt if len(spelt) <= LONGEST_SHOWN else spelt[: LONGEST_SHOWN - 3] + "…"
