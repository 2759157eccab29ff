"""Greedy answers from a server that serves the model under evaluation, such as ``vllm serve DIR``.

Its OpenAI-compatible completions take prompts as token ids, so that it reads what transformers would read here.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from services.contract.errors import EvaluationError

TIMEOUT = httpx.Timeout(3600, connect=10)
"""Seconds that a batch may take: a large model on a busy server, hundreds of long articles at a time."""


class _Model(BaseModel):
    id: str
    root: str | None = None
    max_model_len: int | None = None


class _Models(BaseModel):
    data: list[_Model]


class _Choice(BaseModel):
    index: int
    text: str


class _Completions(BaseModel):
    choices: list[_Choice]


Body = TypeVar("Body", bound=BaseModel)


class ModelServer:
    """The server at ``url``, which ends in /v1; ``key`` is what it is shown.

    ``window``: tokens that it takes for prompt and output together; None where it does not say. EvaluationError when
    nothing answers there, or when it serves another model than that of ``directory``, known to it by this path or as
    ``name``.
    """

    def __init__(self, url: str, *, directory: str, name: str, key: str | None = None) -> None:
        self.url = url.rstrip("/")
        # As bytes, which httpx takes as they are; in an error it would print them otherwise.
        self._headers = {} if key is None else {b"Authorization": f"Bearer {key.strip()}".encode()}
        served = self._find(directory=directory, name=name)
        self._served_name = served.id
        self.window = served.max_model_len

    def complete(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: Sequence[int] = ()
    ) -> list[str]:
        """What the model writes after each prompt, up to one of ``stop_ids``, as text in the prompts' order."""
        body = {
            "model": self._served_name,
            "prompt": [list(prompt) for prompt in prompts],
            "max_tokens": max_new_tokens,
            "stop_token_ids": list(stop_ids),
            # Settings that a model's makers recommend are no part of greedy decoding, and the server would add them.
            "temperature": 0.0,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        choices = sorted(self._ask("completions", body=body, as_a=_Completions).choices, key=lambda one: one.index)
        if len(choices) != len(prompts):
            raise EvaluationError(
                f"the server at {self.url} answered {len(choices)} of {len(prompts)} prompts",
                fix="Look at its log, and evaluate again into the same directory to go on.",
            )
        return [choice.text for choice in choices]

    def _find(self, *, directory: str, name: str) -> _Model:
        """What the server says of the model; a wrong one would be measured without anybody noticing."""
        served = self._ask("models", body=None, as_a=_Models).data
        ours = {str(Path(directory).resolve()), directory, name}
        for model in served:
            if model.id in ours or model.root in ours:
                return model
        names = ", ".join(model.id for model in served) or "nothing"
        raise EvaluationError(
            f"the server at {self.url} serves {names}, not {name}",
            fix=f"Start it with this model; if it has the same files elsewhere, with --served-model-name {name}.",
        )

    def _ask(self, path: str, *, body: dict[str, object] | None, as_a: type[Body]) -> Body:
        """The answer to a POST of ``body``, or to a GET without one."""
        method = "GET" if body is None else "POST"
        try:
            answer = httpx.request(method, f"{self.url}/{path}", json=body, headers=self._headers, timeout=TIMEOUT)
            answer.raise_for_status()
            return as_a.model_validate_json(answer.content)
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            raise EvaluationError(
                f"the server at {self.url} answered {status}: {error.response.text[:300]}",
                fix=_FIXES.get(status, "Look at its log, and evaluate again into the same directory to go on."),
            ) from None
        except ValidationError:
            raise EvaluationError(
                f"what answers at {self.url} is no OpenAI-compatible server", fix=_FIXES[404]
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise EvaluationError(
                f"no model server answers at {self.url}: {str(error) or type(error).__name__}",
                fix=f"Start one, for example with `vllm serve DIR`. {_FIXES[404]}",
            ) from None


_FIXES = {
    400: "Lower --max-new-tokens, or start it with a longer --max-model-len.",
    401: "Set SMOOTHKD_MODEL_SERVER_KEY to the key that it was started with.",
    403: "Set SMOOTHKD_MODEL_SERVER_KEY to a key that may ask this model.",
    404: "Name it as http://HOST:PORT/v1.",
}
