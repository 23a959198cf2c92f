"""Preprocessing, labels and post-processing, compared with recorded pictures."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import digests
import pytest
import torch
from click.testing import Result
from conftest import FIXTURES, NAMES
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import converter
from converter.checks import pipeline
from converter.checks.comparison import TOLERANCE, equal_areas, equal_pixels
from converter.checks.verdict import LEVELS, Level, Verdict
from converter.errors import OutputsDifferError, UnreadableFileError
from converter.publishing.card import ModelRecord, model_card
from converter.testing import assert_matches_recorded
from reference_model import EomtImageProcessor

SEMANTIC = "tiny_semantic_48"
PANOPTIC = ("shapes_panoptic_128", "tiny_panoptic_64", "tiny_panoptic_48x80")
PADDED = (*PANOPTIC, "tiny_instance_64_gated")
SMALL = ("tiny_panoptic_64", SEMANTIC, "tiny_instance_64_gated")
PREPROCESSOR = "preprocessor_config.json"

Command = Callable[..., Result]


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(read_json(path) | changes))


def pictures_of(verdict: Verdict) -> Level:
    return verdict.levels[LEVELS.index("pictures")]


def checked(model: Path, recorded: Path) -> Level:
    return pictures_of(converter.verify(model, recorded=recorded))


@pytest.fixture
def own(converted: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A separate copy of a converted model, to change; without conversion.json and its digests."""

    def copy(name: str) -> Path:
        folder = Path(shutil.copytree(converted(name), tmp_path / name))
        (folder / "conversion.json").unlink()
        return folder

    return copy


