"""What a run left, as values that two runs that did the same have in common: no times, no places."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

TIMES = re.compile(r"second|time|per_s|gib|versions|since|cached|encoded|generated|skipped$|^outputs$")
"""Names of values that tell how a command went, and not what came of it; outputs: the stamps of files."""
OTHER_EACH_TIME = ("run/.lock", "cache/images/", "run/report.html", "run/receipts/report.json", "manifest.json")
"""Files that hold times, or hashes of files that do; of them it counts that they are there."""
LOCKS = re.compile(r"cache/\.rows-\w+\.lock")
INDEX = re.compile(r"(?<=cache/images/)\w+(?=\.json$)")  # named after the place of the images
TENSORBOARD = "run/tensorboard/"


def outcome(folder: Path) -> dict[str, Any]:
    """Each file's content by its path."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {
        INDEX.sub("INDEX", name): _content(name, path, folder)
        for name, path in found.items()
        if not LOCKS.fullmatch(name) and not name.startswith(TENSORBOARD)
    }


def differences(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What is not the same, in words."""
    return [
        *(f"{name} is missing" for name in sorted(wanted.keys() - found.keys())),
        *(f"{name} should not be there" for name in sorted(found.keys() - wanted.keys())),
        *(f"{name} differs" for name in sorted(wanted.keys() & found.keys()) if wanted[name] != found[name]),
    ]


def _content(name: str, path: Path, folder: Path) -> Any:
    if any(part in name for part in OTHER_EACH_TIME):
        return None
    read = READERS.get(path.suffix, _plain)
    try:
        return read(path, str(folder.resolve()))
    except Exception as error:  # damaged files are what is looked for
        return f"unreadable: {error}"


def _plain(path: Path, place: str) -> str:
    return hashlib.sha256(path.read_bytes().replace(place.encode(), b"")).hexdigest()


def _tensors(path: Path, place: str) -> dict[str, str]:
    return {name: _digest(tensor) for name, tensor in load_file(path).items()}


def _pickled(path: Path, place: str) -> Any:
    return _plain_values(torch.load(path, weights_only=True), place)


def _json(path: Path, place: str) -> Any:
    return _plain_values(json.loads(path.read_text(encoding="utf-8")), place)


def _lines(path: Path, place: str) -> list[Any]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [values for line in lines if set(values := _plain_values(json.loads(line), place)) != {"step"}]


def _plain_values(value: Any, place: str) -> Any:
    if isinstance(value, dict):
        return {key: _plain_values(item, place) for key, item in value.items() if not TIMES.search(str(key))}
    if isinstance(value, list | tuple):
        return [_plain_values(item, place) for item in value]
    if isinstance(value, torch.Tensor):
        return _digest(value)
    return value.replace(place, "") if isinstance(value, str) else value


def _digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().contiguous().flatten().view(torch.uint8) if tensor.numel() else tensor
    return hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + data.numpy().tobytes()).hexdigest()


READERS: dict[str, Callable[[Path, str], Any]] = {
    ".safetensors": _tensors,
    ".pt": _pickled,
    ".json": _json,
    ".jsonl": _lines,
}
