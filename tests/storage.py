"""A real S3 protocol server (moto's) that counts what it serves, and fails some requests if told to.

Of `fail_every` it fails one, but several in a row: one that fails is made again at once by the client's own library.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock, Thread
from typing import Any
from urllib.request import Request, urlopen

BUCKET = "models"
BURST = 5


class Storage:
    """`environment` is for clients; `served`: (path, bytes) of what was read, `written`: verb and path of the rest."""

    def __init__(self, url: str) -> None:
        self.environment = {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": url,
        }
        self.served: list[tuple[str, int]] = []
        self.written: list[str] = []
        self.fail_every = 0
        self.failed = 0

    def upload(self, folder: Path, name: str) -> str:
        """Copy a folder there; returns its place."""
        from pyarrow import fs

        from raymerge.checkpoint.remote import open_filesystem

        filesystem, path = open_filesystem(f"s3://{BUCKET}/{name}")
        fs.copy_files(str(folder), path, destination_filesystem=filesystem)
        return f"s3://{BUCKET}/{name}"

    def download(self, place: str, folder: Path) -> Path:
        """Copy what is at a place to a folder; returns that."""
        from pyarrow import fs

        from raymerge.checkpoint.remote import open_filesystem

        filesystem, path = open_filesystem(place)
        fs.copy_files(path, str(folder), source_filesystem=filesystem)
        return folder

    def bytes_served(self, part: str) -> int:
        return sum(count for path, count in self.served if part in path)


@contextmanager
def run_server(host: str, port: int) -> Iterator[Storage]:
    """The server, empty but for one bucket."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    application = DomainDispatcherApplication(create_backend_app)
    lock, seen = Lock(), [0]

    def counted(environ: dict[str, Any], respond: Callable[..., Any]) -> Any:
        path = environ["PATH_INFO"]
        with lock:
            seen[0] += bool(storage.fail_every)
            if storage.fail_every and seen[0] // BURST % storage.fail_every == 0:
                storage.failed += 1
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                respond("503 Slow Down", [("Content-Length", "0")])
                return [b""]
        body = application(environ, respond)
        if environ["REQUEST_METHOD"] in ("PUT", "POST", "DELETE"):
            with lock:
                storage.written.append(f"{environ['REQUEST_METHOD']} {path}")
            return body
        content = b"".join(body)
        with lock:
            storage.served.append((path, len(content)))
        return [content]

    server = make_server(host, port, counted, threaded=True, request_handler=MotoRequestHandler)
    storage = Storage(f"http://{host}:{server.port}")
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        # What moto holds is the process's, not the server's.
        urlopen(Request(f"{storage.environment['AWS_ENDPOINT_URL']}/moto-api/reset", method="POST")).close()
        urlopen(Request(f"{storage.environment['AWS_ENDPOINT_URL']}/{BUCKET}", method="PUT")).close()
        yield storage
    finally:
        server.shutdown()
        thread.join()


@contextmanager
def serve(monkeypatch: Any) -> Iterator[Storage]:
    """The server on loopback, and this process's environment set for it."""
    from raymerge.checkpoint.remote import open_filesystem

    with run_server("127.0.0.1", 0) as storage:
        for name, value in storage.environment.items():
            monkeypatch.setenv(name, value)
        open_filesystem.cache_clear()
        try:
            yield storage
        finally:
            open_filesystem.cache_clear()


def main(host: str, port: str, note: str) -> None:
    """Serve until standard input ends, then write what was served to the file `note`, as JSON."""
    with run_server(host, int(port)) as storage:
        print("ready", flush=True)
        sys.stdin.read()
    Path(note).write_text(json.dumps(storage.served))


if __name__ == "__main__":
    main(*sys.argv[1:])
