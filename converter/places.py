"""Where something is: a path on this machine, or a repository of the Hub."""

from dataclasses import dataclass
from pathlib import Path

from converter.errors import UnreadableFileError, UsageError
from converter.files import user_path

# the file of recorded outputs
RECORDED = "recorded.safetensors"

# how files of weights end, and the index of several
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
INDEX_SUFFIX = ".index.json"


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
    """The recorded.safetensors in a folder, or the file itself.

    Raises:
        UnreadableFileError: there is no such file.
    """
    file = path / RECORDED if path.is_dir() else path
    if not file.is_file():
        raise UnreadableFileError(
            f"There are no recorded outputs at {path}.",
            f"Give a folder with a {RECORDED}, or that file.",
        )
    return file


def parse_source(text: str) -> LocalSource | HubSource:
    """Tells a path from a repository.

    What exists, is absolute, begins with ``.`` or ``~``, or ends like a weight file is a path.
    Anything else of the form owner/name, or owner/name@revision, is a repository.

    Raises:
        UsageError: it is neither.
    """
    path = user_path(text)
    if (
        path.exists()
        or path.is_symlink()  # that leads nowhere
        or path.is_absolute()
        or text.startswith((".", "~"))
        or text.endswith((*WEIGHT_SUFFIXES, INDEX_SUFFIX))
    ):
        return LocalSource(path)
    repo_id, _, revision = text.partition("@")
    if repo_id.count("/") != 1 or not all(repo_id.split("/")) or text.endswith("@"):
        raise UsageError(
            f"{text!r} is no file or folder here, and not of the form owner/name or "
            "owner/name@revision either."
        )
    return HubSource(repo_id, revision or "main")
