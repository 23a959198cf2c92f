"""Opens zip files from outside, whose directories are read up to a limit."""

import zipfile
from typing import Any, BinaryIO


def open_zip(file: BinaryIO, limit: int) -> zipfile.ZipFile:
    """Opens a zip file whose directory has at most ``limit`` bytes.

    A parsed directory takes eight times its size in memory; parsing 3 MB takes a second.

    Raises:
        zipfile.BadZipFile: the directory is larger, or the file is not a zip file.
    """
    limited: Any = _Limited(file, limit)
    archive = zipfile.ZipFile(limited)
    limited.limit = -1  # no limit for the members: whoever reads them sets one
    return archive


class _Limited:
    """A file that refuses to read more than a limit at once: zipfile reads a directory at once."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self.file = file
        self.limit = limit

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def read(self, size: int = -1) -> bytes:
        if 0 <= self.limit < size:
            raise zipfile.BadZipFile(f"its directory is larger than {self.limit:,} bytes")
        return self.file.read(size)
