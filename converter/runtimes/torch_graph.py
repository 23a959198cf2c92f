"""Runs the graph of a program: calls its operators one after another."""

import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from converter.runtimes.operators import Constant, Device, GraphValue, Node

# largest size, as torch has them
_MAX_SIZE = 2**63


class TorchGraph:
    """The operators of a graph, and its constants in memory."""

    def __init__(
        self,
        nodes: Sequence[Node],
        constants: Mapping[str, tuple[NDArray[Any], str]],
        taken: str,
        wanted: Iterable[str],
    ) -> None:
        """Finds torch's operators.

        Args:
            nodes: in the order in which they run.
            constants: values and their dtypes, by name; bfloat16 as its bits.
            taken: the name of the input.
            wanted: the names of the values that are computed.

        Raises:
            AttributeError: torch does not have an operator.
        """
        self._wanted = tuple(dict.fromkeys(wanted))
        self._taken = taken
        self._constants = {
            name: torch.from_numpy(values).view(getattr(torch, dtype))
            for name, (values, dtype) in constants.items()
        }
        last = {name: index for index, node in enumerate(nodes) for name in node.inputs()}
        kept = {*self._constants, *self._wanted}
        self._steps = [
            (
                node,
                _function(node.operator),
                [
                    name
                    for name in {*node.inputs(), *node.outputs} - kept
                    if last.get(name, -1) <= index
                ],
            )
            for index, node in enumerate(nodes)
        ]
        self._tried: set[tuple[int, ...]] = set()

    def run(self, pixel_values: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        """Computes the wanted values, as float32.

        Args:
            pixel_values: (batch, channels, height, width), in the input's dtype; a graph may write
                to it.

        Raises:
            MemoryError: it takes more memory than the machine has.
            Exception: an operator fails; torch's errors are of many kinds.
        """
        with torch.inference_mode():
            if pixel_values.shape not in self._tried:
                self._try(pixel_values)
                self._tried.add(pixel_values.shape)
            values = self._evaluate(torch.from_numpy(pixel_values), self._constants)
            return {name: values[name].float().numpy() for name in self._wanted}

    def _try(self, pixel_values: NDArray[Any]) -> None:
        """Computes shapes only, on the meta device: a small file can ask for any size."""
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

        def check(values: Mapping[str, Any]) -> None:
            tensors = (value for value in values.values() if isinstance(value, Tensor))
            storages = (tensor.untyped_storage() for tensor in tensors)
            if sum({each._cdata: each.nbytes() for each in storages}.values()) > memory:
                raise MemoryError("it takes more memory than this machine has")

        pixels = torch.from_numpy(pixel_values).to("meta")
        self._evaluate(pixels, {n: t.to("meta") for n, t in self._constants.items()}, check)

    def _evaluate(
        self,
        pixels: Tensor,
        constants: Mapping[str, Tensor],
        check: Callable[[Mapping[str, Any]], None] = lambda _: None,
    ) -> Mapping[str, Any]:
        values: dict[str, Any] = {**constants, self._taken: pixels}

        def resolved(value: Any) -> Any:
            match value:
                case GraphValue():
                    return values[value.name]
                case Constant():
                    return getattr(torch, value.name)
                case Device():
                    return pixels.device
                case list():
                    return [resolved(each) for each in value]
            return value

        for node, function, unused in self._steps:
            result = function(
                *map(resolved, node.positional),
                **{name: resolved(value) for name, value in node.keywords.items()},
            )
            results = (result,) if node.single else result
            values.update(zip(node.outputs, results, strict=True))
            check(values)
            for name in unused:
                del values[name]
        return values


def _function(name: str) -> Callable[..., Any]:
    """An operator by its name in `Node`."""
    packet, _, overload = name.rpartition(".")
    if packet != "_operator":
        found: Callable[..., Any] = getattr(getattr(torch.ops.aten, packet), overload)
        return found
    of_sizes = getattr(operator, overload)

    def limited(*sizes: int) -> int:
        size: int = of_sizes(*sizes)
        if abs(size) >= _MAX_SIZE:
            raise OverflowError("a size is larger than 64 bits")
        return size

    return limited
