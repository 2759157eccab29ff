"""Students with an encoder and a decoder: against transformers' own loss, plain loops and plain decoding."""

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from services.contract.distillation_spec import OnPolicySpec, StudentSpec
from services.contract.errors import UnsupportedError
from services.contract.records import MetricPoint
from services.contract.settings import Settings
from services.evaluation.answering import Request, answer, encode_requests
from services.evaluation.lookback.features import load_lens_model
from services.evaluation.model import load_model
from student_trainer import log_window, trainer
from student_trainer.data import Example, encode_examples, model_inputs
from student_trainer.encoder_decoder import collate_apart
from student_trainer.loss import distillation_loss
from student_trainer.on_policy import OnPolicy
from student_trainer.student import final_hidden_states, load_student, output_head
from student_trainer.train import train
from tests.trainer.conftest import RECORDS
from tests.trainer.encoder_decoders import ARCHITECTURES, START, make_encoder_decoder
from tests.trainer.misaligned import go_wrong, stopped
from tests.trainer.runs import MakeRun, assert_same_bits
from tests.trainer.universal_reference import ULD, mean_distance


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny model of an architecture."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make_encoder_decoder(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_hard_loss_and_its_gradients_are_transformers_own(
    name: str, make: Callable[[str], Path], settings: Settings
) -> None:
    directory = make(name)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    student = load_student(StudentSpec(model=str(directory)), settings, vocab_size=len(tokenizer)).double()
    head = output_head(student)
    batch = collate_apart(encode_examples(RECORDS[:4], tokenizer, max_length=256), start_id=START)
    hidden = final_hidden_states(student, head_layer=student.get_output_embeddings(), **model_inputs(batch))
    sums = distillation_loss(
        hidden.flatten(0, 1)[batch["predictor_N"]],
        token_ids_N=batch["learnt_N"],
        head=head,
        vocab_size=head.weight_RD.shape[0],
    )
    sums.total.backward()

    plain = AutoModelForSeq2SeqLM.from_pretrained(directory, dtype=torch.float64)
    expected = plain(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
    ).loss * len(batch["learnt_N"])
    expected.backward()
    torch.testing.assert_close(sums.total, expected, rtol=1e-6, atol=0)
    wanted = dict(plain.named_parameters())
    for key, parameter in student.named_parameters():
        assert parameter.grad is not None, key
        assert (parameter.grad - wanted[key].grad).norm() <= 1e-5 * wanted[key].grad.norm() + 1e-9, key


def test_the_prompt_is_read_by_the_encoder_and_the_response_learnt_by_the_decoder(make: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make("t5-tied-scaled"))
    example = encode_examples(RECORDS[:1], tokenizer, max_length=256)[0]
    batch = collate_apart([example, *encode_examples(RECORDS[1:4], tokenizer, max_length=256)], start_id=START)
    kept = batch["attention_mask"][0].bool()
    prompt = "### Instruction:\nName 0 ports.\n\n### Response:\n"
    assert batch["input_ids"][0][kept].tolist() == tokenizer(prompt)["input_ids"]
    response = tokenizer("ports of Ostrel")["input_ids"]
    assert batch["labels"][0].tolist()[: len(response)] == response
    assert set(batch["labels"][0].tolist()[len(response) :]) <= {-100}
    assert batch["decoder_input_ids"][0].tolist()[: len(response)] == [START, *response[:-1]]
    assert batch["learnt_N"].tolist()[: len(response)] == response


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_trained_student_is_that_of_a_plain_training_loop(
    name: str, make: Callable[[str], Path], make_run: MakeRun, settings: Settings, tmp_path: Path
) -> None:
    directory = make(name)
    spec = make_run(
        student={"model": str(directory)}, learning_rate=1e-3, batch_size=5, training={"epochs": 1, "warmup_ratio": 0.0}
    )
    saved = train(spec, out=tmp_path / "run", settings=settings)
    found, expected, start = (
        AutoModelForSeq2SeqLM.from_pretrained(path, dtype=torch.float32) for path in (saved, directory, directory)
    )
    assert GenerationConfig.from_pretrained(saved).decoder_start_token_id == START
    assert "pipeline_tag: text2text-generation\n" in (saved / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(saved)
    examples = encode_examples(RECORDS, tokenizer, max_length=256)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=spec.learning_rate, weight_decay=0.0)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(spec.seed)).tolist()
    for first in range(0, len(order), spec.batch_size):
        batch = collate_apart([examples[index] for index in order[first : first + spec.batch_size]], start_id=START)
        logits = expected(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}).logits
        torch.nn.functional.cross_entropy(
            logits[..., : len(tokenizer)].flatten(0, 1), batch["labels"].flatten()
        ).backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), spec.training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    ids = torch.arange(3, 43).unsqueeze(0)
    with torch.no_grad():
        one, other, before = (
            model(input_ids=ids, decoder_input_ids=ids).logits[..., : len(tokenizer)]
            for model in (found, expected, start)
        )
    assert (one - other).norm() <= 1e-2 * (other - before).norm()


