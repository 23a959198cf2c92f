"""Segments picture files with a model, and writes the segments."""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from glob import glob, has_magic
from io import BytesIO
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from converter.errors import EomtConvertError, OutputError, UnreadableFileError, UsageError
from converter.files import (
    PICTURE_LIMIT,
    read_bytes,
    read_json_object,
    replacing,
    user_path,
    writable,
    write_json,
)
from converter.hub.access import Access
from converter.job import Progress
from converter.models import (
    Compile,
    fetch_model,
    find_task,
    load_model,
    run_network,
    torch_device,
)
from converter.pictures.coco import Segment, document, encode_mask, id_map_png, measure
from converter.pictures.drawing import Label, draw_overlay
from converter.pictures.feeding import default_workers, in_order, worker_threads
from converter.version import TOOL, __version__

# what post-processing gives for a picture, in arrays
_Result: TypeAlias = dict[str, Any]

# a picture's id map (height, width), with 0 for no segment, and its segments
_Segmented: TypeAlias = tuple[NDArray[np.unsignedinteger[Any]], tuple[Segment, ...]]

if TYPE_CHECKING:
    from converter.models import Network
    from reference_model import (
        EomtDinov3Config,
        EomtDinov3ForUniversalSegmentationOutput,
        EomtImageProcessor,
    )

ID_MAP, SEGMENTS = ".segments.png", ".segments.json"

# the format of overlays; none to write no overlay
Overlay = Literal["jpg", "png", "none"]

# the ending of an overlay in each format
OVERLAYS = {"jpg": ".overlay.jpg", "png": ".overlay.png"}

# file name endings of pictures, used to find them in a folder
PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")

# largest size in bytes of a segments file; each of 100 instances may have a mask of 2.5 MB
_SEGMENTS_LIMIT = 2**28

# How Pillow saves an overlay, by its file's suffix. JPEG: with colour at half the resolution, the
# default, the legend's black text is tinted by the colour around it. PNG, compared with zlib's
# default, 6: files are a quarter larger, in a fifth of the time.
_SAVING: Mapping[str, dict[str, Any]] = {
    ".jpg": {"format": "JPEG", "quality": 90, "subsampling": 0},
    ".png": {"format": "PNG", "compress_level": 2},
}

# Multiplications for a picture, about 0.05 s on one core. The smallest published model has fifty
# times as many.
_SMALL = 10**9

# Resized to the model's input, longer and narrower pictures would be only a few pixels wide; cut
# into windows, they would give dozens of them.
_MAX_ASPECT_RATIO = 16


@dataclass(frozen=True)
class SegmentedPicture:
    """A picture and what was written for it.

    Attributes:
        picture: the file that was read.
        overlay: the picture with coloured segments and a legend; None if none was written.
        id_map: every pixel's segment, in COCO's panoptic format.
        segments_file: the segments as JSON, in COCO's panoptic format or, for an instance model,
            in its instance format.
        size: (height, width) in pixels, after the rotation in the file's EXIF data.
        segments: the segments that were found.
    """

    picture: Path
    overlay: Path | None
    id_map: Path
    segments_file: Path
    size: tuple[int, int]
    segments: tuple[Segment, ...]

    def to_dict(self) -> dict[str, Any]:
        """The picture as JSON shows it."""
        return {
            "picture": str(self.picture),
            "overlay": None if self.overlay is None else str(self.overlay),
            "id_map": str(self.id_map),
            "segments_file": str(self.segments_file),
            "height": self.size[0],
            "width": self.size[1],
            "segments": [segment.to_dict() for segment in self.segments],
        }


@dataclass(frozen=True)
class Skipped:
    """A picture, folder or pattern that gave nothing to segment, and why."""

    picture: str
    reason: str


@dataclass(frozen=True)
class Segmentation:
    """The result of segmenting pictures.

    Attributes:
        model: a folder or a repository.
        task: panoptic, instance or semantic.
        names: class names, by category id.
        pictures: the pictures that were segmented, in order.
        skipped: the pictures, folders and patterns that gave nothing to segment.
    """

    model: str
    task: str
    names: tuple[str, ...]
    pictures: tuple[SegmentedPicture, ...]
    skipped: tuple[Skipped, ...]

    def to_dict(self) -> dict[str, Any]:
        """The segmentation as JSON shows it."""
        return {
            "model": self.model,
            "task": self.task,
            "categories": dict(enumerate(self.names)),
            "pictures": [picture.to_dict() for picture in self.pictures],
            "skipped": [vars(entry) for entry in self.skipped],
        }


