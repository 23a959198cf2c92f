"""delta.json: what a delta was made of, and what a conversion of it needs to know."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from converter.catalog import Task
from converter.class_names import ClassNames, of_config
from converter.errors import UnreadableFileError
from converter.files import read_json_object
from converter.hub.downloads import is_sha256
from converter.version import TOOL
from converter.weights.tensorfiles import TORCH_WEIGHTS, WEIGHTS

DELTA = "delta.json"

# the files that make-delta writes beside it
_FILES = (TORCH_WEIGHTS, WEIGHTS)


@dataclass(frozen=True)
class DeltaRecord:
    """What a conversion takes from the delta.json beside a delta.

    Attributes:
        task: what the model segments; None if unknown.
        image_size: (height, width) in pixels; None if unknown.
        mean, std: of the pixels, one value per channel; None if unknown.
        classes: their names, and which of them are stuff; None if unknown.
        files: SHA-256 of the delta's files, by name.
        backbone: SHA-256 of the backbone's files, by name.
    """

    task: Task | None
    image_size: tuple[int, int] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    classes: ClassNames | None
    files: Mapping[str, str]
    backbone: Mapping[str, str]

    @property
    def statistics(self) -> dict[str, tuple[float, ...]]:
        """Mean and deviation, as `preprocessor_config` takes them."""
        return {"mean": self.mean, "std": self.std} if self.mean and self.std else {}


def read_delta_record(path: Path) -> DeltaRecord:
    """Reads a delta.json.

    Raises:
        UnreadableFileError: it cannot be read, or does not have the form that make-delta writes.
    """
    content = read_json_object(path)

    def check(key: str, value: Any, *, fits: bool) -> None:
        if value is not None and not fits:
            raise UnreadableFileError(
                f"{path} was not written by make-delta: {key} is not valid.",
                "Make the delta again; or remove the file, and give --task, --image-size and "
                "--labels.",
            )

    task, size, classes = (content.get(key) for key in ("task", "image_size", "classes"))
    check("task", task, fits=task in get_args(Task))
    check("image_size", size, fits=_are(size, int, 2))
    statistics = [content.get(key) for key in ("image_mean", "image_std")]
    for key, values in zip(("image_mean", "image_std"), statistics, strict=True):
        check(key, values, fits=_are(values, float, positive=key == "image_std"))
    check("classes", classes, fits=isinstance(classes, dict))
    backbone = content.get("sources")
    backbone = backbone.get("backbone") if isinstance(backbone, dict) else None
    return DeltaRecord(
        task=cast("Task | None", task),
        image_size=(size[0], size[1]) if size else None,
        mean=tuple(statistics[0]) if statistics[0] else None,
        std=tuple(statistics[1]) if statistics[1] else None,
        classes=_classes(classes, path) if classes else None,
        files=_digests(content),
        backbone=_digests(backbone) if isinstance(backbone, dict) else {},
    )


def _classes(content: Mapping[str, Any], path: Path) -> ClassNames:
    try:
        return of_config(content, 0)
    except UnreadableFileError as error:
        message = error.message.replace("config.json", str(path))
        raise UnreadableFileError(message, "Make the delta again.") from error


def _are(values: Any, kind: type, count: int | None = None, *, positive: bool = True) -> bool:
    """Whether a value is a list of numbers of a sensible size."""
    return (
        isinstance(values, list)
        and 0 < len(values) < 100
        and count in (None, len(values))
        and all(type(each) in (int, kind) and abs(each) < 1e6 for each in values)
        and all(each > 0 or not positive for each in values)
    )


def _digests(content: Mapping[str, Any]) -> dict[str, str]:
    files = content.get("files")
    return {
        str(name): entry["sha256"]
        for name, entry in (files.items() if isinstance(files, dict) else ())
        if isinstance(entry, dict)
        and isinstance(entry.get("sha256"), str)
        and is_sha256(entry["sha256"])
    }


def made_delta(folder: Path) -> Mapping[str, str | None]:
    """Names and SHA-256 of the files of a delta that make-delta wrote, by its delta.json."""
    path = folder / DELTA
    try:
        content = read_json_object(path) if path.is_file() else {}
    except UnreadableFileError:
        return {}
    tool = content.get("tool")
    if not isinstance(tool, dict) or tool.get("name") != TOOL:
        return {}
    listed = {name: digest for name, digest in _digests(content).items() if name in _FILES}
    return {**listed, DELTA: None} if listed else {}
