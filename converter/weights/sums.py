"""Adds a delta to its backbone again, and compares the sums with the model it was made of."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converter.weights.merge import CHUNK, Files, compute, read_operand
from converter.weights.plan import Plan, Row

if TYPE_CHECKING:
    from converter.weights.tensorfiles import Array


@dataclass(frozen=True)
class TensorChange:
    """How one tensor of a model differs from the backbone's, and from its own sum.

    Attributes:
        elements: number of its elements.
        inexact: those of them whose sum has other bits than the model.
        max_abs: largest absolute difference of a sum from the model.
        max_ulps: the same in units of the last place of the delta's element.
        mean_change: mean absolute value of the delta; None for tensors that are not a difference.
    """

    elements: int
    inexact: int
    max_abs: float
    max_ulps: float
    mean_change: float | None

    def to_dict(self) -> dict[str, Any]:
        """The change as JSON shows it."""
        return {
            "elements": self.elements,
            "inexact": self.inexact,
            "max_abs": self.max_abs,
            "max_ulps": self.max_ulps,
            "mean_change": self.mean_change,
        }


def compare_sums(sums: Plan, files: Files, model: Plan) -> Mapping[str, TensorChange]:
    """Compares what a conversion of a delta gives with the model, element by element.

    Args:
        sums: how the conversion makes each tensor of the delta and the backbone, in float32.
        files: the delta, the backbone and the model.
        model: how each tensor is read from the model.

    Returns:
        By canonical name, without the schedule of masked attention: a conversion sets it to zeros.

    Raises:
        UnreadableFileError: a file was changed since it was opened.
    """
    originals = {row.name: row for row in model.rows if row.operation != "zeros"}
    return {
        row.name: _compare(row, originals[row.name], files)
        for row in sums.rows
        if row.name in originals
    }


def _compare(row: Row, original: Row, files: Files) -> TensorChange:
    import numpy as np

    buffers = np.empty((3, CHUNK), np.float32)
    inexact, changed = 0, 0.0
    max_abs = max_ulps = 0.0
    for start in range(0, row.size, CHUNK):
        stop = min(start + CHUNK, row.size)
        came_back = compute(row, files, start, stop, buffers[0], buffers[1])
        expected = compute(original, files, start, stop, buffers[2], buffers[1])
        differ = np.flatnonzero(came_back.view(np.uint32) != expected.view(np.uint32))
        delta = _delta(row, files, start, stop)
        if delta is not None:
            changed += float(np.abs(delta).sum(dtype=np.float64))
        if differ.size:
            inexact += differ.size
            error = np.abs(came_back[differ].astype(np.float64) - expected[differ])
            max_abs = max(max_abs, float(error.max()))
            if delta is not None:
                max_ulps = max(max_ulps, float((error / np.spacing(np.abs(delta[differ]))).max()))
    mean = changed / row.size if row.operation == "add" and row.size else None
    return TensorChange(row.size, inexact, max_abs, max_ulps, mean)


def _delta(row: Row, files: Files, start: int, stop: int) -> "Array | None":
    """The elements of the delta in a sum; None for a tensor that is none."""
    if row.operation != "add":
        return None
    return read_operand(row.operands[1], row, files, start, stop)
