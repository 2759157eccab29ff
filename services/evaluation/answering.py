"""A model's greedy answers to requests about texts, in batches of like length, with the attention behind them."""

import hashlib
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from services.contract.errors import InvalidInputError, UnsupportedError
from services.contract.prompt import encode_prompt
from services.evaluation.batches import by_length
from services.evaluation.finite import FiniteLogits
from services.evaluation.lookback.examples import decode_answer, encode_document
from services.evaluation.lookback.features import MeasuredSummary
from services.evaluation.lookback.measure import MeasuredAnswer, Prompt, generate_measured
from services.evaluation.model import LoadedModel

log = logging.getLogger(__name__)

TOKENS_PER_PROMPT = 1024
"""A batch has room for prompts of this length: one article of many pages would pad all beside it to its own."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked about ``source``, and the answer it should have."""

    item_id: str
    instruction: str
    source: str
    reference: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """``measured``: the lookback ratios of the output's tokens where they were read while it was generated."""

    request: Request
    prompt: Prompt
    output: str
    measured: MeasuredSummary | None = None

    @property
    def source(self) -> str:
        return self.request.source


def encode_requests(requests: Sequence[Request], *, loaded: LoadedModel, max_new_tokens: int) -> list[Prompt]:
    """Prompts in order. A prompt whose context cannot be told from its request has no context tokens.

    A source that does not fit into the model's window beside ``max_new_tokens`` loses its end, and a warning says how
    many did. InvalidInputError when the window leaves no room for any source.
    """
    limit = loaded.answer_window - max_new_tokens
    prompts = []
    shortened = 0
    for request in requests:
        prompt = _encode(request.source, request=request, loaded=loaded)
        if len(prompt.ids) > limit:
            prompt = _shorten(request, len(prompt.ids) - limit, loaded=loaded, limit=limit)
            shortened += 1
        prompts.append(prompt)
    if shortened:
        log.warning(
            "%d of %d articles are longer than the model's window of %d tokens allows and were cut at the end",
            shortened,
            len(requests),
            loaded.answer_window,
        )
    return prompts


def answer(
    requests: Sequence[Request],
    prompts: Sequence[Prompt],
    *,
    loaded: LoadedModel,
    max_new_tokens: int,
    batch_size: int,
    measure: bool = False,
) -> Iterator[list[Answer]]:
    """Each batch's answers as soon as the batch is done; the longest prompts come first.

    ``batch_size`` answers are written at a time, fewer where prompts are longer than TOKENS_PER_PROMPT.
    With ``measure`` the lookback ratios of every answer are read while it is generated; the answers are the same. A
    server that writes the answers reads none.
    """
    # A server makes its own batches.
    most_tokens = sys.maxsize if loaded.server else batch_size * TOKENS_PER_PROMPT
    # Longest first: what does not fit into memory fails early, not after an hour.
    lengths = [len(prompt.ids) for prompt in prompts]
    for chosen in by_length(lengths, most_tokens=most_tokens, most_rows=batch_size):
        batch = [prompts[index] for index in chosen]
        outputs: list[tuple[str, MeasuredSummary | None]]
        if loaded.server is not None:
            ids = [prompt.ids for prompt in batch]
            texts = loaded.server.complete(ids, max_new_tokens=max_new_tokens, stop_ids=loaded.eos_ids)
            outputs = [(text.strip(), None) for text in texts]
        elif measure and all(prompt.context_tokens for prompt in batch):
            generated = _generate_measured(batch, loaded=loaded, max_new_tokens=max_new_tokens)
            outputs = [_read_measured(one, loaded=loaded) for one in generated]
        else:
            rows = _generate([prompt.ids for prompt in batch], loaded=loaded, max_new_tokens=max_new_tokens)
            outputs = [(_decode(row, loaded=loaded), None) for row in rows]
        yield [
            Answer(request=requests[index], prompt=prompts[index], output=output, measured=measured)
            for index, (output, measured) in zip(chosen, outputs, strict=True)
        ]


def draw_samples(one: Answer, *, loaded: LoadedModel, max_new_tokens: int, count: int) -> list[str]:
    """``count`` other answers to the same prompt, drawn at temperature 1; an item always gets the same ones.

    The source is cut as for the greedy answer.
    """
    seed = int.from_bytes(hashlib.sha256(one.request.item_id.encode()).digest()[:4])
    devices = [loaded.model.device] if loaded.model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        rows = _generate([one.prompt.ids] * count, loaded=loaded, max_new_tokens=max_new_tokens, sampled=True)
    return [_decode(row, loaded=loaded) for row in rows]


