"""Lookback ratios of texts that are given and of texts while they are generated.

Every function returns one (T, L, H) float32 tensor per answer: a ratio per token, layer and head. Given texts may be
several answers to one prompt (the prompt is read once), a left-padded batch, or a packed row; the ratios are the same.
The first way also keeps memory linear in the prompt; in the other two transformers itself makes a boolean mask of
length x length, shared by all layers and heads.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from services.evaluation.finite import FiniteLogits
from services.evaluation.lookback.attention import LookbackRecorder, lookback_ratios, recording


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Token ids up to where an answer starts; the first ``context_tokens`` of them are the context."""

    ids: list[int]
    context_tokens: int

    def new_tokens(self, answer_tokens: int) -> Tensor:
        """How many tokens follow the context when each answer token is predicted, (T,)."""
        return torch.arange(answer_tokens) + len(self.ids) - self.context_tokens


@dataclass(frozen=True, kw_only=True)
class MeasuredAnswer:
    """A generated answer without its end-of-sequence token, and the lookback ratios of its tokens."""

    ids: list[int]
    ratios_TLH: Tensor


def measure_answers(
    model: PreTrainedModel, prompt: Prompt, answers: Sequence[list[int]], *, batch_size: int = 8
) -> list[Tensor]:
    """Teacher-forced ratios of several answers (token ids, none empty) to one prompt, which is read once."""
    ratios: list[Tensor] = []
    cache = DynamicCache(config=model.config)
    prefix = prompt.ids[:-1]
    if prefix:
        recorder = _recorder(model, [prompt], length=len(prompt.ids), tail=0)
        with recording(model, recorder):
            model.base_model(
                input_ids=_row(model, prefix),
                past_key_values=cache,
                use_cache=True,
                position_ids=torch.arange(len(prefix), device=model.device)[None],
            )
    for start in range(0, len(answers), batch_size):
        ratios.extend(_continue(model, prompt, answers[start : start + batch_size], copy.deepcopy(cache)))
    return ratios


def _continue(
    model: PreTrainedModel, prompt: Prompt, answers: Sequence[list[int]], cache: DynamicCache
) -> list[Tensor]:
    # The prompt's last token predicts the answer's first. Rows are padded on the right, where no measured token looks.
    longest = max(len(answer) for answer in answers)
    rows = [[prompt.ids[-1], *answer[:-1]] for answer in answers]
    ids = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in rows], device=model.device)
    before = len(prompt.ids) - 1
    recorder = _recorder(model, [prompt], length=before + longest, tail=longest)
    recorder.skip(before)
    recorder.repeat(len(answers))
    if before:
        cache.batch_repeat_interleave(len(answers))
    places = torch.arange(before, before + longest, device=model.device)[None].expand(len(answers), -1)
    with recording(model, recorder):
        model.base_model(input_ids=ids, past_key_values=cache, use_cache=True, position_ids=places)
    masses_BTLH2 = recorder.collect()
    return [_ratios(prompt, masses_BTLH2[index, : len(answer)], len(answer)) for index, answer in enumerate(answers)]


def measure_padded(model: PreTrainedModel, pairs: Sequence[tuple[Prompt, list[int]]]) -> list[Tensor]:
    """Teacher-forced ratios of pairs of prompt and answer, run as one left-padded batch."""
    rows = [prompt.ids + answer[:-1] for prompt, answer in pairs]
    longest = max(len(row) for row in rows)
    pads = [longest - len(row) for row in rows]
    ids = torch.tensor([[row[0]] * pad + row for row, pad in zip(rows, pads, strict=True)], device=model.device)
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads], device=model.device)
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    prompts = [prompt for prompt, _ in pairs]
    recorder = _recorder(model, prompts, length=longest, pads=pads, tail=max(len(answer) for _, answer in pairs))
    with recording(model, recorder):
        model.base_model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False)
    masses_BTLH2 = recorder.collect()
    return [
        _ratios(prompt, masses_BTLH2[index, -len(answer) :], len(answer))
        for index, (prompt, answer) in enumerate(pairs)
    ]


def measure_packed(model: PreTrainedModel, pairs: Sequence[tuple[Prompt, list[int]]]) -> list[Tensor]:
    """Teacher-forced ratios of pairs of prompt and answer, packed one after another into one row.

    Each pair has its positions begin at 0, by which transformers keeps the pairs from seeing each other.
    """
    rows = [prompt.ids + answer[:-1] for prompt, answer in pairs]
    ids = [token for row in rows for token in row]
    places = torch.tensor([[place for row in rows for place in range(len(row))]], device=model.device)
    is_context = [
        index < prompt.context_tokens for (prompt, _), row in zip(pairs, rows, strict=True) for index in range(len(row))
    ]
    recorder = LookbackRecorder(torch.tensor([is_context], device=model.device), tail=len(ids))
    with recording(model, recorder):
        model.base_model(input_ids=_row(model, ids), position_ids=places, use_cache=False)
    masses_SLH2 = recorder.collect()[0]
    ratios, end = [], 0
    for (prompt, answer), row in zip(pairs, rows, strict=True):
        end += len(row)
        ratios.append(_ratios(prompt, masses_SLH2[end - len(answer) : end], len(answer)))
    return ratios


def generate_measured(
    model: PreTrainedModel, prompts: Sequence[Prompt], *, max_new_tokens: int, pad_id: int, end_ids: Sequence[int]
) -> list[MeasuredAnswer]:
    """Greedy answers to a left-padded batch of prompts, measured while they are generated.

    EvaluationError where the logits are not finite.
    """
    longest = max(len(prompt.ids) for prompt in prompts)
    pads = [longest - len(prompt.ids) for prompt in prompts]
    ids = torch.tensor([[pad_id] * pad + p.ids for p, pad in zip(prompts, pads, strict=True)], device=model.device)
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads], device=model.device)
    recorder = _recorder(model, prompts, length=longest + max_new_tokens, pads=pads, tail=1)
    with recording(model, recorder):
        generate: Any = model.generate
        output = generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad_id,
            eos_token_id=list(end_ids) or None,
            use_cache=True,
            cache_implementation="dynamic",
            logits_processor=[FiniteLogits()],
        )
    masses_BTLH2 = recorder.collect()
    answers = []
    for index, prompt in enumerate(prompts):
        answer = output[index, longest:].tolist()
        length = next((place for place, token in enumerate(answer) if token in end_ids), len(answer))
        ratios = _ratios(prompt, masses_BTLH2[index, :length], length)
        answers.append(MeasuredAnswer(ids=answer[:length], ratios_TLH=ratios))
    return answers


def _ratios(prompt: Prompt, masses_TLH2: Tensor, answer_tokens: int) -> Tensor:
    return lookback_ratios(
        masses_TLH2, context_tokens=prompt.context_tokens, new_tokens_T=prompt.new_tokens(answer_tokens)
    )


def _recorder(
    model: PreTrainedModel, prompts: Sequence[Prompt], *, length: int, tail: int, pads: Sequence[int] | None = None
) -> LookbackRecorder:
    starts = torch.tensor(pads or [0] * len(prompts), device=model.device)[:, None]
    ends = starts + torch.tensor([prompt.context_tokens for prompt in prompts], device=model.device)[:, None]
    place_S = torch.arange(length, device=model.device)[None]
    return LookbackRecorder((place_S >= starts) & (place_S < ends), tail=tail)


def _row(model: PreTrainedModel, ids: list[int]) -> Tensor:
    return torch.tensor([ids], device=model.device)
