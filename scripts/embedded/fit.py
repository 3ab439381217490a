"""The one training loop of these scripts: a time budget, a moving average of the weights, checkpoints that resume.

W weights of the model as one vector, see weights.py.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from scripts.embedded.team import ALONE, Team
from scripts.embedded.variants import PLAIN, Variant
from scripts.embedded.weights import FlatWeights

WARMUP_STEPS = 200
MAX_GRADIENT_NORM = 1.0
SAY_EVERY_S = 15.0
MOST_PROCESSES = 64  # keeps the processes' random streams apart


@dataclass(frozen=True)
class Budget:
    """A phase ends when its seconds or its steps are used up, whichever comes first."""

    seconds: float
    steps: int | None = None

    def progress(self, seconds: float, steps: int) -> float:
        """Share of the budget used, from 0 to 1."""
        by_steps = steps / self.steps if self.steps else 0.0
        return min(1.0, max(seconds / self.seconds, by_steps))


@dataclass(frozen=True)
class Fitted:
    steps: int
    seconds: float
    loss: float
    done: bool
    """False where the training only pauses."""


Draw = Callable[[torch.Generator], tuple[Tensor, ...]]
LossOf = Callable[..., Tensor]


def fit(
    model: nn.Module,
    draw: Draw,
    loss_of: LossOf,
    *,
    name: str,
    budget: Budget,
    lr: float,
    checkpoint: Path,
    seed: int,
    ema_decay: float = 0.999,
    save_every_s: float = 60.0,
    pause_at: float = math.inf,
    graph: bool = False,
    variant: Variant = PLAIN,
    team: Team = ALONE,
) -> Fitted:
    """Train `model` in place and leave the moving average of its weights in it, in fp32.

    `draw` makes a step's batch, in full precision; `loss_of(*batch)` runs the model. All randomness comes from the
    generator that `draw` is given, which depends on the seed, the step and the process alone: a run that was cut and
    continued sees what an uninterrupted one of as many steps sees. `graph`: on a GPU, replay forward and backward pass
    as one CUDA graph (shapes never change, and small networks otherwise wait for kernel launches). `pause_at`: the
    time (as time.time() counts) when the training pauses, for another call to go on at the same place of its schedule.

    In a team every process calls this with the same arguments but its own model and data on its own device: gradients
    are averaged each step, so that all take the same step; the leader keeps the time and the checkpoint.
    """
    device = next(model.parameters()).device
    weights = FlatWeights(model, variant.dtype)
    team.share_(weights.master_W.data)
    averages_W = weights.master_W.detach().clone()
    optimizer = torch.optim.AdamW(
        [weights.master_W], lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda"
    )
    step, seconds, loss_value = 0, 0.0, math.nan
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        if state["strides"] != weights.strides:
            raise ValueError(f"{checkpoint} orders its weights otherwise; name its --variant, or remove it")
        weights.master_W.data.copy_(state["weights"])
        averages_W.copy_(state["averages"])
        optimizer.load_state_dict(state["optimizer"])
        for buffer, value in zip(model.buffers(), state["buffers"], strict=True):
            buffer.copy_(value)
        step, seconds, loss_value = state["step"], state["seconds"], state["loss"]
        say(team, f"{name}: continues at step {step} after {seconds:.0f} s")
    weights.publish()

    def save() -> None:
        if team.leads:
            state = {
                "weights": weights.master_W.data,
                "averages": averages_W,
                "optimizer": optimizer.state_dict(),
                "buffers": list(model.buffers()),
                "strides": weights.strides,
                "step": step,
                "seconds": seconds,
                "loss": loss_value,
            }
            save_atomically(state, checkpoint)

    generator = torch.Generator(device)
    generator.manual_seed(seed)
    model.train()
    forward_backward = stepper(
        weights, loss_of, variant, draw(generator) if graph and seconds < budget.seconds else None
    )
    loss: Tensor | None = None
    last = saved = said = time.monotonic()
    while True:
        seconds, clock = team.follow(seconds, time.time())
        progress = budget.progress(seconds, step)
        if progress >= 1.0 or clock >= pause_at:
            break
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        optimizer.param_groups[0]["lr"] = lr * warmup * 0.5 * (1.0 + math.cos(math.pi * progress))
        generator.manual_seed((seed * 1_000_003 + step) * MOST_PROCESSES + team.rank)
        loss = forward_backward(*draw(generator))
        team.average_(weights.collect_gradients())
        nn.utils.clip_grad_norm_([weights.master_W], MAX_GRADIENT_NORM)
        optimizer.step()
        weights.publish()
        # Early on the plain decay would keep the random start in the average for a thousand steps.
        averages_W.lerp_(weights.master_W.data, 1.0 - min(ema_decay, (1 + step) / (10 + step)))
        step += 1
        now = time.monotonic()
        seconds, last = seconds + now - last, now
        if now - said > SAY_EVERY_S or step == 1:
            loss_value, said = loss.item(), now
            if not math.isfinite(loss_value):
                raise FloatingPointError(
                    f"{name}: loss {loss_value} at step {step}; rerun from {checkpoint}, lr below {lr}"
                )
            say(team, f"{name}: step {step}  loss {loss_value:.4f}  {seconds:.0f}/{budget.seconds:.0f} s")
        if now - saved > save_every_s:
            save()
            saved = time.monotonic()
    if loss is not None:
        loss_value = loss.item()
        save()
    weights.release(averages_W)
    model.eval()
    fitted = Fitted(step, seconds, loss_value, progress >= 1.0)
    if team.leads:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        trained_on = {"hardware": f"{team.size} {torch.cuda.get_device_name()}" if device.type == "cuda" else "CPU"}
        checkpoint.with_suffix(".json").write_text(json.dumps(asdict(fitted) | trained_on))
    ending = "done" if fitted.done else "pauses"
    say(team, f"{name}: {ending}, {step} steps in {seconds:.0f} s, loss {loss_value:.4f}")
    return fitted


def say(team: Team, line: str) -> None:
    if team.leads:
        print(line, flush=True)


def stepper(
    weights: FlatWeights, loss_of: LossOf, variant: Variant, batch: tuple[Tensor, ...] | None
) -> Callable[..., Tensor]:
    """A function that leaves a batch's gradients in `weights` and returns its loss.

    With a `batch`, on a GPU, it replays one CUDA graph for batches of that shape.
    """
    device = weights.master_W.device
    compiled_loss_of = variant.compile(loss_of)
    autocasts = device.type == "cuda" and not variant.bf16

    def backward(*batch: Tensor) -> Tensor:
        weights.gradients_W.zero_()
        # The graph must not hold on to autocast's cached copies of the weights.
        with torch.autocast(device.type, torch.bfloat16, enabled=autocasts, cache_enabled=False):
            loss = compiled_loss_of(*batch)
        loss.backward()
        return loss.detach()

    return backward if batch is None or device.type != "cuda" else captured(backward, batch)


def captured(backward: Callable[..., Tensor], batch: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """`backward` as one CUDA graph for batches of this shape; runs as it is where capturing fails, and says so."""
    inputs = [tensor.clone() for tensor in batch]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries choose their kernels, and compilers compile, before the capture
            backward(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    try:
        # Thread-local: NCCL's watchdog thread may ask for events meanwhile.
        with torch.cuda.graph(recorded, capture_error_mode="thread_local"):
            loss = backward(*inputs)
    except RuntimeError as error:
        print(f"no CUDA graph: {str(error).splitlines()[0]}", flush=True)
        torch.cuda.synchronize()
        return backward

    def replay(*new: Tensor) -> Tensor:
        torch._foreach_copy_(inputs, list(new))
        recorded.replay()
        return loss

    return replay


def save_atomically(state: object, path: Path) -> None:
    """Write beside the target, then rename: a cut at any moment leaves the last complete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)
