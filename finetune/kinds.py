"""The kinds of model. Each is one `Kind`: a module that turns the whole configuration into the values its slice takes.

Nothing else in the program asks which kind a model is.
"""

from collections.abc import Mapping
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from finetune.config.model_kinds import ModelKind, model_kind
from finetune.config.schema import Config
from finetune.config.spelling import setting
from finetune.data.images import folder
from finetune.data.text import readers
from finetune.errors import DataError
from finetune.run import room
from finetune.run.hashing import hash_adapter
from finetune.run.records import Answer, Answers, CaptionSet, Dataset, Run, Sample, Samples, TextSet

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from finetune.planning.workload import Examples, Workload
    from finetune.training.task import Task


class Kind(Protocol):
    """What stages ask of a kind of model: `finetune.diffusion.kind` and `finetune.language.kind` are the two."""

    FACTS: ModelKind
    DATASET: type[Dataset] | type[TextSet]
    SAMPLES: type[Samples] | type[Answers]

    def require_device(self, config: Config, device: "torch.device") -> None:
        """Raises ConfigError for a model that can't be trained on the device."""
        ...

    def require_base(self, config: Config) -> None:
        """Raises ModelError for a base that is not there, ConfigError for one that can't be exported or drawn with as
        asked, and DataError for a chat template that it has not; loads no weights."""
        ...

    def require_start(self, config: Config) -> None:
        """Raises ModelError for an adapter of `lora.start_from` that doesn't fit, as far as the base's configuration
        is on this machine."""
        ...

    def require_examples(self, config: Config) -> None:
        """Raises what the stages that read the examples raise, as far as a second tells; makes and keeps nothing."""
        ...

    def dataset_inputs(self, config: Config, captions: CaptionSet | None) -> list[Any]:
        """Everything that decides the data set, as plain values for a hash."""
        ...

    def build_dataset(self, config: Config, captions: CaptionSet | None) -> Any:
        """Read, encode and cache every example; returns the data set's record."""
        ...

    def dataset_complete(self, record: Any) -> bool:
        """Whether everything that the record names is still there: the cache may be deleted at any time."""
        ...

    def dataset_figures(self, record: Any) -> dict[str, float | int | str | None]:
        """For the receipt."""
        ...

    def contents(self, config: Config) -> dict[str, str]:
        """Setting that names something outside the configuration -> hash of what it names: the base, a template."""
        ...

    def build_task(self, config: Config, dataset: Any, device: "torch.device") -> "Task":
        """The model with adapters injected, on `device`."""
        ...

    def workload(self, config: Config) -> "Workload":
        """What the planner plans for."""
        ...

    def examples(self, config: Config) -> "Examples | None":
        """What there is to train on, by a glance; None where it isn't there, or can't be counted.

        Raises DataError for what shows at a glance to be no data set.
        """
        ...

    def exports_on_cpu(self, config: Config) -> bool:
        """Whether the export can do its work in CPU memory where the GPU is too small."""
        ...

    def export(
        self,
        config: Config,
        run: Run,
        weights: "Mapping[str, Tensor]",
        averaged: "Mapping[str, Tensor] | None",
        folder: Path,
    ) -> tuple[dict[str, str], dict[str, float]]:
        """Write the adapter into `folder`: files and, by format, the difference to the trained model."""
        ...

    def usage(self, config: Config) -> str:
        """Python that loads an adapter, `{base}` to be filled in with what its libraries load the base from."""
        ...

    def use(self, config: Config, adapter: Path) -> Any:
        """The model with an adapter, to be called from Python as `ModelKind.verb` says."""
        ...

    def sample(
        self, config: Config, adapter: Path, folder: Path
    ) -> tuple[str, tuple[Sample, ...] | tuple[Answer, ...]]:
        """Fill `folder` with what base and tuned model make of the prompts: the page that shows all, and every one."""
        ...


FOUND_BY = {"data.folder": folder.images, "data.file": readers.files_of}
"""Setting that names the examples -> what finds their files, or raises DataError."""


def require_data(config: Config) -> None:
    """Raises DataError where no file is what the examples should be in, and where no cache can be made.

    Imports no kind, so that it is said at once.
    """
    cache = Path(config.data.cache)
    if room.is_empty(cache) and (error := room.unwritable(cache)):  # one that holds the examples may be read-only
        raise DataError(f"cannot use the cache {cache} ({error.strerror}); try data.cache=FOLDER")
    key = model_kind(config.model.kind).data_key
    named = attrgetter(key)(config)
    try:
        FOUND_BY[key](Path(named))
    except OSError as error:  # a folder above is closed to this user
        raise DataError(
            f"{setting(key, named)} can't be read ({error.strerror}); make it readable, or name another: {key}=…"
        ) from error


def contents(config: Config) -> dict[str, str]:
    """Setting that names something outside the data set -> hash of what it names; an equal one may have moved."""
    from finetune.adapters import formats

    found = of(config).contents(config)
    if config.lora.start_from:
        found["lora.start_from"] = hash_adapter(formats.peft_folder(Path(config.lora.start_from)))
    return found


def require_resumable(config: Config) -> None:
    """Raises RunError for a run folder that was trained otherwise, or whose checkpoint is damaged."""
    from finetune.training import identity

    if not config.trainer.restart:
        settings = identity.settings_of(config)
        identity.require_resumable(Path(config.run_dir), settings, lambda: contents(config), config.trainer.steps)


def of(config: Config) -> Kind:
    """The kind of this configuration's model. Raises ConfigError for one that there isn't."""
    return named(config.model.kind)


def named(name: str) -> Kind:
    """The kind of that name. Raises ConfigError for one that there isn't."""
    return cast(Kind, import_module(f"finetune.{model_kind(name).name}.kind"))
