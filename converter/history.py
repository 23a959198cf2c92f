"""conversion.json, which a conversion writes beside a model: how it was made and what was found.

Only this module writes and reads the file, from and to one type. A file from outside may contain
anything.
"""

import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from converter.catalog import Checkpoint, Task, find_named
from converter.configs import Dtype
from converter.errors import UnreadableFileError
from converter.files import Digests, FileDigest, digests_to_dict, read_json_object, write_json
from converter.weights.inspection import WeightsKind
from converter.weights.plan import Source

HISTORY = "conversion.json"

# of an export: ONNX, or a program of torch.export
Format = Literal["onnx", "torch"]

# types that a model is exported in
ExportDtype = Literal["float32", "float16"]

# what was found, as a page; it has measured figures, which differ a little from machine to machine
REPORT = "verdict.html"


@dataclass(frozen=True)
class PastSource:
    """A source of a model.

    Attributes:
        repo_id: the repository it came from; None for local files.
        revision: its commit; None for local files.
        files: its files, by name.
    """

    repo_id: str | None
    revision: str | None
    files: Digests


@dataclass(frozen=True)
class PastTensor:
    """A tensor of a model.

    Attributes:
        shape, dtype: as it was written; the type as safetensors names it.
        recipe: how it was made.
        sha256: of its little-endian bytes.
    """

    shape: tuple[int, ...]
    dtype: str
    recipe: str
    sha256: str


