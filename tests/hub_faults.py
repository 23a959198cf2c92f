"""What can go wrong with a request to the loopback Hub.

::

    hub.break_request(Status(503), method="POST", path="/commit/")
    hub.break_request(Truncated(), nth=4)  # the fifth request from now
    ...
    assert [broken.fault for broken in hub.broken] == [Status(503), Truncated()]

A fault that has nothing to change of its request, as wrong bytes of an answer without a body, lets
it pass and doesn't come up in ``hub.broken``.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import unquote

from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

if TYPE_CHECKING:
    from hub_repos import Hub

HEADS = "refs/heads/"
INVERTED = bytes(reversed(range(256)))

# https://github.com/huggingface/huggingface_hub/blob/main/src/huggingface_hub/utils/_http.py:
# REPO_API_REGEX, where the client takes every 401 but that of an unknown token for a repository
# that isn't there. It does so over https only; over http the error code leads it there.
ABOUT_A_REPO = re.compile("/api/models/|/resolve/")


@dataclass
class LoggedRequest:
    method: str
    path: str
    range: str | None  # the Range header
    has_token: bool
    body_size: int = 0  # bytes of the request's body that came

    @property
    def is_upload(self) -> bool:
        return self.path.startswith("/lfs/")

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass(frozen=True)
class Exchange:
    """A request on its way to the application, and the connection it came on."""

    hub: Hub
    request: LoggedRequest
    scope: Scope
    receive: Receive
    send: Send
    application: Callable[[Scope, Receive, Send], Awaitable[None]]

    @property
    def sends_body(self) -> bool:
        headers = dict(self.scope["headers"])
        return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"

    def mark(self, fault: Fault) -> None:
        self.hub.broken.append(BrokenRequest(fault, self.request))

    async def pass_on(self) -> None:
        await self.application(self.scope, self.receive, self.send)

    async def answer(self) -> tuple[Message, bytes]:
        """Carry the request out and keep the answer back: status with headers, and body."""
        messages: list[Message] = []

        async def keep(message: Message) -> None:
            messages.append(message)

        await self.application(self.scope, self.receive, keep)
        start, *rest = messages
        if self.request.method == "HEAD":
            return start, b""
        return start, b"".join(message["body"] for message in rest)

    async def read_body(self, at_least: int | None = None) -> None:
        """Read so many bytes of the request's body, or all."""
        more = True
        while more and (at_least is None or self.request.body_size < at_least):
            message = await self.receive()
            more = message.get("more_body", False)

    async def respond(self, response: Response) -> None:
        """Answer instead of the application, once the client has sent all it wanted to."""
        await self.read_body()
        await response(self.scope, self.receive, self.send)

    async def send_answer(self, start: Message, body: bytes, *, complete: bool = True) -> None:
        await self.send(start)
        await self.send({"type": "http.response.body", "body": body, "more_body": not complete})

    async def pause(self, seconds: float) -> None:
        """Wait, unless the client gives up."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._closed(), seconds)

    async def close(self) -> None:
        """End the connection, once what was sent is on its way."""
        self.scope["state"]["transport"].close()
        await self._closed()

    async def reset(self) -> None:
        """Break the connection: the client learns of it as ECONNRESET."""
        transport: asyncio.Transport = self.scope["state"]["transport"]
        # Closing a socket that may not linger sends RST in place of FIN: socket(7).
        at_once = struct.pack("ii", 1, 0)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        transport.abort()
        await self._closed()

    async def _closed(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass


@dataclass(frozen=True)
class Fault(ABC):
    @property
    @abstractmethod
    def name(self) -> str:
        """Its name in tables."""

    @abstractmethod
    async def happen(self, exchange: Exchange) -> None:
        """Break the request and mark it broken, or pass it on."""


@dataclass(frozen=True)
class BrokenRequest:
    fault: Fault
    request: LoggedRequest


@dataclass
class PlannedFault:
    fault: Fault
    skip: int  # requests to let pass first
    method: str | None
    path: re.Pattern[str] | None
    times: int | None  # how often it is still to happen; None for always

    def take(self, request: LoggedRequest) -> bool:
        """Count a request, and say whether it is one to break."""
        if self.method not in {None, request.method}:
            return False
        if self.path is not None and not self.path.search(request.path):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.times is None:
            return True
        self.times -= 1
        return self.times >= 0


@dataclass(frozen=True)
class Reset(Fault):
    """The connection is reset after so many bytes of the body under way, or a few more.

    That is the request's body if it has one, so it isn't carried out, and else the answer's, of
    which the last byte never comes. ``after=0`` resets before anything else happens.
    """

    after: int = 0

    @property
    def name(self) -> str:
        return f"reset-after-{self.after}" if self.after else "reset"

    async def happen(self, exchange: Exchange) -> None:
        if self.after and not exchange.sends_body:
            start, body = await exchange.answer()
            if body:
                await exchange.send_answer(start, body[:-1][: self.after], complete=False)
        elif self.after:
            await exchange.read_body(self.after)
        exchange.mark(self)
        await exchange.reset()


@dataclass(frozen=True)
class Truncated(Fault):
    """The connection is closed after ``after`` bytes of the answer's body, or after half of it."""

    after: int | None = None
    name = "truncated"

    async def happen(self, exchange: Exchange) -> None:
        start, body = await exchange.answer()
        after = len(body) // 2 if self.after is None else self.after
        if after >= len(body):
            await exchange.send_answer(start, body)
            return
        exchange.mark(self)
        await exchange.send_answer(start, body[:after], complete=False)
        await exchange.close()


