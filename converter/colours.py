"""The colour of a class, the same in overlays and on pages."""

import math
from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Colour: TypeAlias = tuple[int, int, int]  # red, green, blue, from 0 to 255

# Colours are points (lightness, a, b) in OKLab, where equal distances look equally large.
# Björn Ottosson, "A perceptual color space for image processing", 2020.
_LMS_FROM_OKLAB = np.array(
    [
        [1.0, 0.3963377774, 0.2158037573],
        [1.0, -0.1055613458, -0.0638541728],
        [1.0, -0.0894841775, -1.2914855480],
    ]
)
_LINEAR_RGB_FROM_LMS = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)

_PALETTE_SIZE = 256  # further classes share colours with earlier ones
_LIGHTNESS_RANGE, _HUE_RANGE = 0.24, 0.7  # of the instances of one class; hue in radians
_WEIGHTS = (0.5, 1, 1)  # of OKLab's axes: less for lightness, as the picture's shows through
_GOLDEN = (math.sqrt(5) - 1) / 2


def class_colour(class_id: int, instance: int = 0) -> Colour:
    """A class's colour, the same in every picture; instances from 1 on have variations of it."""
    lightness, a, b = _palette()[class_id % _PALETTE_SIZE]
    # steps of irrational length distribute any number of instances evenly
    lightness += _LIGHTNESS_RANGE * _centred(instance * _GOLDEN)
    turn = _HUE_RANGE * _centred(instance * math.sqrt(2))
    cos, sin = math.cos(turn), math.sin(turn)
    red, green, blue = _to_rgb(np.array([lightness, a * cos - b * sin, a * sin + b * cos])).tolist()
    return red, green, blue


@cache
def _palette() -> NDArray[np.float64]:
    """Colours (colours, 3) in OKLab, each as far as possible from all earlier ones.

    Source: Glasbey, van der Heijden, Toh, Gray, "Colour displays for categorical images", 2007.
    Very dark, very light and greyish colours are left out.
    """
    grid = np.meshgrid(
        np.linspace(0.54, 0.84, 12), np.linspace(0.11, 0.22, 6), np.arange(72) * math.tau / 72
    )
    lightness, chroma, hue = (values.ravel() for values in grid)
    candidates = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1)
    linear = _to_linear_rgb(candidates)
    candidates = candidates[((linear >= 0) & (linear <= 1)).all(axis=-1)]

    chosen = [np.array([0.62, 0.19, 0.1])]  # a red
    distances = np.full(len(candidates), np.inf)
    while len(chosen) < _PALETTE_SIZE:
        differences = (candidates - chosen[-1]) * _WEIGHTS
        distances = np.minimum(distances, (differences**2).sum(axis=-1))
        chosen.append(candidates[distances.argmax()])
    return np.array(chosen)


def _to_linear_rgb(oklab: NDArray[np.float64]) -> NDArray[np.float64]:
    linear: NDArray[np.float64] = (oklab @ _LMS_FROM_OKLAB.T) ** 3 @ _LINEAR_RGB_FROM_LMS.T
    return linear


def _to_rgb(oklab: NDArray[np.float64]) -> NDArray[np.uint8]:
    """SRGB (IEC 61966-2-1) of a colour in OKLab."""
    linear = _to_linear_rgb(oklab).clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (255 * encoded).round().astype(np.uint8)


def _centred(turns: float) -> float:
    """The fractional part, shifted to the range from -0.5 to 0.5, so that 0 gives 0."""
    return (turns + 0.5) % 1 - 0.5