@pytest.fixture
def recording(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a recording with changed tensors, and a recorded.json that fits them."""

    def copy(name: str, edit: Callable[[dict[str, Tensor]], object] = lambda _: None) -> Path:
        folder = tmp_path / "recorded"
        shutil.copytree(FIXTURES / name / "images", folder / "images")
        tensors = load_file(FIXTURES / name / "recorded.safetensors")
        edit(tensors)
        save_file(tensors, folder / "recorded.safetensors")
        content = read_json(FIXTURES / name / "recorded.json")
        content["sha256"]["recorded.safetensors"] = digests.of_file(folder / "recorded.safetensors")
        (folder / "recorded.json").write_text(json.dumps(content))
        return folder

    return copy


# right models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_right_model_passes_with_figures(name: str, converted: Callable[[str], Path]) -> None:
    verdict = converter.verify(converted(name), recorded=FIXTURES / name)

    level = pictures_of(verdict)
    assert (verdict.verdict, level.status) == ("passed", "passed")
    figures = level.figures
    recorded = load_file(FIXTURES / name / "recorded.safetensors")
    kinds = ("panoptic@0.3", "panoptic@0.8", "semantic", "instance_areas")
    assert set(figures["results"]) == {n for n in recorded if n.endswith(kinds)}
    assert set(figures["compared"]) == {"pipeline.mask_logits", "pipeline.class_logits"}
    assert figures["max_abs"] <= TOLERANCE
    assert figures["equal_pixels"] > 0.999
    assert figures["not_checked"] == []
    assert figures["task"] == read_json(FIXTURES / name / "recorded.json")["task"]
    assert figures["pictures"] == len(list((FIXTURES / name / "images").iterdir()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_rounded_weights_pass_within_their_own_tolerance(
    name: str, dtype: Any, tmp_path: Path
) -> None:
    """Without the sources: with them, the float32 sums would be compared with the recording."""
    converter.convert(name, tmp_path / "out", dtype=dtype, verify=False)
    (tmp_path / "out/conversion.json").unlink()

    level = pictures_of(converter.verify(tmp_path / "out", recorded=FIXTURES / name))
    assert level.status == "passed"
    assert level.figures["max_abs"] > TOLERANCE
    assert level.figures["least_equal_pixels"] < 0.995


@pytest.mark.parametrize("name", ["tiny_panoptic_64", "tiny_instance_64_gated"])
@pytest.mark.parametrize("layout", ["backbone_meta", "backbone_timm"])
def test_other_layouts_pass(name: str, layout: str, tmp_path: Path) -> None:
    backbone = str(FIXTURES / name / layout)
    conversion = converter.convert(name, tmp_path / "out", backbone=backbone)

    assert pictures_of(conversion.verdict).status == "passed"


def test_absolute_weights_pass(tmp_path: Path) -> None:
    tiny = FIXTURES / "tiny_panoptic_64"
    conversion = converter.convert(
        "tiny_panoptic_64", tmp_path / "out", delta=str(tiny / "absolute.ckpt"), recorded=tiny
    )

    assert pictures_of(conversion.verdict).status == "passed"


# preprocessing ----------------------------------------------------------------------------------


def fail(model: Path, name: str) -> str:
    """The reason of a verdict that fails by the pictures alone."""
    verdict = converter.verify(model, recorded=FIXTURES / name)

    failed = [level.level for level in verdict.levels if level.status == "failed"]
    assert (verdict.verdict, failed) == ("failed", ["pictures"])
    assert verdict.basis is None
    return verdict.reason


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("key", "value", "right"),
    [("do_resize", False, True), ("resample", 3, 2), ("resample", 0, 2), ("resample", 9, 2)],
)
def test_other_resizing_fails_by_its_key(
    name: str, key: str, value: Any, right: Any, own: Callable[[str], Path]
) -> None:
    model = own(name)
    change_json(model / PREPROCESSOR, **{key: value})

    assert fail(model, name) == (
        f"{key} in preprocessor_config.json is {json.dumps(value)}, the recorded pictures were "
        f"prepared with {json.dumps(right)}."
    )


@pytest.mark.parametrize("name", NAMES)
def test_windows_instead_of_padding_or_the_reverse_fail(
    name: str, own: Callable[[str], Path]
) -> None:
    model = own(name)
    windows = name != SEMANTIC
    change_json(model / PREPROCESSOR, do_split_image=windows)

    reason = fail(model, name)
    assert f"do_split_image in preprocessor_config.json is {json.dumps(windows)}" in reason


def test_the_published_semantic_preprocessing_which_pads_fails(own: Callable[[str], Path]) -> None:
    model = own(SEMANTIC)
    size = {"shortest_edge": 48, "longest_edge": 48}
    change_json(model / PREPROCESSOR, do_split_image=False, do_pad=True, size=size)

    assert "do_split_image in preprocessor_config.json is false" in fail(model, SEMANTIC)


@pytest.mark.parametrize("name", PADDED)
def test_pictures_without_padding_fail(name: str, own: Callable[[str], Path]) -> None:
    model = own(name)
    change_json(model / PREPROCESSOR, do_pad=False)

    assert fail(model, name).startswith("do_pad in preprocessor_config.json is false")


@pytest.mark.parametrize("name", NAMES)
def test_doubled_sizes_that_agree_fail_by_both_keys(name: str, own: Callable[[str], Path]) -> None:
    model = own(name)
    height, width = read_json(FIXTURES / name / "recorded.json")["image_size"]
    size = read_json(model / PREPROCESSOR)["size"]
    twice = {edge: pixels and 2 * pixels for edge, pixels in size.items()}
    change_json(model / PREPROCESSOR, size=twice)
    change_json(model / "config.json", image_size=[2 * height, 2 * width])

    assert fail(model, name) == (
        f"size in preprocessor_config.json is {json.dumps(twice)}, the recorded pictures were "
        f"prepared with {json.dumps(size)}. image_size in config.json is "
        f"[{2 * height}, {2 * width}], expected [{height}, {width}] as recorded."
    )


@pytest.mark.parametrize("name", PADDED)
def test_pictures_are_not_prepared_at_a_size_that_was_not_recorded(
    name: str, own: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = own(name)
    size = {"height": 2048, "width": 2048}
    change_json(model / PREPROCESSOR, do_resize=False, size=size)
    change_json(model / "config.json", image_size=[2048, 2048])
    made = set()

    def note(processor: EomtImageProcessor, images: Sequence[Image.Image]) -> pipeline.Prepared:
        made.add(processor.image_size)
        return pipeline.prepare(processor, images)

    monkeypatch.setattr("converter.checks.pictures.prepare", note)

    assert "do_resize in preprocessor_config.json is false" in fail(model, name)
    assert made == {tuple(read_json(FIXTURES / name / "recorded.json")["image_size"])}


@pytest.mark.parametrize("name", ["shapes_panoptic_128", SEMANTIC])
def test_two_faults_at_once_are_both_named(name: str, own: Callable[[str], Path]) -> None:
    model = own(name)
    change_json(model / PREPROCESSOR, do_resize=False, resample=3)

    reason = fail(model, name)
    assert "do_resize in preprocessor_config.json is false" in reason
    assert "resample in preprocessor_config.json is 3" in reason


@pytest.mark.parametrize("name", ["tiny_panoptic_64", SEMANTIC])
def test_a_processor_of_another_model_fails_with_what_it_is(
    name: str, own: Callable[[str], Path]
) -> None:
    model = own(name)
    change_json(model / PREPROCESSOR, image_processor_type="SamImageProcessor")

    assert "is for SamImageProcessor; expected EomtImageProcessor" in fail(model, name)


# task and labels --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("tiny_panoptic_64", "instance"),
        ("tiny_instance_64_gated", "panoptic"),
        (SEMANTIC, "instance"),
    ],
)
def test_a_model_that_was_converted_for_another_task_fails(
    name: str, task: Any, tmp_path: Path
) -> None:
    with pytest.raises(OutputsDifferError) as refused:
        converter.convert(name, tmp_path / "out", task=task, recorded=FIXTURES / name)

    recorded = read_json(FIXTURES / name / "recorded.json")["task"]
    said = f"by conversion.json or its published name, is {task}; recorded.json says {recorded}."
    assert said in pictures_of(refused.value.verdict).reason


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("file", ["config.json", PREPROCESSOR])
def test_other_stuff_classes_fail(name: str, file: str, own: Callable[[str], Path]) -> None:
    model = own(name)
    change_json(model / file, stuff_classes=[0])

    recorded = read_json(FIXTURES / name / "recorded.json")["stuff_classes"]
    expected = f"stuff_classes in {file} is [0], recorded.json says {recorded}. "
    assert fail(model, name).startswith(expected)


@pytest.mark.parametrize("name", PANOPTIC)
def test_no_stuff_classes_fail_where_the_classes_have_names(
    name: str, own: Callable[[str], Path]
) -> None:
    model = own(name)
    classes = len(read_json(model / "config.json")["id2label"])
    names = {str(i): f"class {i}" for i in range(classes)}
    change_json(
        model / "config.json",
        stuff_classes=[],
        id2label=names,
        label2id={label: int(i) for i, label in names.items()},
    )

    assert fail(model, name).startswith("stuff_classes in config.json is [], recorded.json says [")


@pytest.mark.parametrize("name", ["tiny_panoptic_64", "tiny_panoptic_48x80"])
def test_without_names_missing_stuff_classes_are_not_checked_and_the_recorded_ones_used(
    name: str, own: Callable[[str], Path]
) -> None:
    model = own(name)
    change_json(model / "config.json", stuff_classes=[])

    verdict = converter.verify(model, recorded=FIXTURES / name)

    level = pictures_of(verdict)
    assert (verdict.verdict, level.status) == ("passed", "passed")
    (unchecked,) = (said for said in level.figures["not_checked"] if "stuff" in said)
    assert "those in recorded.json were used" in unchecked
    assert unchecked in level.reason
    assert level.figures["equal_pixels"] > 0.999


@pytest.mark.parametrize("name", ["shapes_panoptic_128", SEMANTIC])
def test_the_level_says_that_no_recording_shows_swapped_class_names(
    name: str, own: Callable[[str], Path]
) -> None:
    model = own(name)
    labels = read_json(model / "config.json")["id2label"]
    labels["0"], labels["1"] = labels["1"], labels["0"]
    inverse = {label: int(i) for i, label in labels.items()}
    change_json(model / "config.json", id2label=labels, label2id=inverse)

    level = checked(model, FIXTURES / name)
    assert level.status == "passed"
    assert "Not shown by any recording: names of classes" in level.reason
    assert "names of classes, and their order, in id2label" in level.figures["not_shown"]


@pytest.mark.parametrize("stuff", [["4", "5", "6"], [4.0, 5.0, 6.0], [True], 5])
def test_stuff_classes_that_are_not_ids_fail(own: Callable[[str], Path], stuff: object) -> None:
    model = own("tiny_panoptic_64")
    change_json(model / PREPROCESSOR, stuff_classes=stuff)

    assert checked(model, FIXTURES / "tiny_panoptic_64").status == "failed"


def test_the_order_of_stuff_classes_does_not_matter(own: Callable[[str], Path]) -> None:
    model = own("tiny_panoptic_64")
    change_json(model / PREPROCESSOR, stuff_classes=[6, 4, 5, 4])

    assert checked(model, FIXTURES / "tiny_panoptic_64").status == "passed"


def test_a_saved_processor_without_stuff_classes_leaves_them_unchecked(
    own: Callable[[str], Path],
) -> None:
    model = own("tiny_panoptic_64")
    change_json(model / "config.json", stuff_classes=[])
    EomtImageProcessor.from_pretrained(model).save_pretrained(model)

    level = checked(model, FIXTURES / "tiny_panoptic_64")
    assert level.status == "passed"
    assert any("stuff" in said for said in level.figures["not_checked"])


def test_an_edited_copy_of_a_recording_does_not_change_what_is_known_of_it(
    own: Callable[[str], Path], tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(FIXTURES / SEMANTIC, tmp_path / "copied"))
    change_json(copied / "recorded.json", stuff_classes=[0])
    model = own(SEMANTIC)
    change_json(model / "config.json", stuff_classes=[0])

    assert checked(model, copied).status == "failed"


@pytest.mark.parametrize("task", ["semantic", "instance"])
def test_only_panoptic_models_are_given_stuff_classes(task: Any, tmp_path: Path) -> None:
    name = {"semantic": SEMANTIC, "instance": "tiny_instance_64_gated"}[task]
    count = read_json(FIXTURES / name / "recorded.json")["num_classes"]
    labels = tmp_path / "labels.json"
    classes = [{"id": i, "name": f"class {i}", "isthing": i % 2} for i in range(count)]
    labels.write_text(json.dumps({"categories": classes}))
    conversion = converter.convert(name, tmp_path / "out", labels=labels)

    assert pictures_of(conversion.verdict).status == "passed"
    assert read_json(tmp_path / "out" / "config.json")["stuff_classes"] == []


@pytest.mark.parametrize("name", SMALL)
def test_a_model_for_another_size_is_not_compared_with_the_pictures(
    name: str, tmp_path: Path
) -> None:
    conversion = converter.convert(name, tmp_path / "out", image_size=96)
    again = converter.verify(tmp_path / "out")

    for verdict in (conversion.verdict, again):
        assert verdict.verdict == "passed"
        level = pictures_of(verdict)
        assert level.status == "not checked"
        assert "the model is for 96x96" in level.reason


@pytest.mark.parametrize("size", [64, [64, 64], "64", {"shortest_edge": 2**40}])
def test_a_malformed_size_fails_at_once(own: Callable[[str], Path], size: object) -> None:
    model = own("tiny_panoptic_64")
    change_json(model / PREPROCESSOR, size=size)

    assert checked(model, FIXTURES / "tiny_panoptic_64").status == "failed"


def test_a_recording_without_a_task_leaves_a_record_that_can_be_read(
    recording: Callable[..., Path], tmp_path: Path
) -> None:
    folder = recording("tiny_panoptic_64", lambda t: t["mask_logits"].view(-1)[:1].add_(1e-6))
    content = read_json(folder / "recorded.json")
    del content["task"]
    (folder / "recorded.json").write_text(json.dumps(content))
    conversion = converter.convert("tiny_panoptic_64", tmp_path / "out", recorded=folder)
    record = ModelRecord.read(tmp_path / "out")

    assert pictures_of(conversion.verdict).status == "passed"
    assert record.verdict.verdict == "passed"
    assert "not everything (see not_checked in conversion.json)" in str(
        model_card("me/model", record)
    )


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t.update({"pipeline.origins": -t["pipeline.origins"] - 1}),
        lambda t: t.update({"pipeline.origins": t["pipeline.origins"][:, :2].contiguous()}),
        lambda t: t.update({"pipeline.mask_logits": t["pipeline.mask_logits"] > 0}),
    ],
)
def test_malformed_recorded_pictures_are_refused(
    recording: Callable[..., Path],
    converted: Callable[[str], Path],
    edit: Callable[[dict[str, Tensor]], object],
) -> None:
    with pytest.raises(UnreadableFileError, match=r"recorded\.safetensors"):
        checked(converted(SEMANTIC), recording(SEMANTIC, edit))


def test_a_task_that_the_recorded_pictures_are_not_for_is_refused(
    recording: Callable[..., Path], converted: Callable[[str], Path]
) -> None:
    folder = recording(SEMANTIC, lambda t: t["mask_logits"].view(-1)[:1].add_(1e-6))
    change_json(folder / "recorded.json", task="instance")

    with pytest.raises(UnreadableFileError, match="the wrong inputs for instance segmentation"):
        checked(converted(SEMANTIC), folder)


@pytest.mark.parametrize("key", ["task", "stuff_classes"])
@pytest.mark.parametrize("name", ["tiny_panoptic_64", SEMANTIC])
def test_what_recorded_json_does_not_say_is_not_checked(
    name: str, key: str, converted: Callable[[str], Path], recording: Callable[..., Path]
) -> None:
    folder = recording(name)
    content = read_json(folder / "recorded.json")
    del content[key]
    (folder / "recorded.json").write_text(json.dumps(content))

    level = checked(converted(name), folder)
    assert level.status == "passed"
    assert any(key in said for said in level.figures["not_checked"])
    assert ("results" in level.figures) == (key != "task")


# what is compared with the recording -------------------------------------------------------------


def change_first(name: str, by: float) -> Callable[[dict[str, Tensor]], object]:
    def edit(tensors: dict[str, Tensor]) -> None:
        flat = tensors[name].view(-1)
        flat[0] = flat[0] + by if flat[0] < 100 else flat[0] - by

    return edit


@pytest.mark.parametrize(
    ("name", "tensor", "by", "reason"),
    [
        ("tiny_panoptic_64", "pipeline.pixels", 1, "1 of 8,192 pixels differ"),
        (SEMANTIC, "pipeline.crops", 1, "1 of 11,520 pixels differ"),
        (SEMANTIC, "pipeline.origins", 1, "windows are at other positions"),
        (SEMANTIC, "pipeline.mask_logits", 0.01, "pipeline.mask_logits differs by up to 0.01"),
        ("tiny_panoptic_64", "pipeline.class_logits", 0.01, "pipeline.class_logits differs by"),
    ],
)
def test_inputs_are_equal_and_logits_within_the_tolerance(
    name: str,
    tensor: str,
    by: float,
    reason: str,
    converted: Callable[[str], Path],
    recording: Callable[..., Path],
) -> None:
    level = checked(converted(name), recording(name, change_first(tensor, by)))

    assert level.status == "failed"
    assert reason in level.reason


@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("shapes_panoptic_128", "pipeline.2.panoptic@0.8"),
        ("tiny_panoptic_64", "pipeline.1.panoptic@0.3"),
        (SEMANTIC, "pipeline.0.semantic"),
        (SEMANTIC, "pipeline.1.semantic"),
        ("tiny_instance_64_gated", "pipeline.0.instance_areas"),
    ],
)
def test_results_that_differ_in_a_twentieth_of_a_picture_fail(
    name: str, result: str, converted: Callable[[str], Path], recording: Callable[..., Path]
) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        found = tensors[result]
        if result.endswith("areas"):
            tensors[result] = found - found // 20
        else:
            rows = len(found) // 20 + 1
            tensors[result] = torch.cat((found[:rows] ^ 1, found[rows:]))

    level = checked(converted(name), recording(name, edit))

    assert level.status == "failed"
    what = result if result.endswith("areas") else f"the pixels of {result}"
    assert f"% of {what} match the recording, less than 99.5%" in level.reason
    assert 0.9 < level.figures["equal_pixels"] < 0.99


@pytest.mark.parametrize(("name", "query"), [("tiny_panoptic_64", 6), ("tiny_panoptic_48x80", 7)])
def test_a_score_that_rounding_moves_across_the_threshold_does_not_fail_a_right_model(
    name: str,
    query: int,
    converted: Callable[[str], Path],
    recording: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def put_on_the_threshold(tensors: dict[str, Tensor]) -> None:
        classes = tensors["pipeline.class_logits"]
        before = classes[0, query].softmax(-1).max()
        classes[0, query, classes[0, query].argmax()] += TOLERANCE / 2
        threshold = float((before + classes[0, query].softmax(-1).max()) / 2)
        monkeypatch.setattr(pipeline, "PANOPTIC_THRESHOLDS", ((threshold, 0.1),))
        processor = EomtImageProcessor.from_pretrained(converted(name))
        images = [Image.open(path) for path in sorted((FIXTURES / name / "images").iterdir())]
        inputs = pipeline.prepare(processor, images)
        tensors |= pipeline.segment(processor, "panoptic", tensors, inputs)

    level = checked(converted(name), recording(name, put_on_the_threshold))

    assert level.status == "passed"


@pytest.mark.parametrize("name", ["tiny_panoptic_64", SEMANTIC, "tiny_instance_64_gated"])
def test_a_wrong_network_fails_this_level_too(name: str, own: Callable[[str], Path]) -> None:
    model = own(name)
    weights = load_file(model / "model.safetensors")
    weights["mask_head.fc1.bias"] += 0.5
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})

    level = checked(model, FIXTURES / name)
    assert level.status == "failed"
    assert level.reason.startswith("pipeline.mask_logits differs by up to")


def test_segments_are_the_same_whatever_their_numbers() -> None:
    theirs = torch.stack((torch.zeros(4, 6), torch.arange(3).repeat(4, 2)), dim=-1).long()
    ours = theirs.clone()
    ours[..., 1] = 7 - theirs[..., 1]

    assert equal_pixels(ours, theirs) == 1


def test_a_segment_that_is_split_or_merged_counts_as_far_as_it_is_the_same() -> None:
    whole = torch.zeros(4, 10, 2, dtype=torch.int64)
    split = whole.clone()
    split[:, :3, 1] = 1

    assert equal_pixels(split, whole) == pytest.approx(0.7)
    assert equal_pixels(whole, split) == pytest.approx(0.7)


def test_pixels_of_another_class_or_shape_are_not_equal() -> None:
    theirs = torch.zeros(4, 10, 2, dtype=torch.int64)
    ours = theirs.clone()
    ours[0, :, 0] = 5

    assert equal_pixels(ours, theirs) == 0.75
    assert equal_pixels(ours[..., 0], theirs[..., 0]) == 0.75
    assert equal_pixels(ours[1:], theirs) == 0


def test_instances_are_matched_by_query_and_class() -> None:
    def result(**values: list[int]) -> dict[str, Tensor]:
        return {name: torch.tensor(value) for name, value in values.items()}

    theirs = result(queries=[0, 1, 1], labels=[2, 0, 1], areas=[60, 30, 10])
    turned = result(queries=[1, 1, 0], labels=[1, 0, 2], areas=[10, 30, 60])
    other = result(queries=[0, 1, 1], labels=[2, 0, 3], areas=[60, 20, 10])

    assert equal_areas(turned, theirs) == 1
    assert equal_areas(other, theirs) == pytest.approx(80 / 110)


# recordings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_a_recording_without_pictures_is_not_checked(
    name: str, converted: Callable[[str], Path], recording: Callable[..., Path]
) -> None:
    def without(tensors: dict[str, Tensor]) -> None:
        for tensor in [tensor for tensor in tensors if tensor.startswith("pipeline.")]:
            del tensors[tensor]

    verdict = converter.verify(converted(name), recorded=recording(name, without))

    level = pictures_of(verdict)
    assert (level.status, level.reason) == ("not checked", "The recording has no pictures.")
    assert verdict.verdict == "passed"


@pytest.mark.parametrize("missing", ["images/1.png", "recorded.json"])
@pytest.mark.parametrize("name", ["tiny_panoptic_64", SEMANTIC])
def test_a_recording_that_lacks_a_file_is_not_checked(
    name: str, missing: str, converted: Callable[[str], Path], recording: Callable[..., Path]
) -> None:
    folder = recording(name)
    (folder / missing).unlink()

    level = checked(converted(name), folder)
    assert level.status == "not checked"
    assert missing in level.reason


@pytest.mark.parametrize("name", ["tiny_panoptic_64", SEMANTIC])
def test_a_picture_that_recorded_json_does_not_name_is_not_checked(
    name: str, converted: Callable[[str], Path], recording: Callable[..., Path]
) -> None:
    folder = recording(name)
    content = read_json(folder / "recorded.json")
    del content["sha256"]["images/0.png"]
    (folder / "recorded.json").write_text(json.dumps(content))

    level = checked(converted(name), folder)
    assert level.status == "not checked"
    assert "images/0.png" in level.reason


@pytest.mark.parametrize("name", ["tiny_panoptic_64", SEMANTIC])
def test_a_picture_other_than_the_recorded_one_is_refused(
    name: str, converted: Callable[[str], Path], recording: Callable[..., Path]
) -> None:
    folder = recording(name)
    shutil.copy(folder / "images/0.png", folder / "images/1.png")

    with pytest.raises(UnreadableFileError, match=r"1\.png is not the recorded picture"):
        converter.verify(converted(name), recorded=folder)


def test_a_recorded_picture_that_cannot_be_read_is_refused(
    converted: Callable[[str], Path], recording: Callable[..., Path]
) -> None:
    folder = recording(SEMANTIC)
    (folder / "images/1.png").write_bytes(b"no picture")
    content = read_json(folder / "recorded.json")
    content["sha256"]["images/1.png"] = digests.of_file(folder / "images/1.png")
    (folder / "recorded.json").write_text(json.dumps(content))

    with pytest.raises(UnreadableFileError, match=r"1\.png is not a readable picture"):
        converter.verify(converted(SEMANTIC), recorded=folder)


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("tiny_panoptic_64", lambda t: t.pop("pipeline.mask_logits"), "has no pipeline.mask_log"),
        (SEMANTIC, lambda t: t.pop("pipeline.origins"), "has no pipeline.origins"),
        (
            SEMANTIC,
            lambda t: t.update({"pipeline.crops": t["pipeline.crops"][:-1].clone()}),
            r"has the length \d+, expected \d+ like pipeline\.\w+",
        ),
        (
            "tiny_panoptic_64",
            lambda t: t.update({"pipeline.pixels": t["pipeline.pixels"].float()}),
            r"has dtype torch\.float32, expected torch\.uint8",
        ),
        (
            "tiny_panoptic_64",
            lambda t: t["pipeline.class_logits"].view(-1)[0].fill_(torch.nan),
            "pipeline.class_logits in .* holds NaN",
        ),
        (
            SEMANTIC,
            lambda t: t.update({"pipeline.0.semantic": t["pipeline.0.semantic"].bool()}),
            "pipeline.0.semantic in .* has dtype torch.bool, expected whole numbers",
        ),
        (
            SEMANTIC,
            lambda t: t.update({"pipeline.0.semantic": torch.tensor(1)}),
            r"pipeline.0.semantic in .* has the shape \[\], expected 2 dimensions",
        ),
        (
            "tiny_panoptic_64",
            lambda t: t.update({"pipeline.0.panoptic@0.8": torch.zeros(4, dtype=torch.int64)}),
            "pipeline.0.panoptic@0.8 in .* expected 3 dimensions",
        ),
        (
            "tiny_instance_64_gated",
            lambda t: t.pop("pipeline.1.instance_queries"),
            "lacks a query or a label for an area",
        ),
    ],
)
def test_inconsistent_recorded_pictures_are_refused(
    name: str,
    edit: Callable[[dict[str, Tensor]], object],
    message: str,
    converted: Callable[[str], Path],
    recording: Callable[..., Path],
) -> None:
    with pytest.raises(UnreadableFileError, match=message):
        converter.verify(converted(name), recorded=recording(name, edit))


def test_results_of_unknown_thresholds_are_reported_as_unchecked(
    converted: Callable[[str], Path], recording: Callable[..., Path]
) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        tensors["pipeline.0.panoptic@0.5"] = tensors.pop("pipeline.0.panoptic@0.3")

    level = checked(converted("tiny_panoptic_64"), recording("tiny_panoptic_64", rename))

    assert level.status == "passed"
    assert level.figures["not_checked"] == ["1 results such as pipeline.0.panoptic@0.5"]


# the verdict ------------------------------------------------------------------------------------


def test_pictures_alone_are_not_a_basis_and_a_failure_fails_the_verdict() -> None:
    passed = Verdict((Level("numbers", "not checked", "no."), Level("pictures", "passed")))
    numbers = Level("numbers", "passed", figures={"basis": "original"})
    failed = Verdict((numbers, Level("pictures", "failed", "Windows.")))

    assert (passed.verdict, passed.basis) == ("unverified", None)
    assert (failed.verdict, failed.basis, failed.reason) == ("failed", None, "Windows.")


@pytest.mark.parametrize("name", ["tiny_panoptic_64", SEMANTIC])
def test_pictures_are_left_out_up_to_numbers(name: str, own: Callable[[str], Path]) -> None:
    model = own(name)
    change_json(model / PREPROCESSOR, resample=3)

    up_to_numbers = converter.verify(model, recorded=FIXTURES / name, level=3)
    assert up_to_numbers.verdict == "passed"
    assert pictures_of(up_to_numbers).reason == "Only levels up to 3 were asked for."
    assert_matches_recorded(model, FIXTURES / name)
    assert converter.verify(model, recorded=FIXTURES / name, level=4).verdict == "failed"


def test_a_conversion_keeps_the_level_in_its_record_and_card(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    converter.convert(SEMANTIC, folder)

    levels = read_json(folder / "conversion.json")["verdict"]["levels"]
    assert [level["level"] for level in levels] == list(LEVELS)
    (kept,) = (level for level in levels if level["level"] == "pictures")
    assert kept["status"] == "passed"
    assert kept["figures"] == {
        "pictures": 2,
        "task": "semantic",
        "tolerance": 2e-4,
        "relative_tolerance": 1e-5,
        "least_equal_pixels": 0.995,
    }
    made = ModelRecord.read(folder)
    card = model_card("me/model", made).text
    assert "| pictures | passed | " in card


def test_terminal_page_and_json_show_the_level(
    command: Command, own: Callable[[str], Path]
) -> None:
    model = own(SEMANTIC)
    arguments = ("verify", model, "--recorded", FIXTURES / SEMANTIC)
    shown = " ".join(command(*arguments, "--report", "page.html").stdout.split())
    page = Path("page.html").read_text()

    assert "pictures passed: 2 pictures, tolerance 0.0002" in shown
    assert "results equal in 100.0% of the pixels (at least 99.5%)" in shown
    assert "Not shown by any recording: names of classes" in shown
    assert '<span class="level">–</span>pictures' in page
    assert '<span class="level">4</span>peers' in page
    assert "pixels with the recorded result" in page
    change_json(model / PREPROCESSOR, resample=3)
    result = command(*arguments, "--json")
    levels = json.loads(result.stdout)["levels"]
    assert result.exit_code == 3
    assert [level["level"] for level in levels] == list(LEVELS)
    assert "resample in preprocessor_config.json is 3" in levels[3]["reason"]
