"""Labels against what transformers itself computes, through a real server, for heads of every kind."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.contract.sequences import LabelOptions, TokenSequence
from services.contract.soft_labels import ScoredSequence, checked_positions, log_softmax
from student_trainer.alignment import verify_token_logprobs
from student_trainer.teacher_client import TeacherClient
from teacher_server.server import TeacherOptions
from tests.teacher.models import ARCHITECTURES
from tests.teacher.serving import running_teacher


def reference_logprobs(model: Path, sequence: TokenSequence) -> np.ndarray:
    """Float64 [N, V] from transformers' own logits, without padding rows."""
    vocab_size = len(AutoTokenizer.from_pretrained(model))
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(model)(torch.tensor([sequence.token_ids])).logits[0]
    rows = np.array(sequence.label_positions) - 1
    return log_softmax(logits[rows, :vocab_size].double().numpy())


def token_column(sequence: TokenSequence) -> tuple[np.ndarray, np.ndarray]:
    positions = np.array(sequence.label_positions)
    return np.arange(len(positions)), np.array(sequence.token_ids)[positions]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_exact_labels_and_head_give_the_models_own_distribution(
    name: str, model_of: Callable[[str], Path], sequences: list[TokenSequence]
) -> None:
    model = model_of(name)
    # Bloom names no longest sequence.
    options = TeacherOptions(model=str(model), engine="transformers", port=0, label_dtype="float32", max_length=256)
    with running_teacher(options) as address, TeacherClient(address) as client:
        head = client.fetch_lm_head()
        scored = {label.id: label for label in client.score(sequences)}
    assert len(scored) == len(sequences)
    for sequence in sequences:
        expected = reference_logprobs(model, sequence)
        labels = scored[sequence.id]
        found = log_softmax(head.logits(labels.labels.hidden_ND))
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=1e-5)
        checked = expected[token_column(sequence)][checked_positions(len(expected), "exact")]
        np.testing.assert_allclose(labels.token_logprobs_P, checked, atol=1e-5)
        assert verify_token_logprobs(labels, sequence, head=head) < 1e-4


def test_bfloat16_labels_stay_close(model_of: Callable[[str], Path], sequences: list[TokenSequence]) -> None:
    model = model_of("llama-padded")
    with (
        running_teacher(TeacherOptions(model=str(model), engine="transformers", port=0)) as address,
        TeacherClient(address) as client,
    ):
        head = client.fetch_lm_head()
        for labels in client.score(sequences):
            sequence = next(sequence for sequence in sequences if sequence.id == labels.id)
            assert str(labels.labels.hidden_ND.dtype) == "bfloat16"
            expected = reference_logprobs(model, sequence)
            found = log_softmax(head.logits(labels.labels.hidden_ND))
            divergence = (np.exp(expected) * (expected - found)).sum(axis=1)
            # Logits here spread over 3.4 nats; rounding states to 8 bits moves each by about 0.007.
            assert divergence.mean() < 1e-4
            assert np.abs(found - expected).max() < 0.05
            # The log-probabilities of the actual tokens are computed before anything is rounded.
            checked = expected[token_column(sequence)][checked_positions(len(expected), "exact")]
            np.testing.assert_allclose(labels.token_logprobs_P, checked, atol=1e-5)
            verify_token_logprobs(labels, sequence, head=head)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_top_k_keeps_the_likeliest_and_the_exact_tail(
    temperature: float, model_of: Callable[[str], Path], tiny_teacher: TeacherClient, sequences: list[TokenSequence]
) -> None:
    options = LabelOptions(encoding="top_k", k=17, temperature=temperature)
    for labels in tiny_teacher.score(sequences, options):
        sequence = next(sequence for sequence in sequences if sequence.id == labels.id)
        logprobs = log_softmax(reference_logprobs(model_of("llama-padded"), sequence), temperature=temperature)
        order = np.argsort(-logprobs, axis=1)
        kept = np.take_along_axis(logprobs, labels.labels.ids_NK.astype(int), axis=1)
        np.testing.assert_allclose(kept, np.take_along_axis(logprobs, order[:, :17], axis=1), atol=1e-5)
        np.testing.assert_allclose(labels.labels.logprobs_NK, kept, atol=4e-3)
        tail = np.exp(np.take_along_axis(logprobs, order[:, 17:], axis=1)).sum(axis=1)
        np.testing.assert_allclose(labels.labels.tail_mass_N, tail, rtol=1e-5)
        verify_token_logprobs(labels, sequence, temperature=temperature)


def test_a_small_tail_keeps_its_digits(tiny_model: Path) -> None:
    from teacher_server.torch_head import _top_k

    logits = torch.tensor([[30.0, 5.0, 4.0, 3.0]])
    _, _, tail = _top_k(logits, LabelOptions(encoding="top_k", k=2))
    expected = np.exp([4.0 - 30.0, 3.0 - 30.0]).sum() / (1 + np.exp([-25.0, -26.0, -27.0]).sum())
    np.testing.assert_allclose(tail.numpy(), [expected], rtol=1e-6)


def test_full_labels_are_the_distribution(
    model_of: Callable[[str], Path], tiny_teacher: TeacherClient, sequences: list[TokenSequence]
) -> None:
    for labels in tiny_teacher.score(sequences, LabelOptions(encoding="full")):
        sequence = next(sequence for sequence in sequences if sequence.id == labels.id)
        expected = reference_logprobs(model_of("llama-padded"), sequence)
        np.testing.assert_allclose(labels.labels.logprobs_NV, expected, atol=1e-2)
        verify_token_logprobs(labels, sequence)


def test_labels_do_not_depend_on_what_shares_the_batch(
    tiny_teacher: TeacherClient, sequences: list[TokenSequence]
) -> None:
    together = {labels.id: labels for labels in tiny_teacher.score(sequences)}
    for sequence in sequences:
        (alone,) = tiny_teacher.score([sequence])
        np.testing.assert_allclose(alone.labels.hidden_ND, together[sequence.id].labels.hidden_ND, atol=1e-5)


def test_a_16_bit_teacher_sends_its_states_unrounded(
    model_of: Callable[[str], Path], sequences: list[TokenSequence]
) -> None:
    options = TeacherOptions(model=str(model_of("llama-untied")), engine="transformers", dtype="float16", port=0)
    with running_teacher(options) as address, TeacherClient(address) as client:
        head = client.fetch_lm_head()
        assert head.weight_VD.dtype == np.float16
        for labels in client.score(sequences):
            assert labels.labels.hidden_ND.dtype == np.float16
            sequence = next(sequence for sequence in sequences if sequence.id == labels.id)
            # Nothing lies between what the teacher computed and what arrives, except the order of sums.
            assert verify_token_logprobs(labels, sequence, head=head) < 1e-4


def test_a_sequence_without_label_positions_gets_no_labels(tiny_teacher: TeacherClient) -> None:
    sequence = TokenSequence(id="prompt only", token_ids=[5, 6, 7], label_positions=[])
    for encoding, k in (("exact", 0), ("top_k", 4), ("full", 0)):
        (labels,) = tiny_teacher.score([sequence], LabelOptions(encoding=encoding, k=k))
        assert isinstance(labels, ScoredSequence)
        assert labels.token_logprobs_P.shape == (0,)
