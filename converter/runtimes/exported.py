"""What an exported file of the model has, whichever format it is in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Format = Literal["onnx", "torch"]

# the name of the file in an export's folder
FILES: Mapping[Format, str] = {"onnx": "model.onnx", "torch": "model.pt2"}

# the input's name, and recorded tensors' names by the outputs' names; those of layers are the same
INPUT = "pixel_values"
OUTPUTS = {"masks_queries_logits": "mask_logits", "class_queries_logits": "class_logits"}


@dataclass(frozen=True)
class Port:
    """An input or output of an exported file.

    Attributes:
        name: its name in the file.
        dtype: as numpy names it, such as ``float32``.
        shape: of each axis the size, or None if the file takes any.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]


class StoredTensor(Protocol):
    """A constant of an exported file."""

    @property
    def dtype(self) -> str:
        """As numpy names it, such as ``float32``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of each axis."""

    def read(self) -> NDArray[Any]:
        """Its values; large ones are read from the file at each call."""


class Session(Protocol):
    """An exported file that is ready to run."""

    def run(self, pixel_values: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Computes the outputs, by the names of recorded tensors, in the network's order.

        Args:
            pixel_values: (batch, channels, height, width), rescaled and normalised.

        Raises:
            EomtConvertError: the runtime fails.
        """

    def nodes_by_provider(self) -> dict[str, int]:
        """How many nodes each execution provider ran so far, by onnxruntime's names."""


class ExportedFile(Protocol):
    """An exported file, inspected but not run. Nothing that it holds has been executed."""

    path: Path
    format: Format
    opset: int | None
    input: Port
    outputs: Mapping[str, Port]
    """By the names of recorded tensors: ``mask_logits``, ``class_logits``, and those of layers."""
    tensors: Mapping[str, StoredTensor]
    """Its constants of more than one value, by their names in the file."""

    def open(self, providers: Sequence[str] = (), layers: int = 0) -> Session:
        """Makes it ready to run.

        Args:
            providers: onnxruntime's execution providers, best first; by default the CPU's.
            layers: number of the network's layers, to compute every layer's output too, where the
                file shows them; 0 for the file's own outputs.

        Raises:
            UsageError: a provider is not available.
            UnreadableFileError: the runtime refuses the file.
        """
