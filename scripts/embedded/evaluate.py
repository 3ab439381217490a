"""Measures the exported models with the independent readers; writes figures.json, contact sheets and the model cards.

N pictures of 3×P×P pixels.
"""

import datetime
import json
import platform
from dataclasses import replace

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from transformers import BlipForConditionalGeneration, BlipProcessor

from finetune.config.compose import load
from finetune.config.schema import SampleConfig
from scripts.embedded.augment import to_float
from scripts.embedded.autoencoder import decode_all, encode_all, restoration
from scripts.embedded.cards import write_cards
from scripts.embedded.crispness import detail
from scripts.embedded.export import parameter_millions
from scripts.embedded.readers import Reader, load_reader, read
from scripts.embedded.render_sets import load_set
from scripts.embedded.settings import PICTURE_PX, Settings
from scripts.embedded.sheets import contact_sheet
from scripts.toyworld.captions import caption, read_caption, styled
from scripts.toyworld.looks import HELD_OUT, NAMED, STYLES
from scripts.toyworld.render import render
from scripts.toyworld.scene import Scene, held_out, sample_scene

MEASURING_SEED = 91_000_000
LARGE_SEED = 92_000_000
SUFFIX = ", pixar style"
SAMPLING_BATCH = 100
SHEET = 40

Figures = dict[str, float]


def evaluate(settings: Settings) -> None:
    content = load_reader(settings.readers / "content.safetensors", settings.device)
    style = load_reader(settings.readers / "style.safetensors", settings.device)
    path = settings.embedded / "figures.json"
    before = json.loads(path.read_text()) if path.exists() else {}  # the detector's are measured in its own phase
    figures = before | {
        "made": provenance(settings),
        "readers": reader_figures(settings, content, style),
        **diffusion_figures(settings, content, style),
        "captioner": captioner_figures(settings),
        "training": training_figures(settings),
    }
    renders = [load_set(settings, f"{name}-unseen").images[:8] for name in STYLES]
    contact_sheet(torch.cat(renders), [""] * sum(map(len, renders)), settings.evaluation / "renders.png")
    path.write_text(json.dumps(figures, indent=2) + "\n")
    print(path.read_text(), flush=True)
    write_cards(settings.embedded, figures)


def glance(settings: Settings) -> None:
    """Contact sheets alone, in seconds: what the models can do so far."""
    pipeline = shipped_pipeline(settings)
    texts = prompts(held_out_scenes(MEASURING_SEED, 4 if settings.tiny else SHEET))
    images_N3PP = sample(pipeline, texts, drawing_of(settings))
    contact_sheet(images_N3PP, texts, settings.evaluation / "samples-base.png")
    print(f"glance: autoencoder {autoencoder_figures(settings, pipeline.vae)}", flush=True)


