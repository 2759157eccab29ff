"""On-policy distillation (GKD, arXiv:2306.13649, algorithm 1): in some steps the student learns from its own responses.

With probability ``fraction`` a step's records keep their prompts, and the student decodes the responses with the
weights that it has then. What it says itself is nothing to imitate, so only the soft term is taken on it, which answers
the mismatch between the texts that a student is trained on and those that it continues when it is used.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from services.contract.distillation_spec import OnPolicySpec
from services.models.architecture import decoder_start
from student_trainer.data import Example


@dataclass(frozen=True, kw_only=True)
class OnPolicy:
    """Which steps the student decodes for, and how; both depend on ``seed`` and the step alone, so that a run which
    goes on from a checkpoint takes the same way.

    ``max_length``: tokens of prompt and response together; ``vocab_size`` without the head's padding rows.
    """

    spec: OnPolicySpec
    seed: int
    vocab_size: int
    max_length: int
    stop_ids: tuple[int, ...]

    def chooses(self, step: int) -> bool:
        """Whether the optimizer step after ``step`` others is on-policy."""
        return _seed(self.seed, step) < self.spec.fraction * 2**63

    def decode(self, model: PreTrainedModel | PeftModel, examples: Sequence[Example], *, step: int) -> list[Example]:
        """The examples with the student's responses in place of theirs: up to and with a stop token, or as long as
        ``max_new_tokens`` and ``max_length`` allow.

        What is drawn for a record depends on the seed, the step and the record, not on what stands beside it.
        """
        budgets = [min(self.spec.max_new_tokens, self.max_length - example.prompt_length) for example in examples]
        responses: dict[int, list[int]] = {}
        with _answering(model) as plain:
            for places in _decodable_together(budgets, most=self.spec.max_new_tokens):
                together = [examples[place] for place in places]
                rows = self._decode(plain, together, budget=budgets[places[0]], step=step)
                responses.update(zip(places, rows, strict=True))
        return [
            replace(example, token_ids=[*example.token_ids[: example.prompt_length], *responses[place]])
            for place, example in enumerate(examples)
        ]

    def _decode(
        self, model: PreTrainedModel, examples: Sequence[Example], *, budget: int, step: int
    ) -> Iterator[list[int]]:
        device = model.device
        longest = max(example.prompt_length for example in examples)
        # A decoder's prompts end in one column, where its responses begin; an encoder's positions count from the first.
        apart = model.config.is_encoder_decoder
        input_ids_BT = torch.zeros(len(examples), longest, dtype=torch.int64)
        attention_mask_BT = torch.zeros_like(input_ids_BT)
        for row, example in enumerate(examples):
            length = example.prompt_length
            columns = slice(length) if apart else slice(longest - length, None)
            input_ids_BT[row, columns] = torch.tensor(example.token_ids[:length])
            attention_mask_BT[row, columns] = 1
        seeds = [_seed(self.seed, step, example.index) for example in examples]
        generate: Any = model.generate
        output_BT = generate(
            input_ids_BT.to(device),
            attention_mask=attention_mask_BT.to(device),
            generation_config=GenerationConfig(
                max_new_tokens=budget,
                do_sample=False,
                eos_token_id=list(self.stop_ids) or None,
                pad_token_id=self.stop_ids[0] if self.stop_ids else 0,
            ),
            logits_processor=[
                _Draws(seeds, temperature=self.spec.temperature, vocab_size=self.vocab_size, device=device)
            ],
        )
        # A decoder with an encoder repeats none of the prompt, only the token that it starts with.
        for response in output_BT[:, 1 if apart else longest :].tolist():
            ends = (place for place, token in enumerate(response, start=1) if token in self.stop_ids)
            yield response[: next(ends, budget)]


def stop_tokens(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a response: the one that closes the data set's, and those that the model itself names."""
    named = model.generation_config.eos_token_id if model.generation_config is not None else None
    own = [] if named is None else [named] if isinstance(named, int) else list(named)
    learnt = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return tuple(dict.fromkeys([*learnt, *own]))


class _Draws(LogitsProcessor):
    """Turns the likeliest token into a drawn one: the largest of logits / temperature + Gumbel noise is a sample of
    their softmax. Each row has a generator of its own; at temperature 0 nothing is drawn.
    """

    def __init__(self, seeds: Sequence[int], *, temperature: float, vocab_size: int, device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._temperature = temperature
        self._vocab_size = vocab_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores_BR = scores.float().clone()
        scores_BR[:, self._vocab_size :] = -torch.inf
        if self._temperature == 0:
            return scores_BR
        scores_BR /= self._temperature
        for row, generator in enumerate(self._generators):
            waits_V = torch.empty(self._vocab_size, device=scores_BR.device).exponential_(generator=generator)
            scores_BR[row, : self._vocab_size] -= waits_V.log()
        return scores_BR


@contextmanager
def _answering(model: PreTrainedModel | PeftModel) -> Iterator[PreTrainedModel]:
    """The model as it is used, without dropout and without settings of its own for how tokens are chosen."""
    plain: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    was_training, settings = model.training, plain.generation_config
    model.eval()
    plain.generation_config = GenerationConfig(decoder_start_token_id=decoder_start(plain))
    try:
        yield plain
    finally:
        plain.generation_config = settings
        model.train(was_training)


def _decodable_together(budgets: Sequence[int], *, most: int) -> list[list[int]]:
    """Places of records that have one budget. Those with less room than others go alone, for a model may have no
    positions beyond it.
    """
    roomy = [place for place, budget in enumerate(budgets) if budget == most]
    return [*([roomy] if roomy else []), *([place] for place, budget in enumerate(budgets) if budget < most)]


def _seed(*of: int) -> int:
    """63 bits that depend on all of these numbers and look random."""
    digest = hashlib.sha256(",".join(map(str, of)).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1
