"""Flags of a command of this room, refused in our own way."""

import argparse
from typing import NoReturn

from finetune.errors import ConfigError


class Flags(argparse.ArgumentParser):
    """argparse whose error is a ConfigError of one line, with all flags."""

    def __init__(self, command: str) -> None:
        super().__init__(prog=f"finetune {command}", add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; {' '.join(self.format_usage().split())}")
