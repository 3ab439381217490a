"""LoRA fine-tuning from a folder of images to an adapter that is known to work.

The functions below are the commands of the command line, for Python and notebooks; `chat` and `draw` use what was
trained. Nothing heavy is imported until one
of them is called.
"""

import os
from typing import TYPE_CHECKING, Any

from finetune.stages import COMMANDS

if TYPE_CHECKING:  # a command that is not named here has no types, and works
    from finetune.api import (  # noqa: F401
        caption,
        chat,
        dataset,
        draw,
        export,
        load,
        plan,
        profile,
        report,
        sample,
        serve,
        train,
    )
    from finetune.config.schema import Config

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the newer name first
# Torch reads it before its first use of a GPU. A large model is loaded into one segment, and the smallest tensor that
# stays there (a library's cache) keeps all of it from the next model: drawing with Qwen-Image in 4 bit, first tuned and
# then plain, ran out of 24 GiB with 10 in use.
if not any(name in os.environ for name in ALLOCATOR):
    os.environ[ALLOCATOR[0]] = "expandable_segments:True"

WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
# GNU's OpenMP reads it when torch is loaded: how often a thread looks for work before it sleeps. By itself it looks
# 300,000 times, and of two programs on the same cores each waits for threads of its own that can't run. Seconds of a
# step on two cores (AMD EPYC, 30 November 2026), alone and beside two busy programs, runs apart by up to a quarter:
#             conf=stained_glass_style   conf=pirate_chat
#     20,000  0.44 to 0.51, 1.05, 1.24   0.27 to 0.35, 2.54, 2.61
#     12,000  0.44 to 0.47, 1.38         0.26 to 0.41, 0.69
#      8,000  0.53 to 0.57               0.32, 0.75
if not any(name in os.environ for name in WAITING):
    os.environ[WAITING[0]] = "12000"

__all__ = ["Config", "chat", "draw", "load", *COMMANDS]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}; it offers {', '.join(__dir__())}")
    if name == "Config":
        from finetune.config.schema import Config

        return Config
    from finetune import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted(__all__)
