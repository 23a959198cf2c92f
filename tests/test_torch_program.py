"""Programs of torch.export from strangers: what is refused, what is recognised, how they run."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile_files import torch_file
from numpy.typing import NDArray
from program_files import (
    CONSTANTS,
    PROGRAM,
    SAMPLE_INPUTS,
    WEIGHTS,
    change,
    change_json,
    export_logits,
    limit,
    make_square,
    read_entries,
    saved,
    use_a_copy,
    write_entries,
)
from small_models import small_model

from converter.checks.diagnosis.stages import named_outputs
from converter.errors import EomtConvertError, RunError, UnreadableFileError, UsageError
from converter.exporting.torch_writing import write_torch
from converter.exporting.tracing import trace
from converter.runtimes.pt2_archive import open_archive
from converter.runtimes.torch_program import read_program
from converter.weights.merge import BUFFERS
from reference_model import EomtDinov3ForUniversalSegmentation

Model = EomtDinov3ForUniversalSegmentation
LAYERS = 3


def small(*, masked: bool = False, **changes: Any) -> Model:
    model = small_model(**changes)
    model.attn_mask_probs.fill_(masked)
    return model.eval()


def pixels(height: int = 64, width: int = 96, batch: int = 2) -> NDArray[np.float32]:
    generator = np.random.default_rng(0)
    return generator.standard_normal((batch, 3, height, width), np.float32)


def expected_outputs(model: Model, inputs: NDArray[np.float32]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return named_outputs(model(torch.from_numpy(inputs), output_hidden_states=True))


def assert_equal(found: Mapping[str, NDArray[np.float32]], expected: Mapping[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert values.dtype == np.float32
        torch.testing.assert_close(torch.from_numpy(values), expected[name], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of this package, with layers' outputs, of any size."""
    program = trace(small(), image_size=None, layers=True)
    return write_torch(program, tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stranger's export: classes before masks, without names, with example inputs."""
    path = tmp_path_factory.mktemp("strangers") / "model.pt2"
    torch.export.save(export_logits(small(), dynamic=True), path)
    return path


# files that run code ------------------------------------------------------------------------------


class Attack:
    """An object whose pickle makes a folder."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> Any:
        return os.mkdir, (self.name,)


class TypedAttack(Attack):
    """The same, as the tensor of a subclass."""

    def __reduce__(self) -> Any:
        tensor = os.mkdir, torch.Tensor, (self.name,), None
        return torch._tensor._rebuild_from_type_v2, tensor


def code(name: str) -> str:
    return f"__import__('os').mkdir('{name}')"


def graph_of(program: Any) -> Any:
    return program["graph_module"]["graph"]


def signature_of(program: Any) -> Any:
    return program["graph_module"]["module_call_graph"][0]["signature"]


def pickled_weight(entries: dict[str, bytes]) -> None:
    config = json.loads(entries[WEIGHTS])
    payload = config["config"]["weight"]
    payload["use_pickle"] = True
    entries[f"data/weights/{payload['path_name']}"] = saved(Attack("pickled_weight"))
    entries[WEIGHTS] = json.dumps(config).encode()


def pickled_object(entries: dict[str, bytes], path_name: str, content: bytes) -> None:
    payload = {"path_name": path_name, "is_param": False, "use_pickle": True, "tensor_meta": None}
    entries[CONSTANTS] = json.dumps({"config": {"constant": payload}}).encode()
    entries[f"data/constants/{path_name}"] = content


def size_of_input(program: Any) -> None:
    sizes = graph_of(program)["tensor_values"]["pixel_values"]["sizes"]
    sizes[0]["as_expr"]["expr_str"] = code("size_of_input")


def size_of_metadata(program: Any) -> None:
    """Changes a value that has the name of something harmless."""
    renamed = json.loads(json.dumps(program).replace('"mul"', '"metadata"'))
    sizes = graph_of(renamed)["tensor_values"]["metadata"]["sizes"]
    sizes[0]["as_expr"]["expr_str"] = code("size_of_metadata")
    program.update(renamed)


def symbolic_size(program: Any) -> None:
    size = next(iter(graph_of(program)["sym_int_values"].values()))
    size["as_expr"]["expr_str"] = code("symbolic_size")


def name_of_input(program: Any) -> None:
    # where torch writes the name a second time, the text ends and the rest is a comment
    name = f'pixel_values={code("name_of_input")}):\n    """ #'
    signature_of(program)["forward_arg_names"] = [name]


def structure(program: Any) -> None:
    context = {"default_factory_module": "imported", "default_factory_name": "factory"}
    signature_of(program)["out_spec"] = json.dumps(
        [
            1,
            {
                "type": "collections.defaultdict",
                "context": {**context, "dict_context": []},
                "children_spec": [],
            },
        ]
    )


def enumeration(program: Any) -> None:
    context = [{"__enum__": True, "fqn": "enumerated:factory", "name": "a"}]
    spec = {"type": "builtins.dict", "context": json.dumps(context), "children_spec": []}
    signature_of(program)["out_spec"] = json.dumps([1, spec])


def operator(program: Any) -> None:
    """Makes a file: with shared memory, from_file writes what is not there."""
    graph = graph_of(program)
    graph["tensor_values"]["written"] = graph["tensor_values"]["p_weight"]
    described = {"filename": {"as_string": "operator"}, "shared": {"as_bool": True}}
    described["size"] = {"as_int": 8}
    node = {
        "target": "torch.ops.aten.from_file.default",
        "inputs": [{"name": name, "arg": arg, "kind": 1} for name, arg in described.items()],
        "outputs": [{"as_tensor": {"name": "written"}}],
        "metadata": {},
        "name": "written",
    }
    (product,) = [each for each in graph["nodes"] if each["target"] == "torch.ops.aten.mul.Tensor"]
    product["inputs"][1]["arg"]["as_tensor"]["name"] = "written"
    graph["nodes"].insert(0, node)


def old_format(entries: dict[str, bytes]) -> None:
    program = entries[PROGRAM]
    entries.clear()
    entries["/version"] = b"8.20"
    entries["/serialized_exported_program.json"] = program
    entries["/serialized_state_dict.pt"] = saved(Attack("old_format"))
    entries["/serialized_constants.pt"] = entries["/serialized_example_inputs.pt"] = b""


IN_ENTRIES: dict[str, tuple[Callable[[dict[str, bytes]], object], str]] = {
    "pickled_weight": (pickled_weight, r"data/weights/weight_0 in .* is a pickle"),
    "pickled_constant": (
        lambda e: pickled_object(e, "tensor_0", saved(Attack("pickled_constant"))),
        r"data/constants/tensor_0 in .* is a pickle",
    ),
    "opaque_object": (
        lambda e: pickled_object(e, "opaque_obj_0", pickle.dumps(Attack("opaque_object"))),
        r"data/constants/opaque_obj_0 in .* is a pickled object",
    ),
    "old_weights": (
        lambda e: e.update({"data/weights/model.pt": saved(Attack("old_weights"))}),
        r"data/weights/model\.pt in .* is a pickle",
    ),
    "old_constants": (
        lambda e: e.update({"data/constants/model.pt": saved(Attack("old_constants"))}),
        r"data/constants/model\.pt in .* is a pickle",
    ),
    "example_inputs": (
        lambda e: e.update({SAMPLE_INPUTS: saved(Attack("example_inputs"))}),
        r"data/sample_inputs/model\.pt in .* it names (posix|nt)\.mkdir",
    ),
    "typed_inputs": (
        lambda e: e.update({SAMPLE_INPUTS: saved(TypedAttack("typed_inputs"))}),
        r"data/sample_inputs/model\.pt in .* it names (posix|nt)\.mkdir",
    ),
    "old_format": (old_format, r"is no program of torch\.export, or has its format from before"),
}
IN_PROGRAM: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "size_of_input": (size_of_input, r"models/model\.json in .* has a size that"),
    "size_of_metadata": (size_of_metadata, r"models/model\.json in .* has a size that"),
    "symbolic_size": (symbolic_size, r"models/model\.json in .* has a size that"),
    "name_of_input": (name_of_input, r"models/model\.json in .* has a name that"),
    "imported": (structure, r"models/model\.json in .* has a structure that"),
    "enumerated": (enumeration, r"models/model\.json in .* has a structure that"),
    "operator": (operator, r"has an operator .*: torch\.ops\.aten\.from_file\.default"),
}
ATTACKS = {name: message for name, (_, message) in {**IN_ENTRIES, **IN_PROGRAM}.items()}

