"""What a server of a model can answer wrongly, and what its user is told to do."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from services.contract.errors import EvaluationError
from services.contract.settings import Settings
from services.contract.spec_reading import parse_evaluation
from services.evaluation.directory import evaluate_to_directory
from services.evaluation.model_server import ModelServer

MODELS = '{"data": [{"id": "m", "root": "/models/m"}]}'


@contextmanager
def answering(
    *,
    status: int = 200,
    models: str = MODELS,
    completions: str = "",
    keys: list[str | None] | None = None,
    asked: list[dict[str, Any]] | None = None,
) -> Iterator[str]:
    """The address of an HTTP server of models and completions; ``keys`` and ``asked`` take what it is shown."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(models)

        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if asked is not None:
                asked.append(content)
            self._answer(completions)

        def _answer(self, body: str) -> None:
            if keys is not None:
                keys.append(self.headers["Authorization"])
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

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
    with answering(status=status, models=body) as url, pytest.raises(EvaluationError, match=what) as caught:
        ModelServer(url, directory="/models/m", name="m")
    assert fix in caught.value.fix


def test_too_few_answers_are_no_answers() -> None:
    with answering(completions='{"choices": [{"index": 0, "text": "a"}]}') as url:
        server = ModelServer(f"{url}/", directory="/models/m", name="someone/m")
        assert server.complete([[1]], max_new_tokens=1) == ["a"]
        with pytest.raises(EvaluationError, match="answered 1 of 2 prompts"):
            server.complete([[1], [2]], max_new_tokens=1)


def test_prompts_are_asked_greedily_and_answers_put_in_their_order() -> None:
    asked: list[dict[str, Any]] = []
    body = '{"choices": [{"index": 1, "text": "b"}, {"index": 0, "text": "a"}]}'
    with answering(completions=body, asked=asked) as url:
        server = ModelServer(url, directory="/models/m", name="someone/m")
        assert server.complete([[1, 2], [3]], max_new_tokens=7, stop_ids=(5, 6)) == ["a", "b"]
    (request,) = asked
    assert (request["model"], request["prompt"], request["stop_token_ids"]) == ("m", [[1, 2], [3]], [5, 6])
    assert (request["max_tokens"], request["temperature"], request["repetition_penalty"]) == (7, 0.0, 1.0)


def test_another_model_is_named(tmp_path: Path) -> None:
    with answering() as url, pytest.raises(EvaluationError, match="serves m, not other"):
        ModelServer(url, directory=str(tmp_path), name="other")


def test_the_key_is_shown_with_every_request(tiny_model: Path, tmp_path: Path) -> None:
    """And never told, whatever its form."""
    keys: list[str | None] = []
    settings = Settings(data_dir=tmp_path / "data", offline=True, model_server_key=SecretStr("se cret\n"))
    models = json.dumps({"data": [{"id": "m", "root": str(tiny_model)}]})
    spec = parse_evaluation({"benchmarks": ["demo_news"], "limit": 1, "metrics": ["rouge_l"]})
    with answering(models=models, keys=keys) as url, pytest.raises(EvaluationError) as caught:
        # It answers no question but which models there are.
        evaluate_to_directory(str(tiny_model), spec, tmp_path / "out", settings, server=url)
    assert "cr" not in str(caught.value)
    assert [key and key.encode("latin-1").decode() for key in keys] == ["Bearer se cret"] * 2


def test_an_address_that_was_wrong_can_be_corrected(tiny_model: Path, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data", offline=True)
    spec = parse_evaluation({"benchmarks": ["demo_news"], "limit": 1, "metrics": ["rouge_l"]})
    with pytest.raises(EvaluationError, match="no model server answers"):
        evaluate_to_directory(str(tiny_model), spec, tmp_path / "out", settings, server="http://127.0.0.1:9/v1")
    (score,) = evaluate_to_directory(str(tiny_model), spec, tmp_path / "out", settings)
    assert score.items == 1
