"""One to eight students at one teacher: what they get together, and how evenly it is shared.

All students ask for labels that nobody has asked for before. Student 0 opens eight requests at a time and the others
one each, so that a server that shares by requests would give it most.
"""

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count

from benchmarks.report import report
from benchmarks.serving import model_directory, teacher_process
from benchmarks.teacher_labels import records
from services.contract.errors import CancelledError
from services.contract.sequences import TokenSequence
from student_trainer.teacher_client import TeacherClient

WARM_SECONDS, SECONDS = 8, 25
"""What is given to the engine before all students are there is nobody's share."""

STUDENTS = (1, 2, 4, 8)
GREEDY_STREAMS = 8


def main() -> None:
    model = model_directory()
    sequences = [sequence for sequence in records(model, count=64) if len(sequence.token_ids) < 200]
    rows = []
    with teacher_process(
        "--model", str(model), "--engine", "transformers", environment={"SMOOTHKD_LABEL_CACHE_GIB": "0"}
    ) as (address, _):
        for students in STUDENTS:
            rates = measure(address, sequences, students)
            rows.append(
                {
                    "students": students,
                    "tokens/s together": sum(rates),
                    "least": min(rates),
                    "most": max(rates),
                    # Jain's fairness index: 1 when all get the same, 1 / n when one gets everything.
                    "fairness": sum(rates) ** 2 / (len(rates) * sum(rate**2 for rate in rates)),
                }
            )
    report("concurrent_students", title=f"one teacher, {SECONDS} s each; student 0 has 8 requests open", rows=rows)


def measure(address: str, sequences: Sequence[TokenSequence], students: int) -> list[float]:
    """Tokens per second of each student while all ask."""
    tokens = [0] * students
    stop = threading.Event()
    lock = threading.Lock()
    fresh = count()

    def study(number: int, client: TeacherClient) -> None:
        with suppress(CancelledError):
            while not stop.is_set():
                ask(number, client)

    def ask(number: int, client: TeacherClient) -> None:
        with lock:
            start = next(fresh)
        # A token more makes the sequence new to the server, which would otherwise join equal requests.
        part = [
            replace(sequence, token_ids=[start % 40_000, start // 40_000, *list(sequence.token_ids)[2:]])
            for sequence in sequences[:16]
        ]
        for scored in client.score(part):
            if stop.is_set():
                return
            with lock:
                tokens[number] += _length(part, scored.id)

    clients = [TeacherClient(address) for _ in range(students)]
    threads = [
        threading.Thread(target=study, args=(number, clients[number]))
        for number in range(students)
        for _ in range(GREEDY_STREAMS if number == 0 else 1)
    ]
    for thread in threads:
        thread.start()
    stop.wait(WARM_SECONDS)
    before, started = list(tokens), time.perf_counter()
    stop.wait(SECONDS)
    rates = [(now - earlier) / (time.perf_counter() - started) for now, earlier in zip(tokens, before, strict=True)]
    stop.set()
    for client in clients:
        client.close()
    for thread in threads:
        thread.join()
    return rates


def _length(part: Sequence[TokenSequence], sequence_id: str) -> int:
    return next(len(sequence.token_ids) for sequence in part if sequence.id == sequence_id)


if __name__ == "__main__":
    main()