LOAD = """
import sys, torch
for path in sys.argv[1:]:
    try:
        torch.export.load(path).module()(torch.zeros(2, 3, 4, 4))
    except Exception as error:
        print(path, error)
"""


class Scaled(torch.nn.Module):
    """A small network; what is refused is found before its outputs are looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return (pixel_values * self.weight).reshape(pixel_values.shape[0], -1)


@pytest.fixture(scope="module")
def attacks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with hostile files, and in it what each makes when torch loads and runs it."""
    folder = tmp_path_factory.mktemp("attacks")
    axes = {"pixel_values": {0: torch.export.Dim("batch")}}
    program = torch.export.export(Scaled(), (torch.zeros(2, 3, 4, 4),), dynamic_shapes=axes)
    base = folder / "base.pt2"
    torch.export.save(program, base)
    for name, (edit_entries, _) in IN_ENTRIES.items():
        change(base, folder / f"{name}.pt2", edit_entries)
    for name, (edit_program, _) in IN_PROGRAM.items():
        change_json(base, folder / f"{name}.pt2", edit_program)
    made = folder / "made"
    made.mkdir()
    for module in ("imported", "enumerated"):
        source = f"import os\nos.mkdir('{module}')\nfactory = list\n"
        (made / f"{module}.py").write_text(source)
    paths = [str(folder / f"{name}.pt2") for name in ATTACKS]
    subprocess.run([sys.executable, "-c", LOAD, *paths], cwd=made, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("name", ATTACKS)
def test_a_file_that_runs_code_in_torch_is_refused_and_runs_none(
    attacks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert (attacks / "made" / name).exists(), "torch itself does not run it"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(attacks / "made")

    with pytest.raises(UnreadableFileError, match=ATTACKS[name]):
        read_program(attacks / f"{name}.pt2")

    assert list(tmp_path.iterdir()) == []
    assert not {"imported", "enumerated"} & set(sys.modules)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("data/constants/custom_obj_0", "is a pickled object"),
        ("data/aotinductor/model/model.so", "is compiled code"),
        ("models/other.json", "is a second program"),
        ("data/executorch/model.pte", "is not part of such a program"),
        ("data/weights/../../weight_0", "is not part of such a program"),
        ("code/\x1b[2J.py", r"is not part of such a program"),
    ],
)
def test_an_unknown_entry_is_refused(ours: Path, tmp_path: Path, entry: str, reason: str) -> None:
    path = change(ours, tmp_path / "model.pt2", lambda e: e.update({entry: b"content"}))

    with pytest.raises(UnreadableFileError, match=reason) as caught:
        read_program(path)
    assert caught.value.message.isprintable()


