"""A Hugging Face Hub on the loopback interface, for tests that use the real client.

::

    with running_hub() as hub:
        hub.add_user("ann", token="hf_ann")
        hub.create_repo("owner/name", {"config.json": b"{}", "model.safetensors": path}, gated=True)
        hub.grant_access("owner/name", "ann")
        subprocess.run(command, env=client_environment(hub, tmp_path, token="hf_ann"))
        assert hub.served == ["owner/name/config.json"]
        assert hub.files("ann/model").keys() == {".gitattributes", "model.safetensors"}

It answers what the client asks of model repositories (no datasets, no spaces), with the statuses,
headers and error codes of huggingface.co: reading, creating repositories, uploading, committing,
branches, tags and pull requests. ``hub.break_request`` makes it fail on demand: see hub_faults.
Large files move over Xet (see hub_xet) or, for clients that switched that off and with
``hub.has_xet`` unset, over Git LFS. As on huggingface.co, files under Git LFS come from another
origin and go to it, the CDN, here a second port of the same server: the client reads a file's
metadata off the redirect only if that leads to another origin.
"""

import asyncio
import base64
import json
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import parse_qs, quote, unquote

import huggingface_hub
import uvicorn
import yaml
from hub_client import choose_transfer, client_environment, point_client_at, shorten_client_waits
from hub_faults import HEADS, Exchange, LoggedRequest
from hub_repos import (
    PULL_REQUESTS,
    TAGS,
    Commit,
    Hub,
    PullRequest,
    Repo,
    StoredFile,
    User,
    belongs_in_lfs,
    default_gitattributes,
    sha1,
)
from hub_xet import xet_hash
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

__all__ = [
    "Hub",
    "choose_transfer",
    "client_environment",
    "point_client_at",
    "running_hub",
    "shorten_client_waits",
]

COMMIT_DATE = "2025-01-01T00:00:00.000Z"

XET_TOKEN_LIFETIME = 900  # seconds


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


