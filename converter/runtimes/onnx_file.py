"""Reads ONNX files, whoever made them, and runs them with onnxruntime.

Nothing in a file is trusted: onnx parses it, which runs nothing, and what could run code, lead out
of its folder or expand without limit is refused before onnxruntime sees the graph.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converter.errors import (
    EomtConvertError,
    MissingKernelError,
    UnreadableFileError,
)
from converter.files import is_within, open_regular, read_bytes, readable, real_path
from converter.history import Format
from converter.outside import first_line, visible
from converter.runtimes.exported import Axis, Port, StoredTensor, check_input, run_error
from converter.runtimes.layers import LAYER_OUTPUT, GraphNode, Kind, in_network_order, layer_points
from converter.runtimes.ports import find_input, find_outputs
from converter.runtimes.providers import CPU, check_available, with_gpu

try:
    import onnx
    import onnxruntime
    from onnx import checker, helper, numpy_helper, shape_inference
    from onnxruntime.capi import onnxruntime_pybind11_state
except ModuleNotFoundError as missing:
    raise EomtConvertError(
        f"ONNX files need {missing.name}, which is not installed.",
        "Install it: pip install 'eomt-convert[export]'",
    ) from missing

# protobuf's limit for a message, in bytes; larger models have their weights in another file
_LIMIT = 2**31

# domains of operators that onnxruntime has built in
_DOMAINS = ("", "ai.onnx", "com.microsoft")

# domains of operators with the layouts of one kind of processor, which onnxruntime puts in at the
# levels above ORT_ENABLE_EXTENDED (onnxruntime/core/graph/constants.h)
_OPTIMISED = ("com.microsoft.nchwc", "com.ms.internal.nhwc")

# Bytes of a tensor beside the file that is taken into the graph: onnx's and onnxruntime's shape
# inference need the values of shapes, and have no way to read them from elsewhere.
_SMALL = 1024

# largest number of nodes after functions are put in the places of their calls
_MAX_NODES = 1_000_000

# largest number of functions that call each other in a row: each takes some of the stack of onnx
_MAX_DEPTH = 100

_GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)

# Largest number of fields of all messages in a file. torch writes some 40 for each node, with stack
# traces, and a layer has 80 nodes. An empty node has 2 bytes in the file, and takes 150 in memory.
_MAX_FIELDS = 1_000_000

# kinds of operators where layers are looked for
_KINDS: Mapping[str, Kind] = {
    "LayerNormalization": "norm",
    "SkipLayerNormalization": "norm",
    "Add": "sum",
    "Concat": "concatenation",
    "Cast": "same",
    "Identity": "same",
}

_Graph = Any  # onnx's messages have no types of their own
_Node = Any
_Tensor = Any


@dataclass(frozen=True)
class InlineTensor:
    """A constant in the file itself."""

    dtype: str
    shape: tuple[int, ...]
    message: _Tensor

    def read(self) -> NDArray[Any]:
        """Its values."""
        values: NDArray[Any] = numpy_helper.to_array(self.message)
        return values


@dataclass(frozen=True)
class ExternalTensor:
    """A constant in a file beside it.

    Attributes:
        path: of that file.
        offset: where the values begin in it, in bytes.
    """

    element: np.dtype[Any]
    shape: tuple[int, ...]
    path: Path
    offset: int

    @property
    def dtype(self) -> str:
        """As numpy names it."""
        return self.element.name

    def read(self) -> NDArray[Any]:
        """Its values, mapped from the file.

        Raises:
            UnreadableFileError: the file cannot be read.
        """
        with readable(self.path), open_regular(self.path) as file:
            return np.memmap(file, self.element, "r", self.offset, self.shape)


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file of this model. The attributes are those of `ExportedFile`, and these.

    ``tensors`` are those that the outputs are computed from.

    Attributes:
        external: the initialisers that lie beside the file, by name.
        model: onnx's message, as it was read.
    """

    path: Path
    opset: int
    input: Port
    outputs: Mapping[str, Port]
    tensors: Mapping[str, StoredTensor]
    external: Mapping[str, StoredTensor] = field(repr=False)
    model: Any = field(repr=False)
    format: Format = "onnx"

    def problems(self) -> list[str]:
        """What onnx's full check finds, in sentences.

        It does not know onnxruntime's own operators; a file that has any gets the simple check.
        """
        functions = (function.node for function in self.model.functions)
        nodes = chain(self.model.graph.node, *functions)
        ours = all(node.domain != "com.microsoft" for node in nodes)
        try:
            checker.check_model(self._without_external(), full_check=ours)
        except Exception as error:  # several kinds, and those of shape inference
            message = visible(" ".join(str(error).split()).rstrip("."))
            return [f"onnx's checker refuses it: {message}."]
        return []

    def _without_external(self) -> Any:
        """The model with inputs in place of the tensors beside the file.

        The checker would look for them itself: from the current folder, or by its own rules.
        """
        external = self.external
        if not external:
            return self.model
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        tensors = list(model.graph.initializer)
        inputs = {each.name for each in model.graph.input}
        del model.graph.initializer[:]
        model.graph.initializer.extend(each for each in tensors if each.name not in external)
        model.graph.input.extend(
            helper.make_tensor_value_info(each.name, each.data_type, list(each.dims))
            for each in tensors
            if each.name in external and each.name not in inputs
        )
        return model

    def open(self, providers: Sequence[str] = (), layers: int = 0) -> "OnnxSession":
        """Makes it ready to run; see `ExportedFile.open`.

        Raises:
            MissingKernelError: a provider lacks an operator in the file's type.
            UsageError: a provider is not available.
            UnreadableFileError: onnxruntime refuses the file.
        """
        check_available(providers)
        names = {port.name: name for name, port in self.outputs.items()}
        points: Mapping[str, str] = {}
        model = self.model
        if layers and not any(map(LAYER_OUTPUT.fullmatch, self.outputs)):
            model = onnx.ModelProto()
            model.CopyFrom(self.model)
            points = layer_points(_graph_nodes(model.graph), layers)
            known = {output.name for output in model.graph.output}
            added = dict.fromkeys(value for value in points.values() if value not in known)
            model.graph.output.extend(onnx.ValueInfoProto(name=value) for value in added)
        options = with_gpu(providers or [CPU])
        return OnnxSession.of(
            self, model.SerializeToString(), names, points, options, profiled=bool(providers)
        )