@pytest.mark.parametrize(
    "content",
    [
        torch_file(b"ctorch.hub\nload\n.", {}),
        torch_file(pickle.dumps(()), {"constants.pkl": b"", "code/model.py": b""}),
        pickle.dumps(()),
    ],
    ids=["another name", "TorchScript", "no archive"],
)
def test_example_inputs_that_are_no_tensors_are_refused(
    ours: Path, tmp_path: Path, content: bytes
) -> None:
    path = change(ours, tmp_path / "model.pt2", lambda e: e.update({SAMPLE_INPUTS: content}))

    with pytest.raises(UnreadableFileError, match=r"data/sample_inputs/model\.pt in"):
        read_program(path)


def test_example_inputs_that_dim_dynamic_has_marked_are_known(tmp_path: Path) -> None:
    axes = {"pixel_values": {0: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(Scaled(), (torch.zeros(2, 3, 4, 4),), dynamic_shapes=axes)
    torch.export.save(program, tmp_path / "model.pt2")
    entry = read_entries(tmp_path / "model.pt2")[SAMPLE_INPUTS]

    assert b"_rebuild_from_type_v2" in entry
    open_archive(tmp_path / "model.pt2")


def test_refused_example_inputs_can_be_left_out(ours: Path, tmp_path: Path) -> None:
    content = torch_file(b"ctorch.hub\nload\n.", {})
    path = change(ours, tmp_path / "model.pt2", lambda e: e.update({SAMPLE_INPUTS: content}))

    with pytest.raises(UnreadableFileError) as caught:
        read_program(path)
    assert "program.example_inputs = None" in caught.value.remedy


@pytest.mark.parametrize(
    "size",
    [
        "16*s0",
        "Mul(Integer(16), Symbol('s0', positive=True, integer=True))",
        "Max(Float('1.5', precision=53), Symbol('s0'))",
    ],
)
def test_sizes_as_torch_writes_them_are_read(ours: Path, tmp_path: Path, size: str) -> None:
    def edit(program: Any) -> None:
        next(iter(graph_of(program)["sym_int_values"].values()))["as_expr"]["expr_str"] = size

    read_program(change_json(ours, tmp_path / "model.pt2", edit))


@pytest.mark.parametrize(
    "size",
    ["9**9**9", "s0.__class__", "s0[0]", "lambda: 0", "open('a')", "Symbol('a b')", "(" * 5000, ""],
)
def test_other_sizes_are_refused(ours: Path, tmp_path: Path, size: str) -> None:
    def edit(program: Any) -> None:
        next(iter(graph_of(program)["sym_int_values"].values()))["as_expr"]["expr_str"] = size

    with pytest.raises(UnreadableFileError, match="has a size that"):
        read_program(change_json(ours, tmp_path / "model.pt2", edit))


# damaged files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\3\4" + bytes(100)])
def test_what_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.pt2").write_bytes(content)
    with pytest.raises(UnreadableFileError, match=r"model\.pt2 is no program of torch\.export"):
        read_program(tmp_path / "model.pt2")


def test_a_file_that_was_cut_off_is_refused(ours: Path, tmp_path: Path) -> None:
    content, path = ours.read_bytes(), tmp_path / "model.pt2"
    for length in (10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(UnreadableFileError, match="is no program"):
            read_program(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt2")
    for path in (tmp_path / "missing.pt2", tmp_path / "pipe.pt2", tmp_path):
        with pytest.raises(UnreadableFileError, match="cannot be read"):
            read_program(path)


@pytest.mark.parametrize("entry", [PROGRAM, WEIGHTS, CONSTANTS, "archive_format"])
def test_a_file_that_lacks_an_entry_is_refused(ours: Path, tmp_path: Path, entry: str) -> None:
    path = change(ours, tmp_path / "model.pt2", lambda e: e.pop(entry))
    with pytest.raises(UnreadableFileError, match=entry):
        read_program(path)


@pytest.mark.parametrize(
    ("entry", "content", "reason"),
    [
        (PROGRAM, b"[" * 10_000, "nested too deeply"),
        (PROGRAM, b'{"a": 1, "a": 2}', "a name occurs twice"),
        (PROGRAM, b"{}", "does not describe a program"),
        (PROGRAM, b" " * (2**24 + 1), "the limit is 16,777,216"),
        (WEIGHTS, b'{"config": []}', "does not describe tensors"),
        (WEIGHTS, b'{"config": {"a": {"path_name": "weight_0"}}}', "does not describe 'a'"),
        ("archive_version", b"1", "archive_version is b'1'"),
        ("byteorder", b"big", "not little-endian"),
    ],
)
def test_a_description_that_is_not_valid_is_refused(
    ours: Path, tmp_path: Path, entry: str, content: bytes, reason: str
) -> None:
    path = change(ours, tmp_path / "model.pt2", lambda e: e.update({entry: content}))
    with pytest.raises(UnreadableFileError, match=reason):
        read_program(path)


def test_an_entry_that_occurs_twice_is_refused(ours: Path, tmp_path: Path) -> None:
    path = write_entries(tmp_path / "model.pt2", read_entries(ours))
    with (
        zipfile.ZipFile(path, "a") as archive,
        pytest.warns(UserWarning, match="Duplicate name"),
    ):
        archive.writestr(f"archive/{PROGRAM}", b"{}")
    with pytest.raises(UnreadableFileError, match="occurs twice"):
        read_program(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"sizes": [1, 1, 33]},
        {"strides": [32, 32, 2]},
        {"strides": [32, 32, -1]},
        {"storage_offset": 1},
        {"storage_offset": -1},
        {"sizes": [2**40, 1, 32], "strides": [0, 32, 1]},
        {"sizes": [2**62, 2**62, 32], "strides": [0, 0, 0]},
        {"sizes": [1, 32]},
        {"dtype": 8},
        {"dtype": 10},
        {"layout": 1},
    ],
)
def test_a_tensor_that_does_not_fit_in_its_entry_is_refused(
    ours: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    def edit(config: Any) -> None:
        meta = config["config"]["embeddings.cls_token"]["tensor_meta"]
        for key, value in changes.items():
            match value:
                case list():
                    meta[key] = [{"as_int": each} for each in value]
                case _:
                    meta[key] = {"as_int": value} if key == "storage_offset" else value

    path = change_json(ours, tmp_path / "model.pt2", edit, WEIGHTS)
    with pytest.raises(UnreadableFileError, match=r"data/weights/.* (has 32|has 16|not describe)"):
        read_program(path)


@pytest.mark.parametrize("path_name", ["weight_999", "../weights/weight_0", "model_weights_config"])
def test_a_tensor_without_its_entry_is_refused(ours: Path, tmp_path: Path, path_name: str) -> None:
    def edit(config: Any) -> None:
        config["config"]["embeddings.cls_token"]["path_name"] = path_name

    path = change_json(ours, tmp_path / "model.pt2", edit, WEIGHTS)
    with pytest.raises(UnreadableFileError, match=f"data/weights/{path_name} in .* is missing"):
        read_program(path)


def test_damaged_weights_are_refused_when_they_are_read(ours: Path, tmp_path: Path) -> None:
    weights = small().embeddings.cls_token.detach().numpy().tobytes()
    content = ours.read_bytes()
    assert content.count(weights) == 1
    path = tmp_path / "model.pt2"
    path.write_bytes(content.replace(weights, weights[:-1] + b"\xff"))
    program = read_program(path)

    with pytest.raises(UnreadableFileError, match="is damaged"):
        program.tensors["embeddings.cls_token"].read()
    with pytest.raises(UnreadableFileError, match="is damaged"):
        program.open()


# other programs -----------------------------------------------------------------------------------


def test_a_program_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)), path)
    with pytest.raises(UnreadableFileError, match=r"no export of this model: expected one input"):
        read_program(path)


