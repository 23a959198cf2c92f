"""Files that may come from anywhere: opened as regular files, read up to a limit."""

from __future__ import annotations

import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

# Bytes of a JSON file: the largest config.json of a published model has 100 kB. What is parsed
# takes up to thirty times as much memory.
JSON_LIMIT = 2**22


def open_regular(path: str | Path) -> BufferedReader:
    """Opens a regular file to be read, at once: a pipe or a device is never waited for.

    Raises:
        OSError: there is no such file, or it is a folder, a pipe, a socket or a device.
    """
    # without O_NONBLOCK, opening a pipe waits for somebody to write to it
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(None, "it is no regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_json_object(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: it is no regular file, or cannot be read.
        ValueError: it is larger than JSON_LIMIT, or holds something else.
    """
    with open_regular(path) as file:
        text = file.read(JSON_LIMIT + 1)
    if len(text) > JSON_LIMIT:
        raise ValueError(f"it is larger than {JSON_LIMIT:,} bytes")
    try:
        content = json.loads(text.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("its JSON is nested too deep") from error
    if not isinstance(content, dict):
        raise ValueError("expected a JSON object")
    return content
