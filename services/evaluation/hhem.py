"""HHEM-2.1-Open, Vectara's judge of factual consistency, without the code that its repository asks to run.

It is FLAN-T5-base's encoder with two classes, read at the first position of a fixed prompt (model card of
vectara/hallucination_evaluation_model, Apache-2.0). Texts are never cut: the card gives the model no limit of length.
What would not fit into a machine's memory has no score.
"""

import functools
import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import T5Config, T5ForTokenClassification

from services.contract.errors import ModelNotFoundError
from services.contract.settings import Settings
from services.evaluation.batches import by_length, pad_right
from services.evaluation.consistency.text import split_sentences
from services.evaluation.sentences import sentence_spans
from services.evaluation.verdict import Verdict
from services.models.hub import fetch_model, hub_reachable

NAME = "vectara/hallucination_evaluation_model"
DETECTOR = "hhem"
PROMPT = (
    "<pad> Determine if the hypothesis is true given the premise?\n\nPremise: {premise}\n\nHypothesis: {hypothesis}"
)
FOUNDATION = "google/flan-t5-base"
FLAN_T5_BASE = {
    "vocab_size": 32128,
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 12,
    "num_heads": 12,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
"""The foundation's sizes, for a directory that holds no description of them."""

PREFIX = "t5."
SHARED = "transformer.shared.weight"
EMBEDDED = "transformer.encoder.embed_tokens.weight"
LONGEST = 8192
"""Tokens of a prompt, some 6,000 words. Its attention takes memory by the square: 7 GiB for so many, 60 for 25,000."""
CONSISTENT = 1
PAD_ID = 0


class Hhem:
    """Probability, 0 to 1, that a hypothesis is consistent with its premise."""

    def __init__(self, model: Any, *, tokenizer: Tokenizer) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer

    @torch.inference_mode()
    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        """Of each (premise, hypothesis), in order, read whole; None where that is more than LONGEST tokens."""
        prompts = [PROMPT.format(premise=premise, hypothesis=hypothesis) for premise, hypothesis in pairs]
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch(prompts)]
        scores: list[float | None] = [None] * len(rows)
        short = [index for index, row in enumerate(rows) if len(row) <= LONGEST]
        for batch in by_length([len(rows[index]) for index in short]):
            indices = [short[place] for place in batch]
            ids_BT, mask_BT = pad_right([rows[index] for index in indices], pad_id=PAD_ID)
            device = self.model.device
            logits_BC = self.model(input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device)).logits[:, 0]
            for index, probability in zip(indices, logits_BC.float().softmax(-1)[:, CONSISTENT].tolist(), strict=True):
                scores[index] = probability
        return scores

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Of each (document, output): the whole output's score x 100, and the sentences that alone are inconsistent."""
        sentences = [split_sentences(output) for _, output in pairs]
        single = [
            (document, output[start:end])
            for (document, output), found in zip(pairs, sentences, strict=True)
            for start, end in found
        ]
        asked = list(dict.fromkeys([*(pair for pair, found in zip(pairs, sentences, strict=True) if found), *single]))
        known = dict(zip(asked, self.score(asked), strict=True))
        verdicts = []
        for (document, output), found in zip(pairs, sentences, strict=True):
            if not found:
                verdicts.append(Verdict(score=None))
                continue
            whole = known[document, output]
            singly = [known[document, output[start:end]] for start, end in found]
            supported = [one for one in singly if one is not None]
            if whole is None or len(supported) < len(singly):
                missing = f"document and summary have more than the {LONGEST} tokens that HHEM reads here"
                verdicts.append(Verdict(score=None, missing=missing))
                continue
            spans = sentence_spans(found, supported, detector=DETECTOR, explain=_explain(supported))
            verdicts.append(Verdict(score=100 * whole, spans=spans))
        return verdicts


def load_hhem(name: str = NAME, *, settings: Settings) -> Hhem:
    """The model from a directory or the hub.

    The tokenizer is the directory's own, else its foundation's. ModelNotFoundError says what cannot be had.
    """
    directory = Path(name).expanduser()
    if not directory.is_dir():
        try:
            directory = fetch_model(name, settings=settings)
        except ModelNotFoundError as error:
            fix = (
                f"Name a directory with the files of {NAME}, connect to the hub, or use consistency, which needs none."
            )
            raise ModelNotFoundError(error.what, fix=fix) from None
    return _load(directory.absolute(), settings)


@functools.lru_cache(maxsize=1)
def _load(directory: Path, settings: Settings) -> Hhem:
    try:
        described = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        weights = load_file(directory / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise _not_hhem(directory, str(error)) from None
    foundation = str(described.get("foundation") or FOUNDATION)
    model: Any = T5ForTokenClassification(_config(directory, foundation=foundation))
    state = {key.removeprefix(PREFIX): value.float() for key, value in weights.items()}
    # Files of older versions of the library hold the embedding once; the model has it under two names.
    if SHARED in state:
        state.setdefault(EMBEDDED, state[SHARED])
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise _not_hhem(directory, str(error).splitlines()[-1].strip()) from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Hhem(model.to(device), tokenizer=_tokenizer(directory, foundation=foundation, settings=settings))


def _config(directory: Path, *, foundation: str) -> Any:
    """Sizes of the foundation, which HHEM's own description only names."""
    beside = _foundation_file(directory, foundation, "config.json")
    sizes = FLAN_T5_BASE if beside is None else json.loads(beside.read_text(encoding="utf-8"))
    config: Any = T5Config
    return config(**{name: sizes[name] for name in FLAN_T5_BASE if name in sizes}, num_labels=2)


def _tokenizer(directory: Path, *, foundation: str, settings: Settings) -> Tokenizer:
    file: Path | None = directory / "tokenizer.json"
    if file is None or not file.is_file():
        file = _foundation_file(directory, foundation, "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(file or _fetch_tokenizer(foundation, settings=settings)))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _foundation_file(directory: Path, foundation: str, name: str) -> Path | None:
    """Of a local foundation, named absolutely or from the model's directory."""
    candidates = (Path(foundation).expanduser() / name, directory / foundation / name)
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _fetch_tokenizer(foundation: str, *, settings: Settings) -> Path:
    try:
        return Path(
            huggingface_hub.hf_hub_download(foundation, "tokenizer.json", local_files_only=not hub_reachable(settings))
        )
    except (OSError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelNotFoundError(
            f"HHEM's tokenizer, that of {foundation}, cannot be had: {first}",
            fix=f"Put tokenizer.json of {foundation} beside the model's weights, or connect to the hub.",
        ) from None


def _not_hhem(directory: Path, why: str) -> ModelNotFoundError:
    why = textwrap.shorten(why, width=200, placeholder=" ...")
    return ModelNotFoundError(f"{directory} is not HHEM: {why}", fix=f"Name a directory with the files of {NAME}.")


def _explain(supported: Sequence[float]) -> Callable[[int], str]:
    return lambda index: f"HHEM holds this sentence to be consistent with the source with only {supported[index]:.0%}."
