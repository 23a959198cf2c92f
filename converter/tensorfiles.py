"""Files of tensors: what is in them, read without reading it, and written as a stream.

A header says where each tensor lies; the bytes are read in ranges, when they are asked for. What a
header claims is checked against the file before anything is allocated for it, and nothing in a
file is ever executed: these files come from strangers.
"""

import hashlib
import json
import math
import os
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self, TypeAlias

from converter.errors import UnreadableFileError
from converter.unpickling import Inert, PickledTensor, UnsafePickleError, read_pickle

if TYPE_CHECKING:
    import numpy as np

    Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")

# safetensors' names of the element types, with the size of an element in bytes
ITEM_SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}

# the limit of the safetensors library itself (MAX_HEADER_SIZE in safetensors/src/tensor.rs)
MAX_HEADER_SIZE = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor.

    Attributes:
        dtype: safetensors' name of the element type, such as ``F32``.
        shape: its shape.
        offset: where its bytes begin in the file.
        axes: the order in which its axes lie in the file, outermost first, where that is not their
            own order (torch keeps the strides of a tensor in channels-last format, say).
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    axes: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.size * ITEM_SIZES[self.dtype]


class TensorFile:
    """A file of weights, open for reading; a context manager.

    Attributes:
        path: the file.
        format: ``safetensors`` or ``torch``.
        tensors: what is in it, by name, in the file's own order.
    """

    def __init__(self, path: Path) -> None:
        """Opens a file and reads its header.

        Raises:
            UnreadableFileError: there is no such file, or it breaks the rules of its format.
        """
        self.path = path
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise UnreadableFileError(f"{path} cannot be read: {error.strerror}.") from error
        try:
            self.format, self.tensors = _read_header(self._file, path)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> "Array":
        """Reads a tensor, or the elements [start, stop) of it as a flat array.

        Returns:
            Elements in the tensor's own type, bfloat16 widened to float32 (which is exact), in the
            tensor's shape if the whole of it was asked for.

        Raises:
            UnreadableFileError: the file ends before the tensor does, or its element type has no
                place in these models.
        """
        import numpy as np

        info = self.tensors[name]
        whole = start == 0 and stop is None
        stop = info.size if stop is None else stop
        stored = np.dtype(_NUMPY_TYPES.get(info.dtype, "V1"))
        if stored.kind == "V":
            raise UnreadableFileError(
                f"{name} in {self.path} holds {info.dtype} numbers, as no released checkpoint does."
            )
        if info.axes is not None and not whole:
            return self.read(name).reshape(-1)[start:stop]
        array = np.empty(stop - start, stored)
        offset = info.offset + start * stored.itemsize
        view = array.data.cast("B") if array.size else memoryview(b"")
        while len(view):
            count = self._read_at(view, offset)
            view, offset = view[count:], offset + count
        if info.dtype == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        if info.axes is not None:
            array = array.reshape([info.shape[axis] for axis in info.axes])
            array = np.ascontiguousarray(array.transpose(np.argsort(info.axes)))
        return array.reshape(info.shape) if whole else array

    def sha256(self, name: str | None = None) -> str:
        """Digest of the whole file, or of the bytes of one tensor, in hexadecimal."""
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(1 << 22))
        begin, end = 0, os.fstat(self._file.fileno()).st_size
        if name is not None:
            info = self.tensors[name]
            begin, end = info.offset, info.offset + info.nbytes
        while begin < end:
            count = self._read_at(buffer[: end - begin], begin)
            digest.update(buffer[:count])
            begin += count
        return digest.hexdigest()

    def _read_at(self, buffer: memoryview, offset: int) -> int:
        try:
            count = os.preadv(self._file.fileno(), [buffer], offset)
        except OSError as error:
            raise UnreadableFileError(f"{self.path} cannot be read: {error.strerror}.") from error
        if count == 0:
            raise UnreadableFileError(f"{self.path} became shorter while it was read.")
        return count


_NUMPY_TYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
}


def _read_header(file: BinaryIO, path: Path) -> tuple[str, Mapping[str, TensorInfo]]:
    try:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        start = file.read(8)
    except OSError as error:
        raise UnreadableFileError(f"{path} cannot be read: {error.strerror}.") from error
    if size == 0:
        raise UnreadableFileError(f"{path} is empty.", "Fetch or copy it again.")
    if start.startswith(b"PK\x03\x04"):
        return "torch", _read_torch_header(file, size, path)
    if path.suffix == ".safetensors" or file.read(1) == b"{":
        return "safetensors", _read_safetensors_header(file, size, path)
    if start.startswith(b"version "):
        raise UnreadableFileError(
            f"{path} is a Git LFS pointer, not the weights.", "Run git lfs pull, or download it."
        )
    if start[:1] == b"\x80":
        raise UnreadableFileError(
            f"{path} is in torch's format from before version 1.6, or a plain pickle.",
            "Load it with a torch that you trust it to, and torch.save it again.",
        )
    raise UnreadableFileError(
        f"{path} is neither a safetensors file nor a torch zip file.",
        "It may be damaged or cut off: fetch or copy it again.",
    )