def test_a_program_without_masks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    program = torch.export.export(torch.nn.Identity(), (torch.zeros(1, 3, 2, 2),))
    torch.export.save(program, path)
    with pytest.raises(UnreadableFileError, match=r"no export of this model: .* of rank 3"):
        read_program(path)


class ThreeOutputs(torch.nn.Module):
    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return pixels * 2, pixels.flatten(2) * 2, pixels.flatten(2) * 3


def test_outputs_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(ThreeOutputs(), (torch.zeros(1, 3, 2, 2),)), path)
    with pytest.raises(UnreadableFileError, match=r"for classes.* found mul \(1 x 3 x 2 x 2\), "):
        read_program(path)


def test_a_program_of_another_version_is_refused(ours: Path, tmp_path: Path) -> None:
    path = change_json(
        ours, tmp_path / "model.pt2", lambda p: p["schema_version"].update({"major": 9})
    )
    with pytest.raises(UnreadableFileError, match=r"has version 9 .* expected 8"):
        read_program(path)


@pytest.mark.parametrize(
    "target",
    ["torch.ops.aten.as_strided.default", "aten.add.Tensor", "_operator.pow", "add.Tensor"],
)
def test_an_operator_that_is_not_in_the_list_is_refused(
    ours: Path, tmp_path: Path, target: str
) -> None:
    path = change_json(
        ours, tmp_path / "model.pt2", lambda p: graph_of(p)["nodes"][-1].update({"target": target})
    )
    with pytest.raises(UnreadableFileError, match=f"that this model does not need: {target}"):
        read_program(path)


