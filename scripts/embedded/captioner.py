"""Trains the captioner: a small BLIP that names what renders in many looks show, never the look.

B pictures, L tokens.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    BlipTextConfig,
    BlipVisionConfig,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from scripts.embedded.augment import spoil, to_float
from scripts.embedded.fit import Budget, fit
from scripts.embedded.render_sets import join, load_set, share_weights
from scripts.embedded.settings import CAPTION_VARIANTS, PICTURE_PX, SEED, Settings
from scripts.embedded.vocabularies import forget_batching, make_wordpiece_tokenizer
from scripts.toyworld.captions import caption

SHARES = {"flat": 2.0, "pixar": 2.0, "looks": 3.0}  # two looks are left for tests of what it has not met
CAPTION_LENGTH = 32
WIDTH = 192
IGNORED = -100  # the label that cross-entropy skips


def new_captioner(tokenizer: BertTokenizer) -> BlipForConditionalGeneration:
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = BlipTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        encoder_hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=2 * CAPTION_LENGTH,
        **special,
    )
    vision = BlipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=PICTURE_PX,
        patch_size=8,
        initializer_range=0.02,  # the library's 1e-10 suits weights about to be overwritten, not training
    )
    config = BlipConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH, image_text_hidden_size=WIDTH
    )
    return BlipForConditionalGeneration(config)


def captioner_folder(work: Path) -> Path:
    return work / "captioner"


def train_captioner(settings: Settings) -> None:
    sets = [load_set(settings, name) for name in SHARES]
    pictures = join(sets)
    images_N3PP = pictures.images
    captions = [caption(scene) for scene in pictures.scenes]
    tokenizer = make_wordpiece_tokenizer(
        [caption(scene, variant) for scene in pictures.scenes for variant in range(CAPTION_VARIANTS)], CAPTION_LENGTH
    )
    tokens_NL, labels_NL = (part.to(settings.device) for part in targets(tokenizer, captions))
    print(f"captioner: {len(captions)} pictures, {len(tokenizer)} tokens, {tokens_NL.shape[1]} at most", flush=True)

    torch.manual_seed(SEED)
    model = new_captioner(tokenizer).to(settings.device)
    mean, deviation = (torch.tensor(x, device=settings.device).view(3, 1, 1) for x in channel_statistics())
    # The styles differ in size; pixar pictures, the hardest, are drawn more often than their share.
    weights = share_weights([len(part.scenes) for part in sets], SHARES.values()).to(settings.device)
    batch = settings.batch(256)

    def draw(generator: torch.Generator) -> tuple[Tensor, ...]:
        rows = torch.multinomial(weights, batch, replacement=True, generator=generator)
        pixels_B3PP = spoil(to_float(images_N3PP[rows]), generator, zoom=1.15, shift=0.06)
        return (pixels_B3PP - mean) / deviation, tokens_NL[rows], labels_NL[rows]

    def loss_of(pixels_B3PP: Tensor, tokens_BL: Tensor, labels_BL: Tensor) -> Tensor:
        attended_BL = (tokens_BL != tokenizer.pad_token_id).long()
        output = model(pixel_values=pixels_B3PP, input_ids=tokens_BL, attention_mask=attended_BL, labels=labels_BL)
        return output.loss

    fitted = fit(
        model,
        draw,
        loss_of,
        name="captioner",
        budget=Budget(settings.minutes["captioner"] * 60, settings.tiny_steps),
        lr=6e-4,
        checkpoint=settings.work / "checkpoints" / "captioner.pt",
        seed=SEED,
        pause_at=settings.pause_at,
    )
    if fitted.done:
        folder = captioner_folder(settings.work)
        model.save_pretrained(folder)
        forget_batching(tokenizer)
        new_processor(tokenizer).save_pretrained(folder)


def new_processor(tokenizer: BertTokenizer) -> BlipProcessor:
    """With the PIL backend, so that no torchvision is needed."""
    images = BlipImageProcessorPil(size={"height": PICTURE_PX, "width": PICTURE_PX})
    return BlipProcessor(images, tokenizer)


def channel_statistics() -> tuple[list[float], list[float]]:
    """Mean and deviation of the three channels, those of BLIP's image processor."""
    return list(OPENAI_CLIP_MEAN), list(OPENAI_CLIP_STD)


def targets(tokenizer: BertTokenizer, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids and labels, both [N, L]: a start token, the caption, [SEP]; padding carries no label."""
    batch = tokenizer(captions, padding=True, truncation=True, max_length=CAPTION_LENGTH, return_tensors="pt")
    tokens_NL = batch["input_ids"]
    tokens_NL[:, 0] = tokenizer.bos_token_id
    return tokens_NL, tokens_NL.masked_fill(tokens_NL == tokenizer.pad_token_id, IGNORED)
