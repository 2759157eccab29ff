"""Decoding with transformers' own ``generate``, watched step by step.

Shape suffixes: B prompts of a batch, T tokens, V rows of the model's head.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from services.contract.sequences import Continuation, DecodeOptions, FinishReason, Prompt
from teacher_server.batching import DecodeWatch
from teacher_server.draws import draw_generator
from teacher_server.engine import logits_not_finite


@torch.inference_mode()
def decode_batch(
    model: Any,
    prompts: Sequence[Prompt],
    options: DecodeOptions,
    *,
    vocab_size: int,
    stop_token_ids: Sequence[int],
    watch: DecodeWatch,
) -> None:
    """Continue every prompt; each continuation goes to ``watch`` at the step in which it ends."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    ids_BT = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    # Padding on the left, so that every prompt's last token is in the last column.
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt.token_ids) :] = torch.tensor(list(prompt.token_ids))
        mask_BT[row, longest - len(prompt.token_ids) :] = 1
    # Greedy throughout: sampling adds its noise to the logits, so that the draws of one prompt are its own.
    config = GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        do_sample=False,
        eos_token_id=list(stop_token_ids) or None,
        pad_token_id=0,
        use_cache=True,
    )
    model.generate(
        input_ids=ids_BT.to(model.device),
        attention_mask=mask_BT.to(model.device),
        generation_config=config,
        logits_processor=LogitsProcessorList([_Draw(prompts, options, vocab_size=vocab_size)]),
        stopping_criteria=StoppingCriteriaList(
            [_Observer(prompts, options, stop_token_ids=stop_token_ids, first_column=longest, watch=watch)]
        ),
    )


class _Draw(LogitsProcessor):
    """Takes padding rows out of the vocabulary and, above temperature 0, adds each prompt's own noise."""

    def __init__(self, prompts: Sequence[Prompt], options: DecodeOptions, *, vocab_size: int) -> None:
        self._temperature = options.temperature
        self._vocab_size = vocab_size
        self._generators = [draw_generator(prompt, options) for prompt in prompts]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores_BV = scores.float()
        if scores_BV.isnan().any():
            raise logits_not_finite()
        if self._temperature > 0:
            noise_BV = np.stack([generator.gumbel(size=self._vocab_size) for generator in self._generators])
            noisy_BV = scores_BV[:, : self._vocab_size].double() / self._temperature
            scores_BV = scores_BV.double()
            scores_BV[:, : self._vocab_size] = noisy_BV + torch.from_numpy(noise_BV).to(scores.device)
        scores_BV[:, self._vocab_size :] = -torch.inf
        return scores_BV


class _Observer(StoppingCriteria):
    """Reports what ends in each step, and ends what nobody waits for any more."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        options: DecodeOptions,
        *,
        stop_token_ids: Sequence[int],
        first_column: int,
        watch: DecodeWatch,
    ) -> None:
        self._prompts = prompts
        self._max_new_tokens = options.max_new_tokens
        self._stop_token_ids = frozenset(stop_token_ids)
        self._first_column = first_column
        self._watch = watch
        self._running = set(range(len(prompts)))

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        last_B = input_ids[:, -1].tolist()
        written = input_ids.shape[1] - self._first_column
        for row in sorted(self._running):
            stopped = last_B[row] in self._stop_token_ids
            if stopped or written == self._max_new_tokens:
                self._running.remove(row)
                ids = tuple(input_ids[row, self._first_column :].tolist())
                reason: FinishReason = "stop" if stopped else "length"
                self._watch.finish(row, Continuation(id=self._prompts[row].id, token_ids=ids, finish_reason=reason))
            elif self._watch.is_cancelled(row):
                self._running.remove(row)
        if self._running:
            self._watch.after_step()
        ended = [row not in self._running for row in range(len(self._prompts))]
        return torch.tensor(ended, device=input_ids.device)
