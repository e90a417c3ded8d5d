"""
A stand-in for the Hugging Face Hub on loopback: as much of its HTTP as the real clients use to publish and to load.

Repositories live in memory. A commit is a mapping of paths to contents, and `main` is the newest one. Writing needs one
of the server's tokens; reading needs one where the repository is private.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest


TOKEN = "hf_StandInTokenThatMustNotBeSeenAnywhere"
USER = "alice"
# What the Hub keeps in large file storage rather than in git
LARGE_SUFFIXES = (".safetensors", ".parquet", ".png", ".bin")


@dataclass
class Repo:
    """One repository: its commits from the first to the newest, by their ids."""

    kind: str
    name: str
    private: bool = False
    sdk: str | None = None
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit({})

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head]

    def commit(self, files: Mapping[str, bytes]) -> str:
        digest = hashlib.sha1(f"{self.kind} {self.name} {len(self.commits)}".encode())
        for path in sorted(files):
            digest.update(path.encode() + b"\0" + files[path])
        self.commits[digest.hexdigest()] = dict(files)
        return digest.hexdigest()

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        revision = self.head if revision == "main" else revision
        return (revision, self.commits[revision]) if revision in self.commits else None


@dataclass
class Fault:
    """Requests whose `METHOD /path` matches fail: with a status, or by a connection that is dropped."""

    pattern: str
    status: int | None
    remaining: int


class HubServer:
    """
    The server; use it as a context manager.

    Attributes:
        repos (`dict[tuple[str, str], Repo]`): By kind (`model`, `dataset`, `space`) and name.
        requests (`list[tuple[str, str]]`): `METHOD` and path of each request.
        received (`list[bytes]`): Bodies of all requests, as they came in.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.received: list[bytes] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, kind: str, name: str, files: Mapping[str, bytes] | Path, private: bool = False) -> Repo:
        """Puts a repository there, with the files of a folder or of a mapping."""
        if isinstance(files, Path):
            files = {str(p.relative_to(files)): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        repo = self.repos[kind, name] = Repo(kind, name, private)
        repo.commit(files)
        return repo

    @contextmanager
    def failing(self, pattern: str, status: int | None, times: int = 1000) -> Iterator[None]:
        """While it lasts, requests that match get `status`, or for `None` a closed connection and no answer."""
        fault = Fault(pattern, status, times)
        self.faults.append(fault)
        try:
            yield
        finally:
            self.faults.remove(fault)

    def environment(self, home: Path) -> dict[str, str]:
        """What a process needs in its environment to take this for the Hub, and `home` for its cache."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }


_ERRORS = {
    "RepoNotFound": (404, "Repository not found"),
    "RevisionNotFound": (404, "Invalid rev id"),
    "EntryNotFound": (404, "Entry not found"),
}


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    # Answers

    def answer(self, status: int, body: Any = b"", headers: Mapping[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, code: str) -> None:
        status, message = _ERRORS[code]
        self.answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def refuse_token(self, message: str = "Invalid username or password.") -> None:
        self.answer(401, {"error": message}, {"X-Error-Message": message})

    # Requests

    def do_GET(self) -> None:
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 the names that http.server calls

    def handle_request(self) -> None:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        path = unquote(parts.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        line = f"{self.command} {path}"
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            self.hub.received.append(body)
            fault = next((f for f in self.hub.faults if f.remaining > 0 and re.search(f.pattern, line)), None)
            if fault is not None:
                fault.remaining -= 1
        if fault is not None:
            if fault.status is None:
                self.close_connection = True
                self.connection.close()
            elif fault.status == 401:
                self.refuse_token()
            else:
                self.answer(fault.status, {"error": f"made to fail with {fault.status}"})
            return
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.authorized = given == TOKEN
        if given and not self.authorized:
            self.refuse_token("Invalid credentials in Authorization header")
            return
        for method, pattern, name in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                getattr(self, name)(body, **match.groupdict())
                return
        self.answer(404, {"error": f"the stand-in knows no {line}"})

    def find(self, kind: str | None, name: str) -> Repo | None:
        """The repository, or `None` after an answer that says that it is not there for the one who asks."""
        repo = self.hub.repos.get(((kind or "models").rstrip("s/"), name))
        if repo is None or (repo.private and not self.authorized):
            self.refuse("RepoNotFound")
            return None
        return repo

    def find_revision(self, kind: str | None, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files, or `None` after an answer that says what is not there."""
        repo = self.find(kind, name)
        if repo is None:
            return None
        found = repo.at(revision)
        if not found:
            self.refuse("RevisionNotFound")
        return found or None

    def whoami(self, body: bytes) -> None:
        if self.authorized:
            self.answer(200, {"type": "user", "name": USER, "orgs": []})
        else:
            self.refuse_token()

    def create(self, body: bytes) -> None:
        given = json.loads(body)
        owner, kind = given.get("organization") or USER, given.get("type", "model")
        name = f"{owner}/{given['name']}"
        prefix = "" if kind == "model" else f"{kind}s/"
        if not self.authorized:
            self.refuse_token()
        elif (kind, name) in self.hub.repos:
            error = "You already created this repo"
            self.answer(409, {"error": error, "url": f"{self.hub.endpoint}/{prefix}{name}"})
        elif owner != USER:
            self.answer(403, {"error": f"You have no rights in the namespace {owner}"})
        else:
            private = given.get("visibility") == "private" or bool(given.get("private"))
            self.hub.repos[kind, name] = Repo(kind, name, private, given.get("sdk"))
            self.answer(200, {"url": f"{self.hub.endpoint}/{prefix}{name}", "id": name})

    def validate_yaml(self, body: bytes) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def info(self, body: bytes, kind: str, name: str, revision: str | None = None) -> None:
        repo = self.find(kind, name)
        if repo is None:
            return
        found = repo.at(revision or "main")
        if found is None:
            self.refuse("RevisionNotFound")
            return
        head, files = found
        self.answer(
            200,
            {
                "_id": hashlib.sha1(name.encode()).hexdigest()[:24],
                "id": name,
                "modelId": name,
                "author": name.split("/")[0],
                "sha": head,
                "private": repo.private,
                "gated": False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "lastModified": "2025-01-01T00:00:00.000Z",
                "createdAt": "2025-01-01T00:00:00.000Z",
                "siblings": [{"rfilename": path} for path in files],
                **({"sdk": repo.sdk} if repo.sdk else {}),
            },
        )

    def entries(self, files: Mapping[str, bytes]) -> list[dict[str, Any]]:
        """Files and folders as the tree shows them."""
        shown: list[dict[str, Any]] = []
        folders = {str(parent) for path in files for parent in Path(path).parents} - {"."}
        for folder in sorted(folders):
            shown.append({"type": "directory", "path": folder, "size": 0, "oid": _oid(folder.encode())})
        for path, content in files.items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
            if path.endswith(LARGE_SUFFIXES):
                entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 130}
            shown.append(entry)
        return shown

    def tree(self, body: bytes, kind: str, name: str, revision: str, folder: str | None = None) -> None:
        found = self.find_revision(kind, name, revision)
        if found is None:
            return
        start = f"{folder.strip('/')}/" if folder and folder.strip("/") else ""
        below = [entry for entry in self.entries(found[1]) if entry["path"].startswith(start)]
        if self.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            below = [entry for entry in below if "/" not in entry["path"][len(start) :]]
        if start and not below:
            self.refuse("EntryNotFound")
            return
        self.answer(200, below)

    def paths_info(self, body: bytes, kind: str, name: str, revision: str) -> None:
        found = self.find_revision(kind, name, revision)
        if found is None:
            return
        is_json = "json" in self.headers.get("Content-Type", "")
        wanted = json.loads(body)["paths"] if is_json else parse_qs(body.decode()).get("paths", [])
        self.answer(200, [entry for entry in self.entries(found[1]) if entry["path"] in wanted])

    def resolve(self, body: bytes, name: str, revision: str, path: str, kind: str | None = None) -> None:
        found = self.find_revision(kind, name, revision)
        if found is None:
            return
        commit, files = found
        if path not in files:
            self.answer(
                404,
                {"error": "Entry not found"},
                {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": commit},
            )
            return
        content = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_oid(content)}"', "Accept-Ranges": "bytes"}
        if path.endswith(LARGE_SUFFIXES):
            headers |= {"X-Linked-Etag": f'"{_sha256(content)}"', "X-Linked-Size": str(len(content))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self.answer(200, content, headers)
            return
        start, end = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self.answer(206, content[start : end + 1], headers)

    # Uploads: ask how each file is to be sent, send the large ones, commit all

    def preupload(self, body: bytes, kind: str, name: str, revision: str) -> None:
        repo = self.find(kind, name)
        if repo is None:
            return
        if not self.authorized:
            self.refuse_token()
            return
        files = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LARGE_SUFFIXES) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
        self.answer(200, {"files": files})

    def large_files(self, body: bytes, name: str, kind: str | None = None) -> None:
        if not self.authorized:
            self.refuse_token()
            return
        objects = []
        for item in json.loads(body)["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.endpoint}/storage/{item['oid']}", "header": {}}}
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        if _sha256(body) != oid:
            self.answer(400, {"error": "the content is not what was announced"})
            return
        self.hub.objects[oid] = body
        self.answer(200)

    def commit(self, body: bytes, kind: str, name: str, revision: str) -> None:
        repo = self.find(kind, name)
        if repo is None:
            return
        if not self.authorized:
            self.refuse_token()
            return
        files = dict(repo.files)
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            elif item["key"] == "deletedFolder":
                files = {p: c for p, c in files.items() if not p.startswith(value["path"].rstrip("/") + "/")}
        commit = repo.commit(files)
        url = f"{self.hub.endpoint}/{'' if kind == 'models' else kind + '/'}{name}/commit/{commit}"
        self.answer(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})


def _oid(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


_API = r"/api/(?P<kind>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"
_REPO = r"/(?P<kind>datasets/|spaces/)?(?P<name>[^/]+/[^/]+?)"
_ROUTES = (
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", _API + r"(?:/revision/(?P<revision>[^/]+))?", "info"),
    ("GET", _API + r"/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", "tree"),
    ("POST", _API + r"/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("POST", _API + r"/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", _API + r"/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", _REPO + r"\.git/info/lfs/objects/batch", "large_files"),
    ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})", "store"),
    ("GET HEAD", _REPO + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """The stand-in, which the clients of this process and of its children take for the Hub; the token is set."""
    import datasets
    import huggingface_hub
    import transformers.utils.hub
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    home = tmp_path_factory.mktemp("hf-home")
    with HubServer() as server:
        for name, value in server.environment(home).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        # The clients read the environment when they are imported, and that was long ago.
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(constants, "HF_HOME", str(home))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(home / "agents.json"))
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
            monkeypatch.setattr(constants, name, str(home / "hub"))
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.endpoint)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.endpoint)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
        # The wait before a request is tried again
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
        _http.close_session()
        yield server
        _http.close_session()
