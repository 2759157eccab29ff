"""Whole runs of a tiny student against a plain training loop and a real teacher."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.contract.records import MetricPoint
from services.contract.settings import Settings
from services.contract.spec_reading import load_run
from services.datasets.reading import load_records
from student_trainer.data import collate, encode_examples
from student_trainer.train import train
from tests.trainer.runs import MakeRun, assert_close_weights, mean_divergence, plainly_trained, weights


def test_sft_equals_a_plain_training_loop(
    make_run: MakeRun, settings: Settings, student_model: Path, tmp_path: Path
) -> None:
    spec = make_run(training={"warmup_ratio": 0.0, "epochs": 2})
    trained = weights(train(spec, out=tmp_path / "run", settings=settings))
    expected = dict(plainly_trained(spec, student_model).named_parameters())
    before = weights(student_model)
    for name, tensor in trained.items():
        assert (expected[name] - tensor).norm() <= 1e-3 * (expected[name] - before[name]).norm() + 1e-6, name


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_micro_batch_changes_nothing(
    alpha: float, make_run: MakeRun, kd_settings: Settings, student_model: Path, tmp_path: Path
) -> None:
    models = [
        train(
            make_run(alpha=alpha, training={"micro_batch_size": size}),
            out=tmp_path / str(size),
            settings=kd_settings,
        )
        for size in (1, 2, 4)
    ]
    for other in models[1:]:
        assert_close_weights(models[0], other, start=student_model, share=1e-3)


def test_distillation_brings_the_student_to_the_teacher(
    make_run: MakeRun,
    kd_settings: Settings,
    student_model: Path,
    teacher_model: Path,
    records_file: Path,
    tmp_path: Path,
) -> None:
    points: list[MetricPoint] = []
    spec = make_run(alpha=10.0, training={"epochs": 12})
    model = train(spec, out=tmp_path / "kd", settings=kd_settings, on_metrics=points.extend)
    before = mean_divergence(teacher_model, student_model, records_file)
    after = mean_divergence(teacher_model, model, records_file)
    sft = train(make_run(training={"epochs": 12}), out=tmp_path / "sft", settings=kd_settings)
    assert after < 0.5 * before
    assert after < 0.5 * mean_divergence(teacher_model, sft, records_file)

    curves = {name: [p.value for p in points if p.name == name] for name in {p.name for p in points}}
    assert set(curves) == {
        "loss",
        "hard_loss",
        "soft_loss",
        "student_entropy",
        "teacher_entropy",
        "agreement",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "label_wait_seconds",
        "label_cache_hits",
        "peak_memory_gib",
        "epoch",
    }
    assert [p.step for p in points if p.name == "loss"] == list(range(1, 37))
    for loss, hard, soft in zip(curves["loss"], curves["hard_loss"], curves["soft_loss"], strict=True):
        assert loss == pytest.approx(hard + 10.0 * soft)
    assert curves["soft_loss"][-1] < curves["soft_loss"][0]
    assert curves["epoch"][-1] == pytest.approx(12)


def test_the_first_step_logs_the_loss_of_the_untrained_student(
    make_run: MakeRun,
    kd_settings: Settings,
    student_model: Path,
    teacher_model: Path,
    records_file: Path,
    tmp_path: Path,
) -> None:
    """One batch of all records: soft loss minus the teacher's entropy is the divergence that transformers gives."""
    points: list[MetricPoint] = []
    spec = make_run(alpha=1.0, batch_size=10, training={"epochs": 1})
    train(spec, out=tmp_path / "run", settings=kd_settings, on_metrics=points.extend)
    tokenizer = AutoTokenizer.from_pretrained(teacher_model)
    batch = collate(encode_examples(load_records(spec.dataset), tokenizer, max_length=256))
    model = AutoModelForCausalLM.from_pretrained(teacher_model, dtype=torch.float64)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    p = logits.flatten(0, 1)[batch["predictor_N"], : len(tokenizer)].log_softmax(dim=1)
    entropy = -(p.exp() * p).sum(dim=1).mean().item()
    soft = next(point.value for point in points if point.name == "soft_loss")
    divergence = mean_divergence(teacher_model, student_model, records_file)
    assert soft - entropy == pytest.approx(divergence, rel=1e-4)


