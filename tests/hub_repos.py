"""What a loopback Hub holds: users, repositories with their history, files, and a log."""

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from hub_faults import HEADS, BrokenRequest, Fault, LoggedRequest, PlannedFault, Truncated
from hub_xet import XetStorage

Gating = Literal["auto", "manual", False]

# What the Hub keeps in LFS: these kinds (its default .gitattributes) and whatever is over 10 MB.
LFS_SUFFIXES = frozenset({".bin", ".ckpt", ".npy", ".npz", ".onnx", ".pt", ".pth", ".safetensors"})
LARGEST_PLAIN_FILE = 10 * 1024 * 1024  # bytes

TAGS, PULL_REQUESTS = "refs/tags/", "refs/pr/"


@dataclass(frozen=True)
class StoredFile:
    """One version of one file: where its bytes are, and their ids in git and LFS."""

    content: Path
    size: int  # bytes
    blob_id: str  # SHA-1 of the git blob; for a file in LFS, that of its pointer
    lfs_sha256: str | None
    lfs_pointer_size: int | None

    @property
    def etag(self) -> str:
        return self.lfs_sha256 or self.blob_id

    def lfs(self, digest_name: str) -> dict[str, dict[str, Any]]:
        if self.lfs_sha256 is None:
            return {}
        pointer = {"size": self.size, "pointerSize": self.lfs_pointer_size}
        return {"lfs": {digest_name: self.lfs_sha256, **pointer}}


@dataclass(frozen=True)
class Commit:
    sha: str
    parents: tuple[str, ...]
    title: str
    description: str
    author: str
    files: Mapping[str, StoredFile]


@dataclass(frozen=True)
class PullRequest:
    number: int
    title: str
    description: str
    author: str
    branch: str  # where it is to be merged
    base: str  # the commit it was made from
    status: Literal["open", "closed", "merged"] = "open"

    @property
    def ref(self) -> str:
        return f"{PULL_REQUESTS}{self.number}"


@dataclass
class Repo:
    repo_id: str
    gated: Gating
    private: bool
    readers: set[str]  # users who pass the gate, or see a private repo
    writers: set[str]
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # full name, as refs/heads/main -> commit id
    pull_requests: dict[int, PullRequest] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        return self.repo_id.partition("/")[0]

    def ref_of(self, revision: str) -> str | None:
        """The full name of a branch, a tag or a pull request."""
        names = (HEADS + revision, TAGS + revision, revision)
        return next((name for name in names if name in self.refs), None)

    def commit_at(self, revision: str) -> Commit | None:
        ref = self.ref_of(revision)
        return self.commits.get(self.refs[ref] if ref else revision)

    def add_commit(
        self,
        ref: str,
        files: Mapping[str, StoredFile],
        *,
        title: str,
        description: str = "",
        author: str,
        parent: Commit | None = None,
    ) -> Commit:
        """Put a commit with exactly these files on top of ``ref``, or of ``parent``.

        The id follows from the repository, its history, the words and the files.
        """
        parent = parent or self.commit_at(ref)
        parents = (parent.sha,) if parent else ()
        files = dict(sorted(files.items()))
        lines = [self.repo_id, *parents, title, description, author]
        lines += [f"{file.blob_id} {path}" for path, file in files.items()]
        sha = sha1("\n".join(lines).encode())
        self.commits[sha] = Commit(sha, parents, title, description, author, files)
        self.refs[ref] = sha
        return self.commits[sha]

    def merge(self, request: PullRequest) -> Commit:
        """Put on the branch, as one commit, what a pull request changes."""
        base, changed = self.commits[request.base].files, self.commits[self.refs[request.ref]].files
        files = dict(self.commits[self.refs[HEADS + request.branch]].files)
        for path in base.keys() - changed.keys():
            files.pop(path, None)
        files |= {path: file for path, file in changed.items() if base.get(path) != file}
        self.pull_requests[request.number] = replace(request, status="merged")
        return self.add_commit(
            HEADS + request.branch,
            files,
            title=f"{request.title} (#{request.number})",
            description=request.description,
            author=request.author,
        )


@dataclass(frozen=True)
class User:
    name: str
    can_write: bool  # the role of the token
    organizations: frozenset[str]

    def may_create_in(self, namespace: str) -> bool:
        return self.can_write and namespace in {self.name, *self.organizations}

    def may_read(self, repo: Repo) -> bool:
        members = {self.name, *self.organizations}
        return repo.namespace in members or self.name in repo.readers | repo.writers

    def may_write(self, repo: Repo) -> bool:
        granted = self.can_write and self.name in repo.writers
        return granted or self.may_create_in(repo.namespace)


