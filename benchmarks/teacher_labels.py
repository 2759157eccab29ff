"""A teacher's labels through smoothkd against the ways to get them from vLLM alone: tokens per second, in one run.

All run SmolLM2-135M-Instruct on vLLM with the same precision, all are alive at the same time, and rounds
alternate, so that whatever else the machine does hits all alike:

- smoothkd: exact labels (and top-100) through gRPC, decoded and checked by the client;
- vLLM in this machine's memory: ``prompt_logprobs=100`` with ``flat_logprobs`` and without detokenising, its cheapest;
- vLLM's OpenAI server: ``prompt_logprobs=100`` over HTTP as JSON, parsed into arrays, as trainers use it;
- vLLM's forward pass with nothing kept of it, which bounds what any of them can reach.

Two workloads: every position of 256-token sequences, and instruction records of which only responses are labelled,
which is what a student needs (``prompt_logprobs`` always computes every position). Each in float32 and in bfloat16,
in which large teachers are served; processors without instructions for it are slow there.
"""

import itertools
import json
import os
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import psutil
from transformers import AutoTokenizer

from benchmarks.report import report
from benchmarks.serving import REPOSITORY, VLLM_PYTHON, free_port, model_directory, running, teacher_process
from services.contract.prompt import encode_record
from services.contract.sequences import LabelOptions, TokenSequence
from services.contract.settings import load_settings
from services.contract.spec import DatasetSpec
from services.datasets.reading import load_records
from student_trainer.teacher_client import TeacherClient

MAX_LENGTH = 512
K = 100
ROUNDS = 4
SETTLE_SECONDS = 4
"""vLLM's processes look for work without a pause for 3 seconds after their last, at the next one's cost."""

STREAMS = 4
"""Requests at a time: what a student keeps under way."""

VLLM_ON_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0-1",
    "OMP_NUM_THREADS": "2",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


def main() -> None:
    model = model_directory()
    for dtype in ("float32", "bfloat16"):
        compare(model, dtype=dtype)


def compare(model: Path, *, dtype: str) -> None:
    with ExitStack() as stack:
        # Without a cache: what is measured is computing.
        address, teacher_id = stack.enter_context(
            teacher_process(
                *("--model", str(model), "--engine", "vllm", "--max-length", str(MAX_LENGTH), "--dtype", dtype),
                python=VLLM_PYTHON,
                environment={**VLLM_ON_CPU, "SMOOTHKD_LABEL_CACHE_GIB": "0"},
            )
        )
        client = stack.enter_context(TeacherClient(address))
        direct, bare = stack.enter_context(vllm_in_memory(model, dtype=dtype))
        http = stack.enter_context(openai_server(model, dtype=dtype))
        top_k = LabelOptions(encoding="top_k", k=K)
        ways = [
            Way("smoothkd, exact, gRPC", teacher_id, lambda sequences: ask_teacher(client, sequences, LabelOptions())),
            Way(f"smoothkd, top-{K}, gRPC", teacher_id, lambda sequences: ask_teacher(client, sequences, top_k)),
            direct,
            http,
            bare,
        ]
        for name, sequences in (("256", fixed_length(model)), ("records", records(model))):
            measure(f"{name}_{dtype}", sequences, ways)


@dataclass(frozen=True)
class Way:
    """A way to get labels; ``process_id`` is the server's."""

    name: str
    process_id: int
    ask: Callable[[Sequence[TokenSequence]], None]

    def cpu_seconds(self) -> float:
        """Processor time of the server with all its processes, and of this client, so far."""
        server = psutil.Process(self.process_id)
        times = [process.cpu_times() for process in (server, *server.children(recursive=True))]
        return time.process_time() + float(sum(spent.user + spent.system for spent in times))


def measure(workload: str, sequences: list[TokenSequence], ways: Sequence[Way]) -> None:
    """Median over alternating rounds, after one that warms up."""
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    cpu_seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    for round_number in range(ROUNDS + 1):
        for way in ways:
            time.sleep(SETTLE_SECONDS)
            started, spent = time.perf_counter(), way.cpu_seconds()
            way.ask(sequences)
            if round_number:
                seconds[way.name].append(time.perf_counter() - started)
                cpu_seconds[way.name].append(way.cpu_seconds() - spent)
    tokens = sum(len(sequence.token_ids) for sequence in sequences)
    labels = sum(len(sequence.label_positions) for sequence in sequences)
    ours = statistics.median(seconds[ways[0].name])
    rows = [
        {
            "way": name,
            "tokens/s": tokens / statistics.median(times),
            "exact is faster by": statistics.median(times) / ours,
            "CPU s per 1,000 tokens": 1000 * statistics.median(cpu_seconds[name]) / tokens,
        }
        for name, times in seconds.items()
    ]
    report(
        f"teacher_labels_{workload}",
        title=f"{workload}: {len(sequences)} sequences of {tokens:,} tokens, {labels:,} labelled; {ROUNDS} rounds",
        rows=rows,
    )


