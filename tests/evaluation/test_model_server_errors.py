"""What a server of a model can answer wrongly, and what its user is told to do."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from services.contract.errors import EvaluationError
from services.evaluation.model_server import ModelServer

MODELS = '{"data": [{"id": "m", "root": "/models/m"}]}'


@contextmanager
def answering(status: int, body: str, *, keys: list[str | None] | None = None) -> Iterator[str]:
    """The address of an HTTP server that says the same to everything; ``keys`` takes what it is shown."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if keys is not None:
                keys.append(self.headers["Authorization"])
            content = MODELS if status == 200 and self.path.endswith("/models") and body != "{}" else body
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content.encode())

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "body", "what", "fix"),
    [
        (401, "who are you?", "answered 401: who are you?", "SMOOTHKD_MODEL_SERVER_KEY"),
        (404, "not found", "answered 404", "http://HOST:PORT/v1"),
        (500, "oh", "answered 500: oh", "log"),
        (200, "{}", "no OpenAI-compatible server", "http://HOST:PORT/v1"),
    ],
)
def test_wrong_answers_are_told_with_what_to_do(status: int, body: str, what: str, fix: str) -> None:
    with answering(status, body) as url, pytest.raises(EvaluationError, match=what) as caught:
        ModelServer(url, directory="/models/m", name="m")
    assert fix in caught.value.fix


def test_too_few_answers_are_no_answers() -> None:
    with answering(200, '{"choices": [{"index": 0, "text": "a"}]}') as url:
        server = ModelServer(f"{url}/", directory="/models/m", name="someone/m")
        assert server.complete([[1]], max_new_tokens=1) == ["a"]
        with pytest.raises(EvaluationError, match="answered 1 of 2 prompts"):
            server.complete([[1], [2]], max_new_tokens=1)


def test_the_key_is_shown(tmp_path: Path) -> None:
    keys: list[str | None] = []
    with answering(200, "", keys=keys) as url:
        ModelServer(url, directory="/models/m", name="m", key="secret")
        with pytest.raises(EvaluationError, match="serves m, not other"):
            ModelServer(url, directory=str(tmp_path), name="other")
    assert keys == ["Bearer secret", None]
