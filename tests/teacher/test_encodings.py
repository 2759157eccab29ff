"""Sampled and projected labels as students get them, against transformers' own distributions."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from services.contract.errors import LabelMismatchError
from services.contract.lm_head import LmHead
from services.contract.reference_labels import label_uniforms, projected_labels, sampled_labels
from services.contract.sequences import LabelOptions, TokenSequence
from services.contract.soft_labels import ProjectedLabels, SampledLabels, ScoredSequence, hash_sequence
from services.models import head_product
from student_trainer.alignment import check_scored, verify_token_logprobs
from student_trainer.student_head import StudentHead
from student_trainer.teacher_client import TeacherClient
from teacher_server.server import TeacherOptions
from tests.teacher.serving import running_teacher
from tests.teacher.test_exactness import reference_logprobs, token_column

WIDTH = 24


def student_head(vocab_size: int, *, seed: int = 0, bias: bool = False, dtype: object = np.float32) -> LmHead:
    generator = np.random.default_rng(seed)
    return LmHead(
        weight_VD=generator.standard_normal((vocab_size, WIDTH)).astype(dtype),
        bias_V=generator.standard_normal(vocab_size).astype(dtype) if bias else None,
    )


def by_id(scored: list[ScoredSequence]) -> dict[str, ScoredSequence]:
    return {each.id: each for each in scored}


def drawn(labels: SampledLabels) -> list[list[tuple[int, int]]]:
    """Tokens and counts of each position."""
    ends = labels.lengths_N.cumsum()
    pairs = list(zip(labels.ids_M.tolist(), labels.counts_M.tolist(), strict=True))
    return [pairs[end - length : end] for end, length in zip(ends, labels.lengths_N, strict=True)]


@pytest.mark.parametrize(("draws", "temperature"), [(50, 1.0), (700, 2.5)])
def test_draws_follow_the_models_own_distribution(
    draws: int,
    temperature: float,
    model_of: Callable[[str], Path],
    tiny_teacher: TeacherClient,
    sequences: list[TokenSequence],
) -> None:
    """The same uniform numbers through transformers' distribution give the same tokens, but where two of them meet
    within the rounding of float32 logits.
    """
    options = LabelOptions(encoding="sampled", draws=draws, seed=9, temperature=temperature)
    moved = total = 0
    for scored in tiny_teacher.score(sequences, options):
        sequence = next(sequence for sequence in sequences if sequence.id == scored.id)
        logprobs = reference_logprobs(model_of("llama-padded"), sequence)
        uniforms = label_uniforms(9, sequence.token_ids, sequence.label_positions, draws=draws)
        expected = sampled_labels(logprobs, uniforms, temperature=temperature)
        assert scored.labels.counts_M.dtype == (np.uint8 if draws <= 255 else np.uint16)
        for found_row, expected_row in zip(drawn(scored.labels), drawn(expected), strict=True):
            total += draws
            moved += sum(abs(count - dict(expected_row).get(token, 0)) for token, count in found_row)
        np.testing.assert_allclose(scored.token_logprobs_P, logprobs[token_column(sequence)], atol=1e-5)
        assert verify_token_logprobs(scored, sequence) == 0.0
    assert moved <= 1e-3 * total


def test_the_same_seed_gives_the_same_draws_whatever_else_is_asked(
    mock_teacher: TeacherClient, sequences: list[TokenSequence]
) -> None:
    options = LabelOptions(encoding="sampled", draws=20, seed=1)
    together = by_id(list(mock_teacher.score(sequences, options)))
    sequence = sequences[-1]
    (alone,) = mock_teacher.score([replace(sequence, label_positions=sequence.label_positions[3:9])], options)
    assert drawn(alone.labels) == drawn(together[sequence.id].labels)[3:9]
    (other,) = mock_teacher.score([sequence], replace(options, seed=2))
    assert drawn(other.labels) != drawn(together[sequence.id].labels)


def test_engines_draw_from_one_stream(tiny_model: Path, sequences: list[TokenSequence]) -> None:
    """The mock, bit for bit: exact labels through the head, then the reference."""
    options = LabelOptions(encoding="sampled", draws=300, seed=5, temperature=0.7)
    mock = TeacherOptions(model=str(tiny_model), engine="mock", port=0, label_dtype="float32")
    with running_teacher(mock) as address, TeacherClient(address) as client:
        head = client.fetch_lm_head()
        exact = by_id(list(client.score(sequences)))
        scored = by_id(list(client.score(sequences, options)))
    for sequence in sequences:
        uniforms = label_uniforms(5, sequence.token_ids, sequence.label_positions, draws=300)
        logits = head.logits(exact[sequence.id].labels.hidden_ND)
        expected = sampled_labels(logits, uniforms, temperature=0.7)
        assert drawn(scored[sequence.id].labels) == drawn(expected)


@pytest.mark.parametrize("name", ["llama-padded", "phi-bias", "gemma2-soft-cap"])
@pytest.mark.parametrize("label_dtype", ["auto", "float32"])
def test_projected_labels_are_the_mean_of_the_students_rows(
    name: str,
    label_dtype: str,
    model_of: Callable[[str], Path],
    sequences: list[TokenSequence],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # So small that the head is several blocks, the last of them shorter.
    monkeypatch.setattr(head_product, "_BLOCK_ELEMENTS", 1_000)
    model = model_of(name)
    options = TeacherOptions(model=str(model), engine="transformers", port=0, label_dtype=label_dtype)
    with running_teacher(options) as address, TeacherClient(address) as client:
        vocab_size = client.describe().vocab_size
        for bias, temperature, dtype in ((False, 1.0, np.float32), (True, 3.0, ml_dtypes.bfloat16)):
            head = student_head(vocab_size, bias=bias, dtype=dtype)
            how = LabelOptions(
                encoding="projected", student_head=client.use_student_head(head), temperature=temperature
            )
            for scored in client.score(sequences, how):
                sequence = next(sequence for sequence in sequences if sequence.id == scored.id)
                logprobs = reference_logprobs(model, sequence)
                expected = projected_labels(logprobs, head.weight_VD, head.bias_V, temperature=temperature)
                labels = scored.labels
                assert labels.embedding_NS.dtype == (np.float32 if label_dtype == "float32" else np.float16)
                tolerance = {"atol": 1e-5} if label_dtype == "float32" else {"atol": 1e-5, "rtol": 2.0**-11}
                np.testing.assert_allclose(
                    labels.embedding_NS.astype(np.float64), expected.embedding_NS, **{"rtol": 0, **tolerance}
                )
                assert (labels.bias_N is None) == (not bias)
                if bias:
                    np.testing.assert_allclose(labels.bias_N, expected.bias_N, atol=1e-5)


def test_labels_without_positions_have_their_shapes(mock_teacher: TeacherClient) -> None:
    sequence = TokenSequence(id="prompt only", token_ids=[5, 6, 7], label_positions=[])
    (labels,) = mock_teacher.score([sequence], LabelOptions(encoding="sampled", draws=3))
    assert len(labels.labels.ids_M) == 0
    head = student_head(mock_teacher.describe().vocab_size)
    options = LabelOptions(encoding="projected", student_head=mock_teacher.use_student_head(head))
    (labels,) = mock_teacher.score([sequence], options)
    assert labels.labels.embedding_NS.shape == (0, WIDTH)


def scored_with(labels: SampledLabels | ProjectedLabels, sequence: TokenSequence) -> ScoredSequence:
    return ScoredSequence(
        id=sequence.id,
        sequence_hash=hash_sequence(sequence.token_ids, sequence.label_positions),
        token_logprobs_P=np.zeros(len(sequence.label_positions), dtype=np.float32),
        labels=labels,
    )


SEQUENCE = TokenSequence(id="s", token_ids=[1, 2, 3], label_positions=[1, 2])
DRAWS_OF_4 = {
    "right": ([0, 9, 3], [3, 1, 4], [2, 1], None),
    "too few draws": ([0, 9, 3], [3, 1, 3], [2, 1], "not 4 draws"),
    "too many draws": ([0, 9, 3], [3, 2, 4], [2, 1], "not 4 draws"),
    "a position without any": ([0, 9], [3, 1], [2, 0], "not 4 draws"),
    "a count of 0": ([0, 5, 9, 3], [3, 0, 1, 4], [3, 1], "not 4 draws"),
    "a token twice": ([9, 9, 3], [3, 1, 4], [2, 1], "not 4 draws"),
    "beyond the vocabulary": ([0, 10, 3], [3, 1, 4], [2, 1], "outside 0 to 9"),
    "a negative token": ([-1, 9, 3], [3, 1, 4], [2, 1], "outside 0 to 9"),
    "positions missing": ([0, 9], [3, 1], [2], "shapes"),
}


@pytest.mark.parametrize("case", DRAWS_OF_4)
def test_draws_are_checked_on_arrival(case: str) -> None:
    ids, counts, lengths, words = DRAWS_OF_4[case]
    labels = SampledLabels(
        ids_M=np.array(ids, dtype=np.int32),
        counts_M=np.array(counts, dtype=np.uint8),
        lengths_N=np.array(lengths, dtype=np.uint16),
    )
    options = LabelOptions(encoding="sampled", draws=4)
    arguments = {"options": options, "vocab_size": 10, "hidden_size": 4}
    if words is None:
        check_scored(scored_with(labels, SEQUENCE), SEQUENCE, **arguments)
        return
    with pytest.raises(LabelMismatchError, match=words):
        check_scored(scored_with(labels, SEQUENCE), SEQUENCE, **arguments)


def test_means_are_checked_against_the_bounds_of_the_rows() -> None:
    head = StudentHead(student_head(10))
    options = LabelOptions(encoding="projected", student_head=head.fingerprint)
    arguments = {"options": options, "vocab_size": 10, "hidden_size": 4, "student_head": head}
    rows = head.head.weight_VD
    good = np.stack([rows[3], rows.mean(axis=0)]).astype(np.float16)
    check_scored(scored_with(ProjectedLabels(embedding_NS=good), SEQUENCE), SEQUENCE, **arguments)
    bad = good.copy()
    bad[1, 7] = rows[:, 7].max() + 0.01
    with pytest.raises(LabelMismatchError, match="no means of the rows"):
        check_scored(scored_with(ProjectedLabels(embedding_NS=bad), SEQUENCE), SEQUENCE, **arguments)
    for wrong in (
        ProjectedLabels(embedding_NS=good[:, :5]),
        ProjectedLabels(embedding_NS=good, bias_N=np.zeros(2, dtype=np.float32)),
    ):
        with pytest.raises(LabelMismatchError, match="shapes"):
            check_scored(scored_with(wrong, SEQUENCE), SEQUENCE, **arguments)
