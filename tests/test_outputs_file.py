"""Outputs that another program computed are judged from a file."""

import hashlib
import io
import json
import re
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from conftest import FIXTURES, HANGS
from hostile_files import safetensors_file, with_directory
from numpy.typing import NDArray
from recorded_models import pixel_values
from safetensors.torch import load_file, save_file

import converter
from converter.errors import OutputError, UnreadableFileError, UsageError

Command = Callable[..., Result]
Outputs = dict[str, NDArray[Any]]

NAME = "shapes_panoptic_128"
RECORDED = FIXTURES / NAME

# a program that knows nothing of the converter
OTHER_PROGRAM = """
import sys
import numpy, torch
from recorded_models import recorded_model

inputs, outputs, name = sys.argv[1:]
pixel_values = torch.from_numpy(numpy.load(inputs, allow_pickle=False)["pixel_values"])
with torch.inference_mode():
    output = recorded_model(name)(pixel_values, output_hidden_states=True)
embeddings, *states = output.hidden_states
numpy.savez(
    outputs,
    patch_embeddings=embeddings,
    **{f"hidden_states.{number}": state for number, state in enumerate(states)},
    last_hidden_state=output.last_hidden_state,
    class_queries_logits=output.class_queries_logits,
    masks_queries_logits=output.masks_queries_logits,
)
assert "converter" not in sys.modules
"""


@pytest.fixture(scope="module")
def computed(
    converted: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Outputs]:
    """Outputs of another program for saved inputs; each call gives its own copy."""
    folder = tmp_path_factory.mktemp("round_trip")
    converter.verify(converted(NAME), save_inputs=folder / "inputs.npz")
    subprocess.run(
        [sys.executable, "-c", OTHER_PROGRAM, folder / "inputs.npz", folder / "outputs.npz", NAME],
        cwd=Path(__file__).parent,
        check=True,
        timeout=HANGS,
    )

    def read() -> Outputs:
        with np.load(folder / "outputs.npz", allow_pickle=False) as file:
            return dict(file)

    return read


@pytest.fixture
def recorded() -> Outputs:
    """The recorded logits, by the names in ONNX files."""
    tensors = load_file(RECORDED / "recorded.safetensors")
    return {
        "masks_queries_logits": tensors["mask_logits"].numpy(),
        "class_queries_logits": tensors["class_logits"].numpy(),
    }


def judged(folder: Path, outputs: Outputs, recording: Path = RECORDED) -> converter.Verdict:
    np.savez(folder / "outputs.npz", **outputs)  # type: ignore[arg-type]
    return converter.verify_outputs(folder / "outputs.npz", recorded=recording)


# the round trip ---------------------------------------------------------------------------------


@pytest.mark.numbers
def test_outputs_of_another_program_pass_on_the_basis_of_the_original(
    computed: Callable[[], Outputs], tmp_path: Path
) -> None:
    verdict = judged(tmp_path, computed())

    numbers = verdict.levels[2]
    assert (verdict.verdict, verdict.basis, numbers.reason) == ("passed", "original", "")
    content = (tmp_path / "outputs.npz").read_bytes()
    assert numbers.figures["outputs_sha256"] == hashlib.sha256(content).hexdigest()
    assert {"patch_embeddings", "hidden_states.5", "mask_logits"} <= set(
        numbers.figures["compared"]
    )
    assert {level.level for level in verdict.levels if level.status == "not checked"} == {
        *("structure", "arithmetic", "pictures", "peers", "published"),
    }
    assert all(level.reason for level in verdict.levels if level.status == "not checked")


def test_safetensors_and_the_recordings_names_are_read_too(
    computed: Callable[[], Outputs], tmp_path: Path
) -> None:
    outputs = computed()
    for ours, onnx in (("mask_logits", "masks"), ("class_logits", "class")):
        outputs[ours] = outputs.pop(f"{onnx}_queries_logits")
    save_file(
        {name: torch.from_numpy(array) for name, array in outputs.items()},
        tmp_path / "outputs.safetensors",
    )

    verdict = converter.verify_outputs(tmp_path / "outputs.safetensors", recorded=RECORDED)

    assert (verdict.verdict, verdict.basis) == ("passed", "original")
    assert len(verdict.levels[2].figures["compared"]) == len(outputs)


