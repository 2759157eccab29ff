"""Labels that are less than the whole distribution: what they must keep of it."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from services.contract.errors import UnsupportedError
from services.contract.reference_labels import label_uniforms, sampled_labels, top_k_labels
from services.contract.soft_labels import ProjectedLabels, SampledLabels
from student_trainer.chunk_loss import DenseLabel, SampledLabel, Terms, chunk_loss, compiled_chunk_loss
from student_trainer.labels import soft_targets
from student_trainer.loss import distillation_loss
from student_trainer.output_head import OutputHead
from student_trainer.targets import FullTargets, ProjectedTargets
from tests.trainer.loss_reference import fused, gradients, projected_targets, random_case

CPU = torch.device("cpu")
VOCAB = 40


def logits_gradient(student: Tensor, targets, *, temperature: float = 1.0) -> tuple[Tensor, float]:
    """Of the soft term alone, on the student's logits [N, V]."""
    hidden = student.clone().requires_grad_()
    head = OutputHead(weight_RD=torch.eye(student.shape[1], dtype=student.dtype))
    ids = torch.zeros(len(student), dtype=torch.int64)
    options = {"token_ids_N": ids, "head": head, "vocab_size": student.shape[1]}
    whole = distillation_loss(hidden, targets=targets, alpha=1.0, temperature=temperature, **options)
    hard = distillation_loss(hidden, **options)
    (grad,) = torch.autograd.grad(whole.total - hard.total, [hidden])
    return grad, whole.soft.item()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampled_labels_are_unbiased(temperature: float) -> None:
    """4000 labels of 16 draws: each token's share, the mean loss and the mean gradient are the full distribution's."""
    generator = np.random.default_rng(3)
    teacher = generator.standard_normal(VOCAB) * 2.5
    repeats, draws = 4000, 16
    tokens = list(range(50))
    uniforms = np.concatenate(
        [label_uniforms(seed, tokens, range(1, 41), draws=draws) for seed in range(repeats // 40)]
    )
    labels = sampled_labels(np.tile(teacher, (repeats, 1)), uniforms, temperature=temperature)
    p = np.exp(teacher / temperature)
    p /= p.sum()

    shares = np.bincount(labels.ids_M, weights=labels.counts_M.astype(float), minlength=VOCAB) / (repeats * draws)
    z = (shares - p) / np.sqrt(p * (1 - p) / (repeats * draws))
    # Two-sided, over 40 tokens at once, one false alarm in a thousand.
    assert np.abs(z).max() < stats.norm.isf(1e-3 / 2 / VOCAB)
    assert stats.kstest(z, "norm").pvalue > 1e-3

    student = torch.from_numpy(generator.standard_normal(VOCAB)).expand(repeats, VOCAB)
    targets = soft_targets([labels], teacher_head=None, device=CPU)
    grad, soft = logits_gradient(student, targets, temperature=temperature)
    full = FullTargets(logprobs_NV=torch.from_numpy(np.log(np.exp(teacher) / np.exp(teacher).sum()))[None])
    exact_grad, exact_soft = logits_gradient(student[:1], full, temperature=temperature)
    log_q = torch.log_softmax(student[0] / temperature, dim=0).numpy()
    spread = temperature**2 * np.sqrt((p * log_q**2).sum() - (p * log_q).sum() ** 2)
    assert abs(soft / repeats - exact_soft) < 4 * spread / np.sqrt(repeats * draws)
    error = (grad.mean(dim=0) - exact_grad[0]).numpy() / temperature
    assert (np.abs(error) < 4.5 * np.sqrt(p * (1 - p) / (repeats * draws)) + 1e-12).all()


def test_the_gradient_of_sampled_labels_is_student_minus_frequencies() -> None:
    student = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = SampledLabels(
        ids_M=np.array([1, 4, 0], dtype=np.int32),
        counts_M=np.array([3, 1, 4], dtype=np.uint8),
        lengths_N=np.array([2, 1], dtype=np.uint16),
    )
    grad, soft = logits_gradient(student, soft_targets([labels], teacher_head=None, device=CPU))
    frequencies = torch.tensor([[0, 0.75, 0, 0, 0.25, 0], [1, 0, 0, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(grad, torch.softmax(student, dim=1) - frequencies)
    assert soft == pytest.approx(-(frequencies * torch.log_softmax(student, dim=1)).sum().item())


def test_batches_of_sampled_labels_are_joined_without_padding() -> None:
    generator = np.random.default_rng(1)
    parts = [sampled_labels(generator.standard_normal((rows, 30)), generator.random((rows, 7))) for rows in (3, 1, 4)]
    targets = soft_targets(parts, teacher_head=None, device=CPU)
    assert len(targets.ids_M) == sum(len(part.ids_M) for part in parts)
    dense = torch.zeros(8, 30, dtype=torch.float64)
    for row in range(8):
        entries = slice(targets.offsets[row], targets.offsets[row + 1])
        dense[row, targets.ids_M[entries]] = targets.weights_M[entries].double()
    torch.testing.assert_close(dense.sum(dim=1), torch.ones(8, dtype=torch.float64))
    counts = np.concatenate([part.counts_M for part in parts])
    np.testing.assert_allclose(targets.weights_M.numpy(), counts / np.float32(7))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_tail_of_top_k_labels_is_all_the_rest_of_the_distribution(temperature: float) -> None:
    """With the student's conditional tail equal to the teacher's, the ghost bucket loses nothing of the gradient."""
    generator = np.random.default_rng(5)
    teacher = generator.standard_normal((6, VOCAB)) * 3
    labels = top_k_labels(teacher, 5, temperature=temperature)
    p = np.exp(teacher / temperature)
    p /= p.sum(axis=1, keepdims=True)
    kept = np.take_along_axis(p, labels.ids_NK.astype(int), axis=1)
    np.testing.assert_allclose(labels.tail_mass_N + kept.sum(axis=1), 1.0, atol=1e-6)

    # A student that only differs on the kept tokens.
    student = teacher.copy()
    np.put_along_axis(student, labels.ids_NK.astype(int), generator.standard_normal((6, 5)), axis=1)
    exact = FullTargets(logprobs_NV=torch.log_softmax(torch.from_numpy(teacher), dim=1))
    top_k = soft_targets([labels], teacher_head=None, device=CPU)
    found, _ = logits_gradient(torch.from_numpy(student), top_k, temperature=temperature)
    expected, _ = logits_gradient(torch.from_numpy(student), exact, temperature=temperature)
    # Kept log-probabilities are float16.
    torch.testing.assert_close(found, expected, rtol=4e-3, atol=2e-3 * temperature)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_projected_labels_give_the_exact_gradient(temperature: float) -> None:
    case = random_case(4, "projected", temperature=temperature)
    logprobs = case["dense_label"].log() * temperature
    exact = fused({**case, "targets": FullTargets(logprobs_NV=logprobs)}, alpha=0.8, temperature=temperature)
    projected = fused(case, alpha=0.8, temperature=temperature)
    torch.testing.assert_close(projected[:3], exact[:3])
    torch.testing.assert_close(gradients(projected.total, case), gradients(exact.total, case))


def test_projected_labels_stay_near_float64_in_bfloat16() -> None:
    """The difference of two mean rows keeps its digits although each is large."""
    generator = torch.Generator().manual_seed(6)
    hidden64 = torch.randn(30, 16, generator=generator, dtype=torch.float64)
    weight64 = 0.3 * torch.randn(400, 16, generator=generator, dtype=torch.float64) + 1.0
    teacher = hidden64 @ weight64.T + 0.5 * torch.randn(30, 400, generator=generator, dtype=torch.float64)
    ids = torch.randint(400, (30,), generator=generator)

    def gradient(dtype: torch.dtype) -> Tensor:
        hidden = hidden64.to(dtype).float() if dtype != torch.float64 else hidden64.clone()
        hidden.requires_grad_()
        head = OutputHead(weight_RD=weight64.to(dtype))
        targets = projected_targets(
            torch.softmax(teacher, dim=1), OutputHead(weight_RD=weight64.to(dtype).double()), 400
        )
        sums = distillation_loss(
            hidden,
            token_ids_N=ids,
            head=head,
            vocab_size=400,
            targets=ProjectedTargets(embedding_ND=targets.embedding_ND.half()),
            alpha=10.0,
            matmul_dtype=dtype,
        )
        return torch.autograd.grad(sums.total, [hidden])[0].double()

    exact = gradient(torch.float64)
    assert (gradient(torch.bfloat16) - exact).norm() < 3e-2 * exact.norm()


@pytest.mark.parametrize("trained", ["weight", "bias", "cap"])
def test_projected_labels_refuse_a_head_that_is_trained_or_capped(trained: str) -> None:
    head = OutputHead(
        weight_RD=torch.randn(9, 4, requires_grad=trained == "weight"),
        bias_R=torch.zeros(9, requires_grad=trained == "bias"),
        soft_cap=30.0 if trained == "cap" else 0.0,
    )
    labels = [ProjectedLabels(embedding_NS=np.zeros((2, 4), np.float16), bias_N=np.zeros(2, np.float32))]
    with pytest.raises(UnsupportedError, match="capped" if trained == "cap" else "frozen"):
        distillation_loss(
            torch.randn(2, 4),
            token_ids_N=torch.zeros(2, dtype=torch.int64),
            head=head,
            vocab_size=9,
            targets=soft_targets(labels, teacher_head=None, device=CPU),
            alpha=1.0,
        )


@pytest.mark.parametrize("divergence", ["cross_entropy", "jsd"])
def test_the_compiled_chunk_gives_what_the_plain_one_gives(divergence: str) -> None:
    """Traced as for a GPU, without generating code; the number of positions may vary."""
    terms = Terms(
        alpha=0.5,
        temperature=2.0,
        logit_scale=0.5,
        soft_cap=3.0,
        dtype=torch.float32,
        grad_dtype=torch.bfloat16,
        divergence=divergence,
        observed=True,
    )
    compiled = compiled_chunk_loss(terms, backend="aot_eager")
    generator = torch.Generator().manual_seed(0)
    for positions in (8, 5, 3):
        products = torch.randn(positions, 50, generator=generator).bfloat16()
        bias = torch.randn(50, generator=generator)
        ids = torch.randint(50, (positions,), generator=generator)
        label = DenseLabel(torch.randn(positions, 50, generator=generator))
        plain = chunk_loss(products.clone(), bias, ids, label, terms=terms)
        torch.testing.assert_close(compiled(products.clone(), bias, ids, label), plain)


def test_a_token_drawn_in_two_rows_counts_in_both() -> None:
    terms = Terms(
        alpha=1.0,
        temperature=1.0,
        logit_scale=1.0,
        soft_cap=0.0,
        dtype=torch.float64,
        grad_dtype=torch.float64,
    )
    logits = torch.zeros(2, 4, dtype=torch.float64)
    label = SampledLabel(torch.tensor([0, 1]), torch.tensor([2, 2]), torch.ones(2, dtype=torch.float64))
    _, soft, grad, _ = chunk_loss(logits, None, torch.tensor([0, 1]), label, terms=terms)
    np.testing.assert_allclose(soft.numpy(), np.log([4.0, 4.0]))
    expected = 2 * np.full((2, 4), 0.25)
    expected[:, 2] -= 1
    expected[[0, 1], [0, 1]] -= 1
    np.testing.assert_allclose(grad.numpy(), expected)
