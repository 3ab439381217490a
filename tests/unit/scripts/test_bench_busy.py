"""The benchmark of a busy machine: commands that are valid, programs that end, figures. Nothing is timed here."""

from pathlib import Path

import pytest

from finetune.config import compose
from finetune.config.validate import check
from scripts.bench import busy


@pytest.mark.parametrize("recipe", busy.RECIPES)
def test_every_command_is_valid(recipe: str, tmp_path: Path) -> None:
    words = busy.command(recipe, 40, tmp_path)
    config = compose.load(words[1].removeprefix("conf="), words[2:])
    assert check(config) == []
    assert (config.trainer.steps, config.run_dir) == (40, str(tmp_path / "run"))


def test_programs_compute_until_the_end() -> None:
    with busy.busy(2) as started:
        assert [process.poll() for process in started] == [None, None]
    assert [process.returncode for process in started] == [-9, -9]


def test_alone_and_beside_take_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seconds = iter([[9.0] * busy.WARM_UP + [1.0, 2.0, 1.5], [9.0] * busy.WARM_UP + [3.0]])
    monkeypatch.setattr(busy, "timed", lambda *_: {"steps_s": next(seconds)})
    assert busy.pair("pirate_chat", 40, 0, tmp_path) == {"recipe": "pirate_chat", "alone_s": 1.5, "beside_s": 3.0}
    monkeypatch.setattr(busy, "timed", lambda *_: {"steps_s": [], "said": ["error: no base"]})
    with pytest.raises(SystemExit, match="error: no base"):
        busy.pair("pirate_chat", 40, 0, tmp_path)


def test_the_factor_is_of_pairs() -> None:
    made = [(1.0, 2.0), (2.0, 6.0), (1.0, 4.0)]
    lines = [{"recipe": "a", "alone_s": alone, "beside_s": beside} for alone, beside in made]
    assert busy.table(lines, 2).splitlines()[-1] == "| `a` | 1.000 | 4.000 | 3.00 | 2.00 | 4.00 |"


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    given = busy.arguments(["--out", "here"])
    assert (given.pairs, given.programs, given.recipes) == (5, 2, busy.RECIPES)
    with pytest.raises(SystemExit):
        busy.arguments(["--out", "here", "--steps", str(busy.WARM_UP)])
    assert "--steps must be more than" in capsys.readouterr().err
