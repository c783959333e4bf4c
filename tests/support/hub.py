"""A local stand-in for the Hugging Face Hub, with the HTTP requests of huggingface_hub and datasets.

It serves repositories of models and datasets, each in one version: listings, files (whole or a range of bytes),
and commits with and without large files. Pushing needs a token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_the_stand_in"
USER = "me"
_LARGE = (".safetensors", ".parquet", ".bin")
_API = re.compile(r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)(?:/(?P<action>.*))?")
_FILE = re.compile(r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_BATCH = re.compile(r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch")


@dataclass
class Repository:
    """A repository of the Hub: its files and visibility."""

    files: dict[str, bytes] = field(default_factory=dict)
    private: bool = False
    commits: list[str] = field(default_factory=list)
    """Messages of the commits."""

    @property
    def sha(self) -> str:
        """Hash of its only version."""
        digest = hashlib.sha1()
        for path, content in sorted(self.files.items()):
            digest.update(path.encode() + hashlib.sha1(content).digest())
        return digest.hexdigest()


class Hub:
    """Repositories by kind and name, uploads before their commit, and all received requests."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.uploaded: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.url = ""

    def model(self, name: str, folder: Path) -> Repository:
        """Add a folder as a model."""
        files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        return self.repositories.setdefault(("models", name), Repository(files))

    def dataset(self, name: str, files: dict[str, bytes]) -> Repository:
        """Add files as a dataset."""
        return self.repositories.setdefault(("datasets", name), Repository(files))


@contextmanager
def serving() -> Iterator[Hub]:
    """Yield a Hub that serves on this machine within the body."""
    hub = Hub()
    handler: Any = type("Answers", (Answers,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Answers(BaseHTTPRequestHandler):
    """The handler of a request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *values: object) -> None:
        """Log nothing."""

    def do_HEAD(self) -> None:
        """Answer with a file's metadata."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer with a file, or the facts of a repository or user."""
        place = self._path()
        if found := _FILE.fullmatch(place):
            self._file(found["kind"] or "models/", found["name"], found["path"])
        elif place == "/api/whoami-v2" and self._may_write():
            self._json({"type": "user", "name": USER, "auth": {"accessToken": {"role": "write"}}, "orgs": []})
        elif (found := _API.fullmatch(place)) and (repository := self._repository(found["kind"], found["name"])):
            action = found["action"] or "revision/main"
            if action.startswith("revision/"):
                self._json(_told(found["name"], repository))
            elif action.startswith("tree/"):
                self._json(_tree(repository, action.removeprefix("tree/").partition("/")[2], self._recursive()))
            else:
                self._missing("EntryNotFound")
        else:
            self._missing("RepoNotFound")

    def do_POST(self) -> None:
        """Create a repository, list paths, or take a step of a commit."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        place = self._path()
        found = _API.fullmatch(place)
        repository = self._repository(found["kind"], found["name"]) if found else None
        if found and repository and (found["action"] or "").startswith("paths-info/"):
            wanted = parse_qs(body.decode())["paths"]
            self._json([_entry(path, repository.files[path]) for path in wanted if path in repository.files])
        elif place == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif not self._may_write():
            self._send(401, b"{}")
        elif place == "/api/repos/create":
            self._create(json.loads(body))
        elif _BATCH.fullmatch(place):
            self._lfs(json.loads(body))
        elif found and repository and found["action"].startswith("preupload/"):
            self._json({"files": [_mode(file["path"]) for file in json.loads(body)["files"]]})
        elif found and repository and found["action"].startswith("commit/"):
            self._commit(found["name"], repository, [json.loads(line) for line in body.splitlines() if line])
        else:
            self._missing("RepoNotFound")

    def do_PUT(self) -> None:
        """Take a large file before the commit that names it."""
        content = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self._path().removeprefix("/upload/")
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.uploaded[oid] = content
        self._send(200, b"")

    def _path(self) -> str:
        place = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {place}")
        return place

    def _recursive(self) -> bool:
        return parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"

    def _may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, kind: str, name: str) -> Repository | None:
        found = self.hub.repositories.get((kind.rstrip("/"), name))
        return found if found and (not found.private or self._may_write()) else None

    def _file(self, kind: str, name: str, path: str) -> None:
        repository = self._repository(kind, name)
        if repository is None:
            self._missing("RepoNotFound")
            return
        content = repository.files.get(path)
        headers = {"X-Repo-Commit": repository.sha}
        if content is None:
            self._missing("EntryNotFound", headers)
            return
        headers |= {"ETag": f'"{_etag(path, content)}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self._send(200, content, headers)
            return
        first, last = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
        headers |= {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        self._send(206, content[first : last + 1], headers)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        hidden = bool(asked.get("private")) or asked.get("visibility") == "private"
        there = ("models", name) in self.hub.repositories
        self.hub.repositories.setdefault(("models", name), Repository(private=hidden))
        self._json({"url": f"{self.hub.url}/{name}", "name": name}, status=409 if there else 200)

    def _lfs(self, asked: dict[str, Any]) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.url}/upload/{one['oid']}", "header": {}}}}
            for one in asked["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, repository: Repository, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repository.commits.append(value["summary"])
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.uploaded[value["oid"]]
        sha = repository.sha
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    def _missing(self, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(404, b"{}", {"X-Error-Code": code, **(headers or {})})

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _etag(path: str, content: bytes) -> str:
    return (hashlib.sha256 if path.endswith(_LARGE) else hashlib.sha1)(content).hexdigest()


def _mode(path: str) -> dict[str, Any]:
    return {"path": path, "uploadMode": "lfs" if path.endswith(_LARGE) else "regular", "shouldIgnore": False}


def _told(name: str, repository: Repository) -> dict[str, Any]:
    siblings = [{"rfilename": path} for path in sorted(repository.files)]
    known = {"id": name, "modelId": name, "sha": repository.sha, "private": repository.private, "siblings": siblings}
    return known | {"tags": [], "downloads": 0, "likes": 0, "disabled": False, "gated": False}


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    if path.endswith(_LARGE):
        entry["lfs"] = {"oid": _etag(path, content), "size": len(content), "pointerSize": 130}
    return entry


def _tree(repository: Repository, below: str, recursive: bool) -> list[dict[str, Any]]:
    start = f"{below}/" if below else ""
    inside = {path: content for path, content in sorted(repository.files.items()) if path.startswith(start)}
    folders = {
        start + "/".join(parts[:depth])
        for path in inside
        for parts in [path.removeprefix(start).split("/")]
        for depth in range(1, len(parts) if recursive else min(len(parts), 2))
    }
    entries = [{"type": "directory", "path": folder, "oid": "0" * 40, "size": 0} for folder in sorted(folders)]
    files = [path for path in inside if recursive or "/" not in path.removeprefix(start)]
    return [*entries, *(_entry(path, inside[path]) for path in files)]
