"""What an exported file of the model has, whichever format it is in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from converter.history import Format

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# the name of the file in an export's folder
FILES: Mapping[Format, str] = {"onnx": "model.onnx", "torch": "model.pt2"}

# the file beside model.onnx that holds the weights where they are large
EXTERNAL_DATA = "model.onnx.data"

# the input's name, and recorded tensors' names by the outputs' names; those of layers are the same
INPUT = "pixel_values"
OUTPUTS = {"masks_queries_logits": "mask_logits", "class_queries_logits": "class_logits"}

# names of axes; those of hidden states, which have queries too, are _HIDDEN_STATES
_AXES = {
    INPUT: ("batch", "channels", "height", "width"),
    "masks_queries_logits": ("batch", "queries", "mask_height", "mask_width"),
    "class_queries_logits": ("batch", "queries", "classes"),
    "patch_embeddings": ("batch", "tokens", "features"),
}
_HIDDEN_STATES = ("batch", "queries_and_tokens", "features")


def axis_names(name: str) -> tuple[str, ...]:
    """Names of the axes of an export's input or output.

    Args:
        name: its name, in a file that eomt-convert has written.
    """
    return _AXES.get(name, _HIDDEN_STATES)


@dataclass(frozen=True)
class Port:
    """An input or output of an exported file.

    Attributes:
        name: its name in the file.
        dtype: as numpy names it, such as ``float32``.
        shape: of each axis the size, or None if the file takes any.
        axes: a name for each axis; empty for those without one.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    axes: tuple[str, ...]

    @property
    def dynamic_axes(self) -> dict[str, str]:
        """Names of the axes that may have any size, by their number."""
        axes = enumerate(zip(self.axes, self.shape, strict=False))
        return {str(axis): name for axis, (name, size) in axes if size is None}

    @property
    def shape_text(self) -> str:
        """Its shape in words, such as ``any x 3 x 64 x 64``."""
        return " x ".join("any" if size is None else str(size) for size in self.shape)


class StoredTensor(Protocol):
    """A constant of an exported file."""

    @property
    def dtype(self) -> str:
        """As numpy names it, such as ``float32``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of each axis."""

    def read(self) -> "NDArray[Any]":
        """Its values; large ones are read from the file at each call."""


class ExportedSession(Protocol):
    """An exported file that is ready to run."""

    def run(self, pixel_values: "NDArray[np.float32]") -> "dict[str, NDArray[np.float32]]":
        """Computes the outputs, by the names of recorded tensors, in the network's order.

        Args:
            pixel_values: (batch, channels, height, width), rescaled and normalised.

        Raises:
            EomtConvertError: the runtime fails.
        """

    def providers(self) -> tuple[str, ...]:
        """The execution providers that could be loaded, best first, by onnxruntime's names."""

    def nodes_by_provider(self) -> dict[str, int]:
        """How many nodes each execution provider ran so far, by onnxruntime's names."""


class ExportedFile(Protocol):
    """An exported file, inspected but not run. Nothing that it holds has been executed."""

    @property
    def path(self) -> Path:
        """Where it is."""

    @property
    def format(self) -> Format:
        """Its format."""

    @property
    def opset(self) -> int | None:
        """Version of ONNX's operators; None in other formats."""

    @property
    def input(self) -> Port:
        """The pixels."""

    @property
    def outputs(self) -> Mapping[str, Port]:
        """By the names of recorded tensors: ``mask_logits``, ``class_logits``, those of layers."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Its constants of more than one value, by their names in the file."""

    def problems(self) -> list[str]:
        """What breaks the rules of its format, in sentences."""

    def open(self, providers: Sequence[str] = (), layers: int = 0) -> ExportedSession:
        """Makes it ready to run.

        Args:
            providers: onnxruntime's execution providers, best first, with the number of the GPU
                where one was given; by default the CPU's.
            layers: number of the network's layers, to compute every layer's output too, where the
                file shows them; 0 for the file's own outputs.

        Raises:
            UsageError: a provider is not available.
            UnreadableFileError: the runtime refuses the file.
        """
