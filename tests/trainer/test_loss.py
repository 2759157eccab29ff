"""The fused loss against plain autograd in float64, term by term."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from student_trainer.loss import distillation_loss
from student_trainer.output_head import OutputHead
from student_trainer.targets import ExactTargets, FullTargets, TopKTargets
from tests.largest_tensor import LargestTensor
from tests.trainer.loss_reference import (
    KINDS,
    fused,
    gradients,
    plain_logits,
    random_case,
    reference_of,
    top_k_targets,
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 1.0), (1.0, 1.0), (0.1, 2.0), (10.0, 0.5)])
@pytest.mark.parametrize("seed", range(12))
def test_values_and_gradients_equal_plain_autograd(kind: str, alpha: float, temperature: float, seed: int) -> None:
    case = random_case(seed, kind, temperature=temperature)
    sums = fused(case, alpha=alpha, temperature=temperature)
    expected = reference_of(case, alpha=alpha, temperature=temperature, dense_label=case["dense_label"])
    torch.testing.assert_close(torch.stack(sums[:3]), torch.stack(expected).detach().double(), rtol=1e-9, atol=1e-9)
    assert sums.tokens == len(case["token_ids"])
    # A divisor outside, as the trainer's, must reach every gradient.
    mine, theirs = gradients(sums.total / 7, case), gradients(expected[0] / 7, case)
    for actual, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-9)
    if kind != "projected":
        padding = mine[1][case["vocab_size"] :]
        assert torch.equal(padding, torch.zeros_like(padding))


@pytest.mark.parametrize("kind", KINDS)
def test_the_chunk_size_changes_nothing(kind: str) -> None:
    case = random_case(5, kind, temperature=1.5)
    results = []
    for chunk_size in (1, 2, 5, 16, 1000):
        sums = fused(case, alpha=0.7, temperature=1.5, chunk_size=chunk_size)
        results.append([sums.total, sums.hard, sums.soft, *gradients(sums.total, case)])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-12, atol=1e-12)


def test_top_k_of_the_whole_vocabulary_equals_full() -> None:
    case = random_case(3, "full", temperature=1.0)
    whole = top_k_targets(case["targets"].logprobs_NV, case["vocab_size"], 1.0)
    of_full = fused(case, alpha=2.0, temperature=1.0)
    of_top_k = fused({**case, "targets": whole}, alpha=2.0, temperature=1.0)
    torch.testing.assert_close(of_top_k[:3], of_full[:3])
    torch.testing.assert_close(gradients(of_top_k.total, case), gradients(of_full.total, case))


def test_exact_and_full_labels_of_one_teacher_agree() -> None:
    case = random_case(8, "exact", temperature=2.0)
    logits = plain_logits(case["targets"].hidden_NE, case["targets"].head, case["vocab_size"]).detach()
    full = FullTargets(logprobs_NV=torch.log_softmax(logits, dim=1))
    exact = fused(case, alpha=1.0, temperature=2.0)
    torch.testing.assert_close(fused({**case, "targets": full}, alpha=1.0, temperature=2.0)[:3], exact[:3])


def test_the_ghost_bucket_keeps_the_tail_mass() -> None:
    """The gradient on the logits is q - p on the support and q_j (P_K - Q_K) / (1 - Q_K) off it."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(1, 20, generator=generator, dtype=torch.float64)
    targets = top_k_targets(torch.randn(1, 20, generator=generator, dtype=torch.float64), 4, 1.0)
    hidden = student.clone().requires_grad_()
    head = OutputHead(weight_RD=torch.eye(20, dtype=torch.float64))
    ids = torch.zeros(1, dtype=torch.int64)
    sums = distillation_loss(hidden, token_ids_N=ids, head=head, vocab_size=20, targets=targets, alpha=1.0)
    (grad,) = torch.autograd.grad(sums.total, [hidden])

    q = torch.softmax(student, dim=1)[0]
    onehot = torch.nn.functional.one_hot(ids, 20)[0]
    kept = targets.ids_NK[0]
    p = targets.logprobs_NK[0].exp()
    mass, student_mass = p.sum(), q[kept].sum()
    expected = q * (mass - student_mass) / (1 - student_mass)
    expected[kept] = q[kept] - p
    torch.testing.assert_close(grad[0] - (q - onehot), expected)


def test_a_vanishing_tail_has_no_bucket() -> None:
    """A student that is certain leaves exp(-200) for the tail, whose logarithm must not enter at mass 1e-7."""
    hidden = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    targets = TopKTargets(
        ids_NK=torch.tensor([[0]]), logprobs_NK=torch.tensor([[0.0]]), tail_mass_N=torch.tensor([1e-7])
    )
    sums = distillation_loss(
        hidden,
        token_ids_N=torch.tensor([0]),
        head=OutputHead(weight_RD=torch.eye(3)),
        vocab_size=3,
        targets=targets,
        alpha=1.0,
    )
    sums.total.backward()
    assert sums.soft.item() == 0.0
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, torch.zeros(1, 3))


