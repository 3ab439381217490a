"""The command line: `finetune COMMAND conf=NAME [key=value …]`.

argv -> command + Hydra job. Help, completion of commands and every error are answered here, before Hydra or torch is
imported; a FinetuneError becomes one line a problem on stderr and the exit code of its class.
"""

import contextlib
import io
import logging
import os
import shlex
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from finetune.config import mistyped, recipes, typed_text
from finetune.config.schema import Config
from finetune.errors import ConfigError, FinetuneError, Interrupted, OutOfMemory, RunError, TrainingError
from finetune.planning.plan import Plan
from finetune.reading import at_home
from finetune.run import libraries, ranks
from finetune.run.progress import say
from finetune.run.step_time import Profile
from finetune.stages import COMMANDS
from finetune.video import COMMANDS as VIDEO
from finetune.workstation import COMMANDS as MACHINE

# Hydra's flags that make sense here; True: a value follows.
FLAGS = {
    **dict.fromkeys(("--help", "-h", "--multirun", "-m", "--run", "-r", "--resolve"), False),
    **dict.fromkeys(("--cfg", "-c", "--package", "-p", "--info", "-i"), True),
}
# Hydra's own function expands `$(…)` in the names that it offers.
# Where nothing is offered, bash completes a path: behind `=`, and quoted as it needs.
BASH_INSTALL = """\
_finetune_completion() {
    mapfile -t COMPREPLY < <(COMP_LINE=$COMP_LINE COMP_POINT=$COMP_POINT COMP_WORDBREAKS=$COMP_WORDBREAKS \\
        "$1" -sc query=bash 2>/dev/null)
}
[[ $COMP_WORDBREAKS == *=* ]] || COMP_WORDBREAKS+="="
complete -o nospace -o default -F _finetune_completion finetune"""
BASH_UNINSTALL = "complete -r finetune; unset -f _finetune_completion"
OWN_WORDS = {**dict.fromkeys(VIDEO, "video"), **dict.fromkeys(MACHINE, "workstation")}
"""Commands that read their words themselves, and the folder of each."""
COMPLETION_FLAGS = ("-sc", "--shell-completion", "--shell_completion")
WIDTH = 80  # columns of the help
LONGEST_ERROR = 2000  # characters of a line
INTERRUPTED = 130  # 128 + SIGINT, as shells count


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    _prepare_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        return _answer(words, debug)
    except KeyboardInterrupt:
        works = any(COMMANDS[word].holds_folder for word in words if word in COMMANDS)
        say("interrupted; what is finished is kept: the same command goes on from there" if works else "interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # `finetune … --cfg job | head`: nobody reads on, which is no fault
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _complain(error, debug)


def _prepare_streams() -> None:
    """Put /dev/null where a service started us without a standard stream: the next file would take its number. What a
    stream's encoding lacks (latin-1, ASCII) becomes a question mark."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number, which is this one
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":  # as stderr: a `?` ends no run
        sys.stdout.reconfigure(errors="replace")


def _answer(words: list[str], debug: bool) -> int:
    if words and words[0] in COMPLETION_FLAGS:
        return _complete(words)
    asks_help = any(word in ("-h", "--help") for word in words) or words[:1] == ["help"]
    if not words or asks_help:
        recipe = next((word for word in words if word.startswith("conf=")), "")
        if own := next((word for word in words if word in VIDEO), ""):
            print(import_module("finetune.video.settings").help_text(own, WIDTH))
        else:
            print(_keys_text(recipe, words) if recipe else help_text())
        return 0
    if words == ["--version"]:
        from finetune.run.receipts import versions

        print(f"finetune {versions()['finetune']}")
        return 0
    if words[0] in FLAGS:  # the command may stand behind its flags
        words.sort(key=lambda word: word not in {**COMMANDS, **OWN_WORDS})
    command, rest = words[0], words[1:]
    if command in FLAGS or "=" in command:
        raise ConfigError(f"say which command, such as: {shlex.join(['finetune', 'train', *words])}")
    if command not in COMMANDS and command not in OWN_WORDS:
        raise ConfigError(recipes.no_such("command", command, [*COMMANDS, *OWN_WORDS]))
    _quieten(debug)
    if command in OWN_WORDS:
        code: int = import_module(f"finetune.{OWN_WORDS[command]}.{command}").main(rest)
        return code
    return _run_hydra(command, rest, debug)


def help_text() -> str:
    """What `finetune --help` prints: commands, recipes, one example, the main keys."""
    files = recipes.recipe_files()
    width = max(map(len, [*COMMANDS, *OWN_WORDS, *files]))
    indent = " " * (width + 4)

    def rows(texts: Mapping[str, str]) -> str:
        lines = (f"  {name:<{width}}  {text}" for name, text in texts.items())
        return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent=indent) for line in lines)

    commands = rows({name: command.help for name, command in COMMANDS.items()})
    listed = rows({name: recipes.title(path) for name, path in files.items()})
    return f"""\
LoRA fine-tuning from images or conversations to a tested adapter.

usage: finetune COMMAND conf=RECIPE [KEY=VALUE …]  (or: python -m finetune …)

commands
{commands}

commands for videos, such as: finetune annotate conf=toy_video
{rows(VIDEO)}

commands about this machine, without a recipe
{rows(MACHINE)}

recipes (conf/*.yaml of the package and of the current folder)
{listed}

examples
  finetune train conf=pixar_style data.folder=my/images name=mine
  finetune train conf=pirate_chat data.file=my/conversations.jsonl name=mine

main keys
  name  seed  run_dir  model  data.folder  data.file  lora.rank  lora.alpha
  optim.lr  trainer.steps  trainer.save_every  trainer.micro_batch
  trainer.accumulate  trainer.precision  sample.prompts  hardware

more
  finetune --help conf=RECIPE            every key with its meaning, the presets
  finetune annotate --help               its settings; the same of frames
  COMMAND … --cfg job                    print the configuration and stop
  COMMAND … KEY=A,B --multirun           one run per value
  COMMAND … --debug                      show tracebacks and every warning
  finetune --version                     print the version
  eval "$(finetune -sc install=bash)"    completion in this shell"""


def _keys_text(recipe: str, words: list[str]) -> str:
    """What `finetune --help conf=RECIPE [KEY=VALUE …]` prints: presets, and every key with its value and meaning."""
    from finetune.config import compose, describe

    overrides = [word for word in _sorted_out([word for word in words if "=" in word])[0] if word != recipe]
    config = compose.load(recipe.removeprefix("conf="), overrides, say)
    offered = (f"{group}: {', '.join(sorted(files))}" for group, files in recipes.preset_files().items())
    wrapped = (textwrap.fill(line, WIDTH, initial_indent="  ", subsequent_indent="    ") for line in offered)
    presets = "\n".join(wrapped)
    return f"presets, such as lora=r32\n{presets}\n\nkeys of {recipe}\n{describe.listing(config, WIDTH)}"


def _run_hydra(command: str, words: list[str], debug: bool) -> int:
    began = time.time()  # not that of the process: it may be a notebook's, or that of a shell with an install before
    short = COMMANDS[command].flags
    overrides, flags = _sorted_out([short.get(word, word) for word in words])
    sweep = "--multirun" in flags or "-m" in flags
    named = any(word.startswith(f"{recipes.GROUP}=") for word in overrides)
    from hydra import main as hydra_main

    from finetune import api
    from finetune.config import compose, store
    from finetune.reporting import terminal

    if COMMANDS[command].takes_run and not named and not flags:
        _run_config(command, api.load_run(overrides), overrides, began)
        return 0
    failures: list[int] = []
    runs: list[terminal.SweptRun] = []

    def job(tree: Any) -> None:
        # Hydra prints a line of its own for an exception that leaves a job: none does.
        runs.append(terminal.SweptRun(compose.job_overrides(), compose.job_folder(), None))
        try:
            record = _run_job(command, tree, sweep, time.time() if sweep else began)
            runs[-1] = replace(runs[-1], record=record)
        except Interrupted as error:
            raise SystemExit(_complain(error, debug)) from error  # ends a sweep as well
        except Exception as error:
            failures.append(_complain(error, debug))
            if ranks.world_size() > 1:  # nobody knows what the others were in the middle of
                raise SystemExit(failures[0]) from error

    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us instead of being printed by Hydra
    before = sys.argv
    try:
        with store.registered():
            overrides = compose.judged(overrides, say, sweep)
            if sweep:
                compose.name_sweep_folders(overrides)
                # The folder of a sweep can't be read from a recipe, but `run_dir=` on the command line is known by now.
                own = [word.removeprefix("run_dir=") for word in overrides if word.startswith("run_dir=")]
                overrides += [f"hydra.sweep.dir={folder}" for folder in own]
            sys.argv = [sys.argv[0] if sys.argv else "finetune", *overrides, *flags]
            with compose.explained():
                hydra_main(version_base="1.3", config_path=compose.SEARCH_PATH, config_name="config")(job)()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
    finally:
        sys.argv = before
        if sweep and ranks.rank() == 0:
            terminal.show_sweep(runs)
    return failures[0] if failures else 0


def _sorted_out(words: list[str]) -> tuple[list[str], list[str]]:
    """Settings and flags apart, wherever they stood: Hydra's own parser refuses settings on both sides of a flag.

    Raises ConfigError for a flag that isn't one, and for flags that don't go together.
    """
    overrides, flags, unknown, takes_value = [], [], dict[str, str](), False
    for word in words:
        if word.startswith("-"):
            flag, _, value = word.partition("=")
            takes_value = (flag not in FLAGS or FLAGS[flag]) and not value
            flags.append(flag if flag not in FLAGS else word)
            if flag not in FLAGS:
                unknown[flag] = value
        elif takes_value and "=" not in word:
            takes_value = False
            if flags[-1] in unknown:
                unknown[flags[-1]] = word
            flags.append(word)
        else:
            overrides.append(word)
    known = [*FLAGS, "--debug", "--version"]
    problems = [mistyped.flag_problem(flag, value, overrides, known) for flag, value in unknown.items()]
    if problems := problems or list(mistyped.flags_at_odds(flags)):
        raise ConfigError("\n".join(problems))
    return overrides, flags


def _run_job(command: str, tree: Any, sweep: bool, began: float) -> Any:
    """Run the command; returns its record. began: when it was started, for the clock of the summary."""
    from finetune.config import compose

    overrides = compose.job_overrides()
    config = compose.resolve(tree, overrides)
    if sweep:
        config.run_dir = compose.job_folder()
        say(f"run folder: {recipes.shown(Path(config.run_dir))}")
    return _run_config(command, config, overrides, began)


def _run_config(command: str, config: Config, overrides: Sequence[str], began: float) -> Any:
    from finetune import api
    from finetune.reporting import terminal

    record = api.serve_forever(config, overrides) if command == "serve" else getattr(api, command)(config)
    if ranks.rank() == 0:
        terminal.show(config, record, overrides, began=began)
    if isinstance(record, Plan) and not record.fits:
        raise (OutOfMemory if record.problems else RunError)("\n".join(record.refusals))
    if isinstance(record, Profile) and record.failed:
        raise TrainingError("\n".join(f"{setting} failed: {why}" for setting, why in record.failed.items()))
    return record


def _complain(error: Exception, debug: bool) -> int:
    """Print one line a problem; returns the exit code."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, Interrupted):  # asked for, and nothing is lost
        say(str(error))
        return error.exit_code
    if isinstance(error, FinetuneError):
        for line in str(error).splitlines():
            say(f"error: {_shortened(line)}")
        return error.exit_code
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("finetune"):
        way = "take the Python that finetune was installed with: source .venv/bin/activate"
        say(f"error: {sys.executable} has no package {error.name}; {way}")
        return FinetuneError.exit_code
    first = (str(error).strip().splitlines() or [""])[0]
    say(f"error: unexpected {type(error).__name__}: {first}; --debug shows where, please report it")
    return FinetuneError.exit_code


def _shortened(line: str) -> str:
    """A line without the middle of a very long value, but with what to do, which stands at its end."""
    half = LONGEST_ERROR // 2
    return line if len(line) <= LONGEST_ERROR else f"{line[:half]} … {line[-half:]}"


def _quieten(debug: bool) -> None:
    """Our own messages as plain lines on stderr; other libraries' chatter only with --debug.

    Hydra's job logging is off, so this is the one place where logging is set up; a program that imports finetune keeps
    its own.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING if debug else logging.ERROR, format="%(message)s")
    logging.getLogger("finetune").setLevel(logging.INFO)
    libraries.in_command = True
    if debug:
        return
    threading.excepthook = lambda _: None  # TensorBoard's writer: what stops it is raised again by the next write
    libraries.quieten()


def _complete(words: list[str]) -> int:
    """Shell completion: commands from here, everything behind a command from Hydra, paths from bash itself.

    Hydra knows no sub-commands: the command word is taken out of the line, and a recipe is put in where none is named
    yet, because without one Hydra can't compose and would offer no keys.
    """
    if "install=bash" in words:
        print(BASH_INSTALL)
        return 0
    if "uninstall=bash" in words:
        print(BASH_UNINSTALL)
        return 0
    line = os.environ.get("COMP_LINE", "")
    line = line.encode()[: int(os.environ.get("COMP_POINT") or len(line.encode()))].decode(errors="ignore")
    typed = line.split()[1:]
    done, last = (typed, "") if line.endswith(" ") or not typed else (typed[:-1], typed[-1])
    for offered in _offered(words, done, last):
        # bash replaces what stands behind the last of these characters.
        print(offered[max(last.rfind(each) for each in os.environ.get("COMP_WORDBREAKS", " ")) + 1 :])
    return 0


def _offered(words: list[str], done: Sequence[str], last: str) -> Sequence[str]:
    """What `last`, the word at the cursor, may become."""
    if not done:
        return [name for name in [*COMMANDS, *OWN_WORDS, "--help", "--version"] if name.startswith(last)]
    key, sign, text = last.partition("=")
    if sign and (key in typed_text.PATHS or (done[0] in VIDEO and key in ("video", "folder"))):
        return [] if "query=bash" in words else [f"{key}={path}" for path in _paths(text)]
    if done[0] in VIDEO:
        settings = import_module("finetune.video.settings")
        return list(settings.offered(settings.KINDS[done[0]], last))
    from hydra import main as hydra_main

    from finetune.config import compose, store

    done = list(done[1:])
    if not any(word.startswith("conf=") for word in (*done, last)) and not "conf=".startswith(last or "-"):
        done = [f"conf={next(iter(recipes.recipe_files()))}", *done]
    os.environ["COMP_LINE"] = " ".join(["finetune", *done, last])
    os.environ.pop("COMP_POINT", None)
    before, sys.argv = sys.argv, [sys.argv[0], *words]
    out = io.StringIO()
    try:
        with store.registered(), contextlib.redirect_stdout(out):
            hydra_main(version_base="1.3", config_path=compose.SEARCH_PATH, config_name="config")(lambda tree: None)()
    finally:
        sys.argv = before
    return out.getvalue().split()


def _paths(text: str) -> Iterator[str]:
    """Files and folders whose path begins like this."""
    above, slash, name = text.rpartition("/")
    folder = at_home(f"{above}{slash}" or ".")
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        hidden = path.name.startswith(".") and not name.startswith(".")
        if path.name.startswith(name) and not hidden:
            yield f"{above}{slash}{path.name}{'/' if path.is_dir() else ''}"