def shipped_pipeline(settings: Settings) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(settings.embedded / "diffusion").to(settings.device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawing_of(settings: Settings) -> SampleConfig:
    """How the recipes on this base draw."""
    drawing = load("pixar_style").sample
    return replace(drawing, steps=2) if settings.tiny else drawing


def provenance(settings: Settings) -> dict[str, str]:
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": torch.cuda.get_device_name() if settings.on_gpu else f"CPU ({platform.machine()})",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }


def training_figures(settings: Settings) -> dict[str, dict[str, float]]:
    """Steps, seconds and last loss that each training left beside its checkpoint, or as shipped for what was kept."""
    shipped = settings.embedded / "figures.json"
    figures: dict[str, dict[str, float]] = json.loads(shipped.read_text())["training"] if shipped.exists() else {}
    paths = sorted((settings.work / "checkpoints").glob("*.json"))
    return figures | {path.stem: json.loads(path.read_text()) for path in paths}


def reader_figures(settings: Settings, content: Reader, style: Reader) -> dict[str, Figures]:
    """Accuracy of both readers on unseen renders, style by style."""
    figures: dict[str, Figures] = {}
    for name in STYLES:
        pictures = load_set(settings, f"{name}-unseen")
        figures[name] = content_figures(content, pictures.images, pictures.scenes)
        figures[name]["style"] = share([label == name for label in read(style, pictures.images)["style"]])
    return figures


def content_figures(content: Reader, images_N3PP: Tensor, scenes: list[Scene]) -> Figures:
    """Shares of single-thing pictures whose kind, colour, both and setting are read as their scenes say."""
    answers = read(content, images_N3PP)
    kind = [answer == scene.things[0].kind for answer, scene in zip(answers["kind"], scenes, strict=True)]
    colour = [answer == scene.things[0].colour for answer, scene in zip(answers["colour"], scenes, strict=True)]
    setting = [answer == scene.setting for answer, scene in zip(answers["setting"], scenes, strict=True)]
    both = [a and b for a, b in zip(kind, colour, strict=True)]
    return {"thing": share(kind), "colour": share(colour), "thing_and_colour": share(both), "setting": share(setting)}


def share(hits: list[bool]) -> float:
    return round(sum(hits) / len(hits), 4)


def diffusion_figures(settings: Settings, content: Reader, style: Reader) -> dict[str, Figures]:
    pipeline, drawing = shipped_pipeline(settings), drawing_of(settings)
    scenes = held_out_scenes(MEASURING_SEED, 4 if settings.tiny else 200)
    rendered_N3PP = render(scenes, "flat", PICTURE_PX, device=settings.device)
    base, suffixed = prompts(scenes), [prompt + SUFFIX for prompt in prompts(scenes)]
    figures: Figures = {"steps": drawing.steps, "guidance": drawing.guidance, "prompts": len(scenes)}
    for name, texts in (("base", base), ("suffix", suffixed)):
        images_N3PP = sample(pipeline, texts, drawing)
        measured = content_figures(content, images_N3PP, scenes)
        measured["flat"] = share([label == "flat" for label in read(style, images_N3PP)["style"]])
        measured["detail"] = round(detail(images_N3PP) / detail(to_float(rendered_N3PP)), 3)
        figures |= {f"{name}_{key}": value for key, value in measured.items()}
        contact_sheet(images_N3PP[:SHEET], texts[:SHEET], settings.evaluation / f"samples-{name}.png")
    looks = [list(NAMED)[index % len(NAMED)] for index in range(len(scenes))]
    texts = [styled(caption(scene, 1), NAMED[look], 1) for scene, look in zip(scenes, looks, strict=True)]
    images_N3PP = sample(pipeline, texts, drawing)
    contact_sheet(images_N3PP[:SHEET], texts[:SHEET], settings.evaluation / "samples-looks.png")
    figures |= {f"looks_{key}": value for key, value in content_figures(content, images_N3PP, scenes).items()}
    read_looks = read(style, images_N3PP)["style"]
    figures["looks_look"] = share([label == look for label, look in zip(read_looks, looks, strict=True)])
    for part in ("unet", "text_encoder", "vae"):
        figures[f"{part}_million_parameters"] = round(parameter_millions(settings.embedded / "diffusion" / part), 2)
    return {"diffusion": figures, "autoencoder": autoencoder_figures(settings, pipeline.vae)}


def autoencoder_figures(settings: Settings, vae: AutoencoderKL) -> Figures:
    for name in ("flat", *HELD_OUT):
        images = load_set(settings, f"{name}-unseen").images[: SHEET // 2]
        pairs = torch.stack([to_float(images), decode_all(vae, encode_all(vae, images))], dim=1)
        lines = ["render", "decoded"] * len(pairs)
        contact_sheet(pairs.flatten(0, 1), lines, settings.evaluation / f"autoencoder-{name}.png")
    return {"channels": vae.config.latent_channels} | restoration(settings, vae)


def held_out_scenes(first_seed: int, count: int) -> list[Scene]:
    """Single-thing scenes of combinations that no training set holds."""
    scenes: list[Scene] = []
    seed = first_seed
    while len(scenes) < count:
        scene = sample_scene(seed, things=1)
        if held_out(scene):
            scenes.append(scene)
        seed += 1
    return scenes


def prompts(scenes: list[Scene]) -> list[str]:
    return [caption(scene, variant=scene.seed % 8) for scene in scenes]


def sample(pipeline: StableDiffusionPipeline, texts: list[str], drawing: SampleConfig) -> Tensor:
    """Pictures [N, 3, P, P] with values 0…1; picture i starts from seed i."""
    images = []
    for first in range(0, len(texts), SAMPLING_BATCH):
        part = texts[first : first + SAMPLING_BATCH]
        generators = [torch.Generator().manual_seed(first + index) for index in range(len(part))]
        images.append(
            pipeline(
                part,
                num_inference_steps=drawing.steps,
                guidance_scale=drawing.guidance,
                generator=generators,
                output_type="pt",
            ).images
        )
    return torch.cat(images)


def captioner_figures(settings: Settings) -> Figures:
    folder = settings.embedded / "captioner"
    model = BlipForConditionalGeneration.from_pretrained(folder).to(settings.device).eval()
    processor = BlipProcessor.from_pretrained(folder)
    figures: Figures = {"million_parameters": round(parameter_millions(folder), 2)}
    for name in STYLES:
        pictures = load_set(settings, f"{name}-unseen")
        texts = describe(model, processor, pictures.images)
        figures |= {f"{name}_{key}": value for key, value in caption_figures(texts, pictures.scenes).items()}
        contact_sheet(pictures.images[:SHEET], texts[:SHEET], settings.evaluation / f"captions-{name}.png")
    # Users' pictures come larger than the model sees them.
    scenes = [sample_scene(LARGE_SEED + index, things=1) for index in range(2 if settings.tiny else 100)]
    large_px = PICTURE_PX if settings.tiny else 512
    large = render(scenes, "pixar", large_px, device=settings.device).cpu()
    measured = caption_figures(describe(model, processor, large), scenes)
    return figures | {f"pixar_large_{key}": value for key, value in measured.items()}


def describe(model: BlipForConditionalGeneration, processor: BlipProcessor, images_N3PP: Tensor) -> list[str]:
    """One caption a picture, through the same calls as any BLIP."""
    texts: list[str] = []
    for images in images_N3PP.split(SAMPLING_BATCH):
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images.cpu()]
        inputs = processor(images=pictures, return_tensors="pt").to(model.device)
        texts += processor.batch_decode(model.generate(**inputs, max_new_tokens=30), skip_special_tokens=True)
    return texts


def caption_figures(texts: list[str], scenes: list[Scene]) -> Figures:
    thing_and_colour, setting = [], []
    for text, scene in zip(texts, scenes, strict=True):
        reading = read_caption(text)
        named = [(mention.kind, mention.colour) for mention in reading.things]
        thing_and_colour.append(named == [(thing.kind, thing.colour) for thing in scene.things])
        setting.append(reading.setting == scene.setting)
    return {"thing_and_colour": share(thing_and_colour), "setting": share(setting)}
