"""Conversations as users have them, in every format and kind of file."""

import csv
import itertools
import json

import pytest

from finetune.config.schema import ConversationFormat
from finetune.data.text import formats
from finetune.data.text.formats import Conversation, Message, open_source
from finetune.errors import DataError

ROWS = {
    ConversationFormat.messages: {"messages": [{"role": "system", "content": "Be kind."},
                                  {"role": "user", "content": "Ünd? ☃"},
                                   {"role": "assistant", "content": "Hi,\n\"there\""}]},
    ConversationFormat.sharegpt: {"conversations": [{"from": "system", "value": "Be kind."},
                                       {"from": "human", "value": "Ünd? ☃"},
                                        {"from": "gpt", "value": "Hi,\n\"there\""}]},
    ConversationFormat.alpaca: {"instruction": "Ünd? ☃", "input": "", "output": "Hi,\n\"there\"", "system": "Be kind."},
    ConversationFormat.prompt_completion: {"prompt": "Ünd? ☃", "completion": "Hi,\n\"there\"", "system": "Be kind."},
    ConversationFormat.text: {"text": "Ünd? ☃\nHi,\n\"there\""},
}  # fmt: skip
CHAT = (Message("system", "Be kind."), Message("user", "Ünd? ☃"), Message("assistant", 'Hi,\n"there"'))
WANTED = dict.fromkeys(ROWS, CHAT) | {ConversationFormat.text: (Message("text", 'Ünd? ☃\nHi,\n"there"'),)}


def save(folder, kind, rows):
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif kind == "csv":
        with open(path, "w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


def read(path, **options):
    bad = options.pop("bad", None)
    return list(formats.read(open_source(path, **options), bad=bad))


def one(row, format_=None):
    return formats.conversation(row, format_ or formats._recognise(row, "f:1"), "f:1").messages


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "saved"])
@pytest.mark.parametrize(
    "format_", [item for item in ConversationFormat if item is not ConversationFormat.auto], ids=lambda item: item.name
)
def test_every_format_from_every_kind_of_file(tmp_path, format_, kind):
    path = save(tmp_path, kind, [ROWS[format_]] * 3)
    source = open_source(path)
    assert source.format is format_
    assert str(source) == f"{path}: {format_.value} (recognised)"
    rows = list(formats.read(source))
    assert [row.messages for row in rows] == [WANTED[format_]] * 3
    first = 2 if kind == "csv" else 1  # lines of JSON lines and CSV, rows of the others
    assert rows[0].source == f"{path}:{first}"
    assert str(open_source(path, format_=format_)) == f"{path}: {format_.value} (as named)"


def test_names_of_roles_and_columns_that_others_use():
    turns = [("Human", "a"), ("chatgpt", "b"), ("observation", ""), ("bot", "c"), ("developer", "d"), ("model", "e")]
    found = one({"conversations": [{"from": role, "value": text} for role, text in turns]})
    assert [turn.role for turn in found] == ["user", "assistant", "tool", "assistant", "system", "assistant"]
    assert one({"conversation": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    dolly = one({"instruction": "a", "context": "c", "response": "b", "category": "x"})
    assert dolly == (Message("user", "a\n\nc"), Message("assistant", "b"))
    assert one({"prompt": "a", "response": "b"}) == (Message("user", "a"), Message("assistant", "b"))


def test_alpaca_with_input_and_history():
    found = one({"instruction": "a", "input": "b", "output": "c", "history": [["q", "r"]], "text": "ignored"})
    assert found == tuple(
        Message(*turn) for turn in zip(["user", "assistant"] * 2, ["q", "r", "a\n\nb", "c"], strict=True)
    )
    assert one({"instruction": "", "input": "b", "output": "c"})[0].content == "b"


def test_completion_as_messages_trains_only_the_completion():
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    found = one({"prompt": prompt, "completion": [{"role": "assistant", "content": "d"}]})
    assert [(turn.content, turn.trained) for turn in found if turn.role == "assistant"] == [("b", False), ("d", True)]


def test_groups_ignore_case_and_white_space_only():
    def group(question, answer):
        return Conversation((Message("user", question), Message("assistant", answer)), "f:1").group

    first = group("What is 3+4?", "It is 7.")
    assert first == group(" what  is\n3+4?", "IT is 7. ")
    assert first != group("What is 3-4?", "It is 7.")
    assert first != group("What is 3+4? It is", "7.")
    assert 0 <= first < 2**64


def test_weights_and_parts_of_openai():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answers = [{"role": "assistant", "content": "x", "weight": weight} for weight in (0, 1, None)]
    found = one({"messages": [{"role": "user", "content": parts}, *answers]})
    assert found[0].content == "ab"
    assert [turn.trained for turn in found[1:]] == [False, True, True]


def test_blank_system_turns_vanish():
    assert (
        len(one({"messages": [{"role": "system", "content": " "}, *ROWS[ConversationFormat.messages]["messages"][1:]]}))
        == 2
    )


def turns(*pairs):
    return {"messages": [{"role": role, "content": text} for role, text in pairs]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (turns(("user", "a"), ("narrator", "b")), r'^f:1: unknown role "narrator" in turn 2.*\(gpt.*skip_bad'),
        (turns(("user", "a"), (7, "b")), r"unknown role 7"),
        (turns(("user", "a"), ("assistant", " \n")), r"the answer in turn 2 is empty.*skip_bad"),
        (turns(("user", ""), ("assistant", "a")), r"the user's text in turn 1 is empty"),
        (turns(("user", "a"), ("system", "b")), r"has no assistant turn \(only user, system\)"),
        (turns(), r"has no assistant turn \(only no turn at all\)"),
        ({"messages": "no list"}, r'"messages" is not JSON'),
        ({"messages": {"a": 1}}, r'"messages" must be a list of turns, got \{"a": 1\}.*"role"'),
        ({"messages": [{"role": "user"}]}, r'turn 1 of "messages" needs "role" and "content", got \{"role": "user"\}'),
        (turns(("user", "a"), ("assistant", None)), r"must be a text, got null"),
        (turns(("user", [{"type": "image"}]), ("assistant", "b")), r'must be a text, got \[\{"type": "image"\}\]'),
        (turns(("user", "a\ud83d"), ("assistant", "b")), r"half a character \('\\ud83d'\)"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}, r'"tool_calls", which is not read'),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, r'"weight" of turn 1.* must be 0 or 1'),
        (ROWS[ConversationFormat.messages] | {"tools": [{}]}, r'holds "tools", which are not read'),
        ({"instruction": 1, "output": "a"}, r'"instruction" must be a text, got 1'),
        ({"instruction": "a", "output": ""}, r"the answer in turn 2 is empty"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, r'"history" must be a list of \[question, answer\]'),
        ({"prompt": "a", "completion": 5}, r'"completion" must be a text, got 5'),
        ({"text": " "}, r"its text is empty"),
        ({"text": ["a"]}, r'"text" must be a text'),
    ],
)  # fmt: skip
def test_bad_rows_say_where_what_and_what_to_type(row, message):
    with pytest.raises(DataError, match=message) as caught:
        one(row)
    assert "\n" not in str(caught.value)


