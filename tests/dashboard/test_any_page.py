"""Every page over HTTP: with sweeps, without, with an API that errs, refuses or is not there."""

import socket

import pytest

from services.contract.errors import StoreUnavailableError
from tests.dashboard.pages import CANCELLED, FINISHED, PAGES, RUNNING, html


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("sweep", [FINISHED, RUNNING, CANCELLED])
def test_every_page_draws_every_kind_of_sweep(api, visit, page, sweep):
    app = visit(page, sweep=sweep)
    assert not app.exception
    assert ("sk-problem" in html(app)) == (page == "runs" and sweep == RUNNING)
    assert app.query_params["sweep"] == sweep


@pytest.mark.parametrize("page", PAGES)
def test_an_empty_platform_says_what_to_do(empty_api, visit, page):
    app = visit(page)
    assert not app.exception
    assert "No sweep yet" in html(app)
    assert "<code>make demo</code>" in html(app)


@pytest.mark.parametrize("page", PAGES)
def test_an_api_that_is_not_there_is_named_with_the_command_that_starts_it(visit, monkeypatch, page):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        monkeypatch.setenv("SMOOTHKD_API_URL", url)
        app = visit(page)
    assert not app.exception
    assert "The API cannot be reached" in html(app)
    assert url in html(app)
    assert "<code>smoothkd up</code>" in html(app)


@pytest.mark.parametrize("page", PAGES)
def test_an_error_of_the_api_is_shown_in_its_words(api, visit, page):
    api.failure = StoreUnavailableError("the database at x does not answer", fix="Start it & try <again>.")
    app = visit(page)
    assert not app.exception
    assert "the database at x does not answer" in html(app)
    assert "Start it &amp; try &lt;again&gt;." in html(app)


def test_the_key_is_sent_and_a_wrong_one_explained(api, visit, monkeypatch):
    api.key = "right"
    app = visit("sweeps")
    assert "does not accept the dashboard" in html(app)
    monkeypatch.setenv("SMOOTHKD_API_KEY", "right")
    app.run()
    assert "learning-rates" in html(app)


def test_an_error_while_the_page_is_open_goes_away_again(api, visit):
    app = visit("summary", sweep=FINISHED)
    api.failure = StoreUnavailableError("gone")
    assert "gone" in html(app.run())
    api.failure = None
    assert "27.41" in html(app.run())


def test_an_unknown_sweep_in_the_address_is_named_and_another_shown(api, visit):
    app = visit("summary", sweep="sw-unknown")
    assert "there is no sweep sw-unknown" in html(app)
    assert app.selectbox(key="sweep-choice").value == RUNNING
    assert html(visit("sweeps", sweep="sw-<b>")).count("there is no sweep sw-&lt;b&gt;") == 1


def test_a_sweep_beyond_the_first_page_can_be_linked_to(api, visit):
    spec = api.world.sweeps[FINISHED].spec
    for index in range(60):
        api._add(f"sw-1{index:03d}", spec)
    app = visit("case_studies", sweep=FINISHED)
    assert app.selectbox(key="sweep-choice").value == FINISHED
    assert "Article" in html(app)
    assert FINISHED in html(visit("sweeps", sweep=FINISHED))
    listed = visit("sweeps")
    assert html(listed).count('class="sk-sweep"') == 20
    listed.button[-1].click().run()
    assert html(listed).count('class="sk-sweep"') == 40


def test_the_chosen_sweep_goes_from_page_to_page(api, visit):
    app = visit("runs", sweep=FINISHED)
    app.selectbox(key="sweep-choice").select(CANCELLED).run()
    assert app.query_params["sweep"] == CANCELLED
    app.query_params.clear()
    app.switch_page("views/summary.py").run()
    assert app.selectbox(key="sweep-choice").value == CANCELLED
