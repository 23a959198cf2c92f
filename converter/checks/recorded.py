"""Reads recorded outputs: what the original implementation computed, to compare a model with."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from converter.catalog import CATALOG, Checkpoint, Task
from converter.checks.pixels import open_picture
from converter.checks.verdict import BASES, Basis
from converter.configs import CONFIGS, DTYPES, Dtype, coarsest
from converter.errors import UnreadableFileError
from converter.files import (
    PICTURE_LIMIT,
    optional_path,
    read_bytes,
    read_json_object,
    readable,
)
from converter.places import RECORDED, find_recorded
from converter.runtimes.exported import FILES
from converter.weights.tensorfiles import TensorFile, is_model_file

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

PROVENANCE_FILE = "recorded.json"

# number of dimensions of each tensor, by its name without numbers; README describes the tensors
_RANKS = {
    "pixels": 4,
    "mask_logits": 4,
    "class_logits": 3,
    "masked.mask_logits": 4,
    "masked.class_logits": 3,
    "patch_embeddings": 3,
    "hidden_states": 3,
    "last_hidden_state": 3,
    "backbone.last_hidden_state": 3,
    "rope.cos": 2,
    "rope.sin": 2,
    "pipeline.panoptic": 3,
    "pipeline.semantic": 2,
    "pipeline.instance_areas": 1,
    "pipeline.instance_labels": 1,
    "pipeline.instance_queries": 1,
}

# the original implementation's name in recorded.json
ORIGINAL = "github.com/tue-mps/eomt"

# the folder with a recording's pictures, 0.png, 1.png and so on, beside its files
IMAGES = "images"

# Bytes of a recorded.safetensors. All layers of ViT-7B at 1280 px have 5 GB; they are kept for one
# input only.
_MAX_BYTES = 2**34


@dataclass(frozen=True)
class Origin:
    """Who computed recorded outputs, according to the recorded.json beside them.

    Attributes:
        recorded_by: the original implementation, our reference model, an exported file, or unknown.
        known: whether it is a recording that comes with the package.
        basis: basis of the verdict on the recorded model at that time; None if it had none, or if
            it is unknown.
        model: SHA-256 of the recorded model's tensors and configuration files and, if it was
            exported, of the exported file, by name; empty if unknown.
        rounded_to: what the recorded model's weights had been rounded to, if they had: the same
            weights need no tolerance for rounding.
        computed_in: the type in which the outputs were computed, as torch names it.
    """

    recorded_by: Literal["original", "reference", "export", "unknown"] = "unknown"
    known: bool = False
    basis: Basis | None = None
    model: Mapping[str, str] = field(default_factory=dict)
    rounded_to: Dtype | None = None
    computed_in: Dtype = "float32"

    def figures(self, model: Mapping[str, str] | None) -> dict[str, Any]:
        """The basis of a verdict on a model that was compared with these outputs.

        Args:
            model: SHA-256 of what decides its outputs, by name, as in `Origin`; None if only its
                outputs are known.
        """
        basis: Basis = "reference"
        if self.recorded_by == "original":
            basis = "original"
        elif self.basis and self.model == model:
            basis = self.basis
        figures: dict[str, Any] = {
            "basis": basis,
            "recorded_by": self.recorded_by,
            "known_recording": self.known,
        }
        if self.computed_in != "float32":
            figures["recorded_in"] = self.computed_in
        return figures


@dataclass(frozen=True)
class Recorded:
    """One recording.

    Attributes:
        path: its recorded.safetensors.
        sha256: digest of that file.
        origin: who computed it.
        tensors: its tensors by name, without those of pictures; README describes them.
    """

    path: Path
    sha256: str
    origin: Origin
    tensors: "dict[str, Tensor]"

    @property
    def pixels(self) -> "Tensor":
        """The input, (batch, channels, height, width) uint8."""
        return self.tensors["pixels"]

    def numbered(self, prefix: str) -> "list[Tensor]":
        """The tensors ``prefix.0``, ``prefix.1`` and so on."""
        found: list[Tensor] = []
        while f"{prefix}.{len(found)}" in self.tensors:
            found.append(self.tensors[f"{prefix}.{len(found)}"])
        return found


@dataclass(frozen=True)
class RecordedPictures:
    """The pictures of a recording, and what was computed from them.

    Attributes:
        images: in RGB.
        task: panoptic, instance or semantic; None if recorded.json does not say.
        stuff_classes: ids of classes without instances; None if recorded.json does not say.
        tensors: the tensors ``pipeline.*`` without scores, by name.
    """

    images: "tuple[Image, ...]"
    task: Task | None
    stuff_classes: tuple[int, ...] | None
    tensors: "dict[str, Tensor]"

    @property
    def pixels(self) -> "Tensor":
        """The network's inputs for the pictures, (inputs, 3, height, width) uint8."""
        windows = self.tensors.get("pipeline.crops")
        return self.tensors["pipeline.pixels"] if windows is None else windows


