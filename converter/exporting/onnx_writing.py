"""Writes a traced model as ONNX, in which nodes and tensors have the model's names."""

import ast
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from converter.errors import EomtConvertError, UsageError
from converter.exporting.tracing import output_names
from converter.runtimes.exported import EXTERNAL_DATA, FILES, INPUT, axis_names
from converter.version import TOOL, __version__
from reference_model import EomtDinov3ForUniversalSegmentation

try:
    import onnx
    import onnx_ir as ir
    import onnxscript.optimizer
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from onnx_ir.tensor_adapters import TorchTensor
except ModuleNotFoundError as missing:
    raise EomtConvertError(
        f"An export to ONNX needs {missing.name}, which is not installed.",
        "Install it: pip install 'eomt-convert[export]'",
    ) from missing

# versions of ONNX's operators; the exporter has none before 18, and Gelu is one operator since 20
OPSET = 20
OPSETS = range(18, 26)

# bytes of tensors up to which they are in model.onnx itself; a protobuf file ends at 2 GiB
_INLINE = 2**24

# numpy computes them to other last bits on other processors, and the file would depend on that
_NOT_FOLDED = ("Cos", "Pow", "Sin")

_CONTROL_FLOW = ("If", "Loop", "Scan")

# where torch's exporter says which module a node comes from
_SCOPES = "pkg.torch.onnx.name_scopes"


def check_opset(opset: int) -> None:
    """Checks that the exporter can write a version of ONNX's operators.

    Raises:
        UsageError: it cannot.
    """
    if opset not in OPSETS:
        raise UsageError(
            f"The opset is {opset}, expected {OPSETS.start} to {OPSETS.stop - 1}.",
            f"Give --opset {OPSET}, or leave it out.",
        )


