"""Models written as ONNX: what the file computes, and what it is called in there."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from recorded_models import pixel_values, recorded_model, recordings
from small_models import small_model
from torch import Tensor
from torch.export import ExportedProgram

from converter.checks.comparison import FLOAT32, ROUNDED, compare
from converter.checks.diagnosis.stages import named_outputs
from converter.errors import EomtConvertError, UsageError
from converter.exporting import onnx_writing
from converter.exporting.onnx_writing import OPSET, OPSETS, check_opset, write_onnx
from converter.exporting.tracing import trace
from converter.runtimes.exported import OUTPUTS
from converter.runtimes.onnx_file import read_onnx
from converter.version import __version__
from reference_model import EomtDinov3ForUniversalSegmentation

Model = EomtDinov3ForUniversalSegmentation

NAME = "tiny_semantic_48"
FILE = "model.onnx"


def unmasked(**changes: Any) -> Model:
    model = small_model(**({"num_hidden_layers": 2, "num_blocks": 1} | changes))
    model.attn_mask_probs.zero_()
    return model.eval()


class Export(NamedTuple):
    model: Model
    program: ExportedProgram
    path: Path

    @property
    def file(self) -> onnx.ModelProto:
        return onnx.load(self.path)

    def run(self, pixels: Tensor) -> dict[str, Tensor]:
        """Outputs by the names of recorded tensors."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(self.path, options)
        outputs = session.run(None, {"pixel_values": pixels.numpy()})
        names = [output.name for output in session.get_outputs()]
        assert all(output.dtype == np.float32 for output in outputs)
        return {
            OUTPUTS.get(name, name): torch.from_numpy(output)
            for name, output in zip(names, outputs, strict=True)
        }


