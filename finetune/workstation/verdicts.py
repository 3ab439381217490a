"""What a check of the machine says."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

Facts = dict[str, Any]


class Verdict(Enum):
    """In the order of weight."""

    ok = 0
    unknown = 1
    warn = 2
    bad = 3


@dataclass(frozen=True)
class Check:
    """id: stable, for scripts. fact: as found. limit: what it should be, and source: who says so. cost: what the fault
    costs. cure: a command to copy, or what to do by hand; empty where all is well."""

    id: str
    verdict: Verdict
    fact: str
    limit: str = ""
    source: str = ""
    cost: str = ""
    cure: str = ""


def worst(checks: Iterable[Check]) -> Verdict:
    return max((check.verdict for check in checks), key=lambda verdict: verdict.value, default=Verdict.unknown)


def check_of(id_: str, faulty: bool | None, verdict: Verdict, fact: str, **more: str) -> Check:
    """A check with this verdict where there is a fault; `ok`, without cost and cure, where not; None: can't be told."""
    if faulty:
        return Check(id_, verdict, fact, **more)
    kept = {name: text for name, text in more.items() if name in ("limit", "source")}
    return Check(id_, Verdict.ok if faulty is False else Verdict.unknown, fact, **kept)


def place_id(name: str) -> str:
    """What a place of `facts.places` is called in ids, which should be short."""
    return "models" if name == "downloaded models" else name.replace(" ", "-")
