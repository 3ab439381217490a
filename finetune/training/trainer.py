"""One training run in progress: what is done after each step, and the state that checkpoints store and curves show."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from finetune.adapters import lora
from finetune.config.describe import as_dict
from finetune.config.hints import smallest
from finetune.config.schema import Config
from finetune.errors import OutOfMemory
from finetune.memory.device import gpu_gib, peak_gib
from finetune.memory.fallbacks import try_within_memory
from finetune.planning.choice import settings
from finetune.reporting import curves
from finetune.run import distributed
from finetune.run.progress import progress, say
from finetune.run.records import Run
from finetune.training import checkpoint
from finetune.training.accelerator import prepare
from finetune.training.checkpoint import TrainState
from finetune.training.ema import Ema
from finetune.training.loop import Step, dry_run, fit
from finetune.training.oom import OomFallbacks
from finetune.training.optim import build_optimizer, learning_rate, load_state
from finetune.training.pace import Pace, slowdown_hint
from finetune.training.signals import Stop
from finetune.training.task import Draw, Task
from finetune.training.tracking import Tracker

SMOOTHING = 0.95  # share of the old value in the smoothed loss: about the last 20 steps
LAST_SHARE = 0.1
"""Of the steps, over which the loss at the end is a mean: smoothing still feels the start of short runs."""


@dataclass
class Trainer:
    """One run in progress: the state that checkpoints store and curves show.

    config: with the settings of memory that were taken; asked: those that were given. rehearsed: whether the worst step
    is tried first. planned_gib: what the plan says of this training, if it was asked. peak_gib: of all before.
    """

    config: Config
    task: Task
    accelerator: Accelerator
    identity: dict[str, Any]
    resumed: checkpoint.Checkpoint | None
    requested: dict[str, Any]
    dry_run_first: bool
    planned_gib: float | None
    peak_gib: float

    def __post_init__(self) -> None:
        config = self.config
        self.run_dir = Path(config.run_dir)
        self.folder = self.run_dir / "checkpoints"
        optimizer = build_optimizer(lora.parameter_groups(self.task.model, config.optim.lora_plus), config.optim)
        self.ema: Ema | None = None
        self.fallbacks = OomFallbacks(config.trainer.micro_batch, self.task.reduce_memory, smallest(config))
        if self.resumed is None:
            self.state = TrainState(0, self.identity, 0, 0.0, 0.0, 0.0, None, None, None, 0, 0, None)
        else:
            self.state = self.resumed.state
            lora.load_state(self.task.model, self.resumed.adapter, str(self.resumed.folder))
            load_state(optimizer, self.resumed.optimizer)
            if self.state.requested == self.requested:  # else the person has thought about memory again
                self.fallbacks.restore(self.state.micro_batch, self.state.fallbacks)
            if self.resumed.ema is not None:
                self.ema = Ema.restore(config.trainer.ema_decay, self.resumed.ema, self.accelerator.device)
            say(f"train: going on from step {self.state.step}")
        if config.trainer.ema_decay and self.ema is None:
            self.ema = Ema(config.trainer.ema_decay, lora.trainable_tensors(self.task.model))
        self.task.model, self.optimizer = prepare(self.accelerator, self.task.model, optimizer)
        if self.state.scaler and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self.state.scaler)
        if distributed.rank() == 0:  # only the first process writes
            self.tracker = Tracker(self.run_dir, self.state.step, self.accelerator.device)
        self.pace, self.told = Pace(self.state.slow_steps), False
        self.pending_seconds, self.pending_count, self.pending_padded_count = 0.0, 0, 0
        self.previewing, self.validation_batch = True, config.trainer.micro_batch

    def steps(self, stop: Stop) -> Iterator[Step]:
        """Every remaining optimiser step, with a progress bar. stop: of a signal, on which several processes agree."""
        config, trainer = self.config, self.config.trainer
        trainable, total = lora.counts(self.task.model)
        say(f"train: {trainable:,} of {total:,} parameters ({trainable / total:.2%}), {self.task.size:,} examples")
        with self._dry_run():
            if self.state.step == 0:
                self._texts()
                self._validate()
                self._preview()
        if self.exhausted():
            return
        with progress("train", trainer.steps, unit="steps", done=self.state.step) as bar:
            for step in fit(
                self.task,
                self._draws(),
                self.optimizer,
                lambda number: learning_rate(config.optim, number, trainer.steps),
                self.accelerator,
                fallbacks=self.fallbacks,
                seed=config.seed,
                start=self.state.step,
                clip_norm=trainer.clip_norm,
                max_bad_steps=trainer.max_bad_steps,
                stop=stop,
            ):
                yield step
                bar.advance(1, f"loss {self.state.smoothed_loss:.4f}")
                if self.exhausted():
                    say(f"train: no better validation loss since step {self.state.best_step}; stopping early")
                    break

    def exhausted(self) -> bool:
        """Whether the validation loss has not improved for `trainer.patience` saved steps."""
        patience = self.config.trainer.patience
        return bool(patience) and self.state.waited >= patience

    def note(self, step: Step) -> None:
        """Take one step into the state and do what is due after it."""
        trainer, state = self.config.trainer, self.state
        if step.oom_fallbacks:
            tried = ", then ".join(step.oom_fallbacks)
            say(f"step {step.number}: memory ran out; going on with {tried}; effective batch still {self._effective()}")
        if step.skip_reason:
            say(f"step {step.number} refused: {step.skip_reason}")
            self.state = replace(state, step=step.number, skipped_steps=state.skipped_steps + 1)
        else:
            first = state.count == 0
            smoothed = step.loss if first else SMOOTHING * state.smoothed_loss + (1 - SMOOTHING) * step.loss
            self.state = replace(
                state,
                step=step.number,
                count=state.count + step.count,
                seconds=state.seconds + step.seconds,
                first_loss=step.loss if first else state.first_loss,
                smoothed_loss=smoothed,
            )
            if self.ema:
                self.ema.update(lora.trainable_tensors(self.task.model))
        if self.pace.note(step) and not self.told and distributed.rank() == 0:
            self.told = True
            why = slowdown_hint(self.tracker.throttle_reasons(), gpu_gib(self.accelerator.device))
            say(f"step {step.number}: steps take {self.pace.times:.1f} times as long as before; {why}")
        self._log(step)
        due = step.number == trainer.steps or step.number % trainer.save_every == 0
        if trainer.validate_every and (due or step.number % trainer.validate_every == 0):
            self._validate(may_be_best=due)
        last = step.number == trainer.steps or self.exhausted()
        if last or (self.config.sample.every and step.number % self.config.sample.every == 0):
            self._preview()
        if due:
            self.save()

    def save(self) -> Path:
        """Write a checkpoint of this very step and delete those no longer kept."""
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
        fallbacks = self.fallbacks
        self.state = replace(
            self.state,
            scaler=scaler,
            requested=self.requested,
            taken=settings(self.config),
            micro_batch=fallbacks.micro_batch,
            fallbacks=len(fallbacks.applied),
            slow_steps=self.pace.slow,
        )
        path = checkpoint.at(self.folder, self.state.step)
        if distributed.rank() == 0:
            checkpoint.save(
                self.folder,
                self.state,
                lora.state(self.task.model),
                self.optimizer.optimizer.state_dict(),
                self.ema.state() if self.ema else None,
            )
            checkpoint.prune(self.folder, self.config.trainer.keep_checkpoints, [self.state.best_step])
        return path

    def finish(self, training_hash: str) -> Run:
        """The record of the finished run."""
        state = self.state
        trainable, total = lora.counts(self.task.model)
        run = Run(
            folder=str(self.run_dir),
            checkpoint=str(checkpoint.at(self.folder, state.step)),
            steps=state.step,
            trainable=trainable,
            total=total,
            first_loss=state.first_loss,
            last_loss=self._last_loss(),
            first_validation=state.first_validation,
            best_validation=state.best_validation,
            best_step=state.best_step,
            unit=self.task.unit,
            items=state.count,
            seconds=state.seconds,
            peak_gib=max(self.peak_gib, peak_gib(self.accelerator.device)),
            skipped_steps=state.skipped_steps,
            training_hash=training_hash,
            micro_batch=self.fallbacks.micro_batch,
            effective=self._effective(),
            processes=distributed.world_size(),
            oom_fallbacks=self.fallbacks.summary,
            planned_gib=state.planned_gib,
            dry_run_gib=state.dry_run_gib,
            measured_gib=None if state.dry_run_gib is None else peak_gib(self.accelerator.device),
        )
        figures = {
            "final/loss": run.last_loss,
            f"final/{run.unit}_per_s": run.items_per_s,
            "final/peak_gib": run.peak_gib,
        }
        if run.best_validation is not None:
            figures["final/validation"] = run.best_validation
        self.tracker.hparams(self.identity, figures)
        return run

    def close(self) -> None:
        """Flush the curves."""
        if distributed.rank() == 0:
            self.tracker.close()

    @contextmanager
    def _dry_run(self) -> Iterator[None]:
        """Inside, the GPU holds all that it will after the first step, whose worst case was tried and undone."""
        if not self.dry_run_first:
            yield
            return
        checked = "fit: " + " ".join(f"{key}={str(value).lower()}" for key, value in settings(self.config).items())
        planned = "" if self.planned_gib is None else f"; {self.planned_gib:.1f} GiB planned"
        say(f"{checked}{planned}; trying the worst step")
        enable_tiling = build_optimizer(
            lora.parameter_groups(self.task.model, self.config.optim.lora_plus), self.config.optim
        )
        oom_fallbacks = dry_run(
            self.task,
            enable_tiling,
            self.accelerator,
            fallbacks=self.fallbacks,
            micro_batches=min(2, self.config.trainer.accumulate),
        )
        if oom_fallbacks:
            say(f"fit: it did not fit; starting with {', then '.join(oom_fallbacks)}; same effective batch")
        yield
        dry_run_gib = peak_gib(self.accelerator.device)
        say(f"fit: {dry_run_gib:.1f} GiB taken")
        self.state = replace(self.state, planned_gib=self.planned_gib, dry_run_gib=dry_run_gib)

    def _last_loss(self) -> float:
        steps = self.state.step
        losses = [
            loss for step, loss in curves.read(self.run_dir).get("loss/step", []) if step > steps - LAST_SHARE * steps
        ]
        return sum(losses) / len(losses) if losses else self.state.smoothed_loss

    def _draws(self) -> Iterator[Sequence[Draw]]:
        """This process's visits of every remaining step: every so many-th of the micro-batches that one would take."""
        trainer, several = self.config.trainer, distributed.world_size()
        chunks = self.task.steps(effective=self._effective(), start=self.state.step)
        for chunk in itertools.islice(chunks, trainer.steps - self.state.step):
            parts = self.task.split(chunk, trainer.micro_batch)
            yield chunk if several == 1 else list(itertools.chain(*parts[distributed.rank() :: several]))

    def _effective(self) -> int:
        """Examples in one optimiser step of all processes."""
        return self.config.trainer.micro_batch * self.config.trainer.accumulate * distributed.world_size()

    def _log(self, step: Step) -> None:
        if distributed.rank():
            return
        values = {
            "loss/step": step.loss,
            "loss/smoothed": self.state.smoothed_loss,
            "train/learning_rate": step.lr,
            "train/gradient_norm": step.grad_norm,
            "train/skipped_steps": float(self.state.skipped_steps),
        }
        self.pending_seconds += step.seconds
        self.pending_count += step.count
        self.pending_padded_count += step.padded_count
        if step.number % self.config.trainer.log_every == 0 or step.number == self.config.trainer.steps:
            values[f"train/{self.task.unit}_per_s"] = self.pending_count / self.pending_seconds
            if self.pending_padded_count > self.pending_count:
                values["train/padding"] = 1 - self.pending_count / self.pending_padded_count
            values |= self.tracker.hardware()
            self.pending_seconds, self.pending_count, self.pending_padded_count = 0.0, 0, 0
        self.tracker.scalars(step.number, values)

    def _validate(self, *, may_be_best: bool = False) -> None:
        if not self.config.trainer.validate_every:
            return
        # By one process for all: whether to stop early must not hang on how two of them round.
        losses = distributed.on_first_rank(self._validated)
        if losses is None:
            raise OutOfMemory(f"out of memory in validation, one example at a time; {smallest(self.config)}")
        if distributed.rank() == 0:
            self.tracker.scalars(self.state.step, {f"validation/{key}": value for key, value in losses.items()})
        state, mean = self.state, losses["mean"]
        if state.first_validation is None:
            self.state = replace(state, first_validation=mean)
        elif may_be_best and (state.best_validation is None or mean < state.best_validation):
            self.state = replace(state, best_validation=mean, best_step=state.step, waited=0)
        elif may_be_best:
            self.state = replace(state, waited=state.waited + 1)

    def _preview(self) -> None:
        sample = self.config.sample
        prompts = sample.prompts[: sample.previews]
        if not prompts or not self.previewing or distributed.rank():
            return
        previews = try_within_memory(partial(self.task.sample, prompts, sample.seeds[0]), drop=self._back())
        if previews is None:
            self.previewing = False
            say(f"step {self.state.step}: memory ran out even for a single preview; training goes on without")
            return
        named = {
            f"samples/{index}: {prompt}": preview
            for index, (prompt, preview) in enumerate(zip(prompts, previews, strict=True))
        }
        self.tracker.previews(self.state.step, named)

    def _validated(self) -> dict[str, float] | None:
        """Losses of so many examples at once as memory has room for; None if not even for one."""
        size = min(self.validation_batch, self.fallbacks.micro_batch)
        while (done := try_within_memory(partial(self.task.validate, size), drop=self._back())) is None and size > 1:
            self.validation_batch = size = size // 2
            say(f"step {self.state.step}: memory ran out; validation by {size} at a time")
        return done

    def _back(self) -> Callable[[], Any]:
        """Brings the model back from whatever mode an attempt leaves it in."""
        return partial(self.task.model.train, self.task.model.training)

    def _texts(self) -> None:
        if distributed.rank():
            return
        lines = "\n".join(f"    {key}: {value}" for key, value in flat(as_dict(self.config)).items())
        self.tracker.text("configuration", lines)
        for title, text in self.task.notes().items():
            self.tracker.text(title, text)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