@pytest.mark.parametrize("change", [1e-3, np.nan, np.inf])
def test_a_difference_is_placed_in_the_first_layer_that_has_it(
    computed: Callable[[], Outputs], tmp_path: Path, change: float
) -> None:
    outputs = computed()
    for name in ("hidden_states.2", "hidden_states.3", "masks_queries_logits"):
        outputs[name].reshape(-1)[7] += change

    verdict = judged(tmp_path, outputs)

    assert verdict.verdict == "failed"
    assert verdict.first_difference is not None
    assert verdict.first_difference.layer == "layers.2"
    json.dumps(verdict.to_dict(), allow_nan=False)


def test_without_outputs_of_layers_the_place_is_unknown(recorded: Outputs, tmp_path: Path) -> None:
    recorded["masks_queries_logits"] *= 1.01

    verdict = judged(tmp_path, recorded)

    assert verdict.verdict == "failed"
    assert verdict.first_difference is None
    assert "missing in the file: patch_embeddings to last_hidden_state." in verdict.reason


def test_a_gap_before_the_first_difference_leaves_the_place_unknown(
    computed: Callable[[], Outputs], tmp_path: Path
) -> None:
    outputs = computed()
    outputs["hidden_states.3"] += 1
    del outputs["hidden_states.1"], outputs["hidden_states.2"]

    verdict = judged(tmp_path, outputs)

    assert verdict.first_difference is None
    assert "missing in the file: hidden_states.1 to hidden_states.2." in verdict.reason


def test_layers_of_the_first_input_do_not_place_a_difference_in_another_one(
    computed: Callable[[], Outputs], tmp_path: Path
) -> None:
    outputs = computed()
    outputs["class_queries_logits"][2] += 1

    verdict = judged(tmp_path, outputs)

    assert verdict.first_difference is None
    assert "other inputs than the first 1" in verdict.reason


def test_a_recording_without_layers_cannot_place_a_difference(tmp_path: Path) -> None:
    tensors = load_file(RECORDED / "recorded.safetensors")
    kept = {name: tensors[name] for name in ("pixels", "mask_logits", "class_logits")}
    save_file(kept, tmp_path / "recorded.safetensors")

    verdict = judged(
        tmp_path,
        {
            "mask_logits": kept["mask_logits"].numpy(),
            "class_logits": kept["class_logits"].numpy() + 1,
        },
        tmp_path,
    )

    assert verdict.first_difference is None
    assert "The recording has no outputs of layers" in verdict.reason


# inputs -----------------------------------------------------------------------------------------


@pytest.mark.numbers
@pytest.mark.parametrize("name", ["shapes_panoptic_128", "tiny_panoptic_48x80"])
def test_saved_inputs_are_what_the_original_made_of_the_recorded_pixels(
    name: str, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    converter.verify(converted(name), save_inputs=tmp_path / "a.npz", level=1)
    converter.verify(converted(name), save_inputs=tmp_path / "new" / "b.npz", level=1)

    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert list(file) == ["pixel_values"]
        values = file["pixel_values"]
    assert values.dtype == np.float32
    assert values.flags.c_contiguous
    assert np.array_equal(values, pixel_values(name).numpy())
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        (member,) = archive.infolist()
        assert member.compress_type == zipfile.ZIP_STORED
        assert member.date_time == (1980, 1, 1, 0, 0, 0)  # not that of today
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "new" / "b.npz").read_bytes()


def test_saved_inputs_are_those_of_the_models_own_normalisation(
    model: Path, tmp_path: Path
) -> None:
    path = model / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_std": [0.5, 0.5, 0.5]}))
    (tmp_path / "inputs.npz").write_text("older")

    verdict = converter.verify(model, save_inputs=tmp_path / "inputs.npz")

    assert verdict.verdict == "failed"
    pixels = load_file(FIXTURES / "tiny_panoptic_64" / "recorded.safetensors")["pixels"].numpy()
    with np.load(tmp_path / "inputs.npz") as file:
        expected = (pixels[:, 0].astype(np.float32) / 255 - np.float32(0.485)) / np.float32(0.5)
        assert np.array_equal(file["pixel_values"][:, 0], expected)


