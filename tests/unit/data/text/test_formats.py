"""Conversations as users have them, in every format and kind of file."""

import csv
import itertools
import json
import re
import shlex

import pytest

import finetune
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
    return formats.conversation(row, format_ or formats.recognise(row, "f:1"), "f:1").messages


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


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_columns_are_mapped(tmp_path, kind):
    rows = [{"my question": "hi", "Antwort (ä)": "ho", "prompt": "not this"}] * 2
    path = save(tmp_path, kind, rows)
    columns = {"prompt": "my question", "completion": "Antwort (ä)"}
    source = open_source(path, columns=columns)
    assert source.format is ConversationFormat.prompt_completion
    assert [row.messages for row in formats.read(source)] == [(Message("user", "hi"), Message("assistant", "ho"))] * 2
    with pytest.raises(DataError, match=r"data.columns names answer, and the columns are .*Antwort"):
        open_source(path, columns={"completion": "answer"})


def test_the_mapping_that_is_offered_is_read(tmp_path):
    path = save(tmp_path, "jsonl", [{"my question": "hi", "Antwort (ä)": "it's, ho"}])
    with pytest.raises(DataError) as refused:
        open_source(path)
    offered = str(refused.value).partition("them, as ")[2].partition(" does, to one")[0]
    (word,) = shlex.split(offered)
    columns = finetune.load("pirate_chat", word).data.columns
    assert columns == {"prompt": "my question", "completion": "Antwort (ä)"}
    assert open_source(path, columns=columns).format is ConversationFormat.prompt_completion


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


@pytest.mark.parametrize("kind", ["reasoning", "thinking", "image"])
def test_parts_of_other_types_are_not_trained_as_texts(kind):
    content = [{"type": kind, "text": "hm"}, {"type": "output_text", "text": "yes"}]
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}]}
    with pytest.raises(DataError, match=r'turn 2 of "messages" must be a text, got'):
        formats.conversation(row, ConversationFormat.messages, "here:1")
    row["messages"][1]["content"] = [*content[1:], {"text": ", no"}]
    assert formats.conversation(row, ConversationFormat.messages, "here:1").messages[1].content == "yes, no"


def test_single_turns_are_not_trained_as_texts_unless_that_is_said(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "Hello", "role": "prompter"}\n{"text": "Hi", "role": "assistant"}\n')
    with pytest.raises(DataError, match=r'a.jsonl:1: is one turn \("role" and "text"\); write all turns'):
        formats.open_source(file)
    source = formats.open_source(file, format_=ConversationFormat.text)
    assert [row.messages[0].content for row in formats.read(source)] == ["Hello", "Hi"]
    file.write_text('{"text": "Hello", "role": "main character"}\n')
    assert formats.open_source(file).format is ConversationFormat.text


def test_a_column_without_a_name_is_named(tmp_path):
    file = tmp_path / "a.csv"  # as pandas writes an index
    file.write_text(",prompt,completion\n0,a,b\n")
    assert "not read: one without a name)" in str(formats.open_source(file))


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
        (turns(), r'"messages" holds no turn; correct it, or leave such rows out'),
        (turns(("system", " ")), r"has no assistant turn \(only no turn at all\)"),
        ({"messages": "no list"}, r'"messages" is not JSON'),
        ({"messages": '[{"role": 1, "role": 2}]'}, r'"messages" has the key "role" twice .*; keep one of them, or '),
        ({"messages": {"a": 1}}, r'"messages" must be a list of turns, got \{"a": 1\}.*"role"'),
        ({"messages": [{"role": "user"}]}, r'turn 1 of "messages" needs "role" and "content", got \{"role": "user"\}'),
        (turns(("user", "a"), ("assistant", None)), r"must be a text, got null"),
        (turns(("user", [{"type": "image"}]), ("assistant", "b")), r'must be a text, got \[\{"type": "image"\}\]'),
        (turns(("user", "a\ud83d"), ("assistant", "b")), r"half a character \('\\ud83d'\)"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}, r'"tool_calls", which is not read'),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, r'"weight" of turn 1.* must be 0 or 1'),
        (ROWS[ConversationFormat.messages] | {"tools": [{}]}, r'holds "tools", which are not read'),
        (ROWS[ConversationFormat.messages] | {"functions": "[{\"name\": 1}]"}, r'holds "functions", which are not'),
        (ROWS[ConversationFormat.alpaca] | {"system": "a\ud83d"}, r'"system" has half a character'),
        (ROWS[ConversationFormat.alpaca] | {"system": {"a": 1}}, r'"system" must be a text'),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, r"is a preference pair \(chosen, rejected\).*skip_bad"),
        ({"input": {}, "preferred_output": [{}], "non_preferred_output": [{}]}, r"is a preference pair"),
        ({"messages": [{"role": "\ud83d", "content": "a"}]}, r'unknown role "\\ud83d" in turn 1'),
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


