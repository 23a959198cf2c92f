"""Reads a file of outputs that another program computed."""

import hashlib
import math
import zipfile
import zlib
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from converter.checks.recorded import Recorded
from converter.errors import UnreadableFileError, UsageError
from converter.files import open_regular, readable
from converter.weights.tensorfiles import TensorFile
from converter.zips import open_zip

if TYPE_CHECKING:
    from converter.weights.tensorfiles import Array

# the logits in the network's order: their names in recordings; in transformers and ONNX files
LOGITS = {"class_logits": "class_queries_logits", "mask_logits": "masks_queries_logits"}

# how headers name the types that are accepted
_FLOATS = ("F16", "BF16", "F32", "F64")

# limits: elements of a tensor, bytes of a zip file's directory, bytes of a .npy header
_MAX_ELEMENTS = 2**34
_MAX_DIRECTORY = 2**20
_MAX_HEADER = 2**16


@dataclass(frozen=True)
class StoredOutputs:
    """The outputs in a file that a recording has, too.

    Attributes:
        sha256: digest of the file.
        tensors: by the names of recorded tensors, in the network's order, in float32. One whose
            shape does not fit the recording was not read: it has its shape, and zeros.
        others: names of the file's other tensors.
    """

    sha256: str
    tensors: Mapping[str, Tensor]
    others: tuple[str, ...]


def layer_names(recorded: Recorded) -> list[str]:
    """The names of a recording's outputs of layers, in the network's order."""
    numbered = [f"hidden_states.{i}" for i in range(len(recorded.numbered("hidden_states")))]
    names = ["patch_embeddings", *numbered, "last_hidden_state"]
    return [name for name in names if name in recorded.tensors]


def read_outputs(path: Path, recorded: Recorded) -> StoredOutputs:
    """Reads the outputs in a file that can be compared with a recording.

    Args:
        path: a .npz or .safetensors file.
        recorded: the recording.

    Raises:
        UnreadableFileError: the file is broken or lacks logits; or one of these tensors is there
            twice, is no floating point numbers, or is larger than any recorded output.
        UsageError: the file has another ending.
    """
    expected = [*layer_names(recorded), *LOGITS]
    match path.suffix:
        case ".npz":
            with NpzFile(path, {*expected, *LOGITS.values()}) as npz:
                return _read_all(npz, npz.names, expected, recorded)
        case ".safetensors":
            with TensorFile(path) as file:
                return _read_all(file, tuple(file.tensors), expected, recorded)
    raise UsageError(
        f"{path} does not end in .npz or .safetensors.",
        "Store the outputs with numpy.savez or safetensors.",
    )


def _read_all(
    file: "NpzFile | TensorFile",
    names: Collection[str],
    expected: Collection[str],
    recorded: Recorded,
) -> StoredOutputs:
    stored = _stored_names(file.path, names, expected)
    return StoredOutputs(
        file.sha256(),
        {name: _read(file, key, name, recorded) for name, key in stored.items()},
        tuple(key for key in names if key not in stored.values()),
    )


def _stored_names(path: Path, names: Collection[str], expected: Collection[str]) -> dict[str, str]:
    """The names that tensors have in the file, by the names of recorded tensors, in their order."""
    stored = {}
    for name in expected:
        keys = [key for key in dict.fromkeys((name, LOGITS.get(name, name))) if key in names]
        if len(keys) > 1:
            raise UnreadableFileError(
                f"{path} has {name} twice: also as {keys[1]}.", "Store each output under one name."
            )
        if keys:
            stored[name] = keys[0]
    for name, other in LOGITS.items():
        if name not in stored:
            shown = ", ".join(list(names)[:8]) + (", ..." if len(names) > 8 else "")
            raise UnreadableFileError(
                f"{path} has neither {name} nor {other}; it has {shown or 'no tensors'}.",
                "Store both logits: mask_logits and class_logits, or masks_queries_logits and "
                "class_queries_logits.",
            )
    return stored


def _read(file: "NpzFile | TensorFile", key: str, name: str, recorded: Recorded) -> Tensor:
    info, theirs = file.tensors[key], recorded.tensors[name]
    if info.dtype not in _FLOATS:
        raise UnreadableFileError(
            f"{key} in {file.path} has dtype {info.dtype}, expected floating point numbers.",
            "Store it in float32.",
        )
    is_layer = name not in LOGITS
    if math.prod(max(side, 1) for side in info.shape) > _MAX_ELEMENTS or (
        is_layer and info.shape[:1] > (len(recorded.pixels),)
    ):
        raise UnreadableFileError(
            f"{key} in {file.path} has the shape {list(info.shape)}, larger than that of any "
            f"output for the {len(recorded.pixels)} recorded inputs."
        )
    # layers may be recorded for the first inputs only; axes may be in another order
    fits = is_layer and info.shape[1:] == theirs.shape[1:]
    if not fits and sorted(info.shape) != sorted(theirs.shape):
        return torch.zeros(()).expand(info.shape)
    return torch.from_numpy(file.read(key)).float()