def write_onnx(
    program: ExportedProgram,
    model: EomtDinov3ForUniversalSegmentation,
    folder: Path,
    *,
    opset: int = OPSET,
) -> tuple[Path, ...]:
    """Writes model.onnx and, for large models, model.onnx.data with the values of tensors.

    Initialisers have the names and values of the model's tensors; those of linear layers are
    transposed to (in, out), as MatMul takes them. Nodes have the names of their modules, such as
    ``layers.3.mlp.up_proj/MatMul``, and values those of their nodes. The same model, versions and
    options give the same bytes.

    Args:
        program: what `trace` made of the model.
        model: the model itself.
        folder: where to write.
        opset: version of ONNX's operators, one of `OPSETS`.

    Returns:
        The files.

    Raises:
        EomtConvertError: the exporter made a graph without the model's tensors, or an invalid one.
        OSError: a file cannot be written.
    """
    names = output_names(model.config, layers=True)[: len(program.graph_signature.user_outputs)]
    with _quiet():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=opset,
            input_names=[INPUT],
            output_names=names,
        )
    onnx_model = exported.model  # type: ignore[union-attr]  # it is None for the old exporter only
    weights = dict(model.named_parameters())
    _optimise(onnx_model, weights)
    _check_content(onnx_model, weights, opset)
    _name_axes(onnx_model.graph)
    _name_nodes(onnx_model.graph)
    _name_constants(onnx_model.graph, weights)
    _clear_metadata(onnx_model)
    large = sum(tensor.nbytes for tensor in weights.values()) > _INLINE
    return _save(onnx_model, folder, EXTERNAL_DATA if large else None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides what the exporter says to its own developers."""

    def is_of_use(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("torchvision is not installed")

    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    logger.addFilter(is_of_use)
    try:
        with warnings.catch_warnings():
            # torch's own use of its own class
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            yield
    finally:
        logger.removeFilter(is_of_use)


# the graph --------------------------------------------------------------------------------------


def _optimise(onnx_model: ir.Model, weights: Mapping[str, Tensor]) -> None:
    """Simplifies the graph, in which each of the model's tensors stays one initialiser.

    The optimiser would merge equal tensors, and replace tensors by others computed from them. So
    the tensors are inputs, whose values it does not know, while it runs.
    """
    graph = onnx_model.graph
    values = {name: graph.initializers.pop(name) for name in weights if name in graph.initializers}
    for value in values.values():
        value.const_value = None
    graph.inputs.extend(values.values())
    onnxscript.optimizer.optimize_ir(
        onnx_model, should_fold=lambda node: False if node.op_type in _NOT_FOLDED else None
    )
    del graph.inputs[1:]
    constants = list(graph.initializers.values())
    graph.initializers.clear()
    transposed = {node.inputs[0]: node for node in graph if node.op_type == "Transpose"}
    for name, value in values.items():
        tensor = weights[name].detach()
        uses = {node for node, _ in value.uses()}
        if uses == {transposed.get(value)} and tensor.ndim == 2:  # the weight of a linear layer
            (node,) = uses
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
            graph.remove(node, safe=True)
            value.shape = ir.Shape(tensor.T.shape)
            tensor = tensor.T
        value.const_value = _lazy(name, tensor)
        if uses:
            graph.register_initializer(value)
    for value in constants:
        if value.uses():
            graph.register_initializer(value)


def _lazy(name: str, tensor: Tensor) -> ir.LazyTensor:
    """A tensor that is copied only when it is written, if its memory is in another order."""
    adapted = TorchTensor(tensor)
    return ir.LazyTensor(
        lambda: TorchTensor(tensor.contiguous(), name=name),
        dtype=adapted.dtype,
        shape=ir.Shape(tensor.shape),
        name=name,
    )


def _check_content(onnx_model: ir.Model, weights: Mapping[str, Tensor], opset: int) -> None:
    """Checks that the exporter and the optimiser did what is expected of them.

    Raises:
        EomtConvertError: a tensor is missing, or there is more than plain operators of this opset.
    """
    graph = onnx_model.graph
    for name, tensor in weights.items():
        if name not in graph.initializers and tensor.numel():  # nothing takes an empty one
            raise _unexpected(f"lacks the model's {name}")
    if found := sorted({node.op_type for node in graph} & {*_CONTROL_FLOW}):
        raise _unexpected(f"has control flow: {found[0]}")
    if onnx_model.functions or any(node.domain for node in graph):
        raise _unexpected("has functions or custom operators")
    if onnx_model.opset_imports != {"": opset}:
        raise _unexpected(f"has the operators of {dict(onnx_model.opset_imports)}, not {opset}")


def _unexpected(fault: str) -> EomtConvertError:
    return EomtConvertError(
        f"The graph that torch {torch.__version__} and onnxscript {onnxscript.__version__} made "
        f"{fault}.",
        "Install the versions of constraints.txt.",
    )


# names ------------------------------------------------------------------------------------------


def _name_axes(graph: ir.Graph) -> None:
    """Gives axes of any size their names; elsewhere than in inputs and outputs, if they equal one.

    The exporter's names are expressions in its symbols, such as ``16*s53``. Two axes must not have
    one name if their sizes may differ.
    """
    names: dict[str, str] = {}
    for value in (*graph.inputs, *graph.outputs):
        for size, name in zip(value.shape or (), axis_names(value.name or ""), strict=True):
            names.setdefault(str(size), name)
    for value in (*graph.inputs, *_produced(graph)):
        if value.shape is not None:
            value.shape = ir.Shape(
                size if isinstance(size, int) else names.get(str(size)) for size in value.shape
            )


def _produced(graph: ir.Graph) -> Iterator[ir.Value]:
    return (value for node in graph for value in node.outputs)


def _name_nodes(graph: ir.Graph) -> None:
    """Names nodes after their modules and operators, and values after their nodes."""
    scopes: dict[ir.Node, str] = {}
    unique = _Unique()
    for node in graph:
        scope = _scope(node)
        if scope is None:  # made by the optimiser: in the module of what it works on
            before = next((i.producer() for i in node.inputs if i and i.producer()), None)
            scope = scopes[before] if before else ""
        scopes[node] = scope
        node.name = unique(f"{scope}/{node.op_type}" if scope else node.op_type)
        for index, value in enumerate(node.outputs):
            if value not in graph.outputs:
                value.name = node.name if len(node.outputs) == 1 else f"{node.name}.{index}"


def _scope(node: ir.Node) -> str | None:
    """The name of a node's module, empty for the model itself; None if unknown."""
    if _SCOPES not in node.metadata_props:
        return None
    # the modules from the model to the innermost, then the name of the node
    *modules, _ = ast.literal_eval(node.metadata_props[_SCOPES])
    known = [name for name in modules if not name.startswith("_")]
    return known[-1] if known else ""


class _Unique:
    """Appends a number to a name that was given before."""

    def __init__(self) -> None:
        self._count: dict[str, int] = {}

    def __call__(self, name: str) -> str:
        count = self._count[name] = self._count.get(name, -1) + 1
        return f"{name}_{count}" if count else name


def _name_constants(graph: ir.Graph, weights: Iterable[str]) -> None:
    """Names initialisers that are no tensors of the model: few values say what they are."""
    constants = [value for name, value in graph.initializers.items() if name not in weights]
    for value in constants:
        array = value.const_value.numpy()  # type: ignore[union-attr]  # an initialiser has values
        if array.size <= 4:
            text = str(array.tolist()).replace(" ", "")
            value.name = f"constants/{array.dtype}/{text}"
        else:
            node, index = next(iter(value.uses()))
            value.name = f"{node.name}.input{index}"


def _clear_metadata(onnx_model: ir.Model) -> None:
    """Removes what the exporter noted: stack traces, paths and classes."""
    graph = onnx_model.graph
    ClearMetadataAndDocStringPass()(onnx_model)
    for value in (*graph.inputs, *graph.initializers.values(), *_produced(graph)):
        value.metadata_props.clear()
        value.doc_string = None
    onnx_model.metadata_props.clear()
    onnx_model.doc_string = None
    onnx_model.domain = None
    onnx_model.model_version = None
    onnx_model.producer_name, onnx_model.producer_version = TOOL, __version__
    graph.name = "EomtDinov3ForUniversalSegmentation"


# the files --------------------------------------------------------------------------------------


def _save(onnx_model: ir.Model, folder: Path, data_file: str | None) -> tuple[Path, ...]:
    path = folder / FILES["onnx"]
    ir.save(onnx_model, path, external_data=data_file)
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise _unexpected(f"is not valid: {error}") from error
    return (path, folder / data_file) if data_file else (path,)
