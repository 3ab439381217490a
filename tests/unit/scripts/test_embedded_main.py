"""The command that trains the embedded models: what it refuses, and that it ends in time."""

import sys
from pathlib import Path

import pytest

from scripts.embedded.__main__ import main


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pack"], "pack and unpack need --out FOLDER"),
        (
            ["render", "--keep", "tokenizer"],
            "--keep takes some of readers,captioner,autoencoder,diffusion,detector, or none",
        ),
        (["diffusion", "--keep", "diffusion"], "try --keep …,autoencoder,diffusion"),
        (["render", "--minutes", "export=3"], "--minutes takes PHASE=MINUTES for render, readers,"),
        (["render", "--minutes", "5"], "--minutes takes PHASE=MINUTES for render, readers,"),
    ],
)
def test_a_wrong_word_is_answered_with_what_is_allowed(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["embedded", *words])
    with pytest.raises(SystemExit):
        main()
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_call_whose_time_is_up_begins_no_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["all", "--tiny", "--keep", "none", "--device", "cpu", "--work", str(tmp_path), "--limit-s", "0"]
    monkeypatch.setattr(sys, "argv", ["embedded", *words])
    main()
    assert capsys.readouterr().out == "time is up before render: run this again\n"
    assert not list(tmp_path.iterdir())