def test_a_value_that_is_used_before_it_is_computed_is_refused(ours: Path, tmp_path: Path) -> None:
    path = change_json(ours, tmp_path / "model.pt2", lambda p: graph_of(p)["nodes"].reverse())
    with pytest.raises(UnreadableFileError, match="is used before it is computed"):
        read_program(path)


# what is recognised -------------------------------------------------------------------------------


def test_inputs_and_outputs_of_an_export_are_recognised(ours: Path) -> None:
    program = read_program(ours)

    assert program.input.name == "pixel_values"
    assert program.input.dtype == "float32"
    assert program.input.shape == (None, 3, None, None)
    layers = [f"hidden_states.{layer}" for layer in range(LAYERS)]
    assert set(program.outputs) == {
        *("mask_logits", "class_logits", "patch_embeddings", "last_hidden_state"),
        *layers,
    }
    assert program.outputs["mask_logits"].shape == (None, 6, None, None)
    assert program.outputs["class_logits"].shape == (None, 6, 3)
    assert program.format == "torch"
    assert program.opset is None


def test_tensors_have_the_models_names_and_values(ours: Path) -> None:
    stored = read_program(ours).tensors
    weights = small().state_dict().items()
    expected = {name: t for name, t in weights if t.numel() > 1 and name not in BUFFERS}

    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert stored[name].shape == tuple(tensor.shape)
        assert stored[name].dtype == "float32"
        assert np.array_equal(stored[name].read(), tensor.numpy())


