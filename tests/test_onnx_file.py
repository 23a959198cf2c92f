"""ONNX files of strangers: what is refused, what is recognised, and how they run."""

import os
import shutil
import subprocess
import sys
import tracemalloc
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import Result
from exported_files import change, initialiser
from onnx import TensorProto, helper, numpy_helper
from small_models import small_model
from torch.export import Dim

import converter
from converter.errors import (
    EomtConvertError,
    MissingKernelError,
    RunError,
    UnreadableFileError,
    UsageError,
)
from converter.runtimes import onnx_file
from converter.runtimes.network import open_exported
from converter.runtimes.onnx_file import read_onnx
from converter.runtimes.providers import parse_providers
from reference_model import EomtDinov3ForUniversalSegmentation

Named = tuple[str, list[int | str | None]]

INPUT: Named = ("pixel_values", [None, 3, None, None])
MASKS: Named = ("masks_queries_logits", [None, 2, None, None])
CLASSES: Named = ("class_queries_logits", [None, 2, 5])


def small_file(
    path: Path,
    *,
    inputs: Sequence[Named] = (INPUT,),
    outputs: Sequence[Named] = (MASKS, CLASSES),
    nodes: Sequence[onnx.NodeProto] = (),
    weights: Sequence[onnx.TensorProto] = (),
    functions: Sequence[onnx.FunctionProto] = (),
    dtype: int = TensorProto.FLOAT,
    reads: str | None = None,
) -> Path:
    """A file with a network's inputs and outputs, each computed by a node that reads a value."""
    computing = [
        helper.make_node("ReduceSum", [reads or inputs[0][0]], [name], f"node_{index}", keepdims=1)
        for index, (name, _) in enumerate(outputs)
    ]
    graph = helper.make_graph(
        [*nodes, *computing],
        "graph",
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in inputs],
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in outputs],
        list(weights),
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("mine", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=list(functions))
    path.write_bytes(model.SerializeToString())
    return path


def external(values: np.ndarray[Any, Any], **entries: str | int) -> onnx.TensorProto:
    """An initialiser whose data is said to be in another file."""
    tensor = numpy_helper.from_array(values, "weight")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


# what is no ONNX file of this model ---------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"", b"not a model", b"PK\x03\x04" + bytes(100), bytes(1000), os.urandom(4000), b"\x08" * 300],
    ids=["empty", "text", "zip", "zeros", "random", "numbers"],
)
def test_what_is_no_onnx_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(UnreadableFileError, match=r"model\.onnx is no ONNX file"):
        read_onnx(path)


