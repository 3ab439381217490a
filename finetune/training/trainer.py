"""One training run in progress: what surrounds the steps of `training.loop`, in the order in which it happens."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from finetune.adapters import lora
from finetune.config.schema import OptimConfig, SampleConfig, TrainerConfig
from finetune.config.spelling import override
from finetune.errors import OutOfMemory
from finetune.memory.device import peak_gib
from finetune.memory.fallbacks import try_within_memory
from finetune.run import ranks, smoothing
from finetune.run.progress import Progress, plural, progress, say
from finetune.run.records import Run
from finetune.run.signals import Stop
from finetune.training import checkpoint, distributed, measured
from finetune.training.accelerator import prepare
from finetune.training.checkpoint import TrainState
from finetune.training.dry_run import dry_run
from finetune.training.ema import Ema
from finetune.training.loop import Step, fit
from finetune.training.oom import OomFallbacks
from finetune.training.optim import build_optimizer, learning_rate, load_state
from finetune.training.slow_steps import Machine, SlowSteps
from finetune.training.task import Draw, Task
from finetune.training.tracking import Tracker


@dataclass
class Trainer:
    """The state that checkpoints store and curves show, and what is done before, after and between the steps.

    trainer: with the memory settings that were chosen, `applied`; requested: those that were given. machine: is asked
    about slow steps. hint: what to type when memory runs out and no fallback is left. shown: all settings, by dotted
    key, for TensorBoard. dry_run_first: whether the largest step is tried before the first. planned_gib: what the plan
    says of this training, if it was asked for. comparable: micro-batches of which only a measurement can say which is
    fastest. peak_gib: of everything before.
    """

    task: Task
    accelerator: Accelerator
    run_dir: Path
    trainer: TrainerConfig
    optim: OptimConfig
    sample: SampleConfig
    seed: int
    machine: Machine
    hint: str
    identity: dict[str, Any] = field(default_factory=dict)
    shown: Mapping[str, Any] = field(default_factory=dict)
    requested: dict[str, Any] = field(default_factory=dict)
    applied: dict[str, Any] = field(default_factory=dict)
    resumed: checkpoint.Checkpoint | None = None
    dry_run_first: bool = False
    planned_gib: float | None = None
    comparable: tuple[int, ...] = ()
    peak_gib: float = 0.0

    def __post_init__(self) -> None:
        self.folder = self.run_dir / "checkpoints"
        self.effective_batch = self.trainer.micro_batch * self.trainer.accumulate * ranks.world_size()
        self.fallbacks = OomFallbacks(self.trainer.micro_batch, self.task.reduce_memory, self.hint)
        self.slow_steps = SlowSteps(self.machine)
        self.ema: Ema | None = None
        optimizer = build_optimizer(self._parameter_groups(), self.optim)
        if self.resumed is None:
            self.state = TrainState(identity=self.identity)
        else:
            self._resume(self.resumed, optimizer)
        if self.trainer.ema_decay and self.ema is None:
            self.ema = Ema(self.trainer.ema_decay, lora.trainable_tensors(self.task.model))
        self.task.model, self.optimizer = prepare(self.accelerator, self.task.model, optimizer)
        if self.state.scaler and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self.state.scaler)
        if ranks.rank() == 0:  # only the first process writes
            self.tracker = Tracker(self.run_dir, self.state.step, self.accelerator.device)
        self.previewing, self.validation_batch = True, self.trainer.micro_batch

    def start(self) -> None:
        """Say what is trained, make sure that the largest step fits, and look at the model before the first step."""
        trainable, total = lora.counts(self.task.model)
        examples = plural(self.task.size, "example")
        say(f"train: {trainable:,} of {total:,} parameters ({trainable / total:.2%}), {examples}")
        spare = self._dry_run() if self.dry_run_first else None
        if spare is not None and self.resumed is None and ranks.world_size() == 1 and not self.fallbacks.summary:
            self._measure(spare)
        if self.state.step == 0:
            self._write_texts()
            self._validate()
            self._end_row()
            self._preview()
        if spare is not None:  # its state was there meanwhile, as the optimiser's is after the first step
            taken = peak_gib(self.accelerator.device)
            say(f"autotune: {taken:.1f} GiB taken in the dry run")
            self.state = replace(self.state, planned_gib=self.planned_gib, dry_run_gib=taken)

    def bar(self) -> AbstractContextManager[Progress]:
        """The progress bar of the steps."""
        return progress("train", self.trainer.steps, unit="steps", done=self.state.step)

    def steps(self, stop: Stop | None = None) -> Iterator[Step]:
        """The loop over every remaining step. stop: of a signal."""
        return fit(
            self.task,
            self.draws(),
            self.optimizer,
            self.rate,
            self.accelerator,
            fallbacks=self.fallbacks,
            seed=self.seed,
            start=self.state.step,
            clip_norm=self.trainer.clip_norm,
            max_bad_steps=self.trainer.max_bad_steps,
            stop=stop,
        )

    def draws(self) -> Iterator[Sequence[Draw]]:
        """This process's draws of every remaining step: every so many-th of the micro-batches that one would take.

        None where training has stopped early already.
        """
        if self.exhausted():
            return
        several = ranks.world_size()
        chunks = self.task.steps(effective=self.effective_batch, start=self.state.step)
        for chunk in itertools.islice(chunks, self.trainer.steps - self.state.step):
            parts = self.task.split(chunk, self.trainer.micro_batch)
            yield chunk if several == 1 else list(itertools.chain(*parts[ranks.rank() :: several]))

    def rate(self, number: int) -> float:
        """The learning rate of a step, counted from 0."""
        return learning_rate(self.optim, number, self.trainer.steps)

    def after_step(self, step: Step) -> None:
        """Take one step into the state and do what is due after it."""
        trainer = self.trainer
        self._count(step)
        self._log(step)
        due = step.number == trainer.steps or step.number % trainer.save_every == 0
        if trainer.validate_every and (due or step.number % trainer.validate_every == 0):
            self._validate(may_be_best=due)
        self._end_row()
        due = due or self.exhausted()
        last = step.number == trainer.steps or self.exhausted()
        if last or (self.sample.every and step.number % self.sample.every == 0):
            self._preview()
        if due:
            self.save()

    def exhausted(self) -> bool:
        """Whether the last `trainer.patience` validations found no lower loss."""
        return bool(self.trainer.patience) and self.state.waited >= self.trainer.patience

    def save(self) -> Path:
        """Write a checkpoint of this very step and delete those no longer kept."""
        self._meter()
        self.state = replace(
            self.state,
            scaler=self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
            requested=self.requested,
            applied=self.applied,
            micro_batch=self.fallbacks.micro_batch,
            fallbacks=len(self.fallbacks.applied),
        )
        if ranks.rank() == 0:
            checkpoint.save(
                self.folder,
                self.state,
                lora.state(self.task.model),
                self.optimizer.optimizer.state_dict(),
                self.ema.state() if self.ema else None,
            )
            checkpoint.prune(self.folder, self.trainer.keep_checkpoints, [self.state.best_step])
        return checkpoint.at(self.folder, self.state.step)

    def finish(self, training_hash: str) -> Run:
        """The record of the finished run."""
        state, peak = self.state, peak_gib(self.accelerator.device)
        trainable, total = lora.counts(self.task.model)
        run = Run(
            folder=str(self.run_dir),
            checkpoint=str(checkpoint.at(self.folder, state.step)),
            steps=state.step,
            trainable=trainable,
            total=total,
            first_loss=state.first_loss,
            last_loss=state.smoothed_loss,
            first_validation=state.first_validation,
            best_validation=state.best_validation,
            best_step=state.best_step,
            unit=self.task.unit,
            items=state.count,
            seconds=state.seconds,
            peak_gib=max(self.peak_gib, peak),
            skipped_steps=state.skipped_steps,
            training_hash=training_hash,
            micro_batch=self.fallbacks.micro_batch,
            effective=self.effective_batch,
            processes=ranks.world_size(),
            oom_fallbacks=self.fallbacks.summary,
            planned_gib=state.planned_gib,
            dry_run_gib=state.dry_run_gib,
            measured_gib=None if state.dry_run_gib is None else peak,
            energy_j=state.energy_j,
            energy_s=state.energy_s,
        )
        tags = ["loss/smoothed", f"train/{run.unit}_per_s", "system/memory_gib"]
        tags += ["validation/mean"] if run.best_validation is not None else []
        self.tracker.hparams(self.identity, tags)
        return run

    def close(self) -> None:
        """Flush the curves."""
        if ranks.rank() == 0:
            self.tracker.close()

    def _resume(self, resumed: checkpoint.Checkpoint, optimizer: Any) -> None:
        self.state = replace(resumed.state, identity=self.identity)
        lora.load_state(self.task.model, resumed.adapter, str(resumed.folder))
        load_state(optimizer, resumed.optimizer)
        if self.state.fits(self.requested):  # else the user has thought about memory again
            self.fallbacks.restore(self.state.micro_batch, self.state.fallbacks)
        if resumed.ema is not None:
            self.ema = Ema.restore(self.trainer.ema_decay, resumed.ema, self.accelerator.device)
        say(f"train: going on from step {self.state.step}")

    def _parameter_groups(self) -> list[dict[str, Any]]:
        return lora.parameter_groups(self.task.model, self.optim.lora_plus)

    def _dry_run(self) -> torch.optim.Optimizer:
        """Returns the optimiser that was used, whose state takes the place of the real one's as long as it is held."""
        settings = " ".join(override(key, value) for key, value in self.applied.items())
        planned = "" if self.planned_gib is None else f"; {self.planned_gib:.1f} GiB planned"
        say(f"autotune: {settings}{planned}; dry run of the largest step")
        spare = build_optimizer(self._parameter_groups(), self.optim)
        micro_batches = min(2, self.trainer.accumulate)
        needed = dry_run(
            self.task, spare, self.accelerator, fallbacks=self.fallbacks, micro_batches=micro_batches
        )  # fmt: skip
        if needed:
            say(
                f"autotune: memory ran out in the dry run; starting with {', then '.join(needed)}; "
                "the effective batch stays"
            )
        return spare

    def _measure(self, spare: torch.optim.Optimizer) -> None:
        """Train with the fastest of the micro-batches that the plan can't tell apart, in this run and its later parts.

        Nothing else changes: weights stay, and each micro-batch seeds its own random numbers.
        """
        if not measured.repays(len(self.comparable), self.trainer.steps):
            return
        times = measured.seconds(self.comparable, self.task, next(self.draws()), spare, self.accelerator)
        planned = self.fallbacks.micro_batch
        size = measured.fastest(times, planned) if times else planned
        listed = ", ".join(f"{each}: {1000 * seconds:.0f} ms" for each, seconds in times.items())
        say(f"autotune: a step by micro-batch, measured: {listed}; training with {override('micro_batch', size)}")
        accumulate = self.effective_batch // size
        self.trainer = replace(self.trainer, micro_batch=size, accumulate=accumulate)
        self.applied = self.applied | {"micro_batch": size, "accumulate": accumulate}
        self.fallbacks, self.validation_batch = OomFallbacks(size, self.task.reduce_memory, self.hint), size

    def _end_row(self) -> None:
        if ranks.rank() == 0:
            self.tracker.end_row()

    def _write_texts(self) -> None:
        if ranks.rank():
            return
        self.tracker.text("configuration", "\n".join(f"    {key}: {value}" for key, value in self.shown.items()))
        for title, text in self.task.notes().items():
            self.tracker.text(title, text)

    def _validate(self, *, may_be_best: bool = False) -> None:
        if not self.trainer.validate_every:
            return
        # By one process for all: whether to stop early must not hang on how two of them round.
        losses = distributed.on_first_rank(self._validation_losses)
        if losses is None:
            raise OutOfMemory(f"out of memory in validation, one example at a time; {self.hint}")
        if ranks.rank() == 0:
            self.tracker.scalars(self.state.step, {f"validation/{key}": value for key, value in losses.items()})
        state, mean = self.state, losses["mean"]
        if state.first_validation is None:
            self.state = replace(state, first_validation=mean)
            return
        lowest = state.best_validation if state.lowest_validation is None else state.lowest_validation
        if lowest is None or mean < lowest:
            self.state = state = replace(state, lowest_validation=mean, lowest_step=state.step, waited=0)
        else:
            self.state = state = replace(state, waited=state.waited + 1)
        saved = may_be_best or self.exhausted()  # the best checkpoint has to be one that is on disk
        if saved and (state.best_validation is None or mean < state.best_validation):
            self.state = replace(state, best_validation=mean, best_step=state.step)

    def _validation_losses(self) -> dict[str, float] | None:
        """Of so many examples at once as memory has room for; None if not even for one."""
        size = min(self.validation_batch, self.fallbacks.micro_batch)
        while (
            found := try_within_memory(partial(self.task.validate, size), cleanup=self._mode())
        ) is None and size > 1:
            self.validation_batch = size = size // 2
            say(f"step {self.state.step}: memory ran out; validation by {size} at a time")
        return found

    def _preview(self) -> None:
        prompts = self.sample.prompts[: self.sample.previews]
        if not prompts or not self.previewing or ranks.rank():
            return
        previews = try_within_memory(
            partial(self.task.sample, prompts, self.sample.seeds[0]), cleanup=self._mode()
        )  # fmt: skip
        if previews is None:
            self.previewing = False
            say(f"step {self.state.step}: memory ran out even for one preview; training continues without")
            return
        named = {
            f"samples/{index}: {prompt}": preview
            for index, (prompt, preview) in enumerate(zip(prompts, previews, strict=True))
        }
        self.tracker.previews(self.state.step, named)

    def _mode(self) -> Callable[[], Any]:
        """Brings the model back from whatever mode an attempt leaves it in."""
        return partial(self.task.model.train, self.task.model.training)

    def _count(self, step: Step) -> None:
        """Take the step's figures into the state."""
        state = self.state
        if step.oom_fallbacks:
            tried = ", then ".join(step.oom_fallbacks)
            say(
                f"step {step.number}: memory ran out; continuing with {tried}; "
                f"effective batch still {self.effective_batch}"
            )
        if step.skip_reason:
            say(f"step {step.number} skipped (non-finite): {step.skip_reason}")
            self.state = replace(state, step=step.number, skipped_steps=state.skipped_steps + 1)
            return
        first = state.count == 0
        taken = step.number - state.skipped_steps
        weight = smoothing.new_weight(self.trainer.steps)
        self.state = replace(
            state,
            step=step.number,
            count=state.count + step.count,
            seconds=state.seconds + step.seconds,
            first_loss=step.loss if first else state.first_loss,
            smoothed_loss=smoothing.smoothed(state.smoothed_loss, step.loss, taken, weight),
        )
        if self.ema:
            self.ema.update(lora.trainable_tensors(self.task.model))

    def _log(self, step: Step) -> None:
        state = self.state
        self.state = replace(
            state,
            interval_seconds=state.interval_seconds + step.seconds,
            interval_count=state.interval_count + step.count,
            interval_padded_count=state.interval_padded_count + step.padded_count,
        )
        if ranks.rank():
            return
        values = self.slow_steps.see(step) | {
            "loss/step": step.loss,
            "loss/smoothed": self.state.smoothed_loss,
            "train/learning_rate": step.lr,
            "train/gradient_norm": step.grad_norm,
            "train/skipped_steps": float(self.state.skipped_steps),
        }
        if step.number % self.trainer.log_every == 0 or step.number == self.trainer.steps:
            count, padded_count = self.state.interval_count, self.state.interval_padded_count
            values[f"train/{self.task.unit}_per_s"] = count / self.state.interval_seconds
            if padded_count > count:
                values["train/padding"] = 1 - count / padded_count
            values |= self.tracker.hardware()
            self._meter()
            self.machine.start()
            self.state = replace(self.state, interval_seconds=0.0, interval_count=0, interval_padded_count=0)
        self.tracker.scalars(step.number, values)

    def _meter(self) -> None:
        """Take the energy since the last look into the state."""
        if ranks.rank() == 0 and (taken := self.tracker.energy.look()):
            joules, seconds = taken
            state = self.state
            self.state = replace(state, energy_j=(state.energy_j or 0.0) + joules, energy_s=state.energy_s + seconds)
