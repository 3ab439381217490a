"""Colours of a PNG that has no profile but says how its values were encoded, in its chunks gAMA and cHRM (PNG, third
edition, §11.3.2), as a colour-managed viewer shows them on an sRGB screen.

H×W pixels, C channels of the image: one of grey, or three.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

SRGB_CURVE = 0.0  # stands for sRGB's own curve, which is no power
SRGB_GAMMA, SAME_GAMMA = 0.45455, 0.005  # what encoders write for sRGB, and how it is rounded
SRGB_XY = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)  # white, red, green, blue (IEC 61966-2-1)
SAME_XY = 0.005
WHITES = (0.2, 0.6)  # x and y of every light that is called white: candles 0.5 and 0.41, a blue sky 0.25 and 0.25
LEAST_AREA = 0.01  # of the triangle of the primaries; that of sRGB is 0.11
CONES = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])  # Bradford's


@dataclass(frozen=True)
class Gamma:
    """How the values of an image were encoded."""

    exponent: float
    """value = light ** exponent, or SRGB_CURVE."""
    xy: tuple[float, ...]
    """Chromaticities of white, red, green and blue."""

    def shown(self, values_HWC: np.ndarray) -> np.ndarray:
        """Values of 16 bits in sRGB, uint8 of the same shape."""
        light_HWC = _light(self.exponent)[values_HWC]
        if self.xy != SRGB_XY and values_HWC.shape[-1] == 3:
            light_HWC = np.clip(light_HWC @ _to_srgb(self.xy).T, 0, 1)
        shown_HWC: np.ndarray = _levels()[np.round(65535 * light_HWC).astype(np.uint16)]
        return shown_HWC


def of(info: Mapping[Any, Any]) -> Gamma | None:
    """What an opened image says in these chunks; None for sRGB, which a chunk sRGB states whatever the others say."""
    exponent, xy = info.get("gamma"), info.get("chromaticity", SRGB_XY)
    if not exponent or "srgb" in info:
        return None
    if not _are_chromaticities(xy) or np.abs(np.subtract(xy, SRGB_XY)).max() < SAME_XY:
        xy = SRGB_XY
    return None if xy == SRGB_XY and abs(exponent - SRGB_GAMMA) < SAME_GAMMA else Gamma(exponent, xy)


def _are_chromaticities(xy: tuple[float, ...]) -> bool:
    white, primaries = xy[:2], np.reshape(xy[2:], (3, 2))
    area = abs(np.linalg.det(np.diff(primaries, axis=0))) / 2
    return min(white) > WHITES[0] and max(white) < WHITES[1] and bool(area > LEAST_AREA)


@lru_cache(maxsize=8)
def _light(exponent: float) -> np.ndarray:
    """Of each value of 16 bits, 0 … 1."""
    values = np.arange(65536) / 65535
    if exponent == SRGB_CURVE:  # IEC 61966-2-1
        light = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    else:
        light = values ** (1 / exponent)
    return light.astype(np.float32)


@lru_cache(maxsize=1)
def _levels() -> np.ndarray:
    """Values of sRGB of light in 65535 steps."""
    light = np.arange(65536) / 65535
    encoded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)  # IEC 61966-2-1
    return np.round(255 * encoded).astype(np.uint8)


@lru_cache(maxsize=8)
def _to_srgb(xy: tuple[float, ...]) -> np.ndarray:
    """(3, 3) from light of these primaries to that of sRGB; white stays white."""
    adapted = CONES @ _to_xyz(SRGB_XY)[1] / (CONES @ _to_xyz(xy)[1])
    adaptation = np.linalg.inv(CONES) @ np.diag(adapted) @ CONES
    matrix: np.ndarray = np.linalg.inv(_to_xyz(SRGB_XY)[0]) @ adaptation @ _to_xyz(xy)[0]
    return matrix.astype(np.float32)


def _to_xyz(xy: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(3, 3) from light of these primaries to XYZ, and (3,) the XYZ of their white, whose Y is 1."""
    white, *primaries = (np.array([x, y, 1 - x - y]) for x, y in np.reshape(xy, (4, 2)))
    white, columns = white / white[1], np.transpose(primaries)
    return columns * np.linalg.solve(columns, white), white