def test_large_logits_stay_finite_in_float32() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = (300 * torch.randn(6, 4, generator=generator)).requires_grad_()
    head = OutputHead(weight_RD=torch.randn(50, 4, generator=generator).requires_grad_())
    targets = top_k_targets(300 * torch.randn(6, 50, generator=generator), 5, 1.0)
    ids = torch.arange(6)
    sums = distillation_loss(hidden, token_ids_N=ids, head=head, vocab_size=50, targets=targets, alpha=1.0)
    sums.total.backward()
    assert math.isfinite(sums.total.item())
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(head.weight_RD.grad).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_lower_precision_stays_near_float64(dtype: torch.dtype, tolerance: float) -> None:
    """Relative error of each gradient's norm, hidden states and heads rounded to the precision."""
    generator = torch.Generator().manual_seed(2)
    hidden64 = torch.randn(40, 16, generator=generator, dtype=torch.float64)
    weight64 = 0.3 * torch.randn(500, 16, generator=generator, dtype=torch.float64)
    states64 = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    teacher64 = 0.3 * torch.randn(500, 12, generator=generator, dtype=torch.float64)
    ids = torch.randint(500, (40,), generator=generator)

    def run(dtype: torch.dtype, matmul_dtype: torch.dtype | None) -> tuple[Tensor, list[Tensor]]:
        hidden, weight = hidden64.to(dtype).requires_grad_(), weight64.to(dtype).requires_grad_()
        targets = ExactTargets(hidden_NE=states64.to(dtype), head=OutputHead(weight_RD=teacher64.to(dtype)))
        sums = distillation_loss(
            hidden,
            token_ids_N=ids,
            head=OutputHead(weight_RD=weight),
            vocab_size=500,
            targets=targets,
            alpha=1.0,
            chunk_size=7,
            matmul_dtype=matmul_dtype,
        )
        return sums.total.detach(), [grad.double() for grad in torch.autograd.grad(sums.total, [hidden, weight])]

    value, grads = run(torch.float64, None)
    for low_value, low_grads in (run(dtype, None), run(torch.float32, dtype)):
        assert abs(low_value - value) / value < tolerance
        for low, exact in zip(low_grads, grads, strict=True):
            assert (low - exact).norm() / exact.norm() < tolerance


def test_sft_equals_the_model_own_loss(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (3, 12), generator=generator)
    labels = ids.clone()
    labels[0, :4] = labels[1, :7] = labels[1, 10:] = labels[2, :2] = -100
    theirs = model(input_ids=ids, labels=labels).loss
    theirs.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    hidden = model.model(input_ids=ids).last_hidden_state
    wanted = labels[:, 1:] != -100
    sums = distillation_loss(
        hidden[:, :-1][wanted],
        token_ids_N=ids[:, 1:][wanted],
        head=OutputHead(weight_RD=model.lm_head.weight),
        vocab_size=model.config.vocab_size,
    )
    mine = sums.total / sums.tokens
    mine.backward()
    torch.testing.assert_close(mine, theirs)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_no_tensor_of_all_positions_by_the_vocabulary_is_made() -> None:
    """The largest tensor that any operation returns is one chunk's logits, forward and backward."""
    positions, vocab_size, chunk = 256, 1000, 8
    hidden = torch.randn(positions, 4, requires_grad=True)
    weight = torch.randn(vocab_size, 4, requires_grad=True)
    targets = ExactTargets(hidden_NE=torch.randn(positions, 6), head=OutputHead(weight_RD=torch.randn(vocab_size, 6)))
    with LargestTensor() as made:
        sums = distillation_loss(
            hidden,
            token_ids_N=torch.zeros(positions, dtype=torch.int64),
            head=OutputHead(weight_RD=weight),
            vocab_size=vocab_size,
            targets=targets,
            alpha=1.0,
            chunk_size=chunk,
        )
        sums.total.backward()
    assert made.elements == chunk * vocab_size


def test_no_positions_cost_nothing() -> None:
    hidden = torch.zeros(0, 4, requires_grad=True)
    sums = distillation_loss(
        hidden,
        token_ids_N=torch.zeros(0, dtype=torch.int64),
        head=OutputHead(weight_RD=torch.randn(9, 4)),
        vocab_size=9,
    )
    sums.total.backward()
    assert sums.total.item() == 0.0
    assert sums.tokens == 0
