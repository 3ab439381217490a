"""The one training loop of these scripts: a time budget, a moving average of the weights, checkpoints that resume."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

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


def fit(
    model: nn.Module,
    draw: Callable[[torch.Generator], tuple[Tensor, ...]],
    loss_of: Callable[..., Tensor],
    *,
    name: str,
    budget: Budget,
    lr: float,
    checkpoint: Path,
    seed: int,
    ema_decay: float = 0.999,
    save_every_s: float = 60.0,
    graph: bool = False,
) -> Fitted:
    """Train `model` in place and leave the moving average of its weights in it.

    `draw` makes a step's batch, in full precision; `loss_of(*batch)` runs the model, on a GPU under bf16 autocast.
    All randomness comes from the generator that `draw` is given, which depends on the seed and the step alone: a run
    that was cut and continued sees what an uninterrupted one of as many steps sees. `graph`: on a GPU, replay forward and
    backward pass as one CUDA graph (shapes never change, and small networks otherwise wait for kernel launches).
    """
    device = next(model.parameters()).device
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    averages = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda")
    step, seconds, loss_value = 0, 0.0, math.nan
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch._foreach_copy_(averages, state["averages"])
        step, seconds, loss_value = state["step"], state["seconds"], state["loss"]
        print(f"{name}: continues at step {step} after {seconds:.0f} s", flush=True)

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "averages": averages,
            "optimizer": optimizer.state_dict(),
            "step": step,
            "seconds": seconds,
            "loss": loss_value,
        }
        save_atomically(state, checkpoint)

    def backward(*batch: Tensor) -> Tensor:
        # The graph must not hold on to autocast's cached copies of the weights.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=not graph):
            loss = loss_of(*batch)
        loss.backward()
        return loss.detach()

    generator = torch.Generator(device)
    forward_backward = backward
    if graph and device.type == "cuda":
        model.train()
        forward_backward = captured(backward, draw(generator), weights)
    loss: Tensor | None = None
    model.train()
    last = saved = said = time.monotonic()
    while (progress := budget.progress(seconds, step)) < 1.0:
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = lr * warmup * 0.5 * (1.0 + math.cos(math.pi * progress))
        generator.manual_seed(seed * 1_000_003 + step)
        batch = draw(generator)
        if forward_backward is backward:  # a graph writes its gradients anew at each replay
            optimizer.zero_grad(set_to_none=True)
        loss = forward_backward(*batch)
        nn.utils.clip_grad_norm_(weights, MAX_GRADIENT_NORM)
        optimizer.step()
        # Early on the plain decay would keep the random start in the average for a thousand steps.
        decay = min(ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1.0 - decay)
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
    with torch.no_grad():
        torch._foreach_copy_(weights, averages)
    model.eval()
    fitted = Fitted(step, seconds, loss_value)
    checkpoint.with_suffix(".json").write_text(json.dumps(asdict(fitted)))
    print(f"{name}: done, {step} steps in {seconds:.0f} s, loss {loss_value:.4f}", flush=True)
    return fitted


def captured(
    backward: Callable[..., Tensor], batch: tuple[Tensor, ...], weights: list[nn.Parameter]
) -> Callable[..., Tensor]:
    """`backward` as one CUDA graph for batches of this shape; runs as it is where capturing fails, and says so."""
    inputs = [tensor.clone() for tensor in batch]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries choose their kernels before the capture
            backward(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    for weight in weights:  # so that the capture allocates gradients of its own, overwritten at each replay
        weight.grad = None
    recorded = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(recorded):
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
