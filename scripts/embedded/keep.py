"""Puts the shipped models where the phases look for trained ones, so that a rebuild need not train every part again."""

import shutil

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from scripts.embedded.autoencoder import autoencoder_folder
from scripts.embedded.diffusion import diffusion_folder
from scripts.embedded.settings import REPOSITORY, Settings


def keep_shipped(settings: Settings, *, models: bool) -> None:
    """Where `models` are wanted, autoencoder and diffusion model come into the work folder, as fp32.

    The other parts stay where they are.
    """
    for folder in (settings.embedded, settings.readers):
        shipped = REPOSITORY / folder.relative_to(settings.root)
        if not folder.exists():  # a root other than the repository
            shutil.copytree(shipped, folder)
    if not models:
        return
    shipped = settings.embedded / "diffusion"
    autoencoder, diffusion = autoencoder_folder(settings.work), diffusion_folder(settings.work)
    if "autoencoder" in settings.kept and not autoencoder.exists():
        AutoencoderKL.from_pretrained(shipped / "vae").float().save_pretrained(autoencoder)
    if "diffusion" in settings.kept and not diffusion.exists():
        UNet2DConditionModel.from_pretrained(shipped / "unet").float().save_pretrained(diffusion / "unet")
        CLIPTextModel.from_pretrained(shipped / "text_encoder").float().save_pretrained(diffusion / "text_encoder")
        shutil.copytree(shipped / "tokenizer", diffusion / "tokenizer")
