"""Reading the datasets that models are evaluated on, as they are published."""

import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FIXTURES
from dataset_files import (
    run_lengths,
    write_ade20k,
    write_coco_instances,
    write_coco_panoptic,
    write_picture,
    zip_as_published,
)
from hostile_files import with_directory
from pycocotools import mask

from converter.errors import UnreadableFileError
from converter.pictures import datasets
from converter.pictures.datasets import IGNORED, open_dataset

PANOPTIC = "annotations/panoptic_val2017.json"
INSTANCES = "annotations/instances_val2017.json"

# ids with gaps, not in order, as COCO's have gaps
CATEGORIES = [
    {"id": 90, "name": "sky", "isthing": 0},
    {"id": 1, "name": "person", "isthing": 1},
    {"id": 18, "name": "dog", "isthing": 1},
]
PICTURE = np.full((4, 6, 3), 100, dtype=np.uint8)


@pytest.fixture(params=["unpacked", "zipped"])
def pack(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    """Leaves a dataset unpacked, or zips it in the published form."""
    return zip_as_published if request.param == "zipped" else lambda folder: None


def segment(segment_id: int, category: int, crowd: int = 0) -> dict[str, int]:
    return {"id": segment_id, "category_id": category, "iscrowd": crowd}


def panoptic(folder: Path) -> None:
    ids = np.array(
        [
            [7, 7, 7, 70000, 70000, 70000],
            [7, 7, 7, 70000, 70000, 70000],
            [0, 0, 300, 300, 41, 41],
            [0, 0, 300, 300, 41, 55],
        ]
    )
    segments = [segment(70000, 1), segment(7, 90), segment(300, 18, crowd=1), segment(55, 5)]
    write_coco_panoptic(folder, [PICTURE, PICTURE], [ids, ids * 0], [segments, []], CATEGORIES)


def test_panoptic_annotations_are_segments_of_contiguous_classes(
    tmp_path: Path, pack: Callable[[Path], None]
) -> None:
    panoptic(tmp_path)
    pack(tmp_path)

    with open_dataset("coco-panoptic", tmp_path) as dataset:
        assert (dataset.names, dataset.stuff) == (("person", "dog", "sky"), (2,))
        assert len(dataset) == 1  # the other picture has no segment
        example = dataset.read(0)

    assert example is not None
    assert example.image.size == (6, 4)
    assert example.target.classes == (2, 1, 0)  # by ascending id: 7, 300, 70000
    assert example.target.crowd == (False, True, False)
    # neither the id that is not listed (41) nor the category that is not (55) is a segment
    assert example.target.ids.tolist() == [
        [0, 0, 0, 2, 2, 2],
        [0, 0, 0, 2, 2, 2],
        [-1, -1, 1, 1, -1, -1],
        [-1, -1, 1, 1, -1, -1],
    ]


# pycocotools' own, of its decode
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_instances_are_read_from_polygons_and_run_lengths(
    tmp_path: Path, pack: Callable[[Path], None]
) -> None:
    crowd = np.zeros((4, 6), dtype=bool)
    crowd[0, :2] = True
    objects: list[dict[str, Any]] = [
        {"category_id": 18, "iscrowd": 0, "segmentation": [[2, 1, 6, 1, 6, 4, 2, 4]]},
        {"category_id": 1, "iscrowd": 1, "segmentation": run_lengths(crowd)},
        {"category_id": 5, "iscrowd": 0, "segmentation": [[0, 0, 1, 0, 1, 1]]},
    ]
    write_coco_instances(tmp_path, [PICTURE, PICTURE], [[], objects], CATEGORIES)
    pack(tmp_path)

    with open_dataset("coco-instance", tmp_path) as dataset:
        assert len(dataset) == 1  # the other picture has no object
        example = dataset.read(0)

    assert example is not None
    assert (example.target.classes, example.target.crowd) == ((1, 0), (False, True))
    polygon, runs = (mask.decode(encoded).astype(bool) for encoded in example.target.masks)
    rectangle = np.zeros((4, 6), dtype=bool)
    rectangle[1:4, 2:6] = True
    assert (polygon == rectangle).all()
    assert (runs == crowd).all()


def test_ade20k_counts_its_labels_from_one(tmp_path: Path, pack: Callable[[Path], None]) -> None:
    labels = np.array([[0, 1, 1, 2, 150, 151]] * 4, dtype=np.uint8)
    write_ade20k(tmp_path, [PICTURE], [labels])
    pack(tmp_path)

    with open_dataset("ade20k-semantic", tmp_path) as dataset:
        assert (len(dataset.names), dataset.names[0], len(dataset)) == (150, "wall", 1)
        example = dataset.read(0)

    assert example is not None
    assert example.target.tolist() == [[IGNORED, 0, 0, 1, 149, IGNORED]] * 4


def test_an_ade20k_picture_of_one_label_is_left_out(tmp_path: Path) -> None:
    write_ade20k(tmp_path, [PICTURE], [np.full((4, 6), 3, dtype=np.uint8)])

    with open_dataset("ade20k-semantic", tmp_path) as dataset:
        assert dataset.read(0) is None


def test_the_folder_of_ade20k_itself_is_accepted(tmp_path: Path) -> None:
    write_ade20k(tmp_path, [PICTURE], [np.eye(4, 6, dtype=np.uint8)])

    with open_dataset("ade20k-semantic", tmp_path / "ADEChallengeData2016") as dataset:
        assert len(dataset) == 1
        assert dataset.read(0) is not None


def test_a_panoptic_folder_that_is_not_cocos_is_read() -> None:
    with open_dataset("coco-panoptic", FIXTURES / "shapes_panoptic_128/val") as dataset:
        assert dataset.names == ("circle", "square", "triangle", "sky", "grass", "sand")
        assert (dataset.stuff, len(dataset)) == ((3, 4, 5), 48)
        example = dataset.read(0)

    assert example is not None
    assert example.image.size == (81, 103)
    assert example.target.classes == (5, 3, 2, 0)


@pytest.mark.parametrize("name", datasets.DATASETS)
def test_a_folder_without_the_dataset_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnreadableFileError, match=str(tmp_path)), open_dataset(name, tmp_path):
        pass
    with (
        pytest.raises(UnreadableFileError, match="no folder"),
        open_dataset(name, tmp_path / "nowhere"),
    ):
        pass


