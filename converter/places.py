"""Where something is: a path on this machine, or a repository on the Hub."""

from dataclasses import dataclass
from pathlib import Path

from converter.errors import UnreadableFileError, UsageError
from converter.files import user_path

# the file of recorded outputs
RECORDED = "recorded.safetensors"

# endings of the names of weight files, and of an index of several
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
INDEX_SUFFIX = ".index.json"


@dataclass(frozen=True)
class LocalSource:
    """A file of weights, or a folder that contains one."""

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
    """The recorded.safetensors in a folder; the path itself if it is a file.

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
    """Decides whether a text is a path or a repository.

    It is a path if it exists, is absolute, begins with ``.`` or ``~``, or ends like a weight file.
    Any other text of the form owner/name, or owner/name@revision, is a repository.

    Raises:
        UsageError: it is neither.
    """
    path = user_path(text)
    if (
        path.exists()
        or path.is_symlink()  # a link whose target is missing
        or path.is_absolute()
        or text.startswith((".", "~"))
        or text.endswith((*WEIGHT_SUFFIXES, INDEX_SUFFIX))
    ):
        return LocalSource(path)
    repo_id, _, revision = text.partition("@")
    if repo_id.count("/") != 1 or not all(repo_id.split("/")) or text.endswith("@"):
        raise UsageError(
            f"{text!r} is neither a file or folder here, nor a repository of the form owner/name "
            "or owner/name@revision."
        )
    return HubSource(repo_id, revision or "main")
