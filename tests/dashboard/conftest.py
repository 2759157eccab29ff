"""Fixtures of the dashboard's tests: a real HTTP server that plays the API, and pages opened as a visitor does."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

import dashboard
from tests.dashboard.fake_api import FakeApi, serving
from tests.dashboard.seed import World, populated

APP = Path(dashboard.__path__[0]) / "app.py"
Visit = Callable[..., AppTest]


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    """An API with the sweeps of ``populated``; the dashboard is told its address."""
    with serving(FakeApi(populated())) as fake:
        monkeypatch.setenv("SMOOTHKD_API_URL", fake.url)
        yield fake


@pytest.fixture
def empty_api(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    """An API that knows no sweep."""
    with serving(FakeApi(World())) as fake:
        monkeypatch.setenv("SMOOTHKD_API_URL", fake.url)
        yield fake


@pytest.fixture
def visit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Visit]:
    """visit("runs", sweep=...) opens a page with query parameters and returns it, drawn."""
    monkeypatch.delenv("SMOOTHKD_API_KEY", raising=False)
    st.cache_resource.clear()

    def open_page(page: str, **query: str) -> AppTest:
        app = AppTest.from_file(APP, default_timeout=30)
        app.switch_page(f"views/{page}.py")
        for name, value in query.items():
            app.query_params[name] = value
        return app.run()

    yield open_page
    st.cache_resource.clear()
