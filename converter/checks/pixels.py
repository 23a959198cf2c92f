"""Pictures, and the numbers that a model sees of them."""

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
        mean, std: by channel, of rescaled pixels.
    """

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: "Tensor") -> "Tensor":
        """What the model sees.

        With the usual values it is, bit for bit, the original's (pixels / 255 - mean) / std.

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
    """What a preprocessor_config.json says of rescaling and normalising.

    Raises:
        UnreadableFileError: it does not say it, or not for this number of channels.
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
    """A picture in RGB, upright, and nothing that its file says besides.

    Args:
        path: of its file.
        file: with the content, if that was read already.

    Raises:
        UnreadableFileError: it is none that can be read.
    """
    import numpy as np
    from PIL import Image

    from reference_model.pictures import read_picture

    try:
        return Image.fromarray(np.asarray(read_picture(file or _content(path))))
    except Exception as error:  # on hostile files, decoders raise whatever comes up
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
    return UnreadableFileError(f"{path} is no picture that can be read: {reason}.")


def fit(pixels: "Tensor", side: int) -> "Tensor":
    """Resizes a picture so that it fits a square, and pads it at the bottom and right with zeros.

    It is resized as uint8, bilinear and antialiased, which is what transformers' processor does
    through torchvision; PIL's rounds some pixels otherwise.

    Args:
        pixels: (1, channels, height, width) uint8.
        side: of the square, in pixels.
    """
    from torch.nn import functional

    height, width = pixels.shape[-2:]
    longest = max(height, width)
    size = (round(height * side / longest), round(width * side / longest))
    if size != (height, width):
        pixels = functional.interpolate(pixels, size=size, mode="bilinear", antialias=True)
    return functional.pad(pixels, (0, side - size[1], 0, side - size[0]))