def test_a_tensor_that_no_output_is_computed_from_does_not_count(
    ours: Path, tmp_path: Path
) -> None:
    weight = "layers.1.mlp.up_proj.weight"
    path = change(ours, tmp_path / "model.pt2", lambda entries: use_a_copy(entries, weight))
    tensors = read_program(path).tensors

    assert "copy" in tensors
    assert weight not in tensors


def test_tensors_are_read_when_they_are_asked_for(ours: Path, tmp_path: Path) -> None:
    path = write_entries(tmp_path / "model.pt2", read_entries(ours))
    tensor = read_program(path).tensors["embeddings.cls_token"]
    path.unlink()
    with pytest.raises(UnreadableFileError, match="cannot be read"):
        tensor.read()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_16_bits_has_outputs_in_32(tmp_path: Path, dtype: torch.dtype) -> None:
    model = small().to(dtype)
    path = tmp_path / "model.pt2"
    torch.export.save(export_logits(model), path)
    program = read_program(path)
    weight = program.tensors["model.layers.0.norm1.weight"]

    assert weight.dtype == str(dtype).removeprefix("torch.")
    expected_weight = model.state_dict()["layers.0.norm1.weight"]
    assert np.array_equal(weight.read(), expected_weight.float().numpy())
    inputs = pixels(48, 80)
    found = program.open().run(inputs)
    expected = expected_outputs(model, inputs)
    for name, values in found.items():
        assert values.dtype == np.float32
        torch.testing.assert_close(
            torch.from_numpy(values), expected[name].float(), rtol=0.05, atol=0.05
        )


def test_a_tensor_that_is_a_view_is_read_as_it_is(ours: Path, tmp_path: Path) -> None:
    def transpose(config: Any) -> None:
        meta = config["config"]["query.weight"]["tensor_meta"]
        meta["sizes"].reverse()
        meta["strides"].reverse()

    path = change_json(ours, tmp_path / "model.pt2", transpose, WEIGHTS)
    found = read_program(path).tensors["query.weight"].read()

    assert np.array_equal(found, small().query.weight.detach().numpy().T)


# how they run -------------------------------------------------------------------------------------