@dataclass(frozen=True)
class Status(Fault):
    """Answered with a server's error in place of being carried out.

    With ``words``, it comes from the Hub; without, unless it is 500, from a proxy before it.
    """

    code: int
    words: str = ""

    @property
    def name(self) -> str:
        return f"status-{self.code}"

    async def happen(self, exchange: Exchange) -> None:
        exchange.mark(self)
        if self.words or self.code == 500:
            error = {"error": self.words or "Internal Error"}
            await exchange.respond(JSONResponse(error, self.code))
        else:
            await exchange.respond(HTMLResponse(f"<html>{self.code}</html>", self.code))


@dataclass(frozen=True)
class RateLimit(Fault):
    """Refused with 429 and how many seconds to wait, in both headers that the client reads."""

    retry_after: int = 1  # seconds
    name = "rate-limit"

    async def happen(self, exchange: Exchange) -> None:
        exchange.mark(self)
        headers = {
            "Retry-After": str(self.retry_after),
            "RateLimit": f'"api";r=0;t={self.retry_after}',
            "RateLimit-Policy": '"fixed window";"api";q=500;w=300',
        }
        await exchange.respond(JSONResponse({"error": "Too Many Requests"}, 429, headers))


@dataclass(frozen=True)
class Slow(Fault):
    """The answer comes in pieces, with a pause before each."""

    pause: float = 0.05  # seconds
    pieces: int = 4
    name = "slow"

    async def happen(self, exchange: Exchange) -> None:
        start, body = await exchange.answer()
        exchange.mark(self)
        await exchange.pause(self.pause)
        await exchange.send(start)
        size = len(body) // self.pieces + 1
        for begin in range(0, len(body), size):
            piece = body[begin : begin + size]
            await exchange.send({"type": "http.response.body", "body": piece, "more_body": True})
            await exchange.pause(self.pause)
        await exchange.send({"type": "http.response.body", "body": b"", "more_body": False})


@dataclass(frozen=True)
class WrongBytes(Fault):
    """The second half of the answer's body has every bit inverted."""

    name = "wrong-bytes"

    async def happen(self, exchange: Exchange) -> None:
        start, body = await exchange.answer()
        half = len(body) // 2
        if body:
            exchange.mark(self)
        await exchange.send_answer(start, body[:half] + body[half:].translate(INVERTED))


@dataclass(frozen=True)
class LostAnswer(Fault):
    """The request is carried out, and the connection closed without an answer."""

    name = "lost-answer"

    async def happen(self, exchange: Exchange) -> None:
        await exchange.answer()
        exchange.mark(self)
        await exchange.close()


@dataclass(frozen=True)
class MovedParent(Fault):
    """Somebody else's commit comes first.

    It lands on the branch that the request names, else on ``main``, whatever the request asks of
    the repository. A request that names no repository passes.
    """

    author: str = "somebody"
    path: str = "somebody.txt"
    name = "moved-parent"

    async def happen(self, exchange: Exchange) -> None:
        path = exchange.scope["path"].removeprefix("/api/models").removeprefix("/cdn")
        _, *names = (unquote(name) for name in path.split("/"))
        repo = exchange.hub.find_repo("/".join(names[:2]).removesuffix(".git"))
        if repo:
            branch = next((name for name in names[3:4] if HEADS + name in repo.refs), "main")
            files = {self.path: b"Mine.\n"}
            exchange.hub.commit(repo.repo_id, files, branch=branch, author=self.author)
            exchange.mark(self)
        await exchange.pass_on()


@dataclass(frozen=True)
class ExpiredToken(Fault):
    """The token of the request is refused as expired; a request without one passes."""

    name = "expired-token"

    async def happen(self, exchange: Exchange) -> None:
        if not exchange.request.has_token:
            await exchange.pass_on()
            return
        exchange.mark(self)
        message = 'User Access Token "test" is expired'
        headers = {"X-Error-Message": message}
        if ABOUT_A_REPO.search(exchange.request.path):
            headers["X-Error-Code"] = "RepoNotFound"
        await exchange.respond(JSONResponse({"error": message}, 401, headers))


# Every kind of fault, for runs that try them all.
FAULTS: tuple[Fault, ...] = (
    Reset(),
    Reset(after=100),
    Truncated(),
    Status(500),
    Status(502),
    Status(503),
    RateLimit(),
    Slow(),
    WrongBytes(),
    LostAnswer(),
    MovedParent(),
    ExpiredToken(),
)
