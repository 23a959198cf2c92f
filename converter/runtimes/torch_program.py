"""Reads programs of torch.export, whoever made them, and runs them with torch.

torch.export.load runs code of a stranger's file in many ways, so it is not used: the description of
the graph is read as JSON, and its nodes, all of them operators from a list, are called one by one.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from converter.errors import UnreadableFileError, UsageError
from converter.history import Format
from converter.outside import first_line, visible
from converter.runtimes.exported import Axis, Port, axis_names, check_input, run_error
from converter.runtimes.layers import LAYER_OUTPUT, GraphNode, Kind, in_network_order, layer_points
from converter.runtimes.operators import Node, UnknownOperatorError, parse_node
from converter.runtimes.ports import find_input, find_outputs
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
class TorchProgram:
    """A program of this model. The attributes are those of `ExportedFile`, and these.

    Attributes:
        constants: the tensors that the graph uses, by the names of its values.
        nodes: of the graph, in order.
    """

    archive: Archive = field(repr=False)
    input: Port
    outputs: Mapping[str, Port]
    tensors: Mapping[str, ProgramTensor]
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

    def open(
        self, providers: Sequence[str] = (), layers: int = 0, *, gpu: int = 0
    ) -> "TorchSession":
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
        """Computes the outputs; see `ExportedSession.run`."""
        program = self._program
        check_input(program, pixel_values.shape)
        inputs = pixel_values.astype(program.input.dtype)  # a copy, which the graph may write to
        try:
            values = self._graph.run(inputs)
        except Exception as error:  # what torch raises depends on the operator
            raise run_error(program, "torch", error) from error
        layers = {name: values[value] for name, value in self._points.items()}
        own = {name: values[value] for name, value in self._own.items()}
        return in_network_order(layers | own)

    def nodes_by_provider(self) -> dict[str, int]:
        """Nothing: torch has no providers."""
        return {}


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
        pixels, stored = self._inputs()
        outputs = self._outputs()
        nodes = self._nodes({*pixels, *stored})
        known = {*pixels, *stored, *(name for node in nodes for name in node.outputs)}
        missing = [name for name in outputs if name not in known]
        if missing:
            raise ValueError(f"nothing computes {missing[0]}")
        path = self.archive.path
        taken = find_input(path, [self._port(name) for name in pixels])
        found = find_outputs(
            path,
            # torch makes names of Python of those with a dot
            {n.replace("hidden_states_", "hidden_states."): self._port(n) for n in outputs},
            remedy="Export the model again with these two outputs only.",
        )
        used = _used(nodes, [port.name for port in found.values()])
        tensors = {name: self.tensors[name] for value, name in stored.items() if value in used}
        return TorchProgram(
            self.archive,
            taken,
            found,
            {name: tensor for name, tensor in tensors.items() if math.prod(tensor.shape) > 1},
            {value: self.tensors[name] for value, name in stored.items()},
            nodes,
        )

    def _inputs(self) -> tuple[list[str], dict[str, str]]:
        """The names of inputs, and those of tensors by the names of their values."""
        pixels, stored = [], {}
        for spec in self.signature["input_specs"]:
            ((kind, content),) = spec.items()
            match kind:
                case "user_input":
                    pixels.append(content["arg"]["as_tensor"]["name"])
                case "parameter" | "buffer" | "tensor_constant":
                    name = content[f"{kind}_name"]
                    if name not in self.tensors:
                        raise ValueError(f"the tensor {name} is missing")
                    stored[content["arg"]["name"]] = name
                case "constant_input":  # the value is part of the graph
                    pass
                case _:
                    raise ValueError(f"it has an input of the kind {visible(kind)}")
        return pixels, stored

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
        names = chain(axis_names(name), repeat(""))  # a stranger's output may have more axes
        axes = map(self._axis, names, meta["sizes"])
        return Port(name, DTYPES.get(meta["dtype"], "unknown"), tuple(axes))

    def _axis(self, name: str, size: Mapping[str, Any]) -> Axis:
        if "as_int" in size:
            if type(size["as_int"]) is not int:
                raise ValueError(f"the size of {name} is invalid")
            return Axis(name, size["as_int"])
        found = _SIZE.fullmatch(size["as_expr"]["expr_str"])
        if found is None:
            return Axis(name)
        factor, symbol = found.groups()
        limits = self.ranges.get(symbol, {})
        least, most = (limits.get(key) for key in ("min_val", "max_val"))
        multiple = int(factor or 1)
        numbers = [multiple, *(each for each in (least, most) if each is not None)]
        if any(type(each) is not int or abs(each) >= 2**63 for each in numbers):
            raise ValueError(f"the range of {symbol} is invalid")
        return Axis(name, None, max(multiple, 1), symbol, max(least or 1, 1), most)


def _used(nodes: Sequence[Node], outputs: Iterable[str]) -> set[str]:
    """Names of the values that outputs are computed from.

    A node that writes to a tensor counts as used, as others may share the tensor's memory.
    """
    used = set(outputs)
    for node in reversed(nodes):
        if node.operator == "copy_.default" or used & {*node.outputs}:
            used.update(node.inputs())
    return used
