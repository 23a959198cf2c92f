"""Where the layers' outputs are in an exported file's graph, whichever format it is in."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import NDArray

# the outputs of layers that a recording may have
LAYER_OUTPUT = re.compile(r"patch_embeddings|hidden_states\.\d+|last_hidden_state")

_ORDER = ("patch_embeddings", "hidden_states", "last_hidden_state", "class_logits", "mask_logits")


# kinds of nodes; `same` changes at most the dtype, and empty is any other kind
Kind = Literal["norm", "sum", "concatenation", "same", ""]


@dataclass(frozen=True)
class GraphNode:
    """A node of a graph.

    Attributes:
        kind: what it computes.
        inputs: names of the values that it takes, in order; of a norm, the first is normalised.
        output: name of its first output.
    """

    kind: Kind
    inputs: Sequence[str]
    output: str


def layer_points(nodes: Iterable[GraphNode], layers: int) -> dict[str, str]:
    """The values that are layers' outputs, by the names of recorded tensors, in order.

    Every layer has two layer norms, whose inputs are the residual stream: each is the sum of the
    one before and what was computed from its norm. Before the first layer with queries, these are
    put in front of the other tokens; the output of the layer before is recorded without them.

    Args:
        nodes: the nodes of a graph, in the order in which they are computed.
        layers: number of the network's layers.

    Returns:
        The values; empty if the graph has another structure, or another number of layers.
    """
    made_by: dict[str, GraphNode] = {}
    same_as: dict[str, str] = {}
    stream, final = "", ""  # the last input of a norm in the residual stream, and its output
    states: list[str] = []  # these inputs, without the queries
    for node in nodes:
        inputs = [same_as.get(name, name) for name in node.inputs]
        made_by[node.output] = GraphNode(node.kind, inputs, node.output)
        if node.kind == "same" and inputs:
            same_as[node.output] = inputs[0]
        if node.kind != "norm" or not inputs:
            continue
        whole = made_by.get(inputs[0], GraphNode("", (), inputs[0]))
        # with queries in front, the other tokens are the last part
        last = whole.inputs[-1:] if whole.kind == "concatenation" else ()
        parts = [whole, *(made_by[name] for name in last if name in made_by)]
        if states:
            found = [part for part in parts if part.kind == "sum" and stream in part.inputs]
        else:  # the tokens of the embeddings are put together too
            found = [part for part in parts if part.kind == "concatenation"][-1:] or [whole]
        if found:
            states.append(found[0].output)
            stream, final = whole.output, node.output
    if len(states) != 2 * layers + 1:
        return {}
    return {
        "patch_embeddings": states[0],
        **{f"hidden_states.{layer}": state for layer, state in enumerate(states[2::2])},
        "last_hidden_state": final,
    }


def in_network_order(values: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Recorded tensors in the order in which the network computes them."""

    def place(name: str) -> tuple[int, int]:
        kind, _, number = name.partition(".")
        return _ORDER.index(kind), int(number or 0)

    return {name: values[name] for name in sorted(values, key=place)}
