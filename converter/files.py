"""Reads files up to a limit, and writes files so that they are replaced as a whole."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, BinaryIO, NamedTuple

from converter.errors import OutputError, UnreadableFileError
from reference_model import files
from reference_model.files import JSON_LIMIT as JSON_LIMIT
from reference_model.files import SHARD_NAME as SHARD_NAME
from reference_model.files import open_regular as open_regular
from reference_model.files import read_bytes as read_bytes

# limit for files of pictures, in bytes: the size of the largest 8-bit RGB picture that Pillow opens
# without a warning (Image.MAX_IMAGE_PIXELS)
PICTURE_LIMIT = 2**28


def user_path(given: str | Path) -> Path:
    """Expands ``~`` in a path from a user; it stays unchanged if there is no home folder."""
    return Path(os.path.expanduser(given))  # noqa: PTH111  # pathlib's raises a RuntimeError


def optional_path(given: str | Path | None) -> Path | None:
    """The same as `user_path` for an option that may be left out; None if it is."""
    return user_path(given) if given else None


def real_path(path: Path) -> Path:
    """An absolute path with all links followed, except a link that leads to itself."""
    return Path(os.path.realpath(path))


def is_within(path: Path, folder: Path) -> bool:
    """Whether a path is in a folder after links are followed.

    The Hub's cache consists of links: snapshots/<commit>/<file> leads to the blobs of the
    repository, or from there to those of the whole cache (huggingface_hub/utils/_shared_blobs.py).
    A file in these blobs counts as one in the folder of a snapshot.
    """
    places = [folder]
    if folder.parent.name == "snapshots":
        repository = folder.parent.parent
        places += [repository / "blobs", repository.parent / "blobs"]
    return any(real_path(path).is_relative_to(real_path(place)) for place in places)


@contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Turns an OSError in this block into an error that names the file that cannot be read.

    Raises:
        UnreadableFileError: for any OSError.
    """
    try:
        yield
    except OSError as error:
        raise UnreadableFileError(f"{path} cannot be read: {error.strerror}.") from error


@contextmanager
def writable(place: Path, remedy: str = "") -> Iterator[None]:
    """Turns an OSError in this block into an error that names the place that cannot be written.

    Raises:
        OutputError: for any OSError.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{place} cannot be written: {error.strerror or error}.", remedy
        ) from error


def read_text(path: str | Path, limit: int = JSON_LIMIT, encoding: str = "utf-8") -> str:
    """The text of a regular file.

    Raises:
        OSError: it is not a regular file, cannot be read, or is larger than the limit in bytes.
        UnicodeDecodeError: it is not in this encoding.
    """
    return read_bytes(path, limit).decode(encoding)


def read_json_object(path: Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Args:
        path: of the file.
        limit: largest size in bytes.

    Raises:
        UnreadableFileError: the file is missing, too large or not a regular file, or its content is
            not a JSON object in valid Unicode.
    """
    try:
        with readable(path):
            content = files.read_json_object(path, limit)
        surrogate = _path_to_surrogate(content)
    except (ValueError, RecursionError) as error:
        raise UnreadableFileError(f"{path} does not hold a JSON object: {error}.") from error
    if surrogate is not None:
        key = shortened(".".join(reversed(surrogate)))
        raise UnreadableFileError(f"{key} in {path} holds half of a character (a lone surrogate).")
    return content


def _path_to_surrogate(value: Any) -> list[str] | None:
    """The keys that lead to text with half of a character, innermost first; None if there is none.

    Such halves (lone surrogates) can be written in JSON, but in no encoding.
    """
    if isinstance(value, str):
        return None if is_unicode(value) else []
    entries: Iterable[tuple[str, Any]] = ()
    if isinstance(value, list):
        entries = ((f"{index}", entry) for index, entry in enumerate(value))
    elif isinstance(value, dict):
        entries = value.items()
    for key, entry in entries:
        found = _path_to_surrogate(entry) if is_unicode(key) else []
        if found is not None:
            return [*found, key]
    return None


def is_unicode(text: str) -> bool:
    """Whether text can be written in UTF-8: text from JSON may hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file as transformers does: two spaces, keys as given, a newline at the end.

    Raises:
        OSError: it cannot be written.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with replacing(path) as file:
        file.write(text.encode("utf-8", errors="replace"))  # JSON may hold halves of characters


def sha256(path: Path) -> str:
    """SHA-256 of a regular file.

    Raises:
        OSError: it is not a regular file, or cannot be read.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FileDigest(NamedTuple):
    """Size and SHA-256, which identify a file's content.

    Attributes:
        size: in bytes.
        sha256: in hexadecimal.
    """

    size: int
    sha256: str


# by the file's name
Digests = Mapping[str, FileDigest]


def digests_of(paths: Iterable[Path]) -> dict[str, FileDigest]:
    """Size and digest of regular files, by name.

    Raises:
        OSError: as in `sha256`.
    """
    return {path.name: FileDigest(path.stat().st_size, sha256(path)) for path in paths}


def digests_to_dict(digests: Digests) -> dict[str, dict[str, Any]]:
    """Digests as JSON shows them."""
    return {name: digest._asdict() for name, digest in digests.items()}


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a new file that replaces the one at a path when it is complete and on the disk.

    It is made beside the path under a name that cannot be foreseen, so that nobody can put a link
    there that would be followed. If anything fails, the file at the path stays.

    Raises:
        OSError: the file cannot be written.
    """
    new = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
        new.replace(path)
    except BaseException:
        with suppress(OSError):
            new.unlink()
        raise
    sync(path.parent)


def prepare_place(path: Path) -> None:
    """Makes the folder for a file if it is missing, and checks that the file can be written there.

    It is called before long work, so that the work is not done in vain.

    Raises:
        OutputError: the folder cannot be made or written to, or a folder has the file's name.
    """
    remedy = "Give a file in a folder that you may write to."
    with writable(path, remedy):
        path.parent.mkdir(parents=True, exist_ok=True)
        is_folder = path.is_dir()
    if is_folder:
        raise OutputError(f"{path} cannot be written: it is a folder.", remedy)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path} cannot be written: you may not write to its folder.", remedy)


def sync(folder: Path) -> None:
    """Flushes the names in a folder to the disk, if the file system and the permissions allow it.

    Raises:
        OSError: the folder is missing.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # a folder that may be written to, but not listed
        return
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flushes all files in a folder and its subfolders, and their names, to the disk.

    Raises:
        OSError: the disk is full or broken.
    """
    for inner, _, names in os.walk(folder):
        for name in names:
            with open_regular(Path(inner, name)) as file:
                os.fsync(file.fileno())
        sync(Path(inner))
