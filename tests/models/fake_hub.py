"""A model hub on loopback: the few routes that huggingface_hub asks for, serving a folder as one repository."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "c0ffee" * 6 + "c0ff"


@contextmanager
def serve_hub(folder: Path, *, repository: str) -> Iterator[tuple[str, list[str]]]:
    """Yields the hub's address and the list of paths asked for so far."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = self.path.split("?")[0]
            asked.append(f"{self.command} {path}")
            files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
            api, resolved = f"/api/models/{repository}", f"/{repository}/resolve/{COMMIT}/"
            if path == "/":
                self._send(b"a hub")
            elif path.startswith(f"{api}/tree/"):
                tree = [
                    {"type": "file", "path": file, "size": (folder / file).stat().st_size, "oid": _oid(folder / file)}
                    for file in files
                ]
                self._send(json.dumps(tree).encode())
            elif path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
                info = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
                self._send(json.dumps(info).encode())
            elif path.startswith(resolved) and path.removeprefix(resolved) in files:
                file = folder / path.removeprefix(resolved)
                self._send(file.read_bytes(), {"ETag": f'"{_oid(file)}"', "X-Repo-Commit": COMMIT})
            elif path.startswith(f"{api}/revision/"):
                self._send(b"{}", {"X-Error-Code": "RevisionNotFound"}, status=404)
            else:
                self._send(b"{}", {"X-Error-Code": "RepoNotFound"}, status=404)

        def _send(self, body: bytes, headers: dict[str, str] | None = None, *, status: int = 200) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()
    thread.join()


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
