"""Parts of a page that redraw themselves while something goes on, and errors as the reader meets them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import streamlit as st

from dashboard.render.words import problem_html
from services.contract.errors import ApiUnavailableError, AuthenticationError, SmoothKDError

LIVE_SECONDS = 2.0
"""Between two looks at a sweep that is under way."""

RETRY_SECONDS = 5.0
"""Between two attempts to reach an API that did not answer, and two looks for a first sweep."""


def live(draw: Callable[[], bool], *, ended: bool, seconds: float = LIVE_SECONDS) -> None:
    """Draws a part, and draws it again every ``seconds`` until it returns True: nothing will change any more.

    ``ended`` says that this is already so; then it is drawn once, and again only when the reader works in it.
    An error is shown in its place until the next drawing.
    """

    @st.fragment(run_every=None if ended else seconds)
    def part() -> None:
        try:
            if draw() and not ended:
                st.rerun()
        except SmoothKDError as error:
            _show(error)
            if ended:
                st.button("Try again", icon=":material/refresh:")

    part()


@contextmanager
def problems_shown() -> Iterator[None]:
    """Shows an error of the tree in place of the rest of the page, and tries the page again on its own."""
    try:
        yield
    except SmoothKDError as error:
        _show(error)
        st.caption(f"This page tries again every {RETRY_SECONDS:.0f} seconds.")
        look_again()


def look_again() -> None:
    """Runs the whole page again after RETRY_SECONDS."""
    drawn = False

    @st.fragment(run_every=RETRY_SECONDS)
    def wait() -> None:
        nonlocal drawn
        if drawn:
            st.rerun()
        drawn = True

    wait()


def _show(error: SmoothKDError) -> None:
    if isinstance(error, ApiUnavailableError):
        title = "The API cannot be reached"
    elif isinstance(error, AuthenticationError):
        title = "The API does not accept the dashboard's key (SMOOTHKD_API_KEY)"
    else:
        title = "The API answered with an error"
    st.html(problem_html(error, title=title))
