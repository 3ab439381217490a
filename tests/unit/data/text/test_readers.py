"""Files: what is in them, where it stands, and what is wrong with them."""

import contextlib
import json
import os
import re
import shutil

import pytest

from finetune.data.text import readers
from finetune.errors import DataError


def rows(path):
    return list(readers.read(path))


def put(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_missing_and_unknown_files_say_what_to_type(tmp_path):
    with pytest.raises(DataError, match=r"there is no .*gone; name your conversations: data.file="):
        readers.files_of(tmp_path / "gone")
    with pytest.raises(DataError, match=r"files are read as .json, .jsonl.*data.file="):
        readers.files_of(put(tmp_path, "a.docx", ""))
    with pytest.raises(DataError, match=r"neither a folder saved by `datasets` nor one with .json"):
        readers.files_of(tmp_path)


@pytest.mark.parametrize("address", ["https://a.b/c.jsonl", "hf://datasets/a/b", "s3:/bucket/a.jsonl"])
def test_addresses_and_packed_files_say_what_to_do(tmp_path, address):
    with pytest.raises(DataError, match=rf"{address} is an address; download the file"):
        readers.files_of(address)
    with pytest.raises(DataError, match=r"a.jsonl.gz is packed; unpack it"):
        readers.files_of(put(tmp_path, "a.jsonl.gz", b""))


def test_litter_and_other_splits_of_a_folder_are_not_read(tmp_path):
    kept = ["1.jsonl", "contest.json", "latest-val-data.csv", "train-00000-of-00002.parquet"]
    others = ["Test.jsonl", "a_dev.csv", "alpaca-val.json", "test_1.jsonl", "validation-00000-of-00001.parquet"]
    litter = ["._1.jsonl", "._train-00000-of-00002.parquet", ".hidden.json", "notes.md", "dataset_info.json"]
    for name in (*kept, *others, *litter):
        put(tmp_path, name, "")
    assert [path.name for path in readers.files_of(tmp_path)] == kept
    assert [path.name for path in readers.held_out_files(tmp_path)] == others
    for other in others:
        assert readers.files_of(tmp_path / other) == (tmp_path / other,)
    for name in kept:
        (tmp_path / name).unlink()
    assert [path.name for path in readers.files_of(tmp_path)] == others, "a folder of them alone is meant"
    assert readers.held_out_files(tmp_path) == ()


ROW = {"messages": [{"role": "user", "content": "a"}]}
OTHERS = {"config.json": {"model_type": "llama", "rope": {"type": 1}}, "package.json": {"name": "x", "files": ["a"]}}


def test_json_about_something_else_is_passed_over_in_a_folder_alone(tmp_path):
    rows_of = {
        "one.json": ROW,
        "by_id.json": {"a": ROW, "b": ROW},
        "list.json": {"data": [ROW]},
        "two.json": [{"q": 1}],
    }
    for name, value in (OTHERS | rows_of).items():
        put(tmp_path, name, json.dumps(value, indent=1))
    lines = put(tmp_path, "lines.json", json.dumps({"q": 1}) + "\n" + json.dumps({"q": 2}))
    broken = put(tmp_path, "broken.json", '\ufeff  {"a": ')
    put(tmp_path, "vocab.json", '\ufeff\n{"a": 1}')
    for name in (".ipynb_checkpoints", "__MACOSX", "empty", "older"):
        (tmp_path / name).mkdir()
        put(tmp_path / name, "1.jsonl" if name != "empty" else "notes.md", "")
    kept = sorted([*(tmp_path / name for name in rows_of), lines, broken])
    assert readers.files_of(tmp_path) == tuple(kept)
    others = tuple(tmp_path / name for name in (*OTHERS, "vocab.json"))
    assert readers.passed_over(tmp_path) == (others, (tmp_path / "older",))
    assert readers.files_of(others[0]) == (others[0],)
    assert readers.passed_over(others[0]) == ((), ())
    for path in kept:
        path.unlink()
    assert readers.files_of(tmp_path) == others, "what is wrong with them is said where they are read"
    assert readers.passed_over(tmp_path)[0] == ()


def test_other_parts_of_a_saved_folder_are_named(tmp_path):
    import datasets

    part = datasets.Dataset.from_list([{"text": "a"}])
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(str(tmp_path / "two"))
    assert readers.held_out_files(tmp_path / "two") == (tmp_path / "two" / "test",)
    assert readers.held_out_files(tmp_path / "two" / "test") == ()


def test_several_paths(tmp_path):
    first, second, odd = (put(tmp_path, name, "") for name in ("b.jsonl", "a.csv", f"a{os.pathsep}b.json"))
    assert readers.files_of(f"{first}{os.pathsep}{second}") == (first, second)
    assert readers.files_of(odd) == (odd,)
    with pytest.raises(DataError, match=r"there is no .*gone.jsonl"):
        readers.files_of(f"{first}{os.pathsep}{tmp_path}/gone.jsonl")


def test_json_arrays_come_as_they_are_written(tmp_path):
    made = [
        {"text": "2009-01-01", "messages": [{"role": "user", "content": "☃ü💥"}, {"weight": 0}]},
        {"text": "007", "b": [1.5, None, True]},
        {"text": [{"mixed": '\\" \u2028'}]},
    ]
    (tmp_path / "a[1]").mkdir()
    for indent, ascii_ in ((None, True), (2, False)):
        path = put(tmp_path, "a[1]/x::a.json", json.dumps(made, indent=indent, ensure_ascii=ascii_))
        assert rows(path) == list(enumerate(made, start=1))


@pytest.mark.parametrize("text", ['{"a": 1}\n{"a": 2}\n', '{\n "a": 1\n}\n{"a": 2}', '\ufeff[{"a": 1},\n{"a": 2}]\n'])
def test_json_that_is_no_plain_array(tmp_path, text):
    assert [value for _, value in rows(put(tmp_path, "a.json", text))] == [{"a": 1}, {"a": 2}]


def test_empty_json(tmp_path):
    assert rows(put(tmp_path, "a.json", " [ ] ")) == rows(put(tmp_path, "b.json", "")) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n{"a": 2', r"a.json:2: is not JSON"),
        ('[{"a": 1},\n\n{"a" 2}, {"b": "' + "x" * 99 + '"}]', r"a.json:3: is not JSON \(Expecting ':'"),
        ('[{"a": 1}\n{"a": 2}]', r"a.json:2: is not JSON \(Expecting ','"),
        ('[\n{"a": "un', r"a.json:2: is not JSON \(Unterminated string"),
        ("[" * 200_000, r"a.json.* is not JSON"),
        ("[" + "1" * 5000 + "]", r"a.json: is not JSON \(Exceeds the limit"),
    ],
)
def test_broken_json_names_the_line(tmp_path, text, message):
    with pytest.raises(DataError, match=message + ".* holds one array of objects") as caught:
        rows(put(tmp_path, "a.json", text))
    assert "\n" not in str(caught.value)


