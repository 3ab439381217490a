"""Measures how fast the training steps are in each variant, on random data, and which kernels take the time.

Run before a training on a new machine: `chosen_variant` reads what is written here. Each figure is written as soon as
it is known, so the probe may be stopped at any moment.
"""

import json
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from scripts.embedded import autoencoder, diffusion
from scripts.embedded.fit import Draw, LossOf, stepper
from scripts.embedded.settings import CAPTION_VARIANTS, LATENT_CHANNELS, PICTURE_PX, Settings
from scripts.embedded.team import Team, together
from scripts.embedded.variants import Variant
from scripts.embedded.vocabularies import train_clip_tokenizer
from scripts.embedded.weights import FlatWeights
from scripts.toyworld.captions import caption
from scripts.toyworld.scene import sample_scene

# The likeliest winners first, the one of the first release last, for comparison.
VARIANTS = (
    "channels_last+bf16+eager",
    "channels_last+bf16+compiled",
    "contiguous+bf16+eager",
    "channels_last+autocast+eager",
)
TIMED_S = 1.5
MOST_KERNELS = 12
ALL_WEIGHTS = 13_500_000  # of UNet and text encoder

Task = tuple[nn.Module, Draw, LossOf]


def probe(settings: Settings) -> None:
    probe_autoencoder(settings)
    probe_diffusion(settings)
    probe_team(settings)


def probe_autoencoder(settings: Settings) -> None:
    pictures = torch.randint(0, 256, (256, 3, PICTURE_PX, PICTURE_PX), dtype=torch.uint8).to(settings.device)

    def build(variant: Variant) -> Task:
        vae = autoencoder.new_autoencoder().to(settings.device, memory_format=variant.memory_format)
        draw = autoencoder.batches(pictures, settings.batch(32, at_least=64))
        return vae, draw, autoencoder.loss_with(vae)

    measure(settings, "autoencoder", build)


def probe_diffusion(settings: Settings) -> None:
    size = PICTURE_PX // 8
    latents = torch.randn(256, LATENT_CHANNELS, size, size, device=settings.device)
    captions = [[caption(sample_scene(seed), form) for form in range(CAPTION_VARIANTS)] for seed in range(256)]
    tokenizer = train_clip_tokenizer(text for variants in captions for text in variants)
    tokens = diffusion.tokenise(tokenizer, captions).to(settings.device)

    def build(variant: Variant) -> Task:
        unet = diffusion.new_unet().to(settings.device, memory_format=variant.memory_format)
        text_encoder = diffusion.new_text_encoder(tokenizer).to(settings.device)
        draw = diffusion.batches(latents, tokens, tokenizer, settings.batch(256, at_least=512))
        return (
            nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}),
            draw,
            diffusion.loss_with(unet, text_encoder),
        )

    measure(settings, "diffusion", build)


def probe_team(settings: Settings) -> None:
    """Milliseconds of one all-reduce of all gradients; an isolation that fails leaves no figure and is not used."""
    if settings.processes == 1:
        return
    for isolated in (False, True):
        try:
            together(time_all_reduce, settings, isolated)
        except Exception as error:  # whatever it is, the answer is the other way
            print(f"probe: team isolated={isolated} fails: {error}", flush=True)


def time_all_reduce(settings: Settings, team: Team) -> None:
    vector = torch.ones(ALL_WEIGHTS, device=settings.device)
    milliseconds = time_calls(lambda: team.average_(vector), settings.device, calls=3 if settings.tiny else 50)
    if team.leads:
        # Without isolation the leader's device is cuda:0 as well; what tells them apart is how many GPUs it sees.
        alone = settings.device.startswith("cuda") and torch.cuda.device_count() == 1
        record(settings, "team", "isolated" if alone else "shared", milliseconds)


def measure(settings: Settings, name: str, build: Callable[[Variant], Task]) -> None:
    """Time every variant, as far as the time goes, then profile the fastest."""
    ends = time.monotonic() + settings.minutes["probe"] * 60
    generator = torch.Generator(settings.device)
    found: dict[str, float] = {}
    for text in VARIANTS:
        if found and time.monotonic() > ends:
            break
        variant = Variant.parse(text)
        model, draw, loss_of = build(variant)
        batch = draw(generator)
        began = time.monotonic()
        step = stepper(FlatWeights(model, variant.dtype), loss_of, variant, batch)
        step(*batch)
        synchronise(settings.device)
        ready_s = time.monotonic() - began
        found[text] = time_calls(lambda: step(*batch), settings.device, calls=1 if settings.tiny else 20)  # noqa: B023
        record(settings, name, text, found[text], f"({len(batch[0])} pictures; ready after {ready_s:.0f} s)")
        torch.compiler.reset()
    print(f"probe: {name} draw {time_calls(lambda: draw(generator), settings.device, calls=10):.1f} ms", flush=True)
    variant = Variant.parse(min(found, key=lambda text: found[text]))
    model, draw, loss_of = build(variant)
    profile(f"{name} {variant}", stepper(FlatWeights(model, variant.dtype), loss_of, variant, None), draw(generator))


def time_calls(call: Callable[[], object], device: str, calls: int) -> float:
    """Milliseconds a call, over as many calls as asked for or as fit into the time."""
    for _ in range(2):
        call()
    synchronise(device)
    began = time.perf_counter()
    for count in range(1, calls + 1):
        call()
        if count % 5 == 0:  # calls are queued: only now is it known how long they take
            synchronise(device)
            if time.perf_counter() - began > TIMED_S:
                break
    synchronise(device)
    return 1000.0 * (time.perf_counter() - began) / count


def profile(name: str, step: Callable[..., Tensor], batch: tuple[Tensor, ...]) -> None:
    """Print the kernels that take most time; without a CUDA graph, so that each is named."""
    step(*batch)
    on_gpu = batch[0].is_cuda
    with torch.profiler.profile() as recorded:
        step(*batch)
        synchronise(str(batch[0].device))
    order = f"self_{'device' if on_gpu else 'cpu'}_time_total"
    print(f"probe: {name}, the slowest of one step", flush=True)
    print(recorded.key_averages().table(sort_by=order, row_limit=MOST_KERNELS, max_name_column_width=70), flush=True)


def record(settings: Settings, name: str, what: str, milliseconds: float, note: str = "") -> None:
    path = settings.probed / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | {what: round(milliseconds, 2)}, indent=2) + "\n")
    print(f"probe: {name} {what} {milliseconds:.2f} ms {note}", flush=True)


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
