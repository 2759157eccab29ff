"""Steps that learn from the student's own responses: which, what is decoded, what is learnt, and again after a stop."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.contract.distillation_spec import OnPolicySpec
from services.contract.errors import CancelledError, SpecError
from services.contract.records import MetricPoint
from services.contract.settings import Settings
from services.contract.spec import expand
from services.contract.spec_reading import parse_sweep
from services.datasets.reading import load_records
from student_trainer.data import Example, collate, encode_examples
from student_trainer.look_ahead import LookAhead
from student_trainer.on_policy import OnPolicy
from student_trainer.train import train
from tests.trainer.loss_reference import KINDS, fused, gradients, random_case, reference
from tests.trainer.runs import MakeRun, assert_same_bits, kl, stop_after

GREEDY = {"fraction": 1.0, "temperature": 0.0, "max_new_tokens": 12}


def make_on_policy(*, seed: int = 3, stop_ids: tuple[int, ...] = (), max_length: int = 64, **spec: float) -> OnPolicy:
    return OnPolicy(
        spec=OnPolicySpec.model_validate({"fraction": 0.5, "max_new_tokens": 6} | spec),
        seed=seed,
        vocab_size=320,
        max_length=max_length,
        stop_ids=stop_ids,
    )


@pytest.fixture
def model(student_model: Path) -> torch.nn.Module:
    """Logits far enough apart for rounding not to matter."""
    loaded = AutoModelForCausalLM.from_pretrained(student_model)
    with torch.no_grad():
        loaded.lm_head.weight.mul_(10)
    return loaded.train()


def prompts(*lengths: int) -> list[Example]:
    return [
        Example(index=index, token_ids=[(7 * index + place) % 250 for place in range(length + 3)], prompt_length=length)
        for index, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
@pytest.mark.parametrize(("alpha", "temperature"), [(1.0, 1.0), (0.1, 2.0)])
@pytest.mark.parametrize("seed", range(4))
def test_without_the_hard_term_the_soft_one_is_all(kind: str, alpha: float, temperature: float, seed: int) -> None:
    case = random_case(seed, kind, temperature=temperature)
    sums = fused(case, alpha=alpha, temperature=temperature, hard_term=False)
    given = {name: case[name] for name in ("token_ids", "head", "vocab_size", "targets", "dense_label")}
    _, _, soft = reference(case["hidden"], **given, alpha=alpha, temperature=temperature)
    assert sums.hard.item() == 0
    torch.testing.assert_close(sums.total, (alpha * soft).detach().double(), rtol=1e-9, atol=1e-9)
    for actual, wanted in zip(gradients(sums.total, case), gradients(alpha * soft, case), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_about_the_wanted_share_of_steps_is_chosen_by_the_seed(fraction: float) -> None:
    chosen = [[make_on_policy(seed=seed, fraction=fraction).chooses(step) for step in range(3000)] for seed in (3, 4)]
    deviation = math.sqrt(fraction * (1 - fraction) / 3000)
    for steps in chosen:
        assert abs(sum(steps) / 3000 - fraction) <= 4 * deviation
    assert (chosen[0] == chosen[1]) == (fraction == 1)


def test_greedy_responses_are_those_that_transformers_decodes(model: torch.nn.Module) -> None:
    examples = prompts(9, 4, 6)
    decoded = make_on_policy(temperature=0.0).decode(model, examples, step=0)
    assert model.training
    for before, after in zip(examples, decoded, strict=True):
        prompt = torch.tensor([before.token_ids[: before.prompt_length]])
        model.eval()
        expected = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert after == replace(before, token_ids=expected[0].tolist())


def test_drawn_tokens_have_the_probabilities_that_the_model_gives_them(student_model: Path) -> None:
    """Pearson's statistic over the likeliest 20 tokens and all others, at another temperature than 1."""
    model = AutoModelForCausalLM.from_pretrained(student_model)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    example = prompts(5)[0]
    copies = [replace(example, index=index) for index in range(4000)]
    decoded = make_on_policy(temperature=1.5, max_new_tokens=1).decode(model, copies, step=0)
    counts = torch.bincount(torch.tensor([one.token_ids[5] for one in decoded]), minlength=320).double()
    with torch.no_grad():
        logits = model(torch.tensor([example.token_ids[:5]])).logits[0, -1, :320].double()
    probs, ids = torch.softmax(logits / 1.5, dim=0).sort(descending=True)
    expected = 4000 * torch.cat([probs[:20], probs[20:].sum().unsqueeze(0)])
    found = torch.cat([counts[ids[:20]], counts[ids[20:]].sum().unsqueeze(0)])
    statistic = ((found - expected) ** 2 / expected).sum().item()
    assert statistic < 45.3, "the 99.9th percentile of chi-squared with 20 degrees of freedom"