class HubApplication:
    """The HTTP side of a :class:`Hub`."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        repo = "/{owner}/{name}"
        model = "/api/models" + repo
        lfs = repo + ".git/info/lfs/objects"

        def post(path: str, answer: Any) -> Route:
            return Route(path, answer, methods=["POST"])

        self.router = Starlette(
            routes=[
                Route("/api/whoami-v2", self.whoami),
                post("/api/validate-yaml", self.validate_card),
                post("/api/repos/create", self.create_repo),
                Route(model, self.model_info),
                Route(model + "/revision/{revision}", self.model_info),
                Route(model + "/auth-check", self.auth_check),
                Route(model + "/auth-check/write", self.auth_check_for_writing),
                Route(model + "/tree/{revision}", self.tree),
                Route(model + "/tree/{revision}/{path:path}", self.tree),
                post(model + "/paths-info/{revision}", self.paths_info),
                Route(model + "/xet-read-token/{revision}", self.xet_read_token),
                Route(model + "/xet-write-token/{revision}", self.xet_write_token),
                Route(model + "/commits/{revision}", self.commits),
                Route(model + "/refs", self.refs),
                Route(model + "/settings", self.change_settings, methods=["PUT"]),
                post(model + "/preupload/{revision}", self.preupload),
                post(model + "/commit/{revision}", self.commit),
                post(model + "/branch/{revision}", self.create_branch),
                Route(model + "/branch/{revision}", self.delete_branch, methods=["DELETE"]),
                post(model + "/tag/{revision}", self.create_tag),
                Route(model + "/tag/{revision}", self.delete_tag, methods=["DELETE"]),
                Route(model + "/discussions", self.pull_requests),
                post(model + "/discussions/{number:int}/merge", self.merge),
                post(lfs + "/batch", self.lfs_batch),
                post(lfs + "/verify", self.lfs_verify),
                Route("/lfs/{oid}", self.upload, methods=["PUT"]),
                Route("/lfs/{oid}/{part:int}", self.upload_part, methods=["PUT"]),
                post("/api/complete_multipart", self.complete_upload),
                Route("/cdn/{owner}/{name}/{revision}/{path:path}", self.cdn),
                Route(repo + "/resolve/{revision}/{path:path}", self.resolve),
            ],
            exception_handlers={RefusedError: _its_response, MovedError: _its_response},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Request(scope).headers
        logged = LoggedRequest(
            scope["method"], scope["path"], headers.get("range"), "authorization" in headers
        )
        self.hub.requests.append(logged)

        async def receive_counted() -> Message:
            message = await receive()
            logged.body_size += len(message.get("body", b""))
            return message

        # Routed while still percent-encoded: a revision such as refs/pr/1 is one segment.
        scope = {**scope, "path": scope["raw_path"].decode("ascii")}
        exchange = Exchange(self.hub, logged, scope, receive_counted, send, self.router)
        fault = self.hub.fault_for(logged)
        with suppress(ClientDisconnect):
            await (fault.happen(exchange) if fault else exchange.pass_on())

    # Who asks, and for what

    async def whoami(self, request: Request) -> Response:
        user = self._user_logged_in(request)
        return JSONResponse(
            {
                "type": "user",
                "id": sha1(user.name.encode())[:24],
                "name": user.name,
                "orgs": [{"type": "org", "name": name} for name in sorted(user.organizations)],
                "auth": {
                    "type": "access_token",
                    "accessToken": {
                        "displayName": "test",
                        "role": "write" if user.can_write else "read",
                    },
                },
            }
        )

    async def auth_check(self, request: Request) -> Response:
        self._readable_repo(request)
        return JSONResponse({})

    async def auth_check_for_writing(self, request: Request) -> Response:
        self._writable_repo(request)
        return JSONResponse({})

    # Reading

    async def model_info(self, request: Request) -> Response:
        repo = self._visible_repo(request)
        commit = _commit(repo, request)
        with_sizes = request.query_params.get("blobs") in {"1", "true"}
        siblings: list[dict[str, Any]] = []
        for path, file in commit.files.items():
            details = {"size": file.size, **file.lfs("sha256")}
            if self.hub.gives_blob_ids:
                details["blobId"] = file.blob_id
            siblings.append({"rfilename": path, **(details if with_sizes else {})})
        return JSONResponse(
            {
                "id": repo.repo_id,
                "modelId": repo.repo_id,
                "author": repo.namespace,
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
        entries = [
            entry
            for entry in _entries(commit)
            if entry["path"].startswith(prefix)
            and (recursive or "/" not in entry["path"].removeprefix(prefix))
        ]
        if folder and not entries:
            raise _entry_not_found(commit, folder)
        return self._page(request, entries)

    async def paths_info(self, request: Request) -> Response:
        repo = self._visible_repo(request)
        wanted = parse_qs((await request.body()).decode())["paths"]
        entries = _entries(_commit(repo, request))
        return JSONResponse([entry for entry in entries if entry["path"] in wanted])

    async def commits(self, request: Request) -> Response:
        repo = self._visible_repo(request)
        return self._page(
            request,
            [
                {
                    "id": commit.sha,
                    "title": commit.title,
                    "message": commit.description,
                    "authors": [{"user": commit.author}],
                    "date": COMMIT_DATE,
                }
                for commit in self.hub.history(repo, _commit(repo, request))
            ],
        )

    async def refs(self, request: Request) -> Response:
        repo = self._visible_repo(request)

        def listed(prefix: str) -> list[dict[str, str]]:
            return [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha}
                for ref, sha in repo.refs.items()
                if ref.startswith(prefix)
            ]

        refs = {"branches": listed(HEADS), "converts": [], "tags": listed(TAGS)}
        if request.query_params.get("include_prs") == "1":
            refs["pullRequests"] = listed(PULL_REQUESTS)
        return JSONResponse(refs)

    async def resolve(self, request: Request) -> Response:
        repo = self._readable_repo(request)
        commit = _commit(repo, request)
        path = _path_parameter(request, "path")
        file = _file(commit, path)
        if file.lfs_sha256 is None:
            return self._content(request, repo, commit, path)
        headers = {
            "X-Repo-Commit": commit.sha,
            "X-Linked-Etag": f'"{file.etag}"',
            "X-Linked-Size": str(file.size),
        }
        if self.hub.has_xet:
            token = f"{self.hub.endpoint}/api/models/{repo.repo_id}/xet-read-token/{commit.sha}"
            headers |= {"X-Xet-Hash": xet_hash(file.content), "Link": f'<{token}>; rel="xet-auth"'}
        address = f"{self.hub.cdn_endpoint}/cdn/{repo.repo_id}/{commit.sha}/{quote(path)}"
        return RedirectResponse(address, status_code=302, headers=headers)

    async def cdn(self, request: Request) -> Response:
        # Asks for no token: the real address is signed.
        repo = self.hub.find_repo(_repo_id(request))
        if repo is None:
            raise RefusedError(404, "Not found")
        commit = _commit(repo, request)
        return self._content(request, repo, commit, _path_parameter(request, "path"))

    # Creating and changing repositories

    async def create_repo(self, request: Request) -> Response:
        user = self._user_logged_in(request)
        asked = await request.json()
        namespace = asked.get("organization") or user.name
        if not user.may_create_in(namespace):
            message = "You don't have the rights to create a model under the namespace"
            raise RefusedError(403, f'{message} "{namespace}"')
        repo_id = f"{namespace}/{asked['name']}"
        created = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repo_ids:
            message = "You already created this model repo"
            return JSONResponse({"error": message, **created}, status_code=409)
        self.hub.create_repo(
            repo_id,
            {".gitattributes": default_gitattributes()},
            private=asked.get("visibility") == "private",
            title="initial commit",
        )
        return JSONResponse(created)

    async def change_settings(self, request: Request) -> Response:
        repo, _ = self._writable_repo(request)
        asked = await request.json()
        if "visibility" in asked:
            repo.private = asked["visibility"] == "private"
        repo.gated = asked.get("gated", repo.gated)
        return JSONResponse({"private": repo.private, "gated": repo.gated})

    async def create_branch(self, request: Request) -> Response:
        repo, _ = self._writable_repo(request)
        asked = await request.json()
        commit = _commit_at(repo, asked.get("startingPoint", "main"))
        self._add_ref(repo, HEADS + _path_parameter(request, "revision"), commit)
        return JSONResponse({})

    async def delete_branch(self, request: Request) -> Response:
        return self._delete_ref(request, HEADS)

    async def create_tag(self, request: Request) -> Response:
        repo, _ = self._writable_repo(request)
        asked = await request.json()
        self._add_ref(repo, TAGS + asked["tag"], _commit(repo, request))
        return JSONResponse({})

    async def delete_tag(self, request: Request) -> Response:
        return self._delete_ref(request, TAGS)

    # Committing

    async def validate_card(self, request: Request) -> Response:
        errors, warnings = _card_problems((await request.json())["content"])
        problems = {
            "errors": [{"message": message} for message in errors],
            "warnings": [{"message": message} for message in warnings],
        }
        return JSONResponse(problems, status_code=400 if errors else 200)

    async def preupload(self, request: Request) -> Response:
        """Which files are to go to LFS, which are to be left out, and which are there already."""
        asked = await request.json()
        repo, _ = self._repo_to_commit_to(request)
        there = _commit(repo, request).files
        ignored = asked.get("gitIgnore")
        if ignored is None and ".gitignore" in there:
            ignored = there[".gitignore"].content.read_text()
        patterns = (ignored or "").split()
        files: list[dict[str, Any]] = []
        for file in asked["files"]:
            path = file["path"]
            answer = {
                "path": path,
                "uploadMode": "lfs" if belongs_in_lfs(path, file["size"]) else "regular",
                "shouldIgnore": _is_ignored(path, patterns),
            }
            files.append(answer | ({"oid": there[path].etag} if path in there else {}))
        return JSONResponse({"files": files})

    async def commit(self, request: Request) -> Response:
        lines = [json.loads(line) for line in (await request.body()).splitlines()]
        repo, user = self._repo_to_commit_to(request)
        revision = _path_parameter(request, "revision")
        head = _commit(repo, request)
        header = next(line["value"] for line in lines if line["key"] == "header")
        if not head.sha.startswith(header.get("parentCommit", "")):
            raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines:
            self._apply(line["key"], line["value"], files, head)
        answer: dict[str, Any] = {"success": True, "hookOutput": ""}
        ref = repo.ref_of(revision)
        if _creates_pull_request(request):
            number = len(repo.pull_requests) + 1
            opened = PullRequest(
                number, header["summary"], header["description"], user.name, revision, head.sha
            )
            repo.pull_requests[number] = opened
            ref = opened.ref
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo.repo_id}/discussions/{number}"
        if ref is None or ref.startswith(TAGS):
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        commit = repo.add_commit(
            ref,
            files,
            title=header["summary"],
            description=header["description"],
            author=user.name,
            parent=head,
        )
        answer["commitOid"] = commit.sha
        answer["commitUrl"] = f"{self.hub.endpoint}/{repo.repo_id}/commit/{commit.sha}"
        return JSONResponse(answer)

    async def pull_requests(self, request: Request) -> Response:
        repo = self._visible_repo(request)
        asked = request.query_params
        listed = [
            {
                "title": each.title,
                "num": each.number,
                "author": {"name": each.author},
                "createdAt": COMMIT_DATE,
                "status": each.status,
                "repo": {"name": repo.repo_id, "type": "model"},
                "isPullRequest": True,
            }
            for each in reversed(repo.pull_requests.values())
            if asked.get("author", each.author) == each.author
            and asked.get("status", each.status) == each.status
            and asked.get("type") != "discussion"
        ]
        return JSONResponse({"discussions": listed, "count": len(listed), "start": 0})

    async def merge(self, request: Request) -> Response:
        repo, _ = self._writable_repo(request)
        opened = repo.pull_requests.get(request.path_params["number"])
        if opened is None or opened.status != "open":
            raise RefusedError(404, "There is no such open pull request")
        repo.merge(opened)
        return JSONResponse({})

    # LFS: https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md

    async def lfs_batch(self, request: Request) -> Response:
        asked = await request.json()
        # Without a reference it is for a pull request; any user may open one.
        repo, _ = self._writable_repo(request, "ref" not in asked)
        in_parts = "multipart" in asked["transfers"]
        verify = f"{self.hub.endpoint}/{repo.repo_id}.git/info/lfs/objects/verify"
        objects: list[dict[str, Any]] = []
        for wanted in asked["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if self.hub.find_object(oid) is None:
                answer["actions"] = {
                    "upload": self._upload_action(oid, size, in_parts),
                    "verify": {"href": verify},
                }
            objects.append(answer)
        return JSONResponse({"transfer": "basic", "objects": objects})

    def _upload_action(self, oid: str, size: int, in_parts: bool) -> dict[str, Any]:
        address = f"{self.hub.cdn_endpoint}/lfs/{oid}"
        chunk_size = self.hub.multipart_chunk_size
        if size <= chunk_size or not in_parts:
            return {"href": address}
        count = -(-size // chunk_size)
        return {
            "href": f"{self.hub.endpoint}/api/complete_multipart",
            "header": {
                "chunk_size": str(chunk_size),
                **{f"{number:05}": f"{address}/{number}" for number in range(1, count + 1)},
            },
        }

    # Uploads ask for no token: the real addresses are signed.

    async def upload(self, request: Request) -> Response:
        self.hub.store_object(request.path_params["oid"], await request.body())
        return Response()

    async def upload_part(self, request: Request) -> Response:
        content = await request.body()
        path = self.hub.part_path(request.path_params["oid"], request.path_params["part"])
        path.write_bytes(content)
        return Response(headers={"ETag": f'"{sha1(content)}"'})

    async def complete_upload(self, request: Request) -> Response:
        asked = await request.json()
        content = b""
        for part in asked["parts"]:
            path = self.hub.part_path(asked["oid"], part["partNumber"])
            received = path.read_bytes() if path.exists() else b""
            if part["etag"] != f'"{sha1(received)}"':
                raise RefusedError(400, f"Part {part['partNumber']} didn't arrive")
            content += received
        self.hub.store_object(asked["oid"], content)
        return JSONResponse({})

    async def lfs_verify(self, request: Request) -> Response:
        self._writable_repo(request, may_propose=True)
        asked = await request.json()
        stored = self.hub.find_object(asked["oid"])
        if stored is None or stored.size != asked["size"]:
            raise RefusedError(404, f"LFS object {asked['oid']} is not what arrived")
        return JSONResponse({})

    # Xet: https://huggingface.co/docs/xet/auth

    async def xet_read_token(self, request: Request) -> Response:
        repo = self._readable_repo(request)
        files = {p: f for p, f in _commit(repo, request).files.items() if f.lfs_sha256}
        self.hub.served += [f"{repo.repo_id}/{path}" for path in files]
        return _xet_token(self.hub.xet.offer(file.content for file in files.values()))

    async def xet_write_token(self, request: Request) -> Response:
        self._repo_to_commit_to(request)
        return _xet_token(self.hub.xet.receive())

    # What the above have in common

    def _content(self, request: Request, repo: Repo, commit: Commit, path: str) -> Response:
        file = _file(commit, path)
        if request.method == "GET":
            self.hub.served.append(f"{repo.repo_id}/{path}")
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.etag}"'}
        return FileResponse(file.content, headers=headers)

    def _user(self, request: Request) -> User | None:
        """The user of the request's token; None if it has no token."""
        header = request.headers.get("authorization")
        if header is None:
            return None
        user = self.hub.user_with(header.removeprefix("Bearer "))
        if user is None:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return user

    def _user_logged_in(self, request: Request) -> User:
        user = self._user(request)
        if user is None:
            raise RefusedError(401, "Invalid username or password.")
        return user

    def _visible_repo(self, request: Request) -> Repo:
        user = self._user(request)
        repo_id = _repo_id(request)
        repo = self.hub.find_repo(repo_id)
        if repo is None or (repo.private and not (user and user.may_read(repo))):
            # The Hub does not show whether a repository is private or doesn't exist.
            if user is None:
                raise RefusedError(401, "Invalid username or password.", "RepoNotFound")
            raise RefusedError(404, "Repository not found", "RepoNotFound")
        if repo.repo_id != repo_id:
            location = request.url.path.replace(f"/{repo_id}", f"/{repo.repo_id}", 1)
            raise MovedError(f"{location}?{request.url.query}" if request.url.query else location)
        return repo

    def _readable_repo(self, request: Request) -> Repo:
        """The repository, if the user may see what is in its files."""
        repo = self._visible_repo(request)
        user = self._user(request)
        if repo.gated and not (user and user.may_read(repo)):
            message = f"Access to model {repo.repo_id} is restricted"
            if user is None:
                message += " and you must be authenticated to access it. Please log in."
                raise RefusedError(401, message, "GatedRepo")
            message += " and you are not in the authorized list."
            message += f" Visit {self.hub.endpoint}/{repo.repo_id} to ask for access."
            raise RefusedError(403, message, "GatedRepo")
        return repo

    def _writable_repo(self, request: Request, may_propose: bool = False) -> tuple[Repo, User]:
        """The repository and who asks, if that user may write or need only propose a change."""
        repo = self._visible_repo(request)
        user = self._user_logged_in(request)
        if not (user.may_write(repo) or (may_propose and user.can_write)):
            raise RefusedError(403, "Authorization error.")
        return repo, user

    def _repo_to_commit_to(self, request: Request) -> tuple[Repo, User]:
        return self._writable_repo(request, may_propose=_creates_pull_request(request))

    def _apply(
        self, operation: str, value: dict[str, Any], files: dict[str, StoredFile], head: Commit
    ) -> None:
        """Carry out one line of a commit on ``files``."""
        path = value.get("path", "").rstrip("/")
        if operation == "file":
            files[path] = self.hub.store_plain(base64.b64decode(value["content"]))
        elif operation == "lfsFile":
            stored = self.hub.find_object(value["oid"]) or self.hub.find_in_xet(value["oid"])
            if stored is None:
                message = "Your push was rejected because an LFS pointer pointed to a file that"
                raise RefusedError(400, f"{message} does not exist. Offending file: - {path}")
            files[path] = stored
        elif operation in {"deletedFile", "deletedFolder"}:
            gone = [each for each in files if each == path or each.startswith(f"{path}/")]
            if not gone:
                message = "A file with this name doesn't exist"
                raise RefusedError(404, message, "EntryNotFound", head.sha)
            for each in gone:
                del files[each]

    def _add_ref(self, repo: Repo, ref: str, commit: Commit) -> None:
        if ref in repo.refs:
            kind = "Tag" if ref.startswith(TAGS) else "Branch"
            raise RefusedError(409, f"{kind} reference exists already")
        repo.refs[ref] = commit.sha

    def _delete_ref(self, request: Request, kind: str) -> Response:
        repo, _ = self._writable_repo(request)
        name = _path_parameter(request, "revision")
        if repo.refs.pop(kind + name, None) is None:
            raise RefusedError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return JSONResponse({})

    def _page(self, request: Request, entries: list[dict[str, Any]]) -> Response:
        """The part of a listing that was asked for, with a link to the next."""
        begin = int(request.query_params.get("cursor", "0"))
        end = begin + self.hub.page_size
        headers = {}
        if end < len(entries):
            following = request.url.include_query_params(cursor=end)
            headers["Link"] = f'<{following}>; rel="next"'
        return JSONResponse(entries[begin:end], headers=headers)


