"""A whole set: cached by content, in parallel, in constant memory, split and counted."""

import dataclasses
import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import psutil
import pytest
from filelock import FileLock

from finetune.config.schema import LongRows
from finetune.data.text import store, workers
from finetune.data.text.formats import Conversation, Message, open_source
from finetune.data.text.tokens import Chat, Encoded, preview_row
from finetune.errors import DataError, RunError
from tests import chat_templates as templates
from tests.chat_templates import tokenizer
from tests.conftest import ROOT

VOCABULARY = [f"word{number}" for number in range(300)]


def turns(draw, words=12):
    text = " ".join(draw.choice(VOCABULARY) for _ in range(words))
    return {"messages": [{"role": "user", "content": f"What is {text}?"}, {"role": "assistant", "content": text}]}


def save(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


@pytest.fixture
def chat():
    return Chat(tokenizer(templates.CHATML))


@pytest.fixture
def data(tmp_path):
    draw = random.Random(0)
    return save(tmp_path / "chat.jsonl", [turns(draw) for _ in range(60)])


@pytest.fixture
def prepare(tmp_path, chat):
    def call(path, **options):
        options = {"length": 256, "long_rows": LongRows.refuse, "workers": 1, "cache": tmp_path / "cache"} | options
        return store.encode_or_load(open_source(path), options.pop("chat", chat), **options)

    return call


def content(found):
    return [(found[index].ids.tolist(), found[index].trained.tolist()) for index in range(len(found))]


def test_rows_are_what_encoding_one_by_one_gives(prepare, data, chat):
    found = prepare(data)
    assert (len(found), found.cached, found.figures.conversations) == (60, False, 60)
    for index, line in enumerate(data.read_text().splitlines()):
        messages = tuple(Message(**turn) for turn in json.loads(line)["messages"])
        alone = chat.encode(Conversation(messages, "f:1"))
        assert found[index].ids.tolist() == alone.ids.tolist()
        assert found[index].ids.dtype == np.uint32
        assert found[index].trained.tolist() == alone.trained.tolist()
        assert found.lengths[index] == len(alone.ids)
        assert found.trained[index] == alone.trained.sum()
        assert found.conversation_index(index) == index
    assert "⟦" in preview_row(chat.tokenizer, found[0])
    for bad in (60, -1):
        with pytest.raises(IndexError):
            found[bad]
    again = pickle.loads(pickle.dumps(found))
    assert content(again) == content(found)
    assert len(pickle.dumps(found)) < 2000, "it travels as its folder"
    [line] = found.figures.lines()
    assert line.startswith(
        f"60 conversations as 60 rows of {found.lengths.sum():,} tokens, {found.trained.sum():,} trained ("
    )


def test_the_cache_is_by_content(prepare, data, tmp_path):
    first = prepare(data)
    assert prepare(data).cached
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(data.read_bytes())
    os.utime(moved, (0, 0))
    assert prepare(moved).cached, "neither path nor time counts"
    assert content(prepare(moved)) == content(first)
    changed = save(tmp_path / "changed.jsonl", [turns(random.Random(1))])
    other = Chat(tokenizer(templates.CHATML, eos="<|im_end|>"))
    assert not prepare(changed).cached
    for options in ({"length": 300}, {"long_rows": LongRows.split}, {"skip_bad": True}, {"chat": other},
                    {"chat": Chat(tokenizer(templates.PHI))}):  # fmt: skip
        assert not prepare(data, **options).cached
    folders = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert len(folders) == 7
    assert all(path.name.startswith("rows-") for path in folders), "nothing half-made stays"


@pytest.mark.parametrize("name", [*(f"{name}.bin" for name in store.COLUMNS), store.METADATA])
@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_damaged_caches_are_made_again(prepare, data, name, damage):
    first = content(prepare(data))
    path = prepare(data).folder / name
    whole = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(whole[:-1])
    else:
        whole[len(whole) // 2] ^= 255
        path.write_bytes(whole)
    again = prepare(data)
    assert not again.cached
    assert content(again) == first
    assert prepare(data).cached


def test_a_killed_run_leaves_nothing_that_counts(prepare, data, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(store, "encode_stream", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare(data)
    assert not prepare(data).cached


def whole(data):
    """Nothing is wrong with what a killed command left."""


def written_after_the_note(data):
    with open(data, "ab") as file:
        file.write(b"more")


def damaged(data):
    data.write_bytes(b"X" + data.read_bytes()[1:])


@pytest.mark.parametrize(("change", "batches"), [(whole, 9), (written_after_the_note, 9), (damaged, 15)])
def test_a_killed_command_goes_on_with_the_rows_that_it_has(prepare, tmp_path, monkeypatch, change, batches):
    draw = random.Random(0)
    rows = [{"messages": []} if number == 30 else turns(draw) for number in range(61)]
    path, given = save(tmp_path / "chat.jsonl", rows), []
    monkeypatch.setattr(workers, "BATCH", 4)
    plain = prepare(path, skip_bad=True, cache=tmp_path / "plain")

    def stopped(self, rows):
        given.append(len(rows))
        if len(given) == 7:
            raise KeyboardInterrupt
        return encode(self, rows)

    with monkeypatch.context() as patched:
        encode = Chat.encode_batch
        patched.setattr(Chat, "encode_batch", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepare(path, skip_bad=True)
        change(next(tmp_path.glob("cache/.rows-*.partial/tokens.bin")))
        given.clear()
        patched.setattr(Chat, "encode_batch", lambda self, rows: given.append(len(rows)) or encode(self, rows))
        found = prepare(path, skip_bad=True)
    assert len(given) == batches
    assert content(found) == content(plain)
    assert dataclasses.replace(found.figures, seconds=0) == dataclasses.replace(plain.figures, seconds=0)
    assert [found.conversation_index(index) for index in range(60)] == list(range(60))
    assert store.open_store(found.folder, verify=True).cached
    assert not list(tmp_path.glob("cache/.rows-*.partial"))


def test_rows_that_end_in_an_error_leave_nothing(prepare, tmp_path, data):
    with pytest.raises(DataError):
        prepare(save(tmp_path / "bad.jsonl", [turns(random.Random(0)), {"messages": []}]))
    assert not list(tmp_path.glob("cache/.rows-*.partial"))


def test_what_nobody_went_on_with_for_a_week_is_removed(prepare, tmp_path, data):
    old, young = (tmp_path / "cache" / f".rows-{name}.partial" for name in ("old", "young"))
    for folder in (old, young):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    prepare(data)
    assert [old.exists(), young.exists()] == [False, True]


def test_what_killed_runs_of_other_sets_left_is_removed_and_what_is_being_written_is_not(prepare, data, tmp_path):
    left, written = tmp_path / "cache" / ".rows-1.tmp", tmp_path / "cache" / ".rows-2.tmp"
    for folder in (left, written):
        folder.mkdir(parents=True)
        (folder / "tokens.bin").write_bytes(b"half")
    with FileLock(tmp_path / "cache" / ".rows-2.lock"):
        prepare(data)
    assert not left.exists()
    assert written.exists()


def test_two_at_once_make_it_once(prepare, data):
    found = []
    threads = [threading.Thread(target=lambda: found.append(prepare(data))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(item.cached for item in found) == [False, True, True, True]


def test_processes_change_nothing(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "BATCH", 16)
    monkeypatch.setattr(workers, "SEQUENTIAL", 1)
    draw = random.Random(2)
    path = save(tmp_path / "many.jsonl", [turns(draw, draw.randrange(1, 40)) for _ in range(200)])
    options = {"long_rows": LongRows.split, "length": 64}
    alone = prepare(path, **options)
    together = prepare(path, **options, workers=3, cache=tmp_path / "other")
    assert not together.cached
    for name in store.COLUMNS:
        assert (alone.folder / f"{name}.bin").read_bytes() == (together.folder / f"{name}.bin").read_bytes()
    plain = [figures.__dict__ | {"seconds": 0} for figures in (alone.figures, together.figures)]
    assert plain[0] == plain[1]


def test_errors_of_other_processes_arrive(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "BATCH", 4)
    monkeypatch.setattr(workers, "SEQUENTIAL", 1)
    draw = random.Random(3)
    path = save(tmp_path / "long.jsonl", [turns(draw, 500 if index == 21 else 5) for index in range(40)])
    with pytest.raises(DataError, match=r"long.jsonl:22: has \d+ tokens, 256 fit"):
        prepare(path, workers=2)


class Broken:
    """A chat that fails in a worker; `how` is what it does there."""

    tokenizer = types.SimpleNamespace(bos_token_id=None)

    def __init__(self, how):
        self.how = how

    def encode_batch(self, rows):
        if multiprocessing.parent_process() is None:
            return [Encoded(np.arange(3, dtype=np.uint32), np.arange(3) > 0)] * len(rows)
        return self.how(3)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (os._exit, "a tokenising process ended by itself .*data.workers=1"),
        (len, "tokenising failed with TypeError: .*data.workers=1"),
    ],
)
def test_workers_that_die_or_fail_are_reported(monkeypatch, how, message):
    monkeypatch.setattr(workers, "BATCH", 4)
    monkeypatch.setattr(workers, "SEQUENTIAL", 1)
    rows = [Conversation((Message("user", "a"),), f"f:{number}") for number in range(100)]
    settings = workers.EncodeSettings(Broken(how), length=8, long_rows=LongRows.refuse, skip_bad=False)
    with pytest.raises(RunError, match=message):
        list(workers.encode_stream(rows, settings, processes=2))
    assert multiprocessing.active_children() == []


UNGUARDED = """
import sys
from finetune.data.text import store, workers
from finetune.data.text.tokens import Chat
from tests import chat_templates
from pathlib import Path

print("the script runs", flush=True)
workers.BATCH, workers.SEQUENTIAL = 4, 1
found = store.encode_or_load(
    store.formats.open_source(Path(sys.argv[1])), Chat(chat_templates.tokenizer(chat_templates.CHATML)),
    cache=Path(sys.argv[2]), length=256, long_rows=store.LongRows.refuse, workers=2,
)
print(len(found))
"""


def script(tmp_path, data):
    (tmp_path / "unguarded.py").write_text(UNGUARDED)
    words = [sys.executable, str(tmp_path / "unguarded.py"), str(data), str(tmp_path / "cache")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


@pytest.mark.exhaustive
def test_a_script_without_a_main_guard_runs_once(tmp_path, data):
    output, errors = script(tmp_path, data).communicate(timeout=60)
    assert output.split("\n") == ["the script runs", "60", ""], errors


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("number", "to_all"), [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGKILL, False)]
)
def test_workers_end_with_their_parent(tmp_path, number, to_all):
    draw = random.Random(9)
    data = save(tmp_path / "many.jsonl", [turns(draw)] * 100_000)
    parent = script(tmp_path, data)
    workers_ = wait_for(lambda: [each for each in psutil.Process(parent.pid).children() if each.cpu_times().user > 1])
    os.killpg(parent.pid, number) if to_all else parent.send_signal(number)
    parent.communicate(timeout=20)
    assert parent.returncode != 0
    wait_for(lambda: not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in workers_))


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("it took too long")


@pytest.mark.parametrize(
    ("policy", "rows_", "lost"),
    [("keep_end", 3, True), ("keep_start", 3, True), ("split", 5, False), ("drop", 2, True)],
)
def test_long_rows_by_choice_and_the_loss_is_told(prepare, tmp_path, policy, rows_, lost):
    long = {"messages": [{"role": "user", "content": "hi!"}, {"role": "assistant", "content": "One two three. " * 40}]}
    short = {"messages": [{"role": "user", "content": "hi!"}, {"role": "assistant", "content": "One two."}]}
    path = save(tmp_path / "a.jsonl", [short, long, short])
    found = prepare(path, length=64, long_rows=LongRows[policy])
    assert (found.lengths <= 64).all()
    assert (found.trained > 0).all()
    assert (len(found) >= rows_, found.figures.long) == (True, 1)
    assert found.conversation_index(len(found) - 1) == 2
    assert found.figures.whole > found.figures.trained
    if policy == "drop":
        assert found.figures.truncated_share == 1 - found.trained.sum() / found.figures.whole
        assert found.figures.truncated_share > 0.8
    assert (found.figures.truncated_share > 0.05) == lost
    assert f"warning: 1 row over the length; {found.figures.truncated_share:.2%} of trained tokens are lost" in str(
        found.figures.lines()
    )


def test_bad_rows_left_out_are_counted_and_shown(prepare, tmp_path):
    good = turns(random.Random(0))
    system = {"messages": [{"role": "system", "content": "x"}, *good["messages"]]}
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(["{broken", json.dumps(good), json.dumps(system), json.dumps(good)]))
    chat = Chat(tokenizer(templates.GEMMA))
    with pytest.raises(DataError, match=r"a.jsonl:1: is not JSON"):
        prepare(path, chat=chat)
    found = prepare(path, chat=chat, skip_bad=True)
    assert (found.figures.bad, found.figures.conversations, len(found)) == (2, 4, 2)
    lines = "\n".join(found.figures.lines())
    assert "warning: left out 2 unusable rows, such as:" in lines
    assert "a.jsonl:1: is not JSON" in lines
    assert "a.jsonl:3: the chat template refuses it (System role not supported)" in lines
    assert "data.skip_bad" not in lines  # it is on
    assert found.conversation_index(1) == 2
    assert found.duplicates() == 1


def test_shortened_answers_and_control_tokens_are_told(prepare, tmp_path):
    thought = {"role": "assistant", "content": "<think>Let me see.</think>\n\nblue </s>"}
    ask = {"role": "user", "content": "hi!"}
    path = save(tmp_path / "a.jsonl", [{"messages": [ask, thought, ask, {"role": "assistant", "content": "bye"}]}])
    lines = prepare(path, chat=Chat(tokenizer(templates.QWEN3))).figures.lines()
    assert lines[1:] == [
        "warning: the chat template leaves out a part of 1 answer",
        "warning: messages contain 1 control token as text, which is tokenised as such",
    ]


def test_nothing_left_is_an_error(prepare, tmp_path, data):
    with pytest.raises(
        DataError, match=r"nothing is left of 60 rows: 0 are unusable, of 60 no trained token is within 8"
    ):
        prepare(data, length=8, long_rows=LongRows.keep_start)
    gemma = Chat(tokenizer(templates.GEMMA))
    bad = save(
        tmp_path / "b.jsonl", [{"messages": [{"role": "system", "content": "x"}, *turns(random)["messages"]]}] * 2
    )
    with pytest.raises(
        DataError, match=r"nothing is left of 2 rows: 2 are unusable.*System role not supported.*data.length"
    ):
        prepare(bad, chat=gemma, skip_bad=True)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_an_unusable_cache_says_what_to_type(prepare, data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot use the cache .*file/cache.*data.cache=FOLDER"):
        prepare(data, cache=tmp_path / "file" / "cache")


def test_the_split_is_by_content_and_stable(prepare, tmp_path):
    draw = random.Random(4)
    made = [turns(draw) for _ in range(400)]
    small = prepare(save(tmp_path / "a.jsonl", made[:300]))
    large = prepare(save(tmp_path / "b.jsonl", [*made[350:], *made[:350], *made[:100]]))

    def held_out(found, share=0.1):
        train, held = found.split(share)
        assert sorted([*train, *held]) == list(range(len(found)))
        return {tuple(found[index].ids.tolist()) for index in held}, {
            tuple(found[index].ids.tolist()) for index in train
        }

    first, rest = held_out(small)
    second, others = held_out(large)
    assert 15 <= len(first) <= 50
    assert first < second
    assert not second & others, "equal conversations are on one side"
    assert not rest & second
    assert held_out(small, 0.0)[0] == set()
    assert held_out(small, 0.1)[0] < held_out(small, 0.3)[0]
    assert large.duplicates() == 100
    assert small.duplicates() == 0


def test_small_sets_and_sets_of_equals(prepare, tmp_path):
    draw = random.Random(5)
    assert len(prepare(save(tmp_path / "a.jsonl", [turns(draw) for _ in range(19)])).split(0.5)[1]) == 0
    twenty = prepare(save(tmp_path / "b.jsonl", [turns(draw) for _ in range(20)]))
    assert len(twenty.split(1e-9)[1]) == 1, "one is held out at least"
    equals = prepare(save(tmp_path / "c.jsonl", [turns(draw)] * 30))
    assert [len(part) for part in equals.split(0.5)] == [30, 0]
    assert equals.duplicates() == 29


def test_pieces_of_a_row_are_on_one_side(prepare, tmp_path):
    draw = random.Random(6)
    path = save(tmp_path / "a.jsonl", [turns(draw, 40) for _ in range(60)])
    found = prepare(path, length=64, long_rows=LongRows.split)
    train, held = ({found.conversation_index(index) for index in part} for part in found.split(0.2))
    assert held
    assert not train & held
    assert found.duplicates() == 0


@pytest.mark.exhaustive
def test_memory_does_not_grow_with_the_set(tmp_path):
    """Peak memory of a fresh process, over a file of 5 MB and one of 30."""
    draw = random.Random(8)
    block = "".join(json.dumps(turns(draw) | {"note": "x" * 2000}) + "\n" for _ in range(500))
    peaks = []
    for times in (4, 24):
        path = tmp_path / f"{times}.jsonl"
        path.write_text(block * times)
        script = (
            "import re, sys, pathlib; from finetune.data.text import store; from tests import chat_templates as t\n"
            "from finetune.data.text.tokens import Encoded, Chat\nimport numpy as np\n"
            "chat = Chat(t.tokenizer(t.CHATML_MARKED)); ids = np.arange(90, dtype=np.uint32)\n"
            "row = Encoded(ids, ids > 5)\n"
            "Chat.encode_batch = lambda self, rows: [row] * len(rows)  # the rest of the way is what is looked at\n"
            "path = pathlib.Path(sys.argv[1])\n"
            "found = store.encode_or_load(store.formats.open_source(path), chat, cache=path.parent / 'cache', "
            "length=128, long_rows=store.LongRows.refuse, workers=1)\n"
            "peak = re.search(r'VmHWM:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1]\n"
            "print(len(found), peak)"
        )
        output = subprocess.run(
            [sys.executable, "-c", script, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        count, peak = map(int, output.stdout.split())
        assert count == 500 * times
        peaks.append(peak / 1024)
    assert peaks[1] - peaks[0] < 6, f"{peaks} MiB"


def test_what_killed_processes_left_goes_and_what_others_write_stays(prepare, data, tmp_path):
    cache = tmp_path / "cache"
    left, written = cache / ".rows-1.tmp", cache / ".rows-2.tmp"
    for folder in (left, written):
        folder.mkdir(parents=True)
        (folder / "tokens.bin").write_bytes(b"half")
    with FileLock(cache / ".rows-2.lock"):
        prepare(data)
    assert not left.exists()
    assert (written / "tokens.bin").exists()


def test_a_look_ends_in_time_and_keeps_nothing(tmp_path, chat):
    draw = random.Random(5)
    source = open_source(save(tmp_path / "c.jsonl", [turns(draw) for _ in range(2 * workers.BATCH)]))
    options = {"length": 256, "long_rows": LongRows.refuse, "skip_bad": False}
    assert store.look(source, chat, **options, seconds=0) == workers.BATCH
    assert store.look(source, chat, **options, seconds=60) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_a_look_says_what_encoding_says(prepare, tmp_path, chat):
    draw = random.Random(6)
    path = save(tmp_path / "c.jsonl", [turns(draw), {"messages": 1}])
    for options in ({"skip_bad": False, "length": 256}, {"skip_bad": True, "length": 4}):
        with pytest.raises(DataError) as encoded:
            prepare(path, long_rows=LongRows.keep_start, **options)
        with pytest.raises(DataError) as looked:
            store.look(open_source(path), chat, long_rows=LongRows.keep_start, seconds=60, **options)
        assert str(looked.value) == str(encoded.value)
