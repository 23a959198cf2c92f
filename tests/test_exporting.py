"""Exports: what is written, and how it is checked."""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import program_files
import pytest
import torch
from click.testing import Result
from conftest import FIXTURES
from exported_files import (
    bake_shape,
    change,
    change_with_height,
    normalise_again,
    set_epsilon,
    set_values,
    swap,
    use_a_copy,
)
from safetensors.torch import load_file, save_file
from small_models import small_model

import converter
from converter.checks.comparison import FLOAT32, ROUNDED
from converter.errors import MissingKernelError, OutputError, UnreadableFileError, UsageError
from converter.pictures.evaluation import evaluate
from converter.runtimes.onnx_file import OnnxFile
from reference_model import EomtDinov3ForUniversalSegmentation, EomtImageProcessor

WEIGHT = "layers.1.mlp.up_proj.weight"

# for tests of what is the same in all exports: a program of one size is traced in the least time
QUICK: dict[str, Any] = {"format": "torch", "image_size": 64}
QUICKLY = ("--format", "torch", "--image-size", 64)


@pytest.fixture
def export(exported: Callable[..., Path], tmp_path: Path) -> Path:
    """A separate copy of the export of tiny_panoptic_64, which a test may change."""
    folder = tmp_path / "export"
    shutil.copytree(exported("tiny_panoptic_64"), folder)
    return folder


def level(verdict: converter.Verdict, name: str) -> converter.Level:
    return next(each for each in verdict.levels if each.level == name)


# onnxruntime does not follow the instructions that torch is told to use
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tiny_panoptic_64", {}),
        ("shapes_panoptic_128", {}),
        ("tiny_instance_64_gated", {}),
        # the same network in other sizes, and programs take a third of the time to write
        ("tiny_panoptic_48x80", {"format": "torch"}),
        ("tiny_semantic_48", {"format": "torch"}),
    ],
)
def test_an_export_passes_against_the_recordings_of_the_original(
    exported: Callable[..., Path], name: str, options: dict[str, Any]
) -> None:
    verdict = converter.verify(exported(name, **options))

    assert verdict.verdict == "passed", verdict.reason
    assert verdict.basis == "original"
    for each in ("structure", "arithmetic", "numbers", "pictures"):
        assert level(verdict, each).status == "passed", each
    compared = level(verdict, "numbers").figures["compared"]
    assert {"patch_embeddings", "hidden_states.0", "last_hidden_state"} < compared.keys()


@pytest.mark.numbers
def test_a_program_of_torch_passes_against_the_recordings_of_the_original(
    exported: Callable[..., Path],
) -> None:
    verdict = converter.verify(exported("tiny_instance_64_gated", format="torch"))

    assert (verdict.verdict, verdict.basis) == ("passed", "original"), verdict.reason
    assert "hidden_states.0" in level(verdict, "numbers").figures["compared"]


@pytest.mark.parametrize("size", [(16, 16), (80, 48), (112, 144)])
def test_an_export_takes_sizes_that_were_not_traced(
    exported: Callable[..., Path], converted: Callable[[str], Path], size: tuple[int, int]
) -> None:
    patch = 16
    model = EomtDinov3ForUniversalSegmentation.from_pretrained(converted("tiny_panoptic_64"))
    assert model.config.patch_size == patch
    pixels = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(exported("tiny_panoptic_64") / "model.onnx")
    masks, classes = session.run(None, {"pixel_values": pixels.numpy()})
    with torch.inference_mode():
        expected = model(pixels)

    assert np.allclose(masks, expected.masks_queries_logits, atol=2e-4, rtol=1e-5)
    assert np.allclose(classes, expected.class_queries_logits, atol=2e-4, rtol=1e-5)


def test_conversion_json_tells_how_the_model_was_exported(
    exported: Callable[..., Path], converted: Callable[[str], Path]
) -> None:
    folder = exported("tiny_panoptic_64")
    content = json.loads((folder / "conversion.json").read_text())
    export = content.pop("export")

    assert content == json.loads((converted("tiny_panoptic_64") / "conversion.json").read_text())
    assert (export["format"], export["opset"], export["dtype"]) == ("onnx", 20, "float32")
    assert export["versions"]["torch"] == torch.__version__
    assert export["input"] == "pixel_values"
    assert export["outputs"] == ["masks_queries_logits", "class_queries_logits"]
    assert export["dynamic_axes"]["pixel_values"] == {"0": "batch", "2": "height", "3": "width"}
    assert set(export["files"]) == {"model.onnx", "config.json", "preprocessor_config.json"}
    assert export["verdict"]["basis"] == "original"
    assert export["tensors"][WEIGHT] == content["tensors"][WEIGHT]["sha256"]
    assert (folder / "verdict.html").is_file()