def test_broken_json_lines_name_the_line_and_the_rest_is_read(tmp_path):
    found = rows(put(tmp_path, "a.jsonl", '\ufeff{"a": "x\u2028y"}\r\n\n{"a": \n{"b": 1}\n' + "[" * 100_000))
    assert [number for number, _ in found] == [1, 3, 4, 5]
    assert found[0][1] == {"a": "x\u2028y"}
    assert "a.jsonl:3: is not JSON (Expecting value, column 8); every line must be one object" in str(found[1][1])
    assert "a.jsonl:5: is not JSON" in str(found[3][1])


def test_a_key_twice_is_named_and_of_json_lines_the_rest_is_read(tmp_path):
    found = rows(put(tmp_path, "a.jsonl", '{"a": "1"}\n{"a": "1", "b": {"c": 1, "c": 2}}\n{"b": 1}\n'))
    assert [number for number, _ in found] == [1, 2, 3]
    assert f'{tmp_path}/a.jsonl:2: has the key "c" twice in one object (column 26); keep one of' in str(found[1][1])
    for name, text in (("a.json", '[{"a": 1},\n{"a": 1,\n"a": 2}]'), ("b.json", '{"a": 1}\n{\n"a": 1, "a": 2}')):
        with pytest.raises(DataError, match=rf'{name}:3: has the key "a" twice in one object \(column \d\); keep'):
            rows(put(tmp_path, name, text))


