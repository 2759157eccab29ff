"""Reference labels against distributions worked out otherwise."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from services.contract.reference_labels import (
    count_draws,
    label_uniforms,
    projected_labels,
    sampled_labels,
    top_k_labels,
)


def probabilities_of(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    weights = np.exp((logits - logits.max(axis=1, keepdims=True)).astype(np.float64) / temperature)
    return weights / weights.sum(axis=1, keepdims=True)


@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(0.1, 10))
def test_top_k_labels_hold_the_likeliest_and_all_the_rest(k: int, vocab: int, seed: int, temperature: float) -> None:
    logits = np.random.default_rng(seed).standard_normal((3, vocab)) * 4
    labels = top_k_labels(logits.astype(np.float32), k, temperature=temperature)
    scaled = logits.astype(np.float32).astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    kept = min(k, vocab)
    order = np.argsort(-probabilities, axis=1, kind="stable")
    np.testing.assert_array_equal(labels.ids_NK, order[:, :kept])
    log_kept = np.log(np.take_along_axis(probabilities, order[:, :kept], axis=1))
    np.testing.assert_allclose(labels.logprobs_NK, log_kept, rtol=6e-4, atol=1e-6)
    tail = np.take_along_axis(probabilities, order[:, kept:], axis=1).sum(axis=1)
    np.testing.assert_allclose(labels.tail_mass_N, tail, rtol=1e-6, atol=1e-30)


@given(st.integers(2, 30), st.integers(1, 300), st.integers(0, 2**32 - 1), st.sampled_from([0.5, 1.0, 3.0]))
def test_draws_invert_the_cumulative_distribution(vocab: int, draws: int, seed: int, temperature: float) -> None:
    """Token v is drawn by every uniform number from sum(p[:v]) up to sum(p[:v + 1])."""
    generator = np.random.default_rng(seed)
    logits = generator.standard_normal((3, vocab)) * 3
    uniforms = generator.random((3, draws))
    labels = sampled_labels(logits, uniforms, temperature=temperature)
    assert labels.counts_M.dtype == (np.uint8 if draws <= 255 else np.uint16)
    start = 0
    for row, probabilities in enumerate(probabilities_of(logits, temperature)):
        tokens = [next(v for v in range(vocab) if u < probabilities[: v + 1].sum()) for u in uniforms[row]]
        distinct, counts = np.unique(tokens, return_counts=True)
        end = start + int(labels.lengths_N[row])
        np.testing.assert_array_equal(labels.ids_M[start:end], distinct)
        np.testing.assert_array_equal(labels.counts_M[start:end], counts)
        start = end
    assert start == len(labels.ids_M)


def test_impossible_tokens_are_never_drawn() -> None:
    logits = np.array([[-np.inf, 0.0, -np.inf, 0.0, -np.inf]])
    uniforms = np.array([[0.0, 0.25, 0.5, np.nextafter(0.5, 0), np.nextafter(1.0, 0)]])
    labels = sampled_labels(logits, uniforms)
    assert labels.ids_M.tolist() == [1, 3]
    assert labels.counts_M.tolist() == [3, 2]


def test_the_stream_of_a_position_is_its_own() -> None:
    tokens = list(range(40))
    together = label_uniforms(7, tokens, [1, 5, 39], draws=11)
    np.testing.assert_array_equal(label_uniforms(7, tokens, [5], draws=11)[0], together[1])
    np.testing.assert_array_equal(label_uniforms(7, tokens, [39], draws=4)[0], together[2, :4])
    assert not np.isin(label_uniforms(8, tokens, [5], draws=11), together).any()
    assert not np.isin(label_uniforms(7, [*tokens, 0], [5], draws=11), together).any()
    assert len(np.unique(together)) == together.size


def test_the_stream_is_what_its_documentation_says() -> None:
    """Written again with another way to set the counter, so that labels stay the same from release to release."""
    key = hashlib.sha256((2**64 - 1).to_bytes(8, "little") + b"".join(t.to_bytes(4, "little") for t in (3, 1, 4)))
    words = np.frombuffer(key.digest()[:16], dtype="<u8")
    expected = np.random.Generator(np.random.Philox(counter=np.array([0, 0, 2, 0], dtype=np.uint64), key=words))
    np.testing.assert_array_equal(label_uniforms(2**64 - 1, [3, 1, 4], [2], draws=9)[0], expected.random(9))


def test_the_stream_is_uniform() -> None:
    uniforms = label_uniforms(3, list(range(300)), range(1, 300), draws=100).ravel()
    assert stats.kstest(uniforms, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(uniforms[:-1], uniforms[1:])[0, 1]) < 0.02


def test_counts_need_no_positions() -> None:
    labels = count_draws(np.empty((0, 5), dtype=np.int32))
    assert [len(part) for part in (labels.ids_M, labels.counts_M, labels.lengths_N)] == [0, 0, 0]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 4.0])
def test_projected_labels_are_mean_rows(temperature: float) -> None:
    generator = np.random.default_rng(0)
    logits = generator.standard_normal((4, 30_000)).astype(np.float32)
    weight = generator.standard_normal((30_000, 5)).astype(np.float16)
    bias = generator.standard_normal(30_000).astype(np.float16)
    labels = projected_labels(logits, weight, bias, temperature=temperature)
    p = probabilities_of(logits, temperature)
    np.testing.assert_allclose(labels.embedding_NS, np.einsum("nv,vs->ns", p, weight.astype(np.float64)), atol=1e-7)
    np.testing.assert_allclose(labels.bias_N, (p * bias).sum(axis=1), atol=1e-7)
