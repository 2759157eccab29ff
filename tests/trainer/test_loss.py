"""The fused loss against plain autograd in float64, term by term."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from student_trainer.loss import distillation_loss
from student_trainer.output_head import OutputHead
from student_trainer.targets import ExactTargets, FullTargets, TopKTargets


def plain_logits(hidden: Tensor, head: OutputHead, vocab_size: int) -> Tensor:
    raw = hidden @ head.weight_RD[:vocab_size].T
    if head.bias_R is not None:
        raw = raw + head.bias_R[:vocab_size]
    raw = raw * head.logit_scale
    return head.soft_cap * torch.tanh(raw / head.soft_cap) if head.soft_cap else raw


def reference(hidden, *, token_ids, head, vocab_size, targets, alpha, temperature) -> tuple[Tensor, Tensor, Tensor]:
    """Equations 1 to 3 of the paper as tutorials write them, on dense logits."""
    logits = plain_logits(hidden, head, vocab_size)
    hard = torch.nn.functional.cross_entropy(logits, token_ids, reduction="sum")
    log_q = torch.log_softmax(logits / temperature, dim=1)
    if targets is None:
        soft = torch.zeros(())
    elif isinstance(targets, TopKTargets):
        soft = torch.zeros((), dtype=hidden.dtype)
        for row in range(len(hidden)):
            kept = targets.ids_NK[row]
            p = targets.logprobs_NK[row].exp()
            soft = soft - (p * log_q[row, kept]).sum()
            tail = targets.tail_mass_N[row]
            if tail >= 1e-6:
                others = torch.ones(vocab_size, dtype=torch.bool)
                others[kept] = False
                soft = soft - tail * torch.log(log_q[row, others].exp().sum())
    else:
        if isinstance(targets, ExactTargets):
            scores = plain_logits(targets.hidden_NE, targets.head, vocab_size)
        else:
            scores = targets.logprobs_NV
        soft = -(torch.softmax(scores / temperature, dim=1) * log_q).sum()
    soft = soft * temperature**2
    return hard + alpha * soft, hard, soft


def random_head(rows: int, size: int, *, generator: torch.Generator, bias: bool, scale=1.0, cap=0.0) -> OutputHead:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return OutputHead(
        weight_RD=draw(rows, size).requires_grad_(),
        bias_R=draw(rows).requires_grad_() if bias else None,
        logit_scale=scale,
        soft_cap=cap,
    )


def top_k_targets(logits: Tensor, k: int, temperature: float) -> TopKTargets:
    logprobs = torch.log_softmax(logits / temperature, dim=1)
    kept, ids = logprobs.topk(k, dim=1)
    tail = logprobs.exp().scatter(1, ids, 0.0).sum(dim=1)
    return TopKTargets(ids_NK=ids, logprobs_NK=kept, tail_mass_N=tail)


def random_case(seed: int, kind: str, *, temperature: float) -> dict:
    """Random sizes, padding rows, biases, scales and caps, on both sides."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*options):
        return options[int(torch.randint(len(options), (), generator=generator))]

    positions, hidden_size, teacher_size = pick(1, 5, 17), pick(3, 8), pick(4, 6)
    vocab_size = pick(11, 29)
    head = random_head(
        vocab_size + pick(0, 7),
        hidden_size,
        generator=generator,
        bias=pick(True, False),
        scale=pick(1.0, 0.25),
        cap=pick(0.0, 2.0),
    )
    teacher_head = random_head(
        vocab_size + pick(0, 5),
        teacher_size,
        generator=generator,
        bias=pick(True, False),
        scale=pick(1.0, 3.0),
        cap=pick(0.0, 5.0),
    )
    hidden = torch.randn(positions, hidden_size, generator=generator, dtype=torch.float64).requires_grad_()
    states = torch.randn(positions, teacher_size, generator=generator, dtype=torch.float64)
    teacher_logits = plain_logits(states, teacher_head, vocab_size).detach()
    targets = {
        "none": lambda: None,
        "exact": lambda: ExactTargets(hidden_NE=states, head=teacher_head),
        "full": lambda: FullTargets(logprobs_NV=torch.log_softmax(teacher_logits, dim=1)),
        "top_k": lambda: top_k_targets(teacher_logits, pick(1, 4, 10), temperature),
    }[kind]()
    return {
        "hidden": hidden,
        "token_ids": torch.randint(vocab_size, (positions,), generator=generator),
        "head": head,
        "vocab_size": vocab_size,
        "targets": targets,
        "chunk_size": pick(1, 3, 100),
    }


def fused(case: dict, *, alpha: float, temperature: float, chunk_size: int | None = None):
    return distillation_loss(
        case["hidden"],
        token_ids_N=case["token_ids"],
        head=case["head"],
        vocab_size=case["vocab_size"],
        targets=case["targets"],
        alpha=alpha,
        temperature=temperature,
        chunk_size=chunk_size or case["chunk_size"],
    )


def gradients(loss: Tensor, case: dict) -> list[Tensor]:
    leaves = [case["hidden"], case["head"].weight_RD, case["head"].bias_R]
    return list(torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None]))


@pytest.mark.parametrize("kind", ["none", "exact", "full", "top_k"])
@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 1.0), (1.0, 1.0), (0.1, 2.0), (10.0, 0.5)])
@pytest.mark.parametrize("seed", range(12))
def test_values_and_gradients_equal_plain_autograd(kind: str, alpha: float, temperature: float, seed: int) -> None:
    case = random_case(seed, kind, temperature=temperature)
    sums = fused(case, alpha=alpha, temperature=temperature)
    expected = reference(
        case["hidden"],
        token_ids=case["token_ids"],
        head=case["head"],
        vocab_size=case["vocab_size"],
        targets=case["targets"],
        alpha=alpha,
        temperature=temperature,
    )
    torch.testing.assert_close(torch.stack(sums[:3]), torch.stack(expected).detach().double(), rtol=1e-9, atol=1e-9)
    assert sums.tokens == len(case["token_ids"])
    # A divisor outside, as the trainer's, must reach every gradient.
    mine, theirs = gradients(sums.total / 7, case), gradients(expected[0] / 7, case)
    for actual, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-9)
    padding = mine[1][case["vocab_size"] :]
    assert torch.equal(padding, torch.zeros_like(padding))


@pytest.mark.parametrize("kind", ["none", "exact", "full", "top_k"])
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
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(part.numel() for part in torch.utils._pytree.tree_leaves(result) if isinstance(part, Tensor))
            return result

    positions, vocab_size, chunk = 256, 1000, 8
    hidden = torch.randn(positions, 4, requires_grad=True)
    weight = torch.randn(vocab_size, 4, requires_grad=True)
    targets = ExactTargets(hidden_NE=torch.randn(positions, 6), head=OutputHead(weight_RD=torch.randn(vocab_size, 6)))
    with Watch():
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
    assert max(sizes) == chunk * vocab_size


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