def test_a_file_that_was_cut_off_is_refused(exported: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    content = (exported("tiny_panoptic_64") / "model.onnx").read_bytes()
    for length in (10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(UnreadableFileError):
            read_onnx(path)


def test_a_file_that_would_take_far_more_memory_than_its_size_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "_MAX_FIELDS", 50_000)  # a million take long to trace
    path = tmp_path / "model.onnx"
    graph = b"\x0a\x00" * 100_000  # empty nodes
    # the length of a graph of 200,000 bytes in protobuf's encoding
    path.write_bytes(b"\x3a\xc0\x9a\x0c" + graph)
    tracemalloc.start()
    with pytest.raises(UnreadableFileError, match="more than 50,000 fields"):
        read_onnx(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 4 * len(graph)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    for path in (tmp_path / "missing.onnx", tmp_path / "pipe.onnx", tmp_path):
        with pytest.raises(UnreadableFileError):
            read_onnx(path)


def test_control_flow_is_refused(tmp_path: Path) -> None:
    branch = helper.make_graph([], "branch", [], [])
    node = helper.make_node("If", ["c"], ["d"], "choice", then_branch=branch, else_branch=branch)
    with pytest.raises(UnreadableFileError, match=r"control flow.*If \(choice\)"):
        read_onnx(small_file(tmp_path / "model.onnx", nodes=[node]))


def test_control_flow_in_a_function_is_refused(tmp_path: Path) -> None:
    branch = helper.make_graph([], "branch", [], [])
    node = helper.make_node("If", ["x"], ["y"], "choice", then_branch=branch, else_branch=branch)
    opsets = [helper.make_opsetid("", 20)]
    function = helper.make_function("mine", "f", ["x"], ["y"], [node], opsets)
    call = helper.make_node("f", ["pixel_values"], ["z"], "call", domain="mine")
    with pytest.raises(UnreadableFileError, match="control flow"):
        read_onnx(small_file(tmp_path / "model.onnx", nodes=[call], functions=[function]))


def test_custom_operators_are_refused(tmp_path: Path) -> None:
    node = helper.make_node("Attention", ["pixel_values"], ["x"], "custom", domain="com.stranger")
    with pytest.raises(UnreadableFileError, match=r"Attention \(custom\) of com\.stranger"):
        read_onnx(small_file(tmp_path / "model.onnx", nodes=[node]))


def test_a_graph_optimised_for_one_kind_of_machine_is_told_from_a_custom_operator(
    tmp_path: Path,
) -> None:
    inputs, domain = ["pixel_values", "weight"], "com.microsoft.nchwc"
    node = helper.make_node("Conv", inputs, ["x"], "patches", domain=domain)
    with pytest.raises(UnreadableFileError, match="was optimised by onnxruntime") as caught:
        read_onnx(small_file(tmp_path / "model.onnx", nodes=[node]))
    assert "ORT_ENABLE_EXTENDED" in caught.value.remedy


def doubling(depth: int) -> list[onnx.FunctionProto]:
    """Functions that each call the one before twice."""
    functions = []
    for level in range(depth):
        called, domain = ("Identity", "") if level == 0 else (f"f{level - 1}", "mine")
        nodes = [
            helper.make_node(called, ["x"], ["y"], domain=domain),
            helper.make_node(called, ["y"], ["z"], domain=domain),
        ]
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("mine", 1)]
        functions.append(helper.make_function("mine", f"f{level}", ["x"], ["z"], nodes, opsets))
    return functions


def test_functions_that_grow_without_limit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    call = helper.make_node("f3", ["pixel_values"], ["x"], domain="mine")
    read_onnx(small_file(path, nodes=[call], functions=doubling(4)))
    call = helper.make_node("f63", ["pixel_values"], ["x"], domain="mine")
    with pytest.raises(UnreadableFileError, match="more than 1,000,000 nodes"):
        read_onnx(small_file(path, nodes=[call], functions=doubling(64)))


def nested(depth: int) -> list[onnx.FunctionProto]:
    """Functions that each call the one before."""
    functions = doubling(depth)
    for function in functions:
        function.node[1].op_type, function.node[1].domain = "Identity", ""
    return functions


def test_functions_that_nest_without_limit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    call = helper.make_node("f99", ["pixel_values"], ["x"], domain="mine")
    read_onnx(small_file(path, nodes=[call], functions=nested(100)))
    call = helper.make_node("f2999", ["pixel_values"], ["x"], domain="mine")
    with pytest.raises(UnreadableFileError, match="functions in more than 100 levels"):
        read_onnx(small_file(path, nodes=[call], functions=nested(3000)))


def test_one_function_does_not_hide_another(tmp_path: Path) -> None:
    path, opsets = tmp_path / "model.onnx", [helper.make_opsetid("", 20)]
    branch = helper.make_graph([], "branch", [], [])
    choice = helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
    harmless = helper.make_node("Identity", ["x"], ["y"])

    def function(node: onnx.NodeProto, overload: str) -> onnx.FunctionProto:
        return helper.make_function("mine", "f", ["x"], ["y"], [node], opsets, overload=overload)

    call = helper.make_node("f", ["pixel_values"], ["z"], domain="mine", overload="a")
    functions = [function(choice, "a"), function(harmless, "b")]
    with pytest.raises(UnreadableFileError, match="control flow"):
        read_onnx(small_file(path, nodes=[call], functions=functions))
    functions = [function(harmless, "a"), function(harmless, "a")]
    with pytest.raises(UnreadableFileError, match="two functions 'f'"):
        read_onnx(small_file(path, nodes=[call], functions=functions))


def test_a_graph_that_claims_to_be_a_number_is_refused(tmp_path: Path) -> None:
    branch = helper.make_graph([], "branch", [], [])
    node = helper.make_node("If", ["c"], ["d"], "choice", then_branch=branch, else_branch=branch)
    for attribute in node.attribute:
        attribute.type = onnx.AttributeProto.INT
    with pytest.raises(UnreadableFileError, match="control flow"):
        read_onnx(small_file(tmp_path / "model.onnx", nodes=[node]))


def test_a_graph_compiled_for_a_machine_is_refused(tmp_path: Path) -> None:
    node = helper.make_node(
        "EPContext", ["pixel_values"], ["x"], "engine", "", "com.microsoft", ep_cache_context="/x"
    )
    with pytest.raises(UnreadableFileError, match=r"compiled .* EPContext \(engine\)"):
        read_onnx(small_file(tmp_path / "model.onnx", nodes=[node]))


def test_graphs_for_training_are_refused(tmp_path: Path) -> None:
    path = small_file(tmp_path / "model.onnx")
    model = onnx.load(path)
    model.training_info.add().algorithm.CopyFrom(model.graph)
    onnx.save(model, path)
    with pytest.raises(UnreadableFileError, match="for training"):
        read_onnx(path)


def test_data_beside_the_file_is_for_initialisers_only(tmp_path: Path) -> None:
    path, opsets = tmp_path / "model.onnx", [helper.make_opsetid("", 20)]
    (tmp_path / "there.data").write_bytes(bytes(16))
    data = external(np.ones(4, np.float32), location="there.data")
    constant = helper.make_node("Constant", [], ["y"], "stored", value=data)
    with pytest.raises(UnreadableFileError, match=r"no initialiser: Constant \(stored\)"):
        read_onnx(small_file(path, nodes=[constant]))
    function = helper.make_function("mine", "f", [], ["y"], [constant], opsets)
    call = helper.make_node("f", [], ["z"], "call", domain="mine")
    with pytest.raises(UnreadableFileError, match=r"no initialiser: Constant \(stored\)"):
        read_onnx(small_file(path, nodes=[call], functions=[function]))


def test_a_function_that_calls_itself_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("f", ["x"], ["y"], domain="mine")
    function = helper.make_function(
        "mine", "f", ["x"], ["y"], [node], [helper.make_opsetid("mine", 1)]
    )
    call = helper.make_node("f", ["pixel_values"], ["z"], domain="mine")
    with pytest.raises(UnreadableFileError, match="calls itself"):
        read_onnx(small_file(tmp_path / "model.onnx", nodes=[call], functions=[function]))


# data outside of the file -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "/etc/passwd"}, "outside its folder: '/etc/passwd'"),
        ({"location": "../secret.data"}, r"outside its folder: '\.\./secret\.data'"),
        ({"location": "inner/../../secret.data"}, "outside its folder"),
        ({"location": "link.data"}, "link"),
        ({"location": "folder/secret.data"}, "link"),
        ({}, "outside its folder: ''"),
        ({"location": "missing.data"}, r"missing: missing\.data"),
        ({"location": "there.data", "offset": 8}, "not complete"),
        ({"location": "there.data", "offset": -8}, "no valid place"),
        ({"location": "there.data", "length": -1}, "no valid place"),
        ({"location": "there.data", "offset": "9" * 5000}, "no valid place"),
        ({"location": "there.data\0"}, "outside its folder: 'there"),
        ({"location": "a" * 5000}, "File name too long"),
        ({"location": "pipe"}, "missing: pipe"),
        ({"location": "there.data", "length": 8}, "has 8 bytes in there.data, expected 16"),
        ({"location": "there.data", "offset": "x"}, "no valid place"),
    ],
)
def test_data_that_is_not_in_the_folder_is_refused(
    tmp_path: Path, entries: dict[str, str | int], message: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.data").write_bytes(bytes(100))
    (folder / "link.data").symlink_to(tmp_path / "secret.data")
    (folder / "folder").symlink_to(tmp_path)
    (folder / "there.data").write_bytes(bytes(16))
    os.mkfifo(folder / "pipe")
    weight = external(np.ones(4, np.float32), **entries)
    with pytest.raises(UnreadableFileError, match=message):
        read_onnx(small_file(folder / "model.onnx", weights=[weight]))


def test_text_outside_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "there.data").write_bytes(bytes(16))
    weight = external(np.ones(2, np.int64), location="there.data")
    weight.data_type = TensorProto.STRING
    with pytest.raises(UnreadableFileError, match="no valid place"):
        read_onnx(small_file(tmp_path / "model.onnx", weights=[weight]))


