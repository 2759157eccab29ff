"""Students that ask, cancel and lose a replica for minutes on end, and a count of every wrong, lost or repeated label.

Two replicas of SmolLM2-135M-Instruct share a small label cache, so that it evicts all the time. Four students send
random requests in random encodings; about one in eight is cancelled half-way. Once a minute one replica is killed
with SIGKILL and started again. Every answer is compared with a forward pass by transformers made beforehand.

    python -m benchmarks.soak --minutes 10 --engine vllm
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.report import report
from benchmarks.serving import REPOSITORY, VLLM_PYTHON, free_port, model_directory
from benchmarks.teacher_labels import MAX_LENGTH, VLLM_ON_CPU, records
from services.cli.health import teacher_problem
from services.contract.errors import SmoothKDError
from services.contract.lm_head import LmHead
from services.contract.sequences import LabelOptions, TokenSequence
from services.contract.settings import Settings
from services.contract.soft_labels import ScoredSequence, checked_positions
from services.contract.tensors import Array
from student_trainer.alignment import FLOAT_TOLERANCE, verify_token_logprobs
from student_trainer.teacher_client import TeacherClient

STUDENTS = 4
CACHE_GIB = 0.01
ENCODINGS = (
    LabelOptions(),
    LabelOptions(encoding="top_k", k=64),
    LabelOptions(encoding="sampled", draws=50, seed=7),
)


def main() -> None:
    arguments = read_arguments()
    model = model_directory()
    sequences = [sequence for sequence in records(model, count=96) if len(sequence.token_ids) <= 256]
    expected = reference(model, sequences)
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        replicas = [Replica(model, arguments.engine, Path(folder)) for _ in range(2)]
        try:
            for replica in replicas:
                replica.start()
            for replica in replicas:
                replica.wait_serving()
            address = ",".join(f"127.0.0.1:{replica.port}" for replica in replicas)
            ends = time.monotonic() + 60 * arguments.minutes
            students = [
                threading.Thread(target=study, args=(address, sequences, expected, tally, ends, seed))
                for seed in range(STUDENTS)
            ]
            for student in students:
                student.start()
            kill_now_and_then(replicas, tally, ends=ends)
            for student in students:
                student.join()
        finally:
            for replica in replicas:
                replica.stop()
    report(
        "soak",
        title=f"{STUDENTS} students, 2 replicas ({arguments.engine}), {arguments.minutes:g} minutes",
        rows=[dict(tally.counts)],
        notes=tally.problems[:5],
    )
    bad = sum(tally.counts[name] for name in ("wrong", "lost", "repeated", "errors"))
    sys.exit(1 if bad or not tally.counts["answers"] else 0)


@dataclass
class Tally:
    """What happened, over all students."""

    counts: Counter[str] = field(
        default_factory=lambda: Counter(
            dict.fromkeys(
                ("requests", "answers", "tokens", "cancels", "kills", "wrong", "lost", "repeated", "errors"), 0
            )
        )
    )
    problems: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, **counts: int) -> None:
        with self._lock:
            self.counts.update(counts)

    def problem(self, kind: str, what: str) -> None:
        with self._lock:
            self.counts[kind] += 1
            self.problems.append(f"{kind}: {what}")


class Replica:
    """One teacher process on a port of its own."""

    def __init__(self, model: Path, engine: str, folder: Path) -> None:
        self.port = free_port()
        self._log = (folder / f"{self.port}.log").open("ab")
        python = str(VLLM_PYTHON) if engine == "vllm" else sys.executable
        self._command = [
            *(python, "-m", "services.cli.main", "teacher", "--model", str(model), "--engine", engine),
            *("--max-length", str(MAX_LENGTH)),
        ]
        self._environment = {
            **os.environ,
            **VLLM_ON_CPU,
            "SMOOTHKD_TEACHER_PORT": str(self.port),
            "SMOOTHKD_LABEL_CACHE_DIR": str(folder / "labels"),
            "SMOOTHKD_LABEL_CACHE_GIB": str(CACHE_GIB),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command, cwd=REPOSITORY, env=self._environment, stdout=self._log, stderr=self._log
        )

    def wait_serving(self) -> None:
        assert self._process is not None
        while teacher_problem(Settings(teacher_address=f"127.0.0.1:{self.port}")) is not None:
            if self._process.poll() is not None:
                raise SystemExit(f"a replica ended: {Path(self._log.name).read_text()[-2000:]}")
            time.sleep(0.5)

    def kill(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(90)
        self._log.close()


def kill_now_and_then(replicas: Sequence[Replica], tally: Tally, *, ends: float) -> None:
    """Once a minute, the replicas in turn; the last half minute is left in peace."""
    turn = 0
    while time.monotonic() + 60 < ends:
        time.sleep(30)
        replica = replicas[turn % len(replicas)]
        replica.kill()
        tally.add(kills=1)
        turn += 1
        replica.start()
        replica.wait_serving()
        time.sleep(min(30, max(0, ends - 30 - time.monotonic())))


def study(
    address: str, sequences: list[TokenSequence], expected: dict[str, Array], tally: Tally, ends: float, seed: int
) -> None:
    """One student until the time is over."""
    chance = random.Random(seed)
    with TeacherClient(address, patience_seconds=300) as client:
        head = client.fetch_lm_head()
        while time.monotonic() < ends:
            part = chance.sample(sequences, chance.randint(1, 24))
            options = chance.choice(ENCODINGS)
            leave_after = chance.randint(0, len(part)) if chance.random() < 0.125 else None
            tally.add(requests=1)
            try:
                ask(client, part, options, head=head, expected=expected, tally=tally, leave_after=leave_after)
            except Exception as error:  # noqa: BLE001 - a student that ends unnoticed finds nothing wrong
                tally.problem("errors", f"{type(error).__name__}: {error}")


def ask(
    client: TeacherClient,
    part: Sequence[TokenSequence],
    options: LabelOptions,
    *,
    head: LmHead,
    expected: dict[str, Array],
    tally: Tally,
    leave_after: int | None,
) -> None:
    """One request; ``leave_after`` so many answers it is cancelled."""
    asked = {sequence.id: sequence for sequence in part}
    seen: set[str] = set()
    answers = client.score(part, options)
    for scored in answers:
        if scored.id in seen:
            tally.problem("repeated", scored.id)
        seen.add(scored.id)
        check(scored, asked[scored.id], options, head=head, expected=expected[scored.id], tally=tally)
        if leave_after is not None and len(seen) >= leave_after:
            tally.add(cancels=1)
            answers.close()  # type: ignore[attr-defined]
            return
    for missing in asked.keys() - seen:
        tally.problem("lost", missing)


def check(
    scored: ScoredSequence,
    sequence: TokenSequence,
    options: LabelOptions,
    *,
    head: LmHead,
    expected: Array,
    tally: Tally,
) -> None:
    """Token log-probabilities against the reference, and the labels against the token log-probabilities."""
    tally.add(answers=1, tokens=len(sequence.token_ids))
    checked_P = checked_positions(len(expected), options.encoding)
    difference = np.abs(scored.token_logprobs_P - expected[checked_P]).max(initial=0.0)
    if not difference <= FLOAT_TOLERANCE:
        tally.problem("wrong", f"sequence {sequence.id}: log-probabilities off by {difference:.4f}")
    try:
        verify_token_logprobs(scored, sequence, head=head if options.encoding == "exact" else None, max_positions=4)
    except SmoothKDError as error:
        tally.problem("wrong", str(error))


@torch.inference_mode()
def reference(model: Path, sequences: Sequence[TokenSequence]) -> dict[str, Array]:
    """The log-probabilities of labelled tokens by transformers' own forward pass, by sequence."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    expected = {}
    for sequence in sequences:
        ids_1T = torch.tensor([list(sequence.token_ids)])
        logprobs_TV = network(input_ids=ids_1T).logits[0].double().log_softmax(dim=-1)
        positions_N = torch.tensor(list(sequence.label_positions))
        expected[sequence.id] = logprobs_TV[positions_N - 1, ids_1T[0, positions_N]].numpy()
    return expected


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    return parser.parse_args()


if __name__ == "__main__":
    main()
