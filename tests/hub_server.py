"""A Hugging Face Hub on the loopback interface, for tests that use the real client.

::

    with running_hub() as hub:
        hub.add_user("ann", token="hf_ann")
        hub.create_repo("owner/name", {"config.json": b"{}", "model.safetensors": path}, gated=True)
        hub.grant_access("owner/name", "ann")
        subprocess.run(command, env=client_environment(hub, tmp_path, token="hf_ann"))
        assert hub.served == ["owner/name/config.json"]

It answers what the client asks of model repositories (no datasets, no spaces, no Xet), with the
statuses, headers and error codes of huggingface.co. As there, files under Git LFS come from another
origin, the CDN, here a second port of the same server: the client reads a file's metadata off the
redirect only if that leads to another origin.
"""

import hashlib
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from urllib.parse import quote, unquote

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.hf_api
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

Gating = Literal["auto", "manual", False]

# What the Hub keeps in LFS: these kinds (its default .gitattributes) and whatever is over 10 MB.
LFS_SUFFIXES = frozenset({".bin", ".ckpt", ".npy", ".npz", ".onnx", ".pt", ".pth", ".safetensors"})
LARGEST_PLAIN_FILE = 10 * 1024 * 1024  # bytes

COMMIT_DATE = "2025-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class StoredFile:
    """One version of one file: where its bytes lie and what git and LFS call them."""

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
    files: Mapping[str, StoredFile]


@dataclass
class Repo:
    repo_id: str
    gated: Gating
    private: bool
    readers: set[str]  # users who pass the gate, or see a private repo
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # branch or tag -> commit id

    def commit_at(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))


@dataclass(frozen=True)
class LoggedRequest:
    method: str
    path: str
    range: str | None  # the Range header
    has_token: bool

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


class RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str = "", commit: str = "") -> None:
        super().__init__(message)
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.response = JSONResponse(
            {"error": message},
            status_code=status,
            headers={name: value for name, value in headers.items() if value},
        )


class MovedError(Exception):
    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.response = RedirectResponse(location, status_code=307)


