"""Conversations from a file, whatever its format: OpenAI messages, ShareGPT, Alpaca, prompt and completion, plain text.

The format is recognised by the columns of a file's first row, or named. Rows are streamed and normalised one by one:
memory does not grow with the file. Texts stay as they are; only blank system turns are left out.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.schema import ConversationFormat
from finetune.config.spelling import setting
from finetune.data import strict_json
from finetune.data.text import readers
from finetune.data.text.columns import (
    ANSWER_COLUMNS,
    BAD_VERDICTS,
    COLUMNS,
    MEDIA_COLUMNS,
    PREFERENCE_COLUMNS,
    SYSTEM_COLUMNS,
    TOOL_COLUMNS,
    TURN_COLUMNS,
    VERDICT_COLUMNS,
    is_filled,
    listed,
    printable,
    unread,
)
from finetune.errors import DataError
from finetune.run.progress import plural, say

TEXT = "text"  # the role of the only message of a row of plain text, which goes through no chat template
ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatgpt", "function_call"),
    "tool": ("tool", "function", "observation", "function_response"),
}
ALIASES = {alias: role for role, aliases in ROLES.items() for alias in aliases}
UNTRAINED_KEYS = ("weight", "train", "training", "loss")  # of a turn: OpenAI's, axolotl's two, ms-swift's
TEXT_PARTS = ("text", "input_text", "output_text")  # types of OpenAI's parts
# Keys of a turn that may hold text to train on.
UNSUPPORTED_KEYS = ("tool_calls", "function_call", "reasoning_content", "thinking", "reasoning")
LEAVE_OUT = "or leave such rows out: data.skip_bad=true"
SKIP = f"correct it, {LEAVE_OUT}"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. role: system, user, assistant, tool or (alone in its row) text. trained: off by `"weight": 0`."""

    role: str
    content: str
    trained: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row. source: `file:line` for JSON lines and CSV, `file:row` for others, counted from 1."""

    messages: tuple[Message, ...]
    source: str

    @property
    def group(self) -> int:
        """A 64-bit hash, equal for conversations that are equal but for case and white space."""
        turns = (f"{message.role}\x1e{' '.join(message.content.split())}" for message in self.messages)
        return int.from_bytes(hashlib.blake2b("\x1f".join(turns).casefold().encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Source:
    """Files, and the format of the first one. columns: what a format calls a column -> what the files call it. unread:
    columns of the first row that are not trained. aliases: of its other names for `system`, those that are filled."""

    path: Path
    files: tuple[Path, ...]
    format: ConversationFormat
    named: bool
    columns: Mapping[str, str]
    unread: tuple[str, ...]
    aliases: tuple[str, ...]

    def __str__(self) -> str:
        how = "as named" if self.named else "recognised"
        files = f", {len(self.files)} files" if len(self.files) > 1 else ""
        return f"{self.path}: {self.format.value} ({how}{_not_read(self.unread)}){files}"


def open_source(
    path: Path,
    *,
    format_: ConversationFormat = ConversationFormat.auto,
    columns: Mapping[str, str] | None = None,
    skip_bad: bool = False,
) -> Source:
    """The files behind a path and their format, under `auto` recognised by the first readable row.

    columns: as `data.columns`. skip_bad: by the first row that is usable. Raises DataError for missing, empty or
    unreadable files, for columns of no known format, and for named ones that aren't there.
    """
    files, error = readers.files_of(path), None
    for file in files:
        for number, row in readers.read(file):
            try:
                return _source(path, files, row, f"{file}:{number}", format_, columns or {})
            except DataError as unusable:
                if not (skip_bad or isinstance(row, DataError)):
                    raise
                error = error or unusable
    raise error or DataError(f"{path} holds no rows; a row has one of these: {_known_formats()}")


def _source(
    path: Path, files: tuple[Path, ...], row: Any, where: str, format_: ConversationFormat, columns: Mapping[str, str]
) -> Source:
    if isinstance(row, DataError):
        raise row
    there, named = _columns(row, where), format_ is not ConversationFormat.auto
    if missing := [column for column in columns.values() if column not in there]:
        names = ", ".join(map(printable, there))
        raise DataError(f"{where}: data.columns names {missing[0]}, and the columns are {names}")
    renamed = _renamed(there, columns)
    found = format_ if named else recognise(renamed, where)
    aliases = tuple(name for name in SYSTEM_COLUMNS[1:] if renamed.get(name))
    return Source(path, files, found, named, columns, unread(renamed, found), aliases)


def read(source: Source, *, bad: Callable[[DataError], None] | None = None) -> Iterator[Conversation]:
    """Every conversation in the files' order.

    bad: called with the error of each unusable row, which is then left out; None raises it. Raises DataError where a
    file can't be read on, and where no row is left.
    """
    count = left_out = 0
    for file in source.files:
        format_ = None
        for number, row in readers.read(file):
            try:
                if isinstance(row, DataError):
                    raise row
                named, where = _renamed(row, source.columns), f"{file}:{number}"
                format_ = format_ or _of_file(file, source, _columns(named, where), where)
                yield conversation(named, format_, where, strict=not source.named)
                count += 1
            except DataError as error:
                if bad is None:
                    raise
                left_out += 1
                bad(error)
    if not count:
        raise DataError(f"{source.path}: none of {plural(left_out, 'row')} is usable; try data.skip_bad=false")


def _of_file(file: Path, source: Source, columns: dict[str, Any], where: str) -> ConversationFormat:
    """By its first row: several files may be conversations of different formats, but not conversations and texts."""
    found = source.format if source.named else recognise(columns, where)
    if found is source.format or ConversationFormat.text in (found, source.format):
        return source.format
    say(f"dataset: {file}: {found.value} (recognised{_not_read(unread(columns, found))})")
    return found


def _not_read(columns: Sequence[str]) -> str:
    return f"; not read: {listed(columns)}" if columns else ""


def conversation(row: object, format_: ConversationFormat, where: str, *, strict: bool = True) -> Conversation:
    """One row, normalised. strict: refuse a row that looks like another format than `format_`.

    Raises DataError for missing columns, mixed formats, unknown roles, empty texts, rows without an answer, and for
    rows that are not made for supervised training.
    """
    columns = _columns(row, where)
    _refuse_other_training(columns, where, format_)
    if strict and (found := recognise(columns, where)) is not format_:
        raise DataError(
            f"{where}: is {found.value}, earlier rows are {format_.value}; keep one format in a file, or name it: "
            f"data.format={format_.value}"
        )
    if format_ is ConversationFormat.text:
        messages = [Message(TEXT, _text(columns.get("text"), where, '"text"'))]
        if not messages[0].content.strip():
            raise DataError(f"{where}: its text is empty; {SKIP}")
        return Conversation(tuple(messages), where)
    if tools := next((name for name in TOOL_COLUMNS if is_filled(columns.get(name))), ""):
        raise DataError(
            f'{where}: holds "{tools}", which are not read; describe them in a system message, or remove it'
        )
    if format_ is ConversationFormat.alpaca:
        messages = _alpaca(columns, where)
    elif format_ is ConversationFormat.prompt_completion:
        messages = _prompt_completion(columns, where)
    else:
        name = next((name for name in TURN_COLUMNS if columns.get(name) is not None), TURN_COLUMNS[0])
        messages = _turns(columns.get(name), where, f'"{name}"', format_)
    if name := next((name for name in SYSTEM_COLUMNS if columns.get(name) not in (None, "")), ""):
        messages = [Message("system", _text(columns[name], where, f'"{name}"')), *messages]
    return Conversation(_checked(messages, where), where)


def _renamed(row: Any, columns: Mapping[str, str]) -> Any:
    """A row whose columns are called as its format calls them."""
    if not columns or not isinstance(row, dict):
        return row
    others = {name: value for name, value in row.items() if name not in columns.values()}
    return others | {name: row.get(column) for name, column in columns.items()}


def _columns(row: object, where: str) -> dict[str, Any]:
    if isinstance(row, list):
        raise DataError(f"{where}: is a list, and a line holds one row; a file that is one list is called .json")
    if not isinstance(row, dict):
        raise DataError(f"{where}: is no object with columns; a row has one of these: {_known_formats()}")
    return row


def _refuse_other_training(columns: dict[str, Any], where: str, format_: ConversationFormat) -> None:
    """Raises DataError for a marked bad answer, a pair of a good and a bad one, and a text about an image or sound."""
    if names := [name for name in PREFERENCE_COLUMNS if is_filled(columns.get(name))]:
        raise DataError(
            f"{where}: is a preference pair ({', '.join(names)}), which is for DPO and not for supervised training; "
            f"keep the good answer alone, as {COLUMNS[ConversationFormat.prompt_completion]}, {LEAVE_OUT}"
        )
    if name := next((name for name in MEDIA_COLUMNS if is_filled(columns.get(name))), ""):
        raise DataError(
            f'{where}: holds "{name}", which a language model does not see; remove that column if the text is to be '
            f"trained without it, {LEAVE_OUT}"
        )
    _refuse_bad_answer(columns, where, ("false",) if format_ is ConversationFormat.text else BAD_VERDICTS)


def _refuse_bad_answer(marks: dict[str, Any], where: str, bad: Sequence[str] = BAD_VERDICTS) -> None:
    """marks: of a row or a turn. bad: beside a plain text, numbers and words are classes: of reviews, of topics."""
    for name in VERDICT_COLUMNS:
        if name in marks and (verdict := str(marks[name]).strip().lower()) in bad:
            raise DataError(
                f"{where}: is a KTO row with {name} {verdict}: its answer is a bad one, and training would "
                f"teach it; remove the row, {LEAVE_OUT}"
            )


def recognise(columns: dict[str, Any], where: str) -> ConversationFormat:
    """The format that the columns of a row show; `where` names the row in a `DataError` when they show none."""
    filled = {name for name, value in columns.items() if value is not None}
    for name in TURN_COLUMNS:
        if name in filled:
            turns = _parsed_json(columns[name], where, f'"{name}"')
            if turns == []:
                raise DataError(f'{where}: "{name}" holds no turn; {SKIP}')
            first = turns[0] if isinstance(turns, list) else None
            is_sharegpt = isinstance(first, dict) and "from" in first
            return ConversationFormat.sharegpt if is_sharegpt else ConversationFormat.messages
    if "instruction" in filled and filled & {*ANSWER_COLUMNS}:
        return ConversationFormat.alpaca
    if "prompt" in filled and filled & {"completion", "response"}:
        return ConversationFormat.prompt_completion
    if "text" in filled:
        if ALIASES.get(str(columns.get("role")).strip().lower()):
            raise DataError(
                f'{where}: is one turn ("role" and "text"); write all turns of a conversation into one row: '
                f"{COLUMNS[ConversationFormat.messages]}, or train each as a text of its own: data.format=text"
            )
        return ConversationFormat.text
    _refuse_other_training(columns, where, ConversationFormat.prompt_completion)
    if len(filled) > 1 and all(isinstance(value, dict) for value in columns.values()):
        raise DataError(f"{where}: is one object of {len(columns)} rows by id; write them as a list: [{{…}}, {{…}}]")
    names = sorted(map(str, filled))
    seen = listed(names)
    texts = [name for name in columns if isinstance(columns[name], str)]
    pair = dict(zip(("prompt", "completion"), texts, strict=False))
    way = f", as {setting('data.columns', pair)} does," if len(texts) == 2 else ""
    raise DataError(
        f"{where}: its columns ({seen or 'none'}) are of no known format; "
        f"rename them{way} to one of these: {_known_formats()}"
    )


def _known_formats() -> str:
    return "; ".join(f"{format_.value}: {columns}" for format_, columns in COLUMNS.items())


def _alpaca(columns: dict[str, Any], where: str) -> list[Message]:
    answer = next((name for name in ANSWER_COLUMNS if columns.get(name) is not None), ANSWER_COLUMNS[0])
    context = next((name for name in ("input", "context") if columns.get(name)), "input")
    request = _text(columns.get("instruction"), where, '"instruction"')
    more = _text(columns.get(context) or "", where, f'"{context}"')
    messages = []
    for pair in _parsed_json(columns.get("history") or [], where, '"history"'):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(f'{where}: "history" must be a list of [question, answer], got {_shown(pair)}; {SKIP}')
        for role, content in zip(("user", "assistant"), pair, strict=True):
            messages.append(Message(role, _text(content, where, '"history"')))
    messages.append(Message("user", f"{request}\n\n{more}" if more.strip() and request.strip() else request or more))
    messages.append(Message("assistant", _text(columns.get(answer), where, f'"{answer}"')))
    return messages


def _prompt_completion(columns: dict[str, Any], where: str) -> list[Message]:
    answer = "completion" if columns.get("completion") is not None else "response"
    messages: list[Message] = []
    for name, role in (("prompt", "user"), (answer, "assistant")):
        value = columns.get(name)
        if isinstance(value, list):
            turns = _turns(value, where, f'"{name}"', ConversationFormat.messages)
            # Answers that stand in the prompt are context: only the completion is trained.
            messages += [Message(turn.role, turn.content, turn.trained and name != "prompt") for turn in turns]
        else:
            messages.append(Message(role, _text(value, where, f'"{name}"')))
    return messages


def _turns(value: object, where: str, name: str, format_: ConversationFormat) -> list[Message]:
    role_key, text_key = ("from", "value") if format_ is ConversationFormat.sharegpt else ("role", "content")
    turns = _parsed_json(value, where, name)
    if not isinstance(turns, list):
        raise DataError(f"{where}: {name} must be a list of turns, got {_shown(turns)}; it needs {COLUMNS[format_]}")
    messages = []
    for number, turn in enumerate(turns, start=1):
        what = f"turn {number} of {name}"
        if not isinstance(turn, dict) or not {role_key, text_key} <= turn.keys():
            raise DataError(
                f'{where}: {what} needs "{role_key}" and "{text_key}", got {_shown(turn)}; a row has {COLUMNS[format_]}'
            )
        if unsupported := next((key for key in UNSUPPORTED_KEYS if is_filled(turn.get(key))), ""):
            raise DataError(
                f'{where}: {what} holds "{unsupported}", which is not read; write it into "{text_key}" as the model '
                "shall write it, or leave such rows out: data.skip_bad=true"
            )
        _refuse_bad_answer(turn, where)
        role = ALIASES.get(turn[role_key].strip().lower()) if isinstance(turn[role_key], str) else None
        if role is None:
            allowed = ", ".join(f"{name} ({', '.join(others)})" for name, (_, *others) in ROLES.items())
            raise DataError(f"{where}: unknown role {_shown(turn[role_key])} in {what}; allowed are {allowed}; {SKIP}")
        messages.append(Message(role, _text(_joined_parts(turn[text_key]), where, what), _weight(turn, where, what)))
    return messages


def _parsed_json(value: object, where: str, name: str) -> Any:
    """A list that a CSV file or a column of texts holds as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return strict_json.loads(value)
    except strict_json.KeyTwice as error:
        raise DataError(f"{where}: {name} {error}, {LEAVE_OUT}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {name} is not JSON ({error}); write it as a list, in JSON; {SKIP}") from error


