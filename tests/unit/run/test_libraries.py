"""What belongs to the whole process is touched in a command line alone."""

import subprocess
import sys

import pytest

PROGRAM = """
import gc
from finetune.run import libraries
libraries.in_command = {in_command}
libraries.before_models()
first = gc.get_freeze_count()
later = [[] for _ in range(1000)]
libraries.before_models()
assert gc.get_freeze_count() == first  # what was made since may be a model
print(first)
"""


@pytest.mark.parametrize("in_command", [True, False])
def test_libraries_are_kept_out_of_searches_for_cycles_once_and_in_a_command_only(in_command: bool) -> None:
    program = PROGRAM.format(in_command=in_command)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 100_000) == in_command