def test_unknown_columns_list_every_format(tmp_path):
    path = save(tmp_path, "jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(
        DataError, match=r"rows.jsonl:1: its columns \(answer, question\) are of no known format"
    ) as caught:
        open_source(path)
    assert all(
        format_.value in str(caught.value) for format_ in ConversationFormat if format_ is not ConversationFormat.auto
    )
    with pytest.raises(DataError, match=r"rows.jsonl:1: is no object with columns; a row has one of"):
        open_source(save(tmp_path, "jsonl", [[1]]))


def test_mixed_formats_are_refused_unless_named(tmp_path):
    path = save(tmp_path, "jsonl", [ROWS[ConversationFormat.alpaca], ROWS[ConversationFormat.sharegpt]])
    with pytest.raises(DataError, match=r"rows.jsonl:2: is sharegpt, earlier rows are alpaca.*data.format=alpaca"):
        read(path)
    both = save(tmp_path, "jsonl", [ROWS[ConversationFormat.alpaca], ROWS[ConversationFormat.alpaca] | {"text": "x"}])
    assert len(read(both)) == 2, "a further column that isn't needed is no other format"
    assert read(both, format_=ConversationFormat.text, bad=lambda _: None)[0].messages == (Message("text", "x"),)


def test_bad_rows_can_be_left_out_and_are_told(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(ROWS[ConversationFormat.messages]).encode()
    path.write_bytes(b"\n".join([b"{broken", good, b"\xff\xfe", json.dumps(turns(("user", "a"))).encode(), b"", good]))
    told = []
    rows = read(path, bad=told.append)
    assert [row.source for row in rows] == [f"{path}:2", f"{path}:6"]
    assert [str(error).split(": ")[0] for error in told] == [f"{path}:{line}" for line in (1, 3, 4)]
    with pytest.raises(DataError, match=r"rows.jsonl:1: is not JSON"):
        read(path)


def test_nothing_left_is_an_error(tmp_path):
    path = save(tmp_path, "jsonl", [turns(("user", "a"))] * 3)
    with pytest.raises(DataError, match=r"nothing is left, all 3 rows are unusable.*data.skip_bad=false"):
        read(path, bad=lambda _: None)


def test_a_folder_of_files_is_read_in_order_of_names(tmp_path):
    (tmp_path / "b").mkdir()
    for name, text in (("2.jsonl", "two"), ("1.jsonl", "one")):
        (tmp_path / "b" / name).write_text(json.dumps({"text": text}) + "\n")
    (tmp_path / "b" / "notes.md").write_text("no data")
    source = open_source(tmp_path / "b")
    assert str(source).endswith("text (recognised), 2 files")
    assert [row.messages[0].content for row in formats.read(source)] == ["one", "two"]


def test_reading_is_lazy(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps({"text": "a"}) + "\n") * 3 + "{broken")
    assert list(itertools.islice(formats.read(open_source(path)), 3)) == [
        Conversation((Message("text", "a"),), f"{path}:{line}") for line in (1, 2, 3)
    ]
