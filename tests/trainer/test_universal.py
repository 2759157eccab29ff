"""Universal logit distillation: the loss against plain autograd on sorted probabilities in float64."""

import pytest
import torch
from torch import Tensor

from student_trainer.loss import distillation_loss
from student_trainer.output_head import OutputHead
from student_trainer.targets import ExactTargets, FullTargets, TopKTargets, UniversalTargets
from tests.largest_tensor import LargestTensor
from tests.trainer.loss_reference import plain_logits, random_head, top_k_targets
from tests.trainer.universal_reference import wasserstein

ROWS = [0, 2, 3, 7, 11]
POSITIONS = 12


def truncated(p: Tensor, q: Tensor, k: int) -> Tensor:
    """The k likeliest ranks one by one, all others as one."""
    p, q = p.sort(dim=1, descending=True).values, q.sort(dim=1, descending=True).values
    q = torch.nn.functional.pad(q, (0, max(0, k - q.shape[1])))
    rest = q[:, k:].sum(dim=1) - p[:, k:].sum(dim=1)
    return (q[:, :k] - p[:, :k]).abs().sum() + rest.abs().sum()


class Case:
    """A student of ``vocab`` tokens and a teacher of ``teacher_vocab``, with labels at ROWS of POSITIONS."""

    def __init__(self, *, vocab: int, teacher_vocab: int, cap: float = 0.0, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.vocab = vocab
        self.head = random_head(vocab + 3, 6, generator=generator, bias=True, scale=0.5, cap=cap)
        self.hidden = torch.randn(POSITIONS, 6, generator=generator, dtype=torch.float64).requires_grad_()
        self.token_ids = torch.randint(vocab, (POSITIONS,), generator=generator)
        self.teacher_head = random_head(teacher_vocab, 4, generator=generator, bias=True, scale=2.0)
        self.states = torch.randn(len(ROWS), 4, generator=generator, dtype=torch.float64)
        self.teacher_logits = plain_logits(self.states, self.teacher_head, teacher_vocab).detach()

    def loss(self, labels: ExactTargets | FullTargets | TopKTargets, **options) -> tuple[list[Tensor], list[Tensor]]:
        sums = distillation_loss(
            self.hidden,
            token_ids_N=self.token_ids,
            head=self.head,
            vocab_size=self.vocab,
            targets=UniversalTargets(labels=labels, rows=ROWS),
            alpha=1.5,
            **options,
        )
        return list(sums[:3]), self.gradients(sums.total)

    def reference(self, *, temperature: float, k: int | None = None) -> tuple[list[Tensor], list[Tensor]]:
        logits = plain_logits(self.hidden, self.head, self.vocab)
        hard = torch.nn.functional.cross_entropy(logits, self.token_ids, reduction="sum")
        q = torch.softmax(logits[ROWS] / temperature, dim=1)
        p = torch.softmax(self.teacher_logits / temperature, dim=1)
        soft = temperature**2 * (wasserstein(p, q) if k is None else truncated(p, q, k))
        total = hard + 1.5 * soft
        return [total.detach(), hard.detach(), soft.detach()], self.gradients(total)

    def gradients(self, total: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(total, [self.hidden, self.head.weight_RD, self.head.bias_R]))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("vocab", "teacher_vocab"), [(13, 29), (29, 13), (17, 17)])
@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_whole_labels_equal_plain_autograd(
    temperature: float, vocab: int, teacher_vocab: int, cap: float, chunk_size: int
) -> None:
    case = Case(vocab=vocab, teacher_vocab=teacher_vocab, cap=cap)
    expected = case.reference(temperature=temperature)
    exact = ExactTargets(hidden_NE=case.states, head=case.teacher_head)
    full = FullTargets(logprobs_NV=case.teacher_logits.log_softmax(dim=1))
    for labels in (exact, full):
        found = case.loss(labels, temperature=temperature, chunk_size=chunk_size)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 5, 13, 20])
@pytest.mark.parametrize("vocab", [13, 29])
def test_top_k_labels_compare_the_rest_as_one(temperature: float, k: int, vocab: int) -> None:
    """Among them more ranks than the student has tokens."""
    case = Case(vocab=vocab, teacher_vocab=23, seed=1)
    labels = top_k_targets(case.teacher_logits, k, temperature)
    expected = case.reference(temperature=temperature, k=k)
    for chunk_size in (3, 100):
        torch.testing.assert_close(
            case.loss(labels, temperature=temperature, chunk_size=chunk_size), expected, rtol=1e-10, atol=1e-12
        )


def test_top_k_of_everything_is_the_whole_label() -> None:
    case = Case(vocab=13, teacher_vocab=23, seed=2)
    whole = case.loss(FullTargets(logprobs_NV=case.teacher_logits.log_softmax(dim=1)))
    torch.testing.assert_close(case.loss(top_k_targets(case.teacher_logits, 23, 1.0)), whole)


def test_equal_distributions_are_at_distance_zero_whatever_their_tokens_are() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.5, -2.0]], dtype=torch.float64)
    hidden = logits[:, [2, 0, 3, 1]].clone().requires_grad_()
    sums = distillation_loss(
        hidden,
        token_ids_N=torch.tensor([1]),
        head=OutputHead(weight_RD=torch.eye(4, dtype=torch.float64)),
        vocab_size=4,
        targets=UniversalTargets(labels=FullTargets(logprobs_NV=logits.log_softmax(dim=1)), rows=[0]),
        alpha=1.0,
    )
    assert sums.soft.item() == pytest.approx(0.0, abs=1e-12)


def test_no_tensor_of_all_positions_by_a_vocabulary_is_made() -> None:
    """The largest that any operation returns is one chunk's, of the larger vocabulary."""
    positions, chunk = 256, 8
    hidden = torch.randn(positions, 4, requires_grad=True)
    labels = ExactTargets(hidden_NE=torch.randn(positions, 6), head=OutputHead(weight_RD=torch.randn(1500, 6)))
    with LargestTensor() as made:
        sums = distillation_loss(
            hidden,
            token_ids_N=torch.zeros(positions, dtype=torch.int64),
            head=OutputHead(weight_RD=torch.randn(1000, 4, requires_grad=True)),
            vocab_size=1000,
            targets=UniversalTargets(labels=labels, rows=range(positions)),
            alpha=1.0,
            chunk_size=chunk,
        )
        sums.total.backward()
    assert made.elements == chunk * 1500
