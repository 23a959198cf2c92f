"""Finds a model's tensors in an exported file, where they may have other names and be transposed.

Exporters name a weight after the place of the model in a wrapper, or give it a number, and store
the matrices of linear layers transposed, as a matrix product takes them.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any

from numpy.typing import NDArray

from converter.runtimes.exported import StoredTensor
from converter.weights.merge import sha256_of


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
    # square matrices with other values: as they are and transposed, as either may be meant
    unclear: dict[str, list[FileTensor]] = {}
    named = dict(find_names(stored, shapes))
    for name, given in named.items():
        candidates = list(_orientations(stored[given], shapes[name]))
        right = [each for each in candidates if each.sha256 == digests.get(name)]
        if len(candidates) > 1 and not right:
            unclear[name] = candidates
        elif candidates:
            found[name] = (right or candidates)[0]
    linear = [
        tensor.transposed
        for name, tensor in found.items()
        if len(tensor.shape) == 2 and name != "query.weight"  # which no product takes
    ]
    mostly_transposed = 2 * sum(linear) > len(linear)
    for name, (as_it_is, transposed) in unclear.items():
        found[name] = transposed if mostly_transposed else as_it_is
    others = [tensor for given, tensor in stored.items() if given not in named.values()]
    found |= _by_content(others, shapes, digests, missing=shapes.keys() - found.keys())
    return {name: found[name] for name in shapes if name in found}


def find_names(stored: Iterable[str], names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """A model's names with those in a file that end in them, after a prefix such as ``model.``."""
    for name in names:
        ends = [given for given in stored if given == name or given.endswith(f".{name}")]
        if ends:
            yield name, min(ends, key=len)


def _orientations(tensor: StoredTensor, shape: tuple[int, ...]) -> Iterator[FileTensor]:
    """A tensor as it is, and transposed, as far as it then has a shape.

    Where a batch size is fixed, exporters store tokens once for every input.
    """
    own, wanted = _without_leading_ones(tensor.shape), _without_leading_ones(shape)
    batch, inner = own[: len(own) - len(wanted)], own[len(own) - len(wanted) :]
    if inner == wanted:
        values = tensor.read().reshape(-1, *shape)
        if not batch or (values == values[0]).all():
            yield FileTensor(tensor, shape, False, sha256_of(values[0]))
    if len(shape) == 2 and tensor.shape == shape[::-1]:
        yield FileTensor(tensor, shape, True, sha256_of(tensor.read().T))


def _without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dropwhile(lambda size: size == 1, shape))


def _by_content(
    tensors: Iterable[StoredTensor],
    shapes: Mapping[str, tuple[int, ...]],
    digests: Mapping[str, str],
    *,
    missing: Collection[str],
) -> dict[str, FileTensor]:
    """The missing tensors, by their digests, among the file's tensors that no name claims.

    Equal tensors, such as biases of zeros, may be stored once and stand for all of them.
    """
    wanted = {(shapes[name], digests[name]) for name in missing if name in digests}
    found: dict[tuple[tuple[int, ...], str], FileTensor] = {}
    for tensor in tensors:
        for shape in {shape for shape, _ in wanted}:
            for candidate in _orientations(tensor, shape):
                if (shape, candidate.sha256) in wanted:
                    found.setdefault((shape, candidate.sha256), candidate)
    by_name = {name: found.get((shapes[name], digests.get(name, ""))) for name in missing}
    return {name: tensor for name, tensor in by_name.items() if tensor}