def test_without_recorded_pixels_there_are_no_inputs(model: Path, tmp_path: Path) -> None:
    (model / "conversion.json").unlink()

    with pytest.raises(UsageError, match="no recorded pixels"):
        converter.verify(model, save_inputs=tmp_path / "inputs.npz")


def test_inputs_have_one_format_and_a_place(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape("inputs.npy does not end in it")):
        converter.verify(model, save_inputs=tmp_path / "inputs.npy")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(OutputError, match="it is a folder"):
        converter.verify(model, save_inputs=tmp_path / "folder.npz")


def test_inputs_with_other_channels_than_the_models_are_refused(
    model: Path, tmp_path: Path
) -> None:
    tensors = load_file(FIXTURES / "tiny_panoptic_64" / "recorded.safetensors")
    tensors["pixels"] = tensors["pixels"][:, :2].contiguous()
    save_file(tensors, tmp_path / "recorded.safetensors")

    with pytest.raises(UnreadableFileError, match="have 2 channels"):
        converter.verify(model, recorded=tmp_path, save_inputs=tmp_path / "inputs.npz")
    assert not (tmp_path / "inputs.npz").exists()


# what is read -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stored",
    [
        lambda array: array.astype(np.float64),
        lambda array: array.astype(">f4"),
        lambda array: array.astype(">f8"),
        np.asfortranarray,
    ],
    ids=["float64", "big-endian", "big-endian-float64", "fortran-order"],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_any_way_in_which_numpy_stores_an_array_is_read(
    stored: Callable[[NDArray[Any]], NDArray[Any]],
    save: Callable[..., None],
    recorded: Outputs,
    tmp_path: Path,
) -> None:
    save(tmp_path / "outputs.npz", **{name: stored(array) for name, array in recorded.items()})

    verdict = converter.verify_outputs(tmp_path / "outputs.npz", recorded=RECORDED)

    assert verdict.verdict == "passed"
    assert verdict.levels[2].figures["max_abs"] == 0


def test_a_long_header_of_numpy_is_read(recorded: Outputs, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "outputs.npz", "w") as archive:
        for name, array in recorded.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, array, version=(2, 0))
            archive.writestr(f"{name}.npy", content.getvalue())

    verdict = converter.verify_outputs(tmp_path / "outputs.npz", recorded=RECORDED)

    assert verdict.levels[2].figures["max_abs"] == 0


@pytest.mark.numbers
@pytest.mark.parametrize(
    ("dtype", "passes"), [(torch.float64, True), (torch.float16, False), (torch.bfloat16, False)]
)
def test_rounded_outputs_are_judged_as_float32(
    dtype: torch.dtype, passes: bool, recorded: Outputs, tmp_path: Path
) -> None:
    save_file(
        {name: torch.from_numpy(array).to(dtype) for name, array in recorded.items()},
        tmp_path / "outputs.safetensors",
    )

    verdict = converter.verify_outputs(tmp_path / "outputs.safetensors", recorded=RECORDED)

    figures = verdict.levels[2].figures
    assert (verdict.verdict == "passed") == passes
    assert figures["tolerance"] == 2e-4
    if not passes:
        rounded = torch.from_numpy(recorded["masks_queries_logits"]).to(dtype).float().numpy()
        largest = np.abs(rounded - recorded["masks_queries_logits"]).max()
        assert figures["compared"]["mask_logits"]["max_abs"] == pytest.approx(largest)


def test_values_beyond_float32_fail(recorded: Outputs, tmp_path: Path) -> None:
    recorded["class_queries_logits"] = recorded["class_queries_logits"].astype(np.float64) * 1e300

    assert judged(tmp_path, recorded).verdict == "failed"


def test_other_tensors_are_named_and_not_read(recorded: Outputs, tmp_path: Path) -> None:
    recorded["hidden_state.0"] = np.zeros(3)
    recorded["labels"] = np.array([{"a": 1}], dtype=object)

    verdict = judged(tmp_path, recorded)

    assert verdict.verdict == "passed"
    assert verdict.levels[2].reason == "Not compared: hidden_state.0, labels."


