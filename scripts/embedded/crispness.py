"""How crisp pictures are: two measures that fall where they are blurred. N pictures of 3×P×P, values 0…1.

Both round to 8 bits first, as pictures are saved: the rounding alone is a twentieth of a smooth render's Laplacian.
"""

from torch import Tensor

from scripts.embedded.augment import gaussian

DETAIL_PX = 1.5


def detail(images_N3PP: Tensor) -> float:
    """Mean absolute difference from a blurred copy: what is lost first where a picture is not crisp."""
    images_N3PP = rounded(images_N3PP)
    return float((images_N3PP - gaussian(images_N3PP, DETAIL_PX)).abs().mean())


def laplacian(images_N3PP: Tensor) -> float:
    """Mean absolute Laplacian: the sum of a pixel's four neighbours less four times the pixel."""
    return float(second_differences(rounded(images_N3PP)).abs().mean())


def second_differences(images_N3PP: Tensor) -> Tensor:
    """The Laplacian of every pixel inside the edge."""
    inner = images_N3PP[..., 1:-1, 1:-1]
    beside = images_N3PP[..., 1:-1, :-2] + images_N3PP[..., 1:-1, 2:]
    above = images_N3PP[..., :-2, 1:-1] + images_N3PP[..., 2:, 1:-1]
    return beside + above - 4.0 * inner


def rounded(images_N3PP: Tensor) -> Tensor:
    return (255.0 * images_N3PP).round() / 255.0
