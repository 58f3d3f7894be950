"""A stand-in for the Hugging Face hub: serves folders as repositories, and counts what it serves."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class Hub:
    """Repositories: `revisions[name][revision]` is a folder. `served` has (path, bytes) of each file request."""

    def __init__(self, revisions: dict[str, dict[str, Path]]) -> None:
        self.revisions = revisions
        self.served: list[tuple[str, int]] = []
        self.requests: list[str] = []
        self.url = ""

    def commit(self, folder: Path) -> str:
        return hashlib.sha1(str(folder).encode()).hexdigest()

    def folder(self, name: str, revision: str) -> Path | None:
        known = self.revisions.get(name, {})
        if revision in known:
            return known[revision]
        return next((folder for folder in known.values() if self.commit(folder) == revision), None)

    def bytes_served(self, name: str) -> int:
        return sum(count for path, count in self.served if path.endswith(name))


@contextmanager
def serve(revisions: dict[str, dict[str, Path]]) -> Iterator[Hub]:
    hub = Hub(revisions)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:  # noqa: N802
            self.answer(True)

        def do_HEAD(self) -> None:  # noqa: N802
            self.answer(False)

        def do_POST(self) -> None:  # noqa: N802
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            self.answer(True, body)

        def answer(self, with_body: bool, body: str = "") -> None:
            hub.requests.append(f"{self.command} {self.path}")
            parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
            if parts[:2] == ["api", "models"] and len(parts) >= 4:
                return self.api("/".join(parts[2:4]), parts[4:], body)
            if len(parts) >= 5 and parts[2] == "resolve":
                return self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), with_body)
            self.refuse("EntryNotFound")

        def api(self, name: str, rest: list[str], body: str) -> None:
            kind, revision = (rest + ["revision", "main"])[:2] if rest else ("revision", "main")
            if name not in hub.revisions:
                return self.refuse("RepoNotFound", 401)
            folder = hub.folder(name, revision)
            if folder is None:
                return self.refuse("RevisionNotFound")
            files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
            if kind == "paths-info":
                form = json.loads(body) if body.startswith("{") else parse_qs(body)
                listed = [
                    {"type": "file", "path": path, "size": files[path], "oid": "0" * 40}
                    for path in form["paths"]
                    if path in files
                ]
                return self.json(listed)
            if kind == "tree":
                return self.json([{"type": "file", "path": f, "size": s, "oid": "0" * 40} for f, s in files.items()])
            siblings = [{"rfilename": file, "size": size, "blobId": "0" * 40} for file, size in files.items()]
            self.json(
                {"id": name, "modelId": name, "sha": hub.commit(folder), "siblings": siblings, "tags": []}
                | {"private": False, "downloads": 0, "likes": 0}
            )

        def file(self, name: str, revision: str, file: str, with_body: bool) -> None:
            folder = hub.folder(name, revision)
            if folder is None or not (folder / file).is_file():
                return self.refuse("EntryNotFound")
            content = (folder / file).read_bytes()
            whole = len(content)
            first, last, status = 0, whole - 1, 200
            asked = self.headers.get("Range")
            if asked:
                begin, _, end = asked.removeprefix("bytes=").partition("-")
                first, last, status = int(begin), min(int(end) if end else whole - 1, whole - 1), 206
            part = content[first : last + 1]
            self.send_response(status)
            self.send_header("Content-Length", str(len(part)))
            self.send_header("Accept-Ranges", "bytes")
            if status == 206:
                self.send_header("Content-Range", f"bytes {first}-{last}/{whole}")
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", hub.commit(folder))
            self.end_headers()
            if with_body:
                hub.served.append((f"{name}/{file}", len(part)))
                self.wfile.write(part)

        def json(self, content: Any) -> None:
            text = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def refuse(self, code: str, status: int = 404) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
