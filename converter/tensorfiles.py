"""Files of tensors: what is in them, read without reading it, and written as a stream.

A header says where each tensor lies; the bytes are read in ranges, when they are asked for. What a
header claims is checked against the file before anything is allocated for it, and nothing in a
file is ever executed: these files come from strangers.
"""

import hashlib
import json
import math
import os
import re
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shortened
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self, TypeAlias

from converter.errors import UnreadableFileError, UsageError
from converter.unpickling import (
    Inert,
    PickledTensor,
    UnsafePickleError,
    is_count,
    is_name,
    is_shape,
    read_pickle,
)

if TYPE_CHECKING:
    import numpy as np

    Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")

# what transformers looks for in the folder of a model: one file, or shards and their index
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"

# Largest header, pickle or index, in bytes: ViT-7B's header has a fiftieth of this, its pickle with
# an optimizer's state an eighth. What is parsed takes up to a hundred times as much memory.
MAX_DESCRIPTION = 4 << 20

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

# name -> (safetensors' name of the element type, shape), in the order of a file
TensorSpecs: TypeAlias = Mapping[str, tuple[str, tuple[int, ...]]]


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


def open_tensors(path: Path) -> "TensorFile | ShardedTensorFile":
    """Opens a file of weights, or the shards of a ``.safetensors.index.json``.

    Raises:
        UnreadableFileError: there is no such file, or one of the files breaks the rules of its
            format.
    """
    return ShardedTensorFile(path) if path.suffix == ".json" else TensorFile(path)


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
        self._file = _open(path)
        self._state = _state(self._file)
        try:
            self.format, self.tensors = _read_header(self._file, self._state.size, path)
        except OSError as error:
            self._file.close()
            raise UnreadableFileError(f"{path} cannot be read: {error.strerror}.") from error
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

    def read(
        self, name: str, start: int = 0, stop: int | None = None, out: "Array | None" = None
    ) -> "Array":
        """Reads a tensor, or the elements [start, stop) of it as a flat array.

        Args:
            name: the tensor.
            start: first element.
            stop: the element behind the last; None for all of them.
            out: a flat array to read into, where it has the tensor's type and is large enough.
                Fresh memory costs as much as reading does.

        Returns:
            Elements in the tensor's own type, bfloat16 widened to float32 (which is exact), in the
            tensor's shape if the whole of it was asked for.

        Raises:
            UnreadableFileError: the file was changed after it was opened, or the tensor's element
                type has no place in these models.
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
        if out is None or out.dtype != stored or out.size < stop - start:
            out = np.empty(stop - start, stored)
        array = out[: stop - start]
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
        begin, end = 0, self._state.size
        if name is not None:
            info = self.tensors[name]
            begin, end = info.offset, info.offset + info.nbytes
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(min(end - begin, 1 << 20)))
        while begin < end:
            count = self._read_at(buffer[: end - begin], begin)
            digest.update(buffer[:count])
            begin += count
        return digest.hexdigest()

    def digests(self) -> dict[str, tuple[int, str]]:
        """Size in bytes and SHA-256 of the file, by its name."""
        return {self.path.name: (self._state.size, self.sha256())}

    def _read_at(self, buffer: memoryview, offset: int) -> int:
        try:
            count = os.preadv(self._file.fileno(), [buffer], offset)
        except OSError as error:
            raise UnreadableFileError(f"{self.path} cannot be read: {error.strerror}.") from error
        if count == 0 or _state(self._file) != self._state:
            raise UnreadableFileError(f"{self.path} was changed while it was read.")
        return count


class ShardedTensorFile:
    """Weights in several safetensors files, with an index of them; a context manager.

    It is used like a `TensorFile`.

    Attributes:
        path: the index.
        format: ``safetensors``.
        tensors: what is in the shards, by name, in the index's order.
    """

    def __init__(self, path: Path) -> None:
        """Opens an index and its shards, and reads their headers.

        Every tensor must be where the index says, and nowhere else.

        Raises:
            UnreadableFileError: a file is missing, breaks the rules of its format, or contradicts
                the index.
        """
        self.path = path
        self.format = "safetensors"
        content = _read_index(path)
        self._digest = len(content), hashlib.sha256(content).hexdigest()
        weight_map = _weight_map(content, path)
        with ExitStack() as stack:
            shards = {
                shard: stack.enter_context(_open_shard(path, shard))
                for shard in sorted(set(weight_map.values()))
            }
            _check_index(weight_map, shards, path)
            self._stack = stack.pop_all()
        self._shards = shards
        self._shard_of = {name: shards[shard] for name, shard in weight_map.items()}
        self.tensors = {name: shard.tensors[name] for name, shard in self._shard_of.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def read(
        self, name: str, start: int = 0, stop: int | None = None, out: "Array | None" = None
    ) -> "Array":
        """Reads a tensor, or a range of its elements, like `TensorFile.read`."""
        return self._shard_of[name].read(name, start, stop, out)

    def sha256(self, name: str) -> str:
        """Digest of the bytes of one tensor, in hexadecimal."""
        return self._shard_of[name].sha256(name)

    def digests(self) -> dict[str, tuple[int, str]]:
        """Size in bytes and SHA-256 of the index and of every shard, by file name."""
        digests = {self.path.name: self._digest}
        for shard in self._shards.values():
            digests |= shard.digests()
        return digests


def _open(path: Path) -> BinaryIO:
    if path.exists() and not path.is_file():
        raise UnreadableFileError(f"{path} is a folder or a device, not a file.")
    try:
        return path.open("rb")
    except OSError as error:
        raise UnreadableFileError(f"{path} cannot be read: {error.strerror}.") from error


@dataclass(frozen=True)
class _State:
    """What changes when a file is written to."""

    size: int
    modified: int


def _state(file: BinaryIO) -> _State:
    status = os.fstat(file.fileno())
    return _State(status.st_size, status.st_mtime_ns)


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


def _read_header(file: BinaryIO, size: int, path: Path) -> tuple[str, Mapping[str, TensorInfo]]:
    start = file.read(8)
    if size == 0:
        raise UnreadableFileError(f"{path} is empty.", "Fetch or copy it again.")
    if start == b"version ":
        raise UnreadableFileError(
            f"{path} is a Git LFS pointer, not the weights.", "Run git lfs pull, or download it."
        )
    if start.startswith(b"PK\x03\x04"):
        return "torch", _read_torch_header(file, path)
    if path.suffix == ".safetensors" or file.read(1) == b"{":
        return "safetensors", _read_safetensors_header(file, size, path)
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

    file.seek(0)
    start = file.read(8)
    if len(start) < 8:
        raise broken(f"it has only {size} bytes")
    (length,) = struct.unpack("<Q", start)
    if length > size - 8:
        raise broken(f"its header claims {length} bytes, the file has {size}")
    if length > MAX_DESCRIPTION:
        raise broken(f"its header of {length} bytes is larger than any model's")
    try:
        header = _parse_json_object(file.read(length))
    except ValueError as error:
        raise broken(f"its header is not the JSON that it should be ({error})") from error

    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise broken("its metadata is more than text")
    tensors = {}
    for name, entry in header.items():
        if not is_name(name):
            raise broken(f"{shortened(name)} is no name of a tensor")
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise broken(f"the entry of {name!r} lacks dtype, shape or data_offsets") from error
        if type(dtype) is not str or dtype not in ITEM_SIZES:
            raise broken(f"{name!r} has the unknown dtype {shortened(dtype)}")
        if not (is_shape(shape) and is_count(begin) and is_count(end)):
            offsets = shortened([begin, end])
            raise broken(f"{name!r} has the shape {shortened(shape)} and the offsets {offsets}")
        tensors[name] = TensorInfo(dtype, tuple(shape), 8 + length + begin)
        if tensors[name].nbytes != end - begin:
            raise broken(
                f"{name!r} of shape {shape} and dtype {dtype} needs {tensors[name].nbytes} bytes, "
                f"its offsets give {end - begin}"
            )
    _check_without_gaps(tensors, 8 + length, size, broken)
    return tensors


def _parse_json_object(data: bytes) -> dict[str, Any]:
    """Parses a JSON object; a ValueError says why it is none, or has a name twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) != len(pairs):
            raise ValueError("a name occurs twice")
        return names

    try:
        content = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not isinstance(content, dict):
        raise ValueError("it is no object")
    return content


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