# safetensors ---------------------------------------------------------------------------------


def _read_safetensors_header(file: BinaryIO, size: int, path: Path) -> Mapping[str, TensorInfo]:
    """Reads a header as https://huggingface.co/docs/safetensors#format states it."""

    def broken(reason: str) -> UnreadableFileError:
        return UnreadableFileError(
            f"{path} is not a valid safetensors file: {reason}.",
            "It may be damaged or cut off: fetch or copy it again.",
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) != len(pairs):
            raise ValueError("a name occurs twice")
        return names

    file.seek(0)
    start = file.read(8)
    if len(start) < 8:
        raise broken(f"it has only {size} bytes")
    (length,) = struct.unpack("<Q", start)
    if length > min(size - 8, MAX_HEADER_SIZE):
        raise broken(f"its header claims {length} bytes, the file has {size}")
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise broken(f"its header is not the JSON that it should be ({error})") from error
    if not isinstance(header, dict):
        raise broken("its header is not a JSON object")

    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise broken(f"the entry of {name!r} lacks dtype, shape or data_offsets") from error
        if dtype not in ITEM_SIZES:
            raise broken(f"{name!r} has the unknown dtype {dtype!r}")
        if not isinstance(shape, list) or not _all_counts([*shape, begin, end]):
            raise broken(f"{name!r} has the shape {shape!r} at {begin!r} to {end!r}")
        tensors[name] = TensorInfo(dtype, tuple(shape), 8 + length + begin)
        if tensors[name].nbytes != end - begin:
            raise broken(
                f"{name!r} of shape {shape} and dtype {dtype} needs {tensors[name].nbytes} bytes, "
                f"its offsets give {end - begin}"
            )
    _check_without_gaps(tensors, 8 + length, size, broken)
    return tensors


