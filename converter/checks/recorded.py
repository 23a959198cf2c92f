"""Recorded outputs: what the original implementation computed, to hold a model against."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converter.errors import UnreadableFileError
from converter.weights.tensorfiles import TensorFile

if TYPE_CHECKING:
    from torch import Tensor

FILE = "recorded.safetensors"


@dataclass(frozen=True)
class Recorded:
    """One recording.

    Attributes:
        path: its recorded.safetensors.
        sha256: digest of that file.
        tensors: everything in it, by name; README describes them.
    """

    path: Path
    sha256: str
    tensors: "dict[str, Tensor]"

    @property
    def pixels(self) -> "Tensor":
        """The input, (batch, channels, height, width) uint8."""
        return self.tensors["pixels"]

    def numbered(self, prefix: str) -> "list[Tensor]":
        """The tensors ``prefix.0``, ``prefix.1`` and so on."""
        found: list[Tensor] = []
        while f"{prefix}.{len(found)}" in self.tensors:
            found.append(self.tensors[f"{prefix}.{len(found)}"])
        return found


def find_recorded(path: Path) -> Path:
    """The recorded.safetensors of a folder, or the file itself.

    Raises:
        UnreadableFileError: there is none.
    """
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise UnreadableFileError(
            f"There are no recorded outputs at {path}.",
            f"Give a folder that has a {FILE}, or the file.",
        )
    return file


def read_recorded(path: Path) -> Recorded:
    """Reads recorded outputs: the input and everything computed from it, not the pictures.

    Raises:
        UnreadableFileError: the file cannot be read, or lacks the input or the logits.
    """
    import torch

    file = find_recorded(path)
    with TensorFile(file) as stored:
        digest = stored.sha256()
        tensors = {
            name: torch.from_numpy(stored.read(name))
            for name in stored.tensors
            if not name.startswith("pipeline.")
        }
    for name, rank in (("pixels", 4), ("mask_logits", 4), ("class_logits", 3)):
        if name not in tensors or tensors[name].ndim != rank:
            raise UnreadableFileError(f"{file} has no {name} of {rank} dimensions.")
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            raise UnreadableFileError(f"{name} in {file} is empty.")
    if tensors["pixels"].dtype != torch.uint8:
        raise UnreadableFileError(f"The pixels in {file} are not uint8.")
    return Recorded(file, digest, tensors)