def refusal(name: str, folder: Path) -> str:
    with (
        pytest.raises(UnreadableFileError) as refused,
        open_dataset(name, folder) as dataset,
    ):
        dataset.read(0)
    return refused.value.message


@pytest.mark.parametrize("file_name", ["../../secret.jpg", "/etc/passwd", "a/b.jpg"])
def test_annotations_cannot_name_files_elsewhere(file_name: str, tmp_path: Path) -> None:
    panoptic(tmp_path)
    path = tmp_path / PANOPTIC
    content = json.loads(path.read_text())
    content["images"][0]["file_name"] = file_name
    path.write_text(json.dumps(content))

    assert "is not a plain file name" in refusal("coco-panoptic", tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"images": []}, "it lacks 10"),
        ({"annotations": [{"image_id": 10}]}, "it lacks 'segments_info'"),
        ({"annotations": 3}, "not iterable"),
        ({"categories": [{"id": 1}]}, "it lacks 'name'"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": "b", "name": "b"}]}, "not supported"),
        ({"categories": [{"id": [1], "name": "a"}]}, "id is [1], expected a whole number"),
        ({"images": [{"id": None, "file_name": "a.jpg"}]}, "id is None, expected a whole number"),
        (
            {
                "annotations": [
                    {
                        "image_id": 10,
                        "file_name": "000000000000.png",
                        "segments_info": [{"id": 1, "category_id": [1], "iscrowd": 0}],
                    }
                ]
            },
            "category_id is [1], expected a whole number",
        ),
    ],
)
def test_malformed_annotations_are_refused(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    panoptic(tmp_path)
    path = tmp_path / PANOPTIC
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    message = refusal("coco-panoptic", tmp_path)

    assert str(path) in message
    assert reason in message


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000])
def test_annotations_that_are_not_a_json_object_are_refused(text: str, tmp_path: Path) -> None:
    panoptic(tmp_path)
    (tmp_path / PANOPTIC).write_text(text)

    assert "cannot be read" in refusal("coco-panoptic", tmp_path)


@pytest.mark.parametrize(
    "segmentation",
    [
        [],
        [[0, 0, 1, 1]],
        [[0, 0, 1, 0, 1]],
        [["a"] * 6],
        [[0, 0, 1e9, 0, 1e9, 1e9]],
        [[0, 0, float("nan"), 0, 1, 1]],
        {"size": [4, 6], "counts": [25]},
        {"size": [4, 6], "counts": [-1, 25]},
        {"size": [4, 6], "counts": [10**30]},
        {"size": [6, 4], "counts": [24]},
        {"size": [4, 6], "counts": "04TT"},
        {"counts": [24]},
        None,
    ],
)
def test_masks_that_pycocotools_must_not_see_are_refused(
    segmentation: object, tmp_path: Path
) -> None:
    annotation = {"category_id": 1, "iscrowd": 0, "segmentation": segmentation}
    write_coco_instances(tmp_path, [PICTURE], [[annotation]], CATEGORIES)

    assert "picture 10 in" in refusal("coco-instance", tmp_path)


