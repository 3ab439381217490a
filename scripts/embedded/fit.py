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
import torch.distributed as dist
from torch import Tensor, nn

from scripts.embedded.weights import FlatWeights

WARMUP_STEPS = 200
MAX_GRADIENT_NORM = 1.0
SAY_EVERY_S = 15.0


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
    betas: tuple[float, float] = (0.9, 0.99),
    bf16: bool = False,
    compiles: bool = False,
) -> Fitted:
    """Train `model` in place and leave the moving average of its weights in it, in fp32.

    `draw` makes a step's batch, in full precision; `loss_of(*batch)` runs the model. All randomness comes from the
    generator that `draw` is given, which depends on the seed and the step alone: a run that was cut and continued sees
    what an uninterrupted one of as many steps sees. `pause_at`: the time (as time.time() counts) when the training
    pauses, for another call to go on at the same place of its schedule.

    Processes that torchrun started train as one: each draws its own part of a step's batch, the first one decides on
    rate and end and saves.

    `bf16`: the model computes on bf16 weights, and a GPU replays forward and backward pass as one CUDA graph (shapes
    never change, and small networks otherwise wait for kernel launches). Otherwise a GPU computes under autocast.
    `compiles`: torch.compile first joins norms, activations and losses into kernels of their own.
    """
    device, rank = next(model.parameters()).device, rank_and_count()[0]
    weights = FlatWeights(model, torch.bfloat16 if bf16 else torch.float32)
    averages_W = weights.master_W.detach().clone()
    optimizer = torch.optim.AdamW(
        [weights.master_W], lr=lr, betas=betas, weight_decay=0.01, fused=device.type == "cuda"
    )
    step, seconds, loss_value = 0, 0.0, math.nan
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        if state["strides"] != weights.strides:
            raise ValueError(f"{checkpoint} holds weights of another shape or order; remove it to train anew")
        weights.master_W.data.copy_(state["weights"])
        averages_W.copy_(state["averages"])
        optimizer.load_state_dict(state["optimizer"])
        for buffer, value in zip(model.buffers(), state["buffers"], strict=True):
            buffer.copy_(value)
        step, seconds, loss_value = state["step"], state["seconds"], state["loss"]
        print(f"{name}: continues at step {step} after {seconds:.0f} s", flush=True)
    weights.publish()

    def save() -> None:
        if rank:
            return
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
    if compiles:
        loss_of = torch.compile(loss_of, dynamic=False)
    forward_backward = stepper(weights, loss_of, autocasts=device.type == "cuda" and not bf16)
    if device.type == "cuda" and bf16 and budget.progress(seconds, step) < 1.0:
        forward_backward = captured(forward_backward, draw(generator))
    loss: Tensor | None = None
    last = saved = said = time.monotonic()
    while True:
        progress, pauses = agreed(budget.progress(seconds, step), time.time() >= pause_at)
        if progress >= 1.0 or pauses:
            break
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        optimizer.param_groups[0]["lr"] = lr * warmup * 0.5 * (1.0 + math.cos(math.pi * progress))
        generator.manual_seed((seed + rank) * 1_000_003 + step)
        loss = forward_backward(*draw(generator))
        weights.collect_gradients()
        average(weights.master_W.grad)
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
            print(f"{name}: step {step}  loss {loss_value:.4f}  {seconds:.0f}/{budget.seconds:.0f} s", flush=True)
        if now - saved > save_every_s:
            save()
            saved = time.monotonic()
    if loss is not None:
        loss_value = loss.item()
        save()
    weights.release(averages_W)
    model.eval()
    fitted = Fitted(step, seconds, loss_value, progress >= 1.0)
    if rank == 0:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        trained_on = {"hardware": torch.cuda.get_device_name() if device.type == "cuda" else "CPU"}
        checkpoint.with_suffix(".json").write_text(json.dumps(asdict(fitted) | trained_on))
    ending = "done" if fitted.done else "pauses"
    print(f"{name}: {ending}, {step} steps in {seconds:.0f} s, loss {loss_value:.4f}", flush=True)
    return fitted


def rank_and_count() -> tuple[int, int]:
    """This process among those that train as one, and how many they are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def agreed(progress: float, pauses: bool) -> tuple[float, bool]:
    """What the first process says: clocks differ, and all must end with the same step."""
    if not dist.is_initialized():
        return progress, pauses
    said = torch.tensor([progress, float(pauses)], dtype=torch.float64)
    dist.broadcast(said, src=0)
    return float(said[0]), bool(said[1])


def average(gradients_W: Tensor | None) -> None:
    """The mean over all processes, in place."""
    if dist.is_initialized() and gradients_W is not None:
        dist.all_reduce(gradients_W)
        gradients_W /= dist.get_world_size()


def stepper(weights: FlatWeights, loss_of: LossOf, *, autocasts: bool) -> Callable[..., Tensor]:
    """A function that leaves a batch's gradients in `weights` and returns its loss."""

    def backward(*batch: Tensor) -> Tensor:
        weights.gradients_W.zero_()
        with torch.autocast(weights.master_W.device.type, torch.bfloat16, enabled=autocasts):
            loss = loss_of(*batch)
        loss.backward()
        return loss.detach()

    return backward


def captured(backward: Callable[..., Tensor], batch: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """`backward` as one CUDA graph for batches of this shape."""
    inputs = [tensor.clone() for tensor in batch]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries choose their kernels before the capture
            backward(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        loss = backward(*inputs)

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
