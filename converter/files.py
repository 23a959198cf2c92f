"""Files of one's own and from elsewhere: read within limits, and replaced as a whole."""

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
from reference_model.files import open_regular as open_regular
from reference_model.files import read_bytes as read_bytes

# bytes of a picture's file: of 8-bit RGB, the largest that Pillow opens without a warning
# (Image.MAX_IMAGE_PIXELS)
PICTURE_LIMIT = 2**28


def user_path(given: str | Path) -> Path:
    """A path as users write it, with ``~`` for a home folder, which stays where there is none."""
    return Path(os.path.expanduser(given))  # noqa: PTH111  # pathlib's raises a RuntimeError


def optional_path(given: str | Path | None) -> Path | None:
    """The same for an option that need not be given; None where it is not."""
    return user_path(given) if given else None


def real_path(path: Path) -> Path:
    """An absolute path without links, but for one that leads to itself, which stays."""
    return Path(os.path.realpath(path))


@contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Says of a file what the system says of it, where reading it fails in this block.

    Raises:
        UnreadableFileError: for any OSError.
    """
    try:
        yield
    except OSError as error:
        raise UnreadableFileError(f"{path} cannot be read: {error.strerror}.") from error


@contextmanager
def writable(place: Path, remedy: str = "") -> Iterator[None]:
    """Says of a file or folder what the system says of it, where writing fails in this block.

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
        OSError: it is no regular file, cannot be read, or is larger than the limit in bytes.
        UnicodeDecodeError: it is not in this encoding.
    """
    return read_bytes(path, limit).decode(encoding)


def read_json_object(path: Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Args:
        path: of the file.
        limit: of its size in bytes.

    Raises:
        UnreadableFileError: there is no such file, it is no regular one or too large, or it holds
            something else.
    """
    try:
        with readable(path):
            content = files.read_json_object(path, limit)
        half = _half_character(content)
    except (ValueError, RecursionError) as error:
        raise UnreadableFileError(f"{path} is not valid JSON: {error}.") from error
    if half is not None:
        key = shortened(".".join(reversed(half)))
        raise UnreadableFileError(f"{key} in {path} holds half of a character (a lone surrogate).")
    return content


def _half_character(value: Any) -> list[str] | None:
    """The keys to text that no encoding has, innermost first; None where there is none."""
    if isinstance(value, str):
        return None if is_unicode(value) else []
    entries: Iterable[tuple[str, Any]] = ()
    if isinstance(value, list):
        entries = ((f"{index}", entry) for index, entry in enumerate(value))
    elif isinstance(value, dict):
        entries = value.items()
    for key, entry in entries:
        found = _half_character(entry) if is_unicode(key) else []
        if found is not None:
            return [*found, key]
    return None


def is_unicode(text: str) -> bool:
    """Whether text can be written in UTF-8: JSON can also spell halves of characters."""
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
    """What identifies a file's content.

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
    """Opens a new file, which takes a path's place when it is complete and on the disk.

    It is made beside the path under a name that cannot be foreseen, so that no link that somebody
    has put there is followed. What stands at the path stays until then, and if anything fails.

    Raises:
        OSError: it cannot be written.
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
    """Makes the folder that a file goes to, where it is missing, so that no work is done in vain.

    Raises:
        OutputError: the folder cannot be made or written to, or a folder has the file's name.
    """
    remedy = "Give a file in a folder that may be written to."
    with writable(path, remedy):
        path.parent.mkdir(parents=True, exist_ok=True)
        is_folder = path.is_dir()
    if is_folder:
        raise OutputError(f"{path} cannot be written: it is a folder.", remedy)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path} cannot be written: its folder may not be written to.", remedy)


def sync(folder: Path) -> None:
    """Has the names in a folder written to the disk, where the file system and the folder can.

    Raises:
        OSError: the folder is not there.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # it may be written to, and not be listed
        return
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Has the files in a folder, and in those in it, written to the disk, and their names.

    Raises:
        OSError: the disk is full or broken.
    """
    for inner, _, names in os.walk(folder):
        for name in names:
            with open_regular(Path(inner, name)) as file:
                os.fsync(file.fileno())
        sync(Path(inner))
