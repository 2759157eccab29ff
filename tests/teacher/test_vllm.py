"""The vLLM engine: the real thing, as a process in its own environment, against transformers."""

import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import ml_dtypes
import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.contract.errors import InvalidInputError, TeacherError
from services.contract.sequences import DecodeOptions, LabelOptions, Prompt, TokenSequence
from services.contract.soft_labels import checked_positions
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from services.contract.teacher.v1.teacher_service_pb2_grpc import TeacherServiceStub
from student_trainer.teacher_client import TeacherClient
from tests.teacher.serving import REPOSITORY, free_port, health_of, wait_until

PYTHON = REPOSITORY / ".venv-vllm" / "bin" / "python"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON.exists(), reason="needs vLLM in .venv-vllm; make setup-vllm builds it"),
]


@dataclass
class Served:
    address: str
    process: subprocess.Popen
    log: Path


def start(model: Path, folder: Path, *options: str) -> Served:
    port = free_port()
    log = folder / "teacher.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [PYTHON, "-m", "services.cli.main", "teacher", "--model", model, "--engine", "vllm", *options],
            cwd=REPOSITORY,
            env=os.environ
            | {
                "SMOOTHKD_TEACHER_PORT": str(port),
                "SMOOTHKD_LABEL_CACHE_DIR": str(folder / "labels"),
                "VLLM_CPU_KVCACHE_SPACE": "1",
            },
            stdout=sink,
            stderr=sink,
        )
    served = Served(f"127.0.0.1:{port}", process, log)

    def is_up() -> bool:
        assert process.poll() is None, log.read_text()[-3000:]
        return health_of(served.address) == "SERVING"

    try:
        wait_until(is_up, seconds=600)
    except AssertionError:
        stop(served)
        raise
    return served


def stop(served: Served) -> None:
    served.process.send_signal(signal.SIGTERM)
    try:
        served.process.wait(60)
    finally:
        served.process.kill()
        served.process.wait()