@pytest.mark.numbers
def test_an_export_runs_like_the_model_at_any_size(
    ours: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    session = read_program(ours).open(layers=LAYERS)
    for inputs in (pixels(), pixels(32, 48, batch=1)):
        assert_equal(session.run(inputs), expected_outputs(small(), inputs))
    assert session.nodes_by_provider() == {}
    assert capfd.readouterr() == ("", "")


def test_outputs_come_in_the_networks_order(ours: Path) -> None:
    found = read_program(ours).open().run(pixels())
    layers = [f"hidden_states.{layer}" for layer in range(LAYERS)]
    assert list(found) == [
        *("patch_embeddings", *layers, "last_hidden_state", "class_logits", "mask_logits")
    ]


def test_a_strangers_export_runs_with_layers_that_it_does_not_put_out(strangers: Path) -> None:
    program = read_program(strangers)
    inputs = pixels()
    expected = expected_outputs(small(), inputs)

    assert set(program.outputs) == {"mask_logits", "class_logits"}
    assert_equal(program.open(layers=LAYERS).run(inputs), expected)
    logits = {name: expected[name] for name in ("class_logits", "mask_logits")}
    assert_equal(program.open().run(inputs), logits)


def test_an_export_of_the_model_itself_runs(tmp_path: Path) -> None:
    """Its output is a dataclass, whose class is not needed."""
    inputs = pixels(48, 80)
    program = torch.export.export(small(), (torch.from_numpy(inputs),), strict=False)
    torch.export.save(program, tmp_path / "model.pt2")

    session = read_program(tmp_path / "model.pt2").open(layers=LAYERS)
    assert_equal(session.run(inputs), expected_outputs(small(), inputs))


def test_layers_are_found_where_masked_attention_is_on(tmp_path: Path) -> None:
    model = small(masked=True)
    torch.export.save(export_logits(model), tmp_path / "model.pt2")
    inputs = pixels(48, 80)

    session = read_program(tmp_path / "model.pt2").open(layers=LAYERS)
    assert_equal(session.run(inputs), expected_outputs(model, inputs))


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")  # torch's own
def test_a_program_in_core_operators_runs(tmp_path: Path) -> None:
    program = export_logits(small()).run_decompositions()
    torch.export.save(program, tmp_path / "model.pt2")
    inputs = pixels(48, 80)

    session = read_program(tmp_path / "model.pt2").open(layers=LAYERS)
    assert_equal(session.run(inputs), expected_outputs(small(), inputs))


def test_no_layers_are_shown_where_the_structure_is_another(strangers: Path) -> None:
    session = read_program(strangers).open(layers=LAYERS + 5)
    assert set(session.run(pixels())) == {"mask_logits", "class_logits"}


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ((2, 3, 40, 64), "the height is 40, expected a multiple of 16, from 32 on"),
        ((2, 3, 64, 16), "the width is 16, expected a multiple of 16, from 32 on"),
        ((2, 1, 64, 64), "the number of channels is 1, expected 3"),
    ],
)
def test_sizes_that_an_export_does_not_take_are_refused(
    ours: Path, shape: tuple[int, ...], problem: str
) -> None:
    session = read_program(ours).open()
    with pytest.raises(UsageError, match=problem):
        session.run(np.zeros(shape, np.float32))


def test_a_program_of_one_size_takes_no_other(tmp_path: Path) -> None:
    write_torch(trace(small(), image_size=(64, 96), layers=False), tmp_path)
    program = read_program(tmp_path / "model.pt2")

    assert program.input.shape == (None, 3, 64, 96)
    with pytest.raises(UsageError, match="the width is 64, expected 96"):
        program.open().run(pixels(64, 64))


def test_a_range_and_equal_sizes_are_kept(ours: Path, tmp_path: Path) -> None:
    def edit(program: Any) -> None:
        make_square(program)
        limit(program, 2, 2, 4)

    session = read_program(change_json(ours, tmp_path / "model.pt2", edit)).open()
    session.run(pixels(64, 64))
    with pytest.raises(UsageError, match="the height is 80, expected 64 at most"):
        session.run(pixels(80, 80))
    with pytest.raises(UsageError, match="the width is 64, expected 48, as for another axis"):
        session.run(pixels(48, 64))


@pytest.mark.parametrize("limits", [(2**64, None), (2, 10**4000), ("2", None)])
def test_a_range_that_no_size_has_is_refused(
    ours: Path, tmp_path: Path, limits: tuple[Any, Any]
) -> None:
    path = change_json(ours, tmp_path / "model.pt2", lambda program: limit(program, 2, *limits))
    with pytest.raises(UnreadableFileError, match=r"the range of .* is invalid"):
        read_program(path)


def test_torch_has_no_providers(ours: Path) -> None:
    with pytest.raises(UsageError, match="no execution providers"):
        read_program(ours).open(["CPUExecutionProvider"])