# what is wrong is found, and placed ---------------------------------------------------------------


def test_a_changed_initialiser_is_found_with_its_layer(export: Path) -> None:
    change(export / "model.onnx", lambda graph: set_values(graph, WEIGHT, lambda w: w * 1.5))
    verdict = converter.verify(export)

    assert verdict.verdict == "failed"
    assert level(verdict, "arithmetic").figures["different"] == [WEIGHT]
    assert verdict.first_difference is not None
    assert verdict.first_difference.layer == "layers.1"
    assert verdict.cause is not None
    assert (verdict.cause.name, verdict.cause.tensors) == ("tensor-replaced", (WEIGHT,))


def test_a_swapped_pair_is_found_with_its_layer(export: Path) -> None:
    pair = "layers.2.norm1.weight", "layers.2.norm2.weight"
    change(export / "model.onnx", lambda graph: swap(graph, *pair))
    verdict = converter.verify(export)

    assert verdict.verdict == "failed"
    assert verdict.first_difference is not None
    assert verdict.first_difference.layer == "layers.2"
    assert verdict.cause is not None
    assert (verdict.cause.name, set(verdict.cause.tensors)) == ("tensors-swapped", set(pair))


def test_another_epsilon_in_one_layer_is_found_with_the_layer(export: Path) -> None:
    change(export / "model.onnx", lambda graph: set_epsilon(graph, 1e-2, of="layers.1."))
    verdict = converter.verify(export)

    assert verdict.verdict == "failed"
    assert level(verdict, "arithmetic").status == "passed"
    assert verdict.first_difference is not None
    assert verdict.first_difference.layer == "layers.1"
    assert "computes something else with the right weights" in level(verdict, "numbers").reason


def test_another_epsilon_everywhere_is_named(export: Path) -> None:
    change(export / "model.onnx", lambda graph: set_epsilon(graph, 1e-2, of="layer"))
    verdict = converter.verify(export)

    assert verdict.cause is not None
    assert verdict.cause.name == "layer-norm-epsilon"
    assert "0.01" in verdict.cause.explanation
    assert "reproduces what the file computes: largest difference" in verdict.cause.explanation


def test_a_graph_that_normalises_pixels_itself_is_recognised(export: Path) -> None:
    change(export / "model.onnx", normalise_again)
    verdict = converter.verify(export)

    assert verdict.verdict == "failed"
    assert verdict.cause is not None
    assert verdict.cause.name == "image-normalisation"
    assert "pixels from 0 to 1" in verdict.cause.explanation


def test_another_normalisation_in_the_preprocessor_is_found(export: Path) -> None:
    path = export / "preprocessor_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"image_mean": [0.5, 0.5, 0.5]}))
    verdict = converter.verify(export)

    assert verdict.verdict == "failed"
    assert verdict.cause is not None
    assert verdict.cause.name == "image-normalisation"


def test_a_graph_that_is_right_at_the_recorded_size_only_fails(export: Path) -> None:
    change(export / "model.onnx", lambda graph: change_with_height(graph, 64))
    verdict = converter.verify(export)

    numbers = level(verdict, "numbers")
    assert numbers.status == "failed"
    assert "for pixels of 2x3x32x64" in numbers.reason
    assert [2, 3, 64, 64] in numbers.figures["inputs"]


def test_a_tensor_that_no_output_is_computed_from_does_not_count(export: Path) -> None:
    change(export / "model.onnx", lambda graph: use_a_copy(graph, WEIGHT))
    verdict = converter.verify(export)

    assert level(verdict, "arithmetic").figures["different"] == [WEIGHT]


