"""What people type in place of a setting, and what to type instead."""

import os
import re
import shlex
import typing
import unicodedata
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from itertools import chain
from pathlib import Path

from finetune.config import describe, other_tools, recipes, typed_text
from finetune.config.spelling import setting, written

FLAG_LIKENESS = 0.8  # of a flag that is offered instead; less offers one that means something else
GOES_ON = ("resume", "continue", "resume_from_checkpoint")
PLANS = ("dry_run", "dryrun", "plan")
MODES = ("--run", "--multirun", "--cfg", "--info")
FLAG_NAMES = {"-r": "--run", "-m": "--multirun", "-c": "--cfg", "-i": "--info"}
FLAG_VALUES = {
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
# In quotes, or a text in a mapping that has none.
TEXT = re.compile(r"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')|([^][{},:"'\s](?:[^][{},:"']*[^][{},:"'\s])?)""")
ITEM = re.compile(r"""(?<![^,])(["'])([^"']*)\1(?=,|$)""")  # of several, one in quotes
NAMES = "names are plain ASCII without quotes (others stand in a recipe's file)"  # which Hydra's grammar alone takes
FURTHER = {"config": recipes.GROUP, "recipe": recipes.GROUP}  # what other tools call what is no key here


def flag_problem(flag: str, value: str, settings: Sequence[str], flags: Sequence[str]) -> str:
    """What to say of a flag that there isn't. value: what stood behind it; settings, flags: all that there are."""
    name = flag.lstrip("-").replace("-", "_")
    if name in GOES_ON:
        return f"no flag called {flag}: a run goes on by itself; type the same command without {flag}"
    if name in PLANS:
        return f"no flag called {flag}; type: {shlex.join(['finetune', 'plan', *settings])}"
    if near := get_close_matches(flag, flags, n=1, cutoff=FLAG_LIKENESS):
        return f"no flag called {flag}; did you mean {near[0]}?"
    if note := other_tools.NOTES.get(name):
        return f"no flag called {flag}; {note}"
    key = _key(name)
    if not key:
        return f"no flag called {flag}; see --help"
    return f"{flag} is no flag; settings have no dashes, type: {_intended(key, value) if value else f'{key}=…'}"


def flags_at_odds(flags: Sequence[str]) -> Iterator[str]:
    """What to say of Hydra's flags that miss something, or don't go together. flags: with their values behind them."""
    names = [FLAG_NAMES.get(name, name) for name, *_ in (flag.split("=", 1) for flag in flags)]
    if len(modes := [name for name in MODES if name in names]) > 1:
        yield f"{' and '.join(modes)} don't go together; leave one of them out"
    if "--resolve" in names and "--cfg" not in names:
        yield "--resolve goes with --cfg; type: --cfg job --resolve"
    for place, flag in enumerate(flags):
        name, _, value = flag.partition("=")
        name = FLAG_NAMES.get(name, name)
        value = value or "".join(flags[place + 1 : place + 2])
        if value not in FLAG_VALUES.get(name, (value,)):
            yield f"{name} takes one of {', '.join(FLAG_VALUES[name])}; type: {name} {FLAG_VALUES[name][0]}"


def is_setting(word: str) -> bool:
    """Whether Hydra would take a word for one; a single = stands between a key and a value with spaces around it."""
    return word.startswith("~") or ("=" in word and word != "=")


def stray_problems(words: Sequence[str]) -> Iterator[str]:
    """What to say of the words of a command line that are no settings, those that belong together in one line."""
    before, strays = "", list[str]()
    for word in [*words, ""]:
        if word and not is_setting(word):
            strays.append(word)
            continue
        if strays:
            yield f"'{' '.join(strays)}' is not a setting; {_meant(before, strays)}"
        before, strays = word, []


def several(word: str) -> str:
    """What to say of a setting with several values where one run is to be made."""
    key, _, text = word.partition("=")
    problem = describe.key_problem(key)
    if problem and not recipes.names_file(key):
        return problem
    hint, one = describe.leaf_types().get(key), ""
    if len(equal := set(text.split(","))) == 1:  # a width and a height
        one = f"it takes one: {_intended(key, equal.pop())}; "
    if hint in (str, list[str]):
        whole = ITEM.sub(r"\2", text).replace('"', "")
        one = f"if that is one text, quote it twice: {setting(key, whole if hint is str else [whole])}; "
    if typing.get_origin(hint) is list and not text.startswith("["):
        one = f"a list needs brackets: {_intended(key, f'[{text}]')}; {one}"
    elif hint == list[str]:
        one = f"one list has one pair of brackets: {setting(key, list(chain.from_iterable(_lists(text))))}; "
    return f"{key} got several values ({text}); {one}several runs need --multirun"


def unreadable(word: str) -> str:
    """What to say of a setting that Hydra's grammar doesn't take."""
    word = word.lstrip("+")
    key, _, text = word.partition("=")
    if key != key.strip():
        return f"cannot read {word}; write it without spaces: {_intended(key.strip(), text.strip())}"
    hint = describe.type_of(key)
    if text.startswith("[") and hint == list[str]:
        return f"cannot read {word}; a list of texts is quoted twice: {_intended(key, text)}"
    if text.startswith("{") and typing.get_origin(hint) is dict:
        return f"cannot read {word}; texts in it are quoted twice, {NAMES}: {_intended(key, text)}"
    if describe.in_mapping(key) and not key.isascii():
        return f"cannot read {word}; {NAMES}: {_intended(_name(key), text)}"
    if call := typed_text.SWEEP.fullmatch(text):
        lists = hint == list[str]
        several = _intended(key, call[1]) if lists else shlex.quote(typed_text.literally(f"{key}={call[1]}"))
        one = f"one text is quoted twice: {_intended(key, text)}; " if hint is str else ""
        return f"cannot read {word}; {one}several values have only commas between them: {several}"
    is_value = hint not in (None, str)
    problem = describe.key_problem(key) or (is_value and describe.value_problem(key, text))
    if problem and not recipes.names_file(key):
        return f"cannot read {word}; {problem}"
    rule = "text with spaces, commas, colons or brackets is quoted twice"
    return f"cannot read {word}; {rule}: {_intended(key, text)}"


def _meant(before: str, strays: Sequence[str]) -> str:
    key, sign, value = before.partition("=")
    text = " ".join(strays)
    if sign and not value:
        return f"write it without a space: {_intended(key, text)}"
    if sign and describe.leaf_types().get(key) in (str, list[str]):
        return f"what holds spaces is quoted: {_intended(key, f'{value} {text}')}"
    key, sign, value = text.partition(" = ")
    if sign:
        return f"write it without spaces: {_intended(key, value)}"
    written = "settings are written key=value, such as "
    if text in recipes.recipe_files():
        return f"{written}{recipes.GROUP}={text}"
    if text.endswith((".yaml", ".yml")) and Path(text).stem in recipes.recipe_files():
        return f"{written}{recipes.GROUP}={Path(text).stem}"
    if os.path.exists(text):  # noqa: PTH110 - a text may be longer than a path
        what = (
            "run_dir" if (Path(text) / "receipts").is_dir() else "data.folder" if Path(text).is_dir() else "data.file"
        )
        return f"{written}{_intended(what, text)}"
    name, _, value = text.replace(":", " ", 1).partition(" ")
    if value.strip() and (meant := _key(name)):
        return written + _intended(meant, value.strip())
    return f"{written}lora.rank=32"


def _key(name: str) -> str | None:
    if recipes.names_file(name):
        return name
    return FURTHER.get(name) or (name if describe.key_problem(name) is None else describe.nearest(name))


def _intended(key: str, text: str) -> str:
    """What to type, in a shell, for a setting whose value was typed as `text` without the quotes that it needs."""
    hint = describe.type_of(key)
    if hint == list[str]:
        return shlex.quote(f"{key}={','.join(map(written, _lists(text)))}")
    if typing.get_origin(hint) is dict:
        return shlex.quote(f"{key}={TEXT.sub(_part, text)}")
    is_text = hint is str or recipes.names_file(key)
    return setting(key, text.strip("\"'")) if is_text else shlex.quote(f"{key}={text}")


def _part(found: re.Match[str]) -> str:
    """A name or a text of a mapping."""
    is_name = found.string[found.end() :].lstrip().startswith(":")
    return _name(found[0].strip("\"'")) if is_name else found[1] or written(found[2])


def _name(text: str) -> str:
    """A name in a mapping as Hydra's grammar takes it, or the nearest one."""
    letters = (letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    return re.sub(r"[^\w.-]", "_", "".join(letters), flags=re.ASCII)


def _lists(text: str) -> list[list[str]]:
    """One list, or several with commas between them."""
    found = list(typed_text.LIST.finditer(f"{text},"))
    if "".join(one[0] for one in found) == f"{text},":
        return [_texts(one[1]) for one in found]
    return [_texts(text.strip().removeprefix("[").removesuffix("]"))]


def _texts(items: str) -> list[str]:
    """The texts of a list that was typed without its brackets and without the quotes that it needs."""
    return [item.strip().strip("\"'") for item in typed_text.ITEM.findall(f"{items},")]