class HubProtocol(H11Protocol):
    """Hands each request the connection it came on, for faults to break."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.app_state = {"transport": transport}


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub without repositories, served from another thread until the block ends."""
    with (
        TemporaryDirectory() as storage,
        socket.create_server(("127.0.0.1", 0)) as api,
        socket.create_server(("127.0.0.1", 0)) as cdn,
    ):
        for listener in (api, cdn):
            # Connections inherit it. asyncio sets it on its own sockets alone, and without it every
            # answer waits 40 ms for the client to acknowledge its first half.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        hub = Hub(Path(storage), _address(api), _address(cdn))
        loop = asyncio.new_event_loop()
        stop = asyncio.Event()
        serving = _serve(HubApplication(hub), [api, cdn], stop)
        # The sockets listen already, so a request sent before the server is up is answered late.
        thread = threading.Thread(target=loop.run_until_complete, args=(serving,), name="hub")
        thread.start()
        try:
            yield hub
        finally:
            # The client keeps connections open; closed here, none outlives its server.
            huggingface_hub.close_session()
            loop.call_soon_threadsafe(stop.set)
            thread.join()
            loop.close()


async def _serve(
    application: HubApplication, sockets: Iterable[socket.socket], stop: asyncio.Event
) -> None:
    """What uvicorn.Server does, without signals, and stopping at once instead of polling."""
    config = uvicorn.Config(application, lifespan="off", log_config=None, access_log=False)
    config.load()
    state = ServerState()
    loop = asyncio.get_running_loop()
    servers = [
        await loop.create_server(lambda: HubProtocol(config, state, {}), sock=each)
        for each in sockets
    ]
    await stop.wait()
    for server in servers:
        server.close()
    for connection in list(state.connections):
        connection.transport.abort()
    if state.tasks:
        await asyncio.wait(state.tasks, timeout=1)


