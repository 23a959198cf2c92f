"""Reads programs of torch.export, whoever made them, and runs them with torch.

torch.export.load runs code of a stranger's file in many ways, so it is not used: the description of
the graph is read as JSON, and its nodes, all of them operators from a list, are called one by one.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from converter.errors import EomtConvertError, UnreadableFileError, UsageError
from converter.history import Format
from converter.outside import first_line, visible
from converter.runtimes.exported import OUTPUTS, Port, axis_names
from converter.runtimes.layers import LAYER_OUTPUT, GraphNode, Kind, in_network_order, layer_points
from converter.runtimes.operators import Node, UnknownOperatorError, parse_node
from converter.runtimes.program_text import check_texts
from converter.runtimes.pt2_archive import (
    DTYPES,
    PROGRAM,
    Archive,
    ProgramTensor,
    open_archive,
    read_tensors,
)

if TYPE_CHECKING:
    from converter.runtimes.torch_graph import TorchGraph

# the version of torch's description that is understood, torch/_export/serde/schema.py
_SCHEMA = 8

_AXES = ("batch size", "channels", "height", "width")

# kinds of operators where layers are looked for
_KINDS: Mapping[str, Kind] = {
    "layer_norm.default": "norm",
    "native_layer_norm.default": "norm",
    "add.Tensor": "sum",
    "cat.default": "concatenation",
    **dict.fromkeys(("_to_copy.default", "to.dtype", "alias.default", "clone.default"), "same"),
    **dict.fromkeys(("contiguous.default", "detach.default", "dropout.default"), "same"),
}

# the size of an axis that is not fixed, such as Mul(Integer(16), Symbol('s30', positive=True))
_SYMBOL = r"Symbol\('(\w+)'[^()]*\)"
_SIZE = re.compile(rf"(?:Mul\(Integer\((\d+)\), )?{_SYMBOL}\)?", re.ASCII)


@dataclass(frozen=True)
class Axis:
    """What sizes an axis of the input may have.

    Attributes:
        size: the only one; None if it may have several.
        factor: it must be a multiple of this.
        symbol: axes with the same symbol have the same multiple.
        least, most: limits of the multiple; None for no limit.
    """

    size: int | None = None
    factor: int = 1
    symbol: str = ""
    least: int | None = None
    most: int | None = None

    def problem(self, size: int) -> str:
        """What is wrong with a size; empty if nothing is."""
        if self.size is not None:
            return "" if size == self.size else f"expected {self.size}"
        least = self.factor * (self.least or 1)
        if size % self.factor or size < least:
            several = f"a multiple of {self.factor}" if self.factor > 1 else "a number"
            return f"expected {several}, from {least} on"
        if self.most is not None and size > self.factor * self.most:
            return f"expected {self.factor * self.most} at most"
        return ""


@dataclass(frozen=True)
class TorchProgram:
    """A program of this model. The attributes are those of `ExportedFile`, and these.

    Attributes:
        axes: the sizes that the input may have.
        constants: the tensors that the graph uses, by the names of its values.
        nodes: of the graph, in order.
    """

    archive: Archive = field(repr=False)
    input: Port
    outputs: Mapping[str, Port]
    tensors: Mapping[str, ProgramTensor]
    axes: tuple[Axis, ...] = field(repr=False)
    constants: Mapping[str, ProgramTensor] = field(repr=False)
    nodes: tuple[Node, ...] = field(repr=False)
    format: Format = "torch"
    opset: None = None

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.archive.path

    def problems(self) -> list[str]:
        """Nothing: what breaks the rules of the format is refused when it is read."""
        return []

    def open(self, providers: Sequence[str] = (), layers: int = 0) -> "TorchSession":
        """Makes it ready to run on the CPU; see `ExportedFile.open`.

        Raises:
            UsageError: a provider is asked for, which only ONNX files have.
            UnreadableFileError: the file is damaged, or needs an operator that torch does not have.
        """
        if providers:
            raise UsageError(
                f"{self.path} runs with torch, which has no execution providers.",
                "Leave out --provider, or export the model as ONNX.",
            )
        from converter.runtimes.torch_graph import TorchGraph

        points: Mapping[str, str] = {}
        if layers and not any(map(LAYER_OUTPUT.fullmatch, self.outputs)):
            points = layer_points(self._graph_nodes(), layers)
        own = {name: port.name for name, port in self.outputs.items()}
        stored = self.constants.values()
        contents = {entry: self.archive.read(entry) for entry in {each.entry for each in stored}}
        try:
            graph = TorchGraph(
                self.nodes,
                {
                    name: (tensor.view(contents[tensor.entry]), tensor.dtype)
                    for name, tensor in self.constants.items()
                },
                self.input.name,
                [*own.values(), *points.values()],
            )
        except AttributeError as error:
            raise UnreadableFileError(
                f"{self.path} needs another version of torch: {first_line(error)}."
            ) from error
        return TorchSession(self, graph, own, points)

    def _graph_nodes(self) -> Iterator[GraphNode]:
        return (
            GraphNode(_KINDS.get(node.operator, ""), list(node.inputs()), node.outputs[0])
            for node in self.nodes
        )


class TorchSession:
    """A program that is ready to run."""

    def __init__(
        self,
        program: TorchProgram,
        graph: "TorchGraph",
        own: Mapping[str, str],
        points: Mapping[str, str],
    ) -> None:
        self._program = program
        self._graph = graph
        self._own = own
        self._points = points

    def run(self, pixel_values: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Computes the outputs; see `ExportedSession.run`.

        Raises:
            UsageError: the program does not take inputs of this size.
            EomtConvertError: torch fails.
        """
        program = self._program
        _check_size(program, pixel_values.shape)
        inputs = pixel_values.astype(program.input.dtype)  # a copy, which the graph may write to
        try:
            values = self._graph.run(inputs)
        except Exception as error:  # what torch raises depends on the operator
            message = f"torch fails to run {program.path}: {first_line(error)}."
            raise EomtConvertError(message) from error
        layers = {name: values[value] for name, value in self._points.items()}
        own = {name: values[value] for name, value in self._own.items()}
        return in_network_order(layers | own)

    def providers(self) -> tuple[str, ...]:
        """None: torch has no providers."""
        return ()

    def nodes_by_provider(self) -> dict[str, int]:
        """Nothing: torch has no providers."""
        return {}


