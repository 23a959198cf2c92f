"""Reads the header of a file of tensors, in safetensors' or torch's format.

These files come from strangers. So the claims of a header are checked against the file before
memory is allocated for them, and nothing in a file is ever executed.
"""

import json
import math
import os
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, BinaryIO

from converter.errors import UnreadableFileError
from converter.weights.unpickling import (
    Inert,
    PickledTensor,
    UnsafePickleError,
    is_count,
    is_name,
    is_shape,
    read_pickle,
)
from converter.zips import open_zip

# Largest header, pickle, index or directory of a zip file, in bytes. ViT-7B's header has a fiftieth
# of this size, its pickle with an optimizer's state an eighth. Parsing takes up to a hundred times
# as much memory.
MAX_DESCRIPTION = 4 << 20

_FETCH_AGAIN = "It may be damaged or cut off: fetch or copy it again."

# entries of a torch file that describe a model of LightlyTrain
SETTINGS = ("model_class_path", "model_init_args")

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


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about a tensor.

    Attributes:
        dtype: safetensors' name of the element type, such as ``F32``.
        shape: its shape.
        offset: where its bytes begin in the file.
        axes: the order of its axes in the file, outermost first; None if it is the order of the
            shape. It is not for a tensor that torch saved in channels-last format, for example.
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


@dataclass(frozen=True)
class Record:
    """A member of a torch file, which is an uncompressed zip file.

    Attributes:
        begin: where its bytes begin in the file.
        length: the number of bytes.
        crc32: of its bytes, by the zip file's directory; 0 if torch was set to write none.
    """

    begin: int
    length: int
    crc32: int


@dataclass(frozen=True)
class Header:
    """The content of a file of tensors.

    Attributes:
        format: ``safetensors`` or ``torch``.
        tensors: by name, in the file's own order.
        records: of a torch file, by name.
        nested: tensors of other state dicts of a torch file, such as averaged weights, by the key
            of the dict and the name in it: ``ema.norm.weight``.
        settings: what LightlyTrain stores beside the weights of a torch file, unchecked.
    """

    format: str
    tensors: Mapping[str, TensorInfo]
    records: Mapping[str, Record] = field(default_factory=dict)
    nested: Mapping[str, TensorInfo] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


def read_header(file: BinaryIO, size: int, path: Path) -> Header:
    """Reads the header of a file that is open at its first byte.

    Args:
        file: the open file.
        size: its size in bytes.
        path: its name in messages.

    Raises:
        UnreadableFileError: it has neither format, or breaks the rules of its format.
    """
    start = file.read(8)
    if size == 0:
        raise UnreadableFileError(f"{path} is empty.", "Fetch or copy it again.")
    if start == b"version ":
        raise UnreadableFileError(
            f"{path} is a Git LFS pointer, not the weights.", "Run git lfs pull, or download it."
        )
    if start.startswith(b"PK\x03\x04"):
        return _read_torch_header(file, path)
    if path.suffix == ".safetensors" or file.read(1) == b"{":
        return Header("safetensors", _read_safetensors_header(file, size, path))
    if start[:1] == b"\x80":
        raise UnreadableFileError(
            f"{path} is a plain pickle, or has torch's format from before version 1.6.",
            "If you trust the file, load it with torch.load and save it again with torch.save.",
        )
    raise UnreadableFileError(
        f"{path} is neither a safetensors file nor a torch zip file.", _FETCH_AGAIN
    )


def _invalid(path: Path, file_format: str, reason: str) -> UnreadableFileError:
    return UnreadableFileError(f"{path} is not a valid {file_format} file: {reason}.", _FETCH_AGAIN)


# safetensors ---------------------------------------------------------------------------------


def _read_safetensors_header(file: BinaryIO, size: int, path: Path) -> Mapping[str, TensorInfo]:
    """Reads a header in the format of https://huggingface.co/docs/safetensors#format."""
    broken = partial(_invalid, path, "safetensors")
    file.seek(0)
    start = file.read(8)
    if len(start) < 8:
        raise broken(f"it has only {size} bytes")
    (length,) = struct.unpack("<Q", start)
    if length > size - 8:
        raise broken(f"its header claims {length} bytes, the file has {size}")
    if length > MAX_DESCRIPTION:
        raise broken(f"its header has {length:,} bytes, the limit is {MAX_DESCRIPTION:,}")
    try:
        header = parse_json_object(file.read(length))
    except ValueError as error:
        raise broken(f"its header cannot be parsed ({error})") from error

    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise broken("its metadata holds values that are not text")
    tensors = {}
    for name, entry in header.items():
        if not is_name(name):
            raise broken(f"{shortened(name)} is not a valid name of a tensor")
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise broken(f"the entry of {name!r} lacks dtype, shape or data_offsets") from error
        if type(dtype) is not str or dtype not in ITEM_SIZES:
            raise broken(f"{name!r} has the unknown dtype {shortened(dtype)}")
        if not (is_shape(shape) and is_count(begin) and is_count(end)):
            offsets = shortened([begin, end])
            raise broken(f"{name!r} has an invalid shape or offsets: {shortened(shape)}, {offsets}")
        tensors[name] = TensorInfo(dtype, tuple(shape), 8 + length + begin)
        if tensors[name].nbytes != end - begin:
            raise broken(
                f"{name!r} of shape {shape} and dtype {dtype} needs {tensors[name].nbytes} bytes, "
                f"its offsets give {end - begin}"
            )
    _check_without_gaps(tensors, 8 + length, size, broken)
    return tensors


