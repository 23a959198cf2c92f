"""What an exported file of the model has, whichever format it is in."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from converter.errors import EomtConvertError, RunError, UsageError
from converter.history import Format
from converter.outside import first_line

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

# what the sizes of an input are called in messages
_SIZES = ("batch size", "number of channels", "height", "width")

# how torch and onnxruntime say that they lack memory
_OUT_OF_MEMORY = re.compile(r"out of memory|allocate|bad_alloc", re.IGNORECASE)


def axis_names(name: str) -> tuple[str, ...]:
    """Names of the axes of an export's input or output.

    Args:
        name: its name, in a file that eomt-convert has written.
    """
    return _AXES.get(name, _HIDDEN_STATES)


@dataclass(frozen=True)
class Axis:
    """What sizes an axis of an input or output may have.

    Attributes:
        name: empty if it has none.
        size: the only one; None if it may have several.
        factor: it must be a multiple of this.
        symbol: axes with the same symbol have the same multiple; empty if it has none.
        least, most: limits of the multiple; None for no upper limit.
    """

    name: str = ""
    size: int | None = None
    factor: int = 1
    symbol: str = ""
    least: int = 1
    most: int | None = None

    def problem(self, size: int) -> str:
        """What is wrong with a size; empty if nothing is."""
        if self.size is not None:
            return "" if size == self.size else f"expected {self.size}"
        least = self.factor * self.least
        if size % self.factor or size < least:
            several = f"a multiple of {self.factor}" if self.factor > 1 else "a number"
            return f"expected {several}, from {least} on"
        if self.most is not None and size > self.factor * self.most:
            return f"expected {self.factor * self.most} at most"
        return ""

    def nearest(self, size: int, step: int = 1) -> int | None:
        """The size that it may have that is nearest to another.

        Args:
            size: the other.
            step: the size must be a multiple of this, too.

        Returns:
            The size, below the other if possible; None if it may have no multiple of the step.
        """
        if self.size is not None:
            return None if self.size % step else self.size
        unit = math.lcm(self.factor, step)
        least = -(-self.factor * self.least // unit)  # rounded up
        multiple = max(size // unit, least)
        if self.most is not None:
            multiple = min(multiple, self.factor * self.most // unit)
        return unit * multiple if multiple >= least else None


@dataclass(frozen=True)
class Port:
    """An input or output of an exported file.

    Attributes:
        name: its name in the file.
        dtype: as numpy names it, such as ``float32``.
        axes: what sizes it may have.
    """

    name: str
    dtype: str
    axes: tuple[Axis, ...]

    @property
    def shape(self) -> tuple[int | None, ...]:
        """Of each axis the size, or None if it may have several."""
        return tuple(axis.size for axis in self.axes)

    @property
    def dynamic_axes(self) -> dict[str, str]:
        """Names of the axes that may have several sizes, by their number."""
        axes = enumerate(self.axes)
        return {str(number): axis.name for number, axis in axes if axis.size is None}

    def problem_with(self, shape: Sequence[int]) -> str:
        """Why an input does not take a shape, as part of a sentence; empty if it takes it.

        Args:
            shape: (batch, channels, height, width).
        """
        multiples: dict[str, int] = {}
        for name, axis, size in zip(_SIZES, self.axes, shape, strict=True):
            problem = axis.problem(size)
            if not problem and axis.symbol:
                multiple = multiples.setdefault(axis.symbol, size // axis.factor)
                if multiple != size // axis.factor:
                    problem = f"expected {multiple * axis.factor}, as for another axis"
            if problem:
                return f"the {name} is {size}, {problem}"
        return ""

    def nearest(self, shape: Sequence[int], patch: int) -> tuple[int, ...] | None:
        """The shape that an input takes that is nearest to another; None if there is none.

        Args:
            shape: (batch, channels, height, width).
            patch: height and width must be multiples of this.
        """
        multiples: dict[str, int] = {}
        found: list[int] = []
        for axis, size, step in zip(self.axes, shape, (1, 1, patch, patch), strict=True):
            wanted = axis.factor * multiples.get(axis.symbol, size // axis.factor)
            near = axis.nearest(wanted, step)
            if near is None:
                return None
            if axis.symbol:
                multiples.setdefault(axis.symbol, near // axis.factor)
            found.append(near)
        return None if self.problem_with(found) else tuple(found)

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
            UsageError: the file does not take inputs of this size.
            RunError: the runtime fails.
            EomtConvertError: it has not enough memory.
        """

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
        """The constants of more than one value that its outputs are computed from, by name."""

    def problems(self) -> list[str]:
        """What breaks the rules of its format, in sentences."""

    def open(
        self, providers: Sequence[str] = (), layers: int = 0, *, gpu: int = 0
    ) -> ExportedSession:
        """Makes it ready to run.

        Args:
            providers: onnxruntime's execution providers, best first; by default the CPU's.
            layers: number of the network's layers, to compute every layer's output too, where the
                file shows them; 0 for the file's own outputs.
            gpu: the number of the GPU, for providers that run on one.

        Raises:
            UsageError: a provider is not available.
            UnreadableFileError: the runtime refuses the file.
        """


def check_input(file: ExportedFile, shape: Sequence[int]) -> None:
    """Refuses a shape that a file does not take.

    Args:
        file: the exported file.
        shape: (batch, channels, height, width).

    Raises:
        UsageError: the file does not take inputs of this size.
    """
    problem = file.input.problem_with(shape)
    if problem:
        raise UsageError(
            f"{file.path} does not take inputs of this size: {problem}.",
            "Export the model again, with the size that you need or without --image-size.",
        )


def run_error(file: ExportedFile, runtime: str, error: Exception) -> EomtConvertError:
    """The error for what a runtime raises while it runs a file.

    Args:
        file: the exported file.
        runtime: its name.
        error: what it raises.
    """
    message = f"{runtime} fails to run {file.path}: {first_line(error)}."
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
        return EomtConvertError(message)
    return RunError(message)
