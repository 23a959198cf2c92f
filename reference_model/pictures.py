"""Reads pictures and segmentation maps from files, PIL images, arrays and tensors."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from reference_model.files import open_regular

Picture: TypeAlias = Image.Image | str | Path | BinaryIO | NDArray[Any] | Tensor

# Formats of pixels only: for PostScript, for example, Pillow runs another program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

CHANNELS = (1, 3, 4)  # transformers takes a dimension of this length for the channels


def flatten(pictures: Any, dimensions: int) -> list[Any]:
    """One picture, several, or an array of several, as a list of single pictures.

    Args:
        pictures: pictures; lists may be nested.
        dimensions: number of dimensions of an array that is one picture.
    """
    if isinstance(pictures, list | tuple):
        return [picture for entry in pictures for picture in flatten(entry, dimensions)]
    if isinstance(pictures, np.ndarray | Tensor) and pictures.ndim > dimensions:
        return list(pictures)
    return [pictures]


def read_picture(picture: Picture, input_data_format: str | None = None) -> Image.Image:
    """A picture in RGB, 8 bits per channel.

    16-bit values are scaled; transparent pixels are laid over black. The EXIF orientation is
    applied to files, not to PIL images.

    Args:
        picture: a file, a PIL image, or an array of 8 or 16 bits: (height, width), or with 1, 3 or
            4 channels first or last.
        input_data_format: "channels_first" or "channels_last", where an array's shape is ambiguous.

    Raises:
        ValueError: an array has an unsupported shape, dtype or value.
    """
    if isinstance(picture, np.ndarray | Tensor):
        pixels = _channels_last(_to_numpy(picture), input_data_format)
        image = Image.fromarray(_eight_bits(pixels))
    else:
        image = _open(picture)
    if image.mode.startswith("I"):  # 16-bit greyscale, which PIL may store in 32 bits
        image = Image.fromarray(_eight_bits(np.asarray(image).clip(0, 65535).astype(np.uint16)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return image.convert("RGB")


def read_map(segmentation_map: Picture) -> Image.Image:
    """A segmentation map as an image of 32-bit integers.

    Raises:
        ValueError: it is not (height, width) integers.
    """
    if isinstance(segmentation_map, np.ndarray | Tensor):
        ids = _to_numpy(segmentation_map)
    else:
        ids = np.asarray(_open(segmentation_map))
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"a segmentation map is {ids.dtype} of shape {ids.shape}; "
            "expected integers (height, width)"
        )
    return Image.fromarray(ids.astype(np.int32))


def _open(picture: Image.Image | str | Path | BinaryIO) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    with ExitStack() as stack:
        if isinstance(picture, str | Path):
            picture = stack.enter_context(open_regular(picture))
        return ImageOps.exif_transpose(stack.enter_context(Image.open(picture, formats=FORMATS)))


def _to_numpy(array: NDArray[Any] | Tensor) -> NDArray[Any]:
    return array.numpy(force=True) if isinstance(array, Tensor) else array


def _channels_last(pixels: NDArray[Any], input_data_format: str | None) -> NDArray[Any]:
    """(height, width), (height, width, 3) or (height, width, 4)."""
    if pixels.ndim == 2:
        return pixels
    formats = {"channels_first": 0, "channels_last": -1}
    if input_data_format is not None and input_data_format not in formats:
        raise ValueError(
            f"input_data_format is {input_data_format!r}; expected one of {list(formats)}"
        )
    axes = [formats[input_data_format]] if input_data_format else list(formats.values())
    axis = next((axis for axis in axes if pixels.shape[axis] in CHANNELS), None)
    if pixels.ndim != 3 or axis is None:
        raise ValueError(
            f"a picture has the shape {pixels.shape}; expected (height, width), "
            "or 1, 3 or 4 channels first or last"
        )
    pixels = np.moveaxis(pixels, axis, -1)
    return pixels[:, :, 0] if pixels.shape[-1] == 1 else pixels


def _eight_bits(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Values from 0 to 255, scaled from 16 bits."""
    if pixels.dtype == np.uint16:
        return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 / 255
    if not np.issubdtype(pixels.dtype, np.integer) or pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(
            f"a picture has {pixels.dtype} values from {pixels.min()} to {pixels.max()}; expected "
            "integers from 0 to 255, or uint16: multiply a picture in 0 to 1 by 255 and round it"
        )
    return np.ascontiguousarray(pixels, dtype=np.uint8)
