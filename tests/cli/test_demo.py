"""Following a sweep of the demo."""

import pytest

from services.cli import demo
from services.contract.errors import ApiUnavailableError


class LateApi:
    """Answers once it has been asked ``late`` times."""

    def __init__(self, late: int) -> None:
        self.late = late
        self.asked = 0

    def all_runs(self, sweep_id: str) -> list[object]:
        self.asked += 1
        if self.asked <= self.late:
            raise ApiUnavailableError("the API did not answer in time")
        return []


class RestartingSupervisor:
    def restart_ended(self) -> list[str]:
        return []


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(demo.sweep_views, "show_progress", lambda bars, tasks, runs: True)


def test_an_api_that_answers_late_does_not_end_the_demo() -> None:
    api = LateApi(late=3)
    demo._follow(api, "sw-1", RestartingSupervisor())
    assert api.asked == 4


def test_an_api_that_stays_away_ends_the_demo_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(ApiUnavailableError):
        demo._follow(LateApi(late=10**6), "sw-1", RestartingSupervisor())