def parse_json_object(data: bytes) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
        ValueError: it is not a JSON object, or has a name twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) != len(pairs):
            raise ValueError("a name occurs twice")
        return names

    try:
        content = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("it is not an object")
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
            raise broken(f"{name!r} overlaps another tensor, or has a gap before it")
        position += info.nbytes
    if position != end:
        raise broken(f"its tensors end at byte {position}, the file at byte {end}")


# torch's zip format --------------------------------------------------------------------------

# https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3.7 and 4.4.4
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
# bits of the flags
_ENCRYPTED = 1 << 0 | 1 << 6 | 1 << 13  # the record, the record strongly, the directory
_SIZES_FOLLOW = 1 << 3  # torch sets it, and writes zeros as the sizes in the header
_UTF_8 = 1 << 11
_ZIP64 = 2**32 - 1  # in place of a size that is in the extra field


def _read_torch_header(file: BinaryIO, path: Path) -> Header:
    """Reads where torch.save put each tensor of a state dict, and of state dicts within a dict."""
    broken = partial(_invalid, path, "torch")
    records = zip_records(file, broken)
    roots = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise broken(f"it is a zip file with {len(roots)} files data.pkl, expected one")
    root = roots[0].removesuffix("data.pkl")

    order = records.get(f"{root}byteorder", Record(0, 0, 0))
    file.seek(order.begin)
    if order.length and file.read(min(order.length, 7)) != b"little":
        raise broken("its numbers are not little-endian")
    pickle = records[f"{root}data.pkl"]
    if pickle.length > MAX_DESCRIPTION:
        raise broken(f"its pickle has {pickle.length:,} bytes, the limit is {MAX_DESCRIPTION:,}")
    file.seek(pickle.begin)
    try:
        content = read_pickle(file.read(pickle.length), numbered=True)
    except UnsafePickleError as error:
        raise UnreadableFileError(
            f"{path} asks to run code when it is loaded: it names {error}. None of it was run.",
            "Weights never need that. Do not load this file with torch.load either.",
        ) from error
    except ValueError as error:
        raise broken(f"its pickle is malformed ({error})") from error

    content = _named(content)
    states = _nested_states(content)
    settings = {name: content[name] for name in SETTINGS if name in content} if states else {}
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = _named(content["state_dict"])
    elif states and not any(isinstance(value, PickledTensor) for value in content.values()):
        content, states = states, {}
    if not isinstance(content, dict) or not content:
        raise UnreadableFileError(
            f"{path} holds no state dict, neither at its top level nor under 'state_dict'.",
            "Save model.state_dict(), not the model.",
        )

    def read(state: Mapping[Any, Any]) -> dict[str, TensorInfo]:
        tensors = {}
        for name, value in state.items():
            if not is_name(name):
                raise broken(f"{shortened(name)} is not a valid name of a tensor")
            if isinstance(value, Inert):
                raise UnreadableFileError(
                    f"{name} in {path} is not a plain tensor: loading it needs {value.name}, which "
                    "is not supported.",
                    "Save the weights as plain tensors: {k: v.detach() for k, v in ...items()}.",
                )
            if not isinstance(value, PickledTensor):
                raise broken(f"the entry {name!r} of its state dict is not a tensor")
            tensors[name] = _torch_tensor(name, value, records, root, broken)
        return tensors

    return Header("torch", read(content), records, read(states), settings)


def _named(content: Any) -> Any:
    """A dict without the items whose keys are numbers."""
    if not isinstance(content, dict):
        return content
    return {name: value for name, value in content.items() if isinstance(name, str)}


def _nested_states(content: Any) -> dict[str, PickledTensor]:
    """The tensors of dicts that hold nothing else, by ``key.name``, without ``state_dict``."""
    if not isinstance(content, dict):
        return {}
    states = {
        key: _named(value)
        for key, value in content.items()
        if isinstance(value, dict) and key != "state_dict" and is_name(key)
    }
    return {
        f"{key}.{name}": value
        for key, state in states.items()
        if all(isinstance(each, PickledTensor) for each in state.values())
        for name, value in state.items()
    }


