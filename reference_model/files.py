"""Finds files, reads regular ones up to a limit, and replaces them as a whole."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# Bytes of a JSON file: the largest config.json of a published model has 100 kB. Parsed, it takes up
# to thirty times as much memory.
JSON_LIMIT = 2**22

# the name of a safetensors file, without folders, "..", control characters or other characters that
# a terminal interprets
SHARD_NAME = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)


def fetch_file(folder_or_repo: str | Path, name: str, **hub: Any) -> Path:
    """The path of a file in a folder, which may not exist, or of a repository's file in the cache.

    Args:
        folder_or_repo: a folder, or a repository's id.
        name: of the file.
        hub: parameters of hf_hub_download.

    Raises:
        EntryNotFoundError: the repository has no such file.
    """
    if Path(folder_or_repo).is_dir():
        return Path(folder_or_repo, name)
    from huggingface_hub import hf_hub_download  # reading a local configuration does not need it

    return Path(hf_hub_download(str(folder_or_repo), name, **hub))


def open_regular(path: str | Path) -> BufferedReader:
    """Opens a regular file to be read, without ever waiting for a pipe or a device.

    Raises:
        OSError: there is no such file, or it is a folder, a pipe, a socket or a device.
    """
    # without O_NONBLOCK, opening a pipe waits until another process writes to it
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(None, "it is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_bytes(path: str | Path, limit: int) -> bytes:
    """The content of a regular file.

    Args:
        path: of the file.
        limit: of its size, in bytes.

    Raises:
        OSError: it is not a regular file, cannot be read, or is larger than the limit.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(None, f"it is larger than {limit:,} bytes", str(path))
    return content


def read_json_object(path: str | Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: of the file.
        limit: of its size, in bytes.

    Raises:
        OSError: it is not a regular file, cannot be read, or is larger than the limit.
        ValueError: it is not a JSON object.
    """
    text = read_bytes(path, limit)
    try:
        content = json.loads(text.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, got {type(content).__name__}")
    return content


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The path of a temporary file to write, which replaces `path` when it is complete.

    It is in a folder of its own with a random name, so that no link that somebody has put at the
    path or near it is followed. If anything fails, the file at `path` stays as it was.

    Raises:
        OSError: it cannot be written.
    """
    with TemporaryDirectory(prefix=".", dir=path.parent) as folder:
        unfinished = Path(folder, path.name)
        yield unfinished
        unfinished.replace(path)


def json_text(content: Mapping[str, Any]) -> str:
    """An object as indented JSON with sorted keys, as transformers writes it."""
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def write_json_object(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file; its folder is made if need be.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        unfinished.write_text(json_text(content), encoding="utf-8")