class OnnxSession:
    """An ONNX file that is ready to run."""

    def __init__(
        self,
        file: OnnxFile,
        session: Any,
        names: Mapping[str, str],
        points: Mapping[str, str],
        profiles: "TemporaryDirectory[str] | None",
    ) -> None:
        self._file = file
        self._session = session
        self._names = names
        self._points = points
        self._profiles = profiles
        self._nodes: dict[str, int] = {}

    @classmethod
    def of(
        cls,
        file: OnnxFile,
        model: bytes,
        names: Mapping[str, str],
        points: Mapping[str, str],
        providers: Sequence[tuple[str, dict[str, int]]],
        *,
        profiled: bool,
    ) -> "OnnxSession":
        """Has onnxruntime load a model.

        Args:
            file: the file that it comes from.
            model: the model, which may have more outputs than the file.
            names: names of recorded tensors by those of the file's outputs.
            points: names of the values with layers' outputs, by those of recorded tensors.
            providers: best first, each with its options.
            profiled: whether to count the nodes that each runs.

        Raises:
            MissingKernelError: a provider lacks an operator in the file's type.
            UnreadableFileError: onnxruntime refuses the file.
        """
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what matters is raised
        profiles = TemporaryDirectory(prefix="eomt-convert-") if profiled else None
        if profiles:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(profiles.name, "profile"))
        values = {name: _ort_value(tensor.read()) for name, tensor in file.external.items()}
        if values:
            options.add_external_initializers(list(values), list(values.values()))
        try:
            with ExitStack() as failing:
                if profiles:
                    failing.enter_context(profiles)
                session = onnxruntime.InferenceSession(
                    model,
                    options,
                    providers=list(providers),
                    enable_fallback=0,  # to the CPU, if a provider fails, with a note on stdout
                )
                failing.pop_all()
        except onnxruntime_pybind11_state.NotImplemented as error:
            raise _missing_kernel(file.path, error) from error
        except Exception as error:  # onnxruntime's kinds have no common base
            raise UnreadableFileError(
                f"onnxruntime refuses {file.path}: {first_line(error)}."
            ) from error
        return cls(file, session, names, points, profiles)

    def run(self, pixel_values: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Computes the outputs; see `ExportedSession.run`.

        Raises:
            MissingKernelError: a provider lacks an operator in the file's type.
        """
        port = self._file.input
        check_input(self._file, pixel_values.shape)
        given = pixel_values.astype(port.dtype, copy=False)
        try:
            found = self._session.run(None, {port.name: given})
        except onnxruntime_pybind11_state.NotImplemented as error:
            raise _missing_kernel(self._file.path, error) from error
        except Exception as error:  # as above
            raise run_error(self._file, "onnxruntime", error) from error
        finally:
            if self._profiles:
                with self._profiles:
                    self._nodes = _count_nodes(Path(self._session.end_profiling()))
                self._profiles = None
        outputs = [each.name for each in self._session.get_outputs()]
        values = dict(zip(outputs, found, strict=True))
        layers = {name: values[value] for name, value in self._points.items()}
        own = {self._names[value]: values[value] for value in outputs if value in self._names}
        return {
            name: values.astype(np.float32, copy=False)
            for name, values in in_network_order(layers | own).items()
        }

    def providers(self) -> tuple[str, ...]:
        """The execution providers that onnxruntime could load, best first."""
        return tuple(self._session.get_providers())

    def nodes_by_provider(self) -> dict[str, int]:
        """How many nodes each provider ran in the first run."""
        return dict(self._nodes)


def _missing_kernel(path: Path, error: Exception) -> MissingKernelError:
    return MissingKernelError(f"onnxruntime cannot run {path}: {first_line(error)}.")


def _count_nodes(profile: Path) -> dict[str, int]:
    """How many nodes each provider ran, in a profile of onnxruntime."""
    events = json.loads(profile.read_text(encoding="utf-8"))
    providers = Counter(
        event["args"]["provider"]
        for event in events
        if event.get("cat") == "Node" and event.get("args", {}).get("provider")
    )
    return dict(providers)


def _ort_value(values: NDArray[Any]) -> Any:
    """A tensor for onnxruntime in the memory of an array."""
    value = onnxruntime.OrtValue
    if values.dtype.name == "bfloat16":
        bits = np.asarray(values).view(np.uint16)
        return value.ortvalue_from_numpy_with_onnx_type(bits, onnx.TensorProto.BFLOAT16)
    return value.ortvalue_from_numpy(np.asarray(values))


# reading -----------------------------------------------------------------------------------------


def read_onnx(
    path: Path, *, input_name: str | None = None, output_names: tuple[str, str] | None = None
) -> OnnxFile:
    """Reads an ONNX file; nothing in it is run.

    Args:
        path: of the file.
        input_name: name of the input; by default ``pixel_values``, or the only one of rank 4.
        output_names: names of the outputs for masks and classes; by default
            ``masks_queries_logits`` and ``class_queries_logits``, or the only ones of rank 4 and 3.

    Raises:
        UnreadableFileError: it is no ONNX file, or has control flow, custom operators, other inputs
            and outputs than this model, or tensors that are not where they should be.
        UsageError: it has no input or output of the given name.
    """
    model = _parse(path)
    graph = model.graph
    opset = _check_operators(path, model)
    stored, used = dict(_tensors(path, graph)), _used(graph)
    tensors = {name: tensor for name, tensor in stored.items() if name in used}
    _leave_out_unused(graph)
    external = {
        tensor.name: stored[tensor.name]
        for tensor in graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    known = {each.name for each in graph.initializer}
    inputs = [_port(each) for each in graph.input if each.name not in known]
    outputs = [_port(each) for each in graph.output]
    if any(not port.shape for port in outputs):
        with suppress(Exception):  # of several kinds; the outputs' ranks stay unknown
            inferred = shape_inference.infer_shapes(model)
            outputs = [_port(each) for each in inferred.graph.output]
    taken = find_input(path, inputs, input_name)
    found = find_outputs(
        path,
        {port.name: port for port in outputs},
        output_names,
        remedy="--output-names MASKS,CLASSES says which they are.",
    )
    return OnnxFile(path, opset, taken, found, tensors, external, model)


def _parse(path: Path) -> Any:
    with readable(path):
        # memory for as many bytes as the limit says is asked for at once
        content = read_bytes(path, min(path.stat().st_size, _LIMIT))
    _check_fields(path, content)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception as error:  # of protobuf, which onnx brings along
        raise UnreadableFileError(f"{path} is no ONNX file: {first_line(error)}.") from error
    if not (model.ir_version and model.graph.node and model.graph.output):
        raise UnreadableFileError(f"{path} is no ONNX file: it has no version, or no graph.")
    return model


def _check_fields(path: Path, content: bytes) -> None:
    """Refuses a file whose messages would take far more memory than the file has bytes.

    It walks through protobuf's encoding (protobuf.dev/programming-guides/encoding); what breaks the
    rules is left for protobuf to refuse.
    """
    kinds: dict[str, dict[int, Any]] = {}
    waiting = [(0, len(content), onnx.ModelProto.DESCRIPTOR)]
    fields = 0
    while waiting:
        position, end, kind = waiting.pop()
        if kind.full_name not in kinds:
            kinds[kind.full_name] = {field.number: field.message_type for field in kind.fields}
        messages = kinds[kind.full_name]
        while position < min(end, len(content)):
            fields += 1
            if fields > _MAX_FIELDS:
                raise UnreadableFileError(
                    f"{path} has more than {_MAX_FIELDS:,} fields, too many for a graph."
                )
            tag, position = _varint(content, position)
            if tag & 7 == 0:  # a number
                _, position = _varint(content, position)
            elif tag & 7 == 2:  # of a given length: text, bytes, numbers or a message
                length, position = _varint(content, position)
                message = messages.get(tag >> 3)
                if message is not None:
                    rest = position + length, end, kind
                    waiting += [rest, (position, position + length, message)]
                    break
                position += length
            else:
                position += {1: 8, 5: 4}.get(tag & 7, 0)


def _varint(content: bytes, position: int) -> tuple[int, int]:
    """A number of protobuf's variable length, at most 10 bytes, and where it ends."""
    number = 0
    for index, byte in enumerate(content[position : position + 10]):
        number |= (byte & 127) << (7 * index)
        if byte < 128:
            return number, position + index + 1
    return number, position + 10


def _check_operators(path: Path, model: Any) -> int:
    """Refuses control flow, custom operators and functions that grow without limit.

    Returns:
        The version of ONNX's operators.
    """
    opsets = {each.domain: each.version for each in model.opset_import}
    opset = opsets.get("", opsets.get("ai.onnx"))
    if opset is None:
        raise UnreadableFileError(f"{path} does not say which version of ONNX's operators it uses.")
    if model.training_info:
        raise UnreadableFileError(f"{path} has graphs for training, which this model has not.")
    functions: dict[tuple[str, str, str], Sequence[_Node]] = {}
    for each in model.functions:
        key = each.domain, each.name, each.overload
        if key in functions:
            raise UnreadableFileError(f"{path} has two functions {visible(each.name)!r}.")
        functions[key] = each.node
    for node in chain(model.graph.node, *functions.values()):
        _check_node(path, node, custom=_called(node) not in functions)
    calls = {key: {_called(node) for node in nodes} for key, nodes in functions.items()}
    try:
        order = list(TopologicalSorter(calls).static_order())
    except CycleError as error:
        name = visible(error.args[1][0][1])
        raise UnreadableFileError(f"{path} has a function that calls itself: {name}.") from error
    sizes, depths = Counter[tuple[str, str, str]](), Counter[tuple[str, str, str]]()
    for key in (key for key in order if key in functions):
        sizes[key] = sum(sizes.get(_called(node), 1) for node in functions[key])
        depths[key] = 1 + max((depths[called] for called in calls[key]), default=0)
    if sum(sizes.get(_called(node), 1) for node in model.graph.node) > _MAX_NODES:
        raise UnreadableFileError(f"{path} has more than {_MAX_NODES:,} nodes.")
    if max(depths.values(), default=0) > _MAX_DEPTH:
        raise UnreadableFileError(f"{path} has functions in more than {_MAX_DEPTH} levels.")
    return int(opset)


def _called(node: _Node) -> tuple[str, str, str]:
    """What a function that a node calls is known by."""
    return node.domain, node.op_type, node.overload


def _check_node(path: Path, node: _Node, *, custom: bool) -> None:
    """Refuses a node with a graph of its own, or with something from outside the file.

    Args:
        path: of the file.
        node: of the graph or of a function.
        custom: whether the file has no function of this name.
    """
    name = f"{visible(node.op_type)} ({visible(node.name)})"
    if node.domain in _OPTIMISED:
        raise UnreadableFileError(
            f"{path} was optimised by onnxruntime for one kind of machine: it has {name} of "
            f"{node.domain}.",
            "Give the file that it was made of, or have onnxruntime save it at the level "
            "ORT_ENABLE_EXTENDED.",
        )
    if custom and node.domain not in _DOMAINS:
        raise UnreadableFileError(
            f"{path} has a custom operator: {name} of {visible(node.domain)}.",
            "Export the model again, with operators of ONNX only.",
        )
    if node.op_type == "EPContext":
        raise UnreadableFileError(
            f"{path} has a graph that was compiled for one kind of machine: {name}.",
            "Give the file that it was compiled from.",
        )
    for attribute in node.attribute:
        if attribute.HasField("g") or attribute.graphs or attribute.type in _GRAPHS:
            raise UnreadableFileError(f"{path} has control flow, which this model has not: {name}.")
        if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
            raise UnreadableFileError(f"{path} has sparse tensors, which this model has not.")
        tensors = (attribute.t, *attribute.tensors)
        if any(each.data_location == onnx.TensorProto.EXTERNAL for each in tensors):
            raise UnreadableFileError(
                f"{path} has a constant in another file that is no initialiser: {name}."
            )


def _tensors(path: Path, graph: _Graph) -> Iterator[tuple[str, StoredTensor]]:
    """The constants of more than one value, by name.

    Raises:
        UnreadableFileError: one is not where it should be, or does not fit its shape.
    """
    if graph.sparse_initializer:
        raise UnreadableFileError(f"{path} has sparse tensors, which this model has not.")
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and node.output and attribute.name == "value":
                yield from _tensor(path, node.output[0], attribute.t)
    for tensor in graph.initializer:
        yield from _tensor(path, tensor.name, tensor)


def _tensor(path: Path, name: str, message: _Tensor) -> Iterator[tuple[str, StoredTensor]]:
    shape = tuple(message.dims)
    try:
        dtype = helper.tensor_dtype_to_np_dtype(message.data_type)
    except (KeyError, ValueError) as error:
        raise UnreadableFileError(f"{visible(name)} in {path} has an unknown type.") from error
    stored: StoredTensor
    external = message.data_location == onnx.TensorProto.EXTERNAL
    if external:
        stored = _external(path, name, message, dtype)
        if dtype.itemsize * math.prod(shape) <= _SMALL:
            _take_in(message, stored)
            external = False
    if not external:
        stored = InlineTensor(dtype.name, shape, message)
        try:
            found = stored.read().shape
        except (ValueError, TypeError, OverflowError) as error:
            raise UnreadableFileError(
                f"{visible(name)} in {path} does not fit its shape {list(shape)}: "
                f"{first_line(error)}."
            ) from error
        if found != shape:
            raise UnreadableFileError(f"{visible(name)} in {path} does not fit its shape.")
    if math.prod(shape) > 1:
        yield name, stored


def _used(graph: _Graph) -> set[str]:
    """Names of the values that the outputs are computed from."""
    maker = {value: node for node in graph.node for value in node.output}
    left = [output.name for output in graph.output]
    used: set[str] = set()
    while left:
        name = left.pop()
        if name not in used:
            used.add(name)
            left += maker[name].input if name in maker else ()
    return used


def _leave_out_unused(graph: _Graph) -> None:
    """Removes initialisers beside the file that no node reads: onnxruntime accepts none of them."""
    used = {name for node in graph.node for name in node.input}
    used |= {output.name for output in graph.output}
    kept = [
        tensor
        for tensor in graph.initializer
        if tensor.name in used or tensor.data_location != onnx.TensorProto.EXTERNAL
    ]
    if len(kept) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(kept)


def _take_in(message: _Tensor, stored: StoredTensor) -> None:
    """Puts the values of a tensor beside the file into the message that says where they are."""
    message.raw_data = stored.read().tobytes() if math.prod(stored.shape) else b""
    message.ClearField("external_data")
    message.ClearField("data_location")


def _external(path: Path, name: str, message: _Tensor, dtype: np.dtype[Any]) -> ExternalTensor:
    """Where a tensor is outside of the file: in its folder, and there completely."""
    entries = {entry.key: entry.value for entry in message.external_data}
    location, shown = entries.get("location", ""), visible(entries.get("location", ""))
    what = f"The data of {visible(name)} in {path}"
    place = PurePosixPath(location)
    unusual = place.is_absolute() or ".." in place.parts or "\\" in location or "\0" in location
    if not location or unusual:
        raise UnreadableFileError(f"{what} is outside its folder: {shown!r}.")
    file = path.parent / location
    if not is_within(file, path.parent):
        raise UnreadableFileError(f"{what} is outside its folder: {shown} is a link.")
    file = real_path(file)
    with readable(file):
        exists = file.is_file()
    if not exists:
        raise UnreadableFileError(
            f"{what} is missing: {shown}.", "Keep the files of an export together."
        )
    shape = tuple(message.dims)
    expected = dtype.itemsize * math.prod(shape)
    places = [entries.get("offset", "0"), entries.get("length", str(expected))]
    # 20 digits are enough for any 64-bit number
    if not all(re.fullmatch("[0-9]{1,20}", number) for number in places) or dtype.hasobject:
        raise UnreadableFileError(f"{what} has no valid place in {shown}.")
    offset, length = map(int, places)
    if any(size < 0 for size in shape) or length != expected:
        raise UnreadableFileError(f"{what} has {length} bytes in {shown}, expected {expected}.")
    if offset + expected > file.stat().st_size:
        raise UnreadableFileError(
            f"{what} is not complete: {shown} ends before it.", "Download or copy it again."
        )
    return ExternalTensor(dtype, shape, file, offset)


def _port(value: Any) -> Port:
    kind = value.type.tensor_type
    try:
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    except (KeyError, ValueError):
        dtype = "unknown"
    # axes with the same name have the same size
    axes = (
        Axis(size=axis.dim_value)
        if axis.HasField("dim_value") and axis.dim_value > 0
        else Axis(axis.dim_param, symbol=axis.dim_param)
        for axis in kind.shape.dim
    )
    return Port(value.name, dtype, tuple(axes))


def _graph_nodes(graph: _Graph) -> Iterator[GraphNode]:
    """The nodes of a graph.

    onnxruntime fuses a norm with the sum that it normalises; such a sum is given a name.
    """
    for node in graph.node:
        if not node.output:
            continue
        inputs = list(node.input)
        if node.op_type == "SkipLayerNormalization":
            node.output.extend([""] * (4 - len(node.output)))
            node.output[3] = node.output[3] or f"{node.output[0]}/sum"
            yield GraphNode("sum", inputs[:2], node.output[3])
            inputs = [node.output[3]]
        yield GraphNode(_KINDS.get(node.op_type, ""), inputs, node.output[0])
