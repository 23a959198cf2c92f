"""Recordings of exported files: what computed them, and what they are evidence for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from click.testing import Result
from conftest import FIXTURES
from exported_files import change, set_epsilon
from safetensors.torch import load_file, save_file

import converter
from converter.checks.recorded import known_recordings, read_recorded
from converter.checks.verdict import Level, Verdict, read_record
from converter.errors import EomtConvertError, UsageError
from converter.runtimes.network import open_exported
from converter.runtimes.providers import parse_providers

NAME = "tiny_panoptic_64"


def numbers(verdict: converter.Verdict) -> Level:
    return next(level for level in verdict.levels if level.level == "numbers")


def structure(verdict: converter.Verdict) -> Level:
    return verdict.levels[0]


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def as_0_1_wrote_it(content: dict[str, Any]) -> None:
    content["provenance"]["implementation"] = "eomt-convert 0.1.0, reference model"
    content["provenance"]["dtype"] = "float32"
    del content["provenance"]["recorded_by"], content["model"]["rounded_to"]


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny_panoptic_64, converted to a 16-bit type; not to be written to."""
    folder = tmp_path_factory.mktemp("rounded")

    def convert(dtype: Any) -> Path:
        place = folder / str(dtype)
        if not place.exists():
            converter.convert(NAME, place, dtype=dtype, verify=False)
        return place

    return convert


