"""The loss on dense logits in float64, and random cases to compare it on."""

import torch
from torch import Tensor

from student_trainer.loss import distillation_loss
from student_trainer.output_head import OutputHead
from student_trainer.targets import ExactTargets, FullTargets, ProjectedTargets, SampledTargets, TopKTargets

KINDS = ["none", "exact", "full", "top_k", "sampled", "projected"]


def plain_logits(hidden: Tensor, head: OutputHead, vocab_size: int) -> Tensor:
    raw = hidden @ head.weight_RD[:vocab_size].T
    if head.bias_R is not None:
        raw = raw + head.bias_R[:vocab_size]
    raw = raw * head.logit_scale
    return head.soft_cap * torch.tanh(raw / head.soft_cap) if head.soft_cap else raw


def reference(
    hidden, *, token_ids, head, vocab_size, targets, alpha, temperature, dense_label=None, divergence=None
) -> tuple[Tensor, Tensor, Tensor]:
    """Equations 1 to 3 of the paper as tutorials write them, on dense logits.

    ``dense_label`` stands in for labels that no row of probabilities can be read from; ``divergence`` maps
    log-probabilities of teacher and student to a sum.
    """
    logits = plain_logits(hidden, head, vocab_size)
    hard = torch.nn.functional.cross_entropy(logits, token_ids, reduction="sum")
    log_q = torch.log_softmax(logits / temperature, dim=1)
    if targets is None:
        soft = torch.zeros(())
    elif dense_label is not None:
        soft = -(dense_label * log_q).sum()
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
        log_p = torch.log_softmax(scores.detach() / temperature, dim=1)
        soft = -(log_p.exp() * log_q).sum() if divergence is None else divergence(log_p, log_q)
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
    dense_label = None
    if kind == "none":
        targets = None
    elif kind == "exact":
        targets = ExactTargets(hidden_NE=states, head=teacher_head)
    elif kind == "full":
        targets = FullTargets(logprobs_NV=torch.log_softmax(teacher_logits, dim=1))
    elif kind == "top_k":
        targets = top_k_targets(teacher_logits, pick(1, 4, 10), temperature)
    elif kind == "sampled":
        probs = torch.softmax(teacher_logits / temperature, dim=1)
        targets, dense_label = sampled_targets(probs, pick(1, 6, 200), generator=generator)
    else:
        # As trained with adapters: the head is frozen, its logits are not capped.
        frozen = OutputHead(
            weight_RD=head.weight_RD.detach(),
            bias_R=None if head.bias_R is None else head.bias_R.detach(),
            logit_scale=head.logit_scale,
        )
        head, dense_label = frozen, torch.softmax(teacher_logits / temperature, dim=1)
        targets = projected_targets(dense_label, head, vocab_size)
    return {
        "hidden": hidden,
        "token_ids": torch.randint(vocab_size, (positions,), generator=generator),
        "head": head,
        "vocab_size": vocab_size,
        "targets": targets,
        "dense_label": dense_label,
        "chunk_size": pick(1, 3, 100),
    }


def sampled_targets(probs: Tensor, draws: int, *, generator: torch.Generator) -> tuple[SampledTargets, Tensor]:
    """Draws by torch's own sampler, and the same as dense frequencies."""
    drawn = torch.multinomial(probs, draws, replacement=True, generator=generator)
    frequencies = torch.stack([torch.bincount(row, minlength=probs.shape[1]) for row in drawn]).double() / draws
    rows, ids = frequencies.nonzero(as_tuple=True)
    offsets = [0, *torch.bincount(rows, minlength=len(probs)).cumsum(0).tolist()]
    return SampledTargets(ids_M=ids, weights_M=frequencies[rows, ids], offsets=offsets), frequencies


def projected_targets(probs: Tensor, head: OutputHead, vocab_size: int) -> ProjectedTargets:
    bias = None if head.bias_R is None else probs @ head.bias_R[:vocab_size].detach()
    return ProjectedTargets(embedding_ND=probs @ head.weight_RD[:vocab_size].detach(), bias_N=bias)


def reference_of(case: dict, **options) -> tuple[Tensor, Tensor, Tensor]:
    return reference(
        case["hidden"],
        token_ids=case["token_ids"],
        head=case["head"],
        vocab_size=case["vocab_size"],
        targets=case["targets"],
        **options,
    )


def fused(case: dict, *, alpha: float, temperature: float, chunk_size: int | None = None, **options):
    return distillation_loss(
        case["hidden"],
        token_ids_N=case["token_ids"],
        head=case["head"],
        vocab_size=case["vocab_size"],
        targets=case["targets"],
        alpha=alpha,
        temperature=temperature,
        chunk_size=chunk_size or case["chunk_size"],
        **options,
    )


def gradients(loss: Tensor, case: dict) -> list[Tensor]:
    leaves = [case["hidden"], case["head"].weight_RD, case["head"].bias_R]
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    return list(torch.autograd.grad(loss, wanted))
