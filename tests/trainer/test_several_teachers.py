"""Several teachers: the mean of their distributions, against plain autograd and with two real servers."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.contract.errors import HandshakeError, InvalidInputError, SpecError
from services.contract.records import MetricPoint
from services.contract.settings import Settings, load_settings
from services.datasets.reading import load_records
from services.models.tiny import make_tiny_model
from student_trainer.chunk_loss import OBSERVED
from student_trainer.data import collate, encode_examples
from student_trainer.loss import distillation_loss
from student_trainer.output_head import OutputHead
from student_trainer.targets import ExactTargets, FullTargets, MixedTargets
from student_trainer.train import train
from teacher_server.server import TeacherOptions
from tests.teacher.serving import running_teacher
from tests.trainer.loss_reference import plain_logits, random_head
from tests.trainer.misaligned import go_wrong, stopped
from tests.trainer.runs import MakeRun, assert_close_weights, sharp_model
from tests.trainer.test_divergences import DIVERGENCES

DIVERGENCE_TERMS = {**DIVERGENCES, "cross_entropy": (lambda log_p, log_q: -(log_p.exp() * log_q).sum(), {})}
VOCAB = 23


class Case:
    """A student and three teachers: two by hidden states and heads of their own, one by its distribution."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.positions = 9
        self.head = random_head(VOCAB + 3, 6, generator=generator, bias=True, scale=0.5, cap=3.0)
        self.hidden = draw(self.positions, 6).requires_grad_()
        self.ids = torch.randint(VOCAB, (self.positions,), generator=generator)
        heads = [
            random_head(VOCAB + 1, 4, generator=generator, bias=True, scale=2.0),
            random_head(VOCAB, 5, generator=generator, bias=False, cap=4.0),
        ]
        states = [draw(self.positions, 4), draw(self.positions, 5)]
        self.logits = [
            *(plain_logits(hidden, head, VOCAB).detach() for hidden, head in zip(states, heads, strict=True)),
            draw(self.positions, VOCAB),
        ]
        # The last finds some tokens impossible.
        self.logits[2][:, 5:9] = -torch.inf
        self.targets = MixedTargets(
            parts=[
                *(ExactTargets(hidden_NE=hidden, head=head) for hidden, head in zip(states, heads, strict=True)),
                FullTargets(logprobs_NV=self.logits[2].log_softmax(dim=1)),
            ],
            weights=[0.5, 0.3, 0.2],
        )

    def fused(self, **options):
        arguments = {"token_ids_N": self.ids, "head": self.head, "vocab_size": VOCAB, "targets": self.targets}
        return distillation_loss(self.hidden, **arguments | options)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, [self.hidden, self.head.weight_RD, self.head.bias_R]))


@pytest.mark.parametrize("name", DIVERGENCE_TERMS)
@pytest.mark.parametrize(("alpha", "temperature"), [(1.0, 1.0), (0.3, 2.0), (10.0, 0.5)])
@pytest.mark.parametrize("seed", range(3))
def test_values_and_gradients_equal_plain_autograd(name: str, alpha: float, temperature: float, seed: int) -> None:
    divergence, options = DIVERGENCE_TERMS[name]
    case = Case(seed)
    chunk_size = (1, 4, 100)[seed]
    arguments = {"alpha": alpha, "temperature": temperature, "divergence": name.split()[0]} | options
    sums = case.fused(**arguments, chunk_size=chunk_size)

    logits = plain_logits(case.hidden, case.head, VOCAB)
    log_q = torch.log_softmax(logits / temperature, dim=1)
    probs = [torch.softmax(scores / temperature, dim=1) for scores in case.logits]
    mean = sum(weight * p for weight, p in zip(case.targets.weights, probs, strict=True))
    soft = temperature**2 * divergence(mean.log(), log_q)
    total = torch.nn.functional.cross_entropy(logits, case.ids, reduction="sum") + alpha * soft
    torch.testing.assert_close(sums.soft, soft.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sums.total, total.detach(), rtol=1e-9, atol=1e-9)
    for actual, wanted in zip(case.gradients(sums.total), case.gradients(total), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-9)