@dataclass(frozen=True)
class PastExport:
    """How a model was exported: the part ``export`` of the conversion.json beside the export.

    Attributes:
        version: of eomt-convert.
        format: ``onnx`` or ``torch``, a program of torch.export.
        opset: version of ONNX's operators; None for a program.
        dtype: of weights and computation.
        image_size: (height, width) in pixels; None if the file takes any.
        versions: of the packages that made it, by name.
        input: name of the input.
        outputs: names of the outputs, in order.
        dynamic_axes: names of the axes of any size, by their number, of inputs and outputs by name.
        files: the export's own files, by name.
        tensors: SHA-256 of every tensor of the model as it was exported, by its name there.
        verdict: what was found, as `converter.checks.verdict.read_record` takes it.
    """

    version: str
    format: Format
    opset: int | None
    dtype: Dtype
    image_size: tuple[int, int] | None
    versions: Mapping[str, str]
    input: str
    outputs: Sequence[str]
    dynamic_axes: Mapping[str, Mapping[str, str]]
    files: Digests
    tensors: Mapping[str, str]
    verdict: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The part of conversion.json."""
        return {
            "version": self.version,
            "format": self.format,
            "opset": self.opset,
            "dtype": self.dtype,
            "image_size": list(self.image_size) if self.image_size else None,
            "versions": dict(self.versions),
            "input": self.input,
            "outputs": list(self.outputs),
            "dynamic_axes": {name: dict(axes) for name, axes in self.dynamic_axes.items()},
            "files": digests_to_dict(self.files),
            "tensors": dict(self.tensors),
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class History:
    """The content of a model's conversion.json.

    Attributes:
        tool, version: the program that converted it.
        command: the command line that converts it again.
        checkpoint: the catalogue's entry that was named, if any.
        task: what it segments; None if that was not given.
        dtype: of its weights.
        weights: whether it was made from a delta or from absolute weights.
        state_key: which copy of the weights in that file was asked for; None for the plain ones.
        category_ids: the ids of its classes in the dataset, in order; None if they are 0, 1, 2 and
            so on.
        warnings: sentences on how it may differ from what was trained.
        sources: the files it was made from.
        files: the model's own files, by name.
        rows: every tensor, by name.
        dropped: tensors of the sources that are not in the model, and why.
        pair: the checks of whether the sources belong together.
        verdict: what was found, as `converter.checks.verdict.read_record` takes it.
    """

    tool: str
    version: str
    command: str
    checkpoint: Checkpoint | None
    task: Task | None
    dtype: Dtype
    weights: WeightsKind
    state_key: str | None
    category_ids: Sequence[int] | None
    warnings: Sequence[str]
    sources: Mapping[Source, PastSource]
    files: Digests
    rows: Mapping[str, PastTensor]
    dropped: Sequence[Mapping[str, Any]]
    pair: Sequence[Mapping[str, Any]]
    verdict: Mapping[str, Any]

    @property
    def tensors(self) -> dict[str, str]:
        """SHA-256 of every tensor, by name."""
        return {name: row.sha256 for name, row in self.rows.items()}

    def to_dict(self) -> dict[str, Any]:
        """The content of conversion.json."""
        return {
            "tool": {"name": self.tool, "version": self.version},
            "command": self.command,
            "checkpoint": self.checkpoint.name if self.checkpoint else None,
            "task": self.task,
            "dtype": self.dtype,
            "weights": self.weights,
            **({"state_key": self.state_key} if self.state_key else {}),
            **({"category_ids": list(self.category_ids)} if self.category_ids else {}),
            **({"warnings": list(self.warnings)} if self.warnings else {}),
            "sources": {
                role: {
                    "repo": source.repo_id,
                    "revision": source.revision,
                    "files": digests_to_dict(source.files),
                }
                for role, source in self.sources.items()
            },
            "files": digests_to_dict(self.files),
            "tensors": {
                name: {
                    "shape": list(row.shape),
                    "dtype": row.dtype,
                    "recipe": row.recipe,
                    "sha256": row.sha256,
                }
                for name, row in self.rows.items()
            },
            "dropped": list(self.dropped),
            "pair": list(self.pair),
            "verdict": self.verdict,
        }


def write_history(folder: Path, history: History | None, export: PastExport | None = None) -> None:
    """Writes a model's conversion.json, or that of its export.

    Args:
        folder: where the file goes.
        history: of the model; None if it is unknown, as of a model that has no conversion.json.
        export: how it was exported, if it was.

    Raises:
        OSError: it cannot be written.
    """
    content = history.to_dict() if history else {}
    write_json(folder / HISTORY, content | ({"export": export.to_dict()} if export else {}))


def read_history(folder: Path) -> History | None:
    """Reads a model's conversion.json; None if there is none, or if it is only about an export.

    Raises:
        UnreadableFileError: it does not have the form that a conversion writes.
    """
    path = folder / HISTORY
    if not path.is_file():
        return None
    content = read_json_object(path)
    return None if content.keys() == {"export"} else parse_history(content, path)


def read_export(folder: Path) -> PastExport | None:
    """Reads how the model in a folder was exported, from its conversion.json; None if it was not.

    Raises:
        UnreadableFileError: it does not have the form that an export writes.
    """
    path = folder / HISTORY
    content = read_json_object(path) if path.is_file() else {}
    if "export" not in content:
        return None
    part = _Object(path, "", content).object("export")
    _check_verdict(part.object("verdict"))
    return PastExport(
        version=part.text("version"),
        format=cast("Format", part.one_of("format", *get_args(Format))),
        opset=part.value(
            "opset", "a number or null", lambda value: value is None or _is_size(value)
        ),
        dtype=cast("Dtype", part.one_of("dtype", *get_args(Dtype))),
        image_size=_image_size(part),
        versions=part.object("versions").texts(),
        input=part.text("input"),
        outputs=part.value("outputs", "a list of names", _are_texts),
        dynamic_axes={name: axes.texts() for name, axes in part.object("dynamic_axes").objects()},
        files=_digests(part),
        tensors=part.object("tensors").texts(),
        verdict=part.content["verdict"],
    )


def _image_size(part: "_Object") -> tuple[int, int] | None:
    size = part.value(
        "image_size",
        "height and width, or null",
        lambda value: value is None or (_is_shape(value) and len(value) == 2),
    )
    return None if size is None else (size[0], size[1])


def has_weights_of(checkpoint: Checkpoint | None, history: History | None) -> bool:
    """Whether a model was made from a checkpoint's own weights, not others under its name."""
    if checkpoint is None or history is None:
        return checkpoint is not None
    delta = history.sources.get("delta")
    if delta is None or delta.repo_id is None:
        return delta is not None and checkpoint.offline
    return find_named(delta.repo_id) == checkpoint