# shards and their index -------------------------------------------------------------------------

# A plain name: no folder, no link's way out of one, nothing that steers a terminal.
_SHARD_NAME = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)


def shard_names(path: Path) -> list[str]:
    """The names of the files that an index speaks of, which belong beside it.

    Raises:
        UnreadableFileError: there is no such file, or it is no index.
    """
    return sorted(set(_weight_map(_read_index(path), path).values()))


def _read_index(path: Path) -> bytes:
    with _open(path) as file:
        try:
            content = file.read(MAX_DESCRIPTION + 1)
        except OSError as error:
            raise UnreadableFileError(f"{path} cannot be read: {error.strerror}.") from error
    if len(content) > MAX_DESCRIPTION:
        raise UnreadableFileError(f"{path} is larger than any model's index.")
    return content


def _weight_map(content: bytes, path: Path) -> dict[str, str]:
    """Name of the shard by name of the tensor, from an index as huggingface_hub writes it."""

    def broken(reason: str) -> UnreadableFileError:
        return UnreadableFileError(
            f"{path} is not a valid index of safetensors files: {reason}.",
            "Give the model.safetensors.index.json that came with the weights, unchanged.",
        )

    try:
        weight_map = _parse_json_object(content).get("weight_map")
    except ValueError as error:
        raise broken(f"it is not the JSON that it should be ({error})") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise broken("it has no weight_map")
    for name, shard in weight_map.items():
        if not is_name(name):
            raise broken(f"{shortened(name)} is no name of a tensor")
        if type(shard) is not str or not _SHARD_NAME.fullmatch(shard):
            raise broken(
                f"{name!r} is said to be in {shortened(shard)}, no *.safetensors beside it"
            )
    return weight_map


