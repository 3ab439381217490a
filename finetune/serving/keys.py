"""Clients' keys: made once, shown once, and stored as hashes."""

import hashlib
import hmac
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune.run.atomic import write_atomically

KEY_BYTES = 32


def hash_of_key(key: str) -> str:
    """As it is stored. A key of 256 random bits needs no salt and no slow hash."""
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


def stored_or_new_keys(file: Path, names: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Names by the hash of their key, for these names alone, and the keys by name that were made just now.

    file: of lines `HASH NAME`, where the one of no name is the only one there is without `serve.keys`. Keys of other
    names stay in it, for a later start. New keys are kept nowhere.
    """
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    stored = {name: digest for digest, _, name in (line.partition(" ") for line in lines)}
    new = {name: secrets.token_urlsafe(KEY_BYTES) for name in names if name not in stored}
    stored |= {name: hash_of_key(key) for name, key in new.items()}
    if new:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, "".join(f"{digest} {name}".rstrip() + "\n" for name, digest in stored.items()))
        file.chmod(0o600)
    return {stored[name]: name for name in names}, new


def owner_of(key: str, hashes: Mapping[str, str]) -> str | None:
    """Whose key it is. All are compared, each in constant time, so that time tells nothing."""
    given, found = hash_of_key(key), None
    for digest, name in hashes.items():
        if hmac.compare_digest(given, digest):
            found = name
    return found
