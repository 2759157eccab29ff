"""How much of its attention a model spends on its context and how much on its own words, head by head.

The lookback ratio of one attention head at one step is A(context) / (A(context) + A(new)), where A(context) is the
mean attention weight over the context's tokens and A(new) that over the tokens after the context up to the current
one (Chuang et al. 2024, "Lookback Lens", eq. 1-3). As in the paper's code, the tokens between the context and the
answer (the cue to answer) count as new, a step is that of the token which predicts the scored one, and positions
that a sliding window hides count with weight zero. Where no token follows the context yet the ratio is 1.

The weights are summed inside an attention function registered with transformers' attention interface, a bounded
number of queries at a time, so no attention matrix is kept and memory grows linearly with length. Outputs are those of
transformers' "sdpa" attention, bit for bit, except where logits are soft-capped (Gemma 2), which "sdpa" leaves out.

Shapes: B sequences, S positions, Q queries, K keys, H query heads in G groups of R, D dimensions, L layers, T measured
steps; the last axis of masses holds context and new.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from services.contract.errors import UnsupportedError

IMPLEMENTATION = "smoothkd_lookback"
WEIGHTS_AT_A_TIME = 2**23
"""Attention weights that exist at once: 32 MiB in float32."""


_ROOM = 256
"""Steps that room is made for at first."""


class LookbackRecorder:
    """Adds up attention on context and on new tokens while a model runs.

    ``is_context_BS`` marks the context's positions, padding included in the count of positions, over everything the
    model will see: prompt and answer. ``tail`` says how many of the last queries of each forward pass are measured.
    """

    def __init__(self, is_context_BS: Tensor, *, tail: int = 1) -> None:
        self.sides_BS2 = torch.stack([is_context_BS, ~is_context_BS], dim=-1).float()
        self.tail = tail
        self._skipped = 0
        self._seen: dict[int, int] = {}
        self._masses: dict[int, Tensor] = {}
        self._measured: dict[int, int] = {}

    def skip(self, positions: int) -> None:
        """Start after positions that a cache already holds."""
        self._skipped = positions

    def repeat(self, times: int) -> None:
        """Follow a cache that was repeated for several answers to one prompt."""
        self.sides_BS2 = self.sides_BS2.repeat_interleave(times, dim=0)

    def advance(self, layer: int, queries: int) -> int:
        """Count a forward pass of one layer; the position after its last query."""
        self._seen[layer] = self._seen.get(layer, self._skipped) + queries
        return self._seen[layer]

    def add(self, layer: int, masses_BHQ2: Tensor) -> None:
        """Keep a forward pass's masses of one layer."""
        start = self._measured.get(layer, 0)
        end = self._measured[layer] = start + masses_BHQ2.shape[2]
        kept_BHC2 = self._masses.get(layer)
        # In room made ahead: thousands of small tensors between the growing ones of the key-value cache would keep the
        # allocator from using freed memory again, and a long prompt's answers would take gigabytes.
        if kept_BHC2 is None or end > kept_BHC2.shape[2]:
            room = max(_ROOM, end if kept_BHC2 is None else 2 * end)
            roomier_BHC2 = masses_BHQ2.new_empty(*masses_BHQ2.shape[:2], room, 2)
            if kept_BHC2 is not None:
                roomier_BHC2[:, :, :start] = kept_BHC2[:, :, :start]
            kept_BHC2 = self._masses[layer] = roomier_BHC2
        kept_BHC2[:, :, start:end] = masses_BHQ2

    def collect(self) -> Tensor:
        """Attention masses (B, T, L, H, 2) of every measured query, in layer order, on the CPU."""
        layers = [self._masses[layer][:, :, : self._measured[layer]] for layer in sorted(self._masses)]
        if len({layer_BHT2.shape[1] for layer_BHT2 in layers}) != 1:
            raise UnsupportedError(
                "the model's layers differ in their number of attention heads, or have none",
                fix="Use a decoder model whose layers all have the same number of heads.",
            )
        return torch.stack(layers, dim=3).permute(0, 2, 3, 1, 4).cpu()


def lookback_ratios(masses_TLH2: Tensor, *, context_tokens: int, new_tokens_T: Tensor) -> Tensor:
    """Ratios (T, L, H) from attention masses; ``new_tokens_T`` counts the tokens after the context at each step."""
    context_TLH = masses_TLH2[..., 0] / max(context_tokens, 1)
    new_TLH = masses_TLH2[..., 1] / new_tokens_T.clamp(min=1)[:, None, None]
    return context_TLH / (context_TLH + new_TLH)


@contextmanager
def recording(model: PreTrainedModel, recorder: LookbackRecorder) -> Iterator[None]:
    """While open, the model's forward passes, ``generate`` included, add to ``recorder``.

    The model gets its own attention back afterwards. UnsupportedError where its attention cannot be replaced.
    """
    own = model.config._attn_implementation
    try:
        model.set_attn_implementation(IMPLEMENTATION)
    except ValueError as error:
        raise UnsupportedError(
            f"the attention of {type(model).__name__} cannot be measured: {error}",
            fix="Use a decoder model whose attention goes through transformers' attention interface.",
        ) from None
    token = _RECORDER.set(recorder)
    try:
        with torch.inference_mode():
            yield
    finally:
        _RECORDER.reset(token)
        model.set_attn_implementation(own)