def _open_shard(index: Path, name: str) -> TensorFile:
    """Opens a shard, which must lie in the index's folder, links followed.

    The Hub's cache is made of links: snapshots/<commit>/<file> leads to the blobs of the
    repository, or from there to those of the whole cache (huggingface_hub/utils/_shared_blobs.py).
    """
    path = index.parent / name
    if not path.exists():
        raise UnreadableFileError(
            f"{path} is missing, a shard that {index.name} speaks of.",
            "Fetch or copy all the shards.",
        )
    shard = TensorFile(path)
    places = [index.parent]
    if index.parent.parent.name == "snapshots":
        repository = index.parent.parent.parent
        places += [repository / "blobs", repository.parent / "blobs"]
    target = path.resolve()
    if not any(target.is_relative_to(place.resolve()) for place in places):
        shard.__exit__(None, None, None)
        raise UnreadableFileError(
            f"{path} is a link to {target}, out of the index's folder.",
            "Put the shard itself there, if this is meant.",
        )
    return shard


def _check_index(
    weight_map: Mapping[str, str], shards: Mapping[str, TensorFile], path: Path
) -> None:
    remedy = "The files may be of different versions: fetch all of them again."
    for name, shard in weight_map.items():
        if name not in shards[shard].tensors:
            raise UnreadableFileError(
                f"{path} says that {name!r} is in {shard}; it is not.", remedy
            )
    for shard, file in shards.items():
        for name in file.tensors:
            if weight_map.get(name) != shard:
                raise UnreadableFileError(f"{name!r} is in {file.path}, not by the index.", remedy)


# torch's zip format --------------------------------------------------------------------------

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")


