"""Reads ranges of tensors on demand, from single files and from shards with an index.

Opening a file reads only its header, which says where each tensor is.
"""

import hashlib
import os
import re
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shortened
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

from converter.errors import UnreadableFileError
from converter.files import SHARD_NAME, FileDigest, is_within, open_regular, readable
from converter.places import WEIGHT_SUFFIXES
from converter.weights.headers import MAX_DESCRIPTION, TensorInfo, parse_json_object, read_header
from converter.weights.unpickling import is_name

if TYPE_CHECKING:
    import numpy as np

    Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

# the files that transformers looks for in the folder of a model: one, or the index of shards
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"

# the file of a delta, as TU/e publishes it
TORCH_WEIGHTS = "pytorch_model.bin"
_MODEL_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")

# the names of published files of weights, the safer format first
USUAL_NAMES = (WEIGHTS, WEIGHTS_INDEX, TORCH_WEIGHTS)


def choose_weights(names: Collection[str]) -> str | None:
    """Chooses a folder's or repository's file of weights: a usual name, or the only file.

    Args:
        names: of the files, relative to the folder or repository.

    Returns:
        Its name; None if there is no such file, or several without a usual name.
    """
    for usual in USUAL_NAMES:
        if usual in names:
            return usual
    weights = [name for name in names if name.endswith(WEIGHT_SUFFIXES) and "/" not in name]
    return weights[0] if len(weights) == 1 else None


def find_weights(folder: Path) -> Path:
    """Finds the file of a converted model's weights, or the index of its shards.

    Raises:
        UnreadableFileError: the folder has neither.
    """
    for name in (WEIGHTS, WEIGHTS_INDEX):
        if (folder / name).is_file():
            return folder / name
    raise UnreadableFileError(
        f"{folder} has no {WEIGHTS}, and no index of its shards.",
        "Give the folder of a converted model.",
    )


def is_model_file(name: str) -> bool:
    """Whether a file has a name of a model's weights: the only file, a shard, or the index."""
    return _MODEL_FILE.fullmatch(name) is not None


def open_tensors(path: Path) -> "TensorFile | ShardedTensorFile":
    """Opens a file of weights, or the shards of a ``.safetensors.index.json``.

    Raises:
        UnreadableFileError: a file is missing, or breaks the rules of its format.
    """
    return ShardedTensorFile(path) if path.suffix == ".json" else TensorFile(path)


def damage(path: Path, wrong_checksums: Sequence[str]) -> str:
    """A sentence on the records of a file whose CRC-32 differs from the zip directory's."""
    more = len(wrong_checksums) - 1
    others = f" (so do {more} more)" if more else ""
    return (
        f"The CRC-32 of {wrong_checksums[0]!r} in {path} differs from the one in its zip "
        f"directory{others}. The file may be damaged."
    )