def test_a_tensor_that_no_output_of_a_program_is_computed_from_does_not_count(
    exported: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "export"
    shutil.copytree(exported("tiny_instance_64_gated", format="torch"), folder)
    program = folder / "model.pt2"
    program_files.change(program, program, lambda e: program_files.use_a_copy(e, WEIGHT))
    verdict = converter.verify(folder, level=2)

    assert level(verdict, "arithmetic").figures["different"] == [WEIGHT]


@pytest.mark.parametrize(
    ("name", "shape", "pixels", "pictures"),
    [
        ("embeddings/Concat", [3, 64, 16], "2x3x64x64", "failed"),
        ("embeddings/Concat", [2, 64, 16], "1x3x64x64", "passed"),
        ("layers.0.attention/Concat", [-1, 21, 4, 16], "2x3x32x64", "passed"),
    ],
    ids=["recorded", "batch", "size"],
)
def test_a_file_that_fails_on_inputs_that_it_says_it_takes_fails(
    export: Path,
    converted: Callable[[str], Path],
    name: str,
    shape: list[int],
    pixels: str,
    pictures: str,
) -> None:
    (export / "conversion.json").unlink()
    change(export / "model.onnx", lambda graph: bake_shape(graph, name, shape))
    verdict = converter.verify(export, made_from=converted("tiny_panoptic_64"))

    assert verdict.verdict == "failed"
    assert level(verdict, "structure").status == "passed"
    assert level(verdict, "arithmetic").status == "passed"
    numbers = level(verdict, "numbers")
    assert numbers.status == "failed"
    assert (
        f"The file fails on pixels of {pixels}, although its input says that it takes any size: "
        "onnxruntime fails to run"
    ) in numbers.reason
    assert level(verdict, "pictures").status == pictures


def limit_batch(program: Any) -> None:
    program_files.limit(program, 0, 2, None)


def limit_sides(program: Any) -> None:
    for axis in (2, 3):
        program_files.limit(program, axis, 5, 6)


@pytest.mark.parametrize(
    ("edit", "untried", "inputs"),
    [
        (limit_batch, "1x3x64x64 were not tried: the batch size is 1", (2, 64, 64, 3, 32, 64)),
        (limit_sides, "1x3x64x64 were not tried: the height is 64", (1, 80, 80, 2, 96, 96)),
        (
            program_files.make_square,
            "2x3x32x64 were not tried: the width is 64, expected 32",
            (1, 64, 64, 2, 32, 32),
        ),
    ],
)
def test_a_right_file_that_does_not_take_the_usual_inputs_passes(
    exported: Callable[..., Path],
    converted: Callable[[str], Path],
    tmp_path: Path,
    edit: Callable[[Any], None],
    untried: str,
    inputs: tuple[int, ...],
) -> None:
    name = "tiny_instance_64_gated"
    source = exported(name, format="torch") / "model.pt2"
    path = program_files.change_json(source, tmp_path / "network.pt2", edit)
    verdict = converter.verify(path, made_from=converted(name), level=3)

    numbers = level(verdict, "numbers")
    assert (verdict.verdict, numbers.status) == ("passed", "passed"), verdict.reason
    assert untried in numbers.reason
    found = [(batch, *size) for batch, _, *size in numbers.figures["inputs"][-2:]]
    assert found == [inputs[:3], inputs[3:]]


def test_another_configuration_beside_a_file_than_the_models_fails(
    export: Path, converted: Callable[[str], Path]
) -> None:
    (export / "conversion.json").unlink()
    path = export / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.4, 0.4, 0.4]}))
    verdict = converter.verify(export, made_from=converted("tiny_panoptic_64"), level=2)

    assert level(verdict, "structure").status == "failed"
    assert "image_mean in preprocessor_config.json" in level(verdict, "structure").reason


def test_a_fault_that_only_pictures_show_is_not_said_to_be_none(export: Path) -> None:
    path = export / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resample": 0}))
    verdict = converter.verify(export)

    assert level(verdict, "pictures").status == "failed"
    assert (verdict.cause, verdict.tried) == (None, ())


class TwoOutputs(torch.nn.Module):
    """A wrapper as people write it."""

    def __init__(self, model: EomtDinov3ForUniversalSegmentation) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = self.model(images)
        return outputs.masks_queries_logits, outputs.class_queries_logits


