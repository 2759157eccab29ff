"""What a visit carries from page to page: the API client, and the sweep that is looked at.

The sweep stands in the address too (``?sweep=...``), so that every page can be linked to.
"""

import streamlit as st
from pydantic import SecretStr

from dashboard.live import look_again
from dashboard.render.words import problem_html, state_counts
from services.contract.api_client import ApiClient
from services.contract.errors import NotFoundError
from services.contract.records import SweepRecord
from services.contract.settings import Settings


def connect(settings: Settings) -> None:
    """Gives the visit a client of the API that the settings name; visits share it."""
    key = settings.api_key.get_secret_value() if settings.api_key else None
    st.session_state.client = _client(settings.resolved_api_url, key)


def client() -> ApiClient:
    """The API client of this visit."""
    found = st.session_state.client
    assert isinstance(found, ApiClient)
    return found


def choose_sweep() -> SweepRecord | None:
    """A select box of sweeps, newest first, on the one that the address names, else the one last looked at.

    None, with what to do said on the page, where there is no sweep at all.
    """
    sweeps = {sweep.id: sweep for sweep in client().sweeps(limit=50).items}
    wanted = st.query_params.get("sweep") or st.session_state.get("sweep")
    if wanted and wanted not in sweeps:
        _add_older(sweeps, wanted)
    if not sweeps:
        st.html(
            '<div class="sk-empty"><h3>No sweep yet</h3><p>Run <code>make demo</code> for one that takes about ten '
            "minutes, or submit a sweep of your own on the Sweeps page.</p></div>"
        )
        st.page_link("views/sweeps.py", label="Submit a sweep", icon=":material/add:")
        look_again()
        return None
    ids = list(sweeps)
    # The address is the truth: it follows the select box before the page runs again.
    st.session_state["sweep-choice"] = wanted if wanted in sweeps else ids[0]
    chosen = st.selectbox(
        "Sweep",
        ids,
        format_func=lambda sweep_id: _title(sweeps[sweep_id]),
        key="sweep-choice",
        label_visibility="collapsed",
        on_change=_follow_choice,
    )
    remember_sweep(chosen)
    return sweeps[chosen]


def remember_sweep(sweep_id: str) -> None:
    """Makes a sweep the one that the address and the other pages show."""
    st.session_state.sweep = sweep_id
    if st.query_params.get("sweep") != sweep_id:
        st.query_params["sweep"] = sweep_id


@st.cache_resource(max_entries=4, on_release=ApiClient.close)
def _client(url: str, key: str | None) -> ApiClient:
    return ApiClient(url, SecretStr(key) if key else None)


def _add_older(sweeps: dict[str, SweepRecord], sweep_id: str) -> None:
    try:
        sweeps[sweep_id] = client().sweep(sweep_id)
    except NotFoundError as error:
        st.html(problem_html(error, title="The sweep in the address does not exist"))


def _follow_choice() -> None:
    # What the address says besides the sweep (an item, a benchmark) belongs to the sweep that was left.
    st.query_params.from_dict({"sweep": st.session_state["sweep-choice"]})


def _title(sweep: SweepRecord) -> str:
    created = sweep.created_at.astimezone().strftime("%Y-%m-%d %H:%M")
    return f"{sweep.name} · {created} · {state_counts(sweep.runs)}"
