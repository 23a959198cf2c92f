"""Writes weights as a stream to a file that torch.load reads, without torch.

The file is a zip archive without compression, as torch.save writes it: ``data.pkl`` has the names,
shapes and places of the tensors, and ``data/N`` the elements of the tensor with number N
(github.com/pytorch/pytorch: torch/serialization.py, caffe2/serialize/inline_container.cc).
"""

import math
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING

from converter.files import FileDigest, digests_of
from converter.weights.headers import ITEM_SIZES
from converter.weights.tensorfiles import TORCH_WEIGHTS
from converter.weights.writing import TensorSpecs, bytes_of

if TYPE_CHECKING:
    from converter.weights.tensorfiles import Array

# torch's classes of storage, by safetensors' names of element types
_STORAGES: Mapping[str, str] = {"F32": "FloatStorage"}

# opcodes of a pickle of protocol 2 (Python's pickletools describes them)
_BININT = b"J"
_BINPERSID = b"Q"
_BINUNICODE = b"X"
_EMPTY_DICT = b"}"
_EMPTY_TUPLE = b")"
_GLOBAL = b"c"
_LONG1 = b"\x8a"
_MARK = b"("
_NEWFALSE = b"\x89"
_PROTO = b"\x80"
_REDUCE = b"R"
_SETITEMS = b"u"
_STOP = b"."
_TUPLE = b"t"

# where every record begins: at a multiple of this number of bytes, so that it can be mapped
_ALIGNMENT = 64

# an entry of a zip file has a time; a fixed one, so that the bytes are the same from run to run
_TIME = (1980, 1, 1, 0, 0, 0)

# the extra field of a zip entry that torch fills with zeros to align a record
_PADDING = b"FB"


class TorchWriter(AbstractContextManager["TorchWriter"]):
    """Writes a state dict of float32 tensors as a stream; a context manager.

    The same tensors give the same bytes. Memory does not grow with their sizes.
    """

    def __init__(self, folder: Path, tensors: TensorSpecs) -> None:
        """Creates the file, and writes what comes before the tensors' elements."""
        self._path = folder / TORCH_WEIGHTS
        self._stack = ExitStack()
        self._file = self._stack.enter_context(self._path.open("xb"))
        self._zip = self._stack.enter_context(
            zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED, allowZip64=True)
        )
        self._folder = self._path.stem
        for name, content in (
            ("data.pkl", pickled_tensors(tensors)),
            ("byteorder", b"little"),
            ("version", b"3\n"),
        ):
            with self._record(name, len(content)) as record:
                record.write(content)
        sizes = [math.prod(shape) * ITEM_SIZES[dtype] for dtype, shape in tensors.values()]
        self._remaining = enumerate(sizes)
        self._open, self._left = record, 0

    def __exit__(self, *_: object) -> None:
        self._open.close()
        self._stack.close()

    def write(self, data: "bytes | Array") -> None:
        """Appends bytes: the tensors' elements, little-endian, in the order of the tensors."""
        view = bytes_of(data)
        while len(view):
            if self._left == 0:
                if not self._begin_next():
                    raise ValueError("there are more bytes than the tensors have room for")
                continue
            count = min(self._left, len(view))
            self._open.write(view[:count])
            self._left -= count
            view = view[count:]

    @property
    def files(self) -> dict[str, FileDigest]:
        """Size in bytes and SHA-256 of the file by its name; it must be complete."""
        while self._left == 0 and self._begin_next():  # tensors without elements
            pass
        if self._left:
            raise ValueError(f"{self._left} bytes of a tensor are missing from {self._path}")
        self.__exit__()
        return digests_of([self._path])

    def _begin_next(self) -> bool:
        """Ends a tensor's record and begins the next; False if there is none."""
        for number, size in self._remaining:
            self._open.close()
            self._open = self._record(f"data/{number}", size)
            self._left = size
            return True
        return False

    def _record(self, name: str, size: int) -> IO[bytes]:
        """Begins a record of the archive, aligned."""
        entry = zipfile.ZipInfo(f"{self._folder}/{name}", _TIME)
        entry.file_size = size
        # 30 bytes of header, the name, an extra field with a header of 4 bytes and, for large
        # records, another one of 20 bytes that zipfile puts behind it (PKWARE's APPNOTE.TXT, 4.3.7)
        large = size * 1.05 > zipfile.ZIP64_LIMIT
        begin = self._file.tell() + 30 + len(entry.filename) + 4 + (20 if large else 0)
        padding = -begin % _ALIGNMENT
        entry.extra = _PADDING + struct.pack("<H", padding) + bytes(padding)
        return self._zip.open(entry, "w")


def pickled_tensors(tensors: TensorSpecs) -> bytes:
    """A pickle of a dict of tensors, as torch.save writes it for a state dict.

    Args:
        tensors: the type and shape of each, by name; tensor N has its elements in storage N.
    """
    return b"".join(_opcodes(tensors))


def _opcodes(tensors: TensorSpecs) -> Iterator[bytes]:
    """The opcodes of that pickle, in order."""
    yield _PROTO + b"\x02" + _EMPTY_DICT + _MARK
    for number, (name, (dtype, shape)) in enumerate(tensors.items()):
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        yield _text(name) + _global("torch._utils", "_rebuild_tensor_v2") + _MARK
        # the storage: a tuple that torch.load looks up
        yield _MARK + _text("storage") + _global("torch", _STORAGES[dtype])
        yield _text(str(number)) + _text("cpu") + _integer(math.prod(shape)) + _TUPLE
        yield _BINPERSID + _integer(0) + _integers(shape) + _integers(strides)
        yield _NEWFALSE  # it does not require a gradient
        yield _global("collections", "OrderedDict") + _EMPTY_TUPLE + _REDUCE  # no hooks
        yield _TUPLE + _REDUCE
    yield _SETITEMS + _STOP


def _text(text: str) -> bytes:
    encoded = text.encode()
    return _BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _global(module: str, name: str) -> bytes:
    return _GLOBAL + f"{module}\n{name}\n".encode()


def _integer(number: int) -> bytes:
    if number < 2**31:
        return _BININT + struct.pack("<i", number)
    encoded = number.to_bytes(number.bit_length() // 8 + 1, "little")
    return _LONG1 + bytes([len(encoded)]) + encoded


def _integers(numbers: tuple[int, ...]) -> bytes:
    return _MARK + b"".join(map(_integer, numbers)) + _TUPLE
