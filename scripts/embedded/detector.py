"""Trains the detector: a small RT-DETR v2 that finds the toy world's things in frames of a film, in any look.

B frames, P pixels of a stored picture's side, F of a frame's, K things at most in a picture, T in a frame.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection

from scripts.embedded.augment import add_noise, blur, expose, jpeg_like, to_float
from scripts.embedded.box_sets import NO_THING, Labelled, find_boxes, load_labelled
from scripts.embedded.detector_loss import decoder_loss, encoder_loss
from scripts.embedded.fit import Budget, fit
from scripts.embedded.render_sets import share_weights
from scripts.embedded.settings import CROWD, PICTURE_PX, SEED, Settings
from scripts.toyworld.crowd import MOST_THINGS
from scripts.toyworld.scene import KINDS

SHARES = {CROWD: 4.0, "looks": 3.0, "flat": 1.0, "pixar": 1.0, "stop motion": 1.0, "stained glass": 1.0}
FRAME_PX = 2 * PICTURE_PX
WIDTH = 128
QUERIES = 40
TILES = 4  # pictures in a frame of several
LEAST_SHOWN = 0.25  # of a thing at a window's edge, or it is none to find
LEAST_SIDE = 0.03  # of a frame


def new_detector() -> RTDetrV2ForObjectDetection:
    """From its configuration; about 5 million parameters."""
    stages = [32, 80, 160, 256]
    backbone = RTDetrResNetConfig(
        embedding_size=stages[0], hidden_sizes=stages, depths=[1, 2, 2, 2], layer_type="basic", out_indices=[2, 3, 4]
    )
    config = RTDetrV2Config(
        backbone_config=backbone,
        freeze_backbone_batch_norms=False,
        encoder_in_channels=stages[1:],
        encoder_hidden_dim=WIDTH,
        encoder_ffn_dim=4 * WIDTH,
        hidden_expansion=0.5,
        d_model=WIDTH,
        decoder_in_channels=[WIDTH] * 3,
        decoder_ffn_dim=4 * WIDTH,
        decoder_layers=3,
        num_queries=QUERIES,
        num_denoising=0,
        id2label=dict(enumerate(KINDS)),
        label2id={kind: index for index, kind in enumerate(KINDS)},
    )
    model = RTDetrV2ForObjectDetection(config)
    for module in model.modules():
        # The library's start suits weights about to be overwritten: norms that let a hundredth through do not train.
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def detector_folder(work: Path) -> Path:
    return work / "detector"


def train_detector(settings: Settings) -> bool:
    """Train within the budget, on from where the last call stopped; whether it is done."""
    find_boxes(settings, list(SHARES))
    sets = [load_labelled(settings, name) for name in SHARES]
    images_N3PP, edges_NK4, kinds_NK = (
        torch.cat([getattr(part, name) for part in sets]) for name in ("images", "edges", "kinds")
    )
    pictures = Labelled(images_N3PP, edges_NK4, kinds_NK, [])
    weights_N = share_weights([len(part.looks) for part in sets], SHARES.values()).to(settings.device)
    print(f"detector: {len(weights_N)} pictures", flush=True)

    torch.manual_seed(SEED)
    model = new_detector().to(settings.device)
    batch = settings.batch(128)

    def draw(generator: torch.Generator) -> tuple[Tensor, ...]:
        return frames(pictures, weights_N, batch, generator)

    def loss_of(pixels_B3FF: Tensor, labels_BT: Tensor, targets_BT4: Tensor) -> Tensor:
        found = model.model(pixels_B3FF)
        with torch.autocast(pixels_B3FF.device.type, enabled=False):
            proposed = found.enc_outputs_class.float(), found.enc_outputs_coord_logits.float().sigmoid()
            loss = encoder_loss(*proposed, labels_BT, targets_BT4)
            # The layers of the decoder are matched together, as if they were frames of their own.
            layers = found.intermediate_logits.shape[1]
            logits, boxes = (
                part.float().flatten(0, 1) for part in (found.intermediate_logits, found.intermediate_reference_points)
            )
            repeated = (part.repeat_interleave(layers, 0) for part in (labels_BT, targets_BT4))
            return loss + layers * decoder_loss(logits, boxes, *repeated)

    fitted = fit(
        model,
        draw,
        loss_of,
        name="detector",
        budget=Budget(settings.minutes["detector"] * 60, settings.tiny_steps),
        lr=8e-4,
        checkpoint=settings.work / "checkpoints" / "detector.pt",
        seed=SEED,
        pause_at=settings.pause_at,
    )
    if fitted.done:
        model.save_pretrained(detector_folder(settings.work))
    return fitted.done


def frames(
    pictures: Labelled, weights_N: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Frames [B, 3, F, F], labels [B, T] and boxes as centre and size [B, T, 4] of the things in them.

    Half show one picture, enlarged; half are four windows into pictures side by side, where things are smaller, sharper
    and more. Renders of several things at once would cost four times as much at this size.
    """
    whole = count // 2
    one = windows(pictures, weights_N, whole, FRAME_PX, generator)
    tiled = windows(pictures, weights_N, (count - whole) * TILES, PICTURE_PX, generator)
    images_B3FF = torch.cat([one[0], side_by_side(tiled[0])])
    labels_BT = torch.cat(
        [
            functional.pad(one[1], (0, (TILES - 1) * MOST_THINGS), value=NO_THING),
            tiled[1].reshape(-1, TILES * MOST_THINGS),
        ]
    )
    corner_42 = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.0, 0.5], [0.5, 0.5]], device=images_B3FF.device)
    moved = (tiled[2] / 2).view(-1, TILES, MOST_THINGS, 4)
    moved[..., :2] += corner_42[:, None]
    targets_BT4 = torch.cat(
        [functional.pad(one[2], (0, 0, 0, (TILES - 1) * MOST_THINGS)), moved.reshape(-1, TILES * MOST_THINGS, 4)]
    )
    images = expose(blur(images_B3FF, generator, most=1.6), generator, most=0.15)
    images = jpeg_like(images, generator, most=0.2)
    return add_noise(images, generator, most=0.04).clamp(0, 1), labels_BT, targets_BT4


