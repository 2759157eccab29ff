"""How long a student waits for teachers that are away, load, or die while they load."""

import threading
import time

import grpc
import pytest

from services.contract.errors import TeacherUnavailableError
from services.contract.teacher_channel import TeacherAccess
from student_trainer.patience import Patience

LOADING, REFUSED = "connections to all backends failing; backend unhealthy", "failed to connect to all addresses"


class Unavailable(grpc.RpcError):
    """A call that failed, as gRPC's own errors tell of it."""

    def __init__(self, details: str) -> None:
        self._details = details

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> tuple[()]:
        return ()


class Clock(threading.Event):
    """Time that passes only while somebody waits."""

    now = 0.0

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.now += timeout
        return False


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def waited(patience: Patience, clock: Clock, details: str, *, most: float) -> float:
    """How long a failure is borne, at most so many seconds."""
    began = clock.now
    try:
        while clock.now < began + most:
            patience.wait_or_raise(Unavailable(details))
    except TeacherUnavailableError:
        pass
    return clock.now - began


def test_one_that_loads_is_waited_for_longer_and_one_that_dies_meanwhile_again(clock: Clock) -> None:
    def patience() -> Patience:
        return Patience(seconds=100, address="a:1", access=TeacherAccess(), known_model="m", closed=clock, warned=set())

    assert waited(patience(), clock, REFUSED, most=1e6) == pytest.approx(100, abs=5)
    assert waited(patience(), clock, LOADING, most=1e6) == pytest.approx(1500, abs=5)
    changing = patience()
    assert waited(changing, clock, LOADING, most=500) >= 500
    assert waited(changing, clock, REFUSED, most=60) >= 60
    assert waited(changing, clock, LOADING, most=500) >= 500
    assert waited(changing, clock, REFUSED, most=1e6) == pytest.approx(100, abs=10)
    for_ever = patience()
    for _ in range(14):
        waited(for_ever, clock, LOADING, most=50)
        waited(for_ever, clock, REFUSED, most=60)
    assert waited(for_ever, clock, REFUSED, most=1e6) < 60, "fifteen times as long is the end of it"


def test_a_wait_is_told_of_once_unless_it_is_short(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    patience = Patience(seconds=100, address="a:1", access=TeacherAccess(), known_model="", closed=clock, warned=set())
    for _ in range(3):
        assert waited(patience, clock, REFUSED, most=4) >= 4
        patience.renew()
    assert not caplog.records
    assert waited(patience, clock, REFUSED, most=90) >= 90
    assert [record.message for record in caplog.records] == ["no teacher answers at a:1; asking again for 94 seconds"]
