"""Reads the archive that torch.export.save writes, and its tensors, without torch.

torch's own reader unpickles what the archive says to be pickled, and loads compiled code. Here an
archive may only hold entries that are known to be plain data.
"""

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converter.errors import UnreadableFileError
from converter.files import open_regular, readable
from converter.outside import visible
from converter.weights.headers import Record, parse_json_object, zip_records
from converter.weights.unpickling import UnsafePickleError, is_count, is_shape, read_pickle

# Largest description of a program in bytes: that of a ViT-7B has a quarter of this size. Parsed, it
# takes up to thirty times as much memory.
_LIMIT = 2**24

_AGAIN = "Export the model again, with torch.export.save of torch 2.8 or later."

_WITHOUT_SAMPLES = (
    "Save the program without its example inputs: set program.example_inputs = None before "
    "torch.export.save."
)

# torch/export/pt2_archive/constants.py
PROGRAM = "models/model.json"
_WEIGHTS = "data/weights/model_weights_config.json"
_CONSTANTS = "data/constants/model_constants_config.json"
_SAMPLE_INPUTS = "data/sample_inputs/model.pt"
_TENSOR = re.compile(r"data/(weights/weight|constants/tensor)_\d+", re.ASCII)
_PLAIN = re.compile(r"byteorder|\.data/(version|serialization_id)|extra/.+", re.ASCII)
_CONTENTS = {"archive_format": b"pt2", "archive_version": b"0"}

# what other entries are
_REFUSED = (
    (r"models/.*", "is a second program"),
    (r"data/aotinductor/.*", "is compiled code"),
    (r"data/constants/custom_obj_.*", "is a pickled object, which can run code"),
    (r"data/constants/opaque_obj_.*", "is a pickled object, which can run code"),
    (r".*\.pt", "is a pickle, which can run code"),
)

# the example inputs that torch saves beside a program: another archive, with a pickle of tensors
_SAMPLE_ENTRY = re.compile(
    r"data\.pkl|data/\d+|version|byteorder|\.data/serialization_id|\.format_version"
    r"|\.storage_alignment"
)
_SAMPLE_NAMES = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    # a tensor with attributes, as torch.export.Dim.DYNAMIC leaves some: torch's own safe unpickler,
    # torch/_weights_only_unpickler.py, allows it too
    *("torch._tensor._rebuild_from_type_v2", "torch.Tensor"),
    *(f"torch.{kind}Storage" for kind in ("Float", "Half", "BFloat16", "Double")),
    *(f"torch.{kind}Storage" for kind in ("Long", "Int", "Short", "Char", "Byte", "Bool")),
}

# numpy's names of the element types, by torch's numbers (torch/_export/serde/schema.py)
DTYPES = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float16",
    7: "float32",
    8: "float64",
    12: "bool",
    13: "bfloat16",
}

# names of tensors, values and modules: torch makes Python code of some
_NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)*", re.ASCII)


def is_identifier(value: Any) -> bool:
    """Whether a value is a name as torch gives it to tensors, values and modules."""
    return type(value) is str and len(value) <= 500 and _NAME.fullmatch(value) is not None


@dataclass(frozen=True)
class Archive:
    """An archive with known entries only.

    Attributes:
        path: of the file.
        entries: where each is in the file, by name without the archive's own.
    """

    path: Path
    entries: Mapping[str, Record]

    def refused(self, entry: str, reason: str, remedy: str = "") -> UnreadableFileError:
        """The error for an entry: what it is, or what is wrong with it."""
        return UnreadableFileError(
            f"{visible(entry)} in {self.path} {reason}. None of it was run.", remedy
        )

    def read(self, entry: str) -> NDArray[np.uint8]:
        """The bytes of an entry.

        Raises:
            UnreadableFileError: the file cannot be read, or is damaged.
        """
        record = self.entries[entry]
        with readable(self.path), open_regular(self.path) as file:
            file.seek(record.begin)
            content = np.fromfile(file, np.uint8, record.length)
        if len(content) < record.length or zlib.crc32(content.data) != record.crc32:
            raise self.refused(
                entry, "is damaged: its CRC-32 is another", "Fetch or copy the file again."
            )
        return content

    def read_object(self, entry: str) -> dict[str, Any]:
        """The JSON object in an entry.

        Raises:
            UnreadableFileError: there is none, or it is too large.
        """
        if entry not in self.entries:
            raise UnreadableFileError(f"{self.path} has no entry {entry}.", _AGAIN)
        length = self.entries[entry].length
        if length > _LIMIT:
            raise self.refused(entry, f"has {length:,} bytes, the limit is {_LIMIT:,}")
        try:
            return parse_json_object(self.read(entry).tobytes())
        except ValueError as error:
            raise self.refused(entry, f"cannot be parsed ({error})") from error