@dataclass(frozen=True)
class _Picture:
    """A picture that was read.

    Attributes:
        index: its position among the pictures to segment.
        size: (height, width) in pixels.
        resized: in RGB, as large as in the network's input.
        image: in RGB, to draw the overlay on; None if there will be none.
    """

    index: int
    size: tuple[int, int]
    resized: Image.Image
    image: Image.Image | None


def segment(
    model: str | Path,
    pictures: Sequence[str | Path],
    output: str | Path,
    *,
    task: str | None = None,
    threshold: float | None = None,
    overlay: Overlay = "jpg",
    batch_size: int = 4,
    device: str | None = None,
    dtype: str = "auto",
    compile: Compile | None = None,
    threads: int | None = None,
    workers: int | None = None,
    force: bool = False,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    progress: Progress = lambda *_: None,
) -> Segmentation:
    """Segments pictures, and writes an overlay, an id map and a JSON file for each.

    ``street.jpg`` becomes ``street.overlay.jpg``, ``street.segments.png`` and
    ``street.segments.json``; pictures with equal names get numbers. Pictures that cannot be read
    are skipped and listed in the result.

    Args:
        model: folder of a converted model, or a Hub repository, owner/name or owner/name@revision.
        pictures: files; folders, for the pictures directly in them; patterns such as
            ``photos/**/*.jpg``.
        output: the folder to write to; it is created if it does not exist.
        task: panoptic, instance or semantic; by default the task that the model was converted for.
        threshold: the smallest score of a segment; by default 0.8. Not for semantic segmentation.
        overlay: the format of overlays, ``jpg`` or ``png``; ``none`` for none.
        batch_size: number of pictures that go through the network at once.
        device: as torch names it; by default a GPU if there is one.
        dtype: dtype of the weights, as torch names it; ``auto`` for that of the file.
        compile: the mode of torch.compile, ``default`` or ``max-autotune``; None for none.
        threads: number of torch's CPU threads; by default torch's choice.
        workers: number of threads that read, draw and write pictures while the network runs; 0 to
            do one after the other. By default as many as there are cores, up to 16.
        force: replace files of an earlier run: all files of a picture, an overlay in another format
            among them, if the JSON file says that this tool made them. Other files are never
            replaced.
        token: for the Hub; overrides HF_TOKEN and the login file.
        cache_dir: where downloads are kept.
        local_files_only: use only the cache.
        progress: called with a stage, the number of pictures done and of all.

    Raises:
        UsageError: an option is unknown or not possible for the task; or the task is unknown.
        UnreadableFileError: the model cannot be read, or there is no picture.
        OutputError: the output cannot be written, or exists.
        AccessError, HubUnavailableError: the repository cannot be reached.
        EomtConvertError: the model cannot be compiled.
    """
    formats = get_args(Overlay)
    if overlay not in formats:
        raise UsageError(
            f"The format of overlays is {overlay!r}, expected one of {', '.join(formats)}."
        )
    paths, skipped = find_pictures(pictures)
    if not paths:
        raise UnreadableFileError(
            "There is no picture to segment: "
            + "; ".join(f"{entry.picture}: {entry.reason}" for entry in skipped)
        )
    output = user_path(output)
    places = [output / name for name in _distinct_names(paths)]
    _check_output(output, places, force=force)
    access = Access.of(token, cache_dir, local_files_only)
    folder = fetch_model(model, access)
    task = task or find_task(model, folder)
    if task == "semantic" and threshold is not None:
        raise UsageError(
            "Semantic segmentation has no scores, so a threshold is not possible.",
            "Leave out --threshold.",
        )

    workers = default_workers() if workers is None else workers
    done: list[SegmentedPicture] = []
    import torch

    with torch_device(device, threads) as where:
        network, processor = load_model(
            folder, device=where, dtype=dtype, windows=task == "semantic", compile=compile
        )
        if workers and threads is None and where == "cpu" and _is_small(network.config):
            torch.set_num_threads(1)  # until the end of torch_device
        categories = _categories(network, task)
        with writable(output):
            output.mkdir(parents=True, exist_ok=True)

        def load(index: int) -> _Picture | Skipped:
            try:
                image = _read(paths[index])
            except UnreadableFileError as error:
                return Skipped(str(paths[index]), error.message)
            resized, size = processor.resized(image), (image.height, image.width)
            return _Picture(index, size, resized, None if overlay == "none" else image)

        def results(pictures: Iterator[_Picture | Skipped]) -> Iterator[tuple[_Picture, _Result]]:
            for start in range(0, len(paths), batch_size):
                progress("Segmenting", start, len(paths))
                batch = []
                for picture in islice(pictures, batch_size):
                    if isinstance(picture, Skipped):
                        skipped.append(picture)
                    else:
                        batch.append(picture)
                yield from _run(network, processor, batch, task, threshold)

        def finish(result: tuple[_Picture, _Result]) -> SegmentedPicture:
            picture, arrays = result
            place = places[picture.index]
            id_map, segments = _SEGMENTED[task](arrays)
            found = SegmentedPicture(
                paths[picture.index],
                None if overlay == "none" else _named(place, OVERLAYS[overlay]),
                _named(place, ID_MAP),
                _named(place, SEGMENTS),
                picture.size,
                segments,
            )
            _check_output(output, [place], force=force)  # it may exist by now
            _write(found, picture, id_map, categories, rle=task == "instance")
            if force:
                _remove_other_overlays(place, found.overlay)
            return found

        with _quiet_decoders(), worker_threads(workers) as pool:
            pictures_ahead = in_order(load, range(len(paths)), pool, batch_size + workers)
            done += in_order(finish, results(pictures_ahead), pool, workers + 1)
        progress("Segmenting", len(paths), len(paths))
    names = tuple(str(category["name"]) for category in categories)
    return Segmentation(str(model), task, names, tuple(done), tuple(skipped))


