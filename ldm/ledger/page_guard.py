"""What requests the live page's server answers at all."""

from __future__ import annotations

import re

import gradio as gr
from pydantic import BaseModel, Field, ValidationError
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 64 * 1024  # of a request: a prompt of four bytes a character, and the names of many concepts
MAX_SESSION_CHARS = 64  # of the name that a browser gives its window, which the server keeps
# What a browser that shows the page asks for. Gradio's server has more: uploads, direct calls past the queue, proxies.
_READ = re.compile(
    r"((config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|logout)/?|(assets|static|svelte)/.*"
    r"|gradio_api/(info|app_id|user|login_check|startup-events|theme\.css|queue/data)/?"
    r"|gradio_api/heartbeat/\w{1,64}|gradio_api/file=(?!https?:).*)?",
    re.IGNORECASE,
)
_JOIN = "gradio_api/queue/join"
_WRITE = (_JOIN, "login")


class _Join(BaseModel):
    """What a browser sends to join the queue. No input of the page is a mapping, which Gradio would take for a file."""

    data: list[str | int | float | bool | list[str] | None]
    fn_index: int
    session_hash: str = Field(max_length=MAX_SESSION_CHARS)
    trigger_id: int | None = None


class PageGuard:
    """Middleware that lets through what a browser asks which shows the page from its own address, and nothing else.

    Refused are other names of this machine, which another site can point here (DNS rebinding), requests that another
    site's page makes, what the page does not use, and large or malformed bodies: before anything is read or written.
    `page` is what is served, at `port`. (Starlette's TrustedHostMiddleware knows no ports, and takes its hosts before
    Gradio knows the shared address.)
    """

    def __init__(self, app: ASGIApp, page: gr.Blocks, port: int):
        self.app, self.page, self.port = app, page, port

    def hosts(self) -> set[str]:
        """Return what the header Host may be: this machine's own names with the port, and the shared address."""
        hosts = {f"{name}:{self.port}" for name in ("127.0.0.1", "localhost", "[::1]")}
        if self.port == 80:  # which browsers leave out
            hosts |= {host.removesuffix(":80") for host in hosts}
        shared = self.page.share_url or ""  # Gradio's tunnel leaves Host as the browser sent it
        return hosts | {shared.partition("://")[2].strip("/")} - {""}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the page has no other, and Gradio's server answers none
            await self.app(scope, receive, send)
            return
        status, text, body = 404, "not part of this page", b""
        path = scope["path"].removeprefix("/")
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        if host not in self.hosts():
            status, text = 403, "this page has another address"
        elif origin is not None and origin.partition("://")[2] != host:
            status, text = 403, "this page is not for other sites"
        elif scope["method"] in ("GET", "HEAD") and _READ.fullmatch(path):
            status = 200
        elif scope["method"] == "POST" and path in _WRITE:
            status, text, body = await self._read(path, headers, receive)
        if status != 200:
            await PlainTextResponse(text, status)(scope, receive, send)
            return
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return waiting.pop() if waiting else await receive()

        await self.app(scope, replay, send)

    async def _read(self, path: str, headers: dict[str, str], receive: Receive) -> tuple[int, str, bytes]:
        """Return 200 and a request's body, checked; or the status and text that it is refused with."""
        too_large = 413, f"more than {MAX_BODY_BYTES} bytes", b""
        if int(headers.get("content-length", 0)) > MAX_BODY_BYTES:
            return too_large
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MAX_BODY_BYTES:
                return too_large
        if path != _JOIN:
            return 200, "", body
        try:
            request = _Join.model_validate_json(body)
        except ValidationError:
            return 422, "not what this page sends", b""
        if request.fn_index not in self.page.fns:
            return 404, "not part of this page", b""
        return 200, "", request.model_dump_json().encode()  # only what was checked goes on
