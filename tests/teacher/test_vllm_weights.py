"""Weights by turns in a real vLLM: adapters, whole checkpoints, and back after a failure."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from services.contract.errors import SmoothKDError
from services.contract.sequences import DecodeOptions, LabelOptions, Prompt, TokenSequence
from services.contract.soft_labels import checked_positions
from services.models.tiny import make_tiny_model
from student_trainer.teacher_client import TeacherClient
from tests.teacher.loadable import break_weights, make_adapter
from tests.teacher.test_vllm import PYTHON, Served, start, stop

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON.exists(), reason="needs vLLM in .venv-vllm; make setup-vllm builds it"),
]

IDS = [3, 9, 27, 81, 200, 100, 5, 6, 7, 8, 50, 60]
SEQUENCE = TokenSequence(id="x", token_ids=IDS, label_positions=list(range(1, len(IDS))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 64 units, which vLLM's kernels want."""
    folder = tmp_path_factory.mktemp("weights")
    make_tiny_model(folder / "base", seed=1, hidden_size=256)
    make_tiny_model(folder / "other", seed=2, hidden_size=256)
    make_adapter(folder / "base", folder / "adapter", merged=folder / "merged")
    shutil.copytree(folder / "other", folder / "broken")
    break_weights(folder / "broken")
    return folder


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Iterator[Served]:
    """Started with the adapter."""
    served = start(
        folder / "adapter", folder, "--allow-models-below", str(folder), "--max-length", "256", "--generation"
    )
    yield served
    stop(served)


def assert_serves(address: str, directory: Path) -> str:
    """Labels and continuation are those of transformers; returns the fingerprint."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([IDS])).logits[0].log_softmax(-1).numpy()
        written = model.generate(torch.tensor([IDS]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    with TeacherClient(address) as client:
        head = client.fetch_lm_head()
        (scored,) = client.score([SEQUENCE], LabelOptions())
        options = DecodeOptions(max_new_tokens=8, stop_token_ids=(319,))
        (continuation,) = client.generate([Prompt(id="x", token_ids=IDS)], options)
        logits = torch.from_numpy(head.logits(scored.labels.hidden_ND))
        assert np.abs(logits.log_softmax(-1).numpy() - expected[:-1]).max() < 2e-2
        actual = expected[np.arange(len(IDS) - 1), IDS[1:]]
        checked = checked_positions(len(actual), "exact")
        assert np.abs(scored.token_logprobs_P - actual[checked]).max() < 1e-4
        assert list(continuation.token_ids) == written[0, len(IDS) :].tolist()
        return client.describe().fingerprint


def test_adapters_and_checkpoints_by_turns(teacher: Served, folder: Path) -> None:
    with TeacherClient(teacher.address) as client:
        fingerprints = [assert_serves(teacher.address, folder / "merged")]
        for name, expected in (("other", "other"), ("base", "base"), ("adapter", "merged")):
            client.load_model(str(folder / name))
            fingerprints.append(assert_serves(teacher.address, folder / expected))
        assert fingerprints[3] == fingerprints[0]
        assert len(set(fingerprints)) == 3
        client.load_model(str(folder / "other"))
        with pytest.raises(SmoothKDError, match="not finite"):
            client.load_model(str(folder / "broken"))
    assert assert_serves(teacher.address, folder / "other") == fingerprints[1]