def test_data_that_no_node_reads_is_left_out(tmp_path: Path) -> None:
    values = np.arange(1000, dtype=np.float32)
    (tmp_path / "there.data").write_bytes(values.tobytes())
    weight = external(values, location="there.data")
    file = read_onnx(small_file(tmp_path / "model.onnx", weights=[weight]))
    file.open()

    assert (file.tensors, file.external) == ({}, {})


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    values = np.arange(1000, dtype=np.float32)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "revision"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    weight = external(values, location="model.onnx.data")
    small_file(blobs / "1", weights=[weight], reads="weight")
    (blobs / "2").write_bytes(values.tobytes())
    (snapshot / "model.onnx").symlink_to("../../blobs/1")
    (snapshot / "model.onnx.data").symlink_to("../../blobs/2")
    file = read_onnx(snapshot / "model.onnx")

    assert np.array_equal(file.tensors["weight"].read(), values)


def test_data_in_the_folder_is_read(tmp_path: Path) -> None:
    values = np.arange(8, dtype=np.float32)
    (tmp_path / "there.data").write_bytes(bytes(4) + values.tobytes())
    weight = external(values, location="there.data", offset=4, length=32)
    file = read_onnx(small_file(tmp_path / "model.onnx", weights=[weight], reads="weight"))

    assert np.array_equal(file.tensors["weight"].read(), values)


