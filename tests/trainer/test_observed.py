"""What the fused loss and held-out records tell about a student, against plain formulas in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.contract.errors import DatasetError
from services.contract.records import MetricPoint
from services.contract.settings import Settings
from services.contract.spec import DatasetSpec
from services.datasets.reading import load_records
from student_trainer.data import Example, collate, encode_examples
from student_trainer.held_out import Calibration
from student_trainer.loss import distillation_loss
from student_trainer.machine import flops_per_token, model_flops_utilization
from student_trainer.output_head import OutputHead
from student_trainer.targets import ExactTargets, FullTargets, SampledTargets, TopKTargets
from student_trainer.train import train
from tests.trainer.runs import MakeRun

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


def test_calibration_is_that_of_plain_formulas() -> None:
    generator = torch.Generator().manual_seed(2)
    logits_NV = torch.randn(300, 12, generator=generator, dtype=torch.float64) * 2
    ids_N = torch.where(torch.rand(300, generator=generator) < 0.4, logits_NV.argmax(dim=1), 3)
    calibration = Calibration(torch.device("cpu"))
    for part in (slice(0, 100), slice(100, 101), slice(101, 300)):
        calibration.add(logits_NV[part], ids_N[part])

    probs_NV = np.exp(logits_NV.numpy()) / np.exp(logits_NV.numpy()).sum(axis=1, keepdims=True)
    confidence_N, correct_N = probs_NV.max(axis=1), probs_NV.argmax(axis=1) == ids_N.numpy()
    ece = 0.0
    for low in range(15):
        inside = (confidence_N > low / 15) & (confidence_N <= (low + 1) / 15)
        if inside.any():
            ece += inside.mean() * abs(correct_N[inside].mean() - confidence_N[inside].mean())
    assert calibration.metrics() == pytest.approx(
        {
            "held_out_loss": -np.log(probs_NV[np.arange(300), ids_N.numpy()]).mean(),
            "held_out_accuracy": correct_N.mean(),
            "held_out_ece": ece,
        },
        rel=1e-9,
    )


def test_operations_per_token_count_weights_that_are_trained_and_frozen() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 2, bias=False))
    assert flops_per_token(model) == 6 * (4 * 5 + 5 + 5 * 2)
    model[0].requires_grad_(False)
    assert flops_per_token(model) == 4 * (4 * 5 + 5) + 6 * 5 * 2


def test_utilization_is_the_share_of_all_gpus_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = {"flops_per_token": 6e9, "tokens_per_second": 1e5, "devices": 2}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert model_flops_utilization(**usage) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, expected in {"NVIDIA H100 80GB HBM3": 6e14 / (2 * 989e12), "Unknown 9000": None}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert model_flops_utilization(**usage) == pytest.approx(expected)


def test_a_run_logs_what_it_observes(
    make_run: MakeRun, kd_settings: Settings, records_file: Path, teacher_model: Path, tmp_path: Path
) -> None:
    """At a learning rate too low to change a weight, what is logged is what the given models have."""
    spec = make_run(
        alpha=1.0,
        learning_rate=1e-30,
        batch_size=8,
        training={"epochs": 2, "held_out": 2, "max_length": 256, "precision": "fp32", "checkpoint_steps": 1},
    )
    points: list[MetricPoint] = []
    model = train(spec, out=tmp_path / "run", settings=kd_settings, on_metrics=points.extend)
    tokenizer = AutoTokenizer.from_pretrained(model)
    examples = encode_examples(load_records(DatasetSpec(path=str(records_file))), tokenizer, max_length=256)
    learnt, held_out = (plain_logits(directory, examples[:8]) for directory in (model, teacher_model)), examples[8:]
    (student_NV, _), (teacher_NV, _) = learnt
    p_NV, q_NV = student_NV.softmax(dim=1), teacher_NV.softmax(dim=1)
    expected = {
        "student_entropy": torch.special.entr(p_NV).sum(dim=1).mean().item(),
        "teacher_entropy": torch.special.entr(q_NV).sum(dim=1).mean().item(),
        "agreement": (p_NV.argmax(dim=1) == q_NV.argmax(dim=1)).double().mean().item(),
    }
    logits_NV, ids_N = plain_logits(model, held_out)
    calibration = Calibration(torch.device("cpu"))
    calibration.add(logits_NV, ids_N)
    expected |= calibration.metrics()
    for name, value in expected.items():
        assert [point.step for point in points if point.name == name] == [1, 2], name
        for point in points:
            if point.name == name:
                assert point.value == pytest.approx(value, rel=1e-4), name
    own = {point.name: point.value for point in points if point.step == 2}
    assert 0.05 < own["peak_memory_gib"] < 20
    assert own["label_cache_hits"] in (0.0, 1.0)
    assert "mfu" not in own or torch.cuda.is_available()


def plain_logits(directory: Path, examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of response positions, in float64, with the tokens that stand there."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    batch = collate(examples)
    with torch.no_grad():
        logits_BTV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    predictor_N = batch["predictor_N"]
    return logits_BTV.flatten(0, 1)[predictor_N, : len(tokenizer)], batch["input_ids"].flatten()[predictor_N + 1]


def test_holding_out_every_record_is_refused(make_run: MakeRun, settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="held_out 10 leaves none of 10 records"):
        train(make_run(training={"held_out": 10}), out=tmp_path / "run", settings=settings)
