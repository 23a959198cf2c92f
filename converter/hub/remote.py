"""A model repository on the Hub: what it has, what would change, the one commit that does it."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from converter.errors import EomtConvertError
from converter.hub.access import explained, is_expired

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAIN = "main"

# Weights of another model, or of another sharding, would be loaded in place of what is pushed.
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")

_PIECE = 1 << 20  # bytes


@dataclass(frozen=True)
class Content:
    """What a file is to hold.

    Attributes:
        source: the file that has it, or the bytes.
        size: in bytes.
        sha256: of the bytes; what the Hub tells of large files.
        blob_id: what git calls them; what the Hub tells of small files.
    """

    source: Path | bytes = field(repr=False)
    size: int
    sha256: str
    blob_id: str

    @classmethod
    def of(cls, source: Path | bytes) -> "Content":
        """Digests a file, or bytes.

        Raises:
            OSError: the file cannot be read.
        """
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        sha256 = hashlib.sha256()
        blob_id = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        for piece in _pieces(source):
            sha256.update(piece)
            blob_id.update(piece)
        return cls(source, size, sha256.hexdigest(), blob_id.hexdigest())


def _pieces(source: Path | bytes) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    with source.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece


@dataclass(frozen=True)
class Remote:
    """A revision of a repository.

    Attributes:
        repo_id: the repository's name today; the Hub answers to former names too.
        commit: which the revision is at.
        digests: of its files by name: SHA-256 of large files, git's blob ids of small ones.
        private: whether only members see the repository.
    """

    repo_id: str
    commit: str
    digests: Mapping[str, str]
    private: bool

    def has(self, name: str, content: Content) -> bool:
        """Whether a file is there, with this content."""
        return self.digests.get(name) in (content.sha256, content.blob_id)


@dataclass(frozen=True)
class Change:
    """What a push does about one file.

    Attributes:
        name: of the file.
        action: what becomes of it.
        size: of what is sent, in bytes; 0 for a file that goes away.
    """

    name: str
    action: Literal["add", "change", "keep", "delete"]
    size: int


@dataclass(frozen=True)
class Committed:
    """Where a push ended up.

    Attributes:
        revision: the branch, or the reference of a pull request.
        commit: which it is at.
        url: of the pull request; None for a branch.
    """

    revision: str
    commit: str
    url: str | None = None


def read_remote(api: "HfApi", repo_id: str, revision: str) -> Remote | None:
    """Looks up what a repository has at a revision; None if there is no such place.

    Raises:
        AccessError, HubUnavailableError: as `explained` tells.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    with explained(repo_id, revision):
        try:
            info = api.model_info(repo_id, revision=revision, files_metadata=True)
        except GatedRepoError:
            raise
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            if is_expired(error):
                raise
            return None
        digests = {
            file.rfilename: file.lfs.sha256 if file.lfs else str(file.blob_id)
            for file in info.siblings or ()
        }
        return Remote(info.id, str(info.sha), digests, private=bool(info.private))


def compare(files: Mapping[str, Content], remote: Remote | None) -> tuple[Change, ...]:
    """What a repository lacks to hold these files, and no weights but theirs; sorted by name.

    Args:
        files: by name.
        remote: None for a repository that does not exist yet.
    """
    changes = []
    for name, content in files.items():
        if remote is None or name not in remote.digests:
            changes.append(Change(name, "add", content.size))
        elif remote.has(name, content):
            changes.append(Change(name, "keep", content.size))
        else:
            changes.append(Change(name, "change", content.size))
    for name in remote.digests if remote else ():
        if name not in files and _WEIGHTS.fullmatch(name):
            changes.append(Change(name, "delete", 0))
    return tuple(sorted(changes, key=lambda change: change.name))


def is_there(files: Mapping[str, Content], remote: Remote | None) -> bool:
    """Whether a repository holds just these files, as far as `compare` looks."""
    return all(change.action == "keep" for change in compare(files, remote))


def commit(
    api: "HfApi",
    repo_id: str,
    branch: str,
    parent: Remote,
    files: Mapping[str, Content],
    *,
    message: str,
    create_pr: bool,
) -> Committed:
    """Makes one commit that brings a branch from its parent's state to these files.

    An answer that was lost on its way is not taken for a failure: the Hub is asked what it has.

    Raises:
        EomtConvertError: somebody else has committed since the parent was read.
        AccessError, HubUnavailableError: as `explained` tells; nothing has changed then.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    for change in compare(files, parent):
        if change.action == "delete":
            operations.append(CommitOperationDelete(change.name))
        elif change.action != "keep":
            operations.append(CommitOperationAdd(change.name, files[change.name].source))
    try:
        with explained(repo_id, branch):
            info = api.create_commit(
                repo_id,
                operations,
                commit_message=message,
                revision=branch,
                create_pr=create_pr,
                parent_commit=parent.commit,
            )
    except EomtConvertError as error:
        landed = _landed(api, repo_id, branch, files, create_pr=create_pr)
        if landed:
            return landed
        now = read_remote(api, repo_id, branch)
        if now and now.commit != parent.commit:
            raise EomtConvertError(
                f"Somebody else has committed to {repo_id} since this push began; nothing of it "
                "was published.",
                "Run again, to go on from there.",
            ) from error
        raise
    return Committed(info.pr_revision or branch, info.oid, info.pr_url)


def _landed(
    api: "HfApi", repo_id: str, branch: str, files: Mapping[str, Content], *, create_pr: bool
) -> Committed | None:
    if create_pr:
        return find_pull_request(api, repo_id, files)
    remote = read_remote(api, repo_id, branch)
    return Committed(branch, remote.commit) if remote and is_there(files, remote) else None


def find_pull_request(api: "HfApi", repo_id: str, files: Mapping[str, Content]) -> Committed | None:
    """The latest pull request that would bring a repository to these files, if there is one.

    Raises:
        AccessError, HubUnavailableError: as `explained` tells.
    """
    with explained(repo_id):
        refs = api.list_repo_refs(repo_id, include_pull_requests=True).pull_requests or []
    for ref in sorted(refs, key=lambda ref: int(ref.ref.rpartition("/")[2]), reverse=True):
        remote = read_remote(api, repo_id, ref.ref)
        if remote and is_there(files, remote):
            number = ref.ref.rpartition("/")[2]
            url = f"{api.endpoint}/{repo_id}/discussions/{number}"
            return Committed(ref.ref, remote.commit, url)
    return None


def check_tag(
    api: "HfApi", repo_id: str, tag: str, commit: str | None, files: Mapping[str, Content]
) -> bool:
    """Whether a tag is set already, on a commit (None for one that is yet to be made).

    It may also be on an earlier one with the same files: somebody else has committed since.

    Raises:
        EomtConvertError: it is on a commit with other files.
        AccessError, HubUnavailableError: as `explained` tells.
    """
    with explained(repo_id):
        tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
    if tag not in tags or tags[tag] == commit:
        return tag in tags
    if commit is None or not is_there(files, read_remote(api, repo_id, tags[tag])):
        raise EomtConvertError(
            f"{repo_id} has a tag {tag} already, on commit {tags[tag]}.", "Choose another tag."
        )
    return True