def recording_of(
    folder: Path, checkpoint: Checkpoint | None, recorded: str | Path | None
) -> Path | None:
    """The recorded.safetensors to compare a model with, if there is one.

    Args:
        folder: of the model; a recording in it, or in its folder ``recorded``, is the model's own.
        checkpoint: the catalogue's entry of the model, whose recording is used without its own.
        recorded: the one that was asked for, if any.

    Raises:
        UnreadableFileError: the one that was asked for does not exist.
    """
    own = next(
        (each for each in (folder, folder / "recorded") if (each / RECORDED).is_file()), None
    )
    place = optional_path(recorded) or own or (checkpoint.recorded if checkpoint else None)
    return find_recorded(place) if place else None


def read_recorded(path: Path) -> Recorded:
    """Reads recorded outputs: the input and everything computed from it, not the pictures.

    Raises:
        UnreadableFileError: the file cannot be read, lacks the input or the logits, or holds NaN or
            infinity or a wrong dtype; or the recorded.json beside it cannot be read, or belongs to
            another file.
    """
    import torch

    file = find_recorded(path)
    if file.stat().st_size > _MAX_BYTES:
        raise UnreadableFileError(f"{file} is larger than {_MAX_BYTES:,} bytes.")
    with TensorFile(file) as stored:
        digest = stored.sha256()
        tensors = {
            name: torch.from_numpy(stored.read(name))
            for name in stored.tensors
            if not name.startswith("pipeline.")
        }
    for name, rank in (("pixels", 4), ("mask_logits", 4), ("class_logits", 3)):
        if name not in tensors or tensors[name].ndim != rank:
            raise UnreadableFileError(f"{file} has no {name} with {rank} dimensions.")
    if tensors["pixels"].dtype != torch.uint8:
        raise UnreadableFileError(
            f"pixels in {file} has dtype {tensors['pixels'].dtype}, expected torch.uint8."
        )
    for name, tensor in tensors.items():
        if tensor.numel() == 0 or tensor.ndim == 0:
            raise UnreadableFileError(f"{name} in {file} is empty, or a single number.")
        if name != "pixels" and not tensor.is_floating_point():
            raise UnreadableFileError(
                f"{name} in {file} has dtype {tensor.dtype}, expected floating point numbers."
            )
        _check_rank(name, tensor, file)
        if not torch.isfinite(tensor).all():
            raise UnreadableFileError(
                f"{name} in {file} holds NaN or infinity, which no output can be compared with.",
                "Use the recording as published, or record a model that passes verification.",
            )
    rope = [tensors[name].shape for name in ("rope.cos", "rope.sin") if name in tensors]
    if len(set(rope)) > 1:
        raise UnreadableFileError(f"rope.cos and rope.sin in {file} have different shapes.")
    return Recorded(file, digest, _read_origin(file, digest), tensors)


def class_names(recorded: Recorded) -> list[str]:
    """The names of a recording's classes; numbers where recorded.json has no names."""
    content = _provenance(recorded) or {}
    names, count = content.get("classes"), recorded.tensors["class_logits"].shape[-1] - 1
    if isinstance(names, list) and len(names) == count and all(type(n) is str for n in names):
        return names
    return [f"class {number}" for number in range(count)]


def _provenance(recorded: Recorded) -> dict[str, Any] | None:
    """The recorded.json of a recording; None if there is none that lists its SHA-256."""
    path = known_recordings().get(recorded.sha256, recorded.path.with_name(PROVENANCE_FILE))
    content = read_json_object(path) if path.is_file() else {}
    return content if recorded.sha256 in _member(content, "sha256").values() else None