def test_a_decoder_alone_teaches_it_across_tokenizers(
    make: Callable[[str], Path], make_run: MakeRun, kd_settings: Settings, teacher_model: Path, tmp_path: Path
) -> None:
    """The first step logs the distance of the untrained student's sorted probabilities, as its own logits give it."""
    directory = make("t5-tied-scaled")
    points: list[MetricPoint] = []
    spec = make_run(
        student={"model": str(directory)},
        alpha=10.0,
        batch_size=10,
        distillation=ULD,
        training={"epochs": 12, "held_out": 0},
    )
    train(spec, out=tmp_path / "run", settings=kd_settings, on_metrics=points.extend)
    soft = [point.value for point in points if point.name == "soft_loss"]
    assert soft[0] == pytest.approx(mean_distance(directory, teacher_model), rel=1e-4)
    assert soft[-1] < 0.7 * soft[0]


def test_a_decoder_that_goes_wrong_in_mid_run_stops_it(
    make: Callable[[str], Path],
    make_run: MakeRun,
    kd_settings: Settings,
    teacher_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompt and response are one sequence for the teacher, and two for the student."""
    go_wrong(monkeypatch, at=kd_settings.teacher_address)
    spec = make_run(student={"model": str(make("bart"))}, alpha=1.0, distillation=ULD, training={"checkpoint_steps": 1})
    with stopped(tmp_path / "run", teacher=teacher_model):
        train(spec, out=tmp_path / "run", settings=kd_settings)


def test_an_interrupted_run_with_adapters_and_held_out_records_gives_the_same_bits(
    make: Callable[[str], Path], make_run: MakeRun, settings: Settings, tmp_path: Path
) -> None:
    spec = make_run(
        student={"model": str(make("mt5-untied-gated")), "lora": {"rank": 4}},
        training={"held_out": 2, "checkpoint_steps": 1, "epochs": 3},
    )
    points: list[MetricPoint] = []
    whole = train(spec, out=tmp_path / "whole", settings=settings, on_metrics=points.extend)
    held_out = [point.value for point in points if point.name == "held_out_loss"]
    tokenizer = AutoTokenizer.from_pretrained(whole)
    model = AutoModelForSeq2SeqLM.from_pretrained(whole, dtype=torch.float32)
    batch = collate_apart(encode_examples(RECORDS[-2:], tokenizer, max_length=256), start_id=START)
    with torch.no_grad():
        expected = model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}).loss.item()
    assert held_out[-1] == pytest.approx(expected, rel=1e-3)

    asked = iter(range(3))
    with pytest.raises(Exception, match="stopped at step"):
        train(spec, out=tmp_path / "parts", settings=settings, should_stop=lambda: next(asked, None) is None)
    assert_same_bits(train(spec, out=tmp_path / "parts", settings=settings), whole)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_responses_of_its_own_are_those_that_transformers_decodes(
    name: str, make: Callable[[str], Path]
) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(make(name), dtype=torch.float32).eval()
    examples = [
        Example(index=index, token_ids=[*range(5, 5 + length), 1], prompt_length=length)
        for index, length in enumerate((9, 4, 6))
    ]
    policy = OnPolicy(
        spec=OnPolicySpec(fraction=1.0, max_new_tokens=7, temperature=0.0),
        seed=1,
        vocab_size=model.config.vocab_size,
        max_length=64,
        stop_ids=(),
    )
    found = policy.decode(model, examples, step=0)
    for example, decoded in zip(examples, found, strict=True):
        prompt = example.token_ids[: example.prompt_length]
        expected = [START]
        for _ in range(7):
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([expected])).logits
            expected.append(int(logits[0, -1].argmax()))
        assert decoded.token_ids == [*prompt, *expected[1:]]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_it_is_evaluated_like_any_other(name: str, make: Callable[[str], Path], batch_size: int) -> None:
    loaded = load_model(str(make(name)))
    requests = [
        Request(item_id=str(count), instruction="Summarize.", source="ferry harbour " * count, reference="")
        for count in (1, 4, 2)
    ]
    prompts = encode_requests(requests, loaded=loaded, max_new_tokens=6)
    answers = [
        one
        for batch in answer(requests, prompts, loaded=loaded, max_new_tokens=6, batch_size=batch_size, measure=True)
        for one in batch
    ]
    assert {one.request.item_id for one in answers} == {"1", "4", "2"}
    for one in answers:
        # Lookback ratios need one attention over prompt and answer.
        assert one.measured is None
        ids = [START]
        with torch.no_grad():
            for _ in range(6):
                inputs = {"input_ids": torch.tensor([one.prompt.ids]), "decoder_input_ids": torch.tensor([ids])}
                ids.append(int(loaded.model(**inputs).logits[0, -1].argmax()))
                if ids[-1] in loaded.eos_ids:
                    break
        assert one.output == loaded.tokenizer.decode(ids[1:], skip_special_tokens=True).strip()


def test_a_lens_of_it_is_refused(make: Callable[[str], Path], settings: Settings) -> None:
    """Of BART transformers would load half a decoder, with a head of random weights."""
    for name in ARCHITECTURES:
        with pytest.raises(UnsupportedError, match="no attention of it weighs"):
            load_lens_model(str(make(name)), settings=settings)


def test_packing_is_refused(make: Callable[[str], Path], make_run: MakeRun, settings: Settings, tmp_path: Path) -> None:
    spec = make_run(student={"model": str(make("t5-tied-scaled"))}, training={"packing": True})
    with pytest.raises(UnsupportedError, match="not packed"):
        train(spec, out=tmp_path / "run", settings=settings)


def test_one_that_does_not_say_how_its_decoder_starts_is_refused(
    make: Callable[[str], Path], make_run: MakeRun, settings: Settings, tmp_path: Path
) -> None:
    directory = tmp_path / "silent"
    model = AutoModelForSeq2SeqLM.from_pretrained(make("bart"))
    model.generation_config.decoder_start_token_id = None
    model.config.decoder_start_token_id = None
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(make("bart")).save_pretrained(directory)
    with pytest.raises(UnsupportedError, match="which token its decoder starts with"):
        train(make_run(student={"model": str(directory)}), out=tmp_path / "run", settings=settings)


def test_speed_counts_what_both_halves_read_and_use_of_a_gpu_is_not_told(
    make: Callable[[str], Path],
    make_run: MakeRun,
    settings: Settings,
    student_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its flops per token differ between the halves, so the share of a GPU's would be wrong; None says so."""
    monkeypatch.setattr(trainer, "model_flops_utilization", lambda **_: 0.5)
    for name, directory in {"both halves": make("bart"), "decoder alone": student_model}.items():
        # A clock that moves one second whenever it is read: at the start and at each log.
        monkeypatch.setattr(log_window, "time", SimpleNamespace(monotonic=itertools.count().__next__))
        points: list[MetricPoint] = []
        spec = make_run(student={"model": str(directory)}, batch_size=10, training={"epochs": 1})
        train(spec, out=tmp_path / name, settings=settings, on_metrics=points.extend)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        lengths = [len(example.token_ids) for example in encode_examples(RECORDS, tokenizer, max_length=256)]
        found = {point.name: point.value for point in points}
        assert found["tokens_per_second"] == sum(lengths)
        assert found.get("mfu") == (0.5 if name == "decoder alone" else None)
