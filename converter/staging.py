"""All or nothing: an output is made in a stage, and moved to its place when it is complete.

A stage is a new folder ``.NAME.eomt-convert-RANDOM`` beside the output. It is inside the output if
that is a mount point or the working directory, or if the output's parent cannot be written. It
holds:

- ``stage.json``: the mark of a stage, the name of its output, and the folder's inode number, which
  a copy of the folder, from an archive or a repository, does not have;
- ``lock``: locked by a run that is using the stage;
- ``output``: the new output, until it is published;
- ``replaced``: the output that was there before, or the files in it;
- ``moved.json``: the files that are moved to an output one by one, with their inode numbers.

So if a run is killed, the stage that it leaves shows what has to be undone.
"""

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from tempfile import mkdtemp
from typing import Any

from filelock import FileLock

from converter.errors import OutputError, UnreadableFileError
from converter.files import read_json_object, real_path, sha256, sync, sync_tree
from converter.locks import locked
from converter.sizes import size_text
from converter.version import TOOL

_MARKER, _LOCK, _OUTPUT, _REPLACED, _MOVED = (
    "stage.json",
    "lock",
    "output",
    "replaced",
    "moved.json",
)

# Returns the names of the files in a folder that this tool has made, relative to the folder, with
# the SHA-256 that they had then; None where that is not known.
Made = Callable[[Path], Mapping[str, str | None]]


def _nothing(_: Path) -> Mapping[str, str | None]:
    return {}


@dataclass(frozen=True)
class StagedOutput:
    """A stage: a folder to make an output in, on the output's file system.

    Attributes:
        folder: where the output is made.
        area: the stage, a hidden folder that contains it and is removed at the end.
        place: the output's final path.
        force: whether an existing output is replaced.
        made: returns which of its files this tool has made; only those are replaced.
        last: the file that is moved last: without it, an output is not complete.
    """

    folder: Path
    area: Path
    place: Path
    force: bool
    made: Made
    last: str

    def publish(self) -> None:
        """Moves the finished output to its place. What it replaces is removed with the area.

        Raises:
            OutputError: something that must not be replaced is there by now.
            OSError: the output cannot be written to the disk, or moved.
        """
        sync_tree(self.folder)
        if self.area.parent == self.place:
            self._publish_inside()
        else:
            self._publish_beside()

    def _publish_beside(self) -> None:
        if os.path.lexists(self.place):
            replaced = self.area / _REPLACED
            self.place.rename(replaced)
            # checked after the move, when nobody adds files to it any more
            ours = _check(replaced, self.place, force=self.force, made=self.made)
            _check_unchanged(replaced, self.place, ours)
        self.folder.rename(self.place)
        sync(self.place.parent)

    def _publish_inside(self) -> None:
        """Moves file by file: ``last`` is moved away first, and the new one is moved in last."""
        ours = _check(self.place, self.place, force=self.force, made=self.made, area=self.area)
        _check_unchanged(self.place, self.place, ours)
        old = _in_order(_contents(self.place, self.area), self.last)
        new = _in_order(_names(self.folder), self.last)
        _write(self.area / _MOVED, {name: (self.folder / name).lstat().st_ino for name in new})
        replaced = self.area / _REPLACED
        replaced.mkdir()
        for name in reversed(old):
            (self.place / name).rename(replaced / name)
        for name in new:
            if os.path.lexists(self.place / name):
                raise OutputError(
                    f"{self.place / name} was made by something else during this run.", "Run again."
                )
            (self.folder / name).rename(self.place / name)
        sync(self.place)
        self.folder.rmdir()


def put_back(place: Path) -> None:
    """Removes what a killed run has left of an output, and puts back what it was replacing.

    Raises:
        OutputError: something else is there by now, or another process is writing there.
    """
    with _os_errors(place):
        place = real_path(place)
        with locked(place):
            _clear(place)


def check_place(place: Path, *, force: bool, made: Made = _nothing) -> None:
    """Checks that an output may go to a place, after removing what a killed run has left of it.

    Args:
        place: absolute path of the output.
        force: whether an existing output is replaced.
        made: returns which of its files this tool has made; nothing else is ever replaced.

    Raises:
        OutputError: something is there that must not be replaced, or another process is writing
            there.
    """
    with _os_errors(place):
        place = real_path(place)
        with locked(place):
            _clear(place)
            _check_unchanged(place, place, _check(place, place, force=force, made=made))


