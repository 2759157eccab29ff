"""Named divergences against autograd, and against what is known of their ends."""

import math

import pytest
import torch
from torch import Tensor

from student_trainer.loss import distillation_loss
from student_trainer.output_head import OutputHead
from student_trainer.targets import FullTargets
from tests.trainer.loss_reference import fused, gradients, random_case, reference_of


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum()


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    log_m = torch.log(beta * log_p.exp() + (1 - beta) * log_q.exp())
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


DIVERGENCES = {
    "forward_kl": (lambda log_p, log_q: kl(log_p, log_q), {}),
    "reverse_kl": (lambda log_p, log_q: kl(log_q, log_p), {}),
    "jsd 0.5": (lambda log_p, log_q: jsd(log_p, log_q, 0.5), {"beta": 0.5}),
    "jsd 0.1": (lambda log_p, log_q: jsd(log_p, log_q, 0.1), {"beta": 0.1}),
    "jsd 0.9": (lambda log_p, log_q: jsd(log_p, log_q, 0.9), {"beta": 0.9}),
}


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("kind", ["exact", "full"])
@pytest.mark.parametrize(("alpha", "temperature"), [(1.0, 1.0), (0.1, 2.0), (10.0, 0.5)])
@pytest.mark.parametrize("seed", range(6))
def test_values_and_gradients_equal_plain_autograd(
    name: str, kind: str, alpha: float, temperature: float, seed: int
) -> None:
    divergence, options = DIVERGENCES[name]
    case = random_case(seed, kind, temperature=temperature)
    sums = fused(case, alpha=alpha, temperature=temperature, divergence=name.split()[0], **options)
    expected = reference_of(case, alpha=alpha, temperature=temperature, divergence=divergence)
    torch.testing.assert_close(torch.stack(sums[:3]), torch.stack(expected).detach().double(), rtol=1e-9, atol=1e-9)
    for actual, wanted in zip(gradients(sums.total, case), gradients(expected[0], case), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_the_chunk_size_changes_nothing(name: str) -> None:
    case = random_case(5, "exact", temperature=1.5)
    results = []
    for chunk_size in (1, 2, 5, 1000):
        sums = fused(case, alpha=0.7, temperature=1.5, chunk_size=chunk_size, divergence=name, beta=0.3)
        results.append([sums.total, sums.hard, sums.soft, *gradients(sums.total, case)])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-12, atol=1e-12)


def soft_loss_of(student: Tensor, teacher: Tensor, divergence: str, **options: float) -> tuple[float, Tensor]:
    """Value, and gradient on the logits, of the soft term alone."""
    hidden = student.clone().requires_grad_()
    ids = torch.zeros(len(student), dtype=torch.int64)
    size = student.shape[1]
    arguments = {"token_ids_N": ids, "head": OutputHead(weight_RD=torch.eye(size, dtype=student.dtype))}
    targets = FullTargets(logprobs_NV=teacher)
    with_soft = distillation_loss(
        hidden, vocab_size=size, targets=targets, alpha=1.0, divergence=divergence, **options, **arguments
    )
    hard = distillation_loss(hidden, vocab_size=size, **arguments)
    (grad,) = torch.autograd.grad(with_soft.total - hard.total, [hidden])
    return with_soft.soft.item(), grad


def test_a_student_that_equals_its_teacher_is_at_rest() -> None:
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name in ("forward_kl", "reverse_kl", "jsd"):
        value, grad = soft_loss_of(logits, logits + 3.0, name)
        assert abs(value) < 1e-12
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("beta", "limit"), [(1e-6, "forward_kl"), (1 - 1e-6, "reverse_kl")])
def test_jsd_tends_to_the_two_kl_divergences(beta: float, limit: str) -> None:
    """Divided by beta, or by 1 - beta, as GKD says below its equation 1."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(2, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = min(beta, 1 - beta)
    value, grad = soft_loss_of(student, teacher, "jsd", beta=beta)
    expected_value, expected_grad = soft_loss_of(student, teacher, limit)
    assert value / weight == pytest.approx(expected_value, rel=1e-4)
    torch.testing.assert_close(grad / weight, expected_grad, rtol=1e-3, atol=1e-5)


def test_tokens_that_only_the_student_can_say_cost_a_bounded_jsd() -> None:
    student = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, 0.0, -math.inf]], dtype=torch.float64)
    value, grad = soft_loss_of(student, teacher, "jsd")
    assert 0 < value <= math.log(2)
    assert torch.isfinite(grad).all()
    value, grad = soft_loss_of(student, teacher, "forward_kl")
    assert math.isfinite(value)
    assert torch.isfinite(grad).all()
    # The reverse divergence truly is infinite there, which stops a run aloud instead of training on it.
    assert soft_loss_of(student, teacher, "reverse_kl")[0] == math.inf


def test_forward_kl_is_the_paper_loss_less_a_constant() -> None:
    generator = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(4, 30, generator=generator, dtype=torch.float64) for _ in range(2))
    p = torch.softmax(teacher, dim=1)
    cross, cross_grad = soft_loss_of(student, teacher, "cross_entropy")
    forward, forward_grad = soft_loss_of(student, teacher, "forward_kl")
    assert cross - forward == pytest.approx(-(p * p.log()).sum().item())
    torch.testing.assert_close(forward_grad, cross_grad)
