"""Two processes of one run: how they communicate, and that their steps are those of a single one."""

import itertools
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.config.schema import Device, Precision
from finetune.errors import DataError, FinetuneError, Interrupted, RunError
from finetune.memory.device import pick_device
from finetune.run import ranks
from finetune.run.signals import Stop, catch_stop
from finetune.training import distributed
from finetune.training.accelerator import build_accelerator, prepare
from finetune.training.loop import Step, fit
from finetune.training.oom import OomFallbacks
from finetune.training.reduction import broadcast_start
from finetune.training.task import Batch, Draw
from tests.conftest import Answer
from tests.ports import free_port

MICRO_BATCH = 2
STEPS = (8, 5, 1, 4)  # examples of each step: even shares, uneven ones, none for the second process
STOPPED = 3  # the step in which the second process gets a signal


class Line:
    """A task as small as can be: a line through points, of which every third counts twice."""

    def __init__(self, out_of_memory: bool = False) -> None:
        torch.manual_seed(1 + ranks.rank())  # the first one's weights have to come to count
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        self.unused = nn.Parameter(torch.ones(2))
        self.out_of_memory = out_of_memory

    def split(self, draws: Sequence[Draw], micro_batch: int) -> list[Sequence[Draw]]:
        return [draws[first : first + micro_batch] for first in range(0, len(draws), micro_batch)]

    def collate(self, draws: Sequence[Draw]) -> Batch:
        points = torch.stack([torch.randn(3, generator=torch.Generator().manual_seed(key)) for key, _ in draws])
        weights = torch.tensor([1 + (key % 3 == 0) for key, _ in draws])
        names = tuple(str(key) for key, _ in draws)
        return Batch({"x": points, "w": weights}, int(weights.sum()), names, count=len(draws), padded_count=len(draws))

    def loss(self, batch: Batch) -> Tensor:
        if self.out_of_memory and len(batch.names) > 1:
            raise torch.OutOfMemoryError("out of memory")
        error_B = (self.model(batch.tensors["x"]).squeeze(1) - 3).square()
        return (error_B * batch.tensors["w"]).sum() / (not any(name == "666" for name in batch.names))


def steps_of(line: Any, stop: Stop, *, dropout: bool = True, keys: Sequence[int] | None = None) -> Iterator[Step]:
    """Each process on its share of STEPS, or of one step of these keys."""
    accelerator = build_accelerator(Precision.fp32, torch.device("cpu"))
    assert accelerator.num_processes == ranks.world_size()
    if not dropout:
        line.model[1].p = 0.0
    optimizer = torch.optim.AdamW([*line.model.parameters(), line.unused], lr=0.1, eps=1e-3)
    line.model, optimizer = prepare(accelerator, line.model, optimizer)
    numbers = itertools.count()
    planned = [keys] if keys else [[next(numbers) for _ in range(count)] for count in STEPS]

    def mine() -> Iterator[list[Draw]]:
        for number, step in enumerate(planned, 1):
            if number == STOPPED and ranks.rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            parts = line.split([(key, 0) for key in step], MICRO_BATCH)
            yield list(itertools.chain(*parts[ranks.rank() :: ranks.world_size()]))

    yield from fit(
        line,
        mine(),
        optimizer,
        lambda _: 0.1,
        accelerator,
        fallbacks=OomFallbacks(MICRO_BATCH, lambda: None, "try less"),
        seed=0,
        start=0,
        clip_norm=1.0,
        max_bad_steps=9,
        stop=stop,
    )


def trained(dropout: bool = True, out_of_memory: bool = False) -> dict[str, Any]:
    """What the steps were, and the weights after them."""
    line = Line(out_of_memory)
    seen: dict[str, Any] = {"loss": [], "count": [], "fallbacks": [], "stopped": []}
    with catch_stop() as stop:
        for step in steps_of(line, stop, dropout=dropout):
            seen["loss"].append(step.loss)
            seen["count"].append(step.count)
            seen["fallbacks"].append(step.oom_fallbacks)
            seen["stopped"].append(stop.number)
    weights = [parameter.flatten().tolist() for parameter in line.model.parameters()]
    return {**seen, "weights": weights, "unused": line.unused.tolist()}


def skip_reason() -> str | None:
    """Of a step of which the second process has the bad example."""
    return next(iter(steps_of(Line(), Stop(), keys=[1, 2, 666, 4]))).skip_reason


def broken() -> None:
    """Steps of which the second process can't read an example, while the first one is in the reduction."""
    line = Line()
    if ranks.rank() == 1:
        line.collate = lambda draws: fail(1, DataError("no such image"))()  # type: ignore[method-assign]
    list(steps_of(line, Stop()))


class Odd(Exception):
    """Does not keep its constructor's arguments, so that it can't be made again elsewhere."""

    def __init__(self, message: str, _number: int) -> None:
        super().__init__(message)


def error_of(work: Callable[[], object]) -> str:
    """The error in which a run ends, as this process sees it."""
    try:
        with distributed.process_group():
            work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def fail(index: int, error: Exception) -> Callable[[], object]:
    """Work in which one process fails, while the others are in a wait of one sort or another."""

    def work() -> object:
        if ranks.rank() == index:
            raise error
        return distributed.gather(1)

    return work


def join(index: int, port: int) -> None:
    """Say what a launcher would."""
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)


