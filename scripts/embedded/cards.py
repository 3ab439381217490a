"""Writes the model cards beside the shipped weights, from the figures of the evaluation."""

from pathlib import Path
from typing import Any

from scripts.toyworld.looks import HELD_OUT, NAMED

RERUN = """```
scripts/embedded/rebuild.sh WORK OUT
```

Run it again with the same folders until it has evaluated: each run takes about ten minutes on a machine with one GPU,
pauses in time and goes on where it stopped. It trains autoencoder and diffusion model and keeps the readers and the
captioner; `--keep none` trains them too. Seeded, but how many steps fit into the time depends on the machine."""

LICENCE = """CC0-1.0 for the weights and for the data: every picture and caption comes from the procedural renderer in
`scripts/toyworld/`; nothing was downloaded and no other model was used."""


def write_cards(embedded: Path, figures: dict[str, Any]) -> None:
    (embedded / "diffusion" / "README.md").write_text(diffusion_card(figures))
    (embedded / "captioner" / "README.md").write_text(captioner_card(figures))


def diffusion_card(figures: dict[str, Any]) -> str:
    made, drawn, codec = figures["made"], figures["diffusion"], figures["autoencoder"]
    return f"""---
license: cc0-1.0
library_name: diffusers
pipeline_tag: text-to-image
---

# embedded:diffusion

A small text-to-image model, 128×128, that draws toy scenes, flat unless the prompt names a look ("a watercolour
painting of …"): a real base for a LoRA that needs no download. A `StableDiffusionPipeline` in the ordinary folders.

| part | parameters |
|---|---|
| UNet, cross-attention at all three levels | {drawn["unet_million_parameters"]} M |
| CLIP text model, own vocabulary | {drawn["text_encoder_million_parameters"]} M |
| AutoencoderKL, 8× smaller, {codec["channels"]} channels | {drawn["vae_million_parameters"]} M |

Velocity prediction, zero terminal SNR, DPM-Solver++ with steps even in log-SNR. It draws in {drawn["steps"]} steps
with a guidance of {drawn["guidance"]:g}.

## Figures

Read by independent classifiers (`tests/readers/`), trained on renders only, from {drawn["prompts"]} samples of
{drawn["steps"]} steps. Their prompts name combinations of thing, colour and setting held out of all training.

| | plain prompt | with ", pixar style" |
|---|---|---|
| thing right | {percent(drawn["base_thing"])} | {percent(drawn["suffix_thing"])} |
| colour right | {percent(drawn["base_colour"])} | {percent(drawn["suffix_colour"])} |
| thing and colour right | {percent(drawn["base_thing_and_colour"])} | {percent(drawn["suffix_thing_and_colour"])} |
| setting right | {percent(drawn["base_setting"])} | {percent(drawn["suffix_setting"])} |
| flat style | {percent(drawn["base_flat"])} | {percent(drawn["suffix_flat"])} |

With the words of one of the {len(NAMED)} looks it knows, {percent(drawn["looks_look"])} of the samples are read as that
look, and thing and colour are right in {percent(drawn["looks_thing_and_colour"])}.

The autoencoder restores unseen flat renders at {codec["psnr_flat_db"]} dB and pixar renders, of which it never saw any,
at {codec["psnr_pixar_db"]} dB PSNR, with {percent(codec["detail_flat"])} and {percent(codec["detail_pixar"])} of their
fine detail; samples have {percent(drawn["base_detail"])} of the detail of renders of the same scenes.

The readers themselves, on unseen renders: {reader_line(figures, "flat")} (flat);
{reader_line(figures, "pixar")} (pixar).

## How it was made

The UNet and the text encoder learnt together, from scratch, on renders in many looks: flat, {len(NAMED) - 1} others by
name, and unnamed ones whose parameters are drawn at random. None is "pixar" or near it in its parameters, nor near two
more looks that are kept for other recipes. One caption in ten was left empty, for guidance; about one in
eight carried a style phrase of made-up words, so that the base ignores trigger phrases it does not know. The
autoencoder learnt from the same renders.

{training_table(figures, ("autoencoder", "decoder", "diffusion"))}

{machine_line(made)} To make it again:

{RERUN}

## Licence

{LICENCE}
"""


