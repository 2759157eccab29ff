"""A sweep's report: as a record, and in the forms that people read."""

from collections.abc import Callable, Mapping
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from fastapi.responses import Response

from services.api.dependencies import RankingHere, ReportingHere, StoreHere
from services.api.document import reference
from services.api.evidence import Ranking, read_answers, read_runs
from services.api.summary import UNSUPPORTED, case_studies, compared_runs
from services.contract.report_records import Report
from services.reports.latex import latex_report
from services.reports.page import CURVES, Evidence, html_report
from services.reports.tables import csv_report, markdown_report
from services.store.store import Store

router = APIRouter(tags=["results"])
STUDIES = 5
"""Case studies in an HTML report."""
TEXT: Mapping[str, tuple[str, Callable[[Report], str]]] = {
    "json": ("application/json", lambda report: report.model_dump_json(indent=2)),
    "md": ("text/markdown", markdown_report),
    "csv": ("text/csv", csv_report),
    "tex": ("application/x-tex", latex_report),
}
HTML = "text/html"


@router.get(
    "/sweeps/{sweep_id}/report",
    response_class=Response,
    responses={
        200: {
            "description": "The report; as JSON it is a Report.",
            "content": {
                **{media_type: {"schema": {"type": "string"}} for media_type, _ in TEXT.values()},
                HTML: {"schema": {"type": "string"}},
                "application/json": {"schema": reference(Report)},
            },
        }
    },
)
def get_report(
    sweep_id: str,
    store: StoreHere,
    report: ReportingHere,
    rank: RankingHere,
    form: Annotated[Literal["json", "md", "csv", "tex", "html"], Query(alias="format")] = "json",
) -> Response:
    """The sweep's table, every method against SFT item by item with its uncertainty, failures and trade-offs.

    As HTML one self-contained page, with plots, training curves and the case studies that differ most.
    """
    found = report(sweep_id)
    if form == "html":
        return Response(html_report(found, _evidence(store, sweep_id, rank)), media_type=HTML)
    media_type, render = TEXT[form]
    return Response(render(found), media_type=media_type)


def _evidence(store: Store, sweep_id: str, rank: Ranking) -> Evidence:
    runs = read_runs(store, sweep_id)
    shown = compared_runs(runs)
    ranked = rank(tuple(run.id for run in shown), None, UNSUPPORTED)[:STUDIES]
    return Evidence(
        runs=runs,
        points={run.id: store.metrics(run.id, names=CURVES) for run in runs},
        studies=case_studies(ranked, shown, read_answers(store, ranked)),
    )
