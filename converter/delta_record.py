"""delta.json: what a delta was made of, and what a conversion of it needs to know."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from converter.catalog import Task
from converter.errors import UnreadableFileError
from converter.files import read_json_object
from converter.version import TOOL

DELTA = "delta.json"


@dataclass(frozen=True)
class DeltaRecord:
    """What a conversion takes from the delta.json beside a delta.

    Attributes:
        config, preprocessor: the config.json and preprocessor_config.json of the model that it was
            made of; None for the latter if there was none.
        task: what that model segments; None if unknown.
        image_size: (height, width) in pixels.
    """

    config: Mapping[str, Any]
    preprocessor: Mapping[str, Any] | None
    task: Task | None
    image_size: tuple[int, int]


def read_delta_record(path: Path) -> DeltaRecord | None:
    """Reads a delta.json; None if the model had no configuration.

    Raises:
        UnreadableFileError: it cannot be read, or does not have the form that make-delta writes.
    """
    content = read_json_object(path)
    keys = ("config", "preprocessor", "task", "image_size")
    config, preprocessor, task, size = (content.get(key) for key in keys)
    if config is None:
        return None
    if not isinstance(config, dict):
        raise _wrong(path, "config is not an object")
    if preprocessor is not None and not isinstance(preprocessor, dict):
        raise _wrong(path, "preprocessor is not an object")
    if task not in (*get_args(Task), None):
        raise _wrong(path, f"task is not one of {', '.join(get_args(Task))}")
    if not (
        isinstance(size, list)
        and len(size) == 2
        and all(type(side) is int and side > 0 for side in size)
    ):
        raise _wrong(path, "image_size is not [height, width]")
    return DeltaRecord(config, preprocessor, cast("Task | None", task), (size[0], size[1]))


def _wrong(path: Path, finding: str) -> UnreadableFileError:
    return UnreadableFileError(
        f"{path} was not written by make-delta: {finding}.",
        "Make the delta again, or give --task, --image-size and --labels without this file.",
    )


def made_delta(folder: Path) -> Mapping[str, str | None]:
    """Names and SHA-256 of the files of a delta that make-delta wrote, by its delta.json."""
    path = folder / DELTA
    try:
        content = read_json_object(path) if path.is_file() else {}
    except UnreadableFileError:
        return {}
    files, tool = content.get("files"), content.get("tool")
    if not isinstance(files, dict) or not isinstance(tool, dict) or tool.get("name") != TOOL:
        return {}
    listed = {
        name: entry.get("sha256")
        for name, entry in files.items()
        if name == Path(name).name and isinstance(entry, dict)
    }
    return {**listed, DELTA: None}