@pytest.mark.parametrize(
    "shape",
    [(), (0,), (3, 20, 32, 32), (6, 20, 32, 32), (4, 20, 32), (4, 21, 32, 32), (4, 0, 32, 32)],
)
def test_another_shape_fails_with_both_shapes(
    shape: tuple[int, ...], recorded: Outputs, tmp_path: Path
) -> None:
    recorded["masks_queries_logits"] = np.zeros(shape, np.float32)

    verdict = judged(tmp_path, recorded)

    assert verdict.verdict == "failed"
    assert f"the shape {list(shape)}, expected [4, 20, 32, 32]" in verdict.reason
    assert verdict.first_difference is None


@pytest.mark.parametrize("count", [1, 2, 4])
def test_layers_may_be_given_for_all_inputs_or_those_that_were_recorded(
    count: int, computed: Callable[[], Outputs], tmp_path: Path
) -> None:
    outputs = computed()
    layer = outputs["hidden_states.0"]
    assert (len(layer), layer.ndim) == (4, 3)
    outputs["hidden_states.0"] = layer[:count]

    assert judged(tmp_path, outputs).verdict == "passed"


# what was done to right outputs -----------------------------------------------------------------


def softmax(array: NDArray[Any]) -> NDArray[Any]:
    return torch.from_numpy(array).softmax(-1).numpy()


def sigmoid(array: NDArray[Any]) -> NDArray[Any]:
    return torch.from_numpy(array).sigmoid().numpy()


@pytest.mark.parametrize(
    ("masks", "classes", "sentence"),
    [
        (sigmoid, None, "mask_logits are the sigmoid of the recorded logits."),
        (None, softmax, "class_logits are the softmax of the recorded logits."),
        (
            sigmoid,
            softmax,
            "class_logits are the softmax of the recorded logits. mask_logits are the sigmoid of "
            "the recorded logits.",
        ),
        (
            lambda array: array.swapaxes(-1, -2),
            None,
            "mask_logits have height and width swapped.",
        ),
        (
            lambda array: np.moveaxis(array, 1, -1),
            None,
            "mask_logits have the queries as their last axis.",
        ),
        (
            None,
            lambda array: array.swapaxes(-1, -2),
            "class_logits have queries and classes swapped.",
        ),
        (
            lambda array: array[[2, 0, 3, 1]],
            lambda array: array[[2, 0, 3, 1]],
            "The outputs are right for the recorded inputs in another order.",
        ),
    ],
)
def test_what_was_done_to_right_outputs_is_named(
    masks: Callable[[NDArray[Any]], NDArray[Any]] | None,
    classes: Callable[[NDArray[Any]], NDArray[Any]] | None,
    sentence: str,
    recorded: Outputs,
    tmp_path: Path,
) -> None:
    for name, change in (("masks_queries_logits", masks), ("class_queries_logits", classes)):
        if change:
            recorded[name] = change(recorded[name])

    verdict = judged(tmp_path, recorded)

    assert verdict.verdict == "failed"
    assert verdict.reason.endswith(f" {sentence}")
    assert verdict.first_difference is None


@pytest.mark.parametrize("order", [[2, 0, 3, 1], [0, 0, 2, 3]])
def test_what_explains_a_part_of_the_difference_is_not_named(
    order: list[int], recorded: Outputs, tmp_path: Path
) -> None:
    recorded["masks_queries_logits"] = sigmoid(recorded["masks_queries_logits"])
    recorded["class_queries_logits"] = recorded["class_queries_logits"][order]

    assert "missing in the file" in judged(tmp_path, recorded).reason


def test_equal_inputs_do_not_hide_an_output_that_belongs_to_none(
    recorded: Outputs, tmp_path: Path
) -> None:
    tensors = load_file(RECORDED / "recorded.safetensors")
    kept = {name: tensors[name] for name in ("pixels", "mask_logits", "class_logits")}
    for tensor in kept.values():
        tensor[1] = tensor[0]
    save_file(kept, tmp_path / "recorded.safetensors")
    order = [1, 0, 2, 3]  # 1 is not recorded any more
    outputs = {name: array[order] for name, array in recorded.items()}

    assert "in another order" not in judged(tmp_path, outputs, tmp_path).reason


