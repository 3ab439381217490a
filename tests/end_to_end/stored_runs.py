"""Two finished run folders in `tests/stored/`, as an earlier version left them, and the settings that made them.

That version alone makes them: what they prove is that today's code still goes on with what it wrote.
`tests/stored/README.md` has the commands.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

STORED = ROOT / "tests" / "stored"
PICTURES, CONVERSATIONS = "pictures", "conversations.jsonl"


@dataclass(frozen=True)
class StoredRun:
    """A run folder: its recipe and overrides, paths relative to the folder that holds `run/` and the data.

    prompt: one that the run has not drawn or answered.
    """

    folder: str
    recipe: str
    overrides: tuple[str, ...]
    prompt: str

    def restore(self, work: Path) -> Path:
        """Lay the run and the data into `work`, which is or becomes the current folder; returns the run folder."""
        shutil.copytree(STORED / PICTURES, work / PICTURES)
        shutil.copy(STORED / CONVERSATIONS, work)
        return shutil.copytree(STORED / self.folder, work / "run")


# Names of settings as they were then; the settings are not the default ones, so that a name that is lost shows.
OLD_NAMES = ("trainer.checkpointing=1", "trainer.keep=1", "trainer.fit=off", "export.dialects=[peft]")
SHARED = (
    *("run_dir=run", "data.cache=cache", "hardware.device=cpu", "lora.rank=1", "lora.targets=attention"),
    *("trainer.steps=2", "trainer.validate_every=2", "sample.seeds=[0]", *OLD_NAMES),
    "lora.dropout=0.05",  # which was the default then
)
RUNS = {
    "run_pictures": StoredRun(
        "run_pictures",
        "pixar_style",
        (
            *(f"data.folder={PICTURES}", "model.lora_targets.attention=[to_q]", "trainer.micro_batch=2", *SHARED),
            *("sample.steps=1", 'sample.prompts=["a red wall, pixar style"]'),
            # What the embedded base recommended then.
            *("optim.lr=2e-3", "loss.weighting=min_snr", "loss.min_snr_gamma=20.0", "sample.guidance=2.0"),
        ),
        prompt="a green wall, pixar style",
    ),
    "run_chat": StoredRun(
        "run_chat",
        "pirate_chat",
        (
            *(
                f"data.file={CONVERSATIONS}",
                "data.length=128",
                "data.workers=1",
                "model.lora_targets.attention=[q_proj]",
                *SHARED,
            ),
            *("sample.max_new_tokens=4", 'sample.prompts=["What colour is the sea?"]'),
        ),
        prompt="Where is the cat?",
    ),
}
