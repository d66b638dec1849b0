"""A stand-in of the Hugging Face Hub's HTTP interface: repositories of files, in this process."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = ".safetensors"
"""Ending of the files that are stored as LFS objects, as the Hub does."""


class Hub:
    """Repositories by "user/name": the files of each branch by their path.

    Attributes:
        repos: Repository, branch, path -> content.
        private: Repositories that need the token.
        requests: Method and path of all requests.
    """

    token = "hf_test"

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.address = ""

    def sha(self, repo: str, branch: str) -> str:
        """Return the name of a branch's commit."""
        content = sorted(self.repos[repo][branch].items())
        return hashlib.sha1(repr((branch, content)).encode()).hexdigest()

    def branch_of(self, repo: str, revision: str) -> str | None:
        """Return the branch that a revision names, by its name or its commit."""
        for branch in self.repos[repo]:
            if unquote(revision) in (branch, self.sha(repo, branch)):
                return branch
        return None


@contextmanager
def running() -> Iterator[Hub]:
    """Return a context with a Hub that answers at its `address`."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Print nothing."""

    def _send(self, content: Any = None, status: int = 200, **headers: str) -> None:
        body = (
            content
            if isinstance(content, bytes)
            else json.dumps({} if content is None else content).encode()
        )
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str, text: str) -> None:
        self._send({"error": text}, status, X_Error_Code=code, X_Error_Message=text)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _is_known(self) -> bool:
        return self.headers.get("authorization") == f"Bearer {self.hub.token}"

    def _start(self) -> list[str]:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        return [unquote(part) for part in path.strip("/").split("/")]

    def do_HEAD(self) -> None:
        """Answer as for GET, without content."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer questions about repositories, and send files."""
        parts, hub = self._start(), self.hub
        if parts[:2] == ["api", "models"]:
            repo, revision = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
        else:
            repo, revision = "/".join(parts[:2]), parts[3] if len(parts) > 3 else "main"
        if repo not in hub.repos or (repo in hub.private and not self._is_known()):
            return self._refuse(401, "RepoNotFound", "Repository not found")
        branch = hub.branch_of(repo, revision)
        if branch is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files, sha = hub.repos[repo][branch], hub.sha(repo, branch)
        if parts[:2] == ["api", "models"] and "tree" in parts:
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": sha}
                for name, content in sorted(files.items())
            ]
            return self._send(tree)
        if parts[:2] == ["api", "models"]:
            names = [{"rfilename": name} for name in sorted(files)]
            return self._send({"id": repo, "modelId": repo, "sha": sha, "siblings": names})
        name = "/".join(parts[4:])
        if name not in files:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        etag = hashlib.sha256(files[name]).hexdigest()
        return self._send(files[name], 200, ETag=f'"{etag}"', X_Repo_Commit=sha)

    def do_PUT(self) -> None:
        """Store an LFS object."""
        parts = self._start()
        self.hub.objects[parts[1]] = self._body()
        self._send()

    def do_POST(self) -> None:
        """Create repositories, branches and commits."""
        parts, hub, body = self._start(), self.hub, self._body()
        if not self._is_known():
            return self._refuse(401, "Unauthorized", "Invalid username or password.")
        if parts == ["api", "validate-yaml"]:
            return self._send({"errors": [], "warnings": []})
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'user'}/{asked['name']}"
            if repo in hub.repos:
                return self._send({"url": f"{hub.address}/{repo}"}, 409)
            hub.repos[repo] = {"main": {".gitattributes": b""}}
            if asked.get("private") or asked.get("visibility") == "private":
                hub.private.add(repo)
            return self._send({"url": f"{hub.address}/{repo}"})
        if parts[2:4] == ["info", "lfs"] or parts[1].endswith(".git"):
            return self._batch(json.loads(body))
        repo = "/".join(parts[2:4])
        if parts[4] == "branch":
            hub.repos[repo].setdefault(parts[5], dict(hub.repos[repo]["main"]))
            return self._send()
        if parts[4] == "preupload":
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._send({"files": modes})
        if parts[4] == "commit":
            return self._commit(repo, parts[5], body)
        return self._refuse(404, "EntryNotFound", f"no {self.path}")

    def _batch(self, asked: Any) -> None:
        found = [
            {
                **item,
                "actions": {"upload": {"href": f"{self.hub.address}/objects/{item['oid']}"}},
            }
            for item in asked["objects"]
        ]
        self._send({"transfer": "basic", "objects": found})

    def _commit(self, repo: str, branch: str, body: bytes) -> None:
        files = self.hub.repos[repo][branch]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        sha = self.hub.sha(repo, branch)
        address = f"{self.hub.address}/{repo}/commit/{sha}"
        self._send({"commitUrl": address, "commitOid": sha, "success": True})
