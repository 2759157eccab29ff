"""Students that train adapters, against PEFT used by hand and against full labels."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.contract.distillation_spec import StudentSpec
from services.contract.errors import CancelledError, MissingExtraError, SpecError, UnsupportedError
from services.contract.settings import Settings
from services.contract.spec import RunSpec
from services.datasets.reading import load_records
from student_trainer.adapters import merged_model
from student_trainer.data import collate, encode_examples
from student_trainer.labels import label_request, soft_targets
from student_trainer.loss import distillation_loss
from student_trainer.student import final_hidden_states, load_student, output_head
from student_trainer.teacher import connect_teacher
from student_trainer.train import train
from teacher_server.server import TeacherOptions
from tests.teacher.models import make_model
from tests.teacher.serving import running_teacher
from tests.trainer.runs import MakeRun, assert_same_bits, stop_after, weights

LORA = {"rank": 4, "alpha": 8}
IDS = torch.arange(3, 23).reshape(2, 10)


def lora_student(directory: Path, settings: Settings, *, dtype: torch.dtype = torch.float32, **lora) -> PeftModel:
    spec = StudentSpec(model=str(directory), lora=LORA | lora)
    return load_student(spec, settings, vocab_size=300, frozen_dtype=dtype, seed=7)


def stir(model: torch.nn.Module) -> None:
    """Adapters begin with half of their weights 0; give them something to say."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def loss_and_gradients(spec: RunSpec, student: PeftModel, settings: Settings) -> tuple[list[float], list[torch.Tensor]]:
    """One batch of all records with labels from the teacher that serves."""
    tokenizer = AutoTokenizer.from_pretrained(spec.student.model)
    examples = encode_examples(load_records(spec.dataset), tokenizer, max_length=256)
    batch = collate(examples)
    teacher = connect_teacher(spec, tokenizer=tokenizer, settings=settings)
    head = output_head(student)
    if teacher.options.encoding == "projected":
        teacher = teacher.projecting(head, vocab_size=len(tokenizer), dtype=torch.float32)
    requests = [label_request(example, id=str(example.index)) for example in examples]
    scored = {each.id: each.labels for each in teacher.source.score(requests, teacher.options)}
    teacher_head = teacher.head_on(torch.device("cpu"), dtype=torch.float32)
    teacher.source.close()
    hidden = final_hidden_states(
        student,
        head_layer=student.get_output_embeddings(),
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
    )
    sums = distillation_loss(
        hidden.flatten(0, 1)[batch["predictor_N"]],
        token_ids_N=batch["input_ids"].flatten()[batch["predictor_N"] + 1],
        head=head,
        vocab_size=len(tokenizer),
        targets=soft_targets(
            [scored[request.id] for request in requests], teacher_head=teacher_head, device=torch.device("cpu")
        ),
        alpha=spec.alpha,
        temperature=spec.distillation.temperature,
    )
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    return [value.item() for value in sums[:3]], list(torch.autograd.grad(sums.total, trained))


@pytest.mark.parametrize(("label_dtype", "temperature"), [("float32", 1.0), ("float32", 2.0), ("float16", 1.0)])
def test_projected_labels_train_as_exact_ones_do(
    label_dtype: str,
    temperature: float,
    make_run: MakeRun,
    settings: Settings,
    student_model: Path,
    teacher_model: Path,
) -> None:
    student = lora_student(student_model, settings)
    stir(student)
    found = {}
    options = TeacherOptions(model=str(teacher_model), engine="transformers", port=0, label_dtype=label_dtype)
    with running_teacher(options) as address:
        for encoding in ("exact", "projected"):
            spec = make_run(
                alpha=10.0,
                student={"model": str(student_model), "lora": LORA},
                distillation={"labels": {"encoding": encoding}, "temperature": temperature},
            )
            here = settings.model_copy(update={"teacher_address": address})
            found[encoding] = loss_and_gradients(spec, student, here)
    rounding = 1e-5 if label_dtype == "float32" else 2.0**-10
    assert found["projected"][0] == pytest.approx(found["exact"][0], rel=rounding)
    for actual, expected in zip(found["projected"][1], found["exact"][1], strict=True):
        assert expected.norm() > 0
        assert (actual - expected).norm() <= 10 * rounding * expected.norm()


