"""What the fused loss and held-out records tell about a student, against plain formulas in float64."""

import numpy as np
import pytest
import torch

from student_trainer.loss import distillation_loss
from student_trainer.output_head import OutputHead
from student_trainer.targets import ExactTargets, FullTargets, SampledTargets, TopKTargets

N, D, E, V, ROWS = 23, 8, 6, 40, 43


def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, ExactTargets]:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden_ND, weight_RD = draw(N, D), draw(ROWS, D)
    # The student with two dimensions less, so that they agree now and then.
    targets = ExactTargets(hidden_NE=hidden_ND[:, :E], head=OutputHead(weight_RD=weight_RD[:, :E]))
    return hidden_ND, weight_RD, torch.randint(V, (N,), generator=generator), targets


def plain(hidden_ND: torch.Tensor, weight_RD: torch.Tensor, targets: ExactTargets) -> dict[str, float]:
    student_NV = (hidden_ND @ weight_RD[:V].T).softmax(dim=1).numpy()
    teacher_NV = (targets.hidden_NE @ targets.head.weight_RD[:V].T).softmax(dim=1).numpy()
    return {
        "student_entropy": -(student_NV * np.log(student_NV)).sum(),
        "teacher_entropy": -(teacher_NV * np.log(teacher_NV)).sum(),
        "agreement": (student_NV.argmax(axis=1) == teacher_NV.argmax(axis=1)).sum(),
    }


@pytest.mark.parametrize("encoding", ["exact", "full", "top_k", "sampled", "none"])
@pytest.mark.parametrize("chunk_size", [4, 100])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_entropies_and_agreement_are_those_of_plain_formulas(
    encoding: str, chunk_size: int, temperature: float
) -> None:
    """Entropies are those at temperature 1, whatever the loss's own is."""
    hidden_ND, weight_RD, ids_N, exact = case()
    logprobs_NV = (exact.hidden_NE @ exact.head.weight_RD[:V].T).log_softmax(dim=1)
    heated_NV = (logprobs_NV / temperature).log_softmax(dim=1)
    order_NK = torch.argsort(logprobs_NV, dim=1, descending=True)[:, [2, 0, 1]]
    kept_NK = heated_NV.gather(1, order_NK)
    targets = {
        "exact": exact,
        "full": FullTargets(logprobs_NV=logprobs_NV),
        "top_k": TopKTargets(ids_NK=order_NK, logprobs_NK=kept_NK, tail_mass_N=1 - kept_NK.exp().sum(dim=1)),
        "sampled": SampledTargets(
            ids_M=order_NK[:, 0], weights_M=torch.ones(N, dtype=torch.float64), offsets=list(range(N + 1))
        ),
        "none": None,
    }[encoding]
    told = {
        "exact": {"student_entropy", "teacher_entropy", "agreement"},
        "full": {"student_entropy", "teacher_entropy", "agreement"},
        "top_k": {"student_entropy", "agreement"},
        "sampled": {"student_entropy"},
        "none": {"student_entropy"},
    }[encoding]
    options = {
        "token_ids_N": ids_N,
        "head": OutputHead(weight_RD=weight_RD),
        "vocab_size": V,
        "targets": targets,
        "alpha": 0.7,
        "temperature": temperature,
        "chunk_size": chunk_size,
    }
    sums = distillation_loss(hidden_ND, **options, observe=True)
    expected = plain(hidden_ND, weight_RD, exact)
    assert 0 < expected["agreement"] < N
    assert set(sums.observed) == told
    for name in told:
        assert sums.observed[name].item() == pytest.approx(expected[name], rel=1e-9), name
    unobserved = distillation_loss(hidden_ND, **options)
    assert unobserved.observed == {}
    torch.testing.assert_close(sums.total, unobserved.total, rtol=0, atol=0)


def test_a_teacher_that_rules_tokens_out_has_an_entropy() -> None:
    hidden_ND, weight_RD, ids_N, _ = case()
    logprobs_NV = torch.full((N, V), -torch.inf, dtype=torch.float64)
    logprobs_NV[:, :2] = np.log(0.5)
    logprobs_NV[torch.arange(N), ids_N] = -torch.inf
    logprobs_NV = logprobs_NV.log_softmax(dim=1)
    sums = distillation_loss(
        hidden_ND,
        token_ids_N=ids_N,
        head=OutputHead(weight_RD=weight_RD),
        vocab_size=V,
        targets=FullTargets(logprobs_NV=logprobs_NV),
        observe=True,
    )
    one_left = int((ids_N < 2).sum())
    assert sums.observed["teacher_entropy"].item() == pytest.approx((N - one_left) * np.log(2))