class Hub:
    """The repositories and users, and the log of what clients asked for.

    ``requests`` holds every request, and ``served`` the files (``owner/name/path``) whose content
    was sent, whole or in part. Clear them at will.
    """

    def __init__(self, storage: Path, endpoint: str, cdn_endpoint: str) -> None:
        self.endpoint = endpoint
        self.cdn_endpoint = cdn_endpoint
        self.requests: list[LoggedRequest] = []
        self.served: list[str] = []
        self._storage = storage
        self._repos: dict[str, Repo] = {}
        self._new_ids: dict[str, str] = {}
        self._users: dict[str, str] = {}  # token -> name
        self._interrupt_after: int | None = None

    @property
    def request_lines(self) -> list[str]:
        """The requests as ``METHOD /path``."""
        return [str(request) for request in self.requests]

    def add_user(self, name: str, token: str) -> None:
        self._users[token] = name

    def create_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes | Path],
        *,
        gated: Gating | bool = False,
        private: bool = False,
    ) -> str:
        """Create a repository with one commit on ``main`` and return the commit id.

        Its owner (the user named like its namespace) may always read it. ``gated=True`` is
        ``"manual"``: access is granted by :meth:`grant_access`.
        """
        if repo_id in self._repos:
            raise ValueError(f"{repo_id} exists")
        self._new_ids.pop(repo_id, None)
        owner = repo_id.partition("/")[0]
        self._repos[repo_id] = Repo(repo_id, "manual" if gated is True else gated, private, {owner})
        return self.commit(repo_id, files)

    def commit(self, repo_id: str, files: Mapping[str, bytes | Path]) -> str:
        """Add or replace files on ``main`` and return the commit id.

        The id follows from the repository, its history and the files, so it is the same in every
        run. A file given as a path is read from there when it is asked for, and must not change.
        """
        repo = self._repos[repo_id]
        parent = repo.commit_at("main")
        contents = dict(parent.files) if parent else {}
        contents |= {path: self._store(path, content) for path, content in files.items()}
        contents = dict(sorted(contents.items()))
        lines = [repo_id, parent.sha if parent else ""]
        lines += [f"{file.blob_id} {path}" for path, file in contents.items()]
        commit = Commit(_sha1("\n".join(lines).encode()), contents)
        repo.commits[commit.sha] = commit
        repo.refs["main"] = commit.sha
        return commit.sha

    def tag(self, repo_id: str, name: str, revision: str = "main") -> None:
        repo = self._repos[repo_id]
        commit = repo.commit_at(revision)
        if commit is None:
            raise ValueError(f"{repo_id} has no revision {revision}")
        repo.refs[name] = commit.sha

    def rename(self, old_id: str, new_id: str) -> None:
        """Rename a repository; requests for the old name are redirected to the new one."""
        repo = self._repos.pop(old_id)
        repo.repo_id = new_id
        self._repos[new_id] = repo
        self._new_ids.pop(new_id, None)
        self._new_ids[old_id] = new_id

    def grant_access(self, repo_id: str, user: str) -> None:
        """Let a user through the gate, or into a private repository."""
        self._repos[repo_id].readers.add(user)

    def interrupt_next_download(self, after: int) -> None:
        """Break the connection of the next download after so many bytes of content."""
        self._interrupt_after = after

    def user_with(self, token: str) -> str | None:
        return self._users.get(token)

    def find_repo(self, repo_id: str) -> Repo | None:
        """The repository of this name, or the one that once had it."""
        while repo_id in self._new_ids:
            repo_id = self._new_ids[repo_id]
        return self._repos.get(repo_id)

    def take_interruption(self) -> int | None:
        after, self._interrupt_after = self._interrupt_after, None
        return after

    def _store(self, path: str, content: bytes | Path) -> StoredFile:
        if isinstance(content, bytes):
            stored = self._storage / hashlib.sha256(content).hexdigest()
            stored.write_bytes(content)
        else:
            stored = content
        size = stored.stat().st_size
        if Path(path).suffix not in LFS_SUFFIXES and size <= LARGEST_PLAIN_FILE:
            return StoredFile(stored, size, _blob_id(stored.read_bytes()), None, None)
        with stored.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        # https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
        pointer = (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n"
        ).encode()
        return StoredFile(stored, size, _blob_id(pointer), digest, len(pointer))