# pictures ---------------------------------------------------------------------------------------


def find_pictures(arguments: Sequence[str | Path]) -> tuple[list[Path], list[Skipped]]:
    """Finds the files that paths, folders and patterns name, each once, in order.

    Returns:
        The files; and the arguments for which there is no file.
    """
    paths: list[Path] = []
    skipped = []
    for argument in arguments:
        path = user_path(argument)
        try:
            found, reason = _found_at(path)
        except OSError as error:  # a folder without permission to list it
            found, reason = [], error.strerror or str(error)
        if not found:
            skipped.append(Skipped(str(path), reason))
        paths += found
    return list(dict.fromkeys(paths)), skipped


def _found_at(path: Path) -> tuple[list[Path], str]:
    """The files that a path, folder or pattern names; and the reason if there are none.

    Raises:
        OSError: a folder cannot be listed.
    """
    if path.is_dir():
        found = sorted(entry for entry in path.iterdir() if _is_picture(entry))
        return found, "there is no picture in this folder"
    if has_magic(str(path)) and not path.exists():
        matches = map(Path, glob(str(path), recursive=True))  # noqa: PTH207  # absolute ones too
        return sorted(entry for entry in matches if entry.is_file()), "no file matches this pattern"
    return [path], ""


def printable(path: str | Path) -> str:
    """A path as text; bytes that are not UTF-8 are replaced."""
    return os.fsencode(path).decode("utf-8", "replace")


def _is_picture(path: Path) -> bool:
    """Whether a file in a folder is a picture to segment: not hidden, and not written by us."""
    return (
        path.suffix.lower() in PICTURES
        and not path.name.startswith(".")
        and not path.name.endswith((*OVERLAYS.values(), ID_MAP))
        and path.is_file()
    )


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """The stems of files; equal ones get numbers, also if they differ only in upper case."""
    taken: set[str] = set()
    names = []
    for path in paths:
        stem = printable(path.stem)
        numbered = (f"{stem}-{number}" for number in count(2))
        name = next(name for name in chain([stem], numbered) if name.casefold() not in taken)
        taken.add(name.casefold())
        names.append(name)
    return names


def _read(path: Path) -> Image.Image:
    """A picture in RGB, upright.

    Raises:
        UnreadableFileError: it is not a picture, is broken, or has a hostile size.
    """
    from reference_model.pictures import FORMATS, read_picture

    try:
        content = BytesIO(read_bytes(path, PICTURE_LIMIT))
        # Pillow only warns of half of the sizes that it counts as hostile, and what becomes of a
        # warning is not for a thread by itself to decide
        with Image.open(content, formats=FORMATS) as opened:
            pixels, limit = opened.width * opened.height, Image.MAX_IMAGE_PIXELS
        if limit is not None and pixels > limit:
            raise ValueError(f"{pixels:,} pixels: the size exceeds limit of {limit:,}")
        image = read_picture(content)
    except UnidentifiedImageError as error:
        raise UnreadableFileError("not a picture of a known format") from error
    except OSError as error:
        raise UnreadableFileError(error.strerror or str(error)) from error
    except Exception as error:  # on hostile files, decoders may raise anything
        raise UnreadableFileError(str(error) or type(error).__name__) from error
    if max(image.size) > _MAX_ASPECT_RATIO * min(image.size):
        raise UnreadableFileError(
            f"{image.width}x{image.height} pixels: longer than {_MAX_ASPECT_RATIO}:1"
        )
    return image


