"""Case studies: one article, what SFT and KD students made of it, and what of that the article does not support."""

from collections.abc import Sequence
from functools import partial

import streamlit as st

from dashboard.live import live, problems_shown
from dashboard.render.spans import legend_html
from dashboard.render.words import state_counts
from dashboard.session import choose_sweep, client
from services.contract.metric_words import metric_title
from services.contract.records import CaseStudy, SweepRecord
from services.contract.states import ENDED
from services.reports.case_cards import UNSUPPORTED, article_html, difference_html, outputs_html, study_title
from services.reports.case_export import FORMATS, export_studies
from services.reports.colours import method_colours
from services.reports.detectors import agreement_text, detector_title, detectors_of, marked_by
from services.reports.words import run_setting

READ_AT_MOST = 500
SIGNS = {"all items": (-1, 0, 1), "widest difference: KD better": (1,), "widest difference: SFT better": (-1,)}
"""Of the differences that each choice shows."""
Key = tuple[str, str]  # benchmark and item id: what stays the same while the order changes


def draw_page() -> None:
    st.title("Case studies")
    with problems_shown():
        sweep = choose_sweep()
        if sweep is not None:
            live(lambda: draw_studies(sweep.id), ended=sweep.state in ENDED)


def draw_studies(sweep_id: str) -> bool:
    sweep = client().sweep(sweep_id)
    metric = st.session_state.get(f"metric-{sweep_id}", UNSUPPORTED)
    studies, settings = read_studies(sweep, metric)
    if studies or metric != UNSUPPORTED:
        shown = filter_studies(sweep_id, studies)
        if shown:
            draw_study(choose_study(sweep_id, shown), settings)
            draw_export(sweep, shown)
        elif studies:
            st.info("No item differs by that much. Lower the difference, or choose another benchmark.")
        else:
            st.info(f"No item has {metric_title(metric)} of its own, both of SFT and of a KD run.")
    else:
        draw_nothing(sweep)
    return sweep.state in ENDED


def read_studies(sweep: SweepRecord, metric: str) -> tuple[list[CaseStudy], dict[str, str]]:
    """The studies, those first where SFT and KD differ most, and what sets each run apart.

    Read anew when a run has changed state or another metric is asked for.
    """
    version = (sweep.id, metric, tuple(sorted(sweep.runs.items())))
    if st.session_state.get("studies-version") != version:
        studies: list[CaseStudy] = []
        cursor = None
        while len(studies) < READ_AT_MOST:
            page = client().case_studies(sweep.id, metric=metric, limit=100, cursor=cursor)
            studies += page.items
            cursor = page.next_cursor
            if cursor is None:
                break
        runs = client().all_runs(sweep.id)
        measured = dict.fromkeys(cell.metric for row in client().summary(sweep.id).rows for cell in row.cells)
        methods = list(dict.fromkeys(run.method for run in runs))
        st.session_state["studies"] = studies
        st.session_state["studies-settings"] = {run.id: run_setting(run) for run in runs}
        st.session_state["studies-methods"] = methods
        st.session_state["studies-runs"] = runs
        st.session_state["studies-metrics"] = [UNSUPPORTED, *measured]
        st.session_state["studies-cut"] = cursor is not None
        st.session_state["studies-version"] = version
    return st.session_state["studies"], st.session_state["studies-settings"]


def draw_nothing(sweep: SweepRecord) -> None:
    if not sweep.spec.evaluation.benchmarks:
        st.info("This sweep names no benchmark. Case studies need a summarisation benchmark such as demo_news.")
    elif sweep.state in ENDED:
        st.warning(
            f"Nothing to compare ({state_counts(sweep.runs)}): case studies need a summarisation benchmark answered by "
            "an SFT run (alpha 0) and at least one KD run. The Runs page says what went wrong."
        )
    else:
        st.info(
            f"Nothing to compare yet ({state_counts(sweep.runs)}): the first case studies appear once SFT and one KD "
            "run have been evaluated.",
            icon=":material/hourglass_empty:",
        )


