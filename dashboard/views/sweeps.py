"""Sweeps: all of them with their progress, a way to stop one, and a form to submit the next."""

import uuid
from contextlib import suppress
from html import escape
from pathlib import Path

import streamlit as st

from dashboard.live import LIVE_SECONDS, RETRY_SECONDS, live, problems_shown
from dashboard.render.sweep_card import plan_html, sweep_card_html
from dashboard.render.words import problem_html
from dashboard.session import client
from services.contract.errors import NotFoundError, SmoothKDError
from services.contract.records import SweepRecord
from services.contract.shipped import shipped_sweep
from services.contract.states import ENDED, State

PAGE = 20
RUNS_READ_FOR_PROGRESS = 50
LINKS = (
    ("views/runs.py", "Runs", ":material/show_chart:"),
    ("views/summary.py", "Summary", ":material/table_chart:"),
    ("views/case_studies.py", "Case studies", ":material/compare:"),
)


def draw_page() -> None:
    st.title("Sweeps")
    with problems_shown():
        sweeps = read_sweeps()
        draw_submission(expanded=not sweeps)
        ended = bool(sweeps) and all(sweep.state in ENDED for sweep in sweeps)
        live(draw_list, ended=ended, seconds=LIVE_SECONDS if sweeps else RETRY_SECONDS)


def read_sweeps() -> list[SweepRecord]:
    """As many as the reader asked to see, newest first; the one that the address names comes first of all."""
    shown: int = st.session_state.get("sweeps-shown", PAGE)
    sweeps: list[SweepRecord] = []
    cursor = None
    while len(sweeps) < shown:
        page = client().sweeps(limit=min(shown - len(sweeps), 200), cursor=cursor)
        sweeps += page.items
        cursor = page.next_cursor
        if cursor is None:
            break
    st.session_state["sweeps-more"] = cursor is not None
    wanted = st.query_params.get("sweep")
    if wanted and wanted not in {sweep.id for sweep in sweeps}:
        with suppress(NotFoundError):
            sweeps.insert(0, client().sweep(wanted))
    return sweeps


def draw_list() -> bool:
    sweeps = read_sweeps()
    wanted = st.query_params.get("sweep")
    if wanted and wanted not in {sweep.id for sweep in sweeps}:
        missing = NotFoundError(f"there is no sweep {wanted}", fix="Choose one of the sweeps below.")
        st.html(problem_html(missing, title="The sweep in the address does not exist"))
    if not sweeps:
        st.html(
            '<div class="sk-empty"><h3>No sweep yet</h3><p>Submit the one above, or run <code>make demo</code>: '
            "it compares SFT with two KD students on shipped data in about ten minutes.</p></div>"
        )
        return False
    for sweep in sweeps:
        draw_sweep(sweep)
    if st.session_state["sweeps-more"] and st.button("Show older sweeps"):
        st.session_state["sweeps-shown"] = st.session_state.get("sweeps-shown", PAGE) + PAGE
        st.rerun(scope="app")
    return all(sweep.state in ENDED for sweep in sweeps)


def draw_sweep(sweep: SweepRecord) -> None:
    with st.container(border=True, key=f"card-{sweep.id}"):
        facts, links = st.columns([4, 1], vertical_alignment="center")
        facts.html(sweep_card_html(sweep, progress=read_progress(sweep)))
        with links.container(gap=None):
            for page, label, icon in LINKS:
                st.page_link(page, label=label, icon=icon, query_params={"sweep": sweep.id})
            if sweep.state not in ENDED:
                draw_cancel(sweep)


def read_progress(sweep: SweepRecord) -> float | None:
    """Mean progress of a running sweep's runs; None where counting ended runs has to do."""
    if sweep.state is not State.RUNNING or sum(sweep.runs.values()) > RUNS_READ_FOR_PROGRESS:
        return None
    runs = client().all_runs(sweep.id)
    return sum(1.0 if run.state in ENDED else run.progress for run in runs) / len(runs) if runs else None


def draw_cancel(sweep: SweepRecord) -> None:
    if sweep.cancel_requested:
        st.caption("Stopping; running work ends soon.")
        return
    with st.popover("Cancel", icon=":material/stop_circle:", type="tertiary"):
        st.html(
            f"<p><strong>Stop {escape(sweep.name)}?</strong> Queued runs will not start and running ones end soon. "
            "What has been trained and measured stays.</p>"
        )
        if st.button("Yes, stop this sweep", key=f"cancel-{sweep.id}", type="primary"):
            try:
                client().cancel_sweep(sweep.id)
            except SmoothKDError as error:
                st.html(problem_html(error, title="The sweep was not stopped"))
            else:
                st.rerun(scope="app")


def draw_submission(*, expanded: bool) -> None:
    with st.expander("Submit a sweep", icon=":material/add_circle:", expanded=expanded):
        st.session_state.setdefault("spec", example())
        st.file_uploader("A YAML file", type=["yaml", "yml"], key="upload", on_change=take_upload)
        if "upload-problem" in st.session_state:
            st.error(st.session_state["upload-problem"])
        text = st.text_area(
            "Specification",
            key="spec",
            height=260,
            persist_state="session",
            help="The same YAML as in the folder sweeps/.",
        )
        with st.container(horizontal=True):
            submitted = st.button("Submit", type="primary", icon=":material/send:", disabled=not text.strip())
            checked = st.button("Check only", icon=":material/rule:", disabled=not text.strip())
        if checked:
            check(text)
        if submitted:
            submit(text)
        else:
            # A double click reaches the API twice under one key, and so makes one sweep.
            st.session_state["submission"] = str(uuid.uuid4())
    if "submitted" in st.session_state:
        st.success(f"Submitted as {st.session_state.pop('submitted')}.", icon=":material/check:")


def example() -> str:
    try:
        return shipped_sweep("demo.yaml").read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def take_upload() -> None:
    file = st.session_state["upload"]
    st.session_state.pop("upload-problem", None)
    if file is None:
        return
    try:
        st.session_state["spec"] = file.getvalue().decode("utf-8")
    except UnicodeDecodeError:
        name = Path(file.name).suffix or "file"
        st.session_state["upload-problem"] = (
            f"This {name} is not UTF-8 text. Choose a YAML file such as those in sweeps/."
        )


def check(text: str) -> None:
    try:
        plan = client().check_yaml(text)
    except SmoothKDError as error:
        st.html(problem_html(error, title="The check found a problem"))
    else:
        st.html(plan_html(plan))


def submit(text: str) -> None:
    try:
        sweep = client().submit_yaml(text, idempotency_key=st.session_state["submission"])
    except SmoothKDError as error:
        st.html(problem_html(error, title="The sweep was not submitted"))
    else:
        st.session_state["submitted"] = sweep.id
        st.session_state.sweep = sweep.id
        st.rerun()


draw_page()