def windows(
    pictures: Labelled, weights_N: Tensor, count: int, side: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Windows into pictures, of any shape squeezed into a square of `side` pixels, half of them mirrored; labels [., K]
    and boxes [., K, 4] of what shows in them."""
    device = weights_N.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, device=device, generator=generator)

    rows = torch.multinomial(weights_N, count, replacement=True, generator=generator)
    size, shape = uniform(0.5, 1.0), uniform(-0.4, 0.4).exp()
    spans_2 = torch.stack([size * shape, size / shape], 1).clamp_max(1.15)
    slack = (1.16 - spans_2) / 2
    centre_2 = 0.5 + slack * (2 * torch.rand(count, 2, device=device, generator=generator) - 1)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)

    affine = torch.zeros(count, 2, 3, device=device)
    affine[:, 0, 0], affine[:, 1, 1] = spans_2[:, 0] * mirror, spans_2[:, 1]
    affine[:, :, 2] = 2 * centre_2 - 1
    grid = functional.affine_grid(affine, [count, 3, side, side], align_corners=False)
    images = functional.grid_sample(to_float(pictures.images[rows]), grid, padding_mode="border", align_corners=False)

    edges_K22 = pictures.edges[rows].unflatten(2, (2, 2))
    seen_K22 = (edges_K22 - centre_2[:, None, None]) / spans_2[:, None, None]
    seen_K22 = torch.stack([seen_K22[..., 0] * mirror[:, None, None], seen_K22[..., 1]], -1) + 0.5
    low, high = seen_K22.amin(2), seen_K22.amax(2)
    shown_low, shown_high = low.clamp(0, 1), high.clamp(0, 1)
    sides = shown_high - shown_low
    shown = sides.prod(-1) / (high - low).prod(-1).clamp_min(1e-6)
    counts = (pictures.kinds[rows] >= 0) & (shown >= LEAST_SHOWN) & (sides.amin(-1) >= LEAST_SIDE)
    labels = pictures.kinds[rows].masked_fill(~counts, NO_THING)
    return images, labels, torch.cat([(shown_low + shown_high) / 2, sides], -1)


def side_by_side(tiles_X3PP: Tensor) -> Tensor:
    """Every four tiles as one square, row by row."""
    _, channels, side, _ = tiles_X3PP.shape
    square = tiles_X3PP.view(-1, 2, 2, channels, side, side).permute(0, 3, 1, 4, 2, 5)
    return square.reshape(-1, channels, 2 * side, 2 * side)
