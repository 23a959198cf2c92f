"""What to convert: the options that change the result, with names resolved to places."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, TypedDict, Unpack

from converter.catalog import Checkpoint, Task, find
from converter.class_names import join_names, split_names
from converter.configs import Dtype
from converter.errors import UsageError
from converter.files import user_path
from converter.places import RECORDED, HubSource, LocalSource, find_recorded, parse_source
from converter.sizes import parse_size
from converter.weights.inspection import WeightsKind

# called with a stage, and the number of bytes or pictures that are done, and of all
Progress = Callable[[str, int, int], object]


def counting(progress: Progress, stage: str, total: int) -> Callable[[int], None]:
    """A function that shows a stage's progress, called with the number of bytes that came on top.

    Args:
        progress: shows it.
        stage: its name.
        total: number of all bytes.
    """
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(stage, done, total)

    return advance


class JobOptions(TypedDict, total=False):
    """The options of a job, as Python and the command line give them.

    `converter.convert` documents each. None is the same as leaving an option out.
    """

    delta: str | None
    state_key: str | None
    backbone: str | None
    weights: WeightsKind | Literal["auto"]
    backbone_layout: str | None
    backbone_config: str | Path | None
    task: Task | None
    image_size: int | tuple[int, int] | None
    labels: str | Path | None
    stuff: str | Sequence[str] | None
    dtype: Dtype
    max_shard_size: int | str | None
    recorded: str | Path | None
    verify: bool
    check_backbone: bool
    image: str | Path | None
    allow_mismatch: bool
    allow_nonfinite: bool


@dataclass(frozen=True)
class Job:
    """What to convert and what to check it against: names are resolved, nothing is fetched yet.

    The fields are the options of `JobOptions`, in the order in which `command` writes them.

    Attributes:
        checkpoint: the catalogue's entry, if one was named.
        delta: EoMT's weights, which may also be absolute.
        state_key: which of several copies of weights in that file; None for those without a key.
        backbone: None if none was given.
        task: None if neither an option nor the catalogue gives it.
        image_size: (height, width) in pixels; None as for ``task``.
        stuff: names of the classes that are stuff; None if they are not given.
        max_shard_size: bytes of tensors in one file; None for one file.
        recorded: the file of recorded outputs, if there is one.
    """

    checkpoint: Checkpoint | None
    delta: LocalSource | HubSource
    state_key: str | None = None
    backbone: LocalSource | HubSource | None = None
    weights: WeightsKind | Literal["auto"] = "auto"
    backbone_layout: str | None = None
    backbone_config: Path | None = None
    task: Task | None = None
    image_size: tuple[int, int] | None = None
    labels: Path | None = None
    stuff: tuple[str, ...] | None = None
    dtype: Dtype = "float32"
    max_shard_size: int | None = None
    recorded: Path | None = None
    verify: bool = True
    check_backbone: bool = False
    image: Path | None = None
    allow_mismatch: bool = False
    allow_nonfinite: bool = False

    @classmethod
    def of(cls, checkpoint: str | None = None, **options: Unpack[JobOptions]) -> Self:
        """The job that a checkpoint's name and options describe.

        Raises:
            UsageError: the name is unknown, an option is invalid, or nothing says where the
                weights come from.
            UnreadableFileError: there are no recorded outputs where they should be.
        """
        entry = find(checkpoint) if checkpoint else None
        values = _of_catalogue(entry)
        for name, value in options.items():
            if name not in JobOptions.__annotations__:
                raise TypeError(f"convert() got an unexpected keyword argument {name!r}")
            if value == "":  # as of a shell variable that is not set
                raise UsageError(f"--{name.replace('_', '-')} is empty.")
            if value is not None:
                values[name] = _READ[name](value) if name in _READ else value
        if not values.keys() & {"delta", "backbone"}:
            raise UsageError(
                "There is nothing to convert: give --checkpoint NAME, or --delta and --backbone.",
                "eomt-convert list shows the checkpoints, eomt-convert --help the options.",
            )
        if "delta" not in values:
            raise UsageError(
                "Without --checkpoint, --delta must be given.",
                "eomt-convert list shows the checkpoints that have a name.",
            )
        return cls(checkpoint=entry, **values)

    @property
    def published(self) -> Checkpoint | None:
        """The catalogue's entry, if its own weights are converted and not others under its name."""
        entry = self.checkpoint
        return entry if entry and self.delta == entry.source("delta") else None

    def command(self) -> str:
        """The command line of the job.

        It is the same wherever files are: only the last part of a path is in it. Defaults are left
        out, and so is ``--image``, which does not change the result.
        """
        words = ["eomt-convert"]
        usual = _of_catalogue(self.checkpoint)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "image" or value in (None, usual.get(field.name, field.default)):
                continue
            option = f"--{field.name.replace('_', '-')}"
            if isinstance(field.default, bool):
                words.append(option if value else option.replace("--", "--no-", 1))
            elif field.name == "stuff":
                words += [option, join_names(value)]
            else:
                words += [option, _shown(value)]
        return shlex.join(words)


def _stuff(names: str | Sequence[str]) -> tuple[str, ...]:
    found = tuple(split_names(names) if isinstance(names, str) else names)
    if not found:
        raise UsageError("--stuff names no classes.", "Leave it out, or give NAME,NAME.")
    return found


# how to read the options whose values differ from those of a job
_READ: Mapping[str, Callable[[Any], Any]] = {
    "delta": parse_source,
    "backbone": parse_source,
    "backbone_config": user_path,
    "image_size": lambda size: (size, size) if isinstance(size, int) else size,
    "labels": user_path,
    "stuff": _stuff,
    "max_shard_size": lambda size: parse_size(str(size)),
    "recorded": lambda path: find_recorded(user_path(path)),
    "image": user_path,
}


def _of_catalogue(entry: Checkpoint | None) -> dict[str, Any]:
    """The values that a checkpoint's name gives to a job."""
    if entry is None:
        return {}
    return {
        "delta": entry.source("delta"),
        "backbone": entry.source("backbone"),
        "task": entry.task,
        "image_size": entry.image_size,
        "recorded": find_recorded(entry.recorded) if entry.recorded else None,
    }


def _shown(value: object) -> str:
    """A value of a job, written as its option expects it."""
    match value:
        case Checkpoint():
            return value.name
        case HubSource():
            return value.repo_id + (f"@{value.revision}" if value.revision != "main" else "")
        case LocalSource():
            return value.path.resolve().name
        case Path():  # a recording has the name of its folder
            return (value.parent if value.name == RECORDED else value).resolve().name
        case (height, width):
            return f"{height}x{width}"
        case _:
            return str(value)