def _read_torch_header(file: BinaryIO, path: Path) -> Mapping[str, TensorInfo]:
    """Reads where torch.save put each tensor: a bare state dict, or one under ``state_dict``."""

    def broken(reason: str) -> UnreadableFileError:
        return UnreadableFileError(
            f"{path} is not a valid torch file: {reason}.",
            "It may be damaged or cut off: fetch or copy it again.",
        )

    records = _zip_records(file, broken)
    roots = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise broken("it is a zip file without the one data.pkl that torch writes")
    root = roots[0].removesuffix("data.pkl")

    begin, length = records.get(f"{root}byteorder", (0, 0))
    file.seek(begin)
    if length and file.read(min(length, 7)) != b"little":
        raise broken("its numbers are not little-endian")
    begin, length = records[f"{root}data.pkl"]
    if length > MAX_DESCRIPTION:
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
        if not is_name(name):
            raise broken(f"{shortened(name)} is no name of a tensor")
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
        raise broken(f"the numbers of {name!r} (record {shortened(storage.key)}) are not in it")
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
    file: BinaryIO, broken: Callable[[str], UnreadableFileError]
) -> dict[str, tuple[int, int]]:
    """Where each record of an uncompressed zip file lies: its first byte and its length."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries, directory = archive.infolist(), archive.start_dir
    # what zipfile was seen to raise on damaged files, beside its own exception
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OSError) as error:
        raise broken(f"its zip directory cannot be read ({error})") from error
    except (struct.error, OverflowError, LookupError) as error:
        raise broken(f"its zip directory is damaged ({error})") from error
    records: dict[str, tuple[int, int]] = {}
    position = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise broken(f"record {entry.filename!r} is compressed or encrypted, torch's never are")
        if entry.compress_size != entry.file_size:
            raise broken(f"record {entry.filename!r} has two different sizes")
        if entry.filename in records:
            raise broken(f"record {entry.filename!r} occurs twice")
        if entry.header_offset < position:
            raise broken(f"record {entry.filename!r} overlaps another")
        position = entry.header_offset + _LOCAL_HEADER.size
        if position <= directory:
            file.seek(entry.header_offset)
            header = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            signature, *_, name_length, extra_length = header
            if signature != b"PK\x03\x04":
                raise broken(f"record {entry.filename!r} has no header of its own")
            begin = position + name_length + extra_length
            position = begin + entry.file_size
            records[entry.filename] = begin, entry.file_size
        if position > directory:
            raise broken(f"record {entry.filename!r} does not lie within the file")
    return records


# writing -------------------------------------------------------------------------------------

_SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """The bytes of a size such as ``500MB``, as huggingface_hub and transformers take it.

    Units are powers of 1000; a number without a unit is one of bytes.

    Raises:
        UsageError: it is no size.
    """
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?([KMGT]B)?", text.strip().upper())
    size = int(float(match[1]) * _SIZE_UNITS.get(match[2], 1)) if match else 0
    if size == 0:
        raise UsageError(f"{text!r} is no size.", "Write 5GB, 500MB, or a number of bytes.")
    return size


def safetensors_header(tensors: TensorSpecs) -> bytes:
    """The first bytes of a safetensors file with these tensors.

    They follow in this order without gaps. The bytes are those that the safetensors library writes
    for the same tensors in the same order.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + _nbytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * ITEM_SIZES[dtype]


@dataclass(frozen=True)
class Sharding:
    """Which tensors go to which file.

    Attributes:
        tensors: what is written, in this order.
        files: the tensors of each safetensors file, by its name.
        index: content of ``model.safetensors.index.json``; empty if there is but one file.
    """

    tensors: TensorSpecs
    files: Mapping[str, TensorSpecs]
    index: bytes

    @property
    def size(self) -> int:
        """Size of all the files in bytes."""
        headers = sum(len(safetensors_header(tensors)) for tensors in self.files.values())
        return headers + sum(_nbytes(*spec) for spec in self.tensors.values()) + len(self.index)


