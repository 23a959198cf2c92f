"""Reads the datasets that models are evaluated on, as published: zipped or unpacked.

Which pictures count, and what their annotations mean, follows the original
(github.com/tue-mps/eomt datasets/).
"""

import json
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from reprlib import repr as shortened
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from converter import class_names
from converter.errors import UnreadableFileError
from converter.files import open_regular
from converter.zips import open_zip

if TYPE_CHECKING:
    from typing import Self

IGNORED = 255  # in semantic targets: pixels that belong to no class

# Largest size in bytes of a picture, of an annotation file, of a zip within a zip and of a zip's
# directory. Published files have at most a third of that: instances_val2017.json has 20 MB, the
# directory of ADEChallengeData2016.zip 6 MB.
_MAX_PICTURE_BYTES = 1 << 26
MAX_ANNOTATION_BYTES = 1 << 26
_MAX_ZIP_BYTES = 1 << 28
_MAX_DIRECTORY_BYTES = 1 << 24

# An annotation file may have one list or object per so many bytes of the largest size. They take a
# hundred times as much memory as their text. instances_val2017.json has a tenth of these.
_BYTES_PER_CONTAINER = 1 << 5

# Largest compression ratio of a file in a zip, if it has more than _SMALL_BYTES. Compression makes
# JSON ten times smaller and pictures hardly, but small files may shrink to almost nothing.
_MAX_RATIO = 100
_SMALL_BYTES = 1 << 20

_HEADER_BYTES = 30  # smallest size of the header before every member of a zip


@dataclass(frozen=True)
class Segments:
    """A picture's segments: annotated ones, or those that a model found.

    Attributes:
        ids: (height, width) int64, the index of every pixel's segment; -1 outside all of them.
            Every segment has at least one pixel.
        classes: class id per segment.
        crowd: per segment, whether it is a group whose members were not annotated one by one;
            always false for what a model found.
    """

    ids: NDArray[np.int64]
    classes: tuple[int, ...]
    crowd: tuple[bool, ...]


@dataclass(frozen=True)
class Instances:
    """Objects in a picture, which may overlap: annotated ones, or those that a model found.

    Attributes:
        image_id: the picture's position in its dataset.
        masks: COCO's run-length encoding per object: ``size`` (height, width), ``counts`` bytes.
        classes: class id per object.
        crowd: as in Segments.
        scores: confidence per object, from 0 to 1; empty for annotated ones.
    """

    image_id: int
    masks: tuple[Mapping[str, Any], ...]
    classes: tuple[int, ...]
    crowd: tuple[bool, ...]
    scores: tuple[float, ...] = ()


@dataclass(frozen=True)
class Example:
    """A picture and its annotations.

    Attributes:
        image: RGB; a rotation in the file's EXIF data is not applied.
        target: Segments, Instances, or a class map (height, width) uint8 with IGNORED.
    """

    image: Image.Image
    target: Any


class Dataset(Protocol):
    """Pictures with annotations.

    Attributes:
        names: class names, in the order of the class ids.
        stuff: ids of the classes that have no instances (sky, grass).
    """

    names: tuple[str, ...]
    stuff: tuple[int, ...]

    def __len__(self) -> int: ...

    def read(self, index: int) -> Example | None:
        """Reads an example; None for one that the original leaves out.

        Raises:
            UnreadableFileError: a file is missing, broken or larger than any published one.
        """


