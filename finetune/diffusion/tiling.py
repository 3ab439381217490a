"""How much of an image an autoencoder takes at once: several images, one image, or overlapping tiles of one."""

from typing import Any

# Most pixels that an autoencoder takes at once: of several images, which then come one by one; of one image, which
# then comes in overlapping tiles. Tiles are normalised each by itself and blended, so smaller images are left whole.
MAX_BATCH_PIXELS, UNTILED = 1024**2, 2 * 1024**2
TILE = 512  # pixels a side, of the tiles of an autoencoder that has to save memory
TILED = "takes_tiles"  # an attribute of an autoencoder, see `enable_tiling`


def set_slicing(vae: Any, images: int, pixels: int) -> None:
    """Set how the autoencoder takes so many images of so many pixels each."""
    vae.use_slicing = is_tiled(vae) or images * pixels > MAX_BATCH_PIXELS
    vae.use_tiling = is_tiled(vae) or pixels > UNTILED


def enable_tiling(vae: Any) -> None:
    """Have an autoencoder take whatever is larger than a tile in tiles, to save memory."""
    setattr(vae, TILED, True)
    if hasattr(vae, "tile_latent_min_size"):  # else it has small tiles by itself; these are as large as its images
        vae.tile_sample_min_size, vae.tile_latent_min_size = TILE, TILE // scale_factor(vae)


def is_tiled(vae: Any) -> bool:
    """Whether `enable_tiling` was called."""
    return bool(getattr(vae, TILED, False))


def scale_factor(vae: Any) -> int:
    """Pixels on a side of one latent pixel, of an AutoencoderKL."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))
