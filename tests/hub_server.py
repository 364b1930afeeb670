"""A small model hub for tests, which huggingface_hub's own client talks to.

It speaks the part of the protocol that a download uses: information about a model with its files,
`resolve` with commits, ETags, redirects of large files to another path, ranges, and the hub's error
codes. It can demand a token, gate a repository, be slow, and break connections.

    with HubServer() as hub:
        hub.add("acme/tiny", checkpoint("sdxl"))
        start_launcher("--checkpoint=acme/tiny", environment=hub.environment(tmp_path))
"""

import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

LARGE = (".safetensors", ".bin", ".gguf", ".ckpt", ".pt")
"""Files that the hub keeps elsewhere, and redirects to."""
CHUNK = 1 << 16


@dataclass
class Repository:
    """What the server has under one name."""

    files: dict[str, Path]
    commit: str
    gated: bool = False
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)


@dataclass
class Request:
    """One that the server answered, for tests to look at."""

    method: str
    path: str
    file: str
    range: str | None
    token: str | None


class HubServer:
    """Used as a context manager. Change the attributes at any time."""

    token = "hf_test_token"
    """With it gated and private repositories can be read."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.break_after: dict[str, list[int]] = {}
        """File -> bytes after which its next connections are closed."""
        self.seconds_per_mb = 0.0
        self.silent = threading.Event()
        """While it is set, connections are accepted and nothing is answered."""
        self.hold = threading.Event()
        """Large files are sent from when it is set."""
        self.hold.set()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.hold.set()
        self.silent.clear()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Environment of a host that uses this hub, with its cache in `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            **more,
        }

    def use(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        """Make this process, and those that it starts, use this hub with its cache in `home`."""
        for name, value in self.environment(home).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(constants, "HF_HOME", str(home))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))

    def add(self, name: str, folder: Path | dict[str, Path], **facts: Any) -> Repository:
        """Serve a folder, or file name -> path, under ORG/NAME."""
        files = folder if isinstance(folder, dict) else files_below(Path(folder))
        commit = hashlib.sha1(f"{name}{sorted(files)}".encode()).hexdigest()
        made = Repository(files=files, commit=commit, **facts)
        made.branches.setdefault("main", commit)
        self.repositories[name] = made
        return made

    def downloads(self, suffix: str = "") -> list[str]:
        """Names of the files whose content was sent, without those read in part on purpose."""
        return [
            request.file
            for request in self.requests
            if request.method == "GET"
            and request.file.endswith(suffix)
            and not (request.range or "").startswith("bytes=0-")
        ]


def files_below(folder: Path) -> dict[str, Path]:
    return {
        str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()
    }


@cache
def _etag(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None: ...

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        while self.hub.silent.is_set():
            time.sleep(0.1)
        path = unquote(urlsplit(self.path).path).strip("/")
        parts = path.split("/")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        request = Request(self.command, path, "", self.headers.get("Range"), token)
        self.hub.requests.append(request)
        if parts[:2] == ["api", "models"]:
            name, revision = "/".join(parts[2:4]), "/".join(parts[5:]) or "main"
            if self._may_read(name, token, revision, is_file=False):
                (self._tree if parts[4:5] == ["tree"] else self._info)(name, revision)
        elif "resolve" in parts[2:3] or parts[0] == "cdn":
            name = "/".join(parts[:2]) if parts[0] != "cdn" else "/".join(parts[1:3])
            revision, file = parts[3], "/".join(parts[4:])
            if parts[0] == "cdn":
                request.file = file
                self._send_file(self.hub.repositories[name].files[file], file)
            elif self._may_read(name, token, revision, is_file=True):
                self._resolve(name, revision, file, request)
        else:
            self._error(404, "", "no such page")

    def _may_read(self, name: str, token: str | None, revision: str, *, is_file: bool) -> bool:
        repository = self.hub.repositories.get(name)
        has_token = token == self.hub.token
        if token is not None and not has_token:
            self._error(401, "", "Invalid credentials in Authorization header")
        elif repository is None or (repository.private and not has_token):
            self._error(404 if has_token else 401, "RepoNotFound", "Repository not found")
        elif repository.gated and is_file and not has_token:
            self._error(401, "GatedRepo", "Access to this model is restricted")
        elif revision not in {*repository.branches, *repository.branches.values()}:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return True
        return False

    def _info(self, name: str, revision: str) -> None:
        repository = self.hub.repositories[name]
        siblings = [
            {
                "rfilename": file,
                "size": path.stat().st_size,
                "blobId": _etag(path)[:40],
                **(
                    {"lfs": {"sha256": _etag(path), "size": path.stat().st_size, "pointerSize": 1}}
                    if file.endswith(LARGE)
                    else {}
                ),
            }
            for file, path in repository.files.items()
        ]
        body = {
            "_id": "1",
            "id": name,
            "modelId": name,
            "sha": repository.branches.get(revision, revision),
            "private": repository.private,
            "gated": "auto" if repository.gated else False,
            "siblings": siblings,
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _tree(self, name: str, revision: str) -> None:
        entries = [
            {"type": "file", "path": file, "size": path.stat().st_size, "oid": _etag(path)[:40]}
            for file, path in self.hub.repositories[name].files.items()
        ]
        self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def _resolve(self, name: str, revision: str, file: str, request: Request) -> None:
        repository = self.hub.repositories[name]
        commit = repository.branches.get(revision, revision)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if file not in repository.files:
            self._error(404, "EntryNotFound", "Entry not found", headers)
            return
        path = repository.files[file]
        headers |= {"X-Linked-Etag": f'"{_etag(path)}"', "X-Linked-Size": str(path.stat().st_size)}
        if file.endswith(LARGE):
            # another host than the hub's, as large files are published
            elsewhere = self.hub.url.replace("127.0.0.1", "localhost")
            location = f"{elsewhere}/cdn/{name}/{commit}/{file}"
            self._send(302, b"", {**headers, "Location": location})
            return
        request.file = file
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_etag(path)[:40]}"'}
        self._send(200, path.read_bytes(), headers)

    def _send_file(self, path: Path, file: str) -> None:
        """Send a large file, or the range of it that was asked for."""
        size, first, last = path.stat().st_size, 0, path.stat().st_size - 1
        asked = self.headers.get("Range")
        if asked:
            start, _, end = asked.removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(end), last) if end else last
        is_whole = asked is None or not asked.startswith("bytes=0-")
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(max(last - first + 1, 0)))
        self.send_header("ETag", f'"{_etag(path)}"')
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "HEAD":
            return
        breaks = self.hub.break_after.get(file, []) if is_whole else []
        limit = breaks.pop(0) if breaks else None
        sent = 0
        with path.open("rb") as content:
            content.seek(first)
            while sent < last - first + 1:
                if is_whole:
                    self.hub.hold.wait(60)
                    time.sleep(self.hub.seconds_per_mb * CHUNK / 1e6)
                if limit is not None and sent >= limit:
                    self.wfile.flush()
                    self.close_connection = True
                    self.connection.shutdown(2)
                    return
                most = min(CHUNK, last - first + 1 - sent, (limit or size) - sent or CHUNK)
                chunk = content.read(most)
                try:
                    self.wfile.write(chunk)
                except OSError:
                    self.close_connection = True
                    return
                sent += len(chunk)

    def _error(
        self, status: int, code: str, message: str, headers: dict[str, str] | None = None
    ) -> None:
        told = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._send(status, json.dumps({"error": message}).encode(), {**told, **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
