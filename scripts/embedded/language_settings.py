"""What the phases of the language model share: where its files lie, and how large each phase is."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LanguageSettings:
    """One call's wishes. A tiny run walks the same path with little data and a small model, to prove the line."""

    work: Path
    """Rows, checkpoints and the unexported model."""
    root: Path
    """Where the artefact goes: finetune/embedded/language below it."""
    device: str
    tiny: bool = False
    minutes: float = 4.5
    """Of training."""
    seeds: int = 1_200_000
    """Conversations generated; the seven in ten that ask nothing held out are trained on."""
    rows: int = 128
    """Rows of a training step."""
    questions: int = 4000
    """Held-out questions of the evaluation."""

    @property
    def model_folder(self) -> Path:
        return self.work / "language"

    @property
    def shipped(self) -> Path:
        return self.root / "finetune" / "embedded" / "language"

    @property
    def tokenizer(self) -> Path:
        return self.work / "language-tokenizer"

    @property
    def packed(self) -> Path:
        return self.work / "language-rows.pt"

    @property
    def checkpoint(self) -> Path:
        return self.work / "checkpoints" / "language.pt"
