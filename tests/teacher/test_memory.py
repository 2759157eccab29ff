"""What readers cost a real server process that leave their labels unread."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from services.contract.sequences import TokenSequence
from student_trainer.teacher_client import TeacherClient
from tests.teacher.serving import free_port, health_of, teacher_process, wait_until

LENGTH = 4096
MIB = 1024 * 1024
"""Also the size of one sequence's labels: 4096 states of 64 float32."""


@contextmanager
def served() -> Iterator[tuple[str, psutil.Process]]:
    port = free_port()
    # A small vocabulary, so that computing takes little memory beside the labels.
    options = {"model": "16", "engine": "mock", "port": port, "max_length": LENGTH, "label_dtype": "float32"}
    with teacher_process(options) as process:
        wait_until(lambda: health_of(f"127.0.0.1:{port}") == "SERVING")
        yield f"127.0.0.1:{port}", psutil.Process(process.pid)


def sequences(name: str, count: int) -> list[TokenSequence]:
    start = [ord(character) % 16 for character in name]
    return [
        TokenSequence(
            id=f"{name} {index}",
            token_ids=[*start, index % 16, index // 16, *[1] * (LENGTH - 2 - len(start))],
            label_positions=range(1, LENGTH),
        )
        for index in range(count)
    ]


class Peak:
    """The largest resident set of a process while the block runs, in bytes."""

    def __init__(self, process: psutil.Process) -> None:
        self.bytes = 0
        self._process = process
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch)

    def __enter__(self) -> "Peak":
        self._watcher.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.002):
            self.bytes = max(self.bytes, self._process.memory_info().rss)


def wait_until_idle(process: psutil.Process) -> None:
    """Until the server has done nothing for a while."""
    used = [0.0] * 30

    def is_idle() -> bool:
        times = process.cpu_times()
        used.append(times.user + times.system)
        return used[-1] - used[-30] < 0.01

    wait_until(is_idle, seconds=60)


@pytest.mark.slow
@pytest.mark.parametrize("streams", [1, 4])
def test_a_slow_reader_costs_the_server_at_most_32_mib(streams: int) -> None:
    with served() as (address, process), TeacherClient(address) as client:
        assert len(list(client.score(sequences("warm", 8)))) == 8
        wait_until_idle(process)
        before = process.memory_info().rss
        with Peak(process) as peak:
            readers = [client.score(sequences(f"slow{number}", 120 // streams)) for number in range(streams)]
            for _ in range(3):
                for reader in readers:
                    next(reader)
                # Whatever the server computes ahead of such a reader has been computed then.
                wait_until_idle(process)
        growth = peak.bytes - before
        for reader in readers:
            reader.close()
    # Otherwise nothing was held, and nothing was tested.
    assert growth > 12 * MIB
    assert growth <= 32 * MIB
