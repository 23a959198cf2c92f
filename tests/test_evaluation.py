"""Measuring a model on a dataset."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from conftest import FIXTURES
from dataset_files import (
    run_lengths,
    write_ade20k,
    write_coco_instances,
    write_coco_panoptic,
    zip_as_published,
)
from hub_server import Hub
from numpy.typing import NDArray
from PIL import Image
from small_models import save_ade20k_model

import converter
from converter.errors import AccessError, EomtConvertError, UnreadableFileError, UsageError
from converter.pictures.evaluation import evaluate
from reference_model import (
    EomtDinov3Config,
    EomtDinov3ForUniversalSegmentation,
    EomtDinov3ForUniversalSegmentationOutput,
    EomtImageProcessor,
)

pytestmark = pytest.mark.numbers

SHAPES = FIXTURES / "shapes_panoptic_128/val"
RECORDED = json.loads((FIXTURES / "shapes_panoptic_128/recorded.json").read_text())["val"]

Converted = Callable[[str], Path]
Command = Callable[..., Result]


@pytest.fixture
def shapes(converted: Converted) -> Path:
    return converted("shapes_panoptic_128")


def run(
    model: Path, pixels: NDArray[np.uint8], **settings: Any
) -> tuple[EomtImageProcessor, EomtDinov3ForUniversalSegmentationOutput]:
    """A model's image processor, with other settings, and its outputs for a picture."""
    processor = EomtImageProcessor.from_pretrained(model, **settings)
    network = EomtDinov3ForUniversalSegmentation.from_pretrained(model)
    with torch.inference_mode():
        outputs = network(**processor(images=Image.fromarray(pixels), return_tensors="pt"))
    return processor, outputs


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height)))


def test_the_panoptic_quality_is_the_recorded_one(shapes: Path) -> None:
    recorded = RECORDED["original_panoptic_quality"]

    found = evaluate(shapes, "coco-panoptic", SHAPES)

    assert found.images == recorded["images"]
    assert found.means_over == "all 6 classes"
    for name in ("PQ", "PQ_things", "PQ_stuff"):
        assert found.metrics[name] == pytest.approx(recorded[name], rel=1e-9)
    assert {row["class"]: row["PQ"] for row in found.per_class} == pytest.approx(
        recorded["per_class"], rel=1e-9
    )
    for row in found.per_class:
        expected = recorded["counts"][row["class"]]
        assert {name: row[name] for name in ("tp", "fp", "fn")} == {
            name: expected[name] for name in ("tp", "fp", "fn")
        }
        assert row["iou_sum"] == pytest.approx(expected["iou_sum"], rel=1e-9)


def test_the_command_prints_a_table_or_json(shapes: Path, command: Command) -> None:
    arguments = ("evaluate", shapes, "--dataset", "coco-panoptic", "--data", SHAPES, "--limit", "2")

    table, as_json = command(*arguments), command(*arguments, "--json", "--threads", "1")

    assert (table.exit_code, as_json.exit_code) == (0, 0)
    content = json.loads(as_json.stdout)
    assert list(content) == [
        *("model", "dataset", "images", "metrics"),
        *("means_over", "per_class", "published"),
    ]
    assert (content["dataset"], content["images"]) == ("coco-panoptic", 2)
    assert content["published"] is None
    assert [row["class"] for row in content["per_class"]] == list(
        RECORDED["original_panoptic_quality"]["per_class"]
    )
    assert f"PQ {content['metrics']['PQ']:.2f}" in " ".join(table.stdout.split())
    assert "coco-panoptic: 2 pictures" in table.stdout