@pytest.fixture(scope="module")
def teacher(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = start(smollm2, tmp_path_factory.mktemp("vllm"), "--max-length", "512", "--label-dtype", "float32")
    yield served
    stop(served)


@pytest.fixture(scope="module")
def sequences(smollm2: Path) -> list[TokenSequence]:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    texts = [
        "The harbour master of Ostrel said on Tuesday that 14 ferries had been repaired.",
        "def add(a, b):\n    return a + b\n",
        "¿Qué hora es? 今日は。 " * 4,
    ]
    ids = [tokenizer.encode(text) for text in texts]
    return [
        TokenSequence(id=str(number), token_ids=row, label_positions=list(range(1 + number, len(row))))
        for number, row in enumerate(ids)
    ]


@pytest.fixture(scope="module")
def reference(smollm2: Path, sequences: list[TokenSequence]) -> dict[str, np.ndarray]:
    """Log-probabilities of the whole vocabulary at the label positions, by transformers in float32."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    logprobs = {}
    with torch.inference_mode():
        for sequence in sequences:
            logits = model(torch.tensor([sequence.token_ids])).logits[0].double().log_softmax(-1)
            logprobs[sequence.id] = logits[np.array(sequence.label_positions) - 1].numpy()
    return logprobs


def test_exact_labels_are_the_whole_distribution(teacher, sequences, reference):
    with TeacherClient(teacher.address) as client:
        info = client.describe()
        assert (info.engine, info.generates) == ("vllm", False)
        head = client.fetch_lm_head()
        scored = {answer.id: answer for answer in client.score(sequences, LabelOptions())}
    assert set(scored) == {sequence.id for sequence in sequences}
    for sequence in sequences:
        logits = head.logits(scored[sequence.id].labels.hidden_ND).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        logprobs -= logits.max(1, keepdims=True)
        expected = reference[sequence.id]
        assert np.abs(logprobs - expected)[expected > -15].max() < 2e-3
        actual = expected[np.arange(len(expected)), np.array(sequence.token_ids)[sequence.label_positions]]
        checked = checked_positions(len(expected), "exact")
        assert np.abs(scored[sequence.id].token_logprobs_P - actual[checked]).max() < 2e-3


def test_top_k_keeps_the_exact_tail_mass(teacher, sequences, reference):
    with TeacherClient(teacher.address) as client:
        for answer in client.score(sequences, LabelOptions(encoding="top_k", k=20)):
            probabilities = np.exp(np.sort(reference[answer.id], axis=1)[:, ::-1])
            assert np.abs(answer.labels.tail_mass_N - probabilities[:, 20:].sum(1)).max() < 1e-3
            assert np.abs(np.exp(answer.labels.logprobs_NK.astype(np.float64)) - probabilities[:, :20]).max() < 2e-3


def test_many_students_share_the_engine_and_each_gets_its_own(teacher, sequences):
    from concurrent.futures import ThreadPoolExecutor

    def ask(_: int) -> dict[str, bytes]:
        with TeacherClient(teacher.address) as client:
            return {answer.id: answer.sequence_hash for answer in client.score(sequences, LabelOptions())}

    with ThreadPoolExecutor(4) as students:
        first, *others = students.map(ask, range(4))
    assert set(first) == {sequence.id for sequence in sequences}
    assert all(other == first for other in others)


def test_bad_input_is_refused_and_the_engine_lives(teacher, sequences):
    with TeacherClient(teacher.address) as client:
        wrong = TokenSequence(id="x", token_ids=[1, 10**6], label_positions=[1])
        with pytest.raises(InvalidInputError):
            list(client.score([wrong], LabelOptions()))
        with pytest.raises(InvalidInputError):
            list(client.generate([Prompt(id="x", token_ids=[1])], DecodeOptions(max_new_tokens=1)))
        assert len(list(client.score(sequences[:1], LabelOptions()))) == 1


def test_a_teacher_whose_engine_dies_ends_though_nobody_asks(teacher):
    """The last to use it."""
    processes = psutil.Process(teacher.process.pid).children(recursive=True)
    next(child for child in processes if "Worker" in " ".join([child.name(), *child.cmdline()])).kill()
    assert teacher.process.wait(60) == TeacherError.exit_code


def test_in_bfloat16_the_distribution_is_nearly_the_same_until_it_is_killed(smollm2, sequences, reference, tmp_path):
    """Rounding is no reason to refuse to serve. Killed, the teacher takes vLLM's processes with it."""
    served = start(smollm2, tmp_path, "--max-length", "512", "--dtype", "bfloat16")
    try:
        with TeacherClient(served.address) as client:
            head = client.fetch_lm_head()
            scored = {answer.id: answer for answer in client.score(sequences, LabelOptions())}
        processes = psutil.Process(served.process.pid).children(recursive=True)
        served.process.kill()
        _, alive = psutil.wait_procs(processes, timeout=30)
    finally:
        stop(served)
    # Nobody was left to end them; they would keep their memory from the teacher's next start.
    assert len(processes) >= 2
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert head.weight_VD.dtype == ml_dtypes.bfloat16
    for sequence in sequences:
        logits = torch.from_numpy(head.logits(scored[sequence.id].labels.hidden_ND).astype(np.float64))
        expected = torch.from_numpy(reference[sequence.id])
        divergence = (expected.exp() * (expected - logits.log_softmax(dim=1))).sum(dim=1)
        assert 0 < divergence.mean() < 5e-3


def test_greedy_continuations_are_those_of_transformers_until_the_engine_dies(smollm2, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    served = start(smollm2, tmp_path, "--max-length", "512", "--generation")
    try:
        with TeacherClient(served.address) as client:
            (answer,) = client.generate([Prompt(id="x", token_ids=prompt)], DecodeOptions(max_new_tokens=12))
        assert list(answer.token_ids) == expected
        processes = psutil.Process(served.process.pid).children(recursive=True)
        engines = [child for child in processes if "EngineCore" in " ".join([child.name(), *child.cmdline()])]
        assert len(engines) == 2
        with grpc.insecure_channel(served.address) as channel:
            request = pb.GenerateSequencesRequest(max_new_tokens=480, stop_token_ids=[49_000])
            request.prompts.extend(pb.GeneratePrompt(id=str(n), token_ids=[n, 5, 6]) for n in range(32))
            stream = TeacherServiceStub(channel).GenerateSequences(request)
            stream.initial_metadata()
            # The one that decodes was started last.
            max(engines, key=psutil.Process.create_time).kill()
            with pytest.raises(grpc.RpcError) as caught:
                list(stream)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "the teacher's engine has died" in caught.value.details()
        assert served.process.wait(60) == TeacherError.exit_code
        psutil.wait_procs(processes, timeout=30)
        assert not [child for child in processes if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    finally:
        stop(served)