def test_draws_depend_on_seed_step_and_record_alone(model: torch.nn.Module) -> None:
    examples = prompts(9, 4, 6)
    on_policy = make_on_policy()
    random_state = torch.get_rng_state()
    together = on_policy.decode(model, examples, step=5)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert together == [on_policy.decode(model, [example], step=5)[0] for example in examples]
    assert together != on_policy.decode(model, examples, step=6)
    assert together != make_on_policy(seed=4).decode(model, examples, step=5)


def test_responses_end_with_a_stop_token_or_where_there_is_no_more_room(model: torch.nn.Module) -> None:
    examples = prompts(9, 4, 6)
    free = make_on_policy(max_new_tokens=8).decode(model, examples, step=0)
    stop = free[1].token_ids[4 + 2]
    # The second stops at its third token; the first has room for two only.
    decoded = make_on_policy(max_new_tokens=8, stop_ids=(stop,), max_length=11).decode(model, examples, step=0)
    for example, whole, cut in zip(examples, free, decoded, strict=True):
        response = whole.token_ids[example.prompt_length :]
        ends = response.index(stop) + 1 if stop in response else len(response)
        assert cut.token_ids == whole.token_ids[: min(example.prompt_length + ends, 11)]
    assert [len(one.token_ids) for one in decoded][:2] == [11, 4 + 1 + free[1].token_ids[4:].index(stop)]


def test_labels_of_on_policy_steps_are_asked_for_once_they_are_decoded() -> None:
    asked: list[list[int]] = []

    class Labels:
        def request(self, examples: Sequence[Example]) -> int:
            asked.append([example.index for example in examples])
            return len(asked) - 1

    def decode(examples: Sequence[Example], step: int) -> tuple[list[Example], dict]:
        decoded = [replace(example, index=1000 * step + example.index) for example in examples]
        return decoded, collate(decoded)

    examples = prompts(*[5] * 10)
    # Two micro-batches make a step; the steps before were 7, so these are steps 7 to 11.
    ahead = LookAhead(
        iter([collate([example]) for example in examples]),
        labels=Labels(),  # type: ignore[arg-type]
        examples={example.index: example for example in examples},
        depth=4,
        step_of=lambda count: 7 + count // 2,
        chooses=lambda step: step == 8,
        decode=decode,
    )
    first = next(ahead)
    assert asked == [[0], [1], [4]]
    batches = [first, *ahead]
    assert asked == [[0], [1], [4], [5], [6], [8002], [7], [8003], [8], [9]]
    assert [asked[batch["ticket"]] for batch in batches] == [[0], [1], [8002], [8003], [4], [5], [6], [7], [8], [9]]
    assert [batch["record_B"].tolist() for batch in batches] == [asked[batch["ticket"]] for batch in batches]
    assert [batch.get("on_policy", False) for batch in batches] == [False, False, True, True] + [False] * 6


def test_a_step_learns_the_teacher_on_what_the_student_decodes(
    make_run: MakeRun,
    kd_settings: Settings,
    student_model: Path,
    teacher_model: Path,
    tmp_path: Path,
) -> None:
    """The first step's metrics are those of the untrained student's greedy responses, by transformers in float64."""
    points: list[MetricPoint] = []
    spec = make_run(
        alpha=0.5,
        batch_size=10,
        distillation={"divergence": "forward_kl", "on_policy": GREEDY},
        training={"epochs": 1},
    )
    train(spec, out=tmp_path / "run", settings=kd_settings, on_metrics=points.extend)
    metrics = {point.name: point.value for point in points}

    tokenizer = AutoTokenizer.from_pretrained(student_model)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
        for directory in (student_model, teacher_model)
    )
    values, lengths = [], []
    for example in encode_examples(load_records(spec.dataset), tokenizer, max_length=256):
        prompt = torch.tensor([example.token_ids[: example.prompt_length]])
        ids = student.generate(
            prompt,
            attention_mask=prompt**0,
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            suppress_tokens=list(range(len(tokenizer), student.lm_head.out_features)),
        )
        rows = slice(example.prompt_length - 1, ids.shape[1] - 1)
        with torch.no_grad():
            log_p, log_q = (
                model(ids).logits[0, rows, : len(tokenizer)].log_softmax(dim=1) for model in (teacher, student)
            )
        values.append(kl(log_p, log_q).sum(dim=1))
        lengths.append(ids.shape[1] - example.prompt_length)
    expected = torch.cat(values).mean().item()
    assert metrics["soft_loss"] == pytest.approx(expected, rel=1e-4)
    assert metrics["loss"] == pytest.approx(0.5 * expected, rel=1e-4)
    assert metrics["decoded_tokens"] == pytest.approx(sum(lengths) / 10)
    assert metrics["on_policy_share"] == 1
    assert "hard_loss" not in metrics


