"""The fused loss against dense logits, as tutorials write it, and against the matrix products that nobody can spare.

Time as a multiple of those products (student's head forward and both gradients; of exact labels the teacher's head
too), and memory at its peak beyond the inputs. On a GPU the shapes are a 7B student's and a 32B teacher's, and Liger's
fused losses join where liger-kernel is installed; on a processor they are small, and how memory grows is shown too.
"""

import importlib
import importlib.util
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from benchmarks.report import FOLDER, report
from services.reports.colours import BASELINE, DISTILLED
from student_trainer.loss import distillation_loss
from student_trainer.output_head import OutputHead
from student_trainer.targets import ExactTargets, TopKTargets

K = 64
VOCABULARY, POSITIONS = 16_384, 512
"""What stays the same while the other grows."""
REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Shape:
    """N response tokens, V tokens in the vocabulary, hidden sizes D of the student and E of the teacher."""

    n: int
    v: int
    d: int
    e: int

    def __str__(self) -> str:
        return f"N={self.n:,}, V={self.v:,}, student {self.d}, teacher {self.e}"


ON_CPU = Shape(n=512, v=32_768, d=512, e=768)
ON_GPU = Shape(n=8192, v=152_064, d=3584, e=5120)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    hidden_ND: Tensor
    head_VD: Tensor
    ids_N: Tensor
    teacher_NE: Tensor
    teacher_VE: Tensor
    top_k: TopKTargets


def main() -> None:
    shape = ON_GPU if torch.cuda.is_available() else ON_CPU
    variants = dict(VARIANTS)
    if torch.cuda.is_available() and importlib.util.find_spec("liger_kernel"):
        variants |= LIGER
    measured = {name: measure(work, shape) for name, work in variants.items()}
    rows = []
    for name, (seconds, gib) in measured.items():
        teacher = "exact" in name or "dense CE + soft" in name or "JSD" in name
        floor, _ = measured["products of both heads" if teacher else "products of the student's head"]
        rows.append({"variant": name, "ms": 1000 * seconds, "times its products": seconds / floor, "peak GiB": gib})
    report("kd_loss", title=f"loss and gradients, {shape}", rows=rows)
    if not torch.cuda.is_available():
        rows = growth()
        report("kd_loss_growth", title="peak memory of dense and fused loss, GiB", rows=rows)
        plot_growth(rows, path=FOLDER / "kd_loss_growth.svg")


def growth() -> list[dict[str, Any]]:
    """With positions at one vocabulary, and with the vocabulary at as many positions."""
    shapes = [Shape(n=n, v=VOCABULARY, d=128, e=128) for n in (256, 512, 1024, 2048)]
    shapes += [Shape(n=POSITIONS, v=v, d=128, e=128) for v in (8_192, 32_768, 65_536)]
    rows = []
    for shape in shapes:
        dense, fused = (measure(VARIANTS[name], shape, repeats=1)[1] for name in (DENSE, EXACT))
        rows.append({"positions": shape.n, "vocabulary": shape.v, "dense": dense, "fused": fused})
    return rows