@dataclass(frozen=True)
class ProgramTensor:
    """A weight or constant of a program, as a view of an entry.

    Attributes:
        entry: with its bytes.
        dtype: as numpy names it, or ``bfloat16``.
        shape: the size of each axis.
        strides: of each axis, in elements.
        offset: of the first element, in elements.
    """

    archive: Archive
    entry: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @property
    def element(self) -> np.dtype[Any]:
        """The type as which numpy reads the bytes: for bfloat16, that of its bits."""
        return np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype)

    def view(self, content: NDArray[np.uint8]) -> NDArray[Any]:
        """The tensor in the bytes of its entry."""
        size = self.element.itemsize
        flat = content[: len(content) // size * size].view(self.element)[self.offset :]
        return np.lib.stride_tricks.as_strided(flat, self.shape, [s * size for s in self.strides])

    def read(self) -> NDArray[Any]:
        """Its values, bfloat16 as float32 (which is exact).

        Raises:
            UnreadableFileError: the file cannot be read, or was changed.
        """
        values = self.view(self.archive.read(self.entry))
        if self.dtype == "bfloat16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values


def open_archive(path: Path) -> Archive:
    """Opens an archive, and checks what its entries are.

    Raises:
        UnreadableFileError: it cannot be read, is not an archive of torch.export, or has an entry
            that is not plain data.
    """

    def broken(reason: str) -> UnreadableFileError:
        return UnreadableFileError(
            f"{path} is no program of torch.export: {reason}.", "Fetch or copy it again."
        )

    with readable(path), open_regular(path) as file:
        if file.read(4) != b"PK\3\4":
            raise broken("it is not a zip file")
        records = zip_records(file, broken)
    root = next(iter(records), "").partition("/")[0] + "/"
    if any(not name.startswith(root) for name in records):
        raise UnreadableFileError(
            f"{path} is no program of torch.export, or has its format from before torch 2.8.",
            _AGAIN,
        )
    archive = Archive(path, {name.removeprefix(root): each for name, each in records.items()})
    known = {*_CONTENTS, PROGRAM, _WEIGHTS, _CONSTANTS, _SAMPLE_INPUTS}
    for entry in archive.entries:
        if entry not in known and not _TENSOR.fullmatch(entry) and not _PLAIN.fullmatch(entry):
            reasons = (reason for kind, reason in _REFUSED if re.fullmatch(kind, entry))
            raise archive.refused(entry, next(reasons, "is not part of such a program"), _AGAIN)
    for entry, expected in _CONTENTS.items():
        record = archive.entries.get(entry)
        if record is None or record.length != len(expected):
            raise broken(f"it has no valid {entry}")
        if (found := archive.read(entry).tobytes()) != expected:
            raise broken(f"its {entry} is {found!r}, expected {expected!r}")
    order = archive.entries.get("byteorder")
    if order and (order.length != 6 or archive.read("byteorder").tobytes() != b"little"):
        raise broken("its numbers are not little-endian")
    _check_sample_inputs(archive)
    return archive


def _check_sample_inputs(archive: Archive) -> None:
    """Refuses example inputs that are more than tensors; they are not used."""
    if not archive.entries.get(_SAMPLE_INPUTS, Record(0, 0, 0)).length:
        return
    content = archive.read(_SAMPLE_INPUTS).tobytes()

    def refused(reason: str, remedy: str = "") -> UnreadableFileError:
        reason = f"is not a plain pickle of tensors: {reason}"
        return archive.refused(_SAMPLE_INPUTS, reason, remedy)

    records = zip_records(BytesIO(content), refused)
    root = next(iter(records), "").partition("/")[0] + "/"
    for name in records:
        if not name.startswith(root) or not _SAMPLE_ENTRY.fullmatch(name.removeprefix(root)):
            raise refused(f"it has the entry {visible(name)}")
    pickle = records.get(f"{root}data.pkl", Record(0, 0, 0))
    if pickle.length > _LIMIT:
        raise refused("it is too large")
    try:
        read_pickle(content[pickle.begin : pickle.begin + pickle.length], _SAMPLE_NAMES)
    except UnsafePickleError as error:
        raise refused(f"it names {error}", _WITHOUT_SAMPLES) from error
    except ValueError as error:
        raise refused(f"it is malformed ({error})") from error


def read_tensors(archive: Archive) -> dict[str, ProgramTensor]:
    """The weights and constants by name; their entries are checked, and not read.

    Raises:
        UnreadableFileError: one needs a pickle, is missing or does not fit in its entry.
    """
    tensors = {}
    for config in (_WEIGHTS, _CONSTANTS):
        folder = config.rpartition("/")[0]
        described = archive.read_object(config).get("config")
        if type(described) is not dict:
            raise archive.refused(config, "does not describe tensors")
        for name, payload in described.items():
            if not is_identifier(name) or name in tensors:
                raise archive.refused(config, f"has the invalid name {visible(name)!r}")
            try:
                tensors[name] = _tensor(archive, folder, payload)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise archive.refused(config, f"does not describe {name!r} validly") from error
    return tensors


def _tensor(archive: Archive, folder: str, payload: Mapping[str, Any]) -> ProgramTensor:
    entry = f"{folder}/{payload['path_name']}"
    if payload["use_pickle"] is not False:
        raise archive.refused(entry, "is a pickle, which can run code", _AGAIN)
    meta = payload["tensor_meta"]
    shape, strides, (offset,) = (
        tuple(size["as_int"] for size in sizes)
        for sizes in (meta["sizes"], meta["strides"], [meta["storage_offset"]])
    )
    if not is_shape(shape) or len(strides) != len(shape) or not all(map(is_count, strides)):
        raise ValueError
    if not is_count(offset) or meta["layout"] != 7:  # strided
        raise ValueError
    tensor = ProgramTensor(archive, entry, DTYPES[meta["dtype"]], shape, strides, offset)
    if not _TENSOR.fullmatch(entry) or entry not in archive.entries:
        raise archive.refused(entry, "is missing", _AGAIN)
    length = archive.entries[entry].length // tensor.element.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if prod(shape) > length or (prod(shape) and last >= length):
        raise archive.refused(
            entry,
            f"has {length} elements, too few for a tensor of shape {list(shape)}, strides "
            f"{list(strides)} and offset {offset}",
        )
    return tensor