def plain_peft(spec: RunSpec, directory: Path) -> dict[str, torch.Tensor]:
    """LoRA as anybody would train it, on transformers' own token mean; the merged weights."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    lora = spec.student.lora
    torch.manual_seed(spec.seed)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    peft = get_peft_model(model, config)
    examples = encode_examples(load_records(spec.dataset), tokenizer, max_length=spec.training.max_length)
    trained = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=spec.learning_rate, weight_decay=0.0)
    for epoch in range(spec.training.epochs):
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(spec.seed + epoch)).tolist()
        for start in range(0, len(order), spec.batch_size):
            batch = collate([examples[index] for index in order[start : start + spec.batch_size]])
            logits = peft(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1, : len(tokenizer)].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, spec.training.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    return dict(peft.merge_and_unload().named_parameters())


def test_a_lora_run_equals_plain_peft_and_saves_a_plain_model(
    make_run: MakeRun, settings: Settings, student_model: Path, tmp_path: Path
) -> None:
    spec = make_run(student={"model": str(student_model), "lora": LORA}, training={"warmup_ratio": 0.0})
    model = train(spec, out=tmp_path / "run", settings=settings)
    trained, before, expected = weights(model), weights(student_model), plain_peft(spec, student_model)
    assert set(trained) == set(before)
    for name, tensor in trained.items():
        if "proj" in name:
            way = (expected[name] - before[name]).norm()
            assert way > 0
            assert (expected[name] - tensor).norm() <= 1e-3 * way + 1e-6, name
        else:
            assert torch.equal(tensor, before[name]), name

    # The adapter beside it, onto the model it was trained from, gives the merged model.
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(student_model), model / "adapter")
    assert adapted.peft_config["default"].base_model_name_or_path == str(student_model)
    merged = AutoModelForCausalLM.from_pretrained(model)
    assert AutoTokenizer.from_pretrained(model).chat_template
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, adapted(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["model", "run.yaml"]


@pytest.mark.parametrize("encoding", ["exact", "projected"])
def test_an_interrupted_lora_run_ends_with_the_same_bits(
    encoding: str, make_run: MakeRun, settings: Settings, mock_address: str, student_model: Path, tmp_path: Path
) -> None:
    settings = settings.model_copy(update={"teacher_address": mock_address})
    spec = make_run(
        alpha=0.5,
        student={"model": str(student_model), "lora": LORA | {"dropout": 0.2}},
        teacher={"model": str(student_model)},
        distillation={"labels": {"encoding": encoding}},
        training={"lr_scheduler": "cosine"},
    )
    straight = train(spec, out=tmp_path / "straight", settings=settings)
    for stop in (2, 5, 9):
        with pytest.raises(CancelledError, match="stopped at step"):
            train(spec, out=tmp_path / "broken", settings=settings, should_stop=stop_after(stop))
    checkpoint = next((tmp_path / "broken" / "checkpoints").iterdir())
    assert not (checkpoint / "model.safetensors").exists(), "frozen weights are not saved with every checkpoint"
    assert_same_bits(train(spec, out=tmp_path / "broken", settings=settings), straight)


def test_projected_and_exact_runs_end_alike(
    make_run: MakeRun, kd_settings: Settings, student_model: Path, tmp_path: Path
) -> None:
    models = [
        weights(
            train(
                make_run(
                    alpha=1.0,
                    student={"model": str(student_model), "lora": LORA},
                    distillation={"labels": {"encoding": encoding}},
                ),
                out=tmp_path / encoding,
                settings=kd_settings,
            )
        )
        for encoding in ("exact", "projected")
    ]
    before = weights(student_model)
    for name in before:
        way = (models[0][name] - before[name]).norm()
        assert (models[0][name] - models[1][name]).norm() <= 1e-2 * way + 1e-6, name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_weights_are_held_in_the_runs_precision(
    checkpointing: bool, make_run: MakeRun, settings: Settings, student_model: Path, tmp_path: Path
) -> None:
    student = lora_student(student_model, settings, dtype=torch.bfloat16)
    held = {parameter.dtype for parameter in student.parameters() if not parameter.requires_grad}
    trained = {parameter.dtype for parameter in student.parameters() if parameter.requires_grad}
    assert (held, trained) == ({torch.bfloat16}, {torch.float32})
    training = {"precision": "bf16", "gradient_checkpointing": checkpointing}
    spec = make_run(student={"model": str(student_model), "lora": LORA}, training=training)
    result = weights(train(spec, out=tmp_path / "run", settings=settings))
    before = weights(student_model)
    assert {tensor.dtype for tensor in result.values()} == {torch.bfloat16}
    changed = {name for name in before if not torch.equal(result[name], before[name].bfloat16())}
    assert changed == {name for name in before if "proj" in name}


def test_an_adapter_on_the_output_head_is_in_the_loss(settings: Settings, student_model: Path) -> None:
    student = lora_student(student_model, settings, target_modules=["lm_head", "q_proj"])
    stir(student)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    vocab_size = 290
    logits = student(input_ids=IDS).logits[:, :-1, :vocab_size].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, IDS[:, 1:].flatten(), reduction="sum")
    expected_gradients = torch.autograd.grad(expected, trained)
    hidden = final_hidden_states(student, head_layer=student.get_output_embeddings(), input_ids=IDS)
    sums = distillation_loss(
        hidden[:, :-1].flatten(0, 1),
        token_ids_N=IDS[:, 1:].flatten(),
        head=output_head(student),
        vocab_size=vocab_size,
    )
    torch.testing.assert_close(sums.total, expected)
    for actual, wanted in zip(torch.autograd.grad(sums.total, trained), expected_gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-5)


def test_targets_that_match_nothing_are_named_with_what_there_is(settings: Settings, student_model: Path) -> None:
    with pytest.raises(SpecError, match="no linear layer of LlamaForCausalLM is called 'query'") as caught:
        lora_student(student_model, settings, target_modules=["q_proj", "query"])
    known = ("down_proj", "gate_proj", "k_proj", "lm_head", "o_proj", "q_proj", "up_proj", "v_proj")
    assert ", ".join(known) in caught.value.fix


def test_targets_are_ends_of_names(settings: Settings, student_model: Path) -> None:
    student = lora_student(student_model, settings, target_modules=["layers.1.self_attn.v_proj", "o_proj"])
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    layers = {name.split(".lora_")[0].removeprefix("base_model.model.model.") for name in trained}
    assert layers == {"layers.1.self_attn.v_proj", "layers.0.self_attn.o_proj", "layers.1.self_attn.o_proj"}


def test_every_linear_layer_but_the_head_gets_an_adapter(settings: Settings, tiny_model: Path, tmp_path: Path) -> None:
    """GPT-2's layers are of another kind, and its head is its embedding."""
    directory = make_model("gpt2-tied", tmp_path / "gpt2", tokenizer_from=tiny_model)
    student = lora_student(directory, settings)
    trained = {name.split(".lora_")[0] for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".h.")[2] for name in trained} == {
        f"{layer}.{part}" for layer in "01" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    with pytest.raises(SpecError, match="shares its weights with the embedding"):
        lora_student(directory, settings, target_modules=["lm_head"])


def test_dropout_on_the_output_head_is_refused(settings: Settings, student_model: Path) -> None:
    with pytest.raises(SpecError, match="dropout cannot be applied to the output head lm_head"):
        lora_student(student_model, settings, target_modules=["lm_head"], dropout=0.1)


@pytest.mark.parametrize(
    ("architecture", "targets", "words"),
    [
        ("gemma2-soft-cap", None, "capped at 5"),
        ("llama-padded", ["lm_head"], "this one is trained"),
    ],
)
def test_projected_labels_are_refused_before_anything_trains(
    architecture: str,
    targets: list[str] | None,
    words: str,
    make_run: MakeRun,
    settings: Settings,
    mock_address: str,
    student_model: Path,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    directory = make_model(architecture, tmp_path / "student", tokenizer_from=student_model)
    spec = make_run(
        alpha=1.0,
        student={"model": str(directory), "lora": LORA | {"target_modules": targets}},
        teacher={"model": str(student_model)},
        distillation={"labels": {"encoding": "projected"}},
    )
    here = settings.model_copy(update={"teacher_address": mock_address})
    with pytest.raises(UnsupportedError, match=words):
        train(spec, out=tmp_path / "run", settings=here)
    assert not (tmp_path / "run").exists()


def test_a_seed_decides_the_adapters(settings: Settings, student_model: Path) -> None:
    state = torch.get_rng_state()
    one, same = (lora_student(student_model, settings) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for left, right in zip(one.parameters(), same.parameters(), strict=True):
        assert torch.equal(left, right)
    spec = StudentSpec(model=str(student_model), lora=LORA)
    other = load_student(spec, settings, vocab_size=300, seed=8)
    assert any(not torch.equal(left, right) for left, right in zip(one.parameters(), other.parameters(), strict=True))


def test_quantising_without_bitsandbytes_says_what_to_install(
    settings: Settings, student_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    with pytest.raises(MissingExtraError, match="needs bitsandbytes") as caught:
        lora_student(student_model, settings, quantize="nf4")
    assert "smoothkd[qlora]" in caught.value.fix


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its layers have enough weights for whole blocks of 4-bit values."""
    from services.models.tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("wide"), seed=4, hidden_size=128)


@pytest.fixture
def bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra qlora")


@pytest.mark.usefixtures("bitsandbytes")
def test_a_quantised_student_is_saved_as_it_was_trained(
    make_run: MakeRun, settings: Settings, wide_model: Path, tmp_path: Path
) -> None:
    """The saved model says what the 4-bit model with its adapter says, not what the weights before quantising would."""
    student = lora_student(wide_model, settings, quantize="nf4")
    assert student.get_base_model().model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    stir(student)
    student.eval()
    with torch.no_grad():
        expected = student(input_ids=IDS).logits
        merged = merged_model(student)
        torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-3, atol=1e-3)

    spec = make_run(student={"model": str(wide_model), "lora": LORA | {"quantize": "nf4"}})
    model = train(spec, out=tmp_path / "run", settings=settings)
    config = json.loads((model / "config.json").read_text())
    assert "quantization_config" not in config
    trained, before = weights(model), weights(wide_model)
    assert {name: tensor.shape for name, tensor in trained.items()} == {
        name: tensor.shape for name, tensor in before.items()
    }
    assert torch.equal(trained["lm_head.weight"], before["lm_head.weight"])
    assert (model / "adapter" / "adapter_model.safetensors").is_file()
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(model)(IDS).logits).all()


@pytest.mark.usefixtures("bitsandbytes")
def test_an_interrupted_quantised_run_ends_with_the_same_bits(
    make_run: MakeRun, settings: Settings, wide_model: Path, tmp_path: Path
) -> None:
    spec = make_run(student={"model": str(wide_model), "lora": LORA | {"quantize": "nf4"}}, training={"epochs": 1})
    straight = train(spec, out=tmp_path / "straight", settings=settings)
    with pytest.raises(CancelledError):
        train(spec, out=tmp_path / "broken", settings=settings, should_stop=stop_after(5))
    assert_same_bits(train(spec, out=tmp_path / "broken", settings=settings), straight)
    shutil.rmtree(tmp_path / "broken")