# hostile files ----------------------------------------------------------------------------------


def zipped(path: Path, *entries: tuple[str, bytes], compression: int = 0) -> Path:
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "w", compression) as file:
        for name, content in entries:
            file.writestr(name, content)
    return path


def header(text: str, version: bytes = b"\1\0", claimed: int | None = None) -> bytes:
    """The beginning of a .npy file."""
    content = text.encode()
    length = len(content) if claimed is None else claimed
    return (
        b"\x93NUMPY" + version + length.to_bytes(2 if version == b"\1\0" else 4, "little") + content
    )


def described(shape: str, dtype: str = "<f4", order: str = "False") -> str:
    return f"{{'descr': {dtype!r}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


def pickled(array: NDArray[Any]) -> bytes:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=True)
    return content.getvalue()


MASKS = "mask_logits.npy"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "magic string"),
        (b"\x93NUMPY\3\0", "unknown version"),
        (pickled(np.array([print], dtype=object)), "holds Python objects, which could run code"),
        (header(described("(4, 20, 32, 32)")), "has 79 bytes, expected 327759"),
        (header(described("(2, 3)")) + bytes(25), "bytes, expected"),
        (header(described("(-2, -3)")) + bytes(24), "bytes, expected"),
        (header(described("(0, 99999999999999999999)")), "larger than that of any output"),
        (header(described("(" * 3000 + ")" * 3000)), "is not a valid .npz file"),
        (header(described("(2,)", "<f4") + "x"), "is not a valid .npz file"),
        (header("", b"\2\0", 2**32 - 1), "is not a valid .npz file"),
        (header(described("__import__('os').abort()")), "is not a valid .npz file"),
        (header(described("(2,)", "<i8")) + bytes(16), "has dtype int64, expected floating point"),
        (header(described("(2,)", "|V2")) + bytes(4), "has dtype |V2, expected floating point"),
        (header(described("(2,)", "<c8")) + bytes(16), "has dtype complex64"),
        (header(described("(2,)", "<f16")) + bytes(32), "has dtype F128"),
    ],
)
def test_an_array_that_numpy_would_not_write_for_logits_is_refused(
    content: bytes, said: str, tmp_path: Path
) -> None:
    path = zipped(
        tmp_path / "outputs.npz", (MASKS, content), ("class_logits.npy", pickled(np.zeros(3)))
    )

    with pytest.raises(UnreadableFileError, match=re.escape(said)) as error:
        converter.verify_outputs(path, recorded=RECORDED)
    assert str(path) in error.value.message


def test_a_zip_bomb_takes_no_memory(tmp_path: Path) -> None:
    path = zipped(
        tmp_path / "outputs.npz",
        (MASKS, header(described("(33554432,)")) + bytes(2**27)),
        ("class_logits.npy", pickled(np.zeros((4, 20, 7), np.float32))),
        compression=zipfile.ZIP_DEFLATED,
    )
    tracemalloc.start()
    try:
        verdict = converter.verify_outputs(path, recorded=RECORDED)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert verdict.reason.startswith("mask_logits has the shape [33554432], expected")
    assert path.stat().st_size < most < 2**25


def test_damaged_content_is_refused(recorded: Outputs, tmp_path: Path) -> None:
    np.savez(tmp_path / "outputs.npz", **recorded)  # type: ignore[arg-type]
    content = bytearray((tmp_path / "outputs.npz").read_bytes())
    content[5000] ^= 1
    (tmp_path / "outputs.npz").write_bytes(content)

    with pytest.raises(UnreadableFileError, match="damaged"):
        converter.verify_outputs(tmp_path / "outputs.npz", recorded=RECORDED)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_that_numpy_does_not_use_is_refused(compression: int, tmp_path: Path) -> None:
    path = zipped(tmp_path / "o.npz", (MASKS, pickled(np.zeros(3))), compression=compression)

    with pytest.raises(UnreadableFileError, match="compressed in a way"):
        converter.verify_outputs(path, recorded=RECORDED)


