"""Before a teacher serves: do its exact labels, through its head, give the model's own logits, and does it write so?

Shape suffixes: T tokens, V vocabulary.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.contract.errors import TeacherError
from services.contract.sequences import DecodeOptions, LabelOptions, Prompt, TokenSequence
from services.contract.soft_labels import ExactLabels, ScoredSequence, checked_positions, log_softmax
from services.contract.tensors import Array
from teacher_server.engine import Engine
from teacher_server.wire import as_label_dtype

PROBE_TEXT = (
    "The harbour master of Ostrel said on Tuesday that 14 ferries had been repaired, and that no sailing would be "
    "cancelled before the end of the month. def add(a, b): return a + b. ¿Qué hora es? 今日は。"
)
_PROBE_TOKENS = 48
_TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 5e-3}
"""Root mean square of the error in centred logits, relative to the logits' own: 16-bit models round theirs."""

_CONTINUED_PROMPTS = 8
_CHOICE_TOLERANCE = 4.0
"""Times the tolerance that a token which was written may stay behind the likeliest: of near equals either may win."""

_OTHER_CODE = {"float32": 1.0, "bfloat16": 2.5, "float16": 2.5}
"""Times that for an engine whose layers are not those of the reference and round in other places: between vLLM and
transformers, both right, the 30 layers of SmolLM2-135M-Instruct add up to 2.1% in bfloat16.
"""


@dataclass(frozen=True, kw_only=True)
class SelfCheck:
    """``logit_error``: relative, see _TOLERANCE. ``label_divergence``: the mean KL divergence in nats that rounding
    hidden states for the wire adds; ``label_max_error`` the largest change of a log-probability above -10.
    """

    logit_error: float
    label_divergence: float
    label_max_error: float


async def self_check(engine: Engine, *, label_dtype: str) -> SelfCheck:
    """Score a probe and compare; TeacherError when labels or continuations are not of the model's own distribution."""
    card = engine.describe()
    token_ids = probe_ids(engine)
    positions = list(range(1, len(token_ids)))
    sequence = TokenSequence(id="self-check", token_ids=token_ids, label_positions=positions)
    scored = await score_one(engine, sequence)
    reference_TV = (await asyncio.to_thread(engine.reference_logits, token_ids))[:-1]
    if not isinstance(scored.labels, ExactLabels) or not np.isfinite(reference_TV).all():
        raise TeacherError(
            f"{card.model} computes logits that are not finite",
            fix="The weights are damaged, or overflow in this precision: try --dtype bfloat16 or float32.",
        )
    head = engine.lm_head()
    logit_error = _relative_error(head.logits(scored.labels.hidden_ND), reference_TV)
    logprobs_TV = log_softmax(reference_TV)
    token_logprobs_T = np.take_along_axis(logprobs_TV, np.array(token_ids[1:])[:, None], axis=1)[:, 0]
    expected_P = token_logprobs_T[checked_positions(len(positions), "exact")]
    token_error = _relative_spread(scored.token_logprobs_P, expected_P, reference_TV)
    tolerance = _TOLERANCE[card.weights_dtype] * (_OTHER_CODE[card.weights_dtype] if card.engine == "vllm" else 1.0)
    if not max(logit_error, token_error) <= tolerance:
        raise TeacherError(
            f"the labels of {card.model} would not be its own distribution: its head gives logits that are off by "
            f"{logit_error:.2%} and token log-probabilities by {token_error:.2%} (tolerance {tolerance:.2%})",
            fix="This architecture scales or transforms its logits in a way that this release does not know; "
            "serve another model.",
        )
    if card.generates:
        await _check_choices(engine, token_ids, reference_TV, tolerance=_CHOICE_TOLERANCE * tolerance)
    exact_TV = log_softmax(head.logits(scored.labels.hidden_ND))
    sent_TV = log_softmax(head.logits(as_label_dtype(scored.labels, label_dtype).hidden_ND))
    likely_TV = exact_TV > -10
    return SelfCheck(
        logit_error=logit_error,
        label_divergence=float((np.exp(exact_TV) * (exact_TV - sent_TV)).sum(axis=1).mean()),
        label_max_error=float(np.abs(exact_TV - sent_TV)[likely_TV].max(initial=0.0)),
    )


def probe_ids(engine: Engine) -> list[int]:
    """Tokens of PROBE_TEXT, as many as the model takes up to 48."""
    card = engine.describe()
    most = min(_PROBE_TOKENS, card.max_length)
    bos = card.special_token_ids.get("bos")
    ids = ([] if bos is None else [bos]) + engine.tokenize(PROBE_TEXT)
    if len(ids) < most:
        ids += [token_id % card.vocab_size for token_id in range(most - len(ids))]
    return ids[:most]


async def score_one(engine: Engine, sequence: TokenSequence) -> ScoredSequence:
    """Exact labels of one sequence."""
    return await engine.score(sequence, LabelOptions())


async def _check_choices(engine: Engine, token_ids: Sequence[int], reference_TV: Array, *, tolerance: float) -> None:
    """Decoding may be another engine's work, with weights of its own."""
    lengths = range(1, len(token_ids), max(1, len(token_ids) // _CONTINUED_PROMPTS))
    prompts = [Prompt(id=str(length), token_ids=list(token_ids[:length])) for length in lengths]
    options = DecodeOptions(max_new_tokens=1)
    answers = await asyncio.gather(*(engine.generate(prompt, options) for prompt in prompts))
    chosen_P = [answer.token_ids[0] for answer in answers]
    logits_PV = reference_TV[np.array(lengths) - 1]
    behind = float((logits_PV.max(axis=1) - logits_PV[np.arange(len(chosen_P)), chosen_P]).max() / _spread(logits_PV))
    if not behind <= tolerance:
        raise TeacherError(
            f"{engine.describe().model} would not write what is likeliest by its own distribution: a token's logit is "
            f"behind by {behind:.2%} (tolerance {tolerance:.2%})",
            fix="The weights that decode are not those that label; start the teacher again, or without --generation.",
        )


def _relative_error(logits_TV: Array, reference_TV: Array) -> float:
    # A constant added to all logits of a position changes no probability.
    difference_TV = (logits_TV - reference_TV).astype(np.float64)
    difference_TV -= difference_TV.mean(axis=1, keepdims=True)
    return float(np.sqrt((difference_TV**2).mean()) / _spread(reference_TV))


def _relative_spread(logprobs_T: Array, expected_T: Array, reference_TV: Array) -> float:
    return float(np.sqrt(((logprobs_T - expected_T) ** 2).mean()) / _spread(reference_TV))


def _spread(logits_TV: Array) -> float:
    centred_TV = logits_TV - logits_TV.mean(axis=1, keepdims=True)
    # Logits that are all equal have no spread; any error at all then counts.
    return float(max(np.sqrt((centred_TV.astype(np.float64) ** 2).mean()), 1e-12))