@contextmanager
def _quiet_decoders() -> Iterator[None]:
    """Leaves out Pillow's warnings, which are about harmless flaws, in this block."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


# the network ------------------------------------------------------------------------------------


def _run(
    network: "Network",
    processor: "EomtImageProcessor",
    pictures: Sequence[_Picture],
    task: str,
    threshold: float | None,
) -> Iterator[tuple[_Picture, _Result]]:
    """Each picture with its result, as soon as that is there."""
    import torch

    from reference_model.image_processing import THRESHOLD

    if not pictures:
        return
    threshold = THRESHOLD if threshold is None else threshold
    try:
        with torch.inference_mode():
            images = [picture.resized for picture in pictures]
            inputs = processor(images=images).to(network.device, network.dtype)
            outputs = run_network(network, inputs)
        for index, picture in enumerate(pictures):
            with torch.inference_mode():
                own = _outputs_of(index, outputs)
                result = _post_process(processor, own, picture.size, task, threshold)
            yield picture, result
    except torch.OutOfMemoryError as error:
        raise EomtConvertError(
            f"{network.device} does not have enough memory for {len(pictures)} pictures at once.",
            "Lower --batch-size, or use --dtype bfloat16.",
        ) from error


def _outputs_of(
    index: int, outputs: "EomtDinov3ForUniversalSegmentationOutput"
) -> "EomtDinov3ForUniversalSegmentationOutput":
    """The outputs for one picture of a batch."""
    rows, offsets = slice(index, index + 1), None
    if outputs.patch_offsets is not None:
        windows = [row for row, offset in enumerate(outputs.patch_offsets) if offset[0] == index]
        rows = slice(windows[0], windows[-1] + 1)
        offsets = outputs.patch_offsets[rows]
        offsets = [offset - offset.new_tensor([index, 0, 0]) for offset in offsets]
    return replace(
        outputs,
        masks_queries_logits=outputs.masks_queries_logits[rows],
        class_queries_logits=outputs.class_queries_logits[rows],
        patch_offsets=offsets,
    )


def _post_process(
    processor: "EomtImageProcessor",
    outputs: "EomtDinov3ForUniversalSegmentationOutput",
    size: tuple[int, int],
    task: str,
    threshold: float,
) -> _Result:
    if task == "semantic":
        (class_map,) = processor.post_process_semantic_segmentation(outputs, [size])
        return {"class_map": class_map.numpy(force=True)}
    if task == "panoptic":
        (result,) = processor.post_process_panoptic_segmentation(outputs, [size], threshold)
        return {**result, "segmentation": result["segmentation"].numpy(force=True)}
    (result,) = processor.post_process_instance_segmentation(
        outputs, [size], threshold, return_binary_maps=True
    )
    return {**result, "binary_maps": result["binary_maps"].numpy(force=True)}


def _semantic(result: _Result) -> _Segmented:
    """A segment for each class; its id is always the class id + 1."""
    class_map = result["class_map"]
    id_map = _from_one(class_map, class_map.max() + 1)
    segments = tuple(Segment(id, id - 1, *measured) for id, measured in measure(id_map).items())
    return id_map, segments


def _panoptic(result: _Result) -> _Segmented:
    id_map = _from_one(result["segmentation"], len(result["segments_info"]))
    measured = measure(id_map)
    segments = tuple(
        Segment(
            entry["id"] + 1,
            entry["label_id"],
            *measured[entry["id"] + 1],
            score=entry["score"],
        )
        for entry in result["segments_info"]
    )
    return id_map, segments


def _instances(result: _Result) -> _Segmented:
    """The instances by descending score, from id 1; in the id map, better ones cover others."""
    ranked = sorted(result["segments_info"], key=lambda entry: -entry["score"])
    masks = [result["binary_maps"][entry["id"]] for entry in ranked]
    id_map = np.zeros(result["binary_maps"].shape[1:], np.min_scalar_type(len(masks)))
    for index in reversed(range(len(masks))):
        np.copyto(id_map, index + 1, where=masks[index])
    segments = tuple(
        Segment(
            index + 1,
            entry["label_id"],
            *measure(mask)[1],
            score=entry["score"],
            rle=encode_mask(mask),
        )
        for index, (entry, mask) in enumerate(zip(ranked, masks, strict=True))
    )
    return id_map, segments


_SEGMENTED = {"semantic": _semantic, "panoptic": _panoptic, "instance": _instances}


def _from_one(ids: NDArray[np.int64], largest: int) -> NDArray[np.unsignedinteger[Any]]:
    """Ids from -1 as ids from 0, in the smallest dtype, which is the fastest to draw and write."""
    id_map = ids.astype(np.min_scalar_type(largest))
    id_map += 1  # what -1 has become, the largest number, becomes 0
    return id_map


def _is_small(config: "EomtDinov3Config") -> bool:
    """Whether a network takes no longer for a picture than drawing and writing the segments.

    Several threads of torch, which wait for each other after every operation, are then slower than
    one: they wait for cores that workers are using.
    """
    height, width = config.input_size
    tokens = config.num_queries + height * width // config.patch_size**2
    # of a layer: attention has 4 square matrices, an MLP 2 or 3 larger ones
    weights = config.hidden_size * (4 * config.hidden_size + 3 * config.intermediate_size)
    return config.num_hidden_layers * weights * tokens < _SMALL


def _categories(network: "Network", task: str) -> list[dict[str, Any]]:
    """The model's classes as COCO lists them."""
    stuff = network.config.stuff_classes or ()
    return [
        {"id": label, "name": name, "isthing": int(task != "semantic" and label not in stuff)}
        for label, name in sorted(network.config.id2label.items())
    ]


