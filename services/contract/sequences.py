"""What a student asks of a teacher: sequences to score, prompts to continue, and how."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Encoding = Literal["exact", "top_k", "full", "sampled", "projected"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class TokenSequence:
    """Tokens to score, and where: labels at position p are the distribution over ``token_ids[p]`` given those before.

    ``label_positions`` ascend, each from 1 to ``len(token_ids) - 1``; ``id`` is unique within a request.
    """

    id: str
    token_ids: Sequence[int]
    label_positions: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """How labels travel.

    ``temperature`` counts for ``top_k``, ``sampled`` and ``projected`` labels; that of ``exact`` and ``full`` labels is
    applied by whoever receives them. ``k`` goes with ``top_k``; ``draws`` per position and their ``seed`` with
    ``sampled``; ``student_head``, the fingerprint of a head that the teacher was sent, with ``projected``.
    """

    encoding: Encoding = "exact"
    k: int = 0
    temperature: float = 1.0
    draws: int = 0
    seed: int = 0
    student_head: str = ""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Tokens to continue; ``id`` is unique within a request."""

    id: str
    token_ids: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """How continuations are chosen: greedily at temperature 0, else sampled.

    Draws depend on ``seed``, the prompt's id and its tokens, never on what else the server is doing.
    ``stop_token_ids``: decoding ends after any of these; empty means the teacher's end-of-sequence tokens.
    """

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What the teacher wrote after a prompt; with reason ``stop`` the last id is the stop token."""

    id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
