"""The commands: each is a row of `COMMANDS`, and a module of this folder with one public function `Config -> Record`.

To add one: `NAME.py` with a function `NAME`, and its row here. Nothing heavy is imported before a command runs.
"""

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Command:
    """What the command line and `finetune.NAME` know of a command.

    help: what `finetune --help` says. holds_folder: no other command may use the run folder until this one ends; false
    for one that only reads, or that serves for hours. reads_data: the examples have to be there. uses_device:
    `hardware.device` has to be there. loads_base: the base model has to be there, and to run on the device. optimises:
    and the optimiser. takes_run: where no recipe is named, it is the run folder's config.yaml. needs_run: a run has
    finished in the run folder. needs_prompts: `sample.prompts` is not empty. trains: several processes may take part,
    and the run folder's config.yaml becomes what the command was given. flags: of the command line alone, and the
    settings that they stand for.
    """

    help: str
    holds_folder: bool = True
    reads_data: bool = False
    uses_device: bool = True
    loads_base: bool = False
    optimises: bool = False
    takes_run: bool = False
    needs_run: bool = False
    needs_prompts: bool = False
    trains: bool = False
    flags: Mapping[str, str] = field(default_factory=dict)


COMMANDS = {
    "train": Command(
        help="the whole line: caption, dataset, training, export, samples, report",
        reads_data=True,
        loads_base=True,
        optimises=True,
        trains=True,
    ),
    "plan": Command(
        help="say whether the run fits the GPU, and the fastest settings that do",
        holds_folder=False,
        reads_data=True,
        uses_device=False,
        loads_base=True,
    ),
    "profile": Command(
        help="say where a training step's time goes, and what to change",
        reads_data=True,
        loads_base=True,
        optimises=True,
        takes_run=True,
        flags={"--check": "profile.check=true", "--json": "profile.json=true"},
    ),
    "caption": Command(help="write a caption for every image that has none", reads_data=True),
    "dataset": Command(help="read and encode images or conversations", reads_data=True),
    "export": Command(
        help="write the trained adapter in every file format, checked", loads_base=True, takes_run=True, needs_run=True
    ),
    "sample": Command(
        help="draw or answer the recipe's prompts, base beside tuned",
        loads_base=True,
        takes_run=True,
        needs_prompts=True,
    ),
    "serve": Command(
        help="answer over HTTP with the base and its adapters", holds_folder=False, loads_base=True, takes_run=True
    ),
    "report": Command(help="write report.html again", uses_device=False, takes_run=True, needs_run=True),
}

_modules = {module.name for module in pkgutil.iter_modules(__path__)}
for _name in sorted(COMMANDS.keys() ^ _modules):
    raise TypeError(
        f"stages.COMMANDS has no row for stages/{_name}.py"
        if _name in _modules
        else f"the command {_name} of stages.COMMANDS has no module stages/{_name}.py"
    )