def test_a_file_with_all_its_tensors_beside_it_is_checked_and_run(
    exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = exported("tiny_panoptic_64") / "model.onnx"
    path = tmp_path / "folder" / "model.onnx"
    path.parent.mkdir()
    onnx.save_model(
        onnx.load(inside), path, save_as_external_data=True, location="data", size_threshold=0
    )
    monkeypatch.chdir(tmp_path)  # where onnx and onnxruntime would look for the data
    pixels = np.ones((1, 3, 64, 96), np.float32)
    file, expected = read_onnx(path), read_onnx(inside).open().run(pixels)
    found = file.open().run(pixels)

    assert file.problems() == []
    assert all(np.array_equal(found[name], values) for name, values in expected.items())


def test_a_tensor_that_does_not_fit_its_shape_is_refused(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones(4, np.float32), "weight")
    weight.dims[:] = [2**40]
    with pytest.raises(UnreadableFileError, match=r"weight in .* does not fit its shape"):
        read_onnx(small_file(tmp_path / "model.onnx", weights=[weight]))


# inputs and outputs -------------------------------------------------------------------------------


def test_inputs_and_outputs_are_recognised_by_name_or_rank(tmp_path: Path) -> None:
    named = read_onnx(small_file(tmp_path / "named.onnx"))
    by_rank = read_onnx(
        small_file(
            tmp_path / "by_rank.onnx",
            inputs=[("images", [1, 3, 64, 64])],
            outputs=[("logits", [1, 2, 5]), ("masks", [1, 2, 16, 16])],
        )
    )

    assert named.input.shape == (None, 3, None, None)
    assert named.outputs["class_logits"].shape == (None, 2, 5)
    assert (by_rank.input.name, by_rank.outputs["mask_logits"].name) == ("images", "masks")


def test_other_inputs_and_outputs_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(UnreadableFileError, match=r"one input .*found text \(any x 77\)"):
        read_onnx(small_file(path, inputs=[("text", [None, 77])]))
    with pytest.raises(UnreadableFileError, match=r"found boxes \(any x 100 x 4\)"):
        read_onnx(small_file(path, outputs=[("boxes", [None, 100, 4])]))
    two: list[Named] = [("a", [1, 2, 16, 16]), ("b", [1, 2, 16, 16]), ("c", [1, 2, 5])]
    with pytest.raises(UnreadableFileError, match="output-names MASKS,CLASSES"):
        read_onnx(small_file(path, outputs=two))
    assert read_onnx(path, output_names=("b", "c")).outputs["mask_logits"].name == "b"
    with pytest.raises(UsageError, match=r"has no output 'd'; it has a \(1 x 2 x 16 x 16\)"):
        read_onnx(path, output_names=("d", "c"))
    with pytest.raises(UsageError, match=r"'c' of .* has rank 3, expected 4"):
        read_onnx(path, output_names=("c", "b"))
    with pytest.raises(UsageError, match="has no input 'd'"):
        read_onnx(path, input_name="d")


def test_onnx_checks_the_file(exported: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    shutil.copy(exported("tiny_panoptic_64") / "model.onnx", path)
    assert read_onnx(path).problems() == []

    def break_type(graph: onnx.GraphProto) -> None:
        next(node for node in graph.node if node.op_type == "Softmax").op_type = "Softmacks"

    change(path, break_type)
    (problem,) = read_onnx(path).problems()
    assert "Softmacks" in problem


def test_onnxs_message_is_shown_to_its_end(exported: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    shutil.copy(exported("tiny_panoptic_64") / "model.onnx", path)
    change(path, lambda graph: graph.node[5].input.__setitem__(0, "nowhere"))
    (problem,) = read_onnx(path).problems()

    assert "input 'nowhere' of node: name: " in problem
    assert problem.endswith("is not output of any previous nodes.")


# running ------------------------------------------------------------------------------------------


@pytest.mark.numbers
def test_the_layers_outputs_are_added_in_memory(
    exported: Callable[..., Path], converted: Callable[[str], Path]
) -> None:
    model = EomtDinov3ForUniversalSegmentation.from_pretrained(converted("tiny_panoptic_64"))
    path = exported("tiny_panoptic_64") / "model.onnx"
    before = path.read_bytes()
    pixels = torch.randn(2, 3, 48, 80, generator=torch.Generator().manual_seed(0))
    found = read_onnx(path).open(layers=len(model.layers)).run(pixels.numpy())
    with torch.inference_mode():
        expected = model(pixels, output_hidden_states=True)

    states = dict(
        zip(["patch_embeddings", *list(found)[1:-3]], expected.hidden_states, strict=True)
    )
    assert list(states)[-1] == f"hidden_states.{len(model.layers) - 1}"
    states["last_hidden_state"] = expected.last_hidden_state
    for name, state in states.items():
        torch.testing.assert_close(torch.from_numpy(found[name]), state, atol=1e-4, rtol=1e-4)
    assert path.read_bytes() == before


class Logits(torch.nn.Module):
    def __init__(self, model: EomtDinov3ForUniversalSegmentation) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.model(pixel_values)
        return output.masks_queries_logits, output.class_queries_logits


@pytest.fixture(scope="module")
def new_model() -> EomtDinov3ForUniversalSegmentation:
    """With masked attention, and layer norms that all have the same weights."""
    return small_model(num_hidden_layers=2, num_blocks=1)


@pytest.fixture(scope="module")
def by_torch(
    new_model: EomtDinov3ForUniversalSegmentation, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """That model as torch's own exporter writes it: with one tensor for all norms' weights."""
    path = tmp_path_factory.mktemp("by_torch") / "model.onnx"
    axes = {0: Dim("batch")}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            Logits(new_model), (torch.zeros(2, 3, 32, 64),), dynamic_shapes={"pixel_values": axes}
        )
        exported = torch.onnx.export(program, dynamo=True, opset_version=18, verbose=False)
    exported.save(path)  # type: ignore[union-attr]  # it is None for the old exporter only
    return path


def test_layers_are_found_where_norms_share_weights_and_attention_is_masked(
    by_torch: Path, new_model: EomtDinov3ForUniversalSegmentation
) -> None:
    norms = [n for n in onnx.load(by_torch).graph.node if n.op_type == "LayerNormalization"]

    assert len({node.input[1] for node in norms}) == 1
    assert_layers_are_those_of(new_model, by_torch)


def test_layers_are_found_where_onnxruntime_has_fused_a_norm(
    by_torch: Path, new_model: EomtDinov3ForUniversalSegmentation, tmp_path: Path
) -> None:
    path = tmp_path / "optimised.onnx"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(by_torch, options)

    assert "SkipLayerNormalization" in {node.op_type for node in onnx.load(path).graph.node}
    assert_layers_are_those_of(new_model, path)


def assert_layers_are_those_of(model: EomtDinov3ForUniversalSegmentation, path: Path) -> None:
    pixels = torch.randn(1, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    found = read_onnx(path).open(layers=2).run(pixels.numpy())
    with torch.inference_mode():
        expected = model(pixels, output_hidden_states=True)
    states = (*expected.hidden_states, expected.last_hidden_state)
    names = ("patch_embeddings", "hidden_states.0", "hidden_states.1", "last_hidden_state")
    for name, state in zip(names, states, strict=True):
        torch.testing.assert_close(torch.from_numpy(found[name]), state, atol=1e-4, rtol=1e-4)


def test_layers_of_another_number_are_not_guessed(exported: Callable[..., Path]) -> None:
    file = read_onnx(exported("tiny_panoptic_64") / "model.onnx")
    for layers in (3, 5):
        found = file.open(layers=layers).run(np.zeros((1, 3, 48, 80), np.float32))
        assert found.keys() == {"mask_logits", "class_logits"}


def test_a_size_that_a_file_does_not_take_is_refused(tmp_path: Path) -> None:
    path = small_file(tmp_path / "model.onnx", inputs=[("pixel_values", [1, 3, 64, 64])])
    with pytest.raises(UsageError, match="the height is 32, expected 64"):
        read_onnx(path).open().run(np.zeros((1, 3, 32, 64), np.float32))


def test_axes_of_one_name_have_one_size(tmp_path: Path) -> None:
    square: Named = ("pixel_values", ["batch", 3, "side", "side"])
    session = read_onnx(small_file(tmp_path / "model.onnx", inputs=[square])).open()
    session.run(np.zeros((1, 3, 32, 32), np.float32))
    with pytest.raises(UsageError, match="the width is 64, expected 32, as for another axis"):
        session.run(np.zeros((1, 3, 32, 64), np.float32))


def test_a_run_that_fails_is_the_files_fault_and_leaves_no_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    baked = numpy_helper.from_array(np.array([2, 3, 64, 64]), "baked")
    node = helper.make_node("Reshape", ["pixel_values", "baked"], ["x"])
    path = small_file(tmp_path / "model.onnx", nodes=[node], weights=[baked], reads="x")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    session = read_onnx(path).open(["CPUExecutionProvider"])
    with pytest.raises(RunError, match=r"onnxruntime fails to run .*Reshape"):
        session.run(np.zeros((1, 3, 64, 64), np.float32))

    assert list((tmp_path / "temporary").iterdir()) == []


def test_what_onnxruntime_cannot_load_or_run_is_one_error(
    exported: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    shutil.copy(exported("tiny_panoptic_64") / "model.onnx", path)
    name = "layers.1.mlp.up_proj.bias"

    def shorten(graph: onnx.GraphProto) -> None:
        initialiser(graph, name).CopyFrom(numpy_helper.from_array(np.zeros(3, np.float32), name))

    change(path, shorten)
    with pytest.raises(EomtConvertError, match=r"onnxruntime (refuses|fails to run) .*model\.onnx"):
        read_onnx(path).open().run(np.zeros((1, 3, 64, 64), np.float32))


def test_a_missing_kernel_is_told_from_a_broken_file(tmp_path: Path) -> None:
    # onnxruntime computes in float32 what it lacks in float16, but not in bfloat16
    nodes = [
        helper.make_node("Cast", ["pixel_values"], ["x"], "cast", to=TensorProto.BFLOAT16),
        helper.make_node("Hardmax", ["x"], ["y"], "rare"),
    ]
    path = small_file(tmp_path / "model.onnx", nodes=nodes)
    with pytest.raises(MissingKernelError, match="Hardmax"):
        read_onnx(path).open()


def test_a_provider_that_fails_does_not_become_the_cpu_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no device")

    monkeypatch.setattr(onnxruntime.InferenceSession, "_create_inference_session", fail)
    file = read_onnx(small_file(tmp_path / "model.onnx"))
    with pytest.raises(UnreadableFileError, match=r"onnxruntime refuses .*: no device"):
        file.open(["AzureExecutionProvider"])

    assert capsys.readouterr().out == ""


def test_onnxruntime_is_imported_without_its_telemetry(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if "TELEMETRY" not in name}
    program = "import converter.runtimes.onnx_file, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert result.stdout == "1\n"
    assert list(tmp_path.iterdir()) == []  # where it would keep an identifier


def test_short_names_of_providers_are_known() -> None:
    assert parse_providers("CPU") == ("CPUExecutionProvider",)
    assert parse_providers(["CPUExecutionProvider"]) == ("CPUExecutionProvider",)
    assert parse_providers("") == ()
    with pytest.raises(UsageError, match="has no provider 'TensorrtExecutionProvider' here"):
        parse_providers("tensorrt,cpu")


@pytest.mark.parametrize(("device", "number"), [("cuda", 0), ("cuda:1", 1)])
def test_the_gpu_with_the_given_number_runs_a_file(
    exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, device: str, number: int
) -> None:
    given: dict[str, Any] = {}

    def session(*_: object, **options: Any) -> None:
        given.update(options)
        raise RuntimeError("no device")

    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    folder = exported("tiny_panoptic_64")
    with pytest.raises(UnreadableFileError, match="no device"):
        open_exported(folder / "model.onnx", folder, device)

    assert given["providers"] == [(available[0], {"device_id": number}), (available[1], {})]


def test_nodes_are_counted_by_provider_and_no_profile_is_left(
    exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.chdir(tmp_path)
    file = read_onnx(exported("tiny_panoptic_64") / "model.onnx")
    session = file.open(["CPUExecutionProvider"])
    assert session.nodes_by_provider() == {}
    for _ in range(2):
        session.run(np.zeros((1, 3, 64, 64), np.float32))

    assert session.nodes_by_provider().keys() == {"CPUExecutionProvider"}
    assert session.nodes_by_provider()["CPUExecutionProvider"] > 50
    assert list(tmp_path.iterdir()) == []


def test_an_error_names_the_extra_that_is_missing(
    command: Callable[..., Result], exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported("tiny_panoptic_64")
    monkeypatch.delitem(sys.modules, "converter.runtimes.onnx_file")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = command("verify", folder)

    assert result.exit_code == 1
    assert "pip install 'eomt-convert[export]'" in result.stderr


def test_a_missing_package_or_a_wrong_option_is_reported_before_the_model_is_loaded(
    converted: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[str] = []

    def export(**options: Any) -> None:
        converter.export(
            converted("tiny_panoptic_64"),
            tmp_path / "export",
            progress=lambda stage, *_: stages.append(stage),
            **options,
        )

    with pytest.raises(UsageError, match="The opset is 9"):
        export(opset=9)
    monkeypatch.delitem(sys.modules, "converter.runtimes.onnx_file")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EomtConvertError, match="onnxruntime, which is not installed"):
        export()
    assert stages == []