class HubApplication:
    """The HTTP side of a :class:`Hub`."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        model = "/api/models/{owner}/{name}"
        self.router = Starlette(
            routes=[
                Route("/api/whoami-v2", self.whoami),
                Route(model, self.model_info),
                Route(model + "/revision/{revision}", self.model_info),
                Route(model + "/tree/{revision}", self.tree),
                Route(model + "/tree/{revision}/{path:path}", self.tree),
                Route("/cdn/{owner}/{name}/{revision}/{path:path}", self.cdn),
                Route("/{owner}/{name}/resolve/{revision}/{path:path}", self.resolve),
            ],
            exception_handlers={RefusedError: _its_response, MovedError: _its_response},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        self.hub.requests.append(
            LoggedRequest(
                request.method,
                scope["path"],
                request.headers.get("range"),
                "authorization" in request.headers,
            )
        )
        # Routed while still percent-encoded: a revision such as refs/pr/1 is one segment.
        raw_path = scope["raw_path"].decode("ascii")
        await self.router({**scope, "path": raw_path}, receive, send)

    async def whoami(self, request: Request) -> Response:
        user = self._user(request)
        if user is None:
            raise RefusedError(401, "Invalid username or password.")
        return JSONResponse({"type": "user", "id": _sha1(user.encode())[:24], "name": user})

    async def model_info(self, request: Request) -> Response:
        repo = self._visible_repo(request)
        commit = _commit(repo, request)
        with_sizes = request.query_params.get("blobs") in {"1", "true"}
        siblings: list[dict[str, Any]] = []
        for path, file in commit.files.items():
            details = {"blobId": file.blob_id, "size": file.size, **file.lfs("sha256")}
            siblings.append({"rfilename": path, **(details if with_sizes else {})})
        return JSONResponse(
            {
                "id": repo.repo_id,
                "modelId": repo.repo_id,
                "author": repo.repo_id.partition("/")[0],
                "sha": commit.sha,
                "createdAt": COMMIT_DATE,
                "lastModified": COMMIT_DATE,
                "private": repo.private,
                "gated": repo.gated,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": siblings,
            }
        )

    async def tree(self, request: Request) -> Response:
        repo = self._visible_repo(request)
        commit = _commit(repo, request)
        folder = _path_parameter(request, "path")
        prefix = f"{folder}/" if folder else ""
        recursive = request.query_params.get("recursive") in {"1", "true"}
        folders: dict[str, dict[str, Any]] = {}
        files: list[dict[str, Any]] = []
        for path, file in commit.files.items():
            if not path.startswith(prefix):
                continue
            parents = [p.as_posix() for p in reversed(Path(path).parents)]
            below = [parent for parent in parents if parent.startswith(prefix) and parent != "."]
            for parent in below if recursive else below[:1]:
                tree_id = _sha1(f"{commit.sha} {parent}".encode())
                folders[parent] = {"type": "directory", "oid": tree_id, "size": 0, "path": parent}
            if recursive or not below:
                entry = {"type": "file", "oid": file.blob_id, "size": file.size, "path": path}
                files.append({**entry, **file.lfs("oid")})
        if folder and not folders and not files:
            raise _entry_not_found(commit, folder)
        return JSONResponse([*folders.values(), *files])

    async def resolve(self, request: Request) -> Response:
        repo = self._visible_repo(request)
        user = self._user(request)
        if repo.gated and user not in repo.readers:
            message = f"Access to model {repo.repo_id} is restricted"
            if user is None:
                message += " and you must be authenticated to access it. Please log in."
                raise RefusedError(401, message, "GatedRepo")
            message += " and you are not in the authorized list."
            message += f" Visit {self.hub.endpoint}/{repo.repo_id} to ask for access."
            raise RefusedError(403, message, "GatedRepo")
        commit = _commit(repo, request)
        path = _path_parameter(request, "path")
        file = _file(commit, path)
        if file.lfs_sha256 is None:
            return self._content(request, repo, commit, path)
        return RedirectResponse(
            f"{self.hub.cdn_endpoint}/cdn/{repo.repo_id}/{commit.sha}/{quote(path)}",
            status_code=302,
            headers={
                "X-Repo-Commit": commit.sha,
                "X-Linked-Etag": f'"{file.etag}"',
                "X-Linked-Size": str(file.size),
            },
        )

    async def cdn(self, request: Request) -> Response:
        # Asks for no token: the real address is signed.
        repo = self.hub.find_repo(_repo_id(request))
        if repo is None:
            raise RefusedError(404, "Not found")
        commit = _commit(repo, request)
        return self._content(request, repo, commit, _path_parameter(request, "path"))

    def _content(self, request: Request, repo: Repo, commit: Commit, path: str) -> Response:
        file = _file(commit, path)
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.etag}"'}
        if request.method == "GET":
            self.hub.served.append(f"{repo.repo_id}/{path}")
            after = self.hub.take_interruption()
            if after is not None:
                return InterruptedFileResponse(file.content, headers=headers, after=after)
        return FileResponse(file.content, headers=headers)

    def _user(self, request: Request) -> str | None:
        """The name of the user whose token came, None if none came."""
        header = request.headers.get("authorization")
        if header is None:
            return None
        user = self.hub.user_with(header.removeprefix("Bearer "))
        if user is None:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return user

    def _visible_repo(self, request: Request) -> Repo:
        user = self._user(request)
        repo_id = _repo_id(request)
        repo = self.hub.find_repo(repo_id)
        if repo is None or (repo.private and user not in repo.readers):
            # The Hub tells nobody whether a repository is private or doesn't exist.
            if user is None:
                raise RefusedError(401, "Invalid username or password.", "RepoNotFound")
            raise RefusedError(404, "Repository not found", "RepoNotFound")
        if repo.repo_id != repo_id:
            location = request.url.path.replace(f"/{repo_id}", f"/{repo.repo_id}", 1)
            raise MovedError(f"{location}?{request.url.query}" if request.url.query else location)
        return repo


class InterruptedFileResponse(FileResponse):
    """Breaks the connection after ``after`` bytes of content."""

    def __init__(self, path: Path, *, headers: Mapping[str, str], after: int) -> None:
        super().__init__(path, headers=headers)
        self.after = after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = self.after

        async def send_until_interrupted(message: Message) -> None:
            nonlocal left
            if message["type"] == "http.response.body":
                body = message["body"][:left]
                left -= len(body)
                message = {**message, "body": body, "more_body": True}
            await send(message)
            if left == 0:
                raise InterruptedError

        # Returning from an unfinished response makes uvicorn close the connection.
        with suppress(InterruptedError):
            await super().__call__(scope, receive, send_until_interrupted)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub without repositories, served from another thread until the block ends."""
    with (
        TemporaryDirectory() as storage,
        socket.create_server(("127.0.0.1", 0)) as api,
        socket.create_server(("127.0.0.1", 0)) as cdn,
    ):
        hub = Hub(Path(storage), _address(api), _address(cdn))
        server = uvicorn.Server(
            uvicorn.Config(
                HubApplication(hub),
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",
                access_log=False,
                timeout_graceful_shutdown=1,
            )
        )
        thread = threading.Thread(target=server.run, args=([api, cdn],), name="hub")
        # The sockets listen already, so a request sent before the server is up is answered late.
        thread.start()
        try:
            yield hub
        finally:
            # The client keeps connections open; closed here, none outlives its server.
            huggingface_hub.close_session()
            server.should_exit = True
            thread.join()


