"""Runs whose processes share a model's weights, on the CPU: against runs of one process that has them all."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, TrainingArguments

from services.contract.errors import SpecError, UnsupportedError
from services.contract.records import MetricPoint
from services.contract.settings import Settings
from services.contract.spec import RunSpec
from student_trainer.deepspeed_config import load_deepspeed_config
from student_trainer.sharding import prepare_sharding
from student_trainer.train import train
from tests.trainer.encoder_decoders import make_encoder_decoder
from tests.trainer.runs import assert_same_bits, environment, weights

REPOSITORY = Path(__file__).parents[2]
UNLIKE = ("tokens_per_second", "label_", "peak_memory", "epoch")
"""Metrics that two runs of the same steps need not share."""

CLIPPED = {"held_out": 2, "max_grad_norm": 0.05, "checkpoint_steps": 2, "epochs": 3}
"""Training that needs the whole gradient's norm, and measures and saves on the way."""


@pytest.fixture(scope="module")
def tied_model(student_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its embedding is its output head."""
    directory = tmp_path_factory.mktemp("tied")
    AutoTokenizer.from_pretrained(student_model).save_pretrained(directory)
    config = AutoConfig.from_pretrained(student_model)
    config.tie_word_embeddings = True
    with torch.random.fork_rng():
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


@pytest.mark.slow
def test_processes_that_share_weights_train_what_one_does(
    make_run: Callable[..., RunSpec],
    settings: Settings,
    mock_address: str,
    records_file: Path,
    student_model: Path,
    tied_model: Path,
    tmp_path: Path,
) -> None:
    """Weights, and what is measured on the way; then one of the runs again, killed at its first checkpoint."""
    settings = settings.model_copy(update={"teacher_address": mock_address})
    eight = {"dataset": {"path": str(records_file), "limit": 8}}
    taught = eight | {"teacher": {"model": str(student_model)}}
    cases = {
        "distilled": make_run(
            **taught,
            alpha=1.0,
            student={"model": str(tied_model)},
            training=CLIPPED,
        ),
        "fine-tuned": make_run(**eight, training={"gradient_checkpointing": True, "micro_batch_size": 2}),
        "adapters": make_run(
            **taught, alpha=0.5, student={"model": str(student_model), "lora": {"rank": 4, "alpha": 8}}
        ),
        "bf16": make_run(**eight, training={"precision": "bf16", "epochs": 1}),
    }
    together = train_together(cases, tmp_path / "together", settings=settings, sharding={"fsdp": True})
    measured = {name: json.loads((together / name / "measured.json").read_text()) for name in cases}
    assert measured["fine-tuned"]["share"] < 0.51
    assert measured["bf16"]["reduced_in"] == "torch.float32"
    for name in ("distilled", "fine-tuned", "adapters"):
        points: list[MetricPoint] = []
        alone = train(cases[name], out=tmp_path / "alone" / name, settings=settings, on_metrics=points.extend)
        assert_close(together / name / "run" / "model", alone, name)
        expected = {f"{point.name} {point.step}": point.value for point in points if not point.name.startswith(UNLIKE)}
        found = {metric: measured[name]["metrics"][metric] for metric in expected}
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5), name
        assert ("held_out_loss 2" in found) == (name == "distilled")
    model = AutoModelForCausalLM.from_pretrained(together / "distilled" / "run" / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight

    killed = train_killed(together / "distilled" / "spec.yaml", tmp_path / "killed", settings=settings)
    assert_same_bits(killed, together / "distilled" / "run" / "model")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_what_one_process_does(
    stage: int,
    make_run: Callable[..., RunSpec],
    settings: Settings,
    mock_address: str,
    records_file: Path,
    student_model: Path,
    tied_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a configuration that leaves batches and clipping to the run; stage 3 shares the weights themselves."""
    pytest.importorskip("deepspeed", reason="pip install deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    settings = settings.model_copy(update={"teacher_address": mock_address})
    config = tmp_path / "deepspeed.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    taught = {
        "dataset": {"path": str(records_file), "limit": 8},
        "teacher": {"model": str(student_model)},
        "alpha": 1.0,
    }
    cases = {
        "distilled": make_run(
            **taught,
            student={"model": str(tied_model)},
            training=CLIPPED,
        ),
        "adapters": make_run(**taught, student={"model": str(student_model), "lora": {"rank": 4, "alpha": 8}}),
    }
    sharding = {"deepspeed": str(config)}
    together = train_together(cases, tmp_path / "together", settings=settings, sharding=sharding)
    for name, spec in cases.items():
        alone = train(spec, out=tmp_path / "alone" / name, settings=settings)
        assert_close(together / name / "run" / "model", alone, name)
    killed = train_killed(together / "distilled" / "spec.yaml", tmp_path / "killed", settings=settings)
    assert_same_bits(killed, together / "distilled" / "run" / "model")


def test_a_deepspeed_configuration_takes_what_it_leaves_out_from_the_run(tmp_path: Path) -> None:
    path = tmp_path / "deepspeed.json"
    path.write_text('{"zero_optimization": {"stage": 3}, "gradient_clipping": 0.5, "wall_clock_breakdown": true}')
    of_the_run = {"gradient_clipping": 0.5, "train_batch_size": 8}
    assert load_deepspeed_config(str(path), of_the_run=of_the_run, precision="bf16") == {
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
        "gradient_clipping": 0.5,
        "wall_clock_breakdown": True,
        "train_batch_size": "auto",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{stage: 3}", "cannot be read"),
        ("[3]", "holds no JSON object"),
        ('{"gradient_clipping": 0.5}', "sets gradient_clipping to 0.5, and for this run it is 1"),
        ('{"gradient_clipping": null}', "sets gradient_clipping to null, and for this run it is 1"),
        ('{"zero_optimization": true}', "sets zero_optimization to true, which is no section"),
        ('{"zero_optimization": [3]}', r"sets zero_optimization to \[3\], which is no section"),
        ('{"bf16": true}', "sets bf16 to true, which is no section"),
        ('{"bf16": {"enabled": false}}', "sets bf16.enabled to false, and the run's training.precision is bf16"),
        ('{"fp16": {"enabled": true}}', "sets fp16.enabled to true, and the run's training.precision is bf16"),
        ('{"optimizer": {"type": "SGD"}}', "has a section optimizer, which would replace"),
        ('{"scheduler": {"type": "OneCycle"}}', "has a section scheduler, which would replace"),
        ('{"amp": {"enabled": true}}', "has a section amp, which would replace"),
    ],
)
def test_a_deepspeed_configuration_of_another_run_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "deepspeed.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SpecError, match=message):
        load_deepspeed_config(str(path), of_the_run={"gradient_clipping": 1.0}, precision="bf16")