def test_two_processes_give_the_figures_of_one(shapes: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    command = [sys.executable, "-c", "from converter.cli import main; main()"]
    arguments = ["evaluate", str(shapes), "--dataset", "coco-panoptic", "--data", str(SHAPES)]

    done = subprocess.run(
        [*launcher, "--nproc-per-node=2", *command, *arguments, "--limit=7", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )

    # seven pictures do not divide by two: none is left out, none counted twice
    assert json.loads(done.stdout) == evaluate(shapes, "coco-panoptic", SHAPES, limit=7).to_dict()


def test_progress_is_reported_picture_by_picture(shapes: Path) -> None:
    told: list[tuple[str, int, int]] = []

    evaluate(shapes, "coco-panoptic", SHAPES, limit=2, progress=lambda *stage: told.append(stage))

    assert told == [("Evaluating", 0, 2), ("Evaluating", 1, 2)]


def test_rounded_weights_are_computed_with_in_float32(shapes: Path, tmp_path: Path) -> None:
    rounded, widened = tmp_path / "rounded", tmp_path / "widened"
    network = EomtDinov3ForUniversalSegmentation.from_pretrained(shapes, dtype=torch.bfloat16)
    for model in (rounded, widened):
        shutil.copytree(shapes, model)
    network.save_pretrained(rounded)
    network.float().save_pretrained(widened)

    found = evaluate(rounded, "coco-panoptic", SHAPES, limit=2)

    assert found.metrics == evaluate(widened, "coco-panoptic", SHAPES, limit=2).metrics


def test_no_published_figure_is_claimed_for_other_weights(shapes: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(shapes, model)
    history = json.loads((model / "conversion.json").read_text())
    history["checkpoint"] = "coco_panoptic_small_640"
    history["sources"]["delta"]["repo"] = "somebody/fine-tune"
    (model / "conversion.json").write_text(json.dumps(history))

    assert evaluate(model, "coco-panoptic", SHAPES, limit=1).published is None


def test_a_published_figure_is_shown_beside_the_measured_one(
    shapes: Path, tmp_path: Path, command: Command
) -> None:
    model = tmp_path / "model"
    shutil.copytree(shapes, model)
    history = json.loads((model / "conversion.json").read_text())
    history["checkpoint"] = "coco_panoptic_small_640"
    history["sources"]["delta"]["repo"] = "tue-mps/coco_panoptic_eomt_small_640_dinov3"
    (model / "conversion.json").write_text(json.dumps(history))

    found = evaluate(model, "coco-panoptic", SHAPES, limit=1)
    table = command("evaluate", model, "--dataset", "coco-panoptic", "--data", SHAPES, "--limit", 1)

    assert found.published is not None
    assert found.to_dict()["published"] == {
        "checkpoint": "coco_panoptic_small_640",
        "dataset": "COCO panoptic val2017",
        "metric": "PQ",
        "value": 47.2,
        "difference": pytest.approx(found.metrics["PQ"] - 47.2),
    }
    assert f"47.2 {found.published.difference:+.2f}" in " ".join(table.stdout.split())


def test_masks_that_a_model_finds_have_full_ap_as_annotations(
    converted: Converted, tmp_path: Path
) -> None:
    model = converted("tiny_instance_64_gated")
    pictures = [noise(70, 90), noise(90, 60, seed=1)]
    objects = []
    for pixels in pictures:
        processor, outputs = run(model, pixels)
        (result,) = processor.post_process_instance_segmentation(
            outputs, target_sizes=[pixels.shape[:2]], top_k=100, return_binary_maps=True
        )
        found = zip(result["segments_info"], result["binary_maps"].numpy(), strict=True)
        objects.append(
            [
                {
                    "category_id": 10 * info["label_id"] + 1,
                    "iscrowd": 0,
                    "segmentation": run_lengths(mask),
                }
                for info, mask in found
                if mask.any()
            ]
        )
    assert len({annotation["category_id"] for entries in objects for annotation in entries}) > 1
    categories = [{"id": 10 * i + 1, "name": f"class {i}"} for i in range(5)]
    write_coco_instances(tmp_path, pictures, objects, categories)
    zip_as_published(tmp_path)

    measured = evaluate(model, "coco-instance", tmp_path)

    assert measured.images == 2
    assert measured.metrics["AP"] == pytest.approx(100)


@pytest.fixture(scope="module")
def semantic_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with ADE20K's 150 classes."""
    folder = tmp_path_factory.mktemp("semantic")
    # pads a single crop, as the published one of a semantic model does
    processor = EomtImageProcessor(size={"shortest_edge": 32, "longest_edge": 32}, do_pad=True)
    save_ade20k_model(folder, processor, initializer_range=1.0)
    return folder


def test_miou_follows_from_the_share_of_pixels_that_agree(
    semantic_model: Path, tmp_path: Path
) -> None:
    pixels = noise(40, 100)
    processor, outputs = run(semantic_model, pixels, do_split_image=True, do_pad=False)
    (predicted,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(40, 100)])
    classes = predicted.numpy()
    occurring, sizes = np.unique(classes, return_counts=True)
    assert len(occurring) > 1
    largest = occurring[sizes.argmax()]
    never = next(i for i in range(150) if i not in occurring)
    annotated = classes.copy()
    half = (classes == largest) & (np.arange(100) < 50)
    annotated[half] = never
    labels = annotated + 1
    labels[0] = 0  # this row is not annotated
    write_ade20k(tmp_path, [pixels], [labels.astype(np.uint8)])
    zip_as_published(tmp_path)

    measured = evaluate(semantic_model, "ade20k-semantic", tmp_path)

    iou = [row["IoU"] for row in measured.per_class]
    agreeing = (annotated == classes)[1:][classes[1:] == largest]
    assert 0 < agreeing.mean() < 1
    assert iou[largest] == pytest.approx(100 * agreeing.mean())
    assert iou[never] == 0  # annotated, never predicted
    exact = [i for i in np.unique(classes[1:]) if i != largest]
    assert [iou[i] for i in exact] == [100.0] * len(exact)
    mean = (iou[largest] + 100 * len(exact)) / (len(exact) + 2)
    assert measured.metrics == {"mIoU": pytest.approx(mean)}
    in_json = [row["IoU"] for row in measured.to_dict()["per_class"]]
    assert in_json.count(None) == 150 - len(exact) - 2


@pytest.mark.parametrize("upper_id", [1, 3])
def test_of_two_crowds_of_a_class_the_one_with_the_highest_id_counts(
    upper_id: int, shapes: Path, tmp_path: Path
) -> None:
    pixels = np.asarray(Image.open(sorted((SHAPES / "images").iterdir())[0]).convert("RGB"))
    processor, outputs = run(shapes, pixels)
    (result,) = processor.post_process_panoptic_segmentation(
        outputs, target_sizes=[pixels.shape[:2]], threshold=0.8, stuff_classes=(3, 4, 5)
    )
    thing = next(info for info in result["segments_info"] if info["label_id"] < 3)
    found = result["segmentation"].numpy() == thing["id"]
    # the upper quarter of what is found lies in one crowd, the rest in another
    upper = np.cumsum(found.sum(1)) <= found.sum() / 4
    ids = np.where(found, np.where(upper[:, None], upper_id, 2), 0)
    assert 0 < np.sum(ids == upper_id) < np.sum(ids == 2)
    crowds = [{"id": i, "category_id": thing["label_id"], "iscrowd": 1} for i in (2, upper_id)]
    categories = [{"id": i, "name": str(i), "isthing": int(i < 3)} for i in range(6)]
    write_coco_panoptic(tmp_path, [pixels], [ids], [crowds], categories)

    measured = evaluate(shapes, "coco-panoptic", tmp_path)

    assert measured.per_class[thing["label_id"]]["fp"] == (0 if upper_id < 2 else 1)


@pytest.fixture(
    params=[
        ("shapes_panoptic_128", "coco-panoptic"),
        ("tiny_panoptic_64", "coco-panoptic"),
        ("tiny_instance_64_gated", "coco-instance"),
        ("semantic_model", "ade20k-semantic"),
    ],
    ids=lambda param: param[0],
)
def absent_classes(
    request: pytest.FixtureRequest, converted: Converted, tmp_path: Path
) -> tuple[Path, str, Path]:
    """A model, the name of a dataset, and a picture of it without some of its classes."""
    name, dataset = request.param
    if dataset == "ade20k-semantic":
        labels = np.repeat(np.array([[1, 2]], dtype=np.uint8), 40, axis=0).repeat(25, axis=1)
        write_ade20k(tmp_path, [noise(40, 50)], [labels])
        return request.getfixturevalue(name), dataset, tmp_path
    model = converted(name)
    categories = [
        {"id": i, "name": label, "isthing": 1}
        for i, label in EomtDinov3Config.from_pretrained(model).id2label.items()
    ]
    left = np.arange(50)[None].repeat(40, axis=0) < 25
    if dataset == "coco-instance":
        objects = [{"category_id": 1, "iscrowd": 0, "segmentation": run_lengths(left)}]
        write_coco_instances(tmp_path, [noise(40, 50)], [objects], categories)
    else:
        segments = [{"id": i, "category_id": i, "iscrowd": 0} for i in (1, 2)]
        write_coco_panoptic(tmp_path, [noise(40, 50)], [2 - left], [segments], categories)
    return model, dataset, tmp_path


def test_the_output_says_which_classes_the_means_are_over(
    absent_classes: tuple[Path, str, Path], command: Command
) -> None:
    model, dataset, data = absent_classes
    arguments = ("evaluate", model, "--dataset", dataset, "--data", data)

    table, as_json = command(*arguments), command(*arguments, "--json")

    content = json.loads(as_json.stdout)
    metric = next(iter(content["metrics"]))
    values = [row[metric.removeprefix("m")] for row in content["per_class"]]  # mIoU: of IoU
    counted = [value for value in values if value is not None]
    assert 0 < len(counted) < len(values)
    assert content["metrics"][metric] == pytest.approx(np.mean(counted))
    assert content["means_over"].startswith(f"the {len(counted)} of {len(values)} classes ")
    assert content["means_over"].endswith(
        "the original does the same"
        if dataset == "coco-instance"
        else "the original counts the other classes as 0"
    )
    assert f"means over {content['means_over']}" in table.stdout.splitlines()


def test_a_model_is_taken_from_the_hub(shapes: Path, hub: Hub) -> None:
    names = ("config.json", "preprocessor_config.json", "model.safetensors")
    hub.create_repo(
        "tue-mps/coco_panoptic_eomt_small_640_dinov3", {name: shapes / name for name in names}
    )

    found = evaluate(
        "tue-mps/coco_panoptic_eomt_small_640_dinov3", "coco-panoptic", SHAPES, limit=1
    )
    again = evaluate(
        "tue-mps/coco_panoptic_eomt_small_640_dinov3@main",
        "coco-panoptic",
        SHAPES,
        limit=1,
        local_files_only=True,
    )

    assert found.metrics == evaluate(shapes, "coco-panoptic", SHAPES, limit=1).metrics
    assert again.metrics == found.metrics
    assert found.published is not None  # by the name of the repository
    assert found.published.checkpoint == "coco_panoptic_small_640"


def test_a_missing_repository_is_named(hub: Hub) -> None:
    with pytest.raises(AccessError, match="no repository someone/nothing"):
        evaluate("someone/nothing", "coco-panoptic", SHAPES)


def test_delta_weights_are_refused_as_a_model(hub: Hub) -> None:
    hub.create_repo("tue-mps/delta", {"pytorch_model.bin": b"weights", "config.json": b"{}"})

    with pytest.raises(UnreadableFileError, match=r"no preprocessor_config\.json"):
        evaluate("tue-mps/delta", "coco-panoptic", SHAPES)
    assert not any("pytorch_model.bin" in line for line in hub.request_lines)


def test_a_dataset_with_another_number_of_classes_is_refused(converted: Converted) -> None:
    with pytest.raises(EomtConvertError, match="has 5 classes, expected 6 as in"):
        evaluate(converted("tiny_instance_64_gated"), "coco-panoptic", SHAPES)


def test_weights_that_are_broken_are_refused(shapes: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(shapes, model)
    (model / "model.safetensors").write_bytes(b"nothing")

    with pytest.raises(UnreadableFileError, match="cannot be loaded"):
        evaluate(model, "coco-panoptic", SHAPES)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "abacus"])
def test_a_missing_device_is_refused(device: str, shapes: Path) -> None:
    if device != "abacus" and torch.cuda.is_available():
        pytest.skip("there is a GPU")

    with pytest.raises(UsageError, match=device):
        evaluate(shapes, "coco-panoptic", SHAPES, device=device)


def test_an_unknown_dataset_is_wrong_usage(shapes: Path, command: Command) -> None:
    done = command("evaluate", shapes, "--dataset", "voc", "--data", SHAPES)

    assert done.exit_code == 2
    assert "coco-panoptic, coco-instance, ade20k-semantic" in done.stderr


def test_without_the_extra_the_error_says_what_to_install(
    shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "converter.pictures.metrics", raising=False)
    monkeypatch.delattr(converter.pictures, "metrics", raising=False)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)

    with pytest.raises(EomtConvertError, match=r"(?s)torchmetrics.*eomt-convert\[evaluate\]"):
        evaluate(shapes, "coco-panoptic", SHAPES)
