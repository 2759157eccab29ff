"""What students that read slowly cost the teacher's memory: growth of its resident set, per student.

The mock engine computes large labels at once, so that everything a reader leaves unread would pile up in the server.
The target is at most 32 MiB for a student that reads one message a second, whatever it has asked for.
"""

import threading
import time

import psutil

from benchmarks.report import report
from benchmarks.serving import teacher_process
from services.contract.sequences import LabelOptions, TokenSequence
from student_trainer.teacher_client import TeacherClient

VOCAB_SIZE = 32_000
SEQUENCES, LENGTH = 512, 96
SECONDS = 20


def main() -> None:
    rows = []
    for students in (1, 4):
        with teacher_process(
            "--model", str(VOCAB_SIZE), "--engine", "mock", environment={"SMOOTHKD_LABEL_CACHE_GIB": "0"}
        ) as (address, process_id):
            warm_up(address)
            before = _resident(process_id)
            growth = peak_while_reading_slowly(address, process_id, students) - before
        asked = students * SEQUENCES * (LENGTH - 1) * VOCAB_SIZE * 2 / 2**20
        rows.append(
            {
                "slow students": students,
                "labels asked for, MiB": asked,
                "growth, MiB": growth,
                "growth per student, MiB": growth / students,
                "share of the 32 MiB": growth / students / 32,
            }
        )
    report("slow_readers", title=f"full labels of {VOCAB_SIZE:,} tokens, one message read per second", rows=rows)


def peak_while_reading_slowly(address: str, process_id: int, students: int) -> float:
    """Largest resident set in MiB over the time."""
    stop = threading.Event()
    threads = [threading.Thread(target=_read_slowly, args=(address, student, stop)) for student in range(students)]
    for thread in threads:
        thread.start()
    peak = 0.0
    ends = time.monotonic() + SECONDS
    while time.monotonic() < ends:
        peak = max(peak, _resident(process_id))
        time.sleep(0.05)
    stop.set()
    for thread in threads:
        thread.join()
    return peak


def warm_up(address: str) -> None:
    """One small request, so that imports and buffers of the first are not counted."""
    with TeacherClient(address) as client:
        list(client.score(_sequences(student=99, count=2), LabelOptions(encoding="full")))


def _read_slowly(address: str, student: int, stop: threading.Event) -> None:
    with TeacherClient(address) as client:
        for _ in client.score(_sequences(student=student, count=SEQUENCES), LabelOptions(encoding="full")):
            if stop.wait(1.0):
                return


def _sequences(*, student: int, count: int) -> list[TokenSequence]:
    return [
        TokenSequence(
            id=str(number),
            token_ids=[student, number, *range(LENGTH - 2)],
            label_positions=range(1, LENGTH),
        )
        for number in range(count)
    ]


def _resident(process_id: int) -> float:
    return float(psutil.Process(process_id).memory_info().rss) / 2**20


if __name__ == "__main__":
    main()
