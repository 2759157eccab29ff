"""Case studies: one article, what SFT and KD students made of it, and what of that the article does not support."""

from collections.abc import Sequence

import streamlit as st

from dashboard.live import live, problems_shown
from dashboard.render.spans import legend_html
from dashboard.render.words import state_counts
from dashboard.session import choose_sweep, client
from services.contract.metric_words import DETECTORS, metric_title
from services.contract.records import CaseStudy, SweepRecord
from services.contract.states import ENDED
from services.reports.case_cards import article_html, difference_html, outputs_html, study_title
from services.reports.colours import method_colours
from services.reports.words import run_setting

READ_AT_MOST = 500
Key = tuple[str, str]  # benchmark and item id: what stays the same while the order changes


def draw_page() -> None:
    st.title("Case studies")
    with problems_shown():
        sweep = choose_sweep()
        if sweep is not None:
            live(lambda: draw_studies(sweep.id), ended=sweep.state in ENDED)


def draw_studies(sweep_id: str) -> bool:
    sweep = client().sweep(sweep_id)
    studies, settings = read_studies(sweep)
    if studies:
        shown = filter_studies(sweep_id, studies)
        if shown:
            draw_study(choose_study(sweep_id, shown), settings)
        else:
            st.info("No item differs by that much. Lower the difference, or choose another benchmark.")
    else:
        draw_nothing(sweep)
    return sweep.state in ENDED


def read_studies(sweep: SweepRecord) -> tuple[list[CaseStudy], dict[str, str]]:
    """The studies, widest difference first, and what sets each run apart; read anew when a run has changed state."""
    version = (sweep.id, tuple(sorted(sweep.runs.items())))
    if st.session_state.get("studies-version") != version:
        studies: list[CaseStudy] = []
        cursor = None
        while len(studies) < READ_AT_MOST:
            page = client().case_studies(sweep.id, limit=100, cursor=cursor)
            studies += page.items
            cursor = page.next_cursor
            if cursor is None:
                break
        runs = client().all_runs(sweep.id)
        methods = list(dict.fromkeys(run.method for run in runs))
        st.session_state["studies"] = studies
        st.session_state["studies-settings"] = {run.id: run_setting(run) for run in runs}
        st.session_state["studies-methods"] = methods
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
    widest = max(round(100 * abs(study.difference)) for study in studies)
    left, middle, right = st.columns([2, 2, 3], vertical_alignment="bottom", gap="medium")
    benchmark = left.selectbox("Benchmark", ["all", *benchmarks], key=f"benchmark-{sweep_id}")
    better = middle.selectbox(
        "Show", ["all items", "KD better supported", "SFT better supported"], key=f"better-{sweep_id}"
    )
    least = right.slider(
        "Difference of at least (points)",
        0,
        max(widest, 1),
        0,
        key=f"least-{sweep_id}",
        help="Points of a hundred by which the share of the output's words that is unsupported differs.",
    )
    if st.session_state["studies-cut"]:
        st.caption(f"The {READ_AT_MOST} items with the largest differences; the API has the others.")
    signs = {"all items": (-1, 0, 1), "KD better supported": (1,), "SFT better supported": (-1,)}[better]
    return [
        study
        for study in studies
        if benchmark in ("all", study.benchmark)
        and round(100 * abs(study.difference)) >= least
        and (study.difference > 0) - (study.difference < 0) in signs
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
    found = {span.detector for output in study.outputs for span in output.spans}
    detectors = [*(name for name in DETECTORS if name in found), *sorted(found - set(DETECTORS))]
    if len(detectors) < 2:
        return study
    chosen = st.segmented_control(
        "Marked by",
        ["all", *detectors],
        default=detectors[0],
        format_func=lambda name: metric_title(DETECTORS.get(str(name), str(name))),
        key=f"marked-by-{'-'.join(detectors)}",
        help="Which detector's spans are shown. Hover over a mark to see what it says.",
    )
    if chosen in (None, "all"):
        return study
    outputs = [
        output.model_copy(update={"spans": [span for span in output.spans if span.detector == chosen]})
        for output in study.outputs
    ]
    return study.model_copy(update={"outputs": outputs})


def _key(study: CaseStudy) -> Key:
    return study.benchmark, study.item_id


def _from_address(keys: Sequence[Key]) -> Key | None:
    item, benchmark = st.query_params.get("item"), st.query_params.get("benchmark")
    return next((key for key in keys if key[1] == item and benchmark in (None, key[0])), None)


draw_page()