def test_an_id_map_of_another_size_is_refused(tmp_path: Path) -> None:
    panoptic(tmp_path)
    write_picture(tmp_path / "annotations/panoptic_val2017/000000000000.png", PICTURE[:3])

    assert "has 6x3 pixels, expected 6x4 as its picture" in refusal("coco-panoptic", tmp_path)


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    panoptic(tmp_path)
    picture = tmp_path / "val2017/000000000000.jpg"
    picture.unlink()

    assert refusal("coco-panoptic", tmp_path) == f"There is no file {picture}."


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    panoptic(tmp_path)
    picture = tmp_path / "val2017/000000000000.jpg"
    picture.write_bytes(picture.read_bytes()[:50])
    zip_as_published(tmp_path)

    message = refusal("coco-panoptic", tmp_path)

    assert f"val2017/000000000000.jpg in {tmp_path / 'val2017.zip'} cannot be read" in message


def test_a_file_that_is_not_a_picture_is_named(tmp_path: Path) -> None:
    panoptic(tmp_path)
    picture = tmp_path / "val2017/000000000000.jpg"
    picture.write_bytes(b"nothing")

    assert refusal("coco-panoptic", tmp_path) == f"{picture} is not a picture of a known format."


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 100_000])
def test_a_picture_that_claims_a_hostile_size_is_refused(side: int, tmp_path: Path) -> None:
    panoptic(tmp_path)
    chunks = {b"IHDR": struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), b"IDAT": b""}
    png = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks.items():
        png += struct.pack(">I", len(body)) + kind + body
        png += struct.pack(">I", zlib.crc32(kind + body))
    (tmp_path / "val2017/000000000000.jpg").write_bytes(png)

    assert "decompression bomb" in refusal("coco-panoptic", tmp_path)


def test_annotations_of_nothing_but_brackets_are_not_parsed(tmp_path: Path) -> None:
    (tmp_path / "panoptic.json").write_bytes(b'{"categories":[' + b"[]," * 2**21 + b"1]}")

    assert "more than 2,097,152 lists and objects" in refusal("coco-panoptic", tmp_path)


def test_a_member_larger_than_the_limit_is_not_read(tmp_path: Path) -> None:
    panoptic(tmp_path)
    zip_as_published(tmp_path)
    with zipfile.ZipFile(
        tmp_path / "panoptic_annotations_trainval2017.zip", "w", zipfile.ZIP_DEFLATED
    ) as archive:
        archive.writestr(PANOPTIC, b" " * 1_000_000)

    with (
        pytest.raises(UnreadableFileError, match="has more than 1,000 bytes"),
        open_dataset("coco-panoptic", tmp_path, max_annotation_bytes=1000),
    ):
        pass


def test_a_member_that_would_become_a_hundred_times_as_large_is_not_read(tmp_path: Path) -> None:
    panoptic(tmp_path)
    zip_as_published(tmp_path)
    with zipfile.ZipFile(tmp_path / "val2017.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("val2017/000000000000.jpg", bytes(10_000_000))

    message = refusal("coco-panoptic", tmp_path)

    assert "val2017/000000000000.jpg in " in message
    assert "would unpack from 9," in message
    assert "to 10,000,000 bytes" in message


def test_members_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    panoptic(tmp_path)
    zip_as_published(tmp_path)
    path = tmp_path / "val2017.zip"
    path.write_bytes(with_directory(path.read_bytes(), 10))

    assert f"{path} has members that overlap" in refusal("coco-panoptic", tmp_path)


def test_a_directory_larger_than_any_published_one_is_not_read(tmp_path: Path) -> None:
    panoptic(tmp_path)
    zip_as_published(tmp_path)
    path = tmp_path / "val2017.zip"
    path.write_bytes(with_directory(path.read_bytes(), 150_000))

    assert "its directory is larger than 16,777,216 bytes" in refusal("coco-panoptic", tmp_path)


@pytest.mark.parametrize("kept", [10, -30])
def test_a_truncated_zip_is_refused(kept: int, tmp_path: Path) -> None:
    panoptic(tmp_path)
    zip_as_published(tmp_path)
    path = tmp_path / "val2017.zip"
    path.write_bytes(path.read_bytes()[:kept])

    assert f"{path} cannot be read" in refusal("coco-panoptic", tmp_path)


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    panoptic(tmp_path)
    zip_as_published(tmp_path)
    path = tmp_path / "val2017.zip"
    content = bytearray(path.read_bytes())
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(header) + flags] |= 1
    path.write_bytes(content)

    assert "encrypted" in refusal("coco-panoptic", tmp_path)
