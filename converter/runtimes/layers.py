"""Where the layers' outputs are in an exported file's graph, whichever format it is in."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from numpy.typing import NDArray

# the outputs of layers that a recording may have
LAYER_OUTPUT = re.compile(r"patch_embeddings|hidden_states\.\d+|last_hidden_state")

_ORDER = ("patch_embeddings", "hidden_states", "last_hidden_state", "class_logits", "mask_logits")


@dataclass(frozen=True)
class Norm:
    """A layer norm of a graph, by the names of values.

    Attributes:
        input: what it normalises.
        scale: its weight.
        output: the normalised values.
    """

    input: str
    scale: str
    output: str


def layer_points(norms: Sequence[Norm], layers: int) -> dict[str, str]:
    """The values that are layers' outputs, by the names of recorded tensors, in order.

    Every layer has two layer norms, whose inputs are what is passed from layer to layer. A norm
    whose scale is used again is the one before the heads, in a graph with masked attention. Empty
    if the graph has another structure.

    Args:
        norms: all of a graph, in the order in which they are computed.
        layers: number of the network's layers.
    """
    uses = Counter(norm.scale for norm in norms)
    of_layers = [norm for norm in norms if uses[norm.scale] == 1][: 2 * layers]
    if len(of_layers) < 2 * layers:
        return {}
    after = norms[norms.index(of_layers[-1]) + 1 :]
    if not after:
        return {}
    final = after[0]
    states = [norm.input for norm in of_layers[::2]] + [final.input]
    return {
        "patch_embeddings": states[0],
        **{f"hidden_states.{layer}": state for layer, state in enumerate(states[1:])},
        "last_hidden_state": final.output,
    }


def without_queries(layers: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The layers' outputs as they are recorded, from the inputs of the layers after them.

    The queries are put in front of the other tokens before the first layer that sees them. The
    output of the layer before, which has none, is recorded without them.
    """
    found = dict(layers)
    for before, name in pairwise(layers):
        queries = layers[name].shape[1] - layers[before].shape[1]
        if queries > 0:
            if name != "last_hidden_state":
                found[name] = layers[name][:, queries:]
            return found
    found.pop("patch_embeddings", None)  # the queries are in front of the first layer already
    return found


def in_network_order(values: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Recorded tensors in the order in which the network computes them."""

    def place(name: str) -> tuple[int, int]:
        kind, _, number = name.partition(".")
        return _ORDER.index(kind), int(number or 0)

    return {name: values[name] for name in sorted(values, key=place)}
