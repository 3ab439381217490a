"""Odd values and damaged files, put through the real commands: each must end soon, in words, and leave inputs alone."""

import os

# Before any library reads them: a child has only the thread that forked, and no network.
for _name, _value in (("OMP_NUM_THREADS", "1"), ("TOKENIZERS_PARALLELISM", "false"), ("HF_HUB_OFFLINE", "1")):
    os.environ.setdefault(_name, _value)
