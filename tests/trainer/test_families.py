"""Students of every family: the loss and what is saved, against transformers' own logits and plain formulas."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from services.contract.distillation_spec import StudentSpec
from services.contract.settings import Settings
from student_trainer.data import collate, encode_examples
from student_trainer.loss import distillation_loss
from student_trainer.student import final_hidden_states, load_student, output_head
from student_trainer.targets import ExactTargets, SoftTargets
from student_trainer.train import train
from tests.teacher.models import ARCHITECTURES
from tests.trainer.conftest import RECORDS
from tests.trainer.loss_reference import top_k_targets
from tests.trainer.runs import MakeRun, plainly_trained

FAMILIES = sorted(ARCHITECTURES)


@pytest.mark.parametrize("labels", ["none", "exact", "top_k"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_and_its_gradients_equal_the_formula_on_the_models_own_logits(
    name: str, labels: str, family: Callable[[str], Path], settings: Settings
) -> None:
    directory = family(name)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    vocab_size = len(tokenizer)
    batch = collate(encode_examples(RECORDS[:4], tokenizer, max_length=256))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    token_ids = batch["input_ids"].flatten()[batch["predictor_N"] + 1]

    student = load_student(StudentSpec(model=str(directory)), settings, vocab_size=vocab_size).double()
    teacher = stirred(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64))
    targets: SoftTargets | None = None
    log_p = torch.empty(0)
    if labels != "none":
        with torch.no_grad():
            logits = teacher(**inputs).logits.flatten(0, 1)[batch["predictor_N"], :vocab_size]
            hidden = final_hidden_states(teacher, head_layer=teacher.get_output_embeddings(), **inputs)
        log_p = logits.log_softmax(dim=1)
        exact = ExactTargets(hidden_NE=hidden.flatten(0, 1)[batch["predictor_N"]], head=output_head(teacher))
        targets = exact if labels == "exact" else top_k_targets(logits, 20, 1.0)

    hidden = final_hidden_states(student, head_layer=student.get_output_embeddings(), **inputs)
    sums = distillation_loss(
        hidden.flatten(0, 1)[batch["predictor_N"]],
        token_ids_N=token_ids,
        head=output_head(student),
        vocab_size=vocab_size,
        targets=targets,
        alpha=2.0,
    )
    sums.total.backward()

    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    logits = plain(**inputs).logits.flatten(0, 1)[batch["predictor_N"], :vocab_size]
    log_q = logits.log_softmax(dim=1)
    expected = -log_q.gather(1, token_ids.unsqueeze(1)).sum()
    if labels == "exact":
        expected = expected - 2.0 * (log_p.exp() * log_q).sum()
    elif labels == "top_k":
        kept = log_p.topk(20, dim=1)
        p, q = kept.values.exp(), log_q.exp().gather(1, kept.indices)
        ghost = (1 - p.sum(dim=1)) * torch.log1p(-q.sum(dim=1))
        expected = expected - 2.0 * ((p * q.log()).sum() + ghost.sum())
    expected.backward()
    # Norms of some families compute in float32 whatever their weights are.
    torch.testing.assert_close(sums.total, expected, rtol=1e-6, atol=0)
    wanted = dict(plain.named_parameters())
    for key, parameter in student.named_parameters():
        assert parameter.grad is not None, key
        apart = (parameter.grad - wanted[key].grad).norm()
        assert apart <= 1e-5 * wanted[key].grad.norm() + 1e-9, (key, apart)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_trained_student_is_one_that_transformers_loads(
    name: str, family: Callable[[str], Path], make_run: MakeRun, settings: Settings, tmp_path: Path
) -> None:
    """Its logits are those of the same model after a plain training loop."""
    directory = family(name)
    spec = make_run(
        student={"model": str(directory)}, learning_rate=1e-3, batch_size=5, training={"epochs": 1, "warmup_ratio": 0.0}
    )
    saved = train(spec, out=tmp_path / "run", settings=settings)
    loaded = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    expected = plainly_trained(spec, directory)
    before = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.arange(3, 43).unsqueeze(0)
    with torch.no_grad():
        found, wanted, start = (model(input_ids=ids).logits for model in (loaded, expected, before))
    assert (found - wanted).norm() <= 1e-2 * (wanted - start).norm()


def stirred(model: PreTrainedModel) -> PreTrainedModel:
    """Other weights than the student's, still of the family."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model