@dataclass(frozen=True)
class _Entry:
    """An array of a .npz file.

    Attributes:
        shape: of the array.
        dtype: F16, F32 or F64; of other types numpy's name.
        stored: the type of the stored elements.
        order: in which they are stored, as numpy names it.
        offset: where they begin in the zip file's member.
        member: the zip file's member.
    """

    shape: tuple[int, ...]
    dtype: str
    stored: "np.dtype[np.generic]"
    order: Literal["C", "F"]
    offset: int
    member: zipfile.ZipInfo


class NpzFile(AbstractContextManager["NpzFile"]):
    """A .npz file, open for reading; a context manager that is used like a `TensorFile`.

    numpy.load would allocate whatever a header claims.

    Attributes:
        path: the file.
        names: those of all its arrays, in the file's own order.
        tensors: the arrays that are wanted, by name.
    """

    def __init__(self, path: Path, wanted: Collection[str]) -> None:
        """Opens a file and reads the headers of arrays.

        Args:
            path: of the file.
            wanted: names of the arrays; those that the file lacks are left out.

        Raises:
            UnreadableFileError: the file is missing, or is not a .npz file.
        """
        self.path = path
        with readable(path), ExitStack() as closing:
            self._file = closing.enter_context(open_regular(path))
            try:
                self._archive = open_zip(self._file, _MAX_DIRECTORY)
                members = {
                    member.filename.removesuffix(".npy"): member
                    for member in self._archive.infolist()
                }
                self.tensors = {
                    name: self._entry(member) for name, member in members.items() if name in wanted
                }
            except (UnreadableFileError, OSError):
                raise
            except Exception as error:  # on hostile files, parsers may raise anything
                raise self._broken(str(error)) from error
            self.names = tuple(members)
            if len(members) != len(self._archive.infolist()):
                raise self._broken("two of its arrays have the same name")
            closing.pop_all()

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _broken(self, reason: str) -> UnreadableFileError:
        return UnreadableFileError(
            f"{self.path} is not a valid .npz file: {reason.rstrip('.')}.",
            "Store the outputs with numpy.savez.",
        )

    def _entry(self, member: zipfile.ZipInfo) -> _Entry:
        name = member.filename
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise self._broken(f"{name!r} is compressed in a way that numpy does not use")
        with self._archive.open(member) as opened:
            header = BytesIO(opened.read(_MAX_HEADER))
        match np.lib.format.read_magic(header):
            case (1, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(header)
            case (2, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_2_0(header)
            case version:
                raise self._broken(f"{name!r} has the unknown version {version}")
        if dtype.hasobject:
            raise self._broken(f"{name!r} holds Python objects, which could run code")
        size = header.tell() + math.prod(shape) * dtype.itemsize
        if any(side < 0 for side in shape) or member.file_size != size:
            raise self._broken(
                f"{name!r} has {member.file_size} bytes, expected {size} for the shape "
                f"{list(shape)} and the type {dtype}"
            )
        kind = f"F{8 * dtype.itemsize}" if dtype.kind == "f" else str(dtype)
        return _Entry(shape, kind, dtype, "F" if fortran else "C", header.tell(), member)

    def read(self, name: str) -> "Array":
        """Reads an array of floating point numbers, in the machine's byte order.

        Raises:
            UnreadableFileError: its content is damaged.
        """
        entry = self.tensors[name]
        try:
            with self._archive.open(entry.member) as opened:
                content = opened.read(entry.member.file_size)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise self._broken(f"{entry.member.filename!r} is damaged ({error})") from error
        if len(content) != entry.member.file_size:
            raise self._broken(f"{entry.member.filename!r} ends early")
        array = np.frombuffer(content, entry.stored, offset=entry.offset)
        array = array.reshape(entry.shape, order=entry.order)
        return np.array(array, entry.stored.newbyteorder("="), order="C")

    def sha256(self) -> str:
        """Digest of the file, in hexadecimal."""
        self._file.seek(0)
        return hashlib.file_digest(self._file, "sha256").hexdigest()