def _joined_parts(content: object) -> object:
    """OpenAI's list of parts as one text, where all of them are texts; reasoning, which may have one too, is none."""
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text") in TEXT_PARTS
        for part in content
    ):
        return "".join(part["text"] for part in content)
    return content


def _weight(turn: dict[str, Any], where: str, what: str) -> bool:
    for name in UNTRAINED_KEYS:
        value = turn.get(name)
        if value not in (None, 0, 1):
            raise DataError(f'{where}: "{name}" of {what} must be 0 or 1, got {_shown(value)}; {SKIP}')
        if value is not None and not value:
            return False
    return True


def _text(value: object, where: str, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {what} must be a text, got {_shown(value)}; {SKIP}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a \ud83d\ude00, which no tokenizer takes
        raise DataError(f"{where}: {what} has half a character ({error.object[error.start]!a}); {SKIP}") from error
    return value


def _checked(messages: list[Message], where: str) -> tuple[Message, ...]:
    """Without blank system turns. Raises DataError for other blank turns and for rows without an answer."""
    kept = tuple(message for message in messages if message.role != "system" or message.content.strip())
    for number, message in enumerate(kept, start=1):
        if not message.content.strip() and message.role != "tool":
            kind = "the answer" if message.role == "assistant" else f"the {message.role}'s text"
            raise DataError(f"{where}: {kind} in turn {number} is empty; {SKIP}")
    roles = [message.role for message in kept]
    if "assistant" not in roles:
        seen = ", ".join(dict.fromkeys(roles)) or "no turn at all"
        raise DataError(f"{where}: has no assistant turn (only {seen}), so nothing to learn; {SKIP}")
    return kept


def _shown(value: object) -> str:
    return printable(json.dumps(value, ensure_ascii=False, default=str))
