"""A model repository on the Hub: its files, what would change, and the commit that changes it."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from converter.errors import EomtConvertError, NotFoundError
from converter.files import open_regular
from converter.hub.access import Snapshot, explained
from converter.hub.downloads import blob_hash, look_up
from converter.weights.tensorfiles import is_model_file

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAIN = "main"

_PIECE = 1 << 20  # bytes


@dataclass(frozen=True)
class Content:
    """The content of a file to push.

    Attributes:
        source: a file with the content, or the bytes.
        size: in bytes.
        sha256: SHA-256 of the bytes, which the Hub gives for large files.
        blob_id: git's blob id of the bytes, which the Hub gives for small files.
    """

    source: Path | bytes = field(repr=False)
    size: int
    sha256: str
    blob_id: str

    @classmethod
    def of(cls, source: Path | bytes) -> "Content":
        """Computes the digests of a file, or of bytes.

        Raises:
            OSError: the file cannot be read.
        """
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        sha256 = hashlib.sha256()
        blob_id = blob_hash(size)
        for piece in _pieces(source):
            sha256.update(piece)
            blob_id.update(piece)
        return cls(source, size, sha256.hexdigest(), blob_id.hexdigest())


def _pieces(source: Path | bytes) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    with open_regular(source) as file:
        while piece := file.read(_PIECE):
            yield piece


@dataclass(frozen=True)
class Change:
    """What a push does with one file.

    Attributes:
        name: name of the file.
        action: what the push does with it.
        size: size in bytes; 0 for a file that is deleted.
    """

    name: str
    action: Literal["add", "change", "keep", "delete"]
    size: int


@dataclass(frozen=True)
class Committed:
    """The commit that a push made or found.

    Attributes:
        revision: the branch, or the reference of a pull request.
        commit: the commit that this revision is at.
        url: address of the pull request; None for a branch.
    """

    revision: str
    commit: str
    url: str | None = None


def read_remote(api: "HfApi", repo_id: str, revision: str) -> Snapshot | None:
    """Looks up the files of a repository at a revision; None if the Hub does not show it.

    Raises:
        AccessError, HubUnavailableError: as `explained` tells.
    """
    try:
        return look_up(repo_id, revision, api.token)
    except NotFoundError:
        return None


def compare(files: Mapping[str, Content], remote: Snapshot | None) -> tuple[Change, ...]:
    """What must change so that a repository has these files and no other weights; by name.

    A file for which the Hub gives no digest counts as changed.

    Args:
        files: the files to push, by name.
        remote: the repository; None if it does not exist yet.
    """
    changes = []
    for name, content in files.items():
        if remote is None or name not in remote.digests:
            changes.append(Change(name, "add", content.size))
        elif remote.digests[name] in (content.sha256, content.blob_id):
            changes.append(Change(name, "keep", content.size))
        else:
            changes.append(Change(name, "change", content.size))
    for name in remote.digests if remote else ():
        # weights of another model or sharding would be loaded in place of what is pushed
        if name not in files and is_model_file(name):
            changes.append(Change(name, "delete", 0))
    return tuple(sorted(changes, key=lambda change: change.name))


def is_there(files: Mapping[str, Content], remote: Snapshot | None) -> bool:
    """Whether a repository is known to need no change, according to `compare`."""
    return all(change.action == "keep" for change in compare(files, remote))


def unchecked(files: Mapping[str, Content], remote: Snapshot) -> tuple[str, ...]:
    """Names of files in a repository for which the Hub gives no digest."""
    return tuple(sorted(name for name in files if remote.digests.get(name, "") is None))


def wrong_files(files: Mapping[str, Content], remote: Snapshot) -> tuple[str, ...]:
    """Names of files that are known to be wrong or missing in a repository, or not to belong."""
    left_out = unchecked(files, remote)
    changes = compare(files, remote)
    return tuple(c.name for c in changes if c.action != "keep" and c.name not in left_out)


def commit(
    api: "HfApi",
    repo_id: str,
    branch: str,
    parent: Snapshot,
    files: Mapping[str, Content],
    *,
    message: str,
    author: str,
    create_pr: bool,
) -> Committed:
    """Makes one commit that brings a branch from its parent's state to these files.

    No commit is made if the parent, or an open pull request of the author, already has them.

    An error does not prove that the commit failed, because the answer may have been lost: then the
    Hub is asked for its state.

    Raises:
        EomtConvertError: somebody else has committed since the parent was read, or it is unknown
            who has.
        AccessError, HubUnavailableError: as `explained` tells; nothing has changed then.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    if is_there(files, parent):
        return Committed(branch, parent.commit)
    if create_pr and (found := find_pull_request(api, repo_id, files, author)):
        return found
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
        landed = _landed(api, repo_id, branch, files, author, create_pr=create_pr)
        if landed:
            return landed
        now = read_remote(api, repo_id, branch)
        if now and now.commit != parent.commit:
            if unchecked(files, now) and not wrong_files(files, now):
                raise EomtConvertError(
                    f"It is unknown whether this push arrived: {repo_id} has a new commit, but the "
                    f"Hub gives no digest for {', '.join(unchecked(files, now))} in it.",
                    "Look at that commit, and run again if somebody else made it.",
                ) from error
            raise EomtConvertError(
                f"Somebody else has committed to {repo_id} since this push began; nothing was "
                "published.",
                "Run again, to push on top of that commit.",
            ) from error
        raise
    return Committed(info.pr_revision or branch, info.oid, info.pr_url)


def _landed(
    api: "HfApi",
    repo_id: str,
    branch: str,
    files: Mapping[str, Content],
    author: str,
    *,
    create_pr: bool,
) -> Committed | None:
    if create_pr:
        return find_pull_request(api, repo_id, files, author)
    remote = read_remote(api, repo_id, branch)
    return Committed(branch, remote.commit) if remote and is_there(files, remote) else None


def find_pull_request(
    api: "HfApi", repo_id: str, files: Mapping[str, Content], author: str
) -> Committed | None:
    """The author's latest open pull request with these files, if there is one.

    Raises:
        AccessError, HubUnavailableError: as `explained` tells.
    """
    with explained(repo_id):
        opened = list(
            api.get_repo_discussions(
                repo_id,
                author=author,
                discussion_type="pull_request",
                discussion_status="open",
            )
        )
    for request in sorted(opened, key=lambda request: request.num, reverse=True):
        ref = f"refs/pr/{request.num}"
        remote = read_remote(api, repo_id, ref)
        if remote and is_there(files, remote):
            url = f"{api.endpoint}/{repo_id}/discussions/{request.num}"
            return Committed(ref, remote.commit, url)
    return None


def check_tag(
    api: "HfApi", repo_id: str, tag: str, commit: str | None, files: Mapping[str, Content]
) -> bool:
    """Whether a tag is already set on a commit (None for a commit that is not made yet).

    The tag may also be on an earlier commit with the same files, if somebody else has committed
    since.

    Raises:
        EomtConvertError: the tag is on a commit with other files.
        AccessError, HubUnavailableError: as `explained` tells.
    """
    with explained(repo_id):
        tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
    if tag not in tags or tags[tag] == commit:
        return tag in tags
    if commit is None or not is_there(files, read_remote(api, repo_id, tags[tag])):
        raise EomtConvertError(
            f"{repo_id} already has a tag {tag}, on commit {tags[tag]}.", "Choose another tag."
        )
    return True
