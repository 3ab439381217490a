"""Packages that finetune needs: what is installed, what is asked for, and what was tested."""

import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
TESTED = (HERE / "constraints.txt", HERE.parent / "constraints.txt")  # in a wheel, and beside the package's folder


def read() -> dict[str, dict[str, Any]]:
    """Package -> its `version` (None: missing), the one `wanted`, the newest `tested`, whether it `fits`, and whether
    it is `newer` than tested by a step that may break things. Nothing where nothing says what finetune needs."""
    from packaging.requirements import Requirement

    tested = _tested()
    found = {}
    for line in _required():
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = None
        newest = tested.get(requirement.name.lower())
        found[requirement.name] = {
            "version": version,
            "wanted": str(requirement.specifier),
            "tested": newest,
            "fits": version is not None and requirement.specifier.contains(version, prereleases=True),
            "newer": bool(version and newest) and _step(str(version)) > _step(str(newest)),
        }
    return found


def _required() -> list[str]:
    """By the installed package; of a folder that is run as it is, by its pyproject.toml."""
    try:
        return metadata.requires("finetune") or []
    except metadata.PackageNotFoundError:
        file = HERE.parent / "pyproject.toml"
        return list(tomllib.loads(file.read_text(encoding="utf-8"))["project"]["dependencies"]) if file.exists() else []


def _tested() -> dict[str, str]:
    """Of constraints.txt, which CI installs."""
    file = next((path for path in TESTED if path.is_file()), None)
    lines = file.read_text(encoding="utf-8").splitlines() if file else []
    pinned = (line.partition("==") for line in lines if "==" in line)
    return {name.strip().lower(): version.strip() for name, _, version in pinned}


def _step(version: str) -> tuple[int, ...]:
    """The part of a version whose change may break things (semver.org, §4 and §8)."""
    from packaging.version import Version

    first, second = (*Version(version).release, 0)[:2]
    return (first,) if first else (first, second)