SUPERVISED = [format_ for format_ in ROWS if format_ is not ConversationFormat.text]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("format_", SUPERVISED, ids=lambda item: item.name)
@pytest.mark.parametrize("column", ["label", "kto_tag", "thumbs_up", "is_correct"])
def test_an_answer_that_is_marked_as_bad_is_never_trained(format_, column, named):
    for verdict in (False, 0, 0.0, -1, "False", "0", "Bad", "rejected", "incorrect"):
        with pytest.raises(DataError, match=rf"^f:1: is a KTO row with {column} .*skip_bad=true"):
            formats.conversation(ROWS[format_] | {column: verdict}, format_, "f:1", strict=not named)
    for verdict in (True, 1, "true", None, "", "sports"):
        assert formats.conversation(ROWS[format_] | {column: verdict}, format_, "f:1").messages == CHAT


@pytest.mark.parametrize("format_", ROWS, ids=lambda item: item.name)
def test_a_pair_of_answers_beside_other_columns_is_never_trained(format_):
    pairs = {"chosen": "a", "rejected": "b"}, {"rejected_response": "b"}, {"rejected_answer": "b"}
    for pair in (*pairs, {"chosen": [{"role": "assistant"}]}):
        with pytest.raises(DataError, match=r"^f:1: is a preference pair \("):
            one(ROWS[format_] | pair)
    assert one(ROWS[format_] | {"chosen": None, "rejected": ""}) == WANTED[format_]
    with pytest.raises(DataError, match="KTO row with chosen false"):
        one(ROWS[format_] | {"chosen": False})


@pytest.mark.parametrize("format_", ROWS, ids=lambda item: item.name)
@pytest.mark.parametrize(("column", "value"), [("image", "a.jpg"), ("images", ["a.jpg"]), ("audio", {"path": "a"})])
def test_a_text_about_an_image_or_sound_is_never_trained_alone(format_, column, value):
    with pytest.raises(DataError, match=f'^f:1: holds "{column}", .*skip_bad=true'):
        one(ROWS[format_] | {column: value})
    assert one(ROWS[format_] | {"image": None, "images": [], "audio": ""}) == WANTED[format_]


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize("value", [0, False])
def test_turns_that_other_tools_mark_are_not_trained(key, value):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no", key: value}]
    assert [turn.trained for turn in one({"messages": turns + ROWS[ConversationFormat.messages]["messages"]})][:2] == [
        True,
        False,
    ]


def test_a_list_of_rows_in_one_line_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps([ROWS[ConversationFormat.messages]]))
    with pytest.raises(DataError, match=r"rows.jsonl:1: is a list, .* called .json"):
        open_source(tmp_path / "rows.jsonl")


def test_a_turn_that_is_marked_as_bad_is_never_trained():
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "go away", "label": False}]
    with pytest.raises(DataError, match=r"^f:1: is a KTO row with label false"):
        one({"messages": turns})


@pytest.mark.parametrize("column", ["tools", "tool_definitions", "functions_list"])
def test_tool_definitions_are_named(column):
    with pytest.raises(DataError, match=f'^f:1: holds "{column}"'):
        one(ROWS[ConversationFormat.messages] | {column: [{"name": "search"}]})


def test_numbers_beside_a_plain_text_are_classes_and_false_is_a_verdict():
    assert one({"text": "a film", "label": 0}) == (Message("text", "a film"),)
    with pytest.raises(DataError, match="KTO row with label false"):
        one({"text": "a film", "label": False})


def test_rows_of_other_trainings_can_be_left_out(tmp_path):
    row = ROWS[ConversationFormat.prompt_completion]
    path = save(tmp_path, "jsonl", [row | {"label": True}, row | {"label": False}, row | {"rejected": "x"}])
    told = []
    assert [found.source for found in read(path, bad=told.append)] == [f"{path}:1"]
    assert [str(error).split(": ")[0] for error in told] == [f"{path}:2", f"{path}:3"]


@pytest.mark.parametrize("empty", [None, [], "", "[]", " null ", {}])
def test_empty_tools_are_no_tools(empty):
    row = ROWS[ConversationFormat.messages] | {"tools": empty, "functions": empty}
    row["messages"] = [turn | {"tool_calls": empty} for turn in row["messages"]]
    assert one(row) == CHAT


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
        open_source(save(tmp_path, "jsonl", [1]))


def test_rows_by_id_and_many_columns_give_a_short_message(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({f"id{number}": ROWS[ConversationFormat.alpaca] for number in range(3000)}))
    with pytest.raises(
        DataError, match=r"rows.json:1: is one object of 3000 rows by id; write them as a list"
    ) as caught:
        open_source(path)
    assert len(str(caught.value)) < 500
    with pytest.raises(DataError, match=r"its columns \(c0, c1, .*, …\) are of no known format") as caught:
        open_source(save(tmp_path, "jsonl", [{f"c{number}": "a" for number in range(3000)}]))
    assert len(str(caught.value)) < 500 + len(str(tmp_path))
    with pytest.raises(DataError, match=r"its columns \(\\ud83d\)"):
        one({"\ud83d": "a"})


