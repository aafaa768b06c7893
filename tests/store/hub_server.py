"""The part of the Hugging Face Hub's HTTP API that a push and a pull use, on this machine: for the real client, without the network."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub:
    """One model repository `user/modules`: a list of commits, each a mapping from path to content."""

    repository = "user/modules"

    def __init__(self) -> None:
        self.commits: list[dict[str, bytes]] = [{".gitattributes": b""}]
        self.requests: list[str] = []
        self.damage = ""
        """Paths that begin so are answered with a byte changed."""
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]

    def oid(self, index: int = -1) -> str:
        return hashlib.sha1(f"{index % len(self.commits)}".encode()).hexdigest()

    def at(self, revision: str) -> dict[str, bytes] | None:
        if revision == "main":
            return self.files
        return next((self.commits[i] for i in range(len(self.commits)) if self.oid(i) == revision), None)

    def commit(self, lines: list[dict[str, Any]]) -> bool:
        """Apply a commit; False if it was made on top of another one than the last."""
        head = next(line["value"] for line in lines if line["key"] == "header")
        if head.get("parentCommit") not in (None, self.oid()):
            return False
        changed = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"}
        self.commits.append({**self.files, **changed})
        return True

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16  # head and body in one piece: no waiting for acknowledgements
        disable_nagle_algorithm = True

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, content: bytes, code: int = 200, **headers: str) -> None:
            self.send_response(code)
            for key, value in {"Content-Length": str(len(content)), "X-Repo-Commit": hub.oid(), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def document(self, value: Any, code: int = 200) -> None:
            self.answer(json.dumps(value).encode(), code, Content_Type="application/json")

        def missing(self, kind: str) -> None:
            self.answer(b"{}", 404, X_Error_Code=kind, X_Error_Message=kind)

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            if f"/{hub.repository}" not in path:
                return self.missing("RepoNotFound")
            if path.startswith(f"/api/models/{hub.repository}/tree/"):
                files = hub.at(path.split("/tree/")[1].split("/")[0]) or {}
                return self.document([{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()} for name, data in files.items()])
            if path.startswith(f"/api/models/{hub.repository}"):
                return self.document({"id": hub.repository, "modelId": hub.repository, "sha": hub.oid(), "siblings": [], "private": False, "tags": []})
            revision, _, name = path.split("/resolve/")[1].partition("/")
            data = (hub.at(revision) or {}).get(name)
            if data is None:
                return self.missing("EntryNotFound")
            if hub.damage and name.startswith(hub.damage):
                data = data[:-1] + bytes([data[-1] ^ 1])
            return self.answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=revision)

        do_HEAD = do_GET

        def do_POST(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"POST {path}")
            body = self.rfile.read(int(self.headers["Content-Length"])) if "Content-Length" in self.headers else self.chunks()
            if path == "/api/validate-yaml":
                return self.document({"errors": [], "warnings": []})
            if "/preupload/" in path:
                files = json.loads(body)["files"]
                return self.document({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
            if not hub.commit([json.loads(line) for line in body.splitlines() if line.strip()]):
                return self.document({"error": "the branch has moved"}, 412)
            return self.document({"success": True, "commitUrl": f"{hub.endpoint}/{hub.repository}/commit/{hub.oid()}", "commitOid": hub.oid(), "hookOutput": ""})

        def chunks(self) -> bytes:
            found = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found

    return Handler