class Hub:
    """The repositories and users, the log of what clients asked for, and what is to break.

    ``requests`` holds every request, and ``served`` the files (``owner/name/path``) whose content
    was sent, whole or in part, or to whose storage a Xet token was given. Clear them at will.
    ``broken`` holds the requests that a fault changed anything of.

    ``has_xet`` says whether downloads are offered over Xet, too, and ``gives_blob_ids`` whether the
    digests of small files are listed; ``client_settings`` are environment variables of the clients
    that tests run against it.

    An LFS file above ``multipart_chunk_size`` bytes is asked for in parts of that size. Listings
    come in pages of ``page_size`` entries.
    """

    def __init__(self, storage: Path, endpoint: str, cdn_endpoint: str) -> None:
        self.endpoint = endpoint
        self.cdn_endpoint = cdn_endpoint
        self.has_xet = True
        self.gives_blob_ids = True
        self.client_settings: dict[str, str] = {}
        self.requests: list[LoggedRequest] = []
        self.served: list[str] = []
        self.broken: list[BrokenRequest] = []
        self.multipart_chunk_size = 5 * 1024**3  # what S3 takes in one piece
        self.page_size = 1000
        self.xet = XetStorage(storage)
        self._storage = storage
        self._repos: dict[str, Repo] = {}
        self._new_ids: dict[str, str] = {}
        self._users: dict[str, User] = {}  # by token
        self._objects: dict[str, StoredFile] = {}  # LFS, by SHA-256; kept without a commit too
        self._planned: list[PlannedFault] = []

    @property
    def address(self) -> str:
        """Host and port, as errors name the server."""
        return self.endpoint.removeprefix("http://")

    @property
    def request_lines(self) -> list[str]:
        """The requests as ``METHOD /path``."""
        return [str(request) for request in self.requests]

    @property
    def received(self) -> int:
        """Bytes of LFS content that came, in all ``requests``, those that broke included."""
        return sum(request.body_size for request in self.requests if request.is_upload)

    # People

    def add_user(
        self,
        name: str,
        token: str,
        *,
        can_write: bool = True,
        organizations: Collection[str] = (),
    ) -> None:
        """Register a token for a user, who may write to their own and organizations' repositories.

        ``can_write=False`` makes it a token of the role "read".
        """
        self._users[token] = User(name, can_write, frozenset(organizations))

    def user_with(self, token: str) -> User | None:
        return self._users.get(token)

    def grant_access(self, repo_id: str, user: str, *, write: bool = False) -> None:
        """Let a user through the gate or into a private repository, and with ``write`` commit."""
        repo = self._repos[repo_id]
        (repo.writers if write else repo.readers).add(user)

    # Repositories, as somebody on the website would change them

    def create_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes | Path],
        *,
        gated: Gating | bool = False,
        private: bool = False,
        title: str = "Add files",
    ) -> str:
        """Create a repository with one commit on ``main`` and return the commit id.

        Its owner (the user named like its namespace) may always read and write it. ``gated=True``
        is ``"manual"``: access is granted by :meth:`grant_access`.
        """
        if repo_id in self._repos:
            raise ValueError(f"{repo_id} exists")
        self._new_ids.pop(repo_id, None)
        gating = "manual" if gated is True else gated
        self._repos[repo_id] = Repo(repo_id, gating, private, readers=set(), writers=set())
        return self.commit(repo_id, files, title=title)

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | Path],
        *,
        branch: str = "main",
        title: str = "Change files",
        author: str | None = None,
    ) -> str:
        """Add or replace files on a branch and return the commit id.

        The id is the same in every run. A file given as a path is read from there when it is asked
        for, and must not change.
        """
        repo = self._repos[repo_id]
        head = repo.commit_at(HEADS + branch)
        contents = dict(head.files) if head else {}
        contents |= {path: self.store(path, content) for path, content in files.items()}
        author = author or repo.namespace
        return repo.add_commit(HEADS + branch, contents, title=title, author=author).sha

    def tag(self, repo_id: str, name: str, revision: str = "main") -> None:
        repo = self._repos[repo_id]
        repo.refs[TAGS + name] = self._commit_at(repo_id, revision).sha

    def end_pull_request(self, repo_id: str, number: int, *, merge: bool) -> None:
        """Merge a pull request, or close it without merging."""
        repo = self._repos[repo_id]
        request = repo.pull_requests[number]
        if merge:
            repo.merge(request)
        else:
            repo.pull_requests[number] = replace(request, status="closed")

    def rename(self, old_id: str, new_id: str) -> None:
        """Rename a repository; requests for the old name are redirected to the new one."""
        repo = self._repos.pop(old_id)
        repo.repo_id = new_id
        self._repos[new_id] = repo
        self._new_ids.pop(new_id, None)
        self._new_ids[old_id] = new_id

    # Results

    @property
    def repo_ids(self) -> list[str]:
        return sorted(self._repos)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        files = self._commit_at(repo_id, revision).files
        return {path: file.content.read_bytes() for path, file in files.items()}

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The history, newest commit first."""
        return list(self.history(self._repos[repo_id], self._commit_at(repo_id, revision)))

    def refs(self, repo_id: str) -> dict[str, str]:
        """Commit ids by full name: ``refs/heads/main``, ``refs/tags/v1``, ``refs/pr/1``."""
        return dict(self._repos[repo_id].refs)

    def pull_requests(self, repo_id: str) -> list[PullRequest]:
        return list(self._repos[repo_id].pull_requests.values())

    def private(self, repo_id: str) -> bool:
        return self._repos[repo_id].private

    # Faults

    def break_request(
        self,
        fault: Fault,
        nth: int = 0,
        *,
        method: str | None = None,
        path: str | None = None,
        times: int | None = 1,
    ) -> None:
        """Break the ``nth`` request from now on, counted from 0.

        ``method`` and ``path`` (a regular expression that occurs in it) say which requests count;
        without them all do. ``times`` breaks so many of them in a row, ``None`` all that follow.
        """
        pattern = re.compile(path) if path else None
        self._planned.append(PlannedFault(fault, nth, method, pattern, times))

    def interrupt_next_download(self, after: int) -> None:
        """Break the connection of the next download after so many bytes of content."""
        self.break_request(Truncated(after), method="GET", path="/cdn/|/resolve/")

    def mend(self) -> None:
        """Forget the faults that are still to come."""
        self._planned.clear()

    def fault_for(self, request: LoggedRequest) -> Fault | None:
        """The fault planned for this request; of several, the one planned first."""
        due = [planned.fault for planned in self._planned if planned.take(request)]
        return due[0] if due else None

    # For the application

    def find_repo(self, repo_id: str) -> Repo | None:
        """The repository of this name, or the one that once had it."""
        while repo_id in self._new_ids:
            repo_id = self._new_ids[repo_id]
        return self._repos.get(repo_id)

    def history(self, repo: Repo, commit: Commit) -> Iterable[Commit]:
        yield commit
        while commit.parents:
            commit = repo.commits[commit.parents[0]]
            yield commit

    def store(self, path: str, content: bytes | Path) -> StoredFile:
        """What a commit is to hold under ``path``: plain, or in LFS if it belongs there."""
        stored = content if isinstance(content, Path) else self._write(content)
        size = stored.stat().st_size
        if not belongs_in_lfs(path, size):
            return self.store_plain(stored.read_bytes())
        with stored.open("rb") as opened:
            oid = hashlib.file_digest(opened, "sha256").hexdigest()
        self._objects[oid] = _file_in_lfs(stored, oid, size)
        return self._objects[oid]

    def store_plain(self, content: bytes) -> StoredFile:
        return StoredFile(self._write(content), len(content), blob_id(content), None, None)

    def store_object(self, oid: str, content: bytes) -> None:
        """Keep an uploaded LFS object; another content than its name says doesn't count as it."""
        if hashlib.sha256(content).hexdigest() == oid:
            self._objects[oid] = _file_in_lfs(self._write(content), oid, len(content))

    def find_object(self, oid: str) -> StoredFile | None:
        return self._objects.get(oid)

    def find_in_xet(self, oid: str) -> StoredFile | None:
        """An object that came over Xet, kept from now on."""
        content = self.xet.find(oid)
        if content is not None:
            self.store_object(oid, content)
        return self.find_object(oid)

    def part_path(self, oid: str, number: int) -> Path:
        """Where a part of a multipart upload waits for the others."""
        return self._storage / f"{oid}.{number}"

    def _write(self, content: bytes) -> Path:
        path = self._storage / hashlib.sha256(content).hexdigest()
        path.write_bytes(content)
        return path

    def _commit_at(self, repo_id: str, revision: str) -> Commit:
        commit = self._repos[repo_id].commit_at(revision)
        if commit is None:
            raise ValueError(f"{repo_id} has no revision {revision}")
        return commit


def belongs_in_lfs(path: str, size: int) -> bool:
    return Path(path).suffix in LFS_SUFFIXES or size > LARGEST_PLAIN_FILE


def default_gitattributes() -> bytes:
    """What the Hub puts into a new repository."""
    attributes = "filter=lfs diff=lfs merge=lfs -text"
    return "".join(f"*{suffix} {attributes}\n" for suffix in sorted(LFS_SUFFIXES)).encode()


def blob_id(content: bytes) -> str:
    return sha1(b"blob %d\0" % len(content) + content)


def sha1(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


def _file_in_lfs(stored: Path, oid: str, size: int) -> StoredFile:
    # https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n"
    return StoredFile(stored, size, blob_id(pointer.encode()), oid, len(pointer))