def test_an_encrypted_array_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "o.npz", (MASKS, pickled(np.zeros(3))))
    content = bytearray(path.read_bytes())
    content[6] |= 1
    content[content.rindex(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)

    with pytest.raises(UnreadableFileError, match=r"o\.npz is not a valid \.npz file: .*encrypted"):
        converter.verify_outputs(path, recorded=RECORDED)


def test_two_arrays_of_one_name_are_refused(recorded: Outputs, tmp_path: Path) -> None:
    array = pickled(recorded["masks_queries_logits"])
    path = zipped(tmp_path / "o.npz", (MASKS, array), (MASKS, array))
    with pytest.raises(UnreadableFileError, match="two of its arrays have the same name"):
        converter.verify_outputs(path, recorded=RECORDED)

    recorded["mask_logits"] = recorded["masks_queries_logits"]
    with pytest.raises(UnreadableFileError, match="mask_logits twice: also as masks_queries"):
        judged(tmp_path, recorded)


def test_a_large_directory_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "o.npz", (MASKS, pickled(np.zeros(3))))
    path.write_bytes(with_directory(path.read_bytes(), 40_000))

    with pytest.raises(UnreadableFileError, match="its directory is larger"):
        converter.verify_outputs(path, recorded=RECORDED)


@pytest.mark.parametrize("name", ["o.npz", "o.safetensors"])
def test_what_is_no_file_of_tensors_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(UnreadableFileError, match=re.escape(name)):
        converter.verify_outputs(path, recorded=RECORDED)
    path.write_bytes(b"no tensors")
    with pytest.raises(UnreadableFileError, match=re.escape(name)):
        converter.verify_outputs(path, recorded=RECORDED)
    path.unlink()
    path.mkdir()
    with pytest.raises(UnreadableFileError, match=re.escape(name)):
        converter.verify_outputs(path, recorded=RECORDED)


def test_integers_in_safetensors_are_refused(tmp_path: Path) -> None:
    entry = {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}
    content = safetensors_file(
        {"mask_logits": entry, "class_logits": entry | {"data_offsets": [8, 16]}}, bytes(16)
    )
    (tmp_path / "o.safetensors").write_bytes(content)

    with pytest.raises(UnreadableFileError, match="has dtype I64, expected floating point"):
        converter.verify_outputs(tmp_path / "o.safetensors", recorded=RECORDED)


def test_layers_of_more_inputs_than_were_recorded_are_refused(
    recorded: Outputs, tmp_path: Path
) -> None:
    recorded["hidden_states.0"] = np.zeros((5, 261, 96), np.float32)

    with pytest.raises(UnreadableFileError, match="any output for the 4 recorded inputs"):
        judged(tmp_path, recorded)


def test_a_file_without_logits_is_refused_with_what_it_has(
    recorded: Outputs, tmp_path: Path
) -> None:
    recorded["output_1"] = recorded.pop("class_queries_logits")

    with pytest.raises(
        UnreadableFileError,
        match=r"neither class_logits nor .*; it has masks_queries_logits, output_1\.",
    ):
        judged(tmp_path, recorded)


def test_another_ending_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape("does not end in .npz or .safetensors")):
        converter.verify_outputs(tmp_path / "outputs.bin", recorded=RECORDED)


# what is said -----------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eomt-convert 0.1.0, reference model", None])
def test_outputs_that_agree_with_a_reference_are_not_proven(
    implementation: str | None, recorded: Outputs, tmp_path: Path, command: Command
) -> None:
    tensors = load_file(RECORDED / "recorded.safetensors")
    tensors["pixels"][0, 0, 0, 0] ^= 1  # so that it is not a recording of the package
    save_file(tensors, tmp_path / "recorded.safetensors")
    if implementation:
        digest = (
            converter.verify_outputs(save(recorded, tmp_path), recorded=tmp_path)
            .levels[2]
            .figures["recorded_sha256"]
        )
        content = {
            "sha256": {"recorded.safetensors": digest},
            "provenance": {"implementation": implementation},
            # even if that model had passed: outputs have no files that could be compared
            "model": {"basis": "original", "tensors": {}, "files": []},
        }
        (tmp_path / "recorded.json").write_text(json.dumps(content))

    result = command(
        "verify",
        "--outputs",
        save(recorded, tmp_path),
        "--recorded",
        tmp_path,
        "--require-verified",
    )

    whose = "the reference model" if implementation else "unknown origin"
    said = " ".join((result.stdout + result.stderr).split())
    assert result.exit_code == 1
    assert f"basis reference: compared with outputs of {whose}: this does not show" in said
    assert f"The outputs were only compared with outputs of {whose}: this does not" in said
    assert "The model" not in said


