"""Keys are made once for each name, and only hashes of them are kept."""

import stat
from pathlib import Path

from finetune.serving.keys import hash_of_key, owner_of, stored_or_new_keys


def test_each_name_has_a_key_that_stays(tmp_path: Path) -> None:
    file = tmp_path / "run/keys"
    hashes, new = stored_or_new_keys(file, ["ann", "ben"])
    assert {name: owner_of(key, hashes) for name, key in new.items()} == {"ann": "ann", "ben": "ben"}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not any(key in file.read_text() for key in new.values())
    again, newer = stored_or_new_keys(file, ["ben", "cid"])
    assert newer.keys() == {"cid"}
    assert owner_of(new["ben"], again) == "ben"
    assert owner_of(new["ann"], again) is None, "she isn't named any more"
    assert owner_of(new["ann"], stored_or_new_keys(file, ["ann"])[0]) == "ann", "and now she is"
    assert owner_of("", again) is None


def test_the_only_key_has_no_name(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    hashes, new = stored_or_new_keys(file, [""])
    assert file.read_text() == hash_of_key(new[""]) + "\n"
    assert owner_of(new[""], hashes) == ""
    assert stored_or_new_keys(file, [""]) == (hashes, {})
