"""ONNX files, changed as someone might have changed them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper


def initialiser(graph: onnx.GraphProto, name: str) -> onnx.TensorProto:
    found: onnx.TensorProto = next(each for each in graph.initializer if each.name == name)
    return found


def change(path: Path, edit: Callable[[onnx.GraphProto], object]) -> None:
    """Edits the graph of an ONNX file in place."""
    model = onnx.load(path)
    edit(model.graph)
    onnx.save(model, path)


def set_values(
    graph: onnx.GraphProto, name: str, values: Callable[[NDArray[Any]], NDArray[Any]]
) -> None:
    tensor = initialiser(graph, name)
    array = values(numpy_helper.to_array(tensor).copy())
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def swap(graph: onnx.GraphProto, one: str, other: str) -> None:
    first, second = (
        numpy_helper.to_array(initialiser(graph, name)).copy() for name in (one, other)
    )
    set_values(graph, one, lambda _: second)
    set_values(graph, other, lambda _: first)


def set_epsilon(graph: onnx.GraphProto, epsilon: float, *, of: str = "") -> None:
    """Sets the epsilon of the layer norms whose scale's name begins with ``of``."""
    norms = [node for node in graph.node if node.op_type == "LayerNormalization"]
    chosen = [node for node in norms if node.input[1].startswith(of)]
    assert chosen
    for node in chosen:
        kept = [each for each in node.attribute if each.name != "epsilon"]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("epsilon", epsilon)])


def normalise_again(graph: onnx.GraphProto) -> None:
    """Puts ImageNet's normalisation, of pixels from 0 to 1, in front of the graph."""
    for node in graph.node:
        node.input[:] = ["normalised" if name == "pixel_values" else name for name in node.input]
    constants = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    for name, values in constants.items():
        array = np.array(values, np.float32).reshape(1, 3, 1, 1)
        graph.initializer.append(numpy_helper.from_array(array, name))
    first = [
        helper.make_node("Sub", ["pixel_values", "mean"], ["centred"], "normalisation/Sub"),
        helper.make_node("Div", ["centred", "std"], ["normalised"], "normalisation/Div"),
    ]
    nodes = [*first, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