def _torch_tensor(
    name: str,
    tensor: PickledTensor,
    records: Mapping[str, Record],
    root: str,
    broken: Callable[[str], UnreadableFileError],
) -> TensorInfo:
    storage = tensor.storage
    if f"{root}data/{storage.key}" not in records:
        raise broken(f"it lacks the record {shortened(storage.key)}, the elements of {name!r}")
    record = records[f"{root}data/{storage.key}"]
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
        record.begin + tensor.offset * item_size,
        None if axes == sorted(axes) else tuple(axes),
    )
    if info.offset + info.nbytes > record.begin + min(record.length, storage.size * item_size):
        raise broken(
            f"{name!r} of shape {list(tensor.shape)} does not fit in its record of "
            f"{record.length} bytes"
        )
    return info


def _axes_by_stride(shape: Sequence[int], stride: Sequence[int]) -> list[int] | None:
    """The axes from outermost to innermost in memory; None if the memory has gaps or repeats."""
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


def zip_records(file: BinaryIO, broken: Callable[[str], UnreadableFileError]) -> dict[str, Record]:
    """Finds where each record of a zip file of torch is; its headers agree with its directory.

    Args:
        file: the open file.
        broken: makes the error from what is wrong with the file.

    Raises:
        UnreadableFileError: it is not a zip file, is compressed, or contradicts itself.
    """
    try:
        with open_zip(file, MAX_DESCRIPTION) as archive:
            entries, directory = archive.infolist(), archive.start_dir
    # exceptions that zipfile was seen to raise on damaged files, besides its own
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OSError) as error:
        raise broken(f"its zip directory cannot be read ({error})") from error
    except (struct.error, OverflowError, LookupError) as error:
        raise broken(f"its zip directory is damaged ({error})") from error
    records: dict[str, Record] = {}
    position = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & _ENCRYPTED:
            raise broken(
                f"record {entry.filename!r} is compressed or encrypted; torch does neither"
            )
        if entry.compress_size != entry.file_size:
            raise broken(
                f"record {entry.filename!r} is not compressed, but has two different sizes, "
                f"{entry.compress_size} and {entry.file_size}"
            )
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
                raise broken(f"record {entry.filename!r} has no header before it")
            begin = position + name_length + extra_length
            position = begin + entry.file_size
            records[entry.filename] = Record(begin, entry.file_size, entry.CRC)
        if position > directory:
            raise broken(f"record {entry.filename!r} does not lie within the file")
    for entry in entries:
        if contradiction := _contradiction(file, entry):
            raise broken(
                f"the header of record {entry.filename!r} contradicts the directory: "
                f"{contradiction}"
            )
    return records


def _contradiction(file: BinaryIO, entry: zipfile.ZipInfo) -> str:
    """How the header before a record differs from its entry in the directory; empty if it agrees.

    If the two differ, some readers follow the header and others the directory, and a reader may
    load something else than was checked here.
    """
    file.seek(entry.header_offset)
    header = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    _, _, flags, method, _, _, crc32, compressed, size, name_length, extra_length = header
    name, extra = file.read(name_length), file.read(extra_length)
    if name != entry.filename.encode("utf-8" if entry.flag_bits & _UTF_8 else "cp437", "replace"):
        return f"its name is {shortened(name)}"
    if method != zipfile.ZIP_STORED:
        return "it is compressed"
    if flags & _ENCRYPTED:
        return "it is encrypted"
    if _ZIP64 in (compressed, size):
        size, compressed = _zip64_sizes(extra)
    follow = {0} if flags & _SIZES_FOLLOW else set()
    if wrong := {size, compressed} - {entry.file_size} - follow:
        return f"its size is {wrong.pop()}, not {entry.file_size}"
    if crc32 not in {entry.CRC} | follow:
        return f"its CRC-32 is {crc32:08x}, not {entry.CRC:08x}"
    file.seek(entry.file_size, os.SEEK_CUR)
    descriptor = file.read(24)
    if follow and descriptor.startswith(b"PK\x07\x08"):  # empty records have no descriptor
        short = entry.file_size % 2**32
        right = (
            struct.pack("<4xLLL", entry.CRC, short, short),
            struct.pack("<4xLQQ", entry.CRC, entry.file_size, entry.file_size),
        )
        if not (bytes(4) + descriptor[4:]).startswith(right):
            return "the CRC-32 or the sizes that follow the record differ"
    return ""


def _zip64_sizes(extra: bytes) -> tuple[int, int]:
    """The sizes in the extra field of a header, before and after compression; -1 if it has none."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1 and 16 <= length <= len(extra) - 4:
            size, compressed = struct.unpack_from("<QQ", extra, 4)
            return size, compressed
        extra = extra[4 + length :]
    return -1, -1