def export(model: Model, folder: Path, *, layers: bool = False, **options: Any) -> Export:
    program = trace(model, image_size=options.pop("image_size", None), layers=layers)
    path, *_ = write_onnx(program, model, folder, **options)
    return Export(model, program, path)


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """With every layer's output; the biases of the model are equal, and so are two layers."""
    model = unmasked(use_gated_mlp=True, hidden_act="silu")
    model.layers[1].load_state_dict(model.layers[0].state_dict())
    return export(model, tmp_path_factory.mktemp("gated"), layers=True)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """With the oldest operators, and all tensors in a file of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_writing, "_INLINE", 0)
        folder = tmp_path_factory.mktemp("recorded")
        return export(recorded_model(NAME), folder, layers=True, opset=OPSETS[0])


def values(rows: int, columns: int, batch: int = 1, patch: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(batch, 3, rows * patch, columns * patch, generator=generator)


def computed(model: Model, pixels: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return named_outputs(model(pixels, output_hidden_states=True))


def failures(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    compared = [compare(name, ours[name], theirs[name], FLOAT32) for name in ours]
    return [comparison.failure for comparison in compared if comparison.failure]


# what it computes -------------------------------------------------------------------------------


def test_an_export_with_the_oldest_operators_computes_what_the_original_did(
    recorded: Export,
) -> None:
    """At a size and a shape that were not traced."""
    outputs = recorded.run(pixel_values(NAME))

    assert opsets(recorded.file) == {"": OPSETS[0]}
    assert {"patch_embeddings", "hidden_states.2", "last_hidden_state"} < outputs.keys()
    assert failures(outputs, recordings(NAME)) == []


@pytest.mark.parametrize(("rows", "columns", "batch"), [(1, 1, 1), (1, 4, 3), (6, 2, 2), (5, 5, 1)])
def test_an_export_takes_any_batch_and_any_number_of_patches(
    gated: Export, rows: int, columns: int, batch: int
) -> None:
    pixels = values(rows, columns, batch)

    assert failures(gated.run(pixels), computed(gated.model, pixels)) == []


def test_an_export_in_float16_with_the_newest_operators_returns_float32(tmp_path: Path) -> None:
    model = unmasked(patch_size=4).half()
    exported = export(model, tmp_path, opset=OPSETS[-1], image_size=(16, 16))
    pixels = values(4, 4, patch=4)
    ours, theirs = exported.run(pixels), computed(unmasked(patch_size=4), pixels)

    for name, output in ours.items():
        assert compare(name, output, theirs[name], ROUNDED["float16"]).failure == ""
    assert_values_of(exported.file, exported.model)
    assert opsets(exported.file) == {"": OPSETS[-1]}


# what things are called -------------------------------------------------------------------------


def axes(value: onnx.ValueInfoProto) -> list[str | int]:
    return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]


def opsets(file: onnx.ModelProto) -> dict[str, int]:
    return {entry.domain: entry.version for entry in file.opset_import}


def test_inputs_outputs_and_their_axes_have_readable_names(gated: Export) -> None:
    graph = gated.file.graph

    assert {value.name: axes(value) for value in (*graph.input, *graph.output)} == {
        "pixel_values": ["batch", 3, "height", "width"],
        "masks_queries_logits": ["batch", 6, "mask_height", "mask_width"],
        "class_queries_logits": ["batch", 6, 3],
        "patch_embeddings": ["batch", "tokens", 32],
        "hidden_states.0": ["batch", "tokens", 32],
        "hidden_states.1": ["batch", "queries_and_tokens", 32],
        "last_hidden_state": ["batch", "queries_and_tokens", 32],
    }
    ports = read_onnx(gated.path).outputs
    assert ports["hidden_states.0"].dynamic_axes == {"0": "batch", "1": "tokens"}
    assert ports["hidden_states.1"].dynamic_axes == {"0": "batch", "1": "queries_and_tokens"}
    named = {size for value in graph.value_info for size in axes(value) if isinstance(size, str)}
    assert named == {
        "batch", "tokens", "queries_and_tokens", "mask_height", "mask_width"
    }  # fmt: skip


def assert_values_of(file: onnx.ModelProto, model: Model) -> None:
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in file.graph.initializer}
    tensors = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in ("attn_mask_probs", "criterion.empty_weight")
    }

    assert len(stored) == len(file.graph.initializer)
    assert {
        name for name in stored if not name.startswith(("constants/", "rope_embeddings/"))
    } == tensors.keys()
    for name, tensor in tensors.items():
        is_linear = tensor.ndim == 2 and name != "query.weight"
        expected = (tensor.T if is_linear else tensor).numpy()
        assert stored[name].dtype == expected.dtype
        assert np.array_equal(stored[name], expected)


def test_every_tensor_of_the_model_is_there_once_with_its_name_and_values(gated: Export) -> None:
    assert_values_of(gated.file, gated.model)


def test_every_module_uses_its_own_tensors(gated: Export) -> None:
    """Of two with equal values too."""
    tensors = {name for name, _ in gated.model.named_parameters()}
    used = {
        (node.name.rpartition("/")[0], name)
        for node in gated.file.graph.node
        for name in node.input
        if name in tensors and not name.startswith(("embeddings.", "query."))
    }

    assert {name.rpartition(".")[0] for _, name in used} == {module for module, _ in used}
    assert all(name.rpartition(".")[0] == module for module, name in used)


def test_nodes_are_named_after_their_modules(gated: Export) -> None:
    nodes = list(gated.file.graph.node)
    names = [node.name for node in nodes]
    modules = {name for name, _ in gated.model.named_modules()}

    assert {
        "layers.1.attention.q_proj/MatMul",
        "layers.1.mlp.up_proj/Add",
        "layers.1.norm1/LayerNormalization",
        "layers.1/Add",
        "mask_head/Gelu",
        "mask_head/Gelu_1",
        "upscale_block.block.0.conv1/ConvTranspose",
        "Concat",
    } <= set(names)
    assert len(set(names)) == len(names)
    assert {name.rpartition("/")[0] for name in names} <= modules
    outputs = {value.name for value in gated.file.graph.output}
    for node in nodes:
        assert all(name in outputs or name.startswith(node.name) for name in node.output)


def test_there_are_plain_operators_only(gated: Export) -> None:
    file = gated.file

    assert not file.functions
    assert {node.domain for node in file.graph.node} == {""}
    assert not {node.op_type for node in file.graph.node} & {"If", "Loop", "Scan", "Identity"}
    assert opsets(file) == {"": OPSET}


def test_nothing_tells_about_the_machine(gated: Export) -> None:
    file = gated.file
    content = gated.path.read_bytes()

    assert (file.producer_name, file.producer_version) == ("eomt-convert", __version__)
    marked: list[Any] = [file, file.graph, *file.graph.node, *file.graph.value_info]
    marked += [*file.graph.input, *file.graph.output, *file.graph.initializer]
    assert not any(entry.metadata_props or entry.doc_string for entry in marked)
    for text in (str(Path.cwd()), str(Path.home()), sys.prefix, ".py", "torch", "reference_model"):
        assert text.encode() not in content


# the files --------------------------------------------------------------------------------------


def test_another_process_writes_the_same_bytes_and_says_nothing(
    gated: Export, tmp_path: Path
) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from test_exporting_onnx import export, unmasked\n"
        "model = unmasked(use_gated_mlp=True, hidden_act='silu')\n"
        "model.layers[1].load_state_dict(model.layers[0].state_dict())\n"
        "export(model, Path.cwd(), layers=True)\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    as_users_have_it = {**os.environ, "TORCH_FAKE_TENSOR_DISPATCH_CACHE": "1"}
    found = subprocess.run(
        command, cwd=tmp_path, env=as_users_have_it, check=True, capture_output=True, text=True
    )

    assert (tmp_path / "model.onnx").read_bytes() == gated.path.read_bytes()
    assert (found.stdout, found.stderr) == ("", "")


def test_large_tensors_are_in_a_file_beside_it(recorded: Export) -> None:
    file = onnx.load(recorded.path, load_external_data=False)
    external = [tensor for tensor in file.graph.initializer if tensor.external_data]
    places = {entry.value for tensor in external for entry in tensor.external_data[:1]}

    assert {path.name for path in recorded.path.parent.iterdir()} == {FILE, f"{FILE}.data"}
    assert places == {f"{FILE}.data"}
    assert "layers.0.attention.q_proj.weight" in {tensor.name for tensor in external}
    assert_values_of(recorded.file, recorded.model)


# what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [OPSETS[0] - 1, OPSETS[-1] + 1])
def test_an_opset_that_the_exporter_lacks_is_refused(opset: int) -> None:
    with pytest.raises(UsageError, match=rf"The opset is {opset}, expected 18 to 25\."):
        check_opset(opset)


def test_a_model_with_masked_attention_is_refused() -> None:
    with pytest.raises(EomtConvertError, match=r"attn_mask_probs is \[1\.0, 1\.0\]"):
        trace(small_model(), image_size=None, layers=False)


def test_a_size_that_is_no_multiple_of_the_patch_size_is_refused() -> None:
    with pytest.raises(UsageError, match="expected multiples of the patch size 16"):
        trace(unmasked(), image_size=(32, 40), layers=False)


@pytest.fixture
def made_before(gated: Export, monkeypatch: pytest.MonkeyPatch) -> Export:
    """With an exporter that has that file's graph at once."""

    def load(*_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(model=onnx_ir.load(gated.path))

    monkeypatch.setattr(torch.onnx, "export", load)
    return gated


def test_a_graph_without_a_tensor_of_the_model_is_refused(
    made_before: Export, tmp_path: Path
) -> None:
    model = unmasked(use_gated_mlp=True)
    norm = model.get_submodule("layers.1.norm1")
    norm.register_parameter("scale", torch.nn.Parameter(torch.ones(32)))

    with pytest.raises(EomtConvertError, match=r"lacks the model's layers\.1\.norm1\.scale"):
        write_onnx(made_before.program, model, tmp_path)


def test_a_graph_that_the_checker_refuses_is_an_error(
    made_before: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *, full_check: bool) -> None:
        assert path == tmp_path / FILE
        assert full_check
        raise onnx.shape_inference.InferenceError("broken")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(EomtConvertError, match="made is not valid: broken"):
        write_onnx(made_before.program, made_before.model, tmp_path)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript.optimizer", None)
    monkeypatch.delitem(sys.modules, "converter.exporting.onnx_writing")

    with pytest.raises(EomtConvertError, match=r"needs onnxscript.*\n.*eomt-convert\[export\]"):
        import converter.exporting.onnx_writing  # noqa: F401