def _commit(repo: Repo, request: Request) -> Commit:
    return _commit_at(repo, _path_parameter(request, "revision", default="main"))


def _commit_at(repo: Repo, revision: str) -> Commit:
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


def _entries(commit: Commit) -> list[dict[str, Any]]:
    """Folders and files of a commit, as listings show them."""
    parents = {parent for path in commit.files for parent in Path(path).parents}
    folders = sorted(parent.as_posix() for parent in parents - {Path()})
    return [
        {"type": "directory", "oid": sha1(f"{commit.sha} {path}".encode()), "size": 0, "path": path}
        for path in folders
    ] + [
        {
            "type": "file",
            "oid": file.blob_id,
            "size": file.size,
            "path": path,
            **file.lfs("oid"),
        }
        for path, file in commit.files.items()
    ]


def _xet_token(storage: str) -> Response:
    """The client reads the headers, and hf_xet the body."""
    expires = int(time.time()) + XET_TOKEN_LIFETIME
    headers = {
        "X-Xet-Cas-Url": storage,
        "X-Xet-Access-Token": "xet",
        "X-Xet-Token-Expiration": str(expires),
    }
    content = {"casUrl": storage, "accessToken": "xet", "exp": expires}
    return JSONResponse(content, headers=headers)


def _is_ignored(path: str, patterns: Iterable[str]) -> bool:
    """Whether .gitignore names the file or a folder above it; negation is not supported."""
    names = [path, *Path(path).parts]
    return any(fnmatch(name, pattern.rstrip("/")) for name in names for pattern in patterns)


