"""Where something is: a path on this machine, or a repository of the Hub."""

from dataclasses import dataclass
from pathlib import Path


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