@contextmanager
def staged(
    place: Path,
    *,
    size: int,
    force: bool = False,
    made: Made = _nothing,
    last: str = "config.json",
) -> Iterator[StagedOutput]:
    """Opens a stage for an output; when it is closed, only what was published remains.

    Only one process at a time can have a stage for a place. If a killed run has left a stage there,
    it is removed, and an output that it was replacing is put back. This function does not check
    whether files of that output were changed, because it would have to read them: `check_place` and
    `publish` do.

    Args:
        place: absolute path of the output.
        size: bytes that will be needed.
        force: whether an existing output is replaced.
        made: returns which of its files this tool has made; nothing else is ever replaced.
        last: the file without which an output is not complete. If files are moved one by one, it is
            moved last.

    Raises:
        OutputError: another process is writing there, something is there that must not be replaced,
            the disk is full, or the folder cannot be written. Also for any OSError raised inside
            the with block.
    """
    with _os_errors(place):
        place = real_path(place)
        with locked(place), _parents(place):
            _clear(place)
            _check(place, place, force=force, made=made)
            area = _make_area(place)
            with FileLock(area / _LOCK, timeout=0):
                try:
                    _write(area / _MARKER, _marker(area, place))
                    _check_space(area, place, size)
                    folder = area / _OUTPUT
                    folder.mkdir()
                    yield StagedOutput(folder, area, place, force, made, last)
                finally:
                    _dispose(area, place)


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
    except NotImplementedError as error:  # from filelock
        raise OutputError(
            f"{place} cannot be written: its disk, or the one with the folder for locks, does not "
            "support locks, which keep two runs from writing to one output.",
            "Choose an output on another disk, or set XDG_CACHE_HOME to a folder on another disk.",
        ) from error


@contextmanager
def _parents(place: Path) -> Iterator[None]:
    """Makes the parent folders of a place; removes those that are empty at the end."""
    missing = [path for path in place.parents if not path.exists()]  # innermost first
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


# what is there --------------------------------------------------------------------------------


def _check(
    folder: Path, place: Path, *, force: bool, made: Made, area: Path | None = None
) -> Mapping[str, str | None]:
    """Checks by names alone that the content of a folder may be replaced.

    Args:
        folder: the folder to check.
        place: the output's path, for the message.
        force: whether an existing output is replaced.
        made: returns which of its files this tool has made.
        area: the stage in the folder, if there is one.

    Returns:
        The files that this tool has made.

    Raises:
        OutputError: it may not be replaced.
    """
    if not os.path.lexists(folder):
        return {}
    if not folder.is_dir() or folder.is_symlink():
        raise OutputError(f"{place} is a file.", "Choose another output.")
    there = _contents(folder, area)
    ours = made(folder)
    others = [name for name in _others(folder, ours) if PurePath(name).parts[0] in there]
    if others:
        raise _not_replaced(place, "that eomt-convert did not make", others)
    if there and not force:
        raise OutputError(f"{place} exists already.", "--force replaces it.")
    return ours


def _check_unchanged(folder: Path, place: Path, ours: Mapping[str, str | None]) -> None:
    """Checks that files were not changed since this tool made them; reads all of them.

    A model that was trained further and saved under the same names, for example, was changed.

    Args:
        folder: the folder with the files.
        place: the output's path, for the message.
        ours: SHA-256 by name; None for a file that may be changed.

    Raises:
        OutputError: a file was changed.
    """
    changed = [name for name, digest in ours.items() if digest and _differs(folder / name, digest)]
    if changed:
        raise _not_replaced(place, "that were changed since eomt-convert made them", changed)


def _not_replaced(place: Path, which: str, names: Collection[str]) -> OutputError:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return OutputError(
        f"{place} contains files {which} ({', '.join(sorted(names)[:3])}{more}); --force does not "
        "replace them.",
        "Move them away, or choose another output.",
    )


def _differs(path: Path, digest: str) -> bool:
    return os.path.lexists(path) and (not path.is_file() or sha256(path) != digest)


def _contents(folder: Path, area: Path | None) -> set[str]:
    """Names in a folder, without a stage in it, and without lost+found in a mount point."""
    names = _names(folder) - {area.name if area else ""}
    return names - {"lost+found"} if _is_mount(folder) else names


def _others(folder: Path, names: Collection[str]) -> Iterator[str]:
    """The files and folders in a folder, except these files and the folders that contain them."""
    around = {str(path) for name in names for path in PurePath(name).parents}

    def walk(inner: Path) -> Iterator[str]:
        for path in inner.iterdir():
            name = str(path.relative_to(folder))
            if not path.is_dir() or path.is_symlink():
                if name not in names:
                    yield name
            elif name in around:
                yield from walk(path)
            else:
                yield name

    return walk(folder)


# stages ---------------------------------------------------------------------------------------


def _prefix(place: Path) -> str:
    return f".{place.name[:50]}.eomt-convert-"  # the name of a file has at most 255 bytes