def plot_growth(rows: Sequence[Mapping[str, Any]], *, path: Path) -> None:
    """Two panels, by positions and by vocabulary, of what ``growth`` measured."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, axis, other, fixed in zip(
        panels, ("positions", "vocabulary"), ("vocabulary", "positions"), (VOCABULARY, POSITIONS), strict=True
    ):
        along = sorted((row for row in rows if row[other] == fixed), key=lambda row: int(row[axis]))
        for way, colour in (("dense", BASELINE), ("fused", DISTILLED[0])):
            panel.plot([row[axis] for row in along], [row[way] for row in along], "o-", color=colour, label=way)
        panel.set_xlabel(f"{axis}, at {fixed:,} {'tokens of vocabulary' if other == 'vocabulary' else other}")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("peak memory, GiB")
    panels[0].legend(frameon=False)
    figure.savefig(path)


def measure(work: Callable[[Inputs], None], shape: Shape, *, repeats: int = REPEATS) -> tuple[float, float]:
    """Median seconds, and GiB at the peak beyond the inputs."""
    if torch.cuda.is_available():
        return _measure_on_gpu(work, shape, repeats)
    # A process of its own: resident memory never shrinks. Forked, for torch has started no threads here.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_on_cpu, args=(work, shape, repeats, sender))
    process.start()
    sender.close()
    result: tuple[float, float] = receiver.recv()
    process.join()
    return result


def _measure_on_cpu(work: Callable[[Inputs], None], shape: Shape, repeats: int, sender: Any) -> None:
    work(make_inputs(Shape(n=4, v=shape.v // 8, d=shape.d, e=shape.e)))
    inputs = make_inputs(shape)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work(inputs)
        times.append(time.perf_counter() - started)
        if len(times) == 1:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    sender.send((statistics.median(times), peak / 2**20))


def _measure_on_gpu(work: Callable[[Inputs], None], shape: Shape, repeats: int) -> tuple[float, float]:
    inputs = make_inputs(shape)
    times = []
    for _ in range(2 + 3 * repeats):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        work(inputs)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:]), (torch.cuda.max_memory_allocated() - before) / 2**30


def make_inputs(shape: Shape) -> Inputs:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).mul_(0.05).to(dtype)

    ids_NK = torch.randint(shape.v // K, (shape.n, K), generator=generator, device=device)
    ids_NK += torch.arange(K, device=device) * (shape.v // K)
    kept_NK = torch.full((shape.n, K), 0.9 / K, device=device).log()
    return Inputs(
        hidden_ND=draw(shape.n, shape.d).requires_grad_(),
        head_VD=draw(shape.v, shape.d).requires_grad_(),
        ids_N=torch.randint(shape.v, (shape.n,), generator=generator, device=device),
        teacher_NE=draw(shape.n, shape.e),
        teacher_VE=draw(shape.v, shape.e),
        top_k=TopKTargets(ids_NK=ids_NK, logprobs_NK=kept_NK, tail_mass_N=torch.full((shape.n,), 0.1, device=device)),
    )


def student_products(inputs: Inputs) -> None:
    """In chunks, so that they need no memory that is not theirs."""
    with torch.no_grad():
        size = max(1, len(inputs.hidden_ND) // 8)
        for hidden_CD in inputs.hidden_ND.split(size):
            products_CV = hidden_CD @ inputs.head_VD.T
            products_CV @ inputs.head_VD
            products_CV.T @ hidden_CD


def both_products(inputs: Inputs) -> None:
    student_products(inputs)
    for hidden_CE in inputs.teacher_NE.split(max(1, len(inputs.teacher_NE) // 8)):
        hidden_CE @ inputs.teacher_VE.T


def dense_sft(inputs: Inputs) -> None:
    logits_NV = (inputs.hidden_ND @ inputs.head_VD.T).float()
    _backward(inputs, functional.cross_entropy(logits_NV, inputs.ids_N))


def dense_kd(inputs: Inputs) -> None:
    logits_NV = (inputs.hidden_ND @ inputs.head_VD.T).float()
    label_NV = (inputs.teacher_NE @ inputs.teacher_VE.T).float().softmax(dim=1)
    soft = -(label_NV * logits_NV.log_softmax(dim=1)).sum(dim=1).mean()
    _backward(inputs, functional.cross_entropy(logits_NV, inputs.ids_N) + soft)


def fused(inputs: Inputs, *, labels: str, observe: bool = False) -> None:
    targets: dict[str, ExactTargets | TopKTargets | None] = {
        "exact": ExactTargets(hidden_NE=inputs.teacher_NE, head=OutputHead(weight_RD=inputs.teacher_VE)),
        "top_k": inputs.top_k,
        "none": None,
    }
    sums = distillation_loss(
        inputs.hidden_ND,
        token_ids_N=inputs.ids_N,
        head=OutputHead(weight_RD=inputs.head_VD),
        vocab_size=len(inputs.head_VD),
        targets=targets[labels],
        alpha=1.0,
        observe=observe,
    )
    _backward(inputs, sums.total / sums.tokens)


def liger_sft(inputs: Inputs) -> None:
    liger = importlib.import_module("liger_kernel.transformers")
    _backward(inputs, liger.LigerFusedLinearCrossEntropyLoss()(inputs.head_VD, inputs.hidden_ND, inputs.ids_N))


def liger_jsd(inputs: Inputs) -> None:
    liger = importlib.import_module("liger_kernel.chunked_loss")
    loss = liger.LigerFusedLinearJSDLoss(beta=0.0, chunk_size=1024, compiled=True)
    _backward(inputs, loss(inputs.hidden_ND, inputs.head_VD, inputs.teacher_NE, inputs.teacher_VE, inputs.ids_N))


def _backward(inputs: Inputs, loss: Tensor) -> None:
    loss.backward()
    inputs.hidden_ND.grad = inputs.head_VD.grad = None


DENSE, EXACT = "dense CE + soft CE", "fused, exact labels"
VARIANTS: dict[str, Callable[[Inputs], None]] = {
    "products of the student's head": student_products,
    "products of both heads": both_products,
    "dense CE (SFT)": dense_sft,
    "fused CE (SFT)": lambda inputs: fused(inputs, labels="none"),
    DENSE: dense_kd,
    EXACT: lambda inputs: fused(inputs, labels="exact"),
    "fused, exact labels, observed": lambda inputs: fused(inputs, labels="exact", observe=True),
    f"fused, top-{K} labels": lambda inputs: fused(inputs, labels="top_k"),
}
LIGER: dict[str, Callable[[Inputs], None]] = {"Liger fused CE (SFT)": liger_sft, "Liger fused JSD, beta 0": liger_jsd}

if __name__ == "__main__":
    main()
