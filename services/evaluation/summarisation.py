"""Greedy summaries of articles, in batches of like length."""

import logging
from collections.abc import Iterator, Sequence

import torch

from services.contract.errors import InvalidInputError
from services.contract.prompt import encode_prompt
from services.datasets.reading import SummarisationItem
from services.evaluation.model import LoadedModel

log = logging.getLogger(__name__)


def summarise(
    items: Sequence[SummarisationItem], *, loaded: LoadedModel, instruction: str, max_new_tokens: int, batch_size: int
) -> Iterator[list[tuple[SummarisationItem, str]]]:
    """Each batch's items with their summaries, as soon as the batch is done; the longest articles come first.

    An article that does not fit into the model's window beside ``max_new_tokens`` loses its end, and a warning says how
    many did. InvalidInputError when the window leaves no room for any article.
    """
    prompts = _encode_all(items, loaded=loaded, instruction=instruction, max_new_tokens=max_new_tokens)
    # Longest first: a batch that does not fit into memory fails at once, not after an hour.
    order = sorted(range(len(items)), key=lambda index: -len(prompts[index]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        outputs = _generate([prompts[index] for index in chosen], loaded=loaded, max_new_tokens=max_new_tokens)
        yield [(items[index], output) for index, output in zip(chosen, outputs, strict=True)]


def _encode_all(
    items: Sequence[SummarisationItem], *, loaded: LoadedModel, instruction: str, max_new_tokens: int
) -> list[list[int]]:
    limit = loaded.window - max_new_tokens
    prompts = []
    shortened = 0
    for item in items:
        prompt = encode_prompt(loaded.tokenizer, instruction=instruction, context=item.source)
        if len(prompt) > limit:
            prompt = _shorten(item.source, len(prompt) - limit, loaded=loaded, instruction=instruction, limit=limit)
            shortened += 1
        prompts.append(prompt)
    if shortened:
        log.warning(
            "%d of %d articles are longer than the model's window of %d tokens allows and were cut at the end",
            shortened,
            len(items),
            loaded.window,
        )
    return prompts


def _shorten(source: str, excess: int, *, loaded: LoadedModel, instruction: str, limit: int) -> list[int]:
    """The prompt for as much of the article as fits; the rest of the prompt stays whole."""
    article = loaded.tokenizer.encode(source, add_special_tokens=False)
    while excess > 0:
        article = article[:-excess]
        if not article:
            raise InvalidInputError(
                f"the model's window of {loaded.window} tokens leaves no room for an article beside prompt and output",
                fix="Lower evaluation.max_new_tokens, or choose a model with a longer window.",
            )
        # A cut inside a character leaves a replacement character behind.
        text = loaded.tokenizer.decode(article).rstrip("\ufffd")
        prompt = encode_prompt(loaded.tokenizer, instruction=instruction, context=text)
        excess = len(prompt) - limit
    return prompt


@torch.inference_mode()
def _generate(prompts: Sequence[list[int]], *, loaded: LoadedModel, max_new_tokens: int) -> list[str]:
    """Left-padded, so that every output starts in the same column; padding is masked by length, not by its id."""
    width = max(map(len, prompts))
    pad_id = loaded.tokenizer.pad_token_id
    if pad_id is None:
        pad_id = loaded.eos_ids[0] if loaded.eos_ids else 0
    ids_BT = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, width - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, width - len(prompt) :] = 1
    device = loaded.model.device
    generated_BT = loaded.model.generate(
        ids_BT.to(device),
        attention_mask=mask_BT.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad_id,
    )
    return [_decode(row, loaded=loaded) for row in generated_BT[:, width:].tolist()]


def _decode(ids: list[int], *, loaded: LoadedModel) -> str:
    ends = [ids.index(id_) for id_ in loaded.eos_ids if id_ in ids]
    text: str = loaded.tokenizer.decode(ids[: min(ends, default=len(ids))], skip_special_tokens=True)
    return text.strip()
