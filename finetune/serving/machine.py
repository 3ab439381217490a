"""What the page about this machine shows: health, figures of this moment, and what works on it."""

import os
import threading
import time
from typing import Any

from fastapi import APIRouter

from finetune.serving.runs import Runs
from finetune.workstation import alerts, doctor, nvml, samples
from finetune.workstation.samples import Sample
from finetune.workstation.verdicts import Check, Verdict

EVERY_S = 2.0  # between two looks, however many pages ask
FIRST_S, STALE_S = 0.2, 30.0  # the CPUs' time is counted from one look to the next, which may be long ago
HEALTH_S = 300.0  # between two rounds of checks
SHOWN_ELSEWHERE = "memory-in-use-"  # of checks: programs on a GPU have a table, and this server is among them


class Machine:
    """The machine that the server runs on. Nothing is looked at while nobody asks."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._lock = threading.Lock()
        self._looked, self._found = float("-inf"), dict[str, Any]()
        self._began, self._health = float("-inf"), dict[str, Any]()
        limits = [(rule.metric, rule.limit) for rule in alerts.load() if rule.above]
        self._limits = dict(sorted(limits, reverse=True))  # the lowest of each metric

    def now(self) -> dict[str, Any]:
        """`health` (empty until the first checks are done), `sample` as `finetune monitor` writes it, `limits` of it,
        `gpus` with their programs, `no_gpu` (why there is none), `runs` that train."""
        with self._lock:
            if time.monotonic() - self._began > HEALTH_S:
                self._began = time.monotonic()
                threading.Thread(target=self._check, name="doctor", daemon=True).start()
            if time.monotonic() - self._looked > EVERY_S:
                self._found = self._look()
                self._looked = time.monotonic()
        runs = [run for run in self._runs.all() if run["state"] == "running"]
        return {"health": self._health, "limits": self._limits, "runs": runs} | self._found

    def _look(self) -> dict[str, Any]:
        import psutil

        with nvml.opened() as error:
            if time.monotonic() - self._looked > STALE_S:
                psutil.cpu_percent()
                time.sleep(FIRST_S)
            gpus = [] if error else nvml.occupied()
            sample: Sample = samples.look()
        for gpu in gpus:
            gpu["programs"] = [each | {"own": each["pid"] == os.getpid()} for each in gpu["programs"] or []]
        return {"sample": sample, "gpus": gpus, "no_gpu": error or ("" if gpus else "the driver has none")}

    def _check(self) -> None:
        """A few tenths of a second, in a thread of its own."""
        checks = doctor.doctor()
        kept = [each for each in checks if not each.id.startswith(SHOWN_ELSEWHERE)]
        found = sorted((each for each in kept if each.verdict is not Verdict.ok), key=_weight)
        self._health = {"time": time.time(), "checks": len(kept), "findings": [doctor.as_plain(each) for each in found]}


def _weight(check: Check) -> int:
    return -check.verdict.value


def routes(machine: Machine) -> APIRouter:
    """One, in a thread of the server's pool."""
    router = APIRouter()

    @router.get("/api/machine")
    def now() -> dict[str, Any]:
        return machine.now()

    return router