class Files:
    """The files in a folder; a zip is read as if it were unpacked in the folder where it is.

    Nothing is unpacked to disk. A file on disk is preferred to one with the same name in a zip.
    """

    def __init__(self, root: Path, max_annotation_bytes: int = MAX_ANNOTATION_BYTES) -> None:
        if not root.is_dir():
            raise UnreadableFileError(f"There is no folder {root}.")
        self.root = root
        self._max_annotation_bytes = max_annotation_bytes
        self._stack = ExitStack()
        self._members: dict[str, tuple[zipfile.ZipFile, zipfile.ZipInfo]] = {}

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return (self.root / name).is_file() or name in self._members

    def open_zip(self, name: str) -> None:
        """Adds the files of a zip, which may be inside another zip.

        Raises:
            UnreadableFileError: as in `read`, or it is not a zip.
        """
        path = self.root / name
        with _readable(self.title(name)):
            if path.is_file():
                file: BinaryIO = self._stack.enter_context(open_regular(path))
            else:
                file = BytesIO(self.read(name, _MAX_ZIP_BYTES))
            archive = self._stack.enter_context(open_zip(file, _MAX_DIRECTORY_BYTES))
            archive.filename = str(path) if path.is_file() else None
        # members that share their bytes could make a small zip unpack to any size
        if sum(_HEADER_BYTES + info.compress_size for info in archive.infolist()) > (
            archive.start_dir
        ):
            raise UnreadableFileError(f"{self.title(name)} has members that overlap.")
        for info in archive.infolist():
            member = str(PurePosixPath(name).parent / info.filename)
            if not info.is_dir():
                self._members.setdefault(member, (archive, info))

    def title(self, name: str) -> str:
        """A file's name for messages: its path, or its name in a zip and the zip's path."""
        if name in self._members and not (self.root / name).is_file():
            archive, info = self._members[name]
            return f"{info.filename} in {archive.filename or 'a zip within a zip'}"
        return str(self.root / name)

    def names(self, folder: str) -> list[str]:
        """Names of the files directly in a folder, sorted."""
        if (self.root / folder).is_dir():
            return sorted(path.name for path in (self.root / folder).iterdir() if path.is_file())
        paths = map(PurePosixPath, self._members)
        return sorted(path.name for path in paths if str(path.parent) == folder)

    def read(self, name: str, limit: int) -> bytes:
        """The bytes of a file.

        Raises:
            UnreadableFileError: it is missing, broken, or has more than ``limit`` bytes.
        """
        title = self.title(name)
        path = self.root / name
        with _readable(title):
            if path.is_file():
                with open_regular(path) as file:
                    content = file.read(limit + 1)
            elif name in self._members:
                archive, info = self._members[name]
                if info.file_size > max(_SMALL_BYTES, _MAX_RATIO * info.compress_size):
                    raise UnreadableFileError(
                        f"{title} would unpack from {info.compress_size:,} to {info.file_size:,} "
                        "bytes: it is not read."
                    )
                with archive.open(info) as member:
                    content = member.read(limit + 1)
            else:
                raise UnreadableFileError(f"There is no file {title}.")
        if len(content) > limit:
            raise UnreadableFileError(f"{title} has more than {limit:,} bytes: it is not read.")
        return content

    def read_image(self, name: str, mode: str) -> Image.Image:
        """A picture, converted to one of Pillow's modes.

        Raises:
            UnreadableFileError: as in `read`, or it is not a picture, or its size is hostile.
        """
        from reference_model.pictures import FORMATS

        content = BytesIO(self.read(name, _MAX_PICTURE_BYTES))
        with _readable(self.title(name)), Image.open(content, formats=FORMATS) as image:
            return image.convert(mode)

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object.

        Raises:
            UnreadableFileError: as in `read`, or it is not a JSON object.
        """
        with _readable(self.title(name)):
            text = self.read(name, self._max_annotation_bytes)
            most = self._max_annotation_bytes // _BYTES_PER_CONTAINER
            if text.count(b"[") + text.count(b"{") > most:
                raise ValueError(f"it has more than {most:,} lists and objects")
            content = json.loads(text)
            if not isinstance(content, dict):
                raise ValueError("it is not a JSON object")
            return content


class CocoPanoptic:
    """Pictures with annotations in COCO's panoptic format.

    Published files: annotations/panoptic_val2017.json with the folder or zip of id maps beside it,
    and val2017. Otherwise: panoptic.json, panoptic and images.
    """

    zips = (
        "val2017.zip",
        "panoptic_annotations_trainval2017.zip",
        "annotations/panoptic_val2017.zip",
    )

    def __init__(self, files: Files) -> None:
        """Reads the annotations.

        Raises:
            UnreadableFileError: they are missing or have another form.
        """
        self._files = files
        self._annotations, self._images = _find(
            files, {"annotations/panoptic_val2017.json": "val2017", "panoptic.json": "images"}
        )
        with _readable(files.title(self._annotations)):
            content = files.read_json(self._annotations)
            self.names, self.stuff, self._class_ids = _parse_categories(content)
            file_names = _parse_file_names(content)
            self._entries = sorted(
                (file_names[_id(entry, "image_id")], entry["image_id"], _plain(entry["file_name"]))
                for entry in content["annotations"]
                if entry["segments_info"]
            )
            self._segments = {
                _id(entry, "image_id"): {
                    _id(segment): (_id(segment, "category_id"), bool(segment["iscrowd"]))
                    for segment in entry["segments_info"]
                }
                for entry in content["annotations"]
            }

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, index: int) -> Example:
        """Reads an example with Segments.

        Segments are numbered by ascending id; pixels with an id or a category that the annotations
        do not list belong to no segment.
        """
        file_name, image_id, map_name = self._entries[index]
        image = self._files.read_image(f"{self._images}/{file_name}", "RGB")
        map_path = f"{self._annotations.removesuffix('.json')}/{map_name}"
        id_map = self._files.read_image(map_path, "RGB")
        _check_size(id_map, image, self._files.title(map_path))

        colours = np.asarray(id_map).astype(np.int64)
        # COCO's panoptic format: id = R + 256 G + 256² B
        pixels = colours @ np.array([1, 1 << 8, 1 << 16])
        present, inverse = np.unique(pixels, return_inverse=True)
        indices = np.full(len(present), -1, dtype=np.int64)
        classes: list[int] = []
        crowd: list[bool] = []
        for i, segment_id in enumerate(present.tolist()):
            category, is_crowd = self._segments[image_id].get(segment_id, (None, False))
            if category in self._class_ids:
                indices[i] = len(classes)
                classes.append(self._class_ids[category])
                crowd.append(is_crowd)
        target = Segments(indices[inverse].reshape(pixels.shape), tuple(classes), tuple(crowd))
        return Example(image, target)


class CocoInstances:
    """Pictures with annotations in COCO's instance format; those without annotation are left out.

    Published files: annotations/instances_val2017.json and val2017. Otherwise: instances.json and
    images.
    """

    zips = ("val2017.zip", "annotations_trainval2017.zip")

    def __init__(self, files: Files) -> None:
        """Reads the annotations.

        Raises:
            UnreadableFileError: they are missing or have another form.
        """
        self._files = files
        self.stuff: tuple[int, ...] = ()
        self._annotations, self._images = _find(
            files, {"annotations/instances_val2017.json": "val2017", "instances.json": "images"}
        )
        with _readable(files.title(self._annotations)):
            content = files.read_json(self._annotations)
            self.names, _, self._class_ids = _parse_categories(content)
            file_names = _parse_file_names(content)
            self._objects: dict[int, list[dict[str, Any]]] = {}
            for annotation in content["annotations"]:
                self._objects.setdefault(_id(annotation, "image_id"), []).append(annotation)
            self._entries = sorted((file_names[image_id], image_id) for image_id in self._objects)

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, index: int) -> Example:
        """Reads an example with Instances; objects of unlisted categories are left out."""
        file_name, image_id = self._entries[index]
        image = self._files.read_image(f"{self._images}/{file_name}", "RGB")
        size = (image.height, image.width)
        with _readable(f"picture {image_id} in {self._files.title(self._annotations)}"):
            objects = [
                annotation
                for annotation in self._objects[image_id]
                if _id(annotation, "category_id") in self._class_ids
            ]
            target = Instances(
                index,
                tuple(_encode(annotation["segmentation"], size) for annotation in objects),
                tuple(self._class_ids[annotation["category_id"]] for annotation in objects),
                tuple(bool(annotation["iscrowd"]) for annotation in objects),
            )
        return Example(image, target)


class Ade20kSemantic:
    """ADE20K's validation pictures with their 150 classes, from ADEChallengeData2016."""

    zips = ("ADEChallengeData2016.zip",)

    def __init__(self, files: Files) -> None:
        """Lists the pictures.

        Raises:
            UnreadableFileError: there are none.
        """
        self._files = files
        classes = class_names.of_dataset("ade20k_semantic")
        self.names, self.stuff = classes.names, classes.stuff or ()
        for root in ("ADEChallengeData2016", "."):
            self._root = PurePosixPath(root)
            self._stems = [
                PurePosixPath(name).stem
                for name in files.names(str(self._root / "annotations/validation"))
                if name.endswith(".png")
            ]
            if self._stems:
                return
        raise UnreadableFileError(
            f"{files.root} has neither ADEChallengeData2016.zip nor a folder ADEChallengeData2016 "
            "with annotations/validation and images/validation."
        )

    def __len__(self) -> int:
        return len(self._stems)

    def read(self, index: int) -> Example | None:
        """Reads an example with a class map; None if all its pixels have the same label."""
        stem = self._stems[index]
        image = self._files.read_image(str(self._root / "images/validation" / f"{stem}.jpg"), "RGB")
        map_name = str(self._root / "annotations/validation" / f"{stem}.png")
        labels = self._files.read_image(map_name, "L")
        _check_size(labels, image, self._files.title(map_name))
        low, high = labels.getextrema()
        if low == high:
            return None
        # label 1 is class 0; label 0 is "none of them"
        target = np.asarray(labels) - np.uint8(1)
        target[target >= len(self.names)] = IGNORED
        return Example(image, target)


