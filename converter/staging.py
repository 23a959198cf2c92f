"""All or nothing: an output is made beside its place and renamed into it when it is finished."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from converter.errors import OutputError

# what an output folder has; --force replaces no other folder
_MARKS = ("conversion.json", "config.json")


@dataclass(frozen=True)
class Stage:
    """A place to work in, on the same file system as the output.

    Attributes:
        folder: where the output is made.
        area: the hidden folder around it, which goes away in the end.
    """

    folder: Path
    area: Path

    def publish(self, place: Path) -> None:
        """Renames the finished folder to its place. What stands there goes away with the area."""
        if place.exists():
            replaced = self.area / "replaced"
            replaced.mkdir(exist_ok=True)
            place.rename(replaced / place.name)
        self.folder.rename(place)


def check_place(place: Path, *, force: bool) -> None:
    """Checks that an output may go to a place.

    Raises:
        OutputError: something is there that must not be replaced.
    """
    if place.is_dir():
        names = {entry.name for entry in place.iterdir()}
        if names and not force:
            raise OutputError(f"{place} exists.", "--force replaces it.")
        if names and not names.intersection(_MARKS):
            raise OutputError(
                f"{place} is a folder without a model in it ({', '.join(sorted(names)[:3])}, ...); "
                "--force does not replace that.",
                "Choose another output.",
            )
    elif os.path.lexists(place):
        raise OutputError(f"{place} is a file.", "Choose another output.")


@contextmanager
def staged(place: Path, *, size: int) -> Iterator[Stage]:
    """Opens a stage for an output; closing it leaves nothing but what was published.

    Only one process at a time has the stage of a place. What a process that died has left there is
    cleared, and an output that it was about to replace is put back.

    Args:
        place: absolute path of the output.
        size: bytes that will be needed.

    Raises:
        OutputError: another process is writing there, the disk is full, or the folder cannot be
            written. Also for any OSError raised inside the with block.
    """
    area = place.parent / f".{place.name}.eomt-convert"
    with _os_errors(place):
        missing = _missing_folders(place.parent)
        try:
            lock = _lock(area, place)
            try:
                _clear(area)
                _check_space(place, size)
                folder = area / "output"
                folder.mkdir()
                yield Stage(folder, area)
            finally:
                _clear(area)
                (area / "lock").unlink()
                with suppress(OSError):  # from here on another process may have the area
                    area.rmdir()
                os.close(lock)
        finally:
            for folder in missing:
                with suppress(OSError):
                    folder.rmdir()


@contextmanager
def _os_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise OutputError(
            f"{place} cannot be written: {error.strerror or error}.",
            "Free some space, or choose an output on another disk." if full else "",
        ) from error


def _missing_folders(folder: Path) -> list[Path]:
    """The folders that will have to be made for a folder to exist, innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _lock(area: Path, place: Path) -> int:
    """Takes the lock of an area, which the system releases when the process that has it is gone."""
    while True:
        place.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            area.mkdir()
        try:
            lock = os.open(area / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:  # another process has removed the area since
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(lock, 20).decode(errors="replace")
            os.close(lock)
            raise OutputError(
                f"Another eomt-convert (process {holder}) is writing to {place}.",
                "Wait for it, or choose another output.",
            ) from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), (area / "lock").stat()):
                os.ftruncate(lock, 0)
                os.write(lock, str(os.getpid()).encode())
                return lock
        os.close(lock)  # of a file that its holder has removed since


def _clear(area: Path) -> None:
    """Empties an area but for its lock; puts back what was moved away and not replaced."""
    replaced = area / "replaced"
    if replaced.is_dir():
        for old in replaced.iterdir():
            if not (area.parent / old.name).exists():
                old.rename(area.parent / old.name)
    for entry in area.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != "lock":
            entry.unlink()


def _check_space(place: Path, size: int) -> None:
    free = shutil.disk_usage(place.parent).free
    if free < size:
        raise OutputError(
            f"{place} needs {size / 1e9:.2f} GB, its disk has {free / 1e9:.2f} GB left.",
            "Free some space, or choose an output on another disk.",
        )
