"""Reads pictures, and turns their pixels into the values that a model takes."""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from converter.errors import UnreadableFileError
from converter.files import PICTURE_LIMIT, read_bytes, read_json_object

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True)
class Normalisation:
    """How pixels are rescaled and normalised: (pixel * scale - mean) / std.

    Attributes:
        scale: factor for pixels from 0 to 255.
        mean, std: mean and standard deviation of rescaled pixels, per channel.
    """

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: "Tensor") -> "Tensor":
        """Rescales and normalises pixels.

        With the usual values the result is, bit for bit, the original's (pixels / 255 - mean) /
        std.

        Args:
            pixels: (batch, channels, height, width) uint8.

        Returns:
            (batch, channels, height, width) float32.
        """
        import torch

        mean, std = (
            torch.tensor(values, dtype=torch.float32).reshape(1, -1, 1, 1)
            for values in (self.mean, self.std)
        )
        # the memory format of decoded pictures, which decides how the patch convolution rounds
        scaled = pixels.to(torch.float64, memory_format=torch.channels_last) * self.scale
        return (scaled.to(torch.float32) - mean) / std


def read_normalisation(preprocessor: Path, channels: int) -> Normalisation:
    """Reads how a preprocessor_config.json rescales and normalises.

    Raises:
        UnreadableFileError: the values are missing, or do not fit this number of channels.
    """
    values = read_json_object(preprocessor)
    try:
        scale = float(values["rescale_factor"]) if values.get("do_rescale", True) else 1.0
        mean, std = (0.0,) * channels, (1.0,) * channels
        if values.get("do_normalize", True):
            mean, std = (_per_channel(values[f"image_{key}"], channels) for key in ("mean", "std"))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UnreadableFileError(
            f"{preprocessor} has no usable rescale_factor, image_mean and image_std: {error}."
        ) from error
    return Normalisation(scale, mean, std)


def _per_channel(values: Any, channels: int) -> tuple[float, ...]:
    if len(values) != channels:
        raise ValueError(f"{len(values)} values for {channels} channels")
    return tuple(float(value) for value in values)


def open_picture(path: Path, file: BinaryIO | None = None) -> "Image":
    """Reads a picture in RGB, upright, without its metadata.

    Args:
        path: the picture's file.
        file: the content, if it was read already.

    Raises:
        UnreadableFileError: it is not a readable picture.
    """
    import numpy as np
    from PIL import Image

    from reference_model.pictures import read_picture

    try:
        return Image.fromarray(np.asarray(read_picture(file or _content(path))))
    except Exception as error:  # on hostile files, decoders may raise anything
        raise _unreadable(path, error) from error


def read_picture(path: Path) -> "Tensor":
    """The pixels of a picture, (1, 3, height, width) uint8.

    Raises:
        UnreadableFileError: it cannot be read.
    """
    import numpy as np
    import torch
    from PIL import Image

    from reference_model.pictures import FORMATS

    try:
        with Image.open(_content(path), formats=FORMATS) as opened:
            pixels = np.array(opened.convert("RGB"))
    except Exception as error:  # as above
        raise _unreadable(path, error) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def _content(path: Path) -> BytesIO:
    return BytesIO(read_bytes(path, PICTURE_LIMIT))


def _unreadable(path: Path, error: Exception) -> UnreadableFileError:
    reason = (isinstance(error, OSError) and error.strerror) or error
    return UnreadableFileError(f"{path} is not a readable picture: {reason}.")


def fit(pixels: "Tensor", side: int) -> "Tensor":
    """Resizes a picture so that it fits a square, and pads it at the bottom and right with zeros.

    It is resized as uint8, bilinear and antialiased, as transformers' processor does through
    torchvision; PIL rounds some pixels differently.

    Args:
        pixels: (1, channels, height, width) uint8.
        side: side of the square, in pixels.
    """
    from torch.nn import functional

    height, width = pixels.shape[-2:]
    longest = max(height, width)
    size = (round(height * side / longest), round(width * side / longest))
    if size != (height, width):
        pixels = functional.interpolate(pixels, size=size, mode="bilinear", antialias=True)
    return functional.pad(pixels, (0, side - size[1], 0, side - size[0]))
