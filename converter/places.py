"""Where something is: a path on this machine, or a repository of the Hub."""

from dataclasses import dataclass
from pathlib import Path

from converter.errors import UnreadableFileError

# the file of recorded outputs
RECORDED = "recorded.safetensors"


@dataclass(frozen=True)
class LocalSource:
    """A file of weights, or a folder that has one."""

    path: Path


@dataclass(frozen=True)
class HubSource:
    """A model repository.

    Attributes:
        repo_id: owner/name.
        revision: branch, tag or commit.
    """

    repo_id: str
    revision: str = "main"


def find_recorded(path: Path) -> Path:
    """The recorded.safetensors of a folder, or the file itself.

    Raises:
        UnreadableFileError: there is none.
    """
    file = path / RECORDED if path.is_dir() else path
    if not file.is_file():
        raise UnreadableFileError(
            f"There are no recorded outputs at {path}.",
            f"Give a folder that has a {RECORDED}, or the file.",
        )
    return file