def _check_rank(name: str, tensor: "Tensor", file: Path) -> None:
    rank = _RANKS.get(re.sub(r"\.\d+(?=\.|$)|@.*", "", name), tensor.ndim)
    if tensor.ndim != rank:
        raise UnreadableFileError(
            f"{name} in {file} has the shape {list(tensor.shape)}, expected {rank} dimensions."
        )


def read_pictures(recorded: Recorded) -> RecordedPictures | str:
    """Reads the pictures of a recording and what was computed from them.

    Returns:
        The pictures; or a sentence, if there are none or something is missing to use them.

    Raises:
        UnreadableFileError: a picture does not have the SHA-256 in recorded.json, or cannot be
            read; or tensors do not fit together, or hold NaN or infinity.
    """
    import torch

    with TensorFile(recorded.path) as stored:
        tensors = {
            name: torch.from_numpy(stored.read(name))
            for name in stored.tensors
            # scores are not compared, and those of a semantic picture are large
            if name.startswith("pipeline.") and not name.endswith("_scores")
        }
    if not tensors:
        return "The recording has no pictures."
    _check_pipeline(recorded.path, tensors)
    content = _provenance(recorded)
    if content is None:
        return f"There is no {PROVENANCE_FILE} that lists the SHA-256 of this recording."
    count = len(tensors.get("pipeline.pixels", ()))
    if "pipeline.origins" in tensors:
        count = 1 + int(tensors["pipeline.origins"][:, 0].max())
    images = []
    for index in range(count):
        name = f"{IMAGES}/{index}.png"
        digest = _member(content, "sha256").get(name)
        if digest is None:
            return f"{PROVENANCE_FILE} of the recording does not list {name}."
        if not (recorded.path.parent / name).is_file():
            return f"{name} of the recording is missing."
        images.append(_read_image(recorded.path.parent / name, digest))
    task, stuff = content.get("task"), content.get("stuff_classes")
    if task in get_args(Task) and (task == "semantic") != ("pipeline.crops" in tensors):
        expected = "windows" if task == "semantic" else "whole pictures"
        raise UnreadableFileError(
            f"{recorded.path} has the wrong inputs for {task} segmentation: expected {expected}."
        )
    classes = range(recorded.tensors["class_logits"].shape[-1] - 1)
    if not isinstance(stuff, list) or not all(type(i) is int and i in classes for i in stuff):
        stuff = None
    return RecordedPictures(
        tuple(images),
        task if task in get_args(Task) else None,
        None if stuff is None else tuple(stuff),
        tensors,
    )


def _check_pipeline(file: Path, tensors: "Mapping[str, Tensor]") -> None:
    """Checks that the tensors that were recorded of pictures fit together.

    Raises:
        UnreadableFileError: they do not.
    """
    import torch

    inputs = "pipeline.crops" if "pipeline.crops" in tensors else "pipeline.pixels"
    ranks = {inputs: 4, "pipeline.mask_logits": 4, "pipeline.class_logits": 3}
    if inputs == "pipeline.crops":
        ranks["pipeline.origins"] = 2
    for name, rank in ranks.items():
        if name not in tensors or tensors[name].ndim != rank or not tensors[name].numel():
            raise UnreadableFileError(f"{file} has no {name} with {rank} dimensions.")
        if len(tensors[name]) != len(tensors[inputs]):
            raise UnreadableFileError(
                f"{name} in {file} has the length {len(tensors[name])}, expected "
                f"{len(tensors[inputs])} like {inputs}."
            )
    if tensors[inputs].dtype != torch.uint8:
        raise UnreadableFileError(
            f"{inputs} in {file} has dtype {tensors[inputs].dtype}, expected torch.uint8."
        )
    for name in ("pipeline.mask_logits", "pipeline.class_logits"):
        if not tensors[name].is_floating_point():
            raise UnreadableFileError(
                f"{name} in {file} has dtype {tensors[name].dtype}, expected floating point "
                "numbers."
            )
    for name, tensor in tensors.items():
        _check_rank(name, tensor, file)
        if name not in (inputs, "pipeline.mask_logits", "pipeline.class_logits") and (
            tensor.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
        ):
            raise UnreadableFileError(
                f"{name} in {file} has dtype {tensor.dtype}, expected whole numbers."
            )
    origins = tensors.get("pipeline.origins")
    if origins is not None and (origins.shape[1] != 3 or int(origins.min()) < 0):
        raise UnreadableFileError(
            f"pipeline.origins in {file} must have 3 columns (picture, start, end) and no negative "
            "numbers."
        )
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UnreadableFileError(f"{name} in {file} holds NaN or infinity.")
        stem, _, kind = name.rpartition("_")
        if kind == "areas":
            parts = [tensors.get(f"{stem}_{part}") for part in ("queries", "labels")]
            if tensor.ndim != 1 or any(p is None or p.shape != tensor.shape for p in parts):
                raise UnreadableFileError(f"{name} in {file} lacks a query or a label for an area.")