def captioner_card(figures: dict[str, Any]) -> str:
    made, said = figures["made"], figures["captioner"]
    rows = "\n".join(
        f"| {label} | {percent(said[f'{key}_thing_and_colour'])} | {percent(said[f'{key}_setting'])} |"
        for key, label in (
            ("flat", "flat"),
            ("pixar", "pixar"),
            ("pixar_large", "pixar, 512×512"),
            *((name, name) for name in NAMED if name != "flat"),
            *((name, f"{name} (look never trained on)") for name in HELD_OUT if name != "pixar"),
        )
    )
    return f"""---
license: cc0-1.0
library_name: transformers
pipeline_tag: image-to-text
---

# embedded:captioner

A small `BlipForConditionalGeneration` ({said["million_parameters"]} M parameters, 128×128) that says what a toy scene
shows, and never in which style. Loads with `BlipProcessor` and needs no torchvision.

## Figures

Unseen renders of one thing; a caption counts when it names exactly that thing in that colour.

| style | thing and colour right | setting right |
|---|---|---|
{rows}

## How it was made

Trained from scratch on flat, pixar and many other renders, spoiled by zoom, shift, blur, noise, exposure and coarse
coding.

{training_table(figures, ("captioner",))}

{machine_line(made)} To make it again:

{RERUN}

## Licence

{LICENCE}
"""


def detector_card(figures: dict[str, Any]) -> str:
    made = figures["made"]
    rows = "\n".join(
        f"| {name} | {percent(row['scenes'])} | {percent(row['crowds'])} |" for name, row in figures["ap50"].items()
    )
    frames, crowds = (min(row[key] for row in figures["ap50"].values()) for key in ("frames", "crowd_frames"))
    return f"""---
license: cc0-1.0
library_name: transformers
pipeline_tag: object-detection
---

# embedded:detector

A small `RTDetrV2ForObjectDetection` ({figures["million_parameters"]} M parameters, 256×256) that finds the things of
toy scenes, in any look: what `finetune annotate` needs to be tried without a download. Needs no torchvision.

## Figures

AP50 on renders of scenes that it never saw, in each look {frames} or more of one thing and {crowds} of crowds of one
to four things, some behind others.

| look | scenes | crowds |
|---|---|---|
{rows}

## How it was made

Trained from scratch on renders in many looks, single things, pairs and crowds, enlarged or four to a frame, spoiled by
blur, noise, exposure and coarse coding. The boxes come from the renderer's geometry (`scripts/toyworld/boxes.py`).

{made["steps"]:,} steps in {made["seconds"] / 60:.1f} minutes on {made["hardware"]}, measured on {made["date"]}. To make
it again:

```
scripts/embedded/rebuild.sh WORK OUT render detector --keep readers,captioner,autoencoder,diffusion
```

## Licence

{LICENCE}
"""


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def reader_line(figures: dict[str, Any], style: str) -> str:
    accuracy = figures["readers"][style]
    return f"thing and colour {percent(accuracy['thing_and_colour'])}, style {percent(accuracy['style'])}"


def training_table(figures: dict[str, Any], phases: tuple[str, ...]) -> str:
    rows = [
        f"| {phase} | {trained['steps']:,} | {trained['seconds'] / 60:.1f} | {trained['hardware']} |"
        for phase in phases
        for trained in [figures["training"].get(phase)]
        if trained
    ]
    return "\n".join(["| phase | steps | minutes | on |", "|---|---|---|---|", *rows])


def machine_line(made: dict[str, str]) -> str:
    return (
        f"Measured on {made['date']} on {made['hardware']} with torch {made['torch']}, diffusers {made['diffusers']} "
        f"and transformers {made['transformers']}."
    )