def edit_last(
    edit: Callable[[dict[str, Any]], object], operator_name: str
) -> Callable[[dict[str, Any]], None]:
    """Edits the last node with an operator."""

    def edit_program(program: Any) -> None:
        target = f"torch.ops.aten.{operator_name}"
        edit([node for node in graph_of(program)["nodes"] if node["target"] == target][-1])

    return edit_program


def test_a_program_that_takes_more_memory_than_there_is_is_refused(
    ours: Path, tmp_path: Path
) -> None:
    def enlarge(node: dict[str, Any]) -> None:
        node["inputs"][0]["arg"] = {"as_int": -(2**55)}

    path = change_json(ours, tmp_path / "model.pt2", edit_last(enlarge, "arange.start"))
    with pytest.raises(EomtConvertError, match="more memory than this machine has") as caught:
        read_program(path).open().run(pixels())
    assert not isinstance(caught.value, RunError)  # which would be the file's fault


def test_more_pieces_than_there_are_names_for_are_refused(ours: Path, tmp_path: Path) -> None:
    def enlarge(node: dict[str, Any]) -> None:
        node["inputs"][1]["arg"] = {"as_int": 2**40}

    path = change_json(ours, tmp_path / "model.pt2", edit_last(enlarge, "chunk.default"))
    with pytest.raises(UnreadableFileError, match="other pieces than outputs"):
        read_program(path)


def test_sizes_that_grow_without_limit_are_an_error(ours: Path, tmp_path: Path) -> None:
    def edit(program: Any) -> None:
        nodes = graph_of(program)["nodes"]
        name = nodes[0]["outputs"][0]["as_sym_int"]["as_name"]
        for power in range(8):
            value = {"as_sym_int": {"as_name": name}}
            inputs = [
                {"name": "a", "arg": value, "kind": 1},
                {"name": "b", "arg": value, "kind": 1},
            ]
            name = f"power_{power}"
            outputs = [{"as_sym_int": {"as_name": name}}]
            node = {"target": "_operator.mul", "inputs": inputs, "outputs": outputs}
            nodes.insert(power + 1, node)

    path = change_json(ours, tmp_path / "model.pt2", edit)
    with pytest.raises(EomtConvertError, match="larger than 64 bits"):
        read_program(path).open().run(pixels())


def test_an_operator_that_fails_is_an_error(ours: Path, tmp_path: Path) -> None:
    def misplace(node: dict[str, Any]) -> None:
        node["inputs"][1]["arg"] = {"as_int": 7}

    path = change_json(ours, tmp_path / "model.pt2", edit_last(misplace, "cat.default"))
    with pytest.raises(RunError, match=r"torch fails to run .*model\.pt2: Dimension out"):
        read_program(path).open().run(pixels())


def test_a_program_that_writes_to_its_input_changes_only_a_copy(ours: Path, tmp_path: Path) -> None:
    def write(program: Any) -> None:
        graph = graph_of(program)
        values = graph["tensor_values"]
        values["written"] = values["pixel_values"]
        first = next(i for i, n in enumerate(graph["nodes"]) if n["target"].endswith("to.dtype"))
        (taken,) = [each for each in graph["nodes"][first]["inputs"] if "as_tensor" in each["arg"]]
        source = {"name": "src", "arg": {"as_tensor": {"name": "zeros"}}, "kind": 1}
        values["zeros"] = values["pixel_values"]
        graph["nodes"][first:first] = [
            {
                "target": "torch.ops.aten.neg.default",
                "inputs": [taken],
                "outputs": [{"as_tensor": {"name": "zeros"}}],
            },
            {
                "target": "torch.ops.aten.copy_.default",
                "inputs": [taken, source],
                "outputs": [{"as_tensor": {"name": "written"}}],
            },
        ]

    session = read_program(change_json(ours, tmp_path / "model.pt2", write)).open()
    inputs = pixels()
    negated = session.run(inputs)["patch_embeddings"]

    assert np.array_equal(inputs, pixels())
    expected = expected_outputs(small(), -inputs)["patch_embeddings"]
    torch.testing.assert_close(torch.from_numpy(negated), expected, rtol=1e-4, atol=1e-4)