def client_environment(hub: Hub, home: Path, token: str | None = None) -> dict[str, str]:
    """This process's environment, changed for a child whose client is to use the Hub.

    Downloads are cached under ``home``. No token, address or proxy of the real world remains.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
        and not name.lower().endswith("_proxy")
    }
    return kept | _client_settings(hub, home, token)


def point_client_at(
    monkeypatch: pytest.MonkeyPatch, hub: Hub, home: Path, token: str | None = None
) -> None:
    """Make this process's client use the Hub, as :func:`client_environment` does for a child.

    The client read its environment when it was imported, so its constants are replaced too. For
    "offline", replace ``constants.HF_HUB_OFFLINE`` afterwards.
    """
    for name in set(os.environ) - set(client_environment(hub, home, token)):
        monkeypatch.delenv(name)
    for name, value in _client_settings(hub, home, token).items():
        monkeypatch.setenv(name, value)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for name, constant in {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
        "HF_HUB_DOWNLOAD_TIMEOUT": 5,
        "HF_HUB_ETAG_TIMEOUT": 5,
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, constant)
    # Behind huggingface_hub.model_info and its like; it keeps the endpoint it was made with.
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
    # An open session keeps the proxies it was made with.
    huggingface_hub.close_session()


def _client_settings(hub: Hub, home: Path, token: str | None) -> dict[str, str]:
    settings = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",  # seconds
        "HF_HUB_ETAG_TIMEOUT": "5",
        "NO_PROXY": "127.0.0.1",  # for proxies from the settings of macOS or Windows
    }
    if token is not None:
        settings["HF_TOKEN"] = token
    return settings


def _commit(repo: Repo, request: Request) -> Commit:
    revision = _path_parameter(request, "revision", default="main")
    commit = repo.commit_at(revision)
    if commit is None:
        raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return commit


def _file(commit: Commit, path: str) -> StoredFile:
    if path not in commit.files:
        raise _entry_not_found(commit, path)
    return commit.files[path]


def _entry_not_found(commit: Commit, path: str) -> RefusedError:
    return RefusedError(404, f"{path} does not exist", "EntryNotFound", commit.sha)


def _repo_id(request: Request) -> str:
    return f"{_path_parameter(request, 'owner')}/{_path_parameter(request, 'name')}"


def _path_parameter(request: Request, name: str, default: str = "") -> str:
    return unquote(request.path_params.get(name, default))


async def _its_response(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError | MovedError)
    return error.response


def _address(listening: socket.socket) -> str:
    return f"http://127.0.0.1:{listening.getsockname()[1]}"


def _blob_id(content: bytes) -> str:
    return _sha1(b"blob %d\0" % len(content) + content)


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