def fixed_length(model: Path, *, count: int = 16, length: int = 256) -> list[TokenSequence]:
    """Real text cut into pieces of one length, labelled throughout."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    settings = load_settings()
    texts = load_records(DatasetSpec(path="demo_instructions"), offline=settings.offline)
    stream = itertools.chain.from_iterable(tokenizer(record["response"])["input_ids"] for record in texts)
    ids = list(itertools.islice(itertools.cycle(list(stream)), count * length))
    return [
        TokenSequence(
            id=str(number),
            token_ids=ids[number * length : (number + 1) * length],
            label_positions=range(1, length),
        )
        for number in range(count)
    ]


def records(model: Path, *, count: int = 48) -> list[TokenSequence]:
    """Instruction records as a student sends them."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    sequences = []
    for number, record in enumerate(load_records(DatasetSpec(path="demo_instructions", limit=count), offline=True)):
        prompt_ids, response_ids = encode_record(tokenizer, record)
        ids = [*prompt_ids, *response_ids][:MAX_LENGTH]
        positions = range(len(prompt_ids), len(ids))
        sequences.append(TokenSequence(id=str(number), token_ids=ids, label_positions=positions))
    return sequences


def ask_teacher(client: TeacherClient, sequences: Sequence[TokenSequence], options: LabelOptions) -> None:
    """All labels, in a few streams at a time."""

    def ask(part: Sequence[TokenSequence]) -> None:
        answered = {scored.id for scored in client.score(part, options)}
        assert answered == {sequence.id for sequence in part}

    with ThreadPoolExecutor(STREAMS) as threads:
        list(threads.map(ask, [sequences[first::STREAMS] for first in range(STREAMS)]))


@contextmanager
def vllm_in_memory(model: Path, *, dtype: str) -> Iterator[tuple[Way, Way]]:
    """vLLM's generate runner in a process of its own, with log-probabilities and with none."""
    process = subprocess.Popen(
        [VLLM_PYTHON, "-m", "benchmarks.vllm_prompt_logprobs", str(model), str(MAX_LENGTH), dtype],
        cwd=REPOSITORY,
        env=os.environ | VLLM_ON_CPU,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def answer() -> dict[str, Any]:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("@"):
                return dict(json.loads(line[1:]))
        raise SystemExit("the process with vLLM ended")

    def ask(sequences: Sequence[TokenSequence], k: int | None) -> None:
        assert process.stdin is not None
        request = {"sequences": [list(sequence.token_ids) for sequence in sequences], "k": k}
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        answer()

    try:
        answer()
        yield (
            Way(f"vLLM prompt_logprobs={K}, flat, in memory", process.pid, partial(ask, k=K)),
            Way("vLLM forward pass alone, no labels", process.pid, partial(ask, k=None)),
        )
    finally:
        # The end of its input lets it stop vLLM's own processes; a signal would orphan them.
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)


@contextmanager
def openai_server(model: Path, *, dtype: str) -> Iterator[Way]:
    """``vllm serve``, asked by as many connections as there are sequences."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        *(str(VLLM_PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)),
        *("--dtype", dtype, "--max-model-len", str(MAX_LENGTH), "--max-logprobs", str(K), "--enforce-eager"),
        *("--no-enable-prefix-caching", "--served-model-name", "teacher", "--disable-log-stats"),
    ]

    def is_up() -> bool:
        try:
            return httpx.get(f"{url}/health", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    with (
        running(command, environment=VLLM_ON_CPU, is_up=is_up) as process_id,
        httpx.Client(base_url=url, timeout=600, limits=httpx.Limits(max_connections=64)) as http,
    ):
        lock = threading.Lock()

        def one(sequence: TokenSequence) -> None:
            body = {"model": "teacher", "prompt": list(sequence.token_ids), "max_tokens": 1, "prompt_logprobs": K}
            answer = http.post("/v1/completions", json=body).raise_for_status().content
            # Parsing holds the interpreter, as it does in a trainer.
            with lock:
                ids, logprobs = parse(answer)
            assert len(ids) == len(logprobs) == len(sequence.token_ids) - 1

        def ask(sequences: Sequence[TokenSequence]) -> None:
            with ThreadPoolExecutor(len(sequences)) as threads:
                list(threads.map(one, sequences))

        yield Way(f"vLLM OpenAI server, prompt_logprobs={K}, JSON", process_id, ask)


def parse(answer: bytes) -> tuple[list[Any], list[Any]]:
    """Arrays of ids and log-probabilities per position; the first position has none."""
    positions = orjson.loads(answer)["choices"][0]["prompt_logprobs"][1:]
    ids = [np.array([int(token) for token in position], dtype=np.int32) for position in positions]
    logprobs = [np.array([entry["logprob"] for entry in position.values()], dtype=np.float32) for position in positions]
    return ids, logprobs


if __name__ == "__main__":
    if not VLLM_PYTHON.exists():
        raise SystemExit("this benchmark needs vLLM; make setup-vllm builds its environment")
    main()
