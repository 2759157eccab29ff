"""Sweeps whose teachers are fine-tuned first, through the whole platform as real processes."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from services.contract.sequences import LabelOptions, TokenSequence
from services.contract.spec import expand
from services.contract.spec_reading import parse_sweep
from student_trainer.teacher_client import TeacherClient
from tests.cli.test_up import Platform

FULL = {"method": "full", "learning_rate": 1e-2, "batch_size": 4}
LORA = {"method": "lora", "learning_rate": 1e-1, "batch_size": 4}
SEQUENCE = TokenSequence(id="x", token_ids=[3, 1, 4, 1, 5, 9, 2, 6], label_positions=[2, 3, 7])


def sweep(model: Path, finetune: dict) -> dict:
    return {
        "name": f"finetune-{finetune['method']}",
        "teacher": {"model": str(model), "finetune": finetune},
        "student": {"model": str(model)},
        "dataset": {"path": "demo_instructions", "limit": 12},
        "grid": {"alpha": [0, 1.0], "learning_rate": [1.0e-3], "batch_size": [4], "seed": [0]},
        "training": {"max_length": 512, "precision": "fp32"},
    }


def stages(platform: Platform, sweep_id: str) -> list[tuple[str, str]]:
    return [(stage["kind"], stage["state"]) for run in platform.runs(sweep_id) for stage in run["stages"]]


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_two_sweeps_with_teachers_of_their_own_share_one_server(tmp_path: Path, tiny_model: Path) -> None:
    """One teacher fine-tuned in full, one by adapters; two workers train students of both at the same time."""
    platform = Platform(tmp_path, tiny_model)
    platform.start("--workers", "2")
    try:
        wanted = [sweep(tiny_model, FULL), sweep(tiny_model, LORA)]
        ids = []
        for fields in wanted:
            file = tmp_path / f"{fields['name']}.yaml"
            file.write_text(yaml.safe_dump(fields))
            submitted = platform.smoothkd("sweep", "submit", str(file))
            assert submitted.returncode == 0, submitted.stderr
            ids.append(submitted.stdout.strip())
        platform.wait_until(lambda: all(map(platform.ended, ids)), "both sweeps end", seconds=300)
        done = [("train", "succeeded"), ("finetune_teacher", "succeeded"), ("train", "succeeded")]
        for sweep_id in ids:
            assert stages(platform, sweep_id) == done, platform.runs(sweep_id)
        for fields in wanted:
            assert_served(platform, tiny_model, fields)
    finally:
        platform.process.terminate()
        platform.process.wait(60)


def assert_served(platform: Platform, base: Path, fields: dict) -> None:
    """The fine-tuned teacher lies in the data directory, differs from its model, and gives labels of its own."""
    key = expand(parse_sweep(fields))[1].finetune_key
    directory = platform.folder / "data" / "teachers" / key / "model"
    after, before = load_file(directory / "model.safetensors"), load_file(base / "model.safetensors")
    assert any(not torch.equal(after[name], before[name]) for name in before)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        expected = model(torch.tensor([SEQUENCE.token_ids])).logits[0, [1, 2, 6]].log_softmax(-1)
    with TeacherClient(f"127.0.0.1:{platform.environment['SMOOTHKD_TEACHER_PORT']}") as client:
        assert client.load_model(f"teachers/{key}/model") == f"teachers/{key}/model"
        (scored,) = client.score([SEQUENCE], LabelOptions())
        found = torch.from_numpy(client.fetch_lm_head().logits(scored.labels.hidden_ND)).log_softmax(-1)
    # Hidden states travel in 16 bits.
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