@pytest.mark.filterwarnings("ignore")  # of the exporter
def test_masked_attention_in_the_graph_of_another_exporter_is_recognised(
    converted: Callable[[str], Path], tmp_path: Path
) -> None:
    model = EomtDinov3ForUniversalSegmentation.from_pretrained(converted("tiny_panoptic_64"))
    model.attn_mask_probs.fill_(1)
    path = tmp_path / "network.onnx"
    torch.onnx.export(
        TwoOutputs(model.eval()).eval(),
        (torch.zeros(1, 3, 64, 64),),
        path,
        dynamo=True,
        opset_version=18,
        external_data=False,
        verbose=False,
    )
    verdict = converter.verify(
        path, recorded=FIXTURES / "tiny_panoptic_64", made_from=converted("tiny_panoptic_64")
    )

    assert level(verdict, "arithmetic").status == "passed"
    assert verdict.first_difference is not None
    assert verdict.first_difference.layer == "layers.2"
    assert verdict.cause is not None
    assert verdict.cause.name == "masked-attention-on"


def test_weights_that_nothing_shows_to_be_right_are_not_called_right(
    export: Path, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    alone = tmp_path / "network.onnx"
    shutil.copy(export / "model.onnx", alone)
    change(alone, lambda graph: set_values(graph, WEIGHT, lambda w: w * 1.5))
    change(alone, lambda graph: set_epsilon(graph, 0.1))
    model = tmp_path / "model"
    shutil.copytree(converted("tiny_panoptic_64"), model)
    (model / "conversion.json").unlink()  # which names a recording
    verdict = converter.verify(alone, made_from=model)

    assert level(verdict, "arithmetic").figures["different"] == [WEIGHT]
    assert level(verdict, "numbers").figures["basis"] == "reference"
    assert level(verdict, "numbers").status == "failed"
    assert "right weights" not in level(verdict, "numbers").reason
    assert "gives other outputs than the file" in level(verdict, "numbers").reason


# other files -------------------------------------------------------------------------------------


def test_a_file_without_anything_beside_it_is_held_against_a_recording(
    export: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "elsewhere" / "network.onnx"
    alone.parent.mkdir()
    shutil.copy(export / "model.onnx", alone)
    verdict = converter.verify(alone, recorded=FIXTURES / "tiny_panoptic_64")

    assert (verdict.verdict, verdict.basis) == ("passed", "original")
    assert level(verdict, "arithmetic").status == "not checked"
    assert level(verdict, "pictures").status == "not checked"


def test_a_models_tensors_are_found_in_a_file_without_names(
    export: Path, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    def rename(graph: onnx.GraphProto) -> None:
        names = {tensor.name: f"onnx::{i}" for i, tensor in enumerate(graph.initializer)}
        for tensor in graph.initializer:
            tensor.name = names[tensor.name]
        for node in graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]

    alone = tmp_path / "network.onnx"
    shutil.copy(export / "model.onnx", alone)
    change(alone, rename)
    verdict = converter.verify(
        alone,
        recorded=FIXTURES / "tiny_panoptic_64",
        made_from=converted("tiny_panoptic_64"),
    )

    assert verdict.verdict == "passed", verdict.reason
    assert level(verdict, "arithmetic").figures["against"] == "the model"
    assert level(verdict, "pictures").status == "passed"


def test_the_named_models_own_recording_is_what_a_file_is_held_against(
    exported: Callable[..., Path], converted: Callable[[str], Path], tmp_path: Path
) -> None:
    alone = tmp_path / "alone" / "theirs.onnx"
    alone.parent.mkdir()
    shutil.copy(exported("tiny_panoptic_64") / "model.onnx", alone)
    verdict = converter.verify(alone, made_from=converted("tiny_panoptic_64"))

    assert (verdict.verdict, verdict.basis) == ("passed", "original"), verdict.reason
    assert level(verdict, "pictures").status == "passed"


def test_a_file_that_nothing_can_be_compared_with_is_not_opened(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = tmp_path / "alone" / "network.onnx"
    alone.parent.mkdir()
    shutil.copy(export / "model.onnx", alone)
    opened: list[OnnxFile] = []
    monkeypatch.setattr(OnnxFile, "open", lambda file, *_: opened.append(file))
    verdict = converter.verify(alone)

    assert level(verdict, "numbers").status == "not checked"
    assert level(verdict, "numbers").figures["providers"]["nodes"] == {}
    assert opened == []


def test_a_provider_that_is_not_there_is_named(export: Path) -> None:
    with pytest.raises(UsageError, match="TensorrtExecutionProvider"):
        converter.verify(export, providers="tensorrt,cpu")


def test_a_session_that_falls_back_to_the_cpu_is_no_proof(export: Path) -> None:
    verdict = converter.verify(export, providers="AzureExecutionProvider")

    assert verdict.verdict == "unverified"
    assert "ran none of the nodes" in level(verdict, "numbers").reason
    assert level(verdict, "numbers").figures["providers"]["nodes"].keys() == {
        "CPUExecutionProvider"
    }


# where models are used ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checkpoint", "format"), [("shapes_panoptic_128", "onnx"), ("tiny_semantic_48", "torch")]
)
def test_segmenting_with_an_export_writes_the_same_segments(
    exported: Callable[..., Path],
    converted: Callable[[str], Path],
    command: Callable[..., Result],
    tmp_path: Path,
    checkpoint: str,
    format: str,
) -> None:
    pictures = sorted((FIXTURES / checkpoint / "images").iterdir())[:2]
    options = {} if format == "onnx" else {"format": format}
    for name, folder in (
        ("model", converted(checkpoint)),
        ("export", exported(checkpoint, **options)),
    ):
        result = command("segment", folder, *pictures, "--output", tmp_path / name)
        assert result.exit_code == 0, result.output
    for picture in pictures:
        for ending in ("segments.png", "overlay.jpg"):
            name = f"{picture.stem}.{ending}"
            assert (tmp_path / "model" / name).read_bytes() == (
                tmp_path / "export" / name
            ).read_bytes()


def test_an_export_is_recorded_with_its_layers(
    exported: Callable[..., Path], tmp_path: Path
) -> None:
    recording = converter.record(
        exported("tiny_panoptic_64"), tmp_path / "recorded", random=1, layers=True
    )

    assert {"patch_embeddings", "hidden_states.0", "last_hidden_state"} < recording.tensors.keys()
    assert (
        converter.verify(exported("tiny_panoptic_64"), recorded=tmp_path / "recorded").verdict
        == "passed"
    )


def test_outputs_of_another_program_are_judged_as_readme_shows(
    exported: Callable[..., Path],
    converted: Callable[[str], Path],
    command: Callable[..., Result],
    tmp_path: Path,
) -> None:
    readme = (FIXTURES.parent / "README.md").read_text(encoding="utf-8")
    shown = readme[readme.index("### Outputs of another program") :].partition("\n### ")[0]
    export, save, judge = re.findall(r"^eomt-convert (.*)", shown, re.M)
    program = re.findall(r"```python\n(.*?)```", shown, re.S)
    assert export == "export shapes_panoptic_128 --output export"  # which takes many seconds
    (tmp_path / "export").symlink_to(exported("shapes_panoptic_128"))
    (tmp_path / "shapes_panoptic_128").symlink_to(converted("shapes_panoptic_128"))
    (tmp_path / "fixtures").symlink_to(FIXTURES)

    assert command(*save.split()).exit_code == 0
    exec(program[0], {})  # noqa: S102
    assert "basis     original" in command(*judge.split()).stdout


# options -----------------------------------------------------------------------------------------


def test_a_fixed_size_that_was_not_recorded_is_held_against_the_reference_model(
    converted: Callable[[str], Path], tmp_path: Path
) -> None:
    done = converter.export(
        converted("tiny_panoptic_64"),
        tmp_path / "export",
        format="torch",  # which takes few seconds
        image_size=(32, 48),
        layers=True,
    )

    assert (done.verdict.verdict, done.verdict.basis) == ("passed", "reference")
    assert done.export.dynamic_axes["pixel_values"] == {"0": "batch"}
    assert done.export.outputs[2] == "patch_embeddings"
    assert "random pixels" in done.verdict.compared_with
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["image_size"] == [32, 48]
    with pytest.raises(UsageError, match="33x48"):
        converter.export(converted("tiny_panoptic_64"), tmp_path / "other", image_size=(33, 48))


def test_an_existing_export_is_only_replaced_with_force_and_without_files_of_others(
    converted: Callable[[str], Path], export: Path
) -> None:
    with pytest.raises(OutputError):
        converter.export(converted("tiny_panoptic_64"), export)
    again: dict[str, Any] = {"force": True, **QUICK}
    converter.export(converted("tiny_panoptic_64"), export, layers=True, verify=False, **again)
    assert len(json.loads((export / "conversion.json").read_text())["export"]["outputs"]) > 2
    assert not (export / "model.onnx").exists()
    (export / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt"):
        converter.export(converted("tiny_panoptic_64"), export, **again)


def test_a_model_that_was_changed_since_its_conversion_is_not_exported_with_its_history(
    model: Path, tmp_path: Path
) -> None:
    weights = load_file(model / "model.safetensors")
    weights[WEIGHT] *= 1.5
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnreadableFileError, match=r"model\.safetensors was changed since"):
        converter.export(model, tmp_path / "export", **QUICK)

    (model / "conversion.json").unlink()
    done = converter.export(model, tmp_path / "export", **QUICK)
    assert converter.verify(tmp_path / "export").verdict == done.verdict.verdict == "passed"


def test_a_model_without_register_tokens_is_exported(tmp_path: Path) -> None:
    folder = save_small(tmp_path / "model", num_register_tokens=0)
    done = converter.export(folder, tmp_path / "export", **QUICK)

    assert done.verdict.verdict == "passed", done.verdict.reason
    assert level(done.verdict, "arithmetic").status == "passed"


def test_a_model_is_not_replaced_by_its_export(model: Path) -> None:
    with pytest.raises(UsageError, match="is the model itself"):
        converter.export(model, model, force=True)
    assert (model / "model.safetensors").is_file()


@pytest.fixture
def perturbed(tmp_path: Path) -> Path:
    """A recording that no right model gives."""
    tensors = load_file(FIXTURES / "tiny_panoptic_64" / "recorded.safetensors")
    tensors["class_logits"] = tensors["class_logits"] + 1
    (tmp_path / "perturbed").mkdir()
    save_file(tensors, tmp_path / "perturbed" / "recorded.safetensors")
    return tmp_path / "perturbed"


def test_an_export_that_fails_is_only_kept_beside_the_output(
    converted: Callable[[str], Path],
    perturbed: Path,
    command: Callable[..., Result],
    tmp_path: Path,
) -> None:
    options = ("--output", "export", "--recorded", perturbed, *QUICKLY)
    result = command("export", converted("tiny_panoptic_64"), *options, "--keep-unverified")

    assert result.exit_code == 3
    assert "class_logits differs" in result.stderr
    assert not (tmp_path / "export").exists()
    kept = json.loads((tmp_path / "export.unverified" / "conversion.json").read_text())
    assert kept["export"]["verdict"]["verdict"] == "failed"


def test_a_recording_in_the_models_folder_is_its_own(
    converted: Callable[[str], Path], perturbed: Path, tmp_path: Path
) -> None:
    shutil.copytree(converted("tiny_panoptic_64"), tmp_path / "model")
    shutil.copytree(perturbed, tmp_path / "model" / "recorded")

    assert converter.verify(tmp_path / "model").verdict == "failed"


# float16 -----------------------------------------------------------------------------------------


def test_float16_is_held_against_the_recording_as_closely_as_it_allows(
    exported: Callable[..., Path], converted: Callable[[str], Path]
) -> None:
    folder = exported("tiny_panoptic_64", dtype="float16", image_size=64)
    verdict = converter.verify(folder, made_from=converted("tiny_panoptic_64"))

    assert (verdict.verdict, verdict.basis) == ("passed", "original"), verdict.reason
    assert "computed in float16, as closely as 16 bits allow" in verdict.compared_with
    assert level(verdict, "structure").figures["dtypes"] == ["F16"]
    assert level(verdict, "arithmetic").status == "passed"
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    assert {port.type for port in session.get_outputs()} == {"tensor(float)"}


def save_small(folder: Path, *, factor: float = 1, **changes: Any) -> Path:
    """A small model of random weights, and one weight larger by a factor, as a converted folder."""
    model = small_model(**changes)
    model.attn_mask_probs.zero_()
    with torch.no_grad():
        model.get_parameter(WEIGHT).mul_(factor)
    model.eval().save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 64}
    EomtImageProcessor(size=size).save_pretrained(folder)
    return folder


@pytest.fixture
def overflowing(tmp_path: Path) -> Path:
    """A model whose second layer computes values that float16 does not hold."""
    return save_small(tmp_path / "overflowing", factor=3e4)


def test_activations_that_overflow_float16_are_refused_and_found(
    overflowing: Path, command: Callable[..., Result], tmp_path: Path
) -> None:
    options = ("--output", "export", "--dtype", "float16", *QUICKLY)
    result = command("export", overflowing, *options)

    assert result.exit_code == 1
    assert "layers.1.mlp.up_proj overflows float16" in result.stderr
    assert not (tmp_path / "export").exists()

    result = command("export", overflowing, *options, "--no-verify")
    assert result.exit_code == 0, result.stderr
    verdict = converter.verify(tmp_path / "export")
    assert verdict.cause is not None
    assert verdict.cause.name == "activation-overflow"
    assert "layers.1.mlp.up_proj" in verdict.cause.explanation


def test_weights_that_overflow_float16_are_refused_without_verification_too(
    overflowing: Path, command: Callable[..., Result], tmp_path: Path
) -> None:
    weights = load_file(overflowing / "model.safetensors")
    weights[WEIGHT] *= 1e3
    save_file(weights, overflowing / "model.safetensors", {"format": "pt"})
    options = ("--output", "export", "--dtype", "float16", "--no-verify")
    result = command("export", overflowing, *options)

    assert result.exit_code == 1
    assert f"{WEIGHT} overflows float16" in result.stderr
    assert not (tmp_path / "export").exists()


def test_numbers_that_no_kernel_can_compute_are_not_checked(
    exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lack(self: OnnxFile, *_: Any) -> Any:
        raise MissingKernelError("onnxruntime cannot run it: Gelu(20) is not implemented.")

    monkeypatch.setattr(OnnxFile, "open", lack)
    verdict = converter.verify(exported("tiny_panoptic_64"))

    assert verdict.verdict == "unverified"
    assert {each.level: each.status for each in verdict.levels[:4]} == {
        "structure": "passed",
        "arithmetic": "passed",
        "numbers": "not checked",
        "pictures": "not checked",
    }
    assert "Gelu" in verdict.reason


# what computes it --------------------------------------------------------------------------------


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_provider_that_computes_something_else_is_the_cause_if_the_cpu_does_not(
    exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, on_cpu: bool
) -> None:
    provider = "AzureExecutionProvider"
    usual = OnnxFile.open

    def open_wrongly(self: OnnxFile, providers: Sequence[str] = (), layers: int = 0) -> Any:
        if provider not in providers and not on_cpu:
            raise MissingKernelError("onnxruntime cannot run it: Gelu(20) is not implemented.")
        session = usual(self, providers, layers)
        if provider not in providers:
            return session

        class Wrong:
            def run(self, pixel_values: Any) -> Any:
                return {name: 1.1 * output for name, output in session.run(pixel_values).items()}

            def nodes_by_provider(self) -> dict[str, int]:
                return {provider: 100}

        return Wrong()

    monkeypatch.setattr(OnnxFile, "open", open_wrongly)
    verdict = converter.verify(exported("tiny_panoptic_64"), providers=provider)

    assert verdict.verdict == "failed"
    assert (verdict.cause is not None and verdict.cause.name == "provider") is on_cpu


def test_an_export_has_the_panoptic_quality_of_its_model(
    exported: Callable[..., Path], converted: Callable[[str], Path]
) -> None:
    data = FIXTURES / "shapes_panoptic_128" / "val"
    ours, models = (
        evaluate(folder, "coco-panoptic", data)
        for folder in (exported("shapes_panoptic_128"), converted("shapes_panoptic_128"))
    )

    assert ours.metrics == pytest.approx(models.metrics, abs=1e-9)
    assert [count_of(row) for row in ours.per_class] == [count_of(row) for row in models.per_class]


def count_of(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if isinstance(value, int)}


def test_a_fixed_size_that_the_configuration_beside_it_does_not_have_fails(
    export: Path,
) -> None:
    def fix(graph: onnx.GraphProto) -> None:
        for axis in (2, 3):
            graph.input[0].type.tensor_type.shape.dim[axis].dim_value = 64

    change(export / "model.onnx", fix)
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps({**config, "image_size": 128}))
    problems = level(converter.verify(export), "structure").figures["problems"]

    assert any("image_size in config.json is [128, 128]" in problem for problem in problems)


def test_tensors_in_another_type_than_most_are_compared_in_their_own(
    export: Path, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    def store_in_float16(graph: onnx.GraphProto) -> None:
        """Stores the weight in float16, and casts it."""
        set_values(graph, WEIGHT, lambda weight: weight.astype(np.float16))
        for node in graph.node:
            node.input[:] = ["cast" if name == WEIGHT else name for name in node.input]
        cast = onnx.helper.make_node("Cast", [WEIGHT], ["cast"], "cast", to=onnx.TensorProto.FLOAT)
        graph.node.insert(0, cast)

    alone = tmp_path / "mixed.onnx"
    shutil.copy(export / "model.onnx", alone)
    change(alone, store_in_float16)
    verdict = converter.verify(alone, made_from=converted("tiny_panoptic_64"))

    assert level(verdict, "arithmetic").status == "passed", verdict.reason
    figures = level(verdict, "numbers").figures
    assert figures["relative_tolerance"] == FLOAT32.relative  # most is computed in float32
    change(alone, lambda graph: set_values(graph, WEIGHT, lambda weight: weight * np.float16(1.5)))
    verdict = converter.verify(alone, made_from=converted("tiny_panoptic_64"))
    assert level(verdict, "arithmetic").figures["different"] == [WEIGHT]


def to_bfloat16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return torch.from_numpy(values).bfloat16().float().numpy()


@pytest.mark.numbers
def test_weights_that_were_rounded_to_bfloat16_are_recognised_in_a_file_alone(
    export: Path, tmp_path: Path
) -> None:
    def round_all(graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT:
                set_values(graph, tensor.name, to_bfloat16)

    alone = tmp_path / "alone" / "theirs.onnx"
    alone.parent.mkdir()
    shutil.copy(export / "model.onnx", alone)
    change(alone, round_all)
    verdict = converter.verify(alone, recorded=FIXTURES / "tiny_panoptic_64")

    assert verdict.verdict == "passed", verdict.reason
    assert "as closely as weights in bfloat16 allow" in verdict.compared_with


def test_weights_in_bfloat16_are_allowed_their_rounding_also_in_float16(tmp_path: Path) -> None:
    converter.convert("tiny_panoptic_64", tmp_path / "model", dtype="bfloat16")
    done = converter.export(tmp_path / "model", tmp_path / "export", dtype="float16", **QUICK)

    figures = level(done.verdict, "numbers").figures
    assert done.verdict.verdict == "passed", done.verdict.reason
    assert figures["relative_tolerance"] == ROUNDED["bfloat16"].relative
    assert figures["rounded_to"] == "bfloat16"


def test_one_rounded_tensor_does_not_widen_the_tolerance_of_all(export: Path) -> None:
    change(export / "model.onnx", lambda graph: set_values(graph, WEIGHT, to_bfloat16))
    verdict = converter.verify(export)

    assert level(verdict, "arithmetic").figures["different"] == [WEIGHT]
    assert level(verdict, "numbers").figures["relative_tolerance"] == FLOAT32.relative


def test_without_a_normalisation_for_its_channels_a_file_is_not_run(tmp_path: Path) -> None:
    model = save_small(tmp_path / "model", num_channels=1)
    preprocessor = json.loads((model / "preprocessor_config.json").read_text())
    preprocessor |= {"image_mean": [0.5], "image_std": [0.2]}
    (model / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    done = converter.export(model, tmp_path / "export", **QUICK)
    assert done.verdict.verdict == "passed", done.verdict.reason

    (tmp_path / "export" / "preprocessor_config.json").unlink()
    (tmp_path / "export" / "conversion.json").unlink()
    verdict = converter.verify(tmp_path / "export")
    assert verdict.verdict == "unverified"
    assert "1 channels are normalised is not known" in verdict.reason


def test_a_file_of_another_models_shapes_fails(
    export: Path, converted: Callable[[str], Path]
) -> None:
    shutil.copy(converted("tiny_semantic_48") / "config.json", export)
    verdict = converter.verify(export, recorded=FIXTURES / "tiny_panoptic_64")

    assert verdict.verdict == "failed"
    problems = level(verdict, "structure").figures["problems"]
    assert any("has the shape" in problem for problem in problems)
