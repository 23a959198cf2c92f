"""Zip files from outside: their directories are read up to a limit."""

import zipfile
from typing import Any, BinaryIO


def open_zip(file: BinaryIO, limit: int) -> zipfile.ZipFile:
    """Opens a zip file whose directory has no more than so many bytes.

    What is made of a directory takes eight times its size in memory, and a second for 3 MB.

    Raises:
        zipfile.BadZipFile: the directory is larger, or it is no zip file.
    """
    limited: Any = _Limited(file, limit)
    archive = zipfile.ZipFile(limited)
    limited.limit = -1  # the members have limits of their own
    return archive


class _Limited:
    """A file that refuses to read more than so much at once: zipfile reads a directory at once."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self.file = file
        self.limit = limit

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def read(self, size: int = -1) -> bytes:
        if 0 <= self.limit < size:
            raise zipfile.BadZipFile(f"its directory is larger than {self.limit:,} bytes")
        return self.file.read(size)
