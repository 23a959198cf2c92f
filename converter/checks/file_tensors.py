"""Finds a model's tensors in an exported file, where they may have other names and be transposed.

Exporters name a weight after the place of the model in a wrapper, or give it a number, and store
the matrices of linear layers transposed, as a matrix product takes them.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converter.runtimes.exported import StoredTensor


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a model in an exported file.

    Attributes:
        stored: the file's tensor.
        shape: as in the model.
        transposed: whether it is stored transposed.
        sha256: of its little-endian bytes, in the model's shape.
    """

    stored: StoredTensor
    shape: tuple[int, ...]
    transposed: bool
    sha256: str

    def read(self) -> NDArray[Any]:
        """Its values, in the model's shape."""
        values = self.stored.read()
        return values.T if self.transposed else values.reshape(-1, *self.shape)[0]


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
    """A tensor as it is, and transposed, as far as it then has a shape.

    Where a batch size is fixed, exporters store tokens once for every input.
    """
    own, wanted = _without_leading_ones(tensor.shape), _without_leading_ones(shape)
    batch, inner = own[: len(own) - len(wanted)], own[len(own) - len(wanted) :]
    if inner == wanted:
        values = tensor.read().reshape(-1, *shape)
        if not batch or (values == values[0]).all():
            yield FileTensor(tensor, shape, False, _digest(values[0]))
    if len(shape) == 2 and tensor.shape == shape[::-1]:
        yield FileTensor(tensor, shape, True, _digest(tensor.read().T))


def _without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dropwhile(lambda size: size == 1, shape))


def _by_content(
    stored: Mapping[str, StoredTensor],
    named: Mapping[str, StoredTensor],
    shapes: Mapping[str, tuple[int, ...]],
    digests: Mapping[str, str],
    *,
    missing: Collection[str],
) -> dict[str, FileTensor]:
    """The missing tensors, by their digests, among the file's tensors that no name claims.

    Equal tensors, such as biases of zeros, may be stored once and stand for all of them.
    """
    claimed = {id(tensor) for tensor in named.values()}
    wanted = {(shapes[name], digests[name]) for name in missing if name in digests}
    found: dict[tuple[tuple[int, ...], str], FileTensor] = {}
    for tensor in stored.values():
        if id(tensor) in claimed:
            continue
        for shape in {shape for shape, _ in wanted}:
            for candidate in _orientations(tensor, shape):
                if (shape, candidate.sha256) in wanted:
                    found.setdefault((shape, candidate.sha256), candidate)
    by_name = {name: found.get((shapes[name], digests.get(name, ""))) for name in missing}
    return {name: tensor for name, tensor in by_name.items() if tensor}


def _digest(values: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()