def filter_studies(sweep_id: str, studies: Sequence[CaseStudy]) -> list[CaseStudy]:
    benchmarks = list(dict.fromkeys(study.benchmark for study in studies))
    widest = max((round(100 * abs(study.difference)) for study in studies), default=0)
    first, left, middle, right = st.columns([2, 2, 2, 3], vertical_alignment="bottom", gap="medium")
    first.selectbox(
        "Compared by",
        st.session_state["studies-metrics"],
        format_func=metric_title,
        key=f"metric-{sweep_id}",
        help="Per item, the KD output that differs most from SFT's; the widest differences come first, either way.",
    )
    benchmark = left.selectbox("Benchmark", ["all", *benchmarks], key=f"benchmark-{sweep_id}")
    better = middle.selectbox(
        "Show",
        list(SIGNS),
        key=f"better-{sweep_id}",
        help="By the one KD output that differs most from SFT's; other KD outputs of the item may go the other way.",
    )
    least = right.slider(
        "Difference of at least (points)",
        0,
        max(widest, 1),
        0,
        key=f"least-{sweep_id}",
        help="In the metric's points; for unsupported words, points of a hundred of the output's words.",
    )
    if st.session_state["studies-cut"]:
        st.caption(f"The {READ_AT_MOST} items with the largest differences; the API has the others.")
    return [
        study
        for study in studies
        if benchmark in ("all", study.benchmark)
        and round(100 * abs(study.difference)) >= least
        and (study.difference > 0) - (study.difference < 0) in SIGNS[better]
    ]


def choose_study(sweep_id: str, studies: Sequence[CaseStudy]) -> CaseStudy:
    """Previous, next, and a list to jump; the address follows."""
    keys = [_key(study) for study in studies]
    box = f"item-{sweep_id}"
    if st.session_state.get(box) not in keys:
        st.session_state[box] = _from_address(keys) or keys[0]
    place = keys.index(st.session_state[box])

    def go(to: int) -> None:
        st.session_state[box] = keys[to]

    back, chooser, forward = st.columns([1, 4, 1], vertical_alignment="bottom")
    back.button(
        "Previous", icon=":material/arrow_back:", disabled=place == 0, on_click=go, args=(place - 1,), width="stretch"
    )
    titles = {_key(study): study_title(study, number=number) for number, study in enumerate(studies, start=1)}
    chooser.selectbox(
        f"Item {place + 1} of {len(keys)}, widest difference first", keys, format_func=titles.__getitem__, key=box
    )
    forward.button(
        "Next",
        icon=":material/arrow_forward:",
        icon_position="right",
        disabled=place == len(keys) - 1,
        on_click=go,
        args=(place + 1,),
        width="stretch",
    )
    benchmark, item = keys[place]
    address = {"sweep": sweep_id, "benchmark": benchmark, "item": item}
    if st.query_params.to_dict() != address:
        st.query_params.from_dict(address)
    return studies[place]


def draw_export(sweep: SweepRecord, studies: Sequence[CaseStudy]) -> None:
    """Buttons that save what the filters show. A file is made only when it is asked for."""
    runs = st.session_state["studies-runs"]
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown(f"Save these {len(studies)}:" if len(studies) > 1 else "Save this one:", width="content")
        for form in FORMATS:
            st.download_button(
                {"json": "JSON", "md": "Markdown", "html": "HTML"}[form],
                partial(export_studies, studies, runs, title=f"Case studies of {sweep.name}", form=form),
                f"{sweep.name}-cases.{form}",
                {"json": "application/json", "md": "text/markdown", "html": "text/html"}[form],
                icon=":material/download:",
                on_click="ignore",
                key=f"save-{form}",
            )


def draw_study(study: CaseStudy, settings: dict[str, str]) -> None:
    study = _marked_by_one(study)
    spans = [span for output in study.outputs for span in output.spans]
    st.html(f'<div class="sk-strip">{difference_html(study)}{legend_html(spans)}</div>')
    article, outputs = st.columns([1, 2], gap="medium")
    article.html(article_html(study))
    colours = method_colours(st.session_state["studies-methods"])
    outputs.html(outputs_html(study.outputs, settings=settings, colours=colours))


def _marked_by_one(study: CaseStudy) -> CaseStudy:
    """The study with the spans of the detector that is chosen, or of all of them; a choice where there are several."""
    detectors = detectors_of(study)
    if len(detectors) < 2:
        st.caption(agreement_text(study))
        return study
    chosen = st.segmented_control(
        "Marked by",
        ["all", *detectors],
        default=detectors[0],
        format_func=detector_title,
        key=f"marked-by-{'-'.join(detectors)}",
        help="Which detector's spans are shown. Hover over a mark to see what it says.",
    )
    st.caption(agreement_text(study))
    return study if chosen in (None, "all") else marked_by(study, str(chosen))


def _key(study: CaseStudy) -> Key:
    return study.benchmark, study.item_id


def _from_address(keys: Sequence[Key]) -> Key | None:
    item, benchmark = st.query_params.get("item"), st.query_params.get("benchmark")
    return next((key for key in keys if key[1] == item and benchmark in (None, key[0])), None)


draw_page()