def test_a_deepspeed_configuration_may_say_what_the_run_says(tmp_path: Path) -> None:
    path = tmp_path / "deepspeed.json"
    path.write_text('{"bf16": {"enabled": true}, "fp16": {"enabled": "auto"}, "gradient_clipping": 1}')
    config = load_deepspeed_config(str(path), of_the_run={"gradient_clipping": 1.0}, precision="bf16")
    assert config == {"bf16": {"enabled": True}, "fp16": {"enabled": "auto"}, "gradient_clipping": 1}


def test_layers_that_share_weights_in_ways_of_their_own_are_refused(
    student_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything trains: an embedding that is encoder's, decoder's and the model's own cannot be shared out."""
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    arguments = TrainingArguments(output_dir=str(tmp_path), fsdp=True, fsdp_config={"version": 2}, use_cpu=True)
    model = AutoModelForSeq2SeqLM.from_pretrained(make_encoder_decoder("t5-tied-scaled", tmp_path / "t5"))
    with pytest.raises(UnsupportedError, match="one weight in several layers"):
        prepare_sharding(arguments, model=model, matmul_dtype=torch.float32)
    prepare_sharding(arguments, model=AutoModelForCausalLM.from_pretrained(student_model), matmul_dtype=torch.float32)


def train_together(
    cases: dict[str, RunSpec], directory: Path, *, settings: Settings, sharding: dict[str, object]
) -> Path:
    """Each case in ``directory/NAME/run``, by the same two processes."""
    for name, spec in cases.items():
        document = spec.model_dump(mode="json")
        training = document["training"] | {"processes": 2} | sharding
        (directory / name).mkdir(parents=True)
        (directory / name / "spec.yaml").write_text(yaml.safe_dump(document | {"training": training}))
    command = [sys.executable, "-m", "tests.trainer.sharded_runs", *(str(directory / name) for name in cases)]
    run(command, settings=settings)
    return directory


def train_killed(spec: Path, out: Path, *, settings: Settings) -> Path:
    """The model of ``smoothkd train``, which SIGKILL met once a checkpoint was whole, started again."""
    command = [sys.executable, "-m", "services.cli.main", "train", str(spec), "--out", str(out)]
    kill_at_a_checkpoint(command, out, settings=settings)
    run(command, settings=settings)
    return out / "model"


def run(command: list[str], *, settings: Settings) -> None:
    done = subprocess.run(
        command, env=environment(settings), cwd=REPOSITORY, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr


def assert_close(left: Path, right: Path, name: str) -> None:
    found, expected = weights(left), weights(right)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=1e-5, msg=f"{name}: {key}")


def kill_at_a_checkpoint(command: list[str], out: Path, *, settings: Settings) -> None:
    """SIGKILL of who waits for the processes, which end with it, once a checkpoint is whole and the run is not."""
    with out.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(command, env=environment(settings), cwd=REPOSITORY, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 180
        while not list(out.glob("checkpoints/checkpoint-*/whole.json")):
            assert process.poll() is None, out.with_suffix(".log").read_text()
            assert time.monotonic() < deadline
            # Two processes train beside this one, on as few as two cores.
            time.sleep(0.02)
        family = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not psutil.wait_procs(family, timeout=30)[1]
    assert not (out / "model").exists()