def save(outputs: Outputs, folder: Path) -> Path:
    np.savez(folder / "outputs.npz", **outputs)  # type: ignore[arg-type]
    return folder / "outputs.npz"


def test_the_command_checks_outputs(recorded: Outputs, tmp_path: Path, command: Command) -> None:
    right = command(
        *("verify", "--outputs", save(recorded, tmp_path), "--recorded", RECORDED),
        *("--require-verified", "--json", "--report", "right.html"),
    )
    embeddings = load_file(RECORDED / "recorded.safetensors")["patch_embeddings"]
    recorded["patch_embeddings"] = embeddings.numpy() + 1
    wrong = command(
        *("verify", "--outputs", save(recorded, tmp_path), "--recorded", RECORDED),
        *("--report", "wrong.html"),
    )

    assert right.exit_code == 0
    content = json.loads(right.stdout)
    assert (content["verdict"], content["basis"]) == ("passed", "original")
    assert wrong.exit_code == 3
    assert wrong.stdout.startswith("verdict   failed: patch_embeddings differs by up to 1,")
    assert "begins    in embeddings: patch_embeddings is off by up to 1" in wrong.stdout
    for page, said in (("right", "were compared with outputs recorded"), ("wrong", "differs by")):
        text = (tmp_path / f"{page}.html").read_text(encoding="utf-8")
        shown = re.sub("<(style|script)>.*?</\\1>", "", text, flags=re.DOTALL)
        assert said in shown
        assert "<h1>outputs.npz</h1>" in shown
        assert "square" in shown  # a class that recorded.json names
        assert "conversion.json" not in shown
        assert "this model" not in shown
        assert "The model" not in shown
        assert "no fault that was tried" not in shown
        assert 'id="tensors"' not in shown


def test_a_recording_without_names_of_classes_numbers_them(tmp_path: Path) -> None:
    tensors = load_file(FIXTURES / "tiny_panoptic_64" / "recorded.safetensors")
    outputs = {name: tensors[name].numpy() for name in ("mask_logits", "class_logits")}

    converter.verify_outputs(
        save(outputs, tmp_path),
        recorded=FIXTURES / "tiny_panoptic_64",
        report=tmp_path / "page.html",
    )

    assert re.search(r"class \d", (tmp_path / "page.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["m", "--outputs", "o.npz", "--recorded", "r"], "MODEL contradicts --outputs"),
        *(
            (["--outputs", "o.npz", "--recorded", "r", option, value], f"{option} contradicts")
            for option, value in {
                "--delta": "d.bin",
                "--backbone": "b",
                "--against": "transformers",
                "--level": "5",
                "--image": "i.png",
                "--device": "cpu",
                "--threads": "1",
                "--save-inputs": "i.npz",
            }.items()
        ),
        (["--outputs", "o.npz"], "--outputs needs --recorded"),
        ([], "Nothing to verify was named"),
        (["m", "--save-inputs", "i.txt"], "i.txt does not end in it"),
    ],
)
def test_wrong_usage_is_one_error_that_names_the_option(
    arguments: list[str], said: str, command: Command
) -> None:
    result = command("verify", *arguments)

    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert said in result.stderr.splitlines()[0]


def test_names_in_a_file_of_outputs_are_harmless(
    recorded: Outputs, tmp_path: Path, command: Command
) -> None:
    recorded["\x1b[2J"] = np.zeros(3)

    result = command("verify", "--outputs", save(recorded, tmp_path), "--recorded", RECORDED)

    assert result.exit_code == 0
    assert "Not compared: \\x1b[2J." in " ".join(result.stdout.split())
    assert "\x1b" not in result.stdout
