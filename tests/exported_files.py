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


def change_with_height(graph: onnx.GraphProto, right: int) -> None:
    """Adds to the masks how much higher the input is than a number of pixels."""
    masks = "masks_queries_logits"
    for node in graph.node:
        node.output[:] = ["right_masks" if name == masks else name for name in node.output]
    constants: dict[str, Any] = {
        "two": np.array(2, np.int64),
        "height": np.array(right, np.float32),
    }
    graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in constants.items())
    graph.node.extend(
        [
            helper.make_node("Shape", ["pixel_values"], ["shape"], "baked/Shape"),
            helper.make_node("Gather", ["shape", "two"], ["size"], "baked/Gather"),
            helper.make_node("Cast", ["size"], ["pixels"], "baked/Cast", to=onnx.TensorProto.FLOAT),
            helper.make_node("Sub", ["pixels", "height"], ["higher"], "baked/Sub"),
            helper.make_node("Add", ["right_masks", "higher"], [masks], "baked/Add"),
        ]
    )


def bake_shape(graph: onnx.GraphProto, name: str, shape: list[int]) -> None:
    """Puts a constant in the place of a shape that the graph computes."""
    graph.initializer.append(numpy_helper.from_array(np.array(shape), "baked"))
    nodes = [node for node in graph.node if node.op_type == "Reshape" and name in node.input]
    assert nodes
    for node in nodes:
        node.input[1] = "baked"


def use_a_copy(graph: onnx.GraphProto, name: str) -> None:
    """Lets a changed copy of a tensor take its place; the tensor stays in the file, unused."""
    values = numpy_helper.to_array(initialiser(graph, name))
    graph.initializer.append(numpy_helper.from_array(values * np.float32(1 + 1e-6), "copy"))
    for node in graph.node:
        node.input[:] = ["copy" if given == name else given for given in node.input]