@pytest.mark.parametrize(
    ("labels", "share"),
    [({"encoding": "full"}, 0.05), ({"encoding": "top_k", "k": 1024}, 0.05)],
)
def test_every_encoding_of_whole_distributions_trains_the_same_student(
    labels: dict, share: float, make_run: MakeRun, kd_settings: Settings, student_model: Path, tmp_path: Path
) -> None:
    exact = make_run(alpha=1.0)
    other = make_run(alpha=1.0, distillation={"labels": labels})
    assert_close_weights(
        train(exact, out=tmp_path / "exact", settings=kd_settings),
        train(other, out=tmp_path / "other", settings=kd_settings),
        start=student_model,
        share=share,
    )


def test_many_draws_train_nearly_the_same_student(
    make_run: MakeRun, kd_settings: Settings, student_model: Path, tmp_path: Path
) -> None:
    models = [
        train(
            make_run(alpha=1.0, learning_rate=1e-3, distillation={"labels": labels, "temperature": 2.0}),
            out=tmp_path / labels["encoding"],
            settings=kd_settings,
        )
        for labels in ({"encoding": "exact"}, {"encoding": "sampled", "draws": 1024})
    ]
    assert_close_weights(*models, start=student_model, share=0.2)


@pytest.mark.parametrize(
    ("distillation", "divergence"),
    [
        ({"divergence": "forward_kl"}, lambda log_p, log_q: log_p.exp() * (log_p - log_q)),
        ({"divergence": "reverse_kl"}, lambda log_p, log_q: log_q.exp() * (log_q - log_p)),
        ({"divergence": "jsd", "beta": 0.25}, lambda log_p, log_q: jsd(log_p, log_q, beta=0.25)),
    ],
)
def test_a_run_minimises_the_divergence_it_names(
    distillation: dict,
    divergence: Callable,
    make_run: MakeRun,
    kd_settings: Settings,
    student_model: Path,
    teacher_model: Path,
    records_file: Path,
    tmp_path: Path,
) -> None:
    """The first step logs that of the untrained student, as transformers' own logits give it."""
    points: list[MetricPoint] = []
    spec = make_run(alpha=1.0, batch_size=10, distillation=distillation, training={"epochs": 1})
    train(spec, out=tmp_path / "run", settings=kd_settings, on_metrics=points.extend)
    soft = next(point.value for point in points if point.name == "soft_loss")
    expected = mean_divergence(teacher_model, student_model, records_file, divergence=divergence)
    assert soft == pytest.approx(expected, rel=1e-4)


def jsd(log_p: torch.Tensor, log_q: torch.Tensor, *, beta: float) -> torch.Tensor:
    log_m = torch.log(beta * log_p.exp() + (1 - beta) * log_q.exp())
    return beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)


def test_the_result_is_a_whole_model(make_run: MakeRun, settings: Settings, tmp_path: Path) -> None:
    spec = make_run(training={"checkpoint_steps": 1})
    model = train(spec, out=tmp_path / "run", settings=settings)
    assert model == tmp_path / "run" / "model"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["model", "run.yaml"]
    assert load_run(tmp_path / "run" / "run.yaml") == spec
    loaded = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.chat_template
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    # A run that has ended is not trained again.
    stamp = (model / "model.safetensors").stat().st_mtime_ns
    assert train(spec, out=tmp_path / "run", settings=settings) == model
    assert (model / "model.safetensors").stat().st_mtime_ns == stamp


def test_without_alpha_no_teacher_is_contacted(make_run: MakeRun, settings: Settings, tmp_path: Path) -> None:
    """Nothing listens at the settings' teacher address."""
    assert train(make_run(), out=tmp_path / "run", settings=settings).is_dir()


def test_bfloat16_trains_to_nearly_the_same_student(
    make_run: MakeRun, kd_settings: Settings, student_model: Path, tmp_path: Path
) -> None:
    models = [
        train(make_run(alpha=1.0, training={"precision": precision}), out=tmp_path / precision, settings=kd_settings)
        for precision in ("fp32", "bf16")
    ]
    assert {tensor.dtype for tensor in weights(models[1]).values()} == {torch.bfloat16}
    assert_close_weights(models[0], models[1], start=student_model, share=0.3)