def shard(
    tensors: TensorSpecs, max_shard_size: int | None = None, *, parameters: int = 0
) -> Sharding:
    """Spreads tensors over files as huggingface_hub and transformers do.

    Shards are filled in the given order. A tensor that is larger than a shard may be has one of its
    own, numbered before the shard that was being filled.

    Args:
        tensors: in the order in which they will be written.
        max_shard_size: bytes of tensors in a file; None for one file.
        parameters: how many parameters the model has, which does not count its buffers. The index
            tells it.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    if max_shard_size is None:
        return Sharding(tensors, {WEIGHTS: tensors}, b"")
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda spec: _nbytes(*spec),
        filename_pattern=WEIGHTS.replace(".", "{suffix}."),
        max_shard_size=max_shard_size,
    )
    files = {
        file: {name: tensors[name] for name in names}
        for file, names in split.filename_to_tensors.items()
    }
    if not split.is_sharded:
        return Sharding(tensors, files, b"")
    # as transformers' save_pretrained writes it
    index = {
        "metadata": {"total_parameters": parameters, **split.metadata},
        "weight_map": split.tensor_to_filename,
    }
    return Sharding(tensors, files, json.dumps(index, indent=2, sort_keys=True).encode() + b"\n")


class SafetensorsWriter:
    """Writes a safetensors file as a stream, its digest computed on the way; a context manager.

    Attributes:
        path: the file.
        size: its size in bytes once it is complete; it is closed then.
    """

    def __init__(self, path: Path, tensors: TensorSpecs) -> None:
        """Creates the file and writes its header."""
        self.path = path
        header = safetensors_header(tensors)
        self.size = len(header) + sum(_nbytes(*spec) for spec in tensors.values())
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

    def write(self, data: "bytes | memoryview | Array") -> None:
        """Appends bytes: the tensors' elements, little-endian, in the order of the header."""
        view = _bytes_of(data)
        if self._written + len(view) > self.size:
            raise ValueError(f"there are more bytes than {self.path} has room for")
        self._digest.update(view)
        while len(view):
            count = self._file.write(view)
            self._written += count
            view = view[count:]
        if self._written == self.size:
            self._file.close()

    def sha256(self) -> str:
        """Digest of the complete file, in hexadecimal."""
        if self._written != self.size:
            raise ValueError(f"{self._written} of {self.size} bytes of {self.path} are written")
        return self._digest.hexdigest()


class WeightsWriter:
    """Writes weights as a stream, into as many files as a `Sharding` has; a context manager.

    At most two files are open at a time: the shard that is being filled, and one with a tensor of
    its own.
    """

    def __init__(self, folder: Path, sharding: Sharding) -> None:
        """Writes the index, if there is to be one; each other file is created in its turn."""
        self._folder = folder
        self._sharding = sharding
        self._writers: dict[str, SafetensorsWriter] = {}
        self._stack = ExitStack()
        file_of = {name: file for file, tensors in sharding.files.items() for name in tensors}
        sizes = ((file_of[name], _nbytes(*spec)) for name, spec in sharding.tensors.items())
        self._to_come = iter([(file, nbytes) for file, nbytes in sizes if nbytes])
        self._file, self._left = "", 0
        if sharding.index:
            with (folder / WEIGHTS_INDEX).open("xb") as file:
                file.write(sharding.index)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def write(self, data: "bytes | Array") -> None:
        """Appends bytes: the tensors' elements, little-endian, in the order of the sharding."""
        view = _bytes_of(data)
        while len(view):
            if not self._left:
                self._file, self._left = next(self._to_come, ("", 0))
                if not self._left:
                    raise ValueError("there are more bytes than the tensors have room for")
            count = min(self._left, len(view))
            self._writer(self._file).write(view[:count])
            self._left -= count
            view = view[count:]

    @property
    def files(self) -> dict[str, tuple[int, str]]:
        """Size in bytes and SHA-256 of every file by its name, once all are complete."""
        writers = {file: self._writer(file) for file in self._sharding.files}
        files = {file: (writer.size, writer.sha256()) for file, writer in writers.items()}
        if self._sharding.index:
            index = self._sharding.index
            files[WEIGHTS_INDEX] = len(index), hashlib.sha256(index).hexdigest()
        return files

    def _writer(self, file: str) -> SafetensorsWriter:
        if file not in self._writers:
            self._writers[file] = self._stack.enter_context(
                SafetensorsWriter(self._folder / file, self._sharding.files[file])
            )
        return self._writers[file]


def _bytes_of(data: "bytes | memoryview | Array") -> memoryview:
    view = memoryview(data if isinstance(data, bytes | memoryview) else data.data)
    # a view of nothing cannot be cast
    return view.cast("B") if view.nbytes else memoryview(b"")