def _all_counts(values: Sequence[Any]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _check_without_gaps(
    tensors: Mapping[str, TensorInfo],
    begin: int,
    end: int,
    broken: Callable[[str], UnreadableFileError],
) -> None:
    position = begin
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != position:
            raise broken(f"{name!r} overlaps another tensor, or there is a gap before it")
        position += info.nbytes
    if position != end:
        raise broken(f"its tensors end at byte {position}, the file at byte {end}")


# torch's zip format --------------------------------------------------------------------------

# A checkpoint of ViT-L with its optimizer's state has a pickle of a fiftieth of this.
MAX_PICKLE_SIZE = 16 << 20

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")


def _read_torch_header(file: BinaryIO, size: int, path: Path) -> Mapping[str, TensorInfo]:
    """Reads where torch.save put each tensor: a bare state dict, or one under ``state_dict``."""

    def broken(reason: str) -> UnreadableFileError:
        return UnreadableFileError(
            f"{path} is not a valid torch file: {reason}.",
            "It may be damaged or cut off: fetch or copy it again.",
        )

    records = _zip_records(file, size, broken)
    roots = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise broken("it is a zip file without the one data.pkl that torch writes")
    root = roots[0].removesuffix("data.pkl")

    begin, length = records.get(f"{root}byteorder", (0, 0))
    file.seek(begin)
    if length and file.read(length) != b"little":
        raise broken("its numbers are not little-endian")
    begin, length = records[f"{root}data.pkl"]
    if length > MAX_PICKLE_SIZE:
        raise broken(f"its pickle of {length} bytes is larger than any checkpoint's")
    file.seek(begin)
    try:
        content = read_pickle(file.read(length))
    except UnsafePickleError as error:
        raise UnreadableFileError(
            f"{path} asks to run code when it is loaded: it names {error}. Nothing of it was run.",
            "Weights never need that. Do not load this file with torch.load either.",
        ) from error
    except ValueError as error:
        raise broken(f"its pickle is malformed ({error})") from error

    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise UnreadableFileError(
            f"{path} holds neither a state dict nor one under 'state_dict'.",
            "Save model.state_dict(), not the model.",
        )
    tensors = {}
    for name, value in content.items():
        if isinstance(value, Inert):
            raise UnreadableFileError(
                f"{name} in {path} needs {value.name}, which no plain tensor does; it was refused.",
                "Save the weights as plain tensors: {k: v.detach() for k, v in ...items()}.",
            )
        if not isinstance(value, PickledTensor):
            raise broken(f"the entry {name!r} of its state dict is no tensor")
        tensors[name] = _torch_tensor(name, value, records, root, broken)
    return tensors


def _torch_tensor(
    name: str,
    tensor: PickledTensor,
    records: Mapping[str, tuple[int, int]],
    root: str,
    broken: Callable[[str], UnreadableFileError],
) -> TensorInfo:
    storage = tensor.storage
    if f"{root}data/{storage.key}" not in records:
        raise broken(f"the numbers of {name!r} (record {storage.key!r}) are not in it")
    begin, length = records[f"{root}data/{storage.key}"]
    item_size = ITEM_SIZES[storage.dtype]
    axes = _axes_by_stride(tensor.shape, tensor.stride)
    if axes is None:
        raise UnreadableFileError(
            f"{name} is saved as a view with gaps or repeats (shape {list(tensor.shape)}, stride "
            f"{list(tensor.stride)}).",
            "Save it with .contiguous().",
        )
    info = TensorInfo(
        storage.dtype,
        tensor.shape,
        begin + tensor.offset * item_size,
        None if axes == sorted(axes) else tuple(axes),
    )
    if info.offset + info.nbytes > begin + min(length, storage.size * item_size):
        raise broken(
            f"{name!r} of shape {list(tensor.shape)} does not fit in its record of {length} bytes"
        )
    return info


def _axes_by_stride(shape: Sequence[int], stride: Sequence[int]) -> list[int] | None:
    """The axes from the outermost to the innermost in memory; None if that has gaps or repeats."""
    axes = sorted(range(len(shape)), key=lambda axis: -stride[axis])
    if 0 in shape:
        return sorted(axes)
    run = 1
    for axis in reversed(axes):
        if shape[axis] != 1 and stride[axis] != run:
            return None
        run *= shape[axis]
    long = [axis for axis in axes if shape[axis] != 1]
    return sorted(axes) if long == sorted(long) else axes


def _zip_records(
    file: BinaryIO, size: int, broken: Callable[[str], UnreadableFileError]
) -> dict[str, tuple[int, int]]:
    """Where each record of an uncompressed zip file lies: its first byte and its length."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    # what zipfile was seen to raise on damaged files, beside its own exception
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OSError) as error:
        raise broken(f"its zip directory cannot be read ({error})") from error
    except (struct.error, OverflowError, LookupError) as error:
        raise broken(f"its zip directory is damaged ({error})") from error
    records = {}
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise broken(f"record {entry.filename!r} is compressed or encrypted, torch's never are")
        if entry.filename in records:
            raise broken(f"record {entry.filename!r} occurs twice")
        try:
            file.seek(entry.header_offset)
            signature, *_, name_length, extra_length = _LOCAL_HEADER.unpack(
                file.read(_LOCAL_HEADER.size)
            )
        except (struct.error, ValueError, OSError) as error:
            raise broken(f"record {entry.filename!r} has no header of its own") from error
        begin = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if signature != b"PK\x03\x04" or begin + entry.file_size > size:
            raise broken(f"record {entry.filename!r} does not lie within the file")
        if entry.compress_size != entry.file_size:
            raise broken(f"record {entry.filename!r} has two different sizes")
        records[entry.filename] = (begin, entry.file_size)
    position = 0
    for name, (begin, length) in sorted(records.items(), key=lambda item: item[1]):
        if begin < position:
            raise broken(f"record {name!r} overlaps another")
        position = begin + length
    return records


# writing -------------------------------------------------------------------------------------


def safetensors_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The first bytes of a safetensors file, for tensors given as name: (dtype, shape).

    The tensors follow in this order without gaps. The bytes are those that the safetensors library
    writes for the same tensors in the same order.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * ITEM_SIZES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class SafetensorsWriter:
    """Writes a safetensors file as a stream, its digest computed on the way; a context manager.

    Attributes:
        path: the file.
        size: its size in bytes once it is complete.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        """Creates the file and writes its header, for tensors given as name: (dtype, shape)."""
        self.path = path
        header = safetensors_header(tensors)
        self.size = len(header) + sum(
            math.prod(shape) * ITEM_SIZES[dtype] for dtype, shape in tensors.values()
        )
        self._digest = hashlib.sha256()
        self._written = 0
        self._file = path.open("xb", buffering=0)
        self.write(header)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, data: "bytes | Array") -> None:
        """Appends bytes: the tensors' elements, little-endian, in the order of the header."""
        view = memoryview(data if isinstance(data, bytes) else data.data).cast("B")
        self._digest.update(view)
        while len(view):
            count = self._file.write(view)
            self._written += count
            view = view[count:]

    def sha256(self) -> str:
        """Digest of the complete file, in hexadecimal."""
        if self._written != self.size:
            raise ValueError(f"{self._written} of {self.size} bytes of {self.path} are written")
        return self._digest.hexdigest()
