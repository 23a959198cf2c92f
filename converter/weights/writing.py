"""Writes weights as a stream: one safetensors file, or shards and their index."""

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from converter.files import FileDigest
from converter.weights.headers import ITEM_SIZES
from converter.weights.tensorfiles import WEIGHTS, WEIGHTS_INDEX

if TYPE_CHECKING:
    from converter.weights.tensorfiles import Array

# name -> (safetensors' name of the element type, shape), in the order of a file
TensorSpecs: TypeAlias = Mapping[str, tuple[str, tuple[int, ...]]]


def safetensors_header(tensors: TensorSpecs) -> bytes:
    """The header of a safetensors file with these tensors in this order, without gaps.

    The safetensors library writes the same bytes for the same tensors in the same order.
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
        tensors: all tensors, in the order in which they are written.
        files: the tensors of each safetensors file, by its name.
        index: content of ``model.safetensors.index.json``; empty if there is only one file.
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
    """Distributes tensors over files as huggingface_hub and transformers do.

    Shards are filled in the given order. A tensor that is larger than the limit gets its own shard,
    which is numbered before the shard that is being filled.

    Args:
        tensors: in the order in which they will be written.
        max_shard_size: limit for the bytes of tensors in a file; None for one file.
        parameters: number of the model's parameters, without its buffers, for the index.
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
    # the same index as transformers' save_pretrained writes
    index = {
        "metadata": {"total_parameters": parameters, **split.metadata},
        "weight_map": split.tensor_to_filename,
    }
    return Sharding(tensors, files, json.dumps(index, indent=2, sort_keys=True).encode() + b"\n")


class SafetensorsWriter(AbstractContextManager["SafetensorsWriter"]):
    """Writes a safetensors file as a stream and computes its digest; a context manager.

    Attributes:
        path: the file.
        size: its size in bytes when complete; the file is then closed.
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

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: "bytes | memoryview | Array") -> None:
        """Appends bytes: the tensors' elements, little-endian, in the order of the header."""
        view = bytes_of(data)
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


class WeightsWriter(AbstractContextManager["WeightsWriter"]):
    """Writes weights as a stream to the files of a `Sharding`; a context manager.

    At most two files are open at a time: the shard that is being filled, and the shard of one large
    tensor.
    """

    def __init__(self, folder: Path, sharding: Sharding) -> None:
        """Writes the index, if there is one; the other files are created when they are needed."""
        self._folder = folder
        self._sharding = sharding
        self._writers: dict[str, SafetensorsWriter] = {}
        self._stack = ExitStack()
        file_of = {name: file for file, tensors in sharding.files.items() for name in tensors}
        sizes = ((file_of[name], _nbytes(*spec)) for name, spec in sharding.tensors.items())
        self._remaining = iter([(file, nbytes) for file, nbytes in sizes if nbytes])
        self._file, self._left = "", 0
        if sharding.index:
            with (folder / WEIGHTS_INDEX).open("xb") as file:
                file.write(sharding.index)

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def write(self, data: "bytes | Array") -> None:
        """Appends bytes: the tensors' elements, little-endian, in the order of the sharding."""
        view = bytes_of(data)
        while len(view):
            if not self._left:
                self._file, self._left = next(self._remaining, ("", 0))
                if not self._left:
                    raise ValueError("there are more bytes than the tensors have room for")
            count = min(self._left, len(view))
            self._writer(self._file).write(view[:count])
            self._left -= count
            view = view[count:]

    @property
    def files(self) -> dict[str, FileDigest]:
        """Size in bytes and SHA-256 of every file by its name; all must be complete."""
        writers = {file: self._writer(file) for file in self._sharding.files}
        files = {file: FileDigest(writer.size, writer.sha256()) for file, writer in writers.items()}
        if self._sharding.index:
            index = self._sharding.index
            files[WEIGHTS_INDEX] = FileDigest(len(index), hashlib.sha256(index).hexdigest())
        return files

    def _writer(self, file: str) -> SafetensorsWriter:
        if file not in self._writers:
            self._writers[file] = self._stack.enter_context(
                SafetensorsWriter(self._folder / file, self._sharding.files[file])
            )
        return self._writers[file]


def bytes_of(data: "bytes | memoryview | Array") -> memoryview:
    """The bytes of some data, flat."""
    view = memoryview(data if isinstance(data, bytes | memoryview) else data.data)
    # an empty view cannot be cast
    return view.cast("B") if view.nbytes else memoryview(b"")