def parse_history(content: Mapping[str, Any], path: Path = Path(HISTORY)) -> History:
    """Reads the content of a conversion.json.

    Args:
        content: of the file.
        path: of the file, for errors.

    Raises:
        UnreadableFileError: it does not have the form that a conversion writes; the message says
            where.
    """
    top = _Object(path, "", content)
    tool = top.object("tool")
    checkpoint = find_named(top.optional_text("checkpoint"))
    _check_verdict(top.object("verdict"))
    return History(
        tool=tool.text("name"),
        version=tool.text("version"),
        command=top.text("command"),
        checkpoint=checkpoint,
        task=cast("Task | None", top.one_of("task", *get_args(Task), None)),
        dtype=cast("Dtype", top.one_of("dtype", *get_args(Dtype))),
        weights=cast("WeightsKind", top.one_of("weights", *get_args(WeightsKind))),
        state_key=top.text("state_key") if "state_key" in content else None,
        category_ids=top.value("category_ids", "a list of ids", _is_shape)
        if "category_ids" in content
        else None,
        warnings=top.value("warnings", "a list of texts", _are_texts)
        if "warnings" in content
        else (),
        sources={
            cast("Source", role): PastSource(
                source.optional_text("repo"), source.optional_text("revision"), _digests(source)
            )
            for role, source in top.object("sources").objects(*get_args(Source))
        },
        files=_digests(top),
        rows={
            name: PastTensor(
                tuple(row.value("shape", "a list of sizes", _is_shape)),
                row.text("dtype"),
                row.text("recipe"),
                row.text("sha256"),
            )
            for name, row in top.object("tensors").objects()
        },
        dropped=top.records("dropped"),
        pair=top.records("pair"),
        verdict=content["verdict"],
    )


@dataclass(frozen=True)
class _Object:
    """A JSON object of the file; each value is checked when it is read.

    Attributes:
        path: of the file.
        place: of the object in it, such as ``sources.delta``; empty for the whole file.
        content: of the object.
    """

    path: Path
    place: str
    content: Mapping[str, Any]

    def wrong(self, finding: str) -> UnreadableFileError:
        return UnreadableFileError(
            f"{self.path} was not written by a conversion: {finding}.",
            "Convert again, or delete the file to check the model without it.",
        )

    def place_of(self, key: str) -> str:
        return f"{self.place}.{key}" if self.place else key

    def value(self, key: str, expected: str, fits: Callable[[Any], bool]) -> Any:
        if key not in self.content:
            raise self.wrong(f"{self.place or 'it'} lacks {key!r}; expected {expected}")
        value = self.content[key]
        if not fits(value):
            found = reprlib.repr(value)
            raise self.wrong(f"{self.place_of(key)} is {found}; expected {expected}")
        return value

    def text(self, key: str) -> str:
        return cast(str, self.value(key, "text", lambda value: isinstance(value, str)))

    def optional_text(self, key: str) -> str | None:
        return cast("str | None", self.value(key, "text or null", _is_text_or_null))

    def one_of(self, key: str, *known: str | None) -> str | None:
        expected = "one of " + ", ".join("null" if name is None else name for name in known)
        return cast("str | None", self.value(key, expected, lambda value: value in known))

    def records(self, key: str) -> Sequence[Mapping[str, Any]]:
        return cast(Sequence[Mapping[str, Any]], self.value(key, "a list of objects", _is_records))

    def object(self, key: str) -> "_Object":
        content = self.value(key, "an object", lambda value: isinstance(value, dict))
        return _Object(self.path, self.place_of(key), content)

    def texts(self) -> dict[str, str]:
        """Its values, which must be texts."""
        return {name: self.text(name) for name in self.content}

    def objects(self, *known: str) -> "Iterator[tuple[str, _Object]]":
        """Its values, which must be objects; if names are given, only those are allowed."""
        for name in self.content:
            if known and name not in known:
                raise self.wrong(f"{self.place} has {name!r}; expected {', '.join(known)}")
            yield name, self.object(name)


def _digests(entry: _Object) -> dict[str, FileDigest]:
    return {
        name: FileDigest(file.value("size", "a number of bytes", _is_size), file.text("sha256"))
        for name, file in entry.object("files").objects()
    }


def _is_text_or_null(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_size, value))


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _is_records(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _check_verdict(verdict: _Object) -> None:
    """Checks the form of a verdict; `read_record` checks its claims."""
    verdict.text("verdict")
    if "basis" in verdict.content:  # version 0.1 did not write it
        verdict.optional_text("basis")
    levels = verdict.value("levels", "a list", lambda value: isinstance(value, list))
    for number, content in enumerate(levels):
        place = f"{verdict.place}.levels.{number}"
        if not isinstance(content, dict):
            raise verdict.wrong(f"{place} is {reprlib.repr(content)}; expected an object")
        level = _Object(verdict.path, place, content)
        level.text("level")
        level.text("status")
        figures = level.object("figures")
        for name in figures.content:
            if name.endswith("tolerance"):
                figures.value(name, "a number", lambda value: type(value) in (int, float))
            figures.value(
                name, "a number or text", lambda value: isinstance(value, str | int | float)
            )