# output -----------------------------------------------------------------------------------------


def _check_output(folder: Path, places: Sequence[Path], *, force: bool) -> None:
    """Checks that no existing file is in the way.

    An overlay in any format is: once the JSON file is written, it would count as ours.

    Raises:
        OutputError: a file is in the way.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file.", "Choose another output.")
    ours: list[Path] = []
    others: list[Path] = []
    for place in places:
        files = (_named(place, ending) for ending in (*OVERLAYS.values(), ID_MAP, SEGMENTS))
        existing = [path for path in files if os.path.lexists(path)]
        (ours if _is_ours(place) else others).extend(existing)
    if others:
        raise OutputError(
            f"{_counted(others)}, not made by eomt-convert; --force does not replace it.",
            "Move it away, or choose another output.",
        )
    if ours and not force:
        raise OutputError(f"{_counted(ours)}.", "Replace with --force, or choose another --output.")


def _counted(paths: Sequence[Path]) -> str:
    more = f", and {len(paths) - 1} more files" if len(paths) > 1 else ""
    return f"{paths[0]} exists{more}"


def _is_ours(place: Path) -> bool:
    """Whether this tool made the files of a picture, according to their JSON file."""
    try:
        info = read_json_object(_named(place, SEGMENTS), _SEGMENTS_LIMIT).get("info")
    except UnreadableFileError:
        return False
    return isinstance(info, dict) and info.get("contributor") == TOOL


def _named(place: Path, ending: str) -> Path:
    """The path of one of a picture's files."""
    return place.with_name(place.name + ending)


def _write(
    found: SegmentedPicture,
    picture: _Picture,
    id_map: NDArray[np.unsignedinteger[Any]],
    categories: Sequence[dict[str, Any]],
    *,
    rle: bool,
) -> None:
    height, width = found.size
    entry = {
        "id": picture.index + 1,
        "file_name": printable(found.picture.name),
        "height": height,
        "width": width,
    }
    content = {
        "info": {"contributor": TOOL, "version": __version__},
        **document(entry, found.segments, categories, None if rle else found.id_map.name),
    }
    ranked = sorted(found.segments, key=lambda segment: -(segment.score or 0))
    labels = [
        Label(
            segment.id,
            segment.category_id,
            categories[segment.category_id]["name"],
            _note(segment, height * width),
        )
        for segment in ranked
    ]
    with ExitStack() as files:
        files.enter_context(writable(found.id_map.parent))
        if found.overlay is not None and picture.image is not None:
            saving = _SAVING[found.overlay.suffix]
            overlay = files.enter_context(replacing(found.overlay))
            draw_overlay(picture.image, id_map, labels).save(overlay, **saving)
        ids = files.enter_context(replacing(found.id_map))
        ids.write(id_map_png(id_map))
        write_json(found.segments_file, content)  # written first: it shows that all files are ours


def _remove_other_overlays(place: Path, kept: Path | None) -> None:
    """Removes the overlay of an earlier run that wrote it in another format."""
    for ending in OVERLAYS.values():
        other = _named(place, ending)
        if other != kept:
            with writable(other):
                other.unlink(missing_ok=True)


def _note(segment: Segment, pixels: int) -> str:
    """A segment's note in the legend: its score or, without scores, its share of the picture."""
    if segment.score is not None:
        return f"{segment.score:.2f}"
    percent = 100 * segment.area / pixels
    return f"{percent:.0f}%" if percent >= 1 else "<1%"