class TensorFile(AbstractContextManager["TensorFile"]):
    """A file of weights, open for reading; a context manager.

    Attributes:
        path: the file.
        format: ``safetensors`` or ``torch``.
        tensors: by name, in the file's own order.
        nested, settings: of a torch file, as in `headers.Header`.
    """

    def __init__(self, path: Path) -> None:
        """Opens a file and reads its header.

        Raises:
            UnreadableFileError: the file is missing, or breaks the rules of its format.
        """
        self.path = path
        self._file = _open(path)
        self._state = _state(self._file)
        with readable(path), ExitStack() as closing:
            closing.callback(self._file.close)
            try:
                header = read_header(self._file, self._state.size, path)
            except UnreadableFileError as error:
                error.damaged = path
                raise
            closing.pop_all()
        self.format, self.tensors, self._records = header.format, header.tensors, header.records
        self.nested, self.settings = header.nested, header.settings

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(
        self, name: str, start: int = 0, stop: int | None = None, out: "Array | None" = None
    ) -> "Array":
        """Reads a tensor, or the elements [start, stop) of it as a flat array.

        Args:
            name: the tensor.
            start: index of the first element.
            stop: index after the last element; None for the end of the tensor.
            out: a flat array to read into, used if it has the tensor's type and is large enough.
                Allocating new memory takes as much time as reading.

        Returns:
            Elements in the tensor's own type, but bfloat16 as float32 (which is exact). The array
            has the tensor's shape if the whole tensor was asked for, else it is flat.

        Raises:
            UnreadableFileError: the file was changed after it was opened, or the tensor's element
                type is not supported.
        """
        import numpy as np

        info = self.tensors[name]
        whole = start == 0 and stop is None
        stop = info.size if stop is None else stop
        if not 0 <= start <= stop <= info.size:
            raise ValueError(f"{name} has {info.size} elements, asked for [{start}, {stop})")
        stored = np.dtype(_NUMPY_TYPES.get(info.dtype, "V1"))
        if stored.kind == "V":
            raise UnreadableFileError(
                f"{name} in {self.path} has dtype {info.dtype}, which is not supported: no "
                "released checkpoint has it."
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

    def rename(self, names: Mapping[str, str]) -> None:
        """Gives tensors other names, and leaves out all the others.

        Args:
            names: names in the file, by the new names.
        """
        stored = {**self.nested, **self.tensors}
        self.tensors, self.nested = {new: stored[name] for new, name in names.items()}, {}

    def sha256(self, name: str | None = None) -> str:
        """Digest of the whole file, or of the bytes of one tensor, in hexadecimal."""
        begin, end = 0, self._state.size
        if name is not None:
            info = self.tensors[name]
            begin, end = info.offset, info.offset + info.nbytes
        digest = hashlib.sha256()
        for piece in self._pieces(begin, end):
            digest.update(piece)
        return digest.hexdigest()

    def wrong_checksums(self) -> tuple[str, ...]:
        """Names of the records of a torch file whose CRC-32 differs from the zip directory's.

        Reads all records that have a CRC-32 in the directory: torch can be set to write none.
        """
        wrong = []
        for name, record in self._records.items():
            crc32 = 0
            if record.crc32:
                for piece in self._pieces(record.begin, record.begin + record.length):
                    crc32 = zlib.crc32(piece, crc32)
            if crc32 != record.crc32:
                wrong.append(name)
        return tuple(wrong)

    def _pieces(self, begin: int, end: int) -> Iterator[memoryview]:
        """The bytes from one position to another, in pieces; each overwrites the one before."""
        # small enough to stay in the processor's cache between reading and digesting
        buffer = memoryview(bytearray(min(end - begin, 1 << 17)))
        while begin < end:
            count = self._read_at(buffer[: end - begin], begin)
            yield buffer[:count]
            begin += count

    def digests(self) -> dict[str, FileDigest]:
        """Size in bytes and SHA-256 of the file, by its name."""
        return {self.path.name: FileDigest(self._state.size, self.sha256())}

    def _read_at(self, buffer: memoryview, offset: int) -> int:
        with readable(self.path):
            count = os.preadv(self._file.fileno(), [buffer], offset)
        if count == 0 or _state(self._file) != self._state:
            raise UnreadableFileError(
                f"{self.path} was changed while it was read.", "Run again, without changing it."
            )
        return count


class ShardedTensorFile(AbstractContextManager["ShardedTensorFile"]):
    """Weights in several safetensors files that have an index; a context manager.

    It is used like a `TensorFile`.

    Attributes:
        path: the index.
        format: ``safetensors``.
        tensors: those of all shards, by name, in the index's order.
        nested, settings: empty.
    """

    nested: Mapping[str, TensorInfo] = MappingProxyType({})
    settings: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, path: Path) -> None:
        """Opens an index and its shards, and reads their headers.

        Every tensor must be in the shard that the index names, and in no other one.

        Raises:
            UnreadableFileError: a file is missing, breaks the rules of its format, or contradicts
                the index.
        """
        self.path = path
        self.format = "safetensors"
        content = _read_index(path)
        self._digest = FileDigest(len(content), hashlib.sha256(content).hexdigest())
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

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(
        self, name: str, start: int = 0, stop: int | None = None, out: "Array | None" = None
    ) -> "Array":
        """Reads a tensor, or a range of its elements, like `TensorFile.read`."""
        return self._shard_of[name].read(name, start, stop, out)

    def rename(self, names: Mapping[str, str]) -> None:
        """Gives tensors other names, like `TensorFile.rename`."""
        shard_of = {new: self._shard_of[name] for new, name in names.items()}
        for shard in self._shards.values():
            shard.rename({new: name for new, name in names.items() if shard_of[new] is shard})
        self._shard_of = shard_of
        self.tensors = {new: shard.tensors[new] for new, shard in shard_of.items()}

    def sha256(self, name: str) -> str:
        """Digest of the bytes of one tensor, in hexadecimal."""
        return self._shard_of[name].sha256(name)

    def wrong_checksums(self) -> tuple[str, ...]:
        """An empty tuple: safetensors files have no checksums."""
        return ()

    def digests(self) -> dict[str, FileDigest]:
        """Size in bytes and SHA-256 of the index and of every shard, by file name."""
        digests = {self.path.name: self._digest}
        for shard in self._shards.values():
            digests.update(shard.digests())
        return digests


