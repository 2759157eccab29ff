"""A small OpenAI-compatible server on loopback that answers from a script."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeJudge:
    """``answers`` holds, in order, contents of answers, or HTTP statuses to fail with; ``requests`` what was asked."""

    def __init__(self, answers: list[str | int]) -> None:
        self.answers = answers
        self.requests: list[dict] = []
        self.keys: list[str | None] = []
        self.url = ""


@contextmanager
def serve_judge(answers: list[str | int]) -> Iterator[FakeJudge]:
    judge = FakeJudge(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == "/v1/chat/completions"
            judge.requests.append(json.loads(body))
            judge.keys.append(self.headers.get("Authorization"))
            answer = judge.answers.pop(0)
            status = answer if isinstance(answer, int) else 200
            content = {"choices": [{"message": {"role": "assistant", "content": answer}}]}
            reply = json.dumps(content if status == 200 else {"error": {"message": "no"}}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    judge.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield judge
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