def test_teachers_that_agree_are_as_one() -> None:
    case = Case(7)
    part = case.targets.parts[0]
    twice = case.fused(targets=MixedTargets(parts=[part, part], weights=[0.9, 0.1]), alpha=0.7, temperature=1.5)
    once = case.fused(targets=part, alpha=0.7, temperature=1.5)
    torch.testing.assert_close(twice.total, once.total)
    for actual, wanted in zip(case.gradients(twice.total), case.gradients(once.total), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_what_is_observed_is_that_of_the_mean() -> None:
    """Entropy at temperature 1 can be told from labels that were averaged at temperature 1 only."""
    case = Case(8)
    probs = [torch.softmax(scores, dim=1) for scores in case.logits]
    mean = sum(weight * p for weight, p in zip(case.targets.weights, probs, strict=True))
    observed = case.fused(alpha=1.0, observe=True).observed
    assert set(observed) == set(OBSERVED)
    torch.testing.assert_close(observed["teacher_entropy"], torch.special.entr(mean).sum())
    likeliest = plain_logits(case.hidden, case.head, VOCAB).argmax(dim=1)
    assert observed["agreement"] == (likeliest == mean.argmax(dim=1)).sum()
    assert "teacher_entropy" not in case.fused(alpha=1.0, temperature=2.0, observe=True).observed


def test_logits_of_one_chunk_exist_at_a_time() -> None:
    """Through the heads of all teachers: no tensor of all positions by the vocabulary is made."""
    rows, vocab, made = 64, 500, []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if isinstance(result, Tensor) and result.dim() == 2 and result.shape[1] == vocab:
                made.append(result.shape[0])
            return result

    generator = torch.Generator().manual_seed(0)
    heads = [OutputHead(weight_RD=torch.randn(vocab, size, generator=generator)) for size in (8, 12, 16)]
    parts = [ExactTargets(hidden_NE=torch.randn(rows, head.weight_RD.shape[1]), head=head) for head in heads[1:]]
    with Watch():
        distillation_loss(
            torch.randn(rows, 8).requires_grad_(),
            token_ids_N=torch.arange(rows),
            head=heads[0],
            vocab_size=vocab,
            targets=MixedTargets(parts=parts, weights=[0.5, 0.5]),
            alpha=1.0,
            chunk_size=4,
        )
    # The heads themselves, transposed, have as many rows as their width.
    assert set(made) - {8, 12, 16} == {4}


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another teacher with the same tokenizer, of other width and weights."""
    return sharp_model(tmp_path_factory.mktemp("other"), seed=9, hidden_size=40, padded_rows=2, factor=20)


@pytest.fixture(scope="module")
def other_address(other_model: Path) -> Iterator[str]:
    options = TeacherOptions(model=str(other_model), engine="transformers", port=0, label_dtype="float32")
    with running_teacher(options) as address:
        yield address


@pytest.fixture
def both_settings(kd_settings: Settings, other_model: Path, other_address: str) -> Settings:
    return kd_settings.model_copy(update={"teacher_addresses": {str(other_model): other_address}})


@pytest.fixture
def make_mixed_run(make_run: MakeRun, teacher_model: Path, other_model: Path) -> Callable:
    def make(**changes: object):
        teacher = {"model": str(teacher_model), "weight": 3, "others": [{"model": str(other_model), "weight": 1}]}
        return make_run(alpha=1.0, teacher=teacher, **changes)

    return make


def mean_divergence(models: dict[Path, float], student: Path, records_file: Path) -> float:
    """Mean KL(mean of teachers || student) over response tokens, from transformers' own logits in float64."""
    from services.contract.spec import DatasetSpec

    tokenizer = AutoTokenizer.from_pretrained(student)
    batch = collate(encode_examples(load_records(DatasetSpec(path=str(records_file))), tokenizer, max_length=256))

    def probs(directory: Path) -> Tensor:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits.flatten(0, 1)[batch["predictor_N"], : len(tokenizer)].softmax(dim=1)

    mean = sum(weight * probs(directory) for directory, weight in models.items())
    return (mean * (mean.log() - probs(student).log())).sum(dim=1).mean().item()


@pytest.mark.parametrize("encoding", ["exact", "full"])
def test_a_run_learns_the_mean_of_two_served_teachers(
    encoding: str,
    make_mixed_run: Callable,
    both_settings: Settings,
    student_model: Path,
    teacher_model: Path,
    other_model: Path,
    records_file: Path,
    tmp_path: Path,
) -> None:
    points: list[MetricPoint] = []
    distillation = {"divergence": "forward_kl", "labels": {"encoding": encoding}}
    spec = make_mixed_run(batch_size=10, distillation=distillation, training={"epochs": 6})
    model = train(spec, out=tmp_path / "run", settings=both_settings, on_metrics=points.extend)
    teachers = {teacher_model: 0.75, other_model: 0.25}
    before = mean_divergence(teachers, student_model, records_file)
    first = next(point.value for point in points if point.name == "soft_loss")
    assert first == pytest.approx(before, rel=1e-4 if encoding == "exact" else 1e-3)
    assert mean_divergence(teachers, model, records_file) < 0.8 * before
    card = (model / "README.md").read_text()
    assert f"| teacher | {teacher_model}, weight 0.75 |" in card
    assert f"| another teacher | {other_model}, weight 0.25 |" in card


@pytest.mark.parametrize("encoding", ["exact", "full"])
@pytest.mark.parametrize("wrong", ["first", "other"])
def test_any_of_them_that_goes_wrong_in_mid_run_stops_it(
    wrong: str,
    encoding: str,
    make_mixed_run: Callable,
    both_settings: Settings,
    teacher_model: Path,
    other_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And is named, whichever it is."""
    model = {"first": teacher_model, "other": other_model}[wrong]
    go_wrong(monkeypatch, at=both_settings.address_of(str(model)))
    spec = make_mixed_run(distillation={"labels": {"encoding": encoding}}, training={"checkpoint_steps": 1})
    with stopped(tmp_path / "run", teacher=model):
        train(spec, out=tmp_path / "run", settings=both_settings)


def test_on_policy_steps_are_scored_by_all_teachers(
    make_mixed_run: Callable, both_settings: Settings, student_model: Path, tmp_path: Path
) -> None:
    """Weights given in another scale are the same mean, in every kind of step."""
    on_policy = {"on_policy": {"fraction": 0.5, "max_new_tokens": 6}}
    spec = make_mixed_run(distillation=on_policy)
    teacher = spec.teacher.model_dump(mode="json")
    scaled = make_mixed_run(distillation=on_policy).model_copy(
        update={
            "teacher": type(spec.teacher).model_validate(
                teacher | {"weight": 1.5, "others": [teacher["others"][0] | {"weight": 0.5}]}
            )
        }
    )
    assert spec.key != scaled.key
    assert_close_weights(
        train(spec, out=tmp_path / "one", settings=both_settings),
        train(scaled, out=tmp_path / "other", settings=both_settings),
        start=student_model,
        share=1e-3,
    )


def test_two_teachers_at_one_address_are_refused(
    make_mixed_run: Callable, kd_settings: Settings, other_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInputError, match="both looked for at") as caught:
        train(make_mixed_run(), out=tmp_path / "run", settings=kd_settings)
    assert "SMOOTHKD_TEACHER_ADDRESSES" in caught.value.fix
    assert str(other_model) in caught.value.fix
    assert not (tmp_path / "run").exists()


def test_every_teacher_must_have_the_student_s_tokenizer(
    make_run: MakeRun, kd_settings: Settings, teacher_model: Path, tmp_path: Path
) -> None:
    stranger = make_tiny_model(tmp_path / "stranger", vocab_size=290)
    spec = make_run(alpha=1.0, teacher={"model": str(teacher_model), "others": [{"model": str(stranger)}]})
    with running_teacher(TeacherOptions(model=str(stranger), engine="mock", port=0)) as address:
        settings = kd_settings.model_copy(update={"teacher_addresses": {str(stranger): address}})
        with pytest.raises(HandshakeError, match="token ids"):
            train(spec, out=tmp_path / "run", settings=settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distillation": {"labels": {"encoding": "top_k", "k": 4}}}, "labels.encoding to exact"),
        ({"distillation": {"labels": {"path": "labels"}}}, "those of one teacher"),
        ({"distillation": {"cross_tokenizer": "uld"}}, "share the student's tokenizer"),
        ({"teacher": {"model": "a", "others": [{"model": "a"}]}}, "more than once"),
        ({"teacher": {"model": "a", "weight": 2}}, "only goes with others"),
        ({"teacher": {"model": "a", "others": [{"model": "b", "weight": 0}]}}, "weight"),
    ],
)
def test_teachers_that_cannot_be_averaged_are_refused(make_run: MakeRun, changes: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make_run(alpha=1.0, **{"teacher": {"model": "a", "others": [{"model": "b"}]}} | changes)


def test_decodes_are_those_of_the_first_teacher(make_run: MakeRun) -> None:
    level = {"distillation": {"level": "word+sequence"}}
    keys = {
        make_run(alpha=1.0, teacher={"model": "a"} | others, **level).decode_key
        for others in ({}, {"others": [{"model": "b"}]}, {"weight": 2, "others": [{"model": "b"}]})
    }
    assert len(keys) == 1


def test_addresses_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOOTHKD_TEACHER_ADDRESSES", '{"org/b": "b:1,c:1"}')
    settings = load_settings()
    assert settings.address_of("org/b") == "b:1,c:1"
    assert settings.address_of("org/a") == settings.resolved_teacher_address
    monkeypatch.setenv("SMOOTHKD_TEACHER_ADDRESSES", "org/b=b:1")
    with pytest.raises(InvalidInputError, match=r"SMOOTHKD_TEACHER_ADDRESSES: .*not JSON"):
        load_settings()
