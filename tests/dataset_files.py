"""Small datasets in the layouts that COCO and ADE20K are published in, unpacked and zipped."""

import json
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# what each published zip holds; a zip inside another one comes first
ZIPS = {
    "annotations/panoptic_val2017.zip": ["annotations/panoptic_val2017"],
    "panoptic_annotations_trainval2017.zip": [
        "annotations/panoptic_val2017.json",
        "annotations/panoptic_val2017.zip",
    ],
    "annotations_trainval2017.zip": ["annotations/instances_val2017.json"],
    "val2017.zip": ["val2017"],
    "ADEChallengeData2016.zip": ["ADEChallengeData2016"],
}


def write_picture(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Writes a PNG, whatever the name: what is read is then what was written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, format="PNG")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_coco_panoptic(
    folder: Path,
    pictures: Sequence[NDArray[np.uint8]],
    id_maps: Sequence[NDArray[np.int64]],
    segments: Sequence[Sequence[Mapping[str, int]]],
    categories: Sequence[Mapping[str, Any]],
) -> None:
    """Writes pictures (height, width, 3), maps of segment ids, and `segments_info` of each."""
    for i, (pixels, ids) in enumerate(zip(pictures, id_maps, strict=True)):
        write_picture(folder / "val2017" / f"{i:012}.jpg", pixels)
        colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1)
        maps = folder / "annotations/panoptic_val2017"
        write_picture(maps / f"{i:012}.png", colours.astype(np.uint8))
    write_json(
        folder / "annotations/panoptic_val2017.json",
        {
            "images": [{"id": 10 + i, "file_name": f"{i:012}.jpg"} for i in range(len(pictures))],
            "annotations": [
                {"image_id": 10 + i, "file_name": f"{i:012}.png", "segments_info": list(info)}
                for i, info in enumerate(segments)
            ],
            "categories": list(categories),
        },
    )


def write_coco_instances(
    folder: Path,
    pictures: Sequence[NDArray[np.uint8]],
    objects: Sequence[Sequence[Mapping[str, Any]]],
    categories: Sequence[Mapping[str, Any]],
) -> None:
    """Writes pictures, and the annotations of each without their `id` and `image_id`."""
    for i, pixels in enumerate(pictures):
        write_picture(folder / "val2017" / f"{i:012}.jpg", pixels)
    annotations = [
        {"id": 100 * i + j, "image_id": 10 + i, **annotation}
        for i, entries in enumerate(objects)
        for j, annotation in enumerate(entries)
    ]
    write_json(
        folder / "annotations/instances_val2017.json",
        {
            "images": [{"id": 10 + i, "file_name": f"{i:012}.jpg"} for i in range(len(pictures))],
            "annotations": annotations,
            "categories": list(categories),
        },
    )


def write_ade20k(
    folder: Path, pictures: Sequence[NDArray[np.uint8]], labels: Sequence[NDArray[np.uint8]]
) -> None:
    """Writes pictures, and maps of labels: 0 for none, k + 1 for class k."""
    root = folder / "ADEChallengeData2016"
    for i, (pixels, label_map) in enumerate(zip(pictures, labels, strict=True), start=1):
        write_picture(root / f"images/validation/ADE_val_{i:08}.jpg", pixels)
        write_picture(root / f"annotations/validation/ADE_val_{i:08}.png", label_map)


def zip_as_published(folder: Path) -> None:
    """Puts what the published zips hold into zips, and deletes it."""
    for name, entries in ZIPS.items():
        paths = [folder / entry for entry in entries if (folder / entry).exists()]
        if not paths:
            continue
        # the zip of id maps holds panoptic_val2017/, not annotations/panoptic_val2017/
        root = (folder / name).parent
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in paths:
                for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                    archive.write(file, file.relative_to(root))
        for path in paths:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def run_lengths(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """COCO's uncompressed run-length encoding of a mask (height, width)."""
    column_major = mask.T.ravel()
    changes = np.flatnonzero(np.diff(column_major)) + 1
    lengths = np.diff([0, *changes, column_major.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *lengths] if column_major[0] else lengths}