def _open(path: Path) -> BinaryIO:
    if path.exists() and not path.is_file():
        raise UnreadableFileError(f"{path} is a folder or a device, not a file.")
    with readable(path):
        return open_regular(path)


@dataclass(frozen=True)
class _State:
    """Values that change when a file is written to."""

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


# shards and their index -------------------------------------------------------------------------


def shard_names(path: Path) -> list[str]:
    """The names of the files that an index lists; they belong in the index's folder.

    Raises:
        UnreadableFileError: the index is missing, or is not a valid one.
    """
    return sorted(set(_weight_map(_read_index(path), path).values()))


def missing_shard(shard: Path, index: Path) -> UnreadableFileError:
    """The error for a shard that is listed in an index, but missing."""
    return UnreadableFileError(
        f"{shard} is missing: {index.name} lists this shard.",
        "Fetch or copy all the shards.",
    )


def _read_index(path: Path) -> bytes:
    with _open(path) as file, readable(path):
        content = file.read(MAX_DESCRIPTION + 1)
    if len(content) > MAX_DESCRIPTION:
        raise UnreadableFileError(
            f"{path} is larger than {MAX_DESCRIPTION:,} bytes, the limit for an index."
        )
    return content


def _weight_map(content: bytes, path: Path) -> dict[str, str]:
    """The shard of every tensor, by name, from an index in huggingface_hub's format."""

    def broken(reason: str) -> UnreadableFileError:
        return UnreadableFileError(
            f"{path} is not a valid index of safetensors files: {reason}.",
            "Give the model.safetensors.index.json that came with the weights, unchanged.",
        )

    try:
        weight_map = parse_json_object(content).get("weight_map")
    except ValueError as error:
        raise broken(f"it cannot be parsed ({error})") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise broken("it has no weight_map")
    for name, shard in weight_map.items():
        if not is_name(name):
            raise broken(f"{shortened(name)} is not a valid name of a tensor")
        if type(shard) is not str or not SHARD_NAME.fullmatch(shard):
            raise broken(
                f"the shard of {name!r} is {shortened(shard)}, expected a *.safetensors beside it"
            )
    return weight_map


def _open_shard(index: Path, name: str) -> TensorFile:
    """Opens a shard, which must be in the index's folder after links are followed."""
    path = index.parent / name
    if not path.exists():
        raise missing_shard(path, index)
    shard = TensorFile(path)
    if not is_within(path, index.parent):
        shard.__exit__(None, None, None)
        raise UnreadableFileError(
            f"{path} is a link to {path.resolve()}, which is outside the index's folder.",
            "If this is the right file, copy it into that folder in place of the link.",
        )
    return shard


def _check_index(
    weight_map: Mapping[str, str], shards: Mapping[str, TensorFile], path: Path
) -> None:
    remedy = "The files may come from different versions: fetch all of them again."
    for name, shard in weight_map.items():
        if name not in shards[shard].tensors:
            raise UnreadableFileError(
                f"{path} says that {name!r} is in {shard}, but it is not.", remedy
            )
    for shard, file in shards.items():
        for name in file.tensors:
            if weight_map.get(name) != shard:
                raise UnreadableFileError(
                    f"{name!r} is in {file.path}, but the index does not say so.", remedy
                )