_READERS: Mapping[str, type[CocoPanoptic] | type[CocoInstances] | type[Ade20kSemantic]] = {
    "coco-panoptic": CocoPanoptic,
    "coco-instance": CocoInstances,
    "ade20k-semantic": Ade20kSemantic,
}

DATASETS = tuple(_READERS)


@contextmanager
def open_dataset(
    name: str, data: Path, *, max_annotation_bytes: int = MAX_ANNOTATION_BYTES
) -> Iterator[Dataset]:
    """Opens a dataset in a folder that has its zips, or their unpacked content.

    Args:
        name: one of DATASETS.
        data: the folder.
        max_annotation_bytes: a larger annotation file is not read; one from strangers could take a
            hundred times as much memory.

    Raises:
        UnreadableFileError: its annotations are missing or broken.
    """
    reader = _READERS[name]
    with Files(data, max_annotation_bytes) as files:
        for zipped in reader.zips:
            if zipped in files:
                files.open_zip(zipped)
        yield reader(files)


@contextmanager
def _readable(title: str) -> Iterator[None]:
    """Turns the exceptions that hostile and broken files cause into UnreadableFileError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except UnreadableFileError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableFileError(f"{title} is not a picture of a known format.") from error
    except KeyError as error:
        raise UnreadableFileError(f"{title} cannot be read: it lacks {error}.") from error
    except (
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
        AttributeError,
        EOFError,
        IndexError,  # from zipfile, like struct.error
        NotImplementedError,  # compression that zipfile does not support
        OSError,
        OverflowError,
        RecursionError,
        RuntimeError,  # an encrypted zip
        SyntaxError,  # from Pillow, for a broken PNG
        TypeError,
        ValueError,
        struct.error,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise UnreadableFileError(f"{title} cannot be read: {error}.") from error


def _find(files: Files, places: Mapping[str, str]) -> tuple[str, str]:
    """The name of the annotation file that exists, and the folder of its pictures."""
    for annotations, images in places.items():
        if annotations in files:
            return annotations, images
    raise UnreadableFileError(
        f"{files.root} has no annotation file, expected {' or '.join(places)}.",
        "Give the folder that holds the dataset's zips, or their unpacked content.",
    )


def _parse_categories(
    content: Mapping[str, Any],
) -> tuple[tuple[str, ...], tuple[int, ...], dict[int, int]]:
    """Class names, ids of stuff classes, and class ids by category id, which has gaps in COCO."""
    categories = sorted(content["categories"], key=_id)
    return (
        tuple(str(category["name"]) for category in categories),
        tuple(i for i, category in enumerate(categories) if not category.get("isthing", True)),
        {category["id"]: i for i, category in enumerate(categories)},
    )


def _parse_file_names(content: Mapping[str, Any]) -> dict[Any, str]:
    return {_id(image): _plain(image["file_name"]) for image in content["images"]}


def _id(entry: Mapping[str, Any], key: str = "id") -> Any:
    """An id: a number in COCO, a text in some datasets in COCO's format."""
    value = entry[key]
    if type(value) not in (int, str):
        raise TypeError(f"{key} is {shortened(value)}, expected a whole number or a text")
    return value