@pytest.mark.parametrize("packing", [False, True])
def test_runs_mix_both_kinds_of_steps(packing: bool, make_run: MakeRun, kd_settings: Settings, tmp_path: Path) -> None:
    points: list[MetricPoint] = []
    spec = make_run(
        alpha=1.0,
        distillation={"on_policy": {"fraction": 0.5, "max_new_tokens": 8}},
        training={"packing": packing},
    )
    train(spec, out=tmp_path / "run", settings=kd_settings, on_metrics=points.extend)
    by_step = {step: {p.name: p.value for p in points if p.step == step} for step in range(1, 7)}
    chosen = [make_on_policy(seed=spec.seed).chooses(step) for step in range(6)]
    assert 0 < sum(chosen) < 6
    for metrics, on_policy in zip(by_step.values(), chosen, strict=True):
        assert metrics["on_policy_share"] == on_policy
        assert ("hard_loss" in metrics) is not on_policy
        assert ("decoded_tokens" in metrics) is on_policy
        assert metrics["loss"] == pytest.approx(metrics.get("hard_loss", 0.0) + metrics["soft_loss"])
        assert not on_policy or 1 <= metrics["decoded_tokens"] <= 8


def test_adapters_under_mixed_precision_and_gradient_checkpointing_decode_too(
    make_run: MakeRun, kd_settings: Settings, student_model: Path, tmp_path: Path
) -> None:
    points: list[MetricPoint] = []
    spec = make_run(
        alpha=1.0,
        student={"model": str(student_model), "lora": {"rank": 4}},
        distillation={"on_policy": {"fraction": 1.0, "max_new_tokens": 8}},
        training={"precision": "bf16", "gradient_checkpointing": True, "micro_batch_size": 4},
    )
    train(spec, out=tmp_path / "run", settings=kd_settings, on_metrics=points.extend)
    soft = [point.value for point in points if point.name == "soft_loss"]
    assert len(soft) == 6
    assert soft[-1] < soft[0]


def test_an_interrupted_run_decodes_and_learns_the_same_bits(
    make_run: MakeRun, settings: Settings, mock_address: str, student_model: Path, tmp_path: Path
) -> None:
    settings = settings.model_copy(update={"teacher_address": mock_address})
    spec = make_run(
        alpha=0.5,
        teacher={"model": str(student_model)},
        distillation={"on_policy": {"fraction": 0.5, "max_new_tokens": 8}},
        training={"lr_scheduler": "cosine", "micro_batch_size": 2},
    )
    straight = train(spec, out=tmp_path / "straight", settings=settings)
    for stops in ((2,), (4, 2), (7,)):
        out = tmp_path / "-".join(map(str, stops))
        for stop in stops:
            with pytest.raises(CancelledError, match="stopped at step"):
                train(spec, out=out, settings=settings, should_stop=stop_after(stop))
        assert_same_bits(train(spec, out=out, settings=settings), straight)


SWEEP = {
    "name": "on-policy",
    "teacher": {"model": "org/teacher"},
    "student": {"model": "org/student"},
    "dataset": {"path": "data.jsonl"},
    "distillation": {"on_policy": {"fraction": 0.5}},
    "grid": {"alpha": [0, 1]},
}


def test_a_sweep_has_its_baseline_and_on_policy_runs() -> None:
    runs = expand(parse_sweep(SWEEP))
    assert [run.method for run in runs] == ["SFT", "GKD alpha=1"]
    combined = {**SWEEP, "distillation": {"level": "word+sequence", "on_policy": {"fraction": 1}}}
    assert [run.method for run in expand(parse_sweep(combined))] == ["SeqKD", "SeqKD+GKD alpha=1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distillation": {"on_policy": {"fraction": 1}, "labels": {"path": "labels"}}}, "remove labels.path"),
        ({"distillation": {"on_policy": {"fraction": 1}, "cross_tokenizer": "uld"}}, "remove either"),
        ({"distillation": {"on_policy": {"fraction": 1.5}}}, "fraction"),
        ({"grid": {"alpha": [0]}}, "set alpha above 0"),
        ({"training": {"fsdp": True}}, "fsdp and deepspeed"),
    ],
)
def test_what_cannot_be_on_policy_is_refused_with_what_to_do(changes: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_sweep(SWEEP | changes)
