"""Finds a model's tensors in an exported file, where they may have other names and be transposed.

Exporters name a weight after the place of the model in a wrapper, or give it a number, and store
the matrices of linear layers transposed, as a matrix product takes them.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converter.runtimes.exported import StoredTensor


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a model in an exported file.

    Attributes:
        stored: the file's tensor.
        transposed: whether it is stored transposed.
        sha256: of its little-endian bytes, in the model's orientation.
    """

    stored: StoredTensor
    transposed: bool
    sha256: str

    def read(self) -> NDArray[Any]:
        """Its values, in the model's orientation."""
        values = self.stored.read()
        return values.T if self.transposed else values


def find_tensors(
    stored: Mapping[str, StoredTensor],
    shapes: Mapping[str, tuple[int, ...]],
    digests: Mapping[str, str],
) -> dict[str, FileTensor]:
    """Finds a model's tensors in a file: by name, else by content.

    Args:
        stored: the file's tensors, by name.
        shapes: of the model's tensors, by name.
        digests: SHA-256 of the model's tensors, by name, as far as they are known.

    Returns:
        The tensors that were found, by the model's names. One that was found by its name may have
        other values.
    """
    found: dict[str, FileTensor] = {}
    unclear: list[str] = []  # square matrices with other values: either orientation may be meant
    named = dict(_by_name(stored, shapes))
    for name, tensor in named.items():
        candidates = list(_orientations(tensor, shapes[name]))
        right = [each for each in candidates if each.sha256 == digests.get(name)]
        if len(candidates) > 1 and not right:
            unclear.append(name)
        if candidates:
            found[name] = (right or candidates)[0]
    linear = [
        tensor.transposed
        for name, tensor in found.items()
        if len(shapes[name]) == 2 and name != "query.weight" and name not in unclear
    ]
    for name in unclear:  # as most other matrices
        candidates = list(_orientations(named[name], shapes[name]))
        found[name] = candidates[int(2 * sum(linear) > len(linear))]
    found |= _by_content(stored, named, shapes, digests, missing=shapes.keys() - found.keys())
    return {name: found[name] for name in shapes if name in found}


def _by_name(
    stored: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, StoredTensor]]:
    """Tensors whose names end in a model's name, after a prefix such as ``model.``."""
    for name in shapes:
        ends = [given for given in stored if given == name or given.endswith(f".{name}")]
        shortest = min(ends, key=len, default=None)
        if shortest is not None:
            yield name, stored[shortest]


def _orientations(tensor: StoredTensor, shape: tuple[int, ...]) -> Iterator[FileTensor]:
    """A tensor as it is, and transposed, as far as it then has a shape."""
    values = tensor.read()
    if values.shape == shape:
        yield FileTensor(tensor, False, _digest(values))
    if len(shape) == 2 and values.shape == shape[::-1]:
        yield FileTensor(tensor, True, _digest(values.T))


def _by_content(
    stored: Mapping[str, StoredTensor],
    named: Mapping[str, StoredTensor],
    shapes: Mapping[str, tuple[int, ...]],
    digests: Mapping[str, str],
    *,
    missing: Iterable[str],
) -> dict[str, FileTensor]:
    """The missing tensors, by their digests, among the file's tensors that no name claims."""
    wanted = {digests[name]: name for name in missing if name in digests}
    claimed = {id(tensor) for tensor in named.values()}
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name in wanted.values():
        by_shape.setdefault(shapes[name], []).append(name)
    found: dict[str, FileTensor] = {}
    for tensor in stored.values():
        if id(tensor) in claimed:
            continue
        for shape in {tensor.shape, tensor.shape[::-1]} & by_shape.keys():
            for candidate in _orientations(tensor, shape):
                if candidate.sha256 in wanted:
                    found.setdefault(wanted[candidate.sha256], candidate)
    # equal tensors, such as biases of zeros, are stored once and stand for all of them
    return {
        name: found[wanted[digests[name]]]
        for name in missing
        if name in digests and wanted[digests[name]] in found
    }


def _digest(values: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()