def _plain(file_name: str) -> str:
    if file_name != PurePosixPath(file_name).name:
        raise ValueError(f"{file_name!r} is not a plain file name, without folders")
    return file_name


def _check_size(annotated: Image.Image, image: Image.Image, title: str) -> None:
    if annotated.size != image.size:
        raise UnreadableFileError(
            f"{title} has {annotated.width}x{annotated.height} pixels, expected "
            f"{image.width}x{image.height} as its picture."
        )


def _encode(segmentation: Any, size: tuple[int, int]) -> Mapping[str, Any]:
    """Compresses polygons, or an uncompressed run-length encoding, to a compressed one.

    pycocotools trusts its input, so input that would make it access memory out of bounds is
    refused.

    Raises:
        ValueError: the input is neither, or it does not fit in a picture of ``size``.
    """
    from pycocotools import mask

    height, width = size
    encoded: Mapping[str, Any]
    if isinstance(segmentation, dict):
        counts = np.array(segmentation["counts"], dtype=np.int64)
        fits = tuple(segmentation["size"]) == size and counts.sum() == height * width
        if counts.ndim != 1 or not fits or (counts < 0).any():
            raise ValueError(f"a run-length encoding does not have {height}x{width} pixels")
        encoded = mask.frPyObjects(segmentation, height, width)
        return encoded
    polygons = [np.array(polygon, dtype=np.float64) for polygon in segmentation]
    for polygon in polygons:
        if polygon.ndim != 1 or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError("a polygon is not a list of at least three points x, y")
        if not (np.abs(polygon) <= 2 * max(size)).all():
            raise ValueError(f"a polygon leaves the {height}x{width} pixels of its picture")
    if not polygons:
        raise ValueError("an object has no polygon")
    encoded = mask.merge(mask.frPyObjects([polygon.tolist() for polygon in polygons], *size))
    return encoded
