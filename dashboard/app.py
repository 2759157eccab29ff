"""The dashboard: what ``streamlit run`` executes on every visit. It draws the frame, then a page out of views/."""

from pathlib import Path

import streamlit as st

from dashboard.session import connect
from services.contract.settings import Settings
from services.reports.case_cards import STYLE

FOLDER = Path(__file__).parent

st.set_page_config(page_title="smoothkd", page_icon=FOLDER / "icon.svg", layout="wide")
st.logo(FOLDER / "logo.svg", size="large")
st.html(FOLDER / "style.css")
st.html(STYLE)
connect(Settings())
page = st.navigation(
    [
        st.Page("views/sweeps.py", title="Sweeps", icon=":material/grid_view:", default=True),
        st.Page("views/runs.py", title="Runs", icon=":material/show_chart:"),
        st.Page("views/summary.py", title="Summary", icon=":material/table_chart:"),
        st.Page("views/case_studies.py", title="Case studies", icon=":material/compare:"),
        st.Page("views/annotate.py", title="Annotate", icon=":material/edit_note:"),
    ],
    position="top",
)
page.run()
