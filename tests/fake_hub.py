"""A Hugging Face hub on this machine: the few routes that a download of a repository asks for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    """repositories: name to folder. requests: method, path and bearer token of each request, in order."""

    def __init__(self, repositories: dict[str, Path], gated: set[str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.gated = gated
        self.requests: list[tuple[str, str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        token = self.headers.get("authorization", "").removeprefix("Bearer ") or None
        self.server.requests.append((self.command, path, token))
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        folder = self.server.repositories.get(name)
        if folder is None:
            return self._answer(401, {}, {"x-error-code": "RepoNotFound"})
        if name in self.server.gated and token is None:
            return self._answer(401, {}, {"x-error-code": "GatedRepo"})
        files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        if path.startswith("/api/"):
            if rest[1:] and rest[1] not in ("main", COMMIT):
                return self._answer(404, {}, {"x-error-code": "RevisionNotFound"})
            if rest[:1] == ["tree"]:
                return self._answer(200, [_entry(folder, file) for file in files])
            return self._answer(200, {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]})
        content = (folder / "/".join(rest[2:])).read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        return self._answer(200, content, {"etag": f'"{etag}"', "x-repo-commit": COMMIT})

    def _answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"content-length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


def _entry(folder: Path, file: str) -> dict[str, Any]:
    content = (folder / file).read_bytes()
    return {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@contextmanager
def fake_hub(repositories: dict[str, Path], *, gated: set[str] = frozenset()) -> Iterator[FakeHub]:  # type: ignore[assignment]
    server = FakeHub(repositories, set(gated))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
