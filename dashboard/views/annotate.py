"""Annotate: a person marks what an output says beyond its source, without knowing which student wrote it."""

from collections.abc import Sequence
from functools import partial

import streamlit as st

from dashboard.live import look_again, problems_shown
from dashboard.render.marking import mark_words
from dashboard.session import choose_sweep, client
from dashboard.tasks import Task, judgement, proposal, tasks_of
from services.contract.annotation_records import Annotation, AnnotatorAgreement
from services.contract.records import CaseStudy, SweepRecord
from services.contract.states import ENDED
from services.reports.annotation import touched_words, words_of
from services.reports.case_cards import source_html

ITEMS = 200
"""Items with the widest differences that are offered."""


def draw_page() -> None:
    st.title("Annotate")
    with problems_shown():
        sweep = choose_sweep()
        if sweep is not None:
            draw_sweep(sweep)


def draw_sweep(sweep: SweepRecord) -> None:
    tasks = read_tasks(sweep)
    if not tasks:
        st.info(
            "Nothing to judge yet: the outputs appear once SFT and one KD run have answered a summarisation benchmark.",
            icon=":material/hourglass_empty:",
        )
        if sweep.state not in ENDED:
            look_again()
        return
    annotator = st.text_input(
        "Your name", key="annotator", max_chars=100, help="Your marks are kept under it, beside those of others."
    ).strip()
    if annotator:
        draw_task(sweep.id, tasks, annotator)
    else:
        st.info("Type your name to begin. Another person's marks stay hidden from you.", icon=":material/person:")
    draw_agreement(sweep)


def read_tasks(sweep: SweepRecord) -> list[Task]:
    """Every output of the items that differ most, item by item; read anew when a run has changed state."""
    version = (sweep.id, tuple(sorted(sweep.runs.items())))
    if st.session_state.get("tasks-version") != version:
        studies: list[CaseStudy] = []
        cursor = None
        while len(studies) < ITEMS:
            page = client().case_studies(sweep.id, limit=100, cursor=cursor)
            studies += page.items
            cursor = page.next_cursor
            if cursor is None:
                break
        st.session_state["tasks"] = [task for study in studies for task in tasks_of(study)]
        st.session_state["tasks-version"] = version
    tasks: list[Task] = st.session_state["tasks"]
    return tasks


def draw_task(sweep_id: str, tasks: Sequence[Task], annotator: str) -> None:
    mine = {
        (one.run_id, one.benchmark, one.item_id): one for one in client().annotations(sweep_id, annotator=annotator)
    }
    box = f"task-{sweep_id}-{annotator}"
    place = st.session_state.get(box)
    if place is None or place >= len(tasks):
        place = next((place for place, task in enumerate(tasks) if task.key not in mine), 0)
        st.session_state[box] = place
    task = tasks[place]

    def go(to: int) -> None:
        st.session_state[box] = to

    done = sum(task.key in mine for task in tasks)
    st.progress(done / len(tasks), f"You have judged {done} of {len(tasks)} outputs.")
    article, output = st.columns(2, gap="large")
    article.html(source_html(task.study))
    with output:
        marked = draw_marking(task, annotator, mine.get(task.key))
        back, save, forward = st.columns([1, 2, 1])
        back.button("Back", icon=":material/arrow_back:", disabled=place == 0, on_click=go, args=(place - 1,))
        if save.button("Save and go on", type="primary", icon=":material/check:", width="stretch"):
            client().write_annotation(task.output.run_id, judgement(task, annotator=annotator, marked=marked))
            go(min(place + 1, len(tasks) - 1))
            st.rerun()
        forward.button(
            "Skip", icon=":material/arrow_forward:", disabled=place == len(tasks) - 1, on_click=go, args=(place + 1,)
        )


def draw_marking(task: Task, annotator: str, before: Annotation | None) -> list[int]:
    """The places of the marked words: at first what this person saved, else what the detector marked if asked for."""
    words = words_of(task.output.output)
    proposed = proposal(task)
    hints: dict[int, str] = {}
    for span in proposed:
        for place in touched_words(words, [(span.start, span.end)]):
            hints[place] = f"{hints[place]}; {span.explanation}" if place in hints else span.explanation
    shown = bool(proposed) and st.toggle(
        "Begin with the detector's marks",
        key="propose-marks",
        help="A click rejects a mark. Without them you judge unswayed, which is better for validating detectors.",
    )
    if before is not None:
        marked = touched_words(words, [(span.start, span.end) for span in before.spans])
    else:
        marked = list(hints) if shown else []
    st.caption(
        "Mark every word that says something beyond the source or against it: click a word or drag over several; again "
        "to take the mark away."
    )
    key = "-".join(("mark", annotator, *task.key, str(shown), str(before is not None)))
    with st.container(border=True):
        return mark_words(task.output.output, key=key, marked=marked, hints=hints if shown else {})


def draw_agreement(sweep: SweepRecord) -> None:
    agreement = client().annotator_agreement(sweep.id)
    if not agreement.outputs:
        return
    st.subheader("Judged so far")
    left, middle, right = st.columns(3)
    left.metric("Outputs judged", agreement.outputs)
    middle.metric("Judged by two or more", agreement.shared)
    right.metric(
        "Krippendorff's alpha",
        "–" if agreement.alpha is None else f"{agreement.alpha:.2f}",
        help="Agreement over the words of shared outputs: 1 is perfect, 0 is chance.",
    )
    st.caption(agreement_text(agreement))
    st.download_button(
        "Labels for lens training",
        partial(client().lens_labels, sweep.id),
        f"{sweep.name}-labels.jsonl",
        "application/x-ndjson",
        icon=":material/download:",
        on_click="ignore",
        help="One JSON object a line: document, summary, and the spans that most people marked.",
    )


def agreement_text(agreement: AnnotatorAgreement) -> str:
    people = ", ".join(f"{name} ({count})" for name, count in agreement.annotators.items())
    reason = f" No alpha: {agreement.missing}." if agreement.missing else ""
    return f"By {people}.{reason}"


draw_page()