def _make_area(place: Path) -> Path:
    # a mount point or the working directory stays the same folder: only its files are replaced
    if not (_is_mount(place) or (place.exists() and place.samefile(os.curdir))):
        try:
            return Path(mkdtemp(prefix=_prefix(place), dir=place.parent))
        except OSError as error:
            denied = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
            if not (denied and place.is_dir()):
                raise
    return Path(mkdtemp(prefix=_prefix(place), dir=place))


def _is_mount(place: Path) -> bool:
    if os.path.ismount(place):
        return True
    # a mount of a folder of the same file system (a bind mount): only Linux lists these
    name = os.fsencode(place)
    for character in b"\\ \t\n":
        name = name.replace(bytes([character]), b"\\%03o" % character)
    with suppress(OSError):
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
        return name in (line.split(b" ")[4] for line in mounts)
    return False


def _marker(area: Path, place: Path) -> dict[str, Any]:
    return {"tool": TOOL, "output": place.name, "folder": area.lstat().st_ino}


def _write(path: Path, content: dict[str, Any]) -> None:
    """Writes a new JSON file of a stage; its names may be any bytes, so it is in ASCII."""
    with path.open("x", encoding="ascii") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())


def _is_stage(area: Path, place: Path) -> bool:
    """Whether a folder is a stage that this user made for an output.

    Raises:
        OSError: the folder cannot be read, or is gone.
    """
    found = area.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        return False
    names = _names(area)
    if names <= {_LOCK, _MARKER} and not any((area / name).lstat().st_size for name in names):
        return not found.st_mode & 0o077  # as left by a run that was killed right at its start
    try:
        ours = read_json_object(area / _MARKER) == _marker(area, place)
    except UnreadableFileError:
        return False
    return ours and not (area / _MARKER).is_symlink()


def _clear(place: Path) -> None:
    """Undoes and removes what killed runs have left of an output.

    Raises:
        OutputError: what was replaced cannot be put back, because something else is there by now.
    """
    for folder in (place.parent, place):
        try:
            names = _names(folder)
        except OSError:  # the folder is missing, or this user may not read it
            continue
        for area in (folder / name for name in names if name.startswith(_prefix(place))):
            lock = FileLock(area / _LOCK, timeout=0)
            try:
                if not _is_stage(area, place):
                    continue
                lock.acquire()
            except OSError:  # another run, whose locks are elsewhere, uses it or has removed it
                continue
            try:
                _dispose(area, place)
            finally:
                lock.release()


def _dispose(area: Path, place: Path) -> None:
    """Removes a stage, after undoing what was not published."""
    unpublished = (area / _OUTPUT).is_dir()
    if unpublished:
        _undo(area, place)
    try:
        for part in (_REPLACED, _OUTPUT):  # before the marker, by which a stage is recognised
            if (area / part).is_dir():
                _remove(area / part)
        _remove(area)
    except OSError:
        if unpublished:
            raise
        # the output is in its place; what it replaced stays in the stage, where it does no harm


def _remove(folder: Path) -> None:
    """Removes a folder of a stage, with the content of read-only folders in it."""

    def retry(function: Callable[[str], object], path: str, _: object) -> None:
        Path(path).parent.chmod(0o700)
        function(path)

    shutil.rmtree(folder, onerror=retry)


def _undo(area: Path, place: Path) -> None:
    """Takes back files that were moved into a place, and puts back those that were moved away."""
    replaced = area / _REPLACED
    moves = [(replaced, place)] if os.path.lexists(replaced) else []
    if area.parent == place:
        moved = read_json_object(area / _MOVED) if (area / _MOVED).exists() else {}
        for name, number in reversed(moved.items()):
            with suppress(FileNotFoundError):
                if (place / name).lstat().st_ino == number:
                    (place / name).rename(area / _OUTPUT / name)
        names = _names(replaced) if moves else set()
        last = list(moved)[-1] if moved else ""
        moves = [(replaced / name, place / name) for name in _in_order(names, last)]
    for old, back in moves:
        if back.is_dir():
            with suppress(OSError):  # it has something in it
                back.rmdir()
        if os.path.lexists(back):
            raise OutputError(
                f"A run that was stopped had moved {back} to {old}, to replace it; something else "
                f"is at {back} now.",
                "Move one of the two away.",
            )
        old.rename(back)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _in_order(names: Collection[str], last: str) -> list[str]:
    return sorted(names, key=lambda name: (name == last, name))


def _check_space(area: Path, place: Path, size: int) -> None:
    free = shutil.disk_usage(area).free
    if free < size:
        raise OutputError(
            f"{place} needs {size_text(size, 'GB')}, its disk has {size_text(free, 'GB')} free.",
            "Free some space, or choose an output on another disk.",
        )
