"""A teacher that is pretended, but consistent: it needs no weights and no torch, and answers every rpc.

The hidden state at a position is a pure function of the tokens up to it, and the head is fixed, so labels are real
distributions that differ from prefix to prefix and are the same on every machine. For trying the platform, and for
tests that need a teacher rather than its knowledge.
"""

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from services.contract.errors import InvalidInputError
from services.contract.lm_head import LmHead
from services.contract.reference_labels import label_uniforms, projected_labels, sampled_labels, top_k_labels
from services.contract.sequences import Continuation, DecodeOptions, LabelOptions, Prompt, TokenSequence
from services.contract.soft_labels import (
    ExactLabels,
    FullLabels,
    ScoredSequence,
    SoftLabels,
    checked_positions,
    hash_sequence,
    log_softmax,
)
from services.contract.tensors import Array
from teacher_server.batching import DecodeWatch
from teacher_server.draws import draw_generator
from teacher_server.engine import TeacherCard
from teacher_server.student_heads import StudentHeads
from teacher_server.tokenizer import bytes_tokenizer, from_directory

HIDDEN_SIZE = 64
_WORD = 2**64
_MULTIPLIER = 0x9E3779B97F4A7C15


class MockModel:
    """A BatchModel.

    ``model`` is a directory with a tokenizer, or a vocabulary size in digits. ``seconds_per_sequence`` pretends to
    compute for so long, so that a slow teacher can be tried.
    """

    max_batch_tokens = 4096
    max_batch_sequences = 8

    def __init__(
        self, model: str, *, name: str = "", max_length: int = 4096, seconds_per_sequence: float = 0.0
    ) -> None:
        if model.isdecimal():
            if int(model) < 2:
                raise InvalidInputError(
                    f"a vocabulary of {model} tokens is too small", fix="Name a vocabulary size of at least 2."
                )
            self._tokenizer = bytes_tokenizer(int(model))
        else:
            self._tokenizer = from_directory(Path(model))
        vocab_size = self._tokenizer.vocab_size
        random = np.random.default_rng(20250217)
        weight_VD = random.standard_normal((vocab_size, HIDDEN_SIZE)) * 2 / np.sqrt(HIDDEN_SIZE)
        self.head = LmHead(weight_VD=weight_VD.astype(np.float32))
        special = self._tokenizer.special_token_ids
        identity = f"mock 1 {vocab_size} {self._tokenizer.fingerprint}"
        self.card = TeacherCard(
            engine="mock",
            model=name or model,
            revision="",
            fingerprint=hashlib.sha256(identity.encode()).hexdigest()[:32],
            tokenizer_fingerprint=self._tokenizer.fingerprint,
            vocab_size=vocab_size,
            hidden_size=HIDDEN_SIZE,
            max_length=max_length,
            generates=True,
            special_token_ids=special,
            stop_token_ids=(special["eos"],) if "eos" in special else (),
            weights_dtype="float32",
        )
        self._seconds_per_sequence = seconds_per_sequence
        self.student_heads: StudentHeads[LmHead] = StudentHeads(lambda head: head)

    def tokenize(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def reference_logits(self, token_ids: Sequence[int]) -> Array:
        return np.concatenate(
            [self.head.logits(_hidden_states(token_ids[: end + 1])[-1:]) for end in range(len(token_ids))]
        )

    def score(self, work: Sequence[tuple[TokenSequence, LabelOptions]]) -> list[ScoredSequence]:
        time.sleep(self._seconds_per_sequence * len(work))
        return [self._score_one(sequence, options) for sequence, options in work]

    def generate(self, prompts: Sequence[Prompt], options: DecodeOptions, watch: DecodeWatch) -> None:
        stop_ids = options.stop_token_ids or self.card.stop_token_ids
        running = {
            index: (_state_after(prompt.token_ids), draw_generator(prompt, options))
            for index, prompt in enumerate(prompts)
        }
        written: dict[int, list[int]] = {index: [] for index in running}
        time.sleep(self._seconds_per_sequence * len(prompts))
        for step in range(1, options.max_new_tokens + 1):
            for index, (state, random) in list(running.items()):
                logits_V = self.head.logits(_expand(state)[None])[0]
                if options.temperature > 0:
                    logits_V = logits_V / options.temperature + random.gumbel(size=len(logits_V))
                token = int(logits_V.argmax())
                written[index].append(token)
                running[index] = (_step(state, token), random)
                stopped = token in stop_ids
                if stopped or step == options.max_new_tokens:
                    watch.finish(
                        index,
                        Continuation(
                            id=prompts[index].id,
                            token_ids=tuple(written[index]),
                            finish_reason="stop" if stopped else "length",
                        ),
                    )
                if stopped or watch.is_cancelled(index):
                    del running[index]
            if not running:
                return
            watch.after_step()

    def _score_one(self, sequence: TokenSequence, options: LabelOptions) -> ScoredSequence:
        positions_N = np.asarray(sequence.label_positions, dtype=np.int64)
        hidden_ND = _hidden_states(sequence.token_ids)[positions_N - 1]
        tokens_N = np.asarray(sequence.token_ids, dtype=np.int64)[positions_N]
        logits_NV = self.head.logits(hidden_ND)
        logprobs_NV = log_softmax(logits_NV) if len(positions_N) else logits_NV
        labels: SoftLabels
        if options.encoding == "exact":
            labels = ExactLabels(hidden_ND=hidden_ND)
        elif options.encoding == "top_k":
            labels = top_k_labels(logits_NV, options.k, temperature=options.temperature)
        elif options.encoding == "sampled":
            uniforms_NM = label_uniforms(
                options.seed, sequence.token_ids, sequence.label_positions, draws=options.draws
            )
            labels = sampled_labels(logits_NV, uniforms_NM, temperature=options.temperature)
        elif options.encoding == "projected":
            student_head = self.student_heads.get(options.student_head)
            labels = projected_labels(
                logits_NV, student_head.weight_VD, student_head.bias_V, temperature=options.temperature
            )
        else:
            labels = FullLabels(logprobs_NV=logprobs_NV.astype(np.float16))
        token_logprobs_N = np.take_along_axis(logprobs_NV, tokens_N[:, None], axis=1)[:, 0].astype(np.float32)
        return ScoredSequence(
            id=sequence.id,
            sequence_hash=hash_sequence(sequence.token_ids, sequence.label_positions),
            token_logprobs_P=token_logprobs_N[checked_positions(len(positions_N), options.encoding)],
            labels=labels,
        )


def _hidden_states(token_ids: Sequence[int]) -> Array:
    states = []
    state = 0
    for token in token_ids:
        state = _step(state, token)
        states.append(_expand(state))
    return np.stack(states)


def _state_after(token_ids: Sequence[int]) -> int:
    state = 0
    for token in token_ids:
        state = _step(state, token)
    return state


def _step(state: int, token: int) -> int:
    """The prefix's state with one more token: a mixing function in the manner of splitmix64 (Steele et al., 2014)."""
    mixed = (state + (token + 1) * _MULTIPLIER) % _WORD
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) % _WORD
    return ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % _WORD


def _expand(state: int) -> Array:
    """Float32 [D] of mean 0 and variance 1, from 64 bits."""
    counters_D = np.arange(1, HIDDEN_SIZE + 1, dtype=np.uint64) * np.uint64(_MULTIPLIER) + np.uint64(state)
    counters_D = (counters_D ^ (counters_D >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    counters_D = (counters_D ^ (counters_D >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    uniform_D = (counters_D >> np.uint64(40)).astype(np.float64) / 2**24
    return np.asarray((2 * uniform_D - 1) * np.sqrt(3), dtype=np.float32)
