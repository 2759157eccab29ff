"""The model under evaluation, loaded for inference."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig

from services.contract.errors import ModelNotFoundError
from services.evaluation.model_server import ModelServer
from services.models.architecture import decoder_start, language_model_class
from services.models.loading import load_whole


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """``window``: tokens that prompt and output may have together. ``eos_ids``: tokens that end an output.

    ``server``: who writes its answers; None where ``model`` does. ``answer_window``: the window of whoever does.
    """

    model: Any
    tokenizer: Any
    window: int
    eos_ids: tuple[int, ...]
    server: ModelServer | None = None

    @property
    def answer_window(self) -> int:
        # A server shortens outputs without a word where its window ends.
        return min(self.window, (self.server and self.server.window) or self.window)


def load_model(directory: str, *, server: ModelServer | None = None) -> LoadedModel:
    """A language model, with an encoder or without, on the GPU in bfloat16 where there is one, else on the CPU in
    float32.

    ``server``: one that serves it, and writes its greedy answers. ModelNotFoundError for what is not one, or not whole.
    """
    on_gpu = torch.cuda.is_available()
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        kind = language_model_class(directory)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelNotFoundError(
            f"{directory} cannot be loaded as a language model: {first}",
            fix="Name a directory that save_pretrained wrote for both model and tokenizer.",
        ) from None
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = load_whole(kind, directory, role="a language model", dtype=dtype)
    model = model.to("cuda" if on_gpu else "cpu").eval()
    eos_ids = _eos_ids(model, tokenizer)
    # What the model's makers recommend, such as sampling or a repetition penalty, is no part of greedy decoding.
    model.generation_config = GenerationConfig(
        eos_token_id=list(eos_ids) or None, decoder_start_token_id=decoder_start(model)
    )
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    return LoadedModel(model=model, tokenizer=tokenizer, window=window, eos_ids=eos_ids, server=server)


def _eos_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    recommended = model.generation_config.eos_token_id if model.generation_config else None
    ids = recommended if isinstance(recommended, list) else [recommended]
    return tuple(dict.fromkeys(id_ for id_ in [*ids, tokenizer.eos_token_id] if id_ is not None))
