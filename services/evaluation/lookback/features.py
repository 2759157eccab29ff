"""Lookback ratios of labelled or unlabelled summaries, kept on disk so that an interrupted run goes on where it was."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from services.contract.errors import InvalidInputError, UnsupportedError
from services.contract.settings import Settings
from services.evaluation.finite import not_finite
from services.evaluation.lookback.examples import Characters, Example, encode_example
from services.evaluation.lookback.fingerprint import ModelFingerprint, fingerprint_model
from services.evaluation.lookback.measure import measure_answers
from services.models.architecture import has_encoder
from services.models.loading import load_whole
from services.models.resolve import resolve_model

Array = NDArray[np.float32]
Progress = Callable[[int, int], None]
"""Called with how many summaries are done, and how many there are."""


@dataclass(frozen=True, kw_only=True)
class MeasuredSummary:
    """``ratios_TLH`` per token, layer and head; ``offsets`` the characters of each token. ``missing`` says why there is
    no ratio."""

    ratios_TLH: Array
    offsets: list[Characters]
    truncated: bool = False
    missing: str | None = None


@dataclass(frozen=True, kw_only=True)
class LensModel:
    """A loaded model, its tokenizer and its fingerprint."""

    name: str
    model: PreTrainedModel
    tokenizer: Any
    fingerprint: ModelFingerprint

    @property
    def window(self) -> int:
        """Tokens that the model can read."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 2**31))


def load_lens_model(name: str, *, settings: Settings, revision: str | None = None) -> LensModel:
    """The model by directory or name, in float32 on a CPU and in its own precision on a GPU.

    UnsupportedError for an encoder-decoder, ModelNotFoundError for weights that are not whole, EvaluationError for
    weights that are not finite.
    """
    directory = resolve_model(name, revision=revision, settings=settings)
    if has_encoder(directory):
        raise UnsupportedError(
            f"{name} is an encoder-decoder: no attention of it weighs the prompt against the answer",
            fix="Choose a decoder such as Llama, Qwen or Gemma, or another detector.",
        )
    on_gpu = torch.cuda.is_available()
    dtype: Any = "auto" if on_gpu else torch.float32
    model = load_whole(AutoModelForCausalLM, directory, role="a language model", dtype=dtype)
    model = model.to("cuda" if on_gpu else "cpu").eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return LensModel(name=name, model=model, tokenizer=tokenizer, fingerprint=fingerprint_model(model))


def measure_summaries(
    lens_model: LensModel,
    pairs: Sequence[tuple[str, str]],
    *,
    instruction: str,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> list[MeasuredSummary]:
    """Ratios for each (document, summary), in order; a document with several summaries is read once.

    What cannot be measured (no text, longer than the model's window, attention that is not finite) is there with the
    reason. ``cache`` is a folder where ratios are kept between runs, by model, instruction, document and summary.
    """
    measured: dict[int, MeasuredSummary] = {}
    by_document: dict[str, list[int]] = {}
    for index, (document, _) in enumerate(pairs):
        by_document.setdefault(document, []).append(index)
    for indices in by_document.values():
        measured |= _measure_document(lens_model, pairs, indices, instruction, cache)
        if progress:
            progress(len(measured), len(pairs))
    return [measured[index] for index in range(len(pairs))]


def _measure_document(
    lens_model: LensModel, pairs: Sequence[tuple[str, str]], indices: list[int], instruction: str, cache: Path | None
) -> dict[int, MeasuredSummary]:
    measured: dict[int, MeasuredSummary] = {}
    waiting: dict[tuple[int, ...], list[tuple[int, Example]]] = {}
    for index in indices:
        document, summary = pairs[index]
        try:
            example = encode_example(
                lens_model.tokenizer,
                document=document,
                summary=summary,
                window=lens_model.window,
                instruction=instruction,
            )
        except InvalidInputError as error:
            if type(error) is not InvalidInputError:
                raise
            measured[index] = _missing(error.what)
            continue
        kept = _read(cache, lens_model, example)
        if kept is not None:
            measured[index] = _measured(example, kept)
        else:
            # Summaries of different lengths may leave room for different parts of a long document.
            waiting.setdefault(tuple(example.prompt.ids), []).append((index, example))
    for group in waiting.values():
        answers = [example.answer for _, example in group]
        ratios = measure_answers(lens_model.model, group[0][1].prompt, answers)
        for (index, example), ratios_TLH in zip(group, ratios, strict=True):
            measured[index] = _measured(example, ratios_TLH.numpy())
            _write(cache, lens_model, example, ratios_TLH.numpy())
    return measured


def _measured(example: Example, ratios_TLH: Array) -> MeasuredSummary:
    if not np.isfinite(ratios_TLH).all():
        return _missing(not_finite("attention weights").what)
    return MeasuredSummary(ratios_TLH=ratios_TLH, offsets=example.offsets, truncated=example.truncated)


def _missing(reason: str) -> MeasuredSummary:
    return MeasuredSummary(ratios_TLH=np.zeros((0, 0, 0), np.float32), offsets=[], missing=reason)


def _read(cache: Path | None, lens_model: LensModel, example: Example) -> Array | None:
    if cache is None:
        return None
    path = cache / _file_name(lens_model, example)
    if not path.is_file():
        return None
    kept: Array = np.load(path, allow_pickle=False)
    return kept


def _write(cache: Path | None, lens_model: LensModel, example: Example, ratios_TLH: Array) -> None:
    if cache is None:
        return
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / _file_name(lens_model, example)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.npy")
    np.save(temporary, ratios_TLH)
    temporary.replace(path)


def _file_name(lens_model: LensModel, example: Example) -> str:
    content = [example.prompt.ids, example.prompt.context_tokens, example.answer]
    digest = hashlib.sha256(repr(content).encode()).hexdigest()[:32]
    return f"{lens_model.fingerprint.digest}-{digest}.npy"