@pytest.fixture(scope="module")
def in_float16(exported: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of an export that computes in float16; not to be written to."""
    folder = tmp_path_factory.mktemp("in_float16") / "recorded"
    converter.record(exported(NAME, dtype="float16", image_size=64), folder, random=2, layers=True)
    return folder


@pytest.fixture(scope="module")
def in_float32(exported: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of an export that computes in float32; not to be written to."""
    folder = tmp_path_factory.mktemp("in_float32") / "recorded"
    converter.record(exported(NAME), folder, random=1)
    return folder


@pytest.fixture(scope="module")
def widened(rounded: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export in float32 of weights in bfloat16; not to be written to."""
    folder = tmp_path_factory.mktemp("widened") / "export"
    # a program of one size is traced in the least time
    converter.export(rounded("bfloat16"), folder, format="torch", image_size=64, verify=False)
    return folder


# what computed it --------------------------------------------------------------------------------


def test_a_recording_says_what_computed_it_and_in_which_type(in_float16: Path) -> None:
    content = json.loads((in_float16 / "recorded.json").read_text())
    version = onnxruntime.__version__

    provenance = content["provenance"]
    assert provenance["recorded_by"] == {
        "runtime": "onnxruntime",
        "version": version,
        "dtype": "float16",
    }
    assert provenance["implementation"].endswith(f", onnxruntime {version}")
    assert provenance["dtype"] == "float16"
    assert "attention" not in provenance
    assert content["model"]["rounded_to"] == "float16"
    origin = read_recorded(in_float16 / "recorded.safetensors").origin
    assert (origin.recorded_by, origin.computed_in) == ("export", "float16")


def test_weights_that_were_rounded_before_they_were_exported_are_recorded_so(
    widened: Path, tmp_path: Path
) -> None:
    converter.record(widened, tmp_path / "recorded", random=1)
    model = json.loads((tmp_path / "recorded/recorded.json").read_text())["model"]
    verdict = converter.verify(widened, recorded=tmp_path / "recorded")

    assert (model["dtypes"], model["rounded_to"]) == (["F32"], "bfloat16")
    assert numbers(verdict).figures["relative_tolerance"] == 1e-5
    assert verdict.verdict == "passed"
    assert "bfloat16" not in verdict.compared_with


@pytest.mark.parametrize("old", [False, True])
def test_a_right_model_passes_beside_what_its_export_computed_in_float16(
    in_float16: Path, rounded: Callable[[str], Path], tmp_path: Path, old: bool
) -> None:
    recorded = Path(shutil.copytree(in_float16, tmp_path / "recorded"))
    if old:
        edit_json(recorded / "recorded.json", as_0_1_wrote_it)
    verdict = converter.verify(rounded("float16"), recorded=recorded)

    assert (verdict.verdict, verdict.basis) == ("passed", "reference"), verdict.reason
    assert verdict.compared_with.startswith("outputs of an exported file: nothing has changed")
    assert verdict.compared_with.endswith(
        "computed in float32, the recording in float16, as closely as 16 bits allow: faults "
        "smaller than its rounding do not show"
    )


@pytest.mark.numbers
def test_a_wrong_model_fails_beside_what_an_export_computed_in_float16(
    in_float16: Path, rounded: Callable[[str], Path], tmp_path: Path
) -> None:
    wrong = Path(shutil.copytree(rounded("float16"), tmp_path / "wrong"))
    (wrong / "conversion.json").unlink()
    weights = load_file(wrong / "model.safetensors")
    query, key = (f"layers.1.attention.{part}_proj.weight" for part in "qk")
    weights[query], weights[key] = weights[key], weights[query]
    save_file(weights, wrong / "model.safetensors", {"format": "pt"})
    verdict = converter.verify(wrong, recorded=in_float16)

    assert (verdict.verdict, verdict.cause) == ("failed", None)
    assert verdict.first_difference is not None
    assert verdict.first_difference.layer == "layers.1"
    assert "too coarsely" in verdict.tried[0].reason


def test_outputs_of_another_program_pass_beside_what_an_export_computed_in_float16(
    in_float16: Path, rounded: Callable[[str], Path], tmp_path: Path
) -> None:
    converter.record(rounded("float16"), tmp_path / "model", random=2)
    outputs = load_file(tmp_path / "model/recorded.safetensors")
    del outputs["pixels"]
    save_file(outputs, tmp_path / "outputs.safetensors")

    verdict = converter.verify_outputs(tmp_path / "outputs.safetensors", recorded=in_float16)
    assert verdict.verdict == "passed", verdict.reason


def test_a_model_computed_in_16_bits_passes_beside_what_an_export_computed_in_them(
    in_float16: Path, rounded: Callable[[str], Path]
) -> None:
    verdict = converter.verify(rounded("float16"), recorded=in_float16, dtype="float16")

    assert verdict.verdict == "passed", verdict.reason
    assert "; then computed in float16, the recording in float16" in verdict.compared_with


# what it is evidence for -------------------------------------------------------------------------


def test_the_same_file_passes_on_the_basis_of_its_recording_whatever_its_name(
    in_float32: Path, exported: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exported(NAME), tmp_path / "export"))
    (folder / "model.onnx").rename(folder / "network.onnx")
    verdict = converter.verify(folder / "network.onnx", recorded=in_float32)

    assert verdict.basis == "original"
    assert verdict.compared_with.startswith("outputs of an exported file, recorded from exactly")


def test_another_graph_with_the_same_tensors_does_not_pass_on_its_basis(
    in_float32: Path, exported: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exported(NAME), tmp_path / "export"))
    change(folder / "model.onnx", lambda graph: set_epsilon(graph, 1.001e-5, of="layers.1."))
    verdict = converter.verify(folder / "model.onnx", recorded=in_float32)

    assert (numbers(verdict).status, numbers(verdict).figures["basis"]) == ("passed", "reference")


def test_the_basis_of_a_model_is_none_of_its_export(
    exported: Callable[..., Path], converted: Callable[[str], Path], tmp_path: Path
) -> None:
    converter.record(converted(NAME), tmp_path / "recorded", random=1)

    assert converter.verify(exported(NAME), recorded=tmp_path / "recorded").basis == "reference"


# what a verdict says -----------------------------------------------------------------------------


def test_an_export_in_float16_says_so_beside_a_recording_of_the_float16_model(
    exported: Callable[..., Path], rounded: Callable[[str], Path], tmp_path: Path
) -> None:
    converter.record(rounded("float16"), tmp_path / "recorded", random=1)
    verdict = converter.verify(
        exported(NAME, dtype="float16", image_size=64), recorded=tmp_path / "recorded"
    )

    assert numbers(verdict).figures["relative_tolerance"] == 0.01
    assert verdict.compared_with.endswith(
        "; computed in float16, as closely as 16 bits allow: faults smaller than its rounding do "
        "not show"
    )


@pytest.mark.numbers
def test_rounded_weights_are_no_excuse_beside_the_same_weights(
    widened: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(widened, tmp_path / "export"))
    (folder / "conversion.json").unlink()  # which names a recording
    verdict = converter.verify(folder)

    assert numbers(verdict).figures["relative_tolerance"] == 1e-5
    assert verdict.compared_with == (
        "outputs of the reference model with the same weights, for random pixels: the file "
        "computes what the reference model computes with the weights in the file, but this does "
        "not show that they are right"
    )


def test_weights_that_were_compared_are_those_of_the_model(
    widened: Path, rounded: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(widened, tmp_path / "export"))
    model = Path(shutil.copytree(rounded("bfloat16"), tmp_path / "model"))
    for each in (folder, model):
        (each / "conversion.json").unlink()
    verdict = converter.verify(folder, made_from=model)

    assert "it computes what the model computes" in verdict.compared_with


def test_a_stored_verdict_keeps_what_it_was_computed_in() -> None:
    figures = {"relative_tolerance": 0.01, "basis": "original", "recorded_by": "original"}
    level = Level("numbers", "passed", figures={**figures, "computed_in": "float16"})
    stored = Verdict((level,)).record()

    found = read_record(stored, known_recordings())
    assert "computed in float16" in found.compared_with
    assert "weights in" not in found.compared_with
    stored["levels"][0]["figures"]["computed_in"] = "**bold**"
    with pytest.raises(ValueError, match="computed_in is unknown"):
        read_record(stored, known_recordings())


@pytest.mark.parametrize("kind", ["model", "export"])
def test_an_export_in_the_folder_that_was_not_checked_is_named(
    exported: Callable[..., Path],
    converted: Callable[[str], Path],
    command: Callable[..., Result],
    tmp_path: Path,
    kind: str,
) -> None:
    beside = {"model": "model.onnx", "export": "model.pt2"}[kind]
    folder = tmp_path / "my folder"
    shutil.copytree(converted(NAME) if kind == "model" else exported(NAME), folder)
    (folder / beside).write_bytes(b"anything")

    remark = (
        f"{beside} in this folder was not checked: eomt-convert verify '{folder / beside}' does."
    )
    verdict = converter.verify(folder, recorded=FIXTURES / NAME)
    assert (verdict.verdict, structure(verdict).reason) == ("passed", remark)
    assert beside in command("verify", folder, "--level", 1).stdout
    if kind == "export":
        assert structure(converter.verify(folder / "model.onnx", level=1)).reason == ""


# where it runs -----------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Lets onnxruntime seem to have a CUDA provider, which the CPU's stands in for."""
    asked: list[Any] = []
    usual = onnxruntime.InferenceSession

    class Session(usual):  # type: ignore[misc, valid-type]
        def __init__(self, *given: Any, providers: Any, **options: Any) -> None:
            asked.append(providers)
            super().__init__(*given, providers=["CPUExecutionProvider"], **options)

        def get_providers(self) -> list[str]:
            return [name for name, _ in asked[-1]]

    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    return asked


@pytest.mark.parametrize(("device", "number"), [("cuda", 0), ("cuda:1", 1)])
def test_an_export_is_checked_and_recorded_on_the_gpu_with_the_given_number(
    exported: Callable[..., Path], gpu: list[Any], tmp_path: Path, device: str, number: int
) -> None:
    recording = converter.record(exported(NAME), tmp_path / "recorded", random=1, device=device)

    assert len(gpu) > 1
    assert all(
        providers
        == [("CUDAExecutionProvider", {"device_id": number}), ("CPUExecutionProvider", {})]
        for providers in gpu
    )
    # the stand-in ran no node
    assert "CUDAExecutionProvider was asked for" in numbers(recording.verdict).reason
    content = json.loads((tmp_path / "recorded/recorded.json").read_text())
    assert content["provenance"]["device"] == device


# the folder for its profile is removed with the session
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_session_without_the_gpu_that_was_asked_for_is_an_error(
    exported: Callable[..., Path], gpu: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(session, "get_providers", lambda _: ["CPUExecutionProvider"])
    with pytest.raises(EomtConvertError, match="CUDAExecutionProvider, but cannot load it"):
        open_exported(exported(NAME) / "model.onnx", exported(NAME), "cuda")


def test_an_export_is_not_recorded_where_it_cannot_run(
    exported: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="cannot run on 'mps'"):
        converter.record(exported(NAME), tmp_path / "recorded", random=1, device="mps")


def test_only_providers_for_gpus_have_a_number(gpu: list[Any]) -> None:
    assert parse_providers("cuda:1,cpu") == ("CUDAExecutionProvider:1", "CPUExecutionProvider")
    for malformed in ("cpu:1", "cuda:", "cuda:x"):
        with pytest.raises(UsageError, match="is no provider"):
            parse_providers(malformed)