def _read_image(path: Path, sha256: str) -> "Image":
    """A recorded picture in RGB.

    Raises:
        UnreadableFileError: its digest is wrong, or it cannot be read.
    """
    with readable(path):
        content = read_bytes(path, PICTURE_LIMIT)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UnreadableFileError(
            f"{path} is not the recorded picture: its SHA-256 is not the one in {PROVENANCE_FILE}.",
            "Keep the files of a recording together.",
        )
    return open_picture(path, BytesIO(content))


def _read_origin(file: Path, sha256: str) -> Origin:
    """Reads from the recorded.json beside a recording who computed it.

    Raises:
        UnreadableFileError: it cannot be read, or belongs to another file of this name.
    """
    if sha256 in known_recordings():
        return Origin("original", known=True)
    path = file.with_name(PROVENANCE_FILE)
    if not path.is_file():
        return Origin()
    content = read_json_object(path)
    listed = _member(content, "sha256").get(file.name)
    if listed is None:
        return Origin()
    if listed != sha256:
        raise UnreadableFileError(
            f"{path} does not belong to the {file.name} beside it: the SHA-256 does not match.",
            "Keep the two files of a recording together.",
        )
    model, provenance = _member(content, "model"), _member(content, "provenance")
    implementation = str(provenance.get("implementation"))
    files = model.get("files")
    digests = {
        str(entry["name"]): entry["sha256"]
        for entry in (files if isinstance(files, list) else [])
        if isinstance(entry, dict) and entry.keys() >= {"name", "sha256"}
    }
    # eomt-convert 0.1 named the reference model for exports too
    exported = bool(digests.keys() & set(FILES.values())) and not any(map(is_model_file, digests))
    if not exported:
        digests = {name: digests[name] for name in CONFIGS if name in digests}
    rounded_to, computed_in = _types(model, _member(provenance, "recorded_by"), exported=exported)
    basis = model.get("basis")
    known = digests.keys() >= set(CONFIGS)
    return Origin(
        _recorded_by(implementation, exported=exported),
        basis=next((known for known in BASES if known == basis), None),
        model={**_member(model, "tensors"), **digests} if known else {},
        rounded_to=rounded_to,
        computed_in=computed_in,
    )


def _recorded_by(
    implementation: str, *, exported: bool
) -> Literal["original", "reference", "export", "unknown"]:
    if implementation == ORIGINAL:
        return "original"
    if exported:
        return "export"
    return "reference" if "reference model" in implementation else "unknown"


def _types(
    model: Mapping[str, Any], recorded_by: Mapping[str, Any], *, exported: bool
) -> tuple[Dtype | None, Dtype]:
    """What weights had been rounded to, and what was computed in, by a recorded.json.

    Without the key for it, as in 0.1, the type in which the weights were stored counts.
    """
    dtypes = model.get("dtypes")
    listed = dtypes if isinstance(dtypes, list) else []
    stored = coarsest(name for name, short in DTYPES.items() if short in listed)
    rounded_to = coarsest([str(model["rounded_to"])]) if "rounded_to" in model else stored
    if not exported:
        return rounded_to, "float32"
    computed_in = coarsest([str(recorded_by["dtype"])]) if "dtype" in recorded_by else stored
    return rounded_to, computed_in or "float32"


def _member(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = content.get(name)
    return value if isinstance(value, dict) else {}


@cache
def known_recordings() -> Mapping[str, Path]:
    """The recorded.json files that come with the package, all recorded from the original.

    The keys are the SHA-256 of the recorded.safetensors beside them.
    """
    files = [entry.recorded / PROVENANCE_FILE for entry in CATALOG if entry.recorded]
    return {read_json_object(file)["sha256"][RECORDED]: file for file in files}
