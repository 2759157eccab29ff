"""Greedy answers from a server that serves the model under evaluation, such as ``vllm serve DIR``.

Its OpenAI-compatible completions take prompts as token ids, so that it reads what transformers would read here.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from services.contract.errors import EvaluationError

TIMEOUT = httpx.Timeout(3600, connect=10)
"""Seconds that a batch may take: a large model on a busy server, hundreds of long articles at a time."""


class ModelServer:
    """The server at ``url``, which ends in /v1.

    ``window``: tokens that it takes for prompt and output together; None where it does not say. EvaluationError when
    nothing answers there, or when it serves another model than that of ``directory``, known to it by this path or as
    ``name``.
    """

    def __init__(self, url: str, *, directory: str, name: str, eos_ids: Sequence[int]) -> None:
        self._url = url.rstrip("/")
        self._eos_ids = list(eos_ids)
        served = self._find(directory, name)
        self._served_name = str(served["id"])
        self.window: int | None = served.get("max_model_len")

    def complete(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[str]:
        """What the model writes after each prompt, up to a token that ends an output, as text in the prompts' order."""
        body = {
            "model": self._served_name,
            "prompt": [list(prompt) for prompt in prompts],
            "max_tokens": max_new_tokens,
            "stop_token_ids": self._eos_ids,
            # Settings that a model's makers recommend are no part of greedy decoding, and the server would add them.
            "temperature": 0.0,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        choices = sorted(self._ask("POST", "completions", json=body)["choices"], key=lambda choice: choice["index"])
        if len(choices) != len(prompts):
            raise EvaluationError(
                f"the server at {self._url} answered {len(choices)} of {len(prompts)} prompts",
                fix="Look at its log, and evaluate again into the same directory to go on.",
            )
        return [str(choice["text"]) for choice in choices]

    def _find(self, directory: str, name: str) -> dict[str, Any]:
        """What the server says of the model; a wrong one would be measured without anybody noticing."""
        served = self._ask("GET", "models")["data"]
        paths = {str(Path(directory).resolve()), directory, name}
        for model in served:
            if model["id"] in paths or str(model.get("root")) in paths:
                return dict(model)
        names = ", ".join(str(model["id"]) for model in served) or "nothing"
        raise EvaluationError(
            f"the server at {self._url} serves {names}, not {name}",
            fix=f"Start it with this model; if it has the same files elsewhere, with --served-model-name {name}.",
        )

    def _ask(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        try:
            answer = httpx.request(method, f"{self._url}/{path}", timeout=TIMEOUT, **content)
            answer.raise_for_status()
            found: dict[str, Any] = answer.json()
        except httpx.HTTPStatusError as error:
            raise EvaluationError(
                f"the server at {self._url} answered {error.response.status_code}: {error.response.text[:300]}",
                fix="Lower --batch-size or --max-new-tokens, or start it with a longer --max-model-len.",
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise EvaluationError(
                f"no model server answers at {self._url}: {str(error) or type(error).__name__}",
                fix="Start one, for example with `vllm serve DIR`, and name it as http://HOST:PORT/v1.",
            ) from None
        return found