def _encode(source: str, *, request: Request, loaded: LoadedModel) -> Prompt:
    # Lookback ratios weigh prompt against answer in one attention; encoder-decoders have two.
    if not loaded.model.config.is_encoder_decoder:
        with suppress(UnsupportedError):
            return encode_document(loaded.tokenizer, document=source, instruction=request.instruction)
    ids = encode_prompt(loaded.tokenizer, instruction=request.instruction, context=source)
    return Prompt(ids=ids, context_tokens=0)


def _shorten(request: Request, excess: int, *, loaded: LoadedModel, limit: int) -> Prompt:
    """The prompt for as much of the source as fits; the rest of the prompt stays whole."""
    source = loaded.tokenizer.encode(request.source, add_special_tokens=False)
    while excess > 0:
        source = source[:-excess]
        if not source:
            raise InvalidInputError(
                f"the model's window of {loaded.answer_window} tokens leaves no room for an article beside prompt and "
                "output",
                fix="Lower evaluation.max_new_tokens, or choose a model with a longer window.",
            )
        # A cut inside a character leaves a replacement character behind.
        text = loaded.tokenizer.decode(source).rstrip("\ufffd")
        prompt = _encode(text, request=request, loaded=loaded)
        excess = len(prompt.ids) - limit
    return prompt


def _pad_id(loaded: LoadedModel) -> int:
    pad_id = loaded.tokenizer.pad_token_id
    if pad_id is None:
        return loaded.eos_ids[0] if loaded.eos_ids else 0
    return int(pad_id)


@torch.inference_mode()
def _generate(
    prompts: Sequence[list[int]], *, loaded: LoadedModel, max_new_tokens: int, sampled: bool = False
) -> list[list[int]]:
    """Left-padded, so that every output starts in the same column; padding is masked by length, not by its id."""
    width = max(map(len, prompts))
    # An encoder's outputs start elsewhere, and some count positions from the first column on.
    apart = loaded.model.config.is_encoder_decoder
    ids_BT = torch.full((len(prompts), width), _pad_id(loaded), dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        columns = slice(len(prompt)) if apart else slice(width - len(prompt), None)
        ids_BT[row, columns] = torch.tensor(prompt)
        mask_BT[row, columns] = 1
    device = loaded.model.device
    # A top_k of 0 turns off the library's own cut after the 50 likeliest tokens.
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0} if sampled else {"do_sample": False}
    generated_BT = loaded.model.generate(
        ids_BT.to(device),
        attention_mask=mask_BT.to(device),
        max_new_tokens=max_new_tokens,
        pad_token_id=_pad_id(loaded),
        logits_processor=[FiniteLogits()],
        **how,
    )
    # A decoder with an encoder repeats none of the prompt, only the token that it starts with.
    first = 1 if apart else width
    rows: list[list[int]] = generated_BT[:, first:].tolist()
    return rows


@torch.inference_mode()
def _generate_measured(prompts: Sequence[Prompt], *, loaded: LoadedModel, max_new_tokens: int) -> list[MeasuredAnswer]:
    return generate_measured(
        loaded.model, prompts, max_new_tokens=max_new_tokens, pad_id=_pad_id(loaded), end_ids=loaded.eos_ids
    )


def _read_measured(generated: MeasuredAnswer, *, loaded: LoadedModel) -> tuple[str, MeasuredSummary | None]:
    """The stripped text, and the ratios with the characters of each token in it."""
    text, offsets = decode_answer(loaded.tokenizer, generated.ids)
    output = text.strip()
    shift = len(text) - len(text.lstrip())
    clamped = [tuple(min(max(place - shift, 0), len(output)) for place in characters) for characters in offsets]
    return output, MeasuredSummary(
        ratios_TLH=generated.ratios_TLH.float().cpu().numpy(),
        offsets=[(start, end) for start, end in clamped],
        missing=None if output else "the summary is empty",
    )


def _decode(ids: list[int], *, loaded: LoadedModel) -> str:
    ends = [ids.index(id_) for id_ in loaded.eos_ids if id_ in ids]
    text: str = loaded.tokenizer.decode(
        ids[: min(ends, default=len(ids))], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text.strip()
