"""Xet storage of a loopback Hub: what a token route answers, and what clients have uploaded.

hf_xet takes a folder of this machine for a storage server where the token route names one, as
``local:///folder``. A process that has such a folder open keeps all others out, so every token gets
a folder of its own.
"""

import os
import struct
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from shutil import copytree
from tempfile import mkdtemp

import hf_xet

# Read by hf_xet when a process first uses it: no log in the user's home, short waits.
SETTINGS = {"HF_XET_LOG_DEST": os.devnull, "HF_XET_CLIENT_RETRY_BASE_DELAY": "1ms"}
os.environ |= SETTINGS

# https://huggingface.co/docs/xet/shard: a header, then a record for every file
_HEADER_SIZE = ENTRY_SIZE = 48  # bytes
_LAST_RECORD = b"\xff" * 32
_HAS_VERIFICATION, _HAS_METADATA = 1 << 31, 1 << 30


class XetStorage:
    """Folders that clients read from and write to."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._written: list[Path] = []

    def offer(self, files: Iterable[Path]) -> str:
        """The address of a new folder with the contents of these files."""
        place = self._make_folder()
        # Dropping the last reference to what a session made closes the folder.
        with hf_xet.XetSession().new_upload_commit(endpoint=_address(place)) as commit:
            for file in files:
                commit.start_upload_file(str(file), sha256=hf_xet.COMPUTE_SHA256)
        return _address(place)

    def receive(self) -> str:
        """The address of a new folder for uploads."""
        self._written.append(self._make_folder())
        return _address(self._written[-1])

    def find(self, sha256: str) -> bytes | None:
        """What a client has uploaded, by its SHA-256."""
        for place in self._written:
            for shard in place.glob("xet/xorbs/shards/*.mdb"):
                for file_hash, digest, size in _files_of(shard.read_bytes()):
                    if digest == sha256:
                        return self._read(place, file_hash, size)
        return None

    def _read(self, place: Path, file_hash: str, size: int) -> bytes:
        # The client that wrote it may have the folder open still.
        copied = copytree(place, self._make_folder(), dirs_exist_ok=True)
        out = copied / "file"
        with hf_xet.XetSession().new_file_download_group(endpoint=_address(copied)) as group:
            group.start_download_file(hf_xet.XetFileInfo(file_hash, size), str(out))
        return out.read_bytes()

    def _make_folder(self) -> Path:
        return Path(mkdtemp(dir=self._folder))


@cache
def xet_hash(file: Path) -> str:
    """What Xet calls a file's content, 64 hexadecimal digits; the file must not change."""
    (info,) = hf_xet.hash_files([str(file)])
    return str(info.hash)


def _files_of(shard: bytes) -> Iterator[tuple[str, str, int]]:
    """Xet hash, SHA-256 and size of the files that a shard lists."""
    position = _HEADER_SIZE
    while (record := shard[position : position + ENTRY_SIZE])[:32] != _LAST_RECORD:
        flags, count = struct.unpack_from("<II", record, 32)
        entries = range(position + ENTRY_SIZE, position + ENTRY_SIZE * (count + 1), ENTRY_SIZE)
        size = sum(struct.unpack_from("<I", shard, entry + 36)[0] for entry in entries)
        position += ENTRY_SIZE * (1 + count * (2 if flags & _HAS_VERIFICATION else 1))
        if flags & _HAS_METADATA:
            yield _as_hex(record), _as_hex(shard[position : position + 32]), size
            position += ENTRY_SIZE


def _as_hex(digest: bytes) -> str:
    """A hash as text: four numbers of 64 bits, least significant byte first."""
    return "".join(f"{number:016x}" for number in struct.unpack_from("<4Q", digest))


def _address(folder: Path) -> str:
    return f"local://{folder}"
