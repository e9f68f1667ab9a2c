"""A small Hub on this machine: makes repositories and takes commits as the client of the real one sends them."""

from __future__ import annotations

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.servers import LocalServer

TOKEN = "hf_writing"
READER = "hf_reading"
"""A token that may read alone."""


class Hub(LocalServer):
    """Repositories by name; large files are those that the real Hub would keep in LFS, by their ending."""

    def __init__(self) -> None:
        super().__init__()
        self.repos: dict[str, dict[str, Any]] = {}
        """How each was asked for."""
        self.files: dict[str, dict[str, bytes]] = {}
        """What lies in each."""
        self.commits: list[str] = []
        """Their messages."""
        self.tokens: set[str] = set()
        """All that was sent for authorization; for the contents of large files, their address is the key."""
        self.stored: dict[str, bytes] = {}
        """Contents of large files by their SHA-256."""

    def _handle(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        status, answer = self._answer(handler, body)
        content = json.dumps(answer).encode()
        handler.send_response(status)
        if status >= 400:
            handler.send_header("X-Error-Message", answer["error"])
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    def _answer(self, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, dict[str, Any]]:
        path, _, _ = handler.path.partition("?")
        if handler.command == "PUT":
            self.stored[path.rpartition("/")[2]] = body
            return 200, {}
        token = handler.headers.get("Authorization", "")
        self.tokens.add(token)
        if token == f"Bearer {READER}" and path != "/api/validate-yaml":
            return 403, {"error": "this token has no write access"}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith("/preupload/main"):
            large = (".safetensors", ".bin")
            modes = {True: "lfs", False: "regular"}
            told = [
                {"path": file["path"], "uploadMode": modes[file["path"].endswith(large)], "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return 200, {"files": told}
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.url}/large/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if path.endswith("/commit/main"):
            return self._commit(path.removeprefix("/api/models/").removesuffix("/commit/main"), body)
        return 404, {"error": f"nothing at {path}"}

    def _create(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repos:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
        self.repos[name], self.files[name] = asked, {}
        return 200, {"url": f"{self.url}/{name}"}

    def _commit(self, repo: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if repo not in self.repos:
            return 404, {"error": "Repository not found"}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.stored[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                self.files[repo][value["path"]] = content
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40}