_RECORDER: ContextVar[LookbackRecorder | None] = ContextVar("lookback recorder", default=None)


def _attention(
    module: torch.nn.Module,
    query_BHQD: Tensor,
    key_BGKD: Tensor,
    value_BGKD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature; the output is (B, Q, H, D)."""
    recorder = _RECORDER.get()
    assert recorder is not None, "the attention is in use outside of recording()"
    for option in ("s_aux", "position_bias", "cache"):
        if options.get(option) is not None:
            raise UnsupportedError(
                f"attention with {option} is not measured", fix="Use a model with plain softmax attention."
            )
    queries, keys = query_BHQD.shape[2], key_BGKD.shape[2]
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    seen = recorder.advance(layer, queries)
    if keys > seen:
        raise UnsupportedError("a cache of fixed size cannot be measured", fix="Use a dynamic cache.")
    scale = query_BHQD.shape[-1] ** -0.5 if scaling is None else scaling
    tail = min(recorder.tail, queries)
    weigh = _Weights(key_BGKD, attention_mask, scale=scale, softcap=softcap, queries=queries)
    sides_BK2 = recorder.sides_BS2[:, seen - keys : seen]
    if softcap is None:
        output_BQHD, _ = sdpa_attention_forward(
            module, query_BHQD, key_BGKD, value_BGKD, attention_mask, scaling=scaling, **options
        )
        if tail:
            masses = [w @ sides_BK2[:, None, None] for w in weigh.chunks(query_BHQD, first=queries - tail)]
            recorder.add(layer, torch.cat(masses, dim=3).flatten(1, 2))
        return output_BQHD, None
    outputs, masses = [], []
    for weights_BGRQK in weigh.chunks(query_BHQD, first=0):
        outputs.append(weights_BGRQK.to(value_BGKD.dtype) @ value_BGKD[:, :, None])
        masses.append(weights_BGRQK @ sides_BK2[:, None, None])
    if tail:
        recorder.add(layer, torch.cat(masses, dim=3).flatten(1, 2)[:, :, queries - tail :])
    return torch.cat(outputs, dim=3).flatten(1, 2).transpose(1, 2).contiguous(), None


class _Weights:
    """Softmax attention weights in float32, a bounded number of queries at a time, without repeating grouped keys."""

    def __init__(
        self, key_BGKD: Tensor, mask: Tensor | None, *, scale: float, softcap: float | None, queries: int
    ) -> None:
        self.key_BGKD = key_BGKD
        self.mask = mask
        self.scale = scale
        self.softcap = softcap
        self.queries = queries

    def chunks(self, query_BHQD: Tensor, *, first: int) -> Iterator[Tensor]:
        """Weights (B, G, R, some queries, K), from query ``first`` to the last."""
        batch, heads = query_BHQD.shape[:2]
        groups, keys = self.key_BGKD.shape[1:3]
        step = max(1, WEIGHTS_AT_A_TIME // (batch * heads * keys))
        query_BGRQD = query_BHQD.unflatten(1, (groups, heads // groups))
        for start in range(first, self.queries, step):
            yield self._weigh(query_BGRQD[:, :, :, start : start + step], start)

    def _weigh(self, query_BGRQD: Tensor, start: int) -> Tensor:
        repeats, queries = query_BGRQD.shape[2:4]
        scores_BGRQK = (query_BGRQD.flatten(2, 3) @ self.key_BGKD.transpose(2, 3)).unflatten(2, (repeats, queries))
        scores_BGRQK = scores_BGRQK.float() * self.scale
        if self.softcap is not None:
            scores_BGRQK = torch.tanh(scores_BGRQK / self.softcap) * self.softcap
        hidden = self._hidden(start, queries)
        if hidden is not None:
            scores_BGRQK = scores_BGRQK.masked_fill(hidden, torch.finfo(torch.float32).min)
        return torch.softmax(scores_BGRQK, dim=-1)

    def _hidden(self, start: int, queries: int) -> Tensor | None:
        """True where a query must not look, broadcastable to (B, G, R, Q, K); None where it sees every key."""
        keys = self.key_BGKD.shape[2]
        if self.mask is not None:
            visible = self.mask[:, :, start : start + queries, :keys]
            assert visible.dtype == torch.bool, "sdpa_mask makes masks of booleans"
            return ~visible[:, :, None]
        if self.queries == 1:
            return None
        device = self.key_BGKD.device
        # Without a mask the queries are the newest positions, so the last query sees the last key.
        query_Q = torch.arange(start, start + queries, device=device) + keys - self.queries
        return torch.arange(keys, device=device)[None, :] > query_Q[:, None]


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
