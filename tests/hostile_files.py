"""Builds hostile files: containers of the two formats with any content."""

import io
import json
import struct
import zipfile
from typing import Any


def safetensors_file(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file with this header, JSON or bytes."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content)) + content + data


def with_directory(content: bytes, times: int) -> bytes:
    """A zip file whose directory names every member so many times."""
    end = content.rindex(b"PK\5\6")
    size, start = struct.unpack_from("<LL", content, end + 12)
    directory = content[start : start + size] * times
    head = content[end : end + 12] + struct.pack("<LL", len(directory), start)
    return content[:start] + directory + head + content[end + 20 :]


def torch_file(pickle: bytes, records: dict[str, bytes], *, compression: int = 0) -> bytes:
    """A torch file with this pickle and these records, such as ``data/0``."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in {"data.pkl": pickle, **records}.items():
            archive.writestr(f"model/{name}", content)
    return buffer.getvalue()