def _creates_pull_request(request: Request) -> bool:
    return request.query_params.get("create_pr") == "1"


def _card_problems(card: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about a model card's metadata.

    The Hub's own schema isn't published as a whole; these are the rules of its documentation:
    https://huggingface.co/docs/hub/model-cards
    """
    _, separator, rest = card.partition("---\n")
    block, end, _ = rest.partition("\n---")
    if not (separator and end):
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        metadata = yaml.safe_load(block)
    except yaml.YAMLError as error:
        return [f"bad YAML: {error}"], []
    if not isinstance(metadata, dict):
        return ["metadata must be a mapping"], []
    errors = []
    if metadata.get("license") == "other" and "license_name" not in metadata:
        errors.append('"license_name" is required where "license" is "other"')
    relations = {None, "adapter", "finetune", "merge", "quantized"}
    if metadata.get("base_model_relation") not in relations:
        errors.append('"base_model_relation" must be adapter, finetune, merge or quantized')
    for name in ("tags", "datasets"):
        if not isinstance(metadata.get(name, []), list | str):
            errors.append(f'"{name}" must be an array')
    return errors, []


def _repo_id(request: Request) -> str:
    return f"{_path_parameter(request, 'owner')}/{_path_parameter(request, 'name')}"


def _path_parameter(request: Request, name: str, default: str = "") -> str:
    return unquote(request.path_params.get(name, default))


async def _its_response(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError | MovedError)
    return error.response


def _address(listening: socket.socket) -> str:
    return f"http://127.0.0.1:{listening.getsockname()[1]}"
