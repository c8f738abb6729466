"""The files that the page is made of, and the headers that keep it to itself.

There is nothing of anybody's data in them: the page is the same for all, and asks for what it
shows with a session. Nothing inline is allowed to run, and nothing from elsewhere to load.
"""

import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from aiohttp import web

from codex_proxy.errors import RequestError

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)

HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": CSP,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
"""On everything that the page gets."""

_TYPES = {
    "html": "text/html",
    "js": "text/javascript",
    "css": "text/css",
    "svg": "image/svg+xml",
    "png": "image/png",
    "ico": "image/x-icon",
    "json": "application/json",
    "webmanifest": "application/manifest+json",
    "woff2": "font/woff2",
    "txt": "text/plain",
}
_TEXTS = frozenset({"html", "js", "css", "svg", "json", "txt", "webmanifest"})


@dataclass(slots=True, frozen=True)
class _File:
    content_type: str
    is_text: bool
    data: bytes
    packed: bytes | None
    """The same in gzip, where that is worth it."""
    etag: str


class Shell:
    """Serves the files; read when the first of them is asked for, and kept."""

    def __init__(self, root: Traversable | None = None) -> None:
        self._root = root if root is not None else files("codex_proxy.server.dashboard") / "static"
        self._files: dict[str, _File] | None = None

    def serve(self, request: web.Request, name: str) -> web.Response:
        """Return the file called *name*.

        Raises:
            RequestError: 404 if there is none.
        """
        if self._files is None:
            self._files = dict(_read(self._root, ""))
        file = self._files.get(name)
        if file is None:
            raise RequestError(f"there is no {name[:100]!r} here", status=404, code="not_found")
        # Its name stays the same when it changes, so a browser asks each time whether it has.
        headers = {**HEADERS, "Cache-Control": "no-cache", "ETag": file.etag, "Vary": "Accept-Encoding"}
        known = {
            one.strip().removeprefix("W/") for one in request.headers.get("If-None-Match", "").split(",")
        }
        if file.etag in known:
            return web.Response(status=304, headers=headers)
        body = file.data
        if file.packed is not None and "gzip" in request.headers.get("Accept-Encoding", ""):
            body = file.packed
            headers["Content-Encoding"] = "gzip"
        return web.Response(
            body=body,
            content_type=file.content_type,
            charset="utf-8" if file.is_text else None,
            headers=headers,
        )


def _read(folder: Traversable, prefix: str) -> list[tuple[str, _File]]:
    found: list[tuple[str, _File]] = []
    for entry in folder.iterdir():
        name = prefix + entry.name
        if entry.is_dir():
            found += _read(entry, f"{name}/")
            continue
        kind = entry.name.rpartition(".")[2].lower()
        if kind not in _TYPES:
            continue
        data = entry.read_bytes()
        packed = gzip.compress(data, 9, mtime=0) if kind in _TEXTS and len(data) > 1_000 else None
        etag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
        found.append((name, _File(_TYPES[kind], kind in _TEXTS, data, packed, etag)))
    return found