def test_a_column_twice_is_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    turn = pyarrow.StructArray.from_arrays([pyarrow.array(["user"]), pyarrow.array(["x"])], names=["role", "role"])
    turns = pyarrow.ListArray.from_arrays([0, 1], turn)
    for columns, names, twice in (([[1], [2]], ["text", "text"], "text"), ([["x"], turns], ["text", "turns"], "role")):
        table = pyarrow.table([pyarrow.array(column) for column in columns], names=names)
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(DataError, match=rf"a.parquet: has two columns called {twice}; give one another name"):
            rows(tmp_path / "a.parquet")
        saved = tmp_path / f"saved-{twice}"
        saved.mkdir()
        with pyarrow.OSFile(str(saved / "data.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as out:
            out.write_table(table)
        (saved / "state.json").write_text("{}")
        with pytest.raises(DataError, match=rf"data.arrow: has two columns called {twice}; give one another name"):
            rows(saved)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_wrong_encodings_name_the_line_and_the_byte(tmp_path, name):
    head = {"a.jsonl": b'{"text": "\xc3\xbc"}\n{"text": "', "a.json": b'[{"text": "\xc3\xbc"},\n{"text": "'}.get(
        name, b"text\n"
    )
    path = put(tmp_path, name, head + "Grüße".encode("latin-1") + b'"}')
    byte = len(head.split(b"\n")[1]) + 3
    message = rf"{name}:2: byte {byte} of the line is not UTF-8 \(0xfc\); save the file as UTF-8"
    if name == "a.jsonl":  # the next line can still be found
        assert re.search(message, str(rows(path)[1][1]))
    else:
        with pytest.raises(DataError, match=message):
            rows(path)


def test_utf16_is_named_at_its_first_byte(tmp_path):
    [(_, error), *_] = rows(put(tmp_path, "a.jsonl", '{"a": 1}'.encode("utf-16")))
    assert "a.jsonl:1: byte 1 of the line is not UTF-8 (0xff)" in str(error)
    with pytest.raises(DataError, match=r"a.json:1: byte 9 of the line is not UTF-8"):
        rows(put(tmp_path, "a.json", b'[{"a": "\xc3'))


def test_csv_of_spreadsheets(tmp_path):
    path = put(tmp_path, "a.csv", '\ufeffprompt;completion\r\n"a;\r\nb";"say ""x"""\r\n\r\nc;d\r\n')
    assert rows(path) == [
        (2, {"prompt": "a;\r\nb", "completion": 'say "x"'}), (5, {"prompt": "c", "completion": "d"})
    ]  # fmt: skip
    assert rows(put(tmp_path, "b.tsv", "a\tb\n1\t2,3\n")) == [(2, {"a": "1", "b": "2,3"})]
    assert rows(put(tmp_path, "d.csv", "a,b\n007,NA\n,2009-01-01\n")) == [
        (2, {"a": "007", "b": "NA"}), (3, {"a": "", "b": "2009-01-01"})
    ]  # fmt: skip
    long = "x" * 300_000
    assert rows(put(tmp_path, "c.csv", f"a,b\n{long},1\n"))[0][1]["a"] == long


def test_broken_csv_names_the_line(tmp_path):
    found = rows(put(tmp_path, "a.csv", "a,b\n1,2\n3\n4,5\n"))
    assert found[0] == (2, {"a": "1", "b": "2"})
    assert found[2] == (4, {"a": "4", "b": "5"})
    assert "a.csv:3: has 1 cell for 2 columns; put double quotes" in str(found[1][1])
    with pytest.raises(DataError, match=r"a.csv:3: is not CSV \(.*\); put double quotes"):
        rows(put(tmp_path, "a.csv", 'a,b\n1,2\n"3"x,4\n'))


def test_broken_parquet_and_saved_folders(tmp_path):
    with pytest.raises(DataError, match=r"a.parquet: is no readable Parquet file"):
        rows(put(tmp_path, "a.parquet", b"PAR1nothing"))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"saved: can't be loaded by `datasets`"):
        rows(tmp_path / "saved")


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_changed_byte_is_damage_or_another_row(tmp_path, kind):
    import datasets

    stored = datasets.Dataset.from_list([{"text": "ünd so weiter"}] * 3)
    (tmp_path / "whole").mkdir()
    stored.to_parquet(tmp_path / "whole" / "a.parquet")
    stored.save_to_disk(str(tmp_path / "whole" / "saved"))
    for name in ("a.parquet",) if kind == "parquet" else ("saved/data-00000-of-00001.arrow", "saved/state.json"):
        data = (tmp_path / "whole" / name).read_bytes()
        changed = [data[:at] + bytes([data[at] ^ 0x80]) + data[at + 1 :] for at in range(0, len(data), 6)]
        for number, content in enumerate([*changed, data.replace("ü".encode(), b"\xff\xff")]):
            copy = tmp_path / f"{number}-{kind}"  # of its own: what is mapped into memory must not change
            shutil.copytree(tmp_path / "whole", copy, dirs_exist_ok=True)
            (copy / name).write_bytes(content)
            with contextlib.suppress(DataError):
                rows(copy / name.partition("/")[0])
        if b"\xff\xff" in content:
            with pytest.raises(DataError, match=r"can't decode|Invalid UTF8"):
                rows(copy / name.partition("/")[0])


def test_parts_of_a_saved_folder(tmp_path):
    import datasets

    part = datasets.Dataset.from_list([{"text": "a"}])
    other = datasets.Dataset.from_list([{"text": "b"}])
    for names, wanted in ((("test", "train"), "b"), (("only",), "a")):
        path = tmp_path / "-".join(names)
        datasets.DatasetDict(dict(zip(names, [part, other], strict=False))).save_to_disk(str(path))
        assert rows(path) == [(1, {"text": wanted})]
    datasets.DatasetDict({"a": part, "b": other}).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(DataError, match=r"has the parts a, b and none is called train; name one: data.file=.*two/a"):
        rows(tmp_path / "two")
    assert rows(tmp_path / "two" / "b") == [(1, {"text": "b"})]


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(DataError, match=r"can't be read \(No such file"):
        rows(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match=r"can't be read \(No such file"):
        readers.content_hash((tmp_path / "gone.jsonl",))


def test_the_hash_is_of_content_not_of_names(tmp_path):
    first, same, other = (
        put(tmp_path, name, text) for name, text in (("a.json", "x"), ("b.json", "x"), ("c.json", "y"))
    )
    assert readers.content_hash((first,)) == readers.content_hash((same,)) != readers.content_hash((other,))
    assert readers.content_hash((first, other)) != readers.content_hash((other, first))


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_line_without_end_is_not_read_whole(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(readers, "LINE_BYTES", 64)
    file = tmp_path / f"chats.{suffix}"
    file.write_bytes(b'{"text": "a"}\n' + bytes(100))
    with pytest.raises(DataError, match=rf"{file}:2: is longer than"):
        list(readers.read(file))


def test_json_that_is_too_large_to_be_read_whole(tmp_path):
    file = tmp_path / "chats.json"
    with open(file, "wb") as stream:
        stream.truncate(readers.JSON_BYTES + 1)
    with pytest.raises(DataError, match="save it as JSON lines"):
        list(readers.read(file))
