"""The operators that a program of this model may have, and their arguments.

All of them compute with tensors or sizes. None reads files, makes random numbers or looks at memory
by address.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from converter.outside import visible
from converter.runtimes.pt2_archive import DTYPES, is_identifier

_ATEN = "torch.ops.aten."

# of torch.ops.aten: what torch.export makes of this model, with and without masked attention and
# decompositions, and what other implementations of the same network use
_TENSOR_OPERATORS = {
    *("_softmax.default", "_to_copy.default", "add.Scalar", "add.Tensor", "addmm.default"),
    *("alias.default", "any.dim", "arange.default", "arange.start", "arange.start_step"),
    *("bmm.default", "cat.default", "chunk.default", "clone.default", "contiguous.default"),
    *("conv2d.default", "conv_transpose2d.input", "convolution.default", "copy_.default"),
    *("cos.default", "detach.default", "div.Scalar", "div.Tensor", "dropout.default"),
    *("einsum.default", "eq.Scalar", "expand.default", "flatten.using_ints"),
    *("full_like.default", "gelu.default", "gt.Scalar", "layer_norm.default"),
    *("lift_fresh_copy.default", "linear.default", "logical_not.default", "mT.default"),
    *("matmul.default", "meshgrid.indexing", "mm.default", "mul.Scalar", "mul.Tensor"),
    *("native_layer_norm.default", "neg.default", "new_ones.default", "permute.default"),
    *("pow.Scalar", "pow.Tensor_Scalar", "reciprocal.default", "repeat.default"),
    *("reshape.default", "scaled_dot_product_attention.default", "select.int"),
    *("sigmoid.default", "silu.default", "sin.default", "slice.Tensor", "softmax.int"),
    *("split_with_sizes.default", "squeeze.dim", "stack.default", "sub.Scalar", "sub.Tensor"),
    *("sym_size.int", "tile.default", "to.dtype", "transpose.int", "unflatten.int"),
    *("unsqueeze.default", "upsample_bilinear2d.vec", "view.default", "where.self"),
}
# of Python's module operator, for sizes
_SIZE_OPERATORS = {f"_operator.{name}" for name in ("add", "sub", "mul", "floordiv", "mod", "neg")}

# checks, which have no outputs
_CHECKS = {f"{_ATEN}_assert_tensor_metadata.default"}

_FORMATS = {1: "contiguous_format", 2: "channels_last", 4: "preserve_format"}
_FLOATS = {"Infinity", "-Infinity", "NaN"}


class UnknownOperatorError(ValueError):
    """Raised for an operator that is not in the list; the message is its name."""


@dataclass(frozen=True)
class GraphValue:
    """An argument that is a value of the graph."""

    name: str


@dataclass(frozen=True)
class Constant:
    """An argument that is a constant of torch, such as ``float32`` or ``channels_last``."""

    name: str


class Device:
    """An argument that is a device: always the one on which the graph runs."""


@dataclass(frozen=True)
class Node:
    """An operator with its arguments.

    Attributes:
        operator: such as ``add.Tensor``, or ``_operator.mul`` for sizes.
        positional, keywords: Python values, `GraphValue`, `Constant`, `Device`, and lists of them.
        outputs: the names of the values that it computes; an operator with several outputs, or
            with a list of them, has several.
        single: whether it returns one value and not a sequence.
    """

    operator: str
    positional: tuple[Any, ...]
    keywords: Mapping[str, Any]
    outputs: tuple[str, ...]
    single: bool

    def inputs(self) -> Iterator[str]:
        """The names of the values that it takes."""
        for value in (*self.positional, *self.keywords.values()):
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, GraphValue):
                    yield each.name


def parse_node(described: Mapping[str, Any]) -> Node | None:
    """Reads a node as torch describes it; None for one that only checks.

    Raises:
        UnknownOperatorError: its operator is not in the list.
        KeyError, TypeError, ValueError, AttributeError: it is not described validly.
    """
    target = described["target"]
    if target in _CHECKS:
        return None
    operator = target.removeprefix(_ATEN) if type(target) is str else ""
    if not (operator in _TENSOR_OPERATORS and target == _ATEN + operator) and (
        target not in _SIZE_OPERATORS
    ):
        raise UnknownOperatorError(visible(str(target), 100))
    positional, keywords = [], {}
    for given in described["inputs"]:
        value = _argument(given["arg"])
        if given.get("kind") == 2:
            keywords[given["name"]] = value
        else:
            positional.append(value)
    outputs = described["outputs"]
    names = [name for output in outputs for name in _names(output)]
    if not names or len(set(names)) < len(names) or not all(map(is_identifier, names)):
        raise ValueError(f"{operator} has no valid outputs")
    # more pieces than it has names would be made of nothing, and take memory
    if operator == "chunk.default" and positional[1:2] != [len(names)]:
        raise ValueError(f"{operator} has other pieces than outputs")
    single = len(outputs) == 1 and "as_tensors" not in outputs[0]
    return Node(operator, tuple(positional), keywords, tuple(names), single)


def _names(output: Mapping[str, Any]) -> list[str]:
    ((kind, value),) = output.items()
    match kind:
        case "as_tensor":
            return [value["name"]]
        case "as_tensors":
            return [each["name"] for each in value]
        case "as_sym_int":
            return [value["as_name"]]
    raise ValueError(f"it has an output of the kind {visible(kind)}")


def _argument(described: Mapping[str, Any]) -> Any:
    ((kind, value),) = described.items()
    match kind:
        case "as_none":
            return None
        case "as_tensor":
            return GraphValue(value["name"])
        case "as_tensors":
            return [GraphValue(each["name"]) for each in value]
        case "as_optional_tensor":
            return _argument(value)
        case "as_int":
            return _int(value)
        case "as_ints":
            return [_int(each) for each in value]
        case "as_sym_int":
            return _size(value)
        case "as_sym_ints":
            return [_size(each) for each in value]
        case "as_float":
            return _float(value)
        case "as_floats":
            return [_float(each) for each in value]
        case "as_bool" if type(value) is bool:
            return value
        case "as_string" if type(value) is str and len(value) <= 100:
            return value
        case "as_scalar_type":
            return Constant(DTYPES[value])
        case "as_memory_format":
            return Constant(_FORMATS[value])
        case "as_layout" if value == 7:
            return Constant("strided")
        case "as_device":
            return Device()
    raise ValueError(f"it has an argument of the kind {visible(kind)}")


def _size(value: Mapping[str, Any]) -> GraphValue | int:
    return GraphValue(value["as_name"]) if "as_name" in value else _int(value["as_int"])


def _int(value: Any) -> int:
    if type(value) is not int or abs(value) >= 2**63:
        raise ValueError("an argument is not an integer of 64 bits")
    return value


def _float(value: Any) -> float:
    if type(value) is not float and value not in _FLOATS:
        raise ValueError("an argument is not a number")
    return float(value)