def _check_size(program: TorchProgram, shape: tuple[int, ...]) -> None:
    multiples: dict[str, int] = {}
    for name, axis, size in zip(_AXES, program.axes, shape, strict=True):
        problem = axis.problem(size)
        if not problem and axis.symbol:
            multiple = multiples.setdefault(axis.symbol, size // axis.factor)
            if multiple != size // axis.factor:
                problem = f"expected {multiple * axis.factor}, as for another axis"
        if problem:
            raise UsageError(
                f"{program.path} does not take inputs of this size: the {name} is {size}, "
                f"{problem}.",
                "Export the model again, with the size that you need or without --image-size.",
            )


# reading -----------------------------------------------------------------------------------------


def read_program(path: Path) -> TorchProgram:
    """Reads a program that torch.export.save wrote; nothing in it is run.

    Args:
        path: of the file.

    Raises:
        UnreadableFileError: it is no such program, is damaged, has an entry or a text that can run
            code, or another input and other outputs than this model.
    """
    archive = open_archive(path)
    tensors = read_tensors(archive)
    program = archive.read_object(PROGRAM)
    try:
        version = program["schema_version"]["major"]
        if version != _SCHEMA:
            raise UnreadableFileError(
                f"{path} has version {version!r} of torch.export's description, expected "
                f"{_SCHEMA}.",
                "Export the model again with the installed version of torch.",
            )
        check_texts(archive, program)
        return _Reading(archive, tensors, program).program()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise archive.refused(
            PROGRAM, f"does not describe a program validly ({first_line(error)})"
        ) from error


class _Reading:
    """The description of a program, while it is read; a mistake in it raises Python's errors."""

    def __init__(
        self, archive: Archive, tensors: Mapping[str, ProgramTensor], program: Mapping[str, Any]
    ) -> None:
        self.archive = archive
        self.tensors = tensors
        self.ranges = program["range_constraints"]
        self.graph = program["graph_module"]["graph"]
        self.signature = program["graph_module"]["signature"]

    def program(self) -> TorchProgram:
        pixels, constants = self._inputs()
        outputs = self._outputs()
        nodes = self._nodes({*pixels, *constants})
        known = {*pixels, *constants, *(name for node in nodes for name in node.outputs)}
        missing = [name for name in outputs if name not in known]
        if missing:
            raise ValueError(f"nothing computes {missing[0]}")
        taken = self._find_input([self._port(name) for name in pixels])
        return TorchProgram(
            self.archive,
            taken,
            self._find_outputs([self._port(name) for name in outputs]),
            {name: each for name, each in self.tensors.items() if math.prod(each.shape) > 1},
            tuple(map(self._axis, self.graph["tensor_values"][taken.name]["sizes"])),
            constants,
            nodes,
        )

    def _inputs(self) -> tuple[list[str], dict[str, ProgramTensor]]:
        """The names of inputs, and the tensors by the names of values."""
        pixels, constants = [], {}
        for spec in self.signature["input_specs"]:
            ((kind, content),) = spec.items()
            match kind:
                case "user_input":
                    pixels.append(content["arg"]["as_tensor"]["name"])
                case "parameter" | "buffer" | "tensor_constant":
                    name = content[f"{kind}_name"]
                    if name not in self.tensors:
                        raise ValueError(f"the tensor {name} is missing")
                    constants[content["arg"]["name"]] = self.tensors[name]
                case "constant_input":  # the value is part of the graph
                    pass
                case _:
                    raise ValueError(f"it has an input of the kind {visible(kind)}")
        return pixels, constants

    def _outputs(self) -> list[str]:
        names = []
        for spec in self.signature["output_specs"]:
            ((kind, content),) = spec.items()
            if kind != "user_output":
                raise ValueError(f"it has an output of the kind {visible(kind)}")
            if "as_tensor" in content["arg"]:
                names.append(content["arg"]["as_tensor"]["name"])
        return names

    def _nodes(self, known: set[str]) -> tuple[Node, ...]:
        nodes = []
        for described in self.graph["nodes"]:
            try:
                node = parse_node(described)
            except UnknownOperatorError as error:
                raise self.archive.refused(
                    PROGRAM,
                    f"has an operator that this model does not need: {error}",
                    "Export the model again without it.",
                ) from error
            if node is None:
                continue
            if unknown := [name for name in node.inputs() if name not in known]:
                raise ValueError(f"{unknown[0]} is used before it is computed")
            known.update(node.outputs)
            nodes.append(node)
        return tuple(nodes)

    def _port(self, name: str) -> Port:
        meta = self.graph["tensor_values"][name]
        shape = tuple(size.get("as_int") for size in meta["sizes"])
        if any(size is not None and type(size) is not int for size in shape):
            raise ValueError(f"{name} has an invalid shape")
        return Port(name, DTYPES.get(meta["dtype"], "unknown"), shape, axis_names(name))

    def _axis(self, size: Mapping[str, Any]) -> Axis:
        if "as_int" in size:
            return Axis(size["as_int"])
        found = _SIZE.fullmatch(size["as_expr"]["expr_str"])
        if found is None:
            return Axis()
        factor, symbol = found.groups()
        limits = self.ranges.get(symbol, {})
        least, most = (limits.get(key) for key in ("min_val", "max_val"))
        if any(limit is not None and type(limit) is not int for limit in (least, most)):
            raise ValueError(f"the range of {symbol} is invalid")
        return Axis(None, max(int(factor or 1), 1), symbol, least, most)

    def _find_input(self, inputs: Sequence[Port]) -> Port:
        if len(inputs) != 1 or len(inputs[0].shape) != 4:
            raise UnreadableFileError(
                f"{self.archive.path} is no export of this model: expected one input (batch, "
                f"channels, height, width), found {_listed(inputs)}."
            )
        if inputs[0].dtype not in ("float32", "float16"):
            raise UnreadableFileError(
                f"The input of {self.archive.path} has the type {inputs[0].dtype}, expected "
                "float32 or float16."
            )
        return inputs[0]

    def _find_outputs(self, outputs: Sequence[Port]) -> dict[str, Port]:
        """The outputs by the names of recorded tensors.

        Masks and classes have the names of our exports, or are the first of rank 4 and of rank 3.
        """
        by_name = {port.name.replace("hidden_states_", "hidden_states."): port for port in outputs}
        found = {OUTPUTS[name]: port for name, port in by_name.items() if name in OUTPUTS}
        found |= {n: port for n, port in by_name.items() if LAYER_OUTPUT.fullmatch(n)}
        for recorded, rank in (("mask_logits", 4), ("class_logits", 3)):
            others = [p for p in outputs if p not in found.values() and len(p.shape) == rank]
            if recorded not in found and others:
                found[recorded] = others[0]
            if recorded not in found or len(found[recorded].shape) != rank:
                raise UnreadableFileError(
                    f"{self.archive.path} is no export of this model: expected outputs for masks, "
                    f"of rank 4, and for classes, of rank 3; found {_listed(outputs)}."
                )
        if any(len(port.shape) != 3 for n, port in found.items() if n != "mask_logits"):
            raise ValueError("the output of a layer does not have rank 3")
        return found


def _listed(ports: Sequence[Port]) -> str:
    shown = [f"{port.name} of rank {len(port.shape)}" for port in ports[:10]]
    return ", ".join(shown) or "none"