def take_part(index: int, port: int, folder: str) -> None:
    """One of two processes; writes what it saw."""
    join(index, port)
    with distributed.process_group():
        seen: dict[str, Any] = {
            "first": distributed.on_first_rank(lambda: ranks.rank()),
            "gathered": distributed.gather(f"I am {index}"),
            "trained": trained(),
            "out of memory": trained(dropout=False, out_of_memory=index == 1),
            "skipped": skip_reason(),
        }
    seen["from the second"] = error_of(fail(1, DataError("a bad image")))
    seen["from the first"] = error_of(lambda: distributed.on_first_rank(lambda: fail(0, FinetuneError("no disk"))()))
    seen["interrupted"] = error_of(fail(0, Interrupted("by hand", 2)))
    seen["odd"] = error_of(fail(0, Odd("by hand", 2)))
    seen["in a step"] = error_of(broken)  # the last: the first process leaves a reduction unfinished
    Path(folder, f"{index}.json").write_text(json.dumps(seen))


def be_killed(index: int, port: int, folder: str) -> None:
    """One of two processes, of which the second one ends without a word."""
    join(index, port)
    with distributed.process_group():
        build_accelerator(Precision.fp32, torch.device("cpu"))
        broadcast_start([nn.Parameter(torch.ones(2))])
        if index == 1:
            os._exit(0)
        try:
            broadcast_start([nn.Parameter(torch.ones(2))])
        except RunError as error:
            Path(folder, "error").write_text(str(error))


def leave(index: int, port: int, folder: str) -> None:
    """One of two processes, of which the first one fails and is gone at once, with what they speak through."""
    join(index, port)
    Path(folder, str(index)).write_text(error_of(fail(0, DataError("no images"))))
    os._exit(0)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes saw."""
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(take_part, (free_port(), str(folder)), nprocs=2)
    return [json.loads((folder / f"{index}.json").read_text()) for index in range(2)]


@pytest.mark.exhaustive
def test_the_first_process_works_for_all_and_values_of_all_are_gathered(two: list[dict[str, Any]]) -> None:
    assert [seen["first"] for seen in two] == [0, 0]
    assert [seen["gathered"] for seen in two] == [["I am 0", "I am 1"]] * 2


def test_an_error_in_one_is_raised_in_all(two: list[dict[str, Any]]) -> None:
    for seen in two:
        assert seen["from the second"] == "DataError: a bad image"
        assert seen["in a step"] == "DataError: no such image"
        assert seen["from the first"] == "FinetuneError: no disk"
        assert seen["interrupted"] == "Interrupted: by hand"
    assert two[0]["odd"] == "Odd: by hand"
    assert two[1]["odd"] == "RuntimeError: Odd: by hand"


def test_a_killed_process_ends_the_others_with_an_error(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(be_killed, (free_port(), str(tmp_path)), nprocs=2)
    assert "another process was killed" in (tmp_path / "error").read_text()


def test_an_error_is_heard_before_the_first_process_is_gone(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(leave, (free_port(), str(tmp_path)), nprocs=2)
    assert [(tmp_path / str(index)).read_text() for index in range(2)] == ["DataError: no images"] * 2


def same(two: dict[str, Any], one: dict[str, Any]) -> None:
    assert two["count"] == one["count"] == list(STEPS)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    for mine, whole in zip(two["weights"], one["weights"], strict=True):
        assert mine == pytest.approx(whole, rel=1e-4, abs=1e-6)
    assert two["unused"] == [1, 1]  # no gradient, and so no decay of weights either


def test_two_take_the_steps_of_one_whatever_each_has_to_do(two: list[dict[str, Any]]) -> None:
    one = trained()
    for seen in two:
        same(seen["trained"], one)
    assert two[0]["trained"]["weights"] == two[1]["trained"]["weights"]


def test_out_of_memory_in_one_is_reported_by_all_and_changes_nothing(two: list[dict[str, Any]]) -> None:
    one = trained(dropout=False)  # whose masks are drawn for each micro-batch
    for seen in two:
        same(seen["out of memory"], one)
        assert seen["out of memory"]["fallbacks"] == [["micro-batch 1"], [], [], []]


def test_a_signal_to_one_ends_all_after_the_same_step(two: list[dict[str, Any]]) -> None:
    for seen in two:
        assert seen["trained"]["stopped"] == [None, None, signal.SIGTERM, signal.SIGTERM]


def test_a_skipped_step_names_the_examples_of_all(two: list[dict[str, Any]]) -> None:
    for seen in two:
        assert seen["skipped"].endswith("in fp32 on 1; 2; 666 and 1 more")


def test_a_wait_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "TIMEOUT_S", 0.0)
    with pytest.raises(FinetuneError, match=r"process 0 waited 0 hours"):
        distributed.wait(lambda: False)


@pytest.mark.parametrize("verb", ["export", "plan"])
def test_other_verbs_refuse_several_processes_and_only_the_first_prints_it(
    finetune_cli: Callable[..., Answer], workdir: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    for index, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", index)
        monkeypatch.setenv("LOCAL_RANK", index)
        answer = finetune_cli(verb, "conf=pixar_style")
        assert answer.code == 2
        assert len(answer.errors) == lines
        assert answer.err.count("several processes can only train") == lines
    assert not list(workdir.iterdir())


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: taken[-1])
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device(Device.auto) == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(FinetuneError, match=r"process 2 .* GPUs: 2"):
        pick_device(Device.auto)
