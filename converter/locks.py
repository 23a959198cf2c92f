"""One process at a time: a lock for every output, in a folder that only its user can write to."""

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from converter.errors import OutputError
from converter.files import read_text, replacing, user_path


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """Keeps other processes of this user from writing to an output in this block.

    The system releases the lock when the process that holds it ends. The lock's file stays: if it
    were removed while another process is about to lock it, two processes could hold a lock.

    Args:
        place: absolute path of the output, without links in it.

    Raises:
        OutputError: another process holds the lock, or there is no folder for it.
        OSError: the lock cannot be written.
    """
    name = hashlib.sha256(os.fsencode(place)).hexdigest()
    folder = _lock_folder()
    lock, holder = FileLock(folder / f"{name}.lock", timeout=0), folder / f"{name}.pid"
    try:
        lock.acquire()
    except Timeout as error:
        process = "unknown"
        with suppress(OSError, UnicodeDecodeError):
            process = read_text(holder, 20)
        raise OutputError(
            f"Another eomt-convert (process {process}) is writing to {place}.",
            "Wait for it, or choose another output.",
        ) from error
    try:
        with replacing(holder) as file:
            file.write(str(os.getpid()).encode())
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        lock.release()


def _lock_folder() -> Path:
    """The folder for locks, which no other user can write to.

    Raises:
        OutputError: there is no such folder, and none can be made.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():  # XDG's specification says to ignore relative paths
        cache = user_path("~/.cache")
    own, temporary = cache / "eomt-convert", Path(tempfile.gettempdir())
    folders = [own, temporary / f"eomt-convert-{os.geteuid()}"][not own.is_absolute() :]
    for folder in folders:
        with suppress(OSError):
            folder.parent.mkdir(exist_ok=True)  # without parents: a missing home is not made
            with suppress(FileExistsError):
                folder.mkdir(mode=0o700)
            found = folder.lstat()
            ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
            if ours and not found.st_mode & 0o077 and os.access(folder, os.W_OK | os.X_OK):
                return folder
    raise OutputError(
        "There is no folder for locks that only you can write to (mode 0700); tried "
        f"{' and '.join(map(str, folders))}.",
        "Set XDG_CACHE_HOME to a folder that belongs to you.",
    )
