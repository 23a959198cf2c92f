"""Recording what a model computes, and holding models against the recording."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import digests
import pytest
import torch
from click.testing import Result
from conftest import FIXTURES
from hub_server import Hub
from PIL import Image
from safetensors.torch import load_file, save_file

import converter
from converter.checks.comparison import FLOAT32, TOLERANCE, equal_pixels
from converter.checks.recording import Recording, record
from converter.checks.verdict import LEVELS
from converter.errors import (
    EomtConvertError,
    OutputError,
    OutputsDifferError,
    UnreadableFileError,
    UsageError,
)

pytestmark = pytest.mark.numbers

LOGITS = {"mask_logits", "class_logits"}
PIPELINES = {"tiny_panoptic_64": "pipeline.pixels", "tiny_semantic_48": "pipeline.crops"}


def read_recorded(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "recorded.safetensors")


def read_provenance(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "recorded.json").read_text())
    return content


def tensor_digests(model: Path) -> dict[str, str]:
    tensors = load_file(model / "model.safetensors")
    return digests.of_tensors(tensors)


def change(file: Path, name: str, edit: Callable[[torch.Tensor], object]) -> None:
    tensors = load_file(file)
    edit(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def recorded(
    converted: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Recording:
    """A recording of tiny_panoptic_64 with every kind of output; not to be written to."""
    folder = tmp_path_factory.mktemp("recording") / "recorded"
    return record(converted("tiny_panoptic_64"), folder, random=2, layers=True)


@pytest.mark.parametrize("name", ["tiny_panoptic_48x80", "tiny_instance_64_gated"])
def test_a_model_gives_what_was_recorded_of_it_to_the_last_bit(
    name: str, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    record(converted(name), tmp_path / "recorded", random=2, layers=True)

    verdict = converter.verify(converted(name), recorded=tmp_path / "recorded", level=3)

    assert verdict.verdict == "passed"
    figures = verdict.levels[2].figures
    assert figures["max_abs"] == 0
    original = read_recorded(FIXTURES / name)
    skipped = ("pipeline.", "backbone.")  # of the pictures, and of another model
    assert set(read_recorded(tmp_path / "recorded")) == {
        tensor for tensor in original if not tensor.startswith(skipped)
    }
    assert set(figures["compared"]) == {
        tensor for tensor in original if not tensor.startswith((*skipped, "rope.", "pixels"))
    }


@pytest.mark.parametrize("name", PIPELINES)
def test_pictures_are_recorded_as_the_original_prepares_them(
    name: str, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    pictures = sorted((FIXTURES / name / "images").iterdir())

    record(converted(name), tmp_path / "recorded", images=pictures)

    ours, original = read_recorded(tmp_path / "recorded"), read_recorded(FIXTURES / name)
    assert torch.equal(ours["pixels"], original[PIPELINES[name]])
    for logits in LOGITS:
        difference = (ours[logits] - original[f"pipeline.{logits}"]).abs().max()
        assert difference <= TOLERANCE


@pytest.mark.parametrize(
    "name",
    ["tiny_panoptic_64", "shapes_panoptic_128", "tiny_semantic_48", "tiny_instance_64_gated"],
)
def test_pictures_and_their_segments_are_recorded_as_those_of_the_original(
    name: str, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    pictures = sorted((FIXTURES / name / "images").iterdir())

    record(converted(name), tmp_path / "recorded", images=pictures)

    ours, original = read_recorded(tmp_path / "recorded"), read_recorded(FIXTURES / name)
    pipeline = {tensor for tensor in original if tensor.startswith("pipeline.")}
    scores = {tensor for tensor in pipeline if tensor.endswith("semantic_scores")}
    assert {tensor for tensor in ours if tensor.startswith("pipeline.")} == pipeline - scores
    for tensor in pipeline:
        if tensor.endswith((".semantic", "@0.8", "@0.3")):
            assert equal_pixels(ours[tensor], original[tensor]) >= FLOAT32.equal_pixels
    for index, picture in enumerate(pictures):
        kept = tmp_path / "recorded" / "images" / f"{index}.png"
        with Image.open(kept) as found, Image.open(picture) as expected:
            assert found.tobytes() == expected.convert("RGB").tobytes()


@pytest.mark.parametrize("name", ["tiny_panoptic_64", "tiny_semantic_48", "tiny_instance_64_gated"])
def test_other_preprocessing_fails_against_a_recording_of_pictures(
    name: str, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    pictures = sorted((FIXTURES / name / "images").iterdir())
    record(converted(name), tmp_path / "recorded", images=pictures)
    model = Path(shutil.copytree(converted(name), tmp_path / "model"))
    (model / "conversion.json").unlink()

    right = converter.verify(model, recorded=tmp_path / "recorded")
    preprocessor = json.loads((model / "preprocessor_config.json").read_text())
    (model / "preprocessor_config.json").write_text(json.dumps(preprocessor | {"resample": 3}))
    wrong = converter.verify(model, recorded=tmp_path / "recorded")

    level = right.levels[LEVELS.index("pictures")]
    assert (right.verdict, level.status) == ("passed", "passed")
    assert (level.figures["max_abs"], level.figures["equal_pixels"]) == (0, 1)
    assert wrong.verdict == "failed"
    assert wrong.reason.startswith("resample in preprocessor_config.json is 3")


def test_a_picture_is_stored_without_the_other_data_of_its_file(
    model: Path, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise shows it upright
    exif[0x010E] = "taken at home"
    picture = tmp_path / "me & you <b>.jpg"
    with Image.open(FIXTURES / "tiny_panoptic_64/images/0.png") as image:
        image.save(picture, exif=exif, comment=b"secret", icc_profile=b"profile")

    record(model, tmp_path / "recorded", images=[picture])

    (kept,) = (tmp_path / "recorded/images").iterdir()
    with Image.open(kept) as found:
        assert (found.size, found.info) == ((70, 90), {})
    assert kept.name == "0.png"
    assert converter.verify(model, recorded=tmp_path / "recorded").verdict == "passed"


@pytest.mark.parametrize("given", [{"random": 1}, {"images": True, "image_size": (32, 48)}])
def test_random_and_resized_inputs_are_recorded_without_pictures(
    given: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    if "images" in given:
        given = given | {"images": sorted((FIXTURES / "tiny_panoptic_64/images").iterdir())}

    record(model, tmp_path / "recorded", **given)

    assert not (tmp_path / "recorded/images").exists()
    level = converter.verify(model, recorded=tmp_path / "recorded").levels[LEVELS.index("pictures")]
    assert (level.status, level.reason) == ("not checked", "The recording has no pictures.")


def test_a_model_with_an_unknown_task_is_recorded_without_segments(
    model: Path, tmp_path: Path
) -> None:
    (model / "conversion.json").unlink()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"stuff_classes": []}))

    record(model, tmp_path / "recorded", images=[FIXTURES / "tiny_panoptic_64/images/0.png"])

    assert read_provenance(tmp_path / "recorded")["task"] is None
    level = converter.verify(model, recorded=tmp_path / "recorded").levels[LEVELS.index("pictures")]
    assert level.status == "passed"
    assert "results: the recording has none for its task" in level.reason


def test_a_model_whose_pictures_fail_is_not_recorded(
    converted: Callable[[str], Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(converted("tiny_semantic_48"), tmp_path / "model"))
    preprocessor = json.loads((model / "preprocessor_config.json").read_text())
    (model / "preprocessor_config.json").write_text(json.dumps(preprocessor | {"resample": 3}))
    history = json.loads((model / "conversion.json").read_text())
    del history["files"]["preprocessor_config.json"]
    (model / "conversion.json").write_text(json.dumps(history))

    with pytest.raises(OutputsDifferError) as refused:
        record(model, tmp_path / "recorded", random=1)

    assert "resample in preprocessor_config.json is 3" in refused.value.verdict.reason


def test_recording_pictures_again_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    picture = FIXTURES / "tiny_panoptic_64/images/1.png"
    for place in ("one", "two"):
        record(model, tmp_path / place, images=[picture])

    for file in ("recorded.safetensors", "recorded.json", "images/0.png"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_recording_again_gives_the_same_bytes(
    recorded: Recording, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    again = record(converted("tiny_panoptic_64"), tmp_path / "again", random=2, layers=True)

    for file in ("recorded.safetensors", "recorded.json"):
        assert (again.folder / file).read_bytes() == (recorded.folder / file).read_bytes()


def test_another_seed_is_another_input(
    recorded: Recording, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    other = record(converted("tiny_panoptic_64"), tmp_path / "other", random=2, seed=1)

    first, second = (read_recorded(folder)["pixels"] for folder in (recorded.folder, other.folder))
    assert not torch.equal(first, second)
    assert first.min() < 5
    assert first.max() > 250


@pytest.mark.parametrize("name", ["mask_logits", "hidden_states.1", "masked.class_logits.1"])
def test_a_recorded_value_that_is_changed_fails_verification(
    recorded: Recording, converted: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(recorded.folder, tmp_path / "recorded"))
    change(folder / "recorded.safetensors", name, lambda tensor: tensor.view(-1)[-1].add_(0.01))
    (folder / "recorded.json").unlink()  # it belongs to the file before the change

    verdict = converter.verify(converted("tiny_panoptic_64"), recorded=folder, level=3)

    assert verdict.verdict == "failed"
    assert verdict.first_difference
    assert verdict.first_difference.tensor == name


def test_a_later_change_of_the_model_is_detected(recorded: Recording, model: Path) -> None:
    change(model / "model.safetensors", "layers.2.mlp.up_proj.bias", lambda bias: bias.add_(0.1))
    (model / "conversion.json").unlink()

    verdict = converter.verify(model, recorded=recorded.folder, level=3)

    assert verdict.verdict == "failed"
    assert verdict.first_difference
    assert verdict.first_difference.layer == "layers.2"


def test_without_layers_only_logits_are_kept(model: Path, tmp_path: Path) -> None:
    recording = record(model, tmp_path / "recorded", random=3)

    tensors = read_recorded(tmp_path / "recorded")
    assert set(tensors) == LOGITS | {"pixels"}
    assert all(len(tensor) == 3 for tensor in tensors.values())
    assert recording.size == (tmp_path / "recorded/recorded.safetensors").stat().st_size


def test_hidden_states_are_those_of_the_first_input_only(recorded: Recording) -> None:
    tensors = read_recorded(recorded.folder)
    assert len(tensors["hidden_states.0"]) == len(tensors["last_hidden_state"]) == 1
    assert len(tensors["masked.mask_logits.0"]) == len(tensors["mask_logits"]) == 2


@pytest.mark.parametrize("source", ["pictures", "random"])
def test_a_smaller_input_makes_a_smaller_recording(
    recorded: Recording, model: Path, tmp_path: Path, source: str
) -> None:
    pictures = sorted((FIXTURES / "tiny_panoptic_64/images").iterdir())
    given: dict[str, Any] = {"images": pictures} if source == "pictures" else {"random": 2}

    small = record(model, tmp_path / "small", **given, layers=True, image_size=(32, 48))

    assert small.tensors["pixels"] == ("U8", (2, 3, 32, 48))
    assert small.size < recorded.size / 1.5
    assert converter.verify(model, recorded=tmp_path / "small", level=3).verdict == "passed"


def test_recorded_json_says_from_what_and_how_it_was_made(model: Path, tmp_path: Path) -> None:
    picture = FIXTURES / "tiny_panoptic_64/images/1.png"

    record(model, tmp_path / "recorded", images=[picture], threads=1)

    found = read_provenance(tmp_path / "recorded")
    assert found["sha256"] == {
        name: digests.of_file(tmp_path / "recorded" / name)
        for name in ("recorded.safetensors", "images/0.png")
    }
    assert (found["task"], found["stuff_classes"]) == ("panoptic", [4, 5, 6])
    assert found["input"] == {"images": [{"name": "1.png", "sha256": digests.of_file(picture)}]}
    assert found["model"] == {
        "repo": None,
        "checkpoint": "tiny_panoptic_64",
        "dtypes": ["F32"],
        "rounded_to": None,
        "verified": {
            "structure": "passed",
            "arithmetic": "passed",
            "numbers": "passed",
            "pictures": "passed",
        },
        "verdict": "passed",
        "basis": "original",
        "tensors": tensor_digests(model),
        "files": [
            {"name": name, "sha256": digests.of_file(model / name)}
            for name in ("config.json", "preprocessor_config.json", "model.safetensors")
        ],
    }
    provenance = found["provenance"]
    assert provenance["torch"] == torch.__version__
    assert (provenance["dtype"], provenance["device"], provenance["threads"]) == (
        "float32",
        "cpu",
        1,
    )


def test_the_attention_kernels_that_were_allowed_are_recorded(model: Path, tmp_path: Path) -> None:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        record(model, tmp_path / "recorded", random=1)

    assert read_provenance(tmp_path / "recorded")["provenance"]["attention_kernels"] == ["math"]


def test_an_unverified_model_is_recorded_as_unverified(model: Path, tmp_path: Path) -> None:
    (model / "conversion.json").unlink()

    recording = record(model, tmp_path / "recorded", random=1)

    assert recording.verdict.verdict == "unverified"
    verified = read_provenance(tmp_path / "recorded")["model"]["verified"]
    assert verified == {
        "structure": "passed",
        "arithmetic": "not checked",
        "numbers": "not checked",
        "pictures": "not checked",
    }


def test_a_repository_is_recorded_with_its_name(
    hub: Hub, me: str, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = converted("tiny_semantic_48")
    hub.create_repo("me/model", {path.name: path for path in folder.iterdir()})

    record("me/model", tmp_path / "recorded", random=1)

    assert read_provenance(tmp_path / "recorded")["model"]["repo"] == "me/model"


def test_a_model_that_is_not_right_is_refused(model: Path, tmp_path: Path) -> None:
    change(model / "model.safetensors", "mask_head.fc1.bias", lambda bias: bias.add_(1))

    with pytest.raises(OutputsDifferError, match="fails verification") as refused:
        record(model, tmp_path / "recorded", random=1)

    assert "mask_head.fc1.bias" in refused.value.verdict.reason
    assert not (tmp_path / "recorded").exists()


def test_nonfinite_outputs_are_refused(model: Path, tmp_path: Path) -> None:
    change(model / "model.safetensors", "class_predictor.weight", lambda w: w.fill_(3e38))
    (model / "conversion.json").unlink()

    with pytest.raises(EomtConvertError, match="output class_logits holds NaN or infinity"):
        record(model, tmp_path / "recorded", random=1)

    assert not (tmp_path / "recorded").exists()


def test_a_model_with_masked_attention_on_is_refused(model: Path, tmp_path: Path) -> None:
    change(model / "model.safetensors", "attn_mask_probs", lambda probs: probs.fill_(1))
    (model / "conversion.json").unlink()

    with pytest.raises(EomtConvertError, match=r"attn_mask_probs is \[1.0, 1.0\]"):
        record(model, tmp_path / "recorded", random=1)


def test_an_input_that_patches_do_not_fill_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="patch size"):
        record(model, tmp_path / "recorded", random=1, image_size=(60, 64))


@pytest.mark.parametrize("given", [{}, {"random": 1, "images": ["a.png"]}, {"random": 0}])
def test_either_pictures_or_random_pixels_are_needed(
    model: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match="--image"):
        record(model, tmp_path / "recorded", **given)


@pytest.mark.parametrize("content", [None, b"no picture"])
def test_a_picture_that_cannot_be_read_is_named(
    model: Path, tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "dog.png").write_bytes(content)

    with pytest.raises(UnreadableFileError, match=r"dog\.png"):
        record(model, tmp_path / "recorded", images=[tmp_path / "dog.png"])


def test_a_recording_is_replaced_only_with_force(model: Path, tmp_path: Path) -> None:
    record(model, tmp_path / "recorded", random=1)
    with pytest.raises(OutputError, match="--force"):
        record(model, tmp_path / "recorded", random=1, seed=1)

    record(model, tmp_path / "recorded", random=1, seed=1, force=True)

    assert read_provenance(tmp_path / "recorded")["input"] == {"random": 1, "seed": 1}
    assert {path.name for path in tmp_path.iterdir()} == {"model", "recorded"}


def test_force_does_not_replace_a_model_with_a_recording(model: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not replace"):
        record(model, model, random=1, force=True)

    assert (model / "model.safetensors").exists()


def test_a_recording_of_pictures_is_replaced_with_force(model: Path, tmp_path: Path) -> None:
    pictures = sorted((FIXTURES / "tiny_panoptic_64/images").iterdir())
    record(model, tmp_path / "recorded", images=pictures)

    record(model, tmp_path / "recorded", images=pictures[:1], force=True)

    assert [path.name for path in (tmp_path / "recorded/images").iterdir()] == ["0.png"]


def test_force_does_not_replace_a_recording_of_the_original(model: Path, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "tiny_panoptic_64", tmp_path / "original")

    with pytest.raises(OutputError, match="does not replace"):
        record(model, tmp_path / "original", random=1, force=True)

    assert (tmp_path / "original" / "delta" / "pytorch_model.bin").exists()


def test_force_replaces_what_recorded_json_names(model: Path, tmp_path: Path) -> None:
    recorded = tmp_path / "recorded"
    record(model, recorded, random=1)
    (recorded / "recorded.json").unlink()

    with pytest.raises(OutputError, match=r"did not make \(recorded\.safetensors\)"):
        record(model, recorded, random=1, force=True)


@pytest.mark.parametrize("stray", ["images/holiday.png", "images/0.png/deep.txt"])
def test_force_does_not_replace_pictures_of_somebody_else(
    model: Path, tmp_path: Path, stray: str
) -> None:
    recorded = tmp_path / "recorded"
    record(model, recorded, random=1)
    (recorded / stray).parent.mkdir(parents=True)
    (recorded / stray).write_bytes(b"")

    with pytest.raises(OutputError, match="does not replace"):
        record(model, recorded, random=1, force=True)

    assert (recorded / stray).exists()


def test_force_does_not_replace_a_folder_of_pictures(model: Path, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "tiny_panoptic_64/images", tmp_path / "album/images")

    with pytest.raises(OutputError, match="does not replace"):
        record(model, tmp_path / "album", random=1, force=True)

    assert (tmp_path / "album/images/1.png").exists()


def test_the_command_prints_what_it_recorded(command: Callable[..., Result], model: Path) -> None:
    result = command("record", model, "--output", "recorded", "--random", 2, "--seed", 5)

    assert result.exit_code == 0
    assert result.stdout.startswith("recorded  recorded (0.")
    assert "mask_logits   F32  2x16x16x16" in result.stdout
    assert "verdict   passed" in result.stdout
    assert command("verify", model, "--recorded", "recorded").exit_code == 0


def test_the_command_prints_json(command: Callable[..., Result], model: Path) -> None:
    result = command(
        "record", model, "--output", "recorded", "--random", 1, "--image-size", "32x64", "--json"
    )

    found = json.loads(result.stdout)
    assert found["tensors"]["pixels"] == {"dtype": "U8", "shape": [1, 3, 32, 64]}
    assert found["verdict"] == "passed"


def test_the_command_fails_with_3_for_a_model_that_is_not_right(
    command: Callable[..., Result], model: Path
) -> None:
    change(model / "model.safetensors", "query.weight", lambda query: query.neg_())

    result = command("record", model, "--output", "recorded", "--random", 1)

    assert result.exit_code == 3
    assert "query.weight" in result.stderr
    assert not Path("recorded").exists()