def test_mixed_formats_are_refused_unless_named(tmp_path):
    path = save(tmp_path, "jsonl", [ROWS[ConversationFormat.alpaca], ROWS[ConversationFormat.sharegpt]])
    with pytest.raises(DataError, match=r"rows.jsonl:2: is sharegpt, earlier rows are alpaca.*data.format=alpaca"):
        read(path)
    both = save(tmp_path, "jsonl", [ROWS[ConversationFormat.alpaca], ROWS[ConversationFormat.alpaca] | {"text": "x"}])
    assert len(read(both)) == 2, "a further column that isn't needed is no other format"
    assert read(both, format_=ConversationFormat.text, bad=lambda _: None)[0].messages == (Message("text", "x"),)


@pytest.mark.parametrize("format_", [item for item in ROWS if item is not ConversationFormat.text])
@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
def test_what_the_system_says_stands_in_any_of_its_columns(tmp_path, format_, name):
    said = Message("system", "Be a pirate")
    rest = [message for message in WANTED[format_] if message.role != "system"]
    row = {key: value for key, value in ROWS[format_].items() if key != "system"} | {name: said.content}
    path = save(tmp_path, "jsonl", [row])
    assert str(open_source(path)) == f"{path}: {format_.value} (recognised)"
    assert [message for message in read(path)[0].messages if message.role != "system"] == rest
    assert read(path)[0].messages[0] == said


def test_columns_that_are_not_read_are_named(tmp_path, capsys):
    row = ROWS[ConversationFormat.messages] | {"label": True, "tools": [], "empty": None}
    path = save(tmp_path, "jsonl", [row | {"context": "It says X", "reward": -1.0}])
    assert str(open_source(path)).endswith("messages (recognised; not read: context, reward)")
    many = save(tmp_path, "jsonl", [row | {f"c{number}": number + 1 for number in range(20)}])
    assert str(open_source(many)).endswith("c10, c11, …)")
    named = save(tmp_path, "jsonl", [{"q": "a", "a": "b", "doc": "c"}])
    assert str(open_source(named, columns={"prompt": "q", "completion": "a"})).endswith("(recognised; not read: doc)")
    save(tmp_path, "jsonl", [row])
    (tmp_path / "two.jsonl").write_text(json.dumps(ROWS[ConversationFormat.prompt_completion] | {"topic": "x"}))
    read(tmp_path)
    assert "prompt_completion (recognised; not read: topic)" in capsys.readouterr().err


@pytest.mark.parametrize("first", SUPERVISED)
def test_files_of_different_formats_are_read_together(tmp_path, capsys, first):
    for number, format_ in enumerate([first, *SUPERVISED]):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(ROWS[format_]) + "\n")
    alone = [read(tmp_path / f"{number}.jsonl")[0].messages for number in range(len(SUPERVISED) + 1)]
    capsys.readouterr()
    assert [row.messages for row in read(tmp_path)] == alone
    said = capsys.readouterr().err.splitlines()
    others = [(number, format_) for number, format_ in enumerate(SUPERVISED, 1) if format_ is not first]
    assert said == [
        f"dataset: {tmp_path / f'{number}.jsonl'}: {format_.value} (recognised)" for number, format_ in others
    ]


@pytest.mark.parametrize("order", [1, -1])
def test_files_of_conversations_and_of_texts_are_refused_unless_named(tmp_path, order):
    formats = [ConversationFormat.messages, ConversationFormat.text][::order]
    for number, format_ in enumerate(formats):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(ROWS[format_]) + "\n")
    wrong = rf"1.jsonl:1: is {formats[1].value}, earlier rows are {formats[0].value}.*data.format={formats[0].value}"
    with pytest.raises(DataError, match=wrong):
        read(tmp_path)


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


@pytest.mark.parametrize(
    "first", [{"conversations": []}, {"foo": 1}, [1], {"prompt": "a", "chosen": "b"}, {"text": "a", "role": "user"}]
)
def test_a_first_row_that_is_unusable_says_nothing_of_the_others(tmp_path, first):
    path = save(tmp_path, "jsonl", [first, *[ROWS[ConversationFormat.sharegpt]] * 2])
    with pytest.raises(DataError, match=r"rows.jsonl:1: ") as error:
        open_source(path)
    told = []
    source = open_source(path, skip_bad=True)
    assert source.format is ConversationFormat.sharegpt
    assert [row.source for row in formats.read(source, bad=told.append)] == [f"{path}:2", f"{path}:3"]
    assert str(told[0]) == str(error.value)
    path.write_text(json.dumps(first) + "\n")
    with pytest.raises(DataError, match=re.escape(str(error.value))):
        open_source(path, skip_bad=True)


def test_nothing_left_is_an_error(tmp_path):
    path = save(tmp_path, "jsonl", [turns(("user", "a"))] * 3)
    with pytest.raises(DataError, match=r"none of 3 rows is usable.*data.skip_bad=false"):
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
