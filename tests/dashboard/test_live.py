"""Pages follow a sweep while it goes on, and stop once it has ended."""

import pytest

from services.contract.errors import StoreUnavailableError
from services.contract.states import State
from tests.dashboard.pages import FINISHED, RUNNING


@pytest.fixture
def intervals(monkeypatch):
    """What st.fragment was asked to repeat, in order of drawing."""
    import streamlit

    seen = []
    fragment = streamlit.fragment

    def watched(function=None, *, run_every=None, **options):
        seen.append(run_every)
        return fragment(function, run_every=run_every, **options)

    monkeypatch.setattr(streamlit, "fragment", watched)
    return seen


@pytest.mark.parametrize("page", ["runs", "summary", "case_studies"])
def test_a_page_updates_itself_until_its_sweep_has_ended(api, visit, intervals, page):
    app = visit(page, sweep=RUNNING)
    assert intervals == [2.0]
    for index in (2, 3):
        api.world.set_run(RUNNING, index, State.SUCCEEDED)
    app.run()
    assert intervals == [2.0, None]


def test_the_annotate_page_waits_for_outputs_and_then_disturbs_nobody(api, visit, intervals):
    visit("annotate", sweep=RUNNING)
    assert intervals == [5.0]
    visit("annotate", sweep=FINISHED)
    assert intervals == [5.0]


def test_a_page_that_learns_of_the_end_while_it_draws_stops_at_once(api, visit, intervals):
    def end_after_the_choice():
        if api.requests[-1] == f"GET /v1/sweeps/{RUNNING}":
            for index in (2, 3):
                api.world.set_run(RUNNING, index, State.SUCCEEDED)

    api.on_request = end_after_the_choice
    visit("summary", sweep=RUNNING)
    assert intervals == [2.0, None]


def test_the_list_updates_while_any_sweep_goes_on(api, visit, intervals):
    app = visit("sweeps")
    assert intervals == [2.0]
    for index in (2, 3):
        api.world.set_run(RUNNING, index, State.SUCCEEDED)
    app.run()
    assert intervals == [2.0, None]


def test_pages_wait_for_a_first_sweep_and_for_the_api(empty_api, visit, intervals):
    visit("sweeps")
    visit("runs")
    empty_api.failure = StoreUnavailableError("gone")
    visit("summary")
    assert intervals == [5.0, 5.0, 5.0]
